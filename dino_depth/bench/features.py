"""Patch features of any frozen encoder on the cells that all encoders share."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_depth.bench.data import CELL, View
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError
from dino_depth.frozen import FrozenEncoder

__all__ = ["cell_features", "input_size"]

BATCH = 8


def input_size(encoder: FrozenEncoder, size: int) -> int:
    """The multiple of the encoder's patches that is nearest to ``size``, the same pixels for all but for rounding."""
    return max(round(size / encoder.patch_size), 1) * encoder.patch_size


@torch.inference_mode()
def cell_features(encoder: FrozenEncoder, views: list[View], maps: Iterable[DepthMap], size: int) -> Tensor:
    """(views, cells, dim) float32 on the CPU, cells row by row; a grid of patches that is another one is resized.

    Raises:
        DataError: a feature is not finite.
    """
    cells, side = size // CELL, input_size(encoder, size)
    collected, batch = [], []

    def flush():
        found = encoder.encode(torch.stack(batch)).permute(0, 3, 1, 2)  # (batch, dim, rows, columns)
        if found.shape[-1] != cells:
            found = F.interpolate(found, (cells, cells), mode="bilinear", antialias=True)
        collected.append(found.flatten(2).mT.cpu())
        batch.clear()

    for view, depth_map in zip(views, maps, strict=True):
        batch.append(encoder.prepare(depth_map, side, view.camera.matrix))
        if len(batch) == BATCH:
            flush()
    if batch:
        flush()
    features = torch.cat(collected)
    broken = ~features.isfinite().flatten(1).all(1)
    if broken.any():
        view = views[int(broken.int().argmax())]
        raise DataError(f"{encoder.name}: features of {view.scene}/{view.name} are not finite")
    return features
