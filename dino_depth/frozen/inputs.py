"""Images and depth maps as the square inputs of networks.

Padding and resizing are :func:`dino_depth.resample.fit_square`'s for both, so that a patch of the image and the patch
of depth in the same row and column show the same place.

What fills the padding: in images the mean colour, 0 after normalisation, which tells an encoder least; in depth maps
the value of a missing pixel, 0 before normalisation. RGB encoders see depth as a grey picture: black where it is
missing, and valid depth, by default from nearest to farthest, at 0.1 to 1. A hole takes no part in that minimum and
maximum.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dino_depth.depth import DepthMap, Normalization, grey, normalize
from dino_depth.errors import ConfigError
from dino_depth.resample import fit_square

__all__ = ["DEPTH_AS", "IMAGENET", "square_depth", "square_image"]

# How depth becomes a picture for an encoder that knows none, the default first: it alone uses the whole range of grey
# whatever the distance, as the pictures such an encoder was trained on do.
DEPTH_AS = ("minmax", "plane", "log", "max")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def square_image(image: np.ndarray, channels: int, mean: Sequence, std: Sequence, size: int) -> Tensor:
    """(channels, size, size) of an image: values 0..1 less ``mean`` over ``std``, the mean colour in the padding.

    Grey becomes three equal channels and colour one channel of luminance where the network needs it.
    """
    planes = [grey(image)] if image.ndim == 2 or channels == 1 else list(np.moveaxis(image.astype(np.float32), 2, 0))
    everywhere = torch.ones(planes[0].shape, dtype=torch.bool)
    # Counted from 1, so that the 0 of the padding is none of the image's values.
    fitted = torch.cat([fit_square(torch.from_numpy(plane + 1), everywhere, size) for plane in planes])
    inside = fitted > 0.5
    mean, std = _statistics(mean, std, channels)
    return torch.where(inside, ((fitted - 1) / 255 - mean) / std, 0)


def square_depth(depth_map: DepthMap, method: str, channels: int, mean: Sequence, std: Sequence, size: int) -> Tensor:
    """(channels, size, size) of a depth map: normalised by ``method``, replicated, less ``mean`` over ``std``."""
    values = torch.from_numpy(normalize(depth_map, Normalization(method=method)))
    fitted = fit_square(values, torch.from_numpy(depth_map.valid), size)
    mean, std = _statistics(mean, std, channels)
    return (fitted - mean) / std


def _statistics(mean: Sequence, std: Sequence, channels: int) -> tuple[Tensor, Tensor]:
    """Both as (channels, 1, 1)."""
    if len(mean) not in (1, channels) or len(std) != len(mean):
        raise ConfigError(f"mean {list(mean)} and std {list(std)} do not fit {channels} input channels")
    return tuple(torch.tensor(part, dtype=torch.float32).expand(channels)[:, None, None] for part in (mean, std))
