"""Heads: from features of nominal samples to anomaly maps of any sample. The file name is the head's name.

A head module offers

    <Name>Config                                                    a dataclass
    INFERENCE                                                       the names of its fields that only ``score`` reads
    fit(features, config, seed, device, *, classes=None) -> head    from the features of the training samples
    score(head, features, *, class_index=0) -> maps                 {modality: (views, rows, columns)}, float32, CPU
    from_state(state, device) -> head                               from what head.state() gave: values and tensors

Larger means more anomalous. A head never masks, upsamples or thresholds, and never loads an encoder: what all heads
share happens before and after them. ``share`` tells a head which cells show the object at all, so that the background
does not become part of what it learns.
"""

from torch import Tensor

from dino_depth.anomaly.features import SampleFeatures
from dino_depth.errors import DataError

__all__ = ["check_features"]


def check_features(features: SampleFeatures, place: str, dims: tuple[int, int] | None = None):
    """Refuses features that no head can use.

    Args:
        place: what the message says they are.
        dims: numbers of image and depth channels the head was fitted on.

    Raises:
        DataError: shapes that disagree, other channels than ``dims``, no view at all, NaN or infinity.
    """
    image, depth, share = features.image, features.depth, features.share
    shapes = ", ".join(str(tuple(part.shape)) for part in (image, depth, share))
    if image.ndim != 4 or depth.ndim != 4 or not image.shape[:3] == depth.shape[:3] == share.shape:
        raise DataError(f"{place}: image, depth and share must agree in views, rows and columns, got {shapes}")
    if share.numel() == 0:
        raise DataError(f"{place}: no view or no cell, shapes {shapes}")
    if dims is not None and (image.shape[3], depth.shape[3]) != tuple(dims):
        found = f"{image.shape[3]} image and {depth.shape[3]} depth channels"
        raise DataError(f"{place}: {found}, the head was fitted on {dims[0]} and {dims[1]}")
    for name, part in (("image features", image), ("depth features", depth), ("share", share)):
        if not part.sum().isfinite():  # one pass and no mask as large as the features
            view = next((at for at, values in enumerate(part) if not _finite(values)), None)
            if view is not None:
                raise DataError(f"{place}: {name} of view {view} hold NaN or infinity")


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
