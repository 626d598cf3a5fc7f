"""Eyecandies: rendered 16-bit PNGs with the bounds of each map in a YAML file beside it.

    ROOT/<category>/{train,val,test_public,test_private}/data/<index>_depth.png
                                                             /<index>_info_depth.yaml   normalization: {min, max}
                                                             /<index>_metadata.yaml     anomalous (public test only)

depth = code / 65535 * (max - min) + min, metres. Code 0 is the nearest point, not a missing one: the renderer leaves
no holes, and a pixel is missing only where its depth is not positive. The index is zero-padded to a width that
differs between splits. ROOT may also be one category's folder.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data_prep.formats import decode_png, read_file
from data_prep.item import DepthItem, relative_source, subfolders, unexpected_layout
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = ["describe", "items", "read"]

LICENCE = "Eyecandies, no data licence stated by its repository (see eyecan-ai.github.io/eyecandies)"
LAYOUT = "[<category>/]{train,val,test_public,test_private}/data/*_depth.png"
SPLITS = ("train", "val", "test_public", "test_private")
SUFFIX = "_depth.png"


def items(root: Path) -> list[DepthItem]:
    """Every depth map below ``root``, a dataset's or a category's folder.

    The label is "good" in ``train`` and ``val``, from the metadata ("good" or "anomalous") in ``test_public``, and
    "unknown" in ``test_private``.

    Raises:
        DataError: there is none, one lies in a folder that is no split of this dataset, or metadata are unreadable.
    """
    categories = [root] if _maps(root) else subfolders(root)
    found = [item for category in categories for item in _category_items(category, category.parent)]
    if not found:
        raise unexpected_layout(root, "eyecandies", LAYOUT)
    return found


def _maps(category: Path) -> list[Path]:
    return sorted(path for path in category.glob(f"*/data/*{SUFFIX}") if not path.name.startswith("."))


def _category_items(category: Path, root: Path) -> list[DepthItem]:
    found = []
    for path in _maps(category):
        split = path.parts[-3]
        if split not in SPLITS:
            raise DataError(f"{category / split} is no split of eyecandies: expected {', '.join(SPLITS)}")
        index = path.name.removesuffix(SUFFIX)
        mask = path.with_name(f"{index}_mask.png")
        extra = {"mask": relative_source(mask, root)} if mask.is_file() else {}
        source = relative_source(path, root)
        found.append(
            DepthItem("eyecandies", category.name, split, _label(path, split), index, path, source, extra=extra)
        )
    return found


def _label(path: Path, split: str) -> str:
    if split in ("train", "val"):
        return "good"
    metadata = path.with_name(path.name.removesuffix(SUFFIX) + "_metadata.yaml")
    if split == "test_private" or not metadata.is_file():
        return "unknown"
    try:
        anomalous = _yaml(metadata)["anomalous"]
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{metadata} does not say whether the sample is anomalous: {error}") from error
    if anomalous not in (0, 1):
        raise DataError(f"{metadata}: anomalous must be 0 or 1, got {anomalous!r}")
    return "anomalous" if anomalous else "good"


def read(item: DepthItem) -> DepthMap:
    """The metric depth of a map.

    Raises:
        DataError: not a 16-bit PNG, or its bounds are absent, not numbers or in the wrong order.
    """
    codes = decode_png(read_file(item.path))
    bounds = item.path.with_name(item.path.name.removesuffix(SUFFIX) + "_info_depth.yaml")
    if not bounds.is_file():
        raise DataError(f"its bounds are missing: no {bounds.name}")
    try:
        content = _yaml(bounds)
        low, high = (content["normalization"][key] for key in ("min", "max"))
    except (KeyError, TypeError) as error:
        raise DataError(f"{bounds.name} holds no normalization.min and .max") from error
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (low, high)) or high < low:
        raise DataError(f"{bounds.name}: normalization must be two numbers, min <= max, got {low!r} and {high!r}")
    return DepthMap.from_values(codes / np.float64(65535) * (high - low) + low)


def describe(items: list[DepthItem]) -> dict[str, str]:
    """For the manifest: the licence."""
    return {"licence": LICENCE}


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(read_file(path))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{path.name} is not readable YAML") from error
