import numpy as np


def fit_square(values, valid, size):
    from dino_depth.pretrain.crops import resample

    height, width = values.shape
    side = max(height, width)
    affine = np.array([[side, 0, (width - side) / 2], [0, side, (height - side) / 2]], float)
    return resample(values[None], valid[None], affine[None, None], size)[0, 0]
