"""What single-view benchmarks share: the view of a ``data_prep`` item with its image, and its mask."""

from collections.abc import Callable
from functools import partial

import numpy as np

from data_prep.archives import RawFile
from data_prep.formats import decode_image
from data_prep.item import Item
from dino_depth.anomaly.dataset import Truth, View, named
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = ["image_view", "read_mask"]


def image_view(image: RawFile, item: Item, read: Callable[[Item], DepthMap]) -> View:
    """The view of an item, without a camera."""
    return View(item.stem, partial(_image, image), partial(named, str(item.file), read, item), None)


def _image(file: RawFile) -> np.ndarray:
    """(height, width, 3) uint8."""
    return named(str(file), _decoded, file)


def _decoded(file: RawFile) -> np.ndarray:
    return decode_image(file.read())


def read_mask(file: RawFile | None, label: str, item: Item, read: Callable[[Item], DepthMap]) -> Truth | None:
    """The mask of a sample: not zero where anomalous; empty where a good sample has none.

    Raises:
        DataError: the mask of an anomalous sample is empty, or cannot be read.
    """
    if file is None:
        if label != "good":
            return None
        return Truth("masks", masks=(np.zeros_like(named(str(item.file), read, item).valid),))
    mask = _image(file).any(-1)
    if mask.any() != (label == "anomalous"):
        raise DataError(f"{file}: {np.count_nonzero(mask)} anomalous pixels, but the sample is labelled {label}")
    return Truth("masks", masks=(mask,))
