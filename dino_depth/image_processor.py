"""Depth in, the input of an export out, as an image processor of transformers; see ``transformers_hooks.py``."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from dino_depth.depth import DepthMap, Normalization, normalize
from dino_depth.errors import ConfigError, DataError
from dino_depth.resample import fit_square
from dino_depth.transformers_hooks import processor_config

__all__ = ["DepthImageProcessor"]

PLAUSIBLE = (1e-3, 30.0)  # metres that the median depth of a map may have
SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I")  # what Pillow calls a PNG or TIFF of them
NO_MEASUREMENT = 65535  # beside 0, in depth of 16 bits


class DepthImageProcessor(BaseImageProcessor):
    """What :meth:`dino_depth.encoder.Encoder.prepare` does, in the form of transformers.

    Args:
        dino_depth: ``normalization`` and ``size`` of the export.
        size: side of the square input in pixels instead of the export's, or transformers' ``{"height", "width"}``.
        metres_per_unit: of depth in whole numbers; the default is that of millimetres.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, dino_depth: dict, size: Any = None, metres_per_unit: float = 0.001, **_):
        super().__init__()
        self.normalization = Normalization(**dino_depth["normalization"])
        self.dino_depth = dino_depth
        # The file holds a sentence where their processors have a size.
        self.size = dino_depth["size"] if size is None or isinstance(size, str) else _side(size)
        self.metres_per_unit = metres_per_unit

    def __call__(
        self, images: Any, return_tensors: str | None = "pt", size: Any = None, metres_per_unit: float | None = None
    ) -> BatchFeature:
        """``pixel_values`` (maps, 1, size, size) float32 of one map or a list of them.

        Args:
            images: a depth map as (height, width) floats in metres or whole numbers of ``metres_per_unit``, an array,
                tensor, :class:`DepthMap`, Pillow image or the path of a 16-bit PNG, TIFF or .npy file. 0, negative
                values, NaN and infinity are missing, and so is 65535 of 16 bits.

        Raises:
            ConfigError: an impossible size or unit.
            DataError: it is no depth map, nothing of it is valid, or its median depth is not that of a depth sensor.
        """
        side = self.size if size is None else _side(size)
        unit = self.metres_per_unit if metres_per_unit is None else metres_per_unit
        if not (isinstance(unit, int | float) and 0 < unit < np.inf):
            raise ConfigError(f"metres_per_unit must be a number above 0, got {unit!r}")
        maps = [_depth_map(image, unit) for image in (images if isinstance(images, list | tuple) else [images])]
        values = [
            fit_square(torch.from_numpy(normalize(each, self.normalization)), torch.from_numpy(each.valid), side)
            for each in maps
        ]
        return BatchFeature({"pixel_values": torch.stack(values)}, tensor_type=return_tensors)

    preprocess = __call__

    def to_dict(self) -> dict:
        """What :meth:`save_pretrained` writes: transformers by itself refuses the copy, too."""
        return processor_config(self.dino_depth["normalization"], self.size)


def _side(size: Any) -> int:
    """The side of a square: a number, or transformers' {"height", "width"}."""
    sides = {size} if isinstance(size, int) else set(dict(size).values()) if isinstance(size, dict) else set()
    if len(sides) != 1 or not isinstance(side := sides.pop(), int) or side < 1:
        raise ConfigError(f"size must be the side of a square in pixels, got {size!r}")
    return side


def _depth_map(image: Any, metres_per_unit: float) -> DepthMap:
    if isinstance(image, DepthMap):
        return image
    name = str(image) if isinstance(image, str | os.PathLike) else f"the {type(image).__name__}"
    values = _read(Path(image)) if isinstance(image, str | os.PathLike) else image
    if isinstance(values, Image.Image):
        if values.mode not in (*SIXTEEN_BITS, "F"):
            raise DataError(f"{name}: a picture of mode {values.mode}; depth is one channel of floats or of 16 bits")
        # "I" holds 32 bits, where Pillow puts what may be 16.
        values = np.array(values, np.uint16 if values.mode.startswith("I;16") else None)
    values = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.ndim != 2 or values.dtype.kind not in "fiu" or values.dtype.itemsize == 1:
        raise DataError(
            f"{name}: {values.shape} {values.dtype}; depth is (height, width) floats in metres or whole numbers of "
            "more than 8 bits, several maps are a list"
        )
    if values.dtype.kind != "f":
        missing = values == NO_MEASUREMENT
        values = np.where(missing, 0, values * np.float64(metres_per_unit))
    found = DepthMap.from_values(values)
    median, (low, high) = float(np.median(found.depth[found.valid])), PLAUSIBLE
    if not low <= median <= high:
        raise DataError(
            f"{name}: the median depth would be {median:.4g} m; floats are metres, whole numbers are metres_per_unit "
            f"({metres_per_unit:g}) each"
        )
    return found


def _read(path: Path) -> np.ndarray | Image.Image:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: unreadable depth: {' '.join(str(error).split())[:200]}") from None
