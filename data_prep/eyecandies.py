"""Eyecandies: rendered 16-bit PNGs with the bounds of each map in a YAML file beside it.

    ROOT/<category>/{train,val,test_public,test_private}/data/<index>_depth.png
                                                             /<index>_info_depth.yaml   normalization: {min, max}
                                                             /<index>_metadata.yaml     anomalous (public test only)

depth = code / 65535 * (max - min) + min, metres. Code 0 is the nearest point, not a missing one: the renderer leaves
no holes, and a pixel is missing only where its depth is not positive. The index is zero-padded to a width that
differs between splits. ROOT may also be one category's folder.
"""

import math
from typing import Any

import numpy as np
import yaml

from data_prep.archives import RawFile
from data_prep.formats import decode_png
from data_prep.item import Item, Published, find_items
from data_prep.tree import RawTree
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = ["LICENCE", "PUBLISHED", "items", "read"]

LICENCE = "Eyecandies, no data licence stated by its repository (see eyecan-ai.github.io/eyecandies)"
LAYOUT = "[<category>/]{train,val,test_public,test_private}/data/*_depth.png"
PATTERN = r"(?:.*/)?(?P<category>[^/]+)/(?P<split>[^/]+)/data/(?P<index>[^/]+)_depth\.png"
SPLITS = ("train", "val", "test_public", "test_private")
CATEGORIES = (
    "CandyCane", "ChocolateCookie", "ChocolatePraline", "Confetto", "GummyBear", "HazelnutTruffle",
    "LicoriceSandwich", "Lollipop", "Marshmallow", "PeppermintCandy",
)  # fmt: skip
COUNTS = (
    ("train", "good", 1000), ("val", "good", 100), ("test_public", "good", 25), ("test_public", "anomalous", 25),
    ("test_private", "unknown", 400),
)  # fmt: skip
PUBLISHED: list[Published] = [(category, *count) for category in CATEGORIES for count in COUNTS]


def items(tree: RawTree) -> list[Item]:
    """Every depth map of a dataset or of one category.

    The label is "good" in ``train`` and ``val``, from the metadata ("good" or "anomalous") in ``test_public``, and
    "unknown" in ``test_private``.

    Raises:
        DataError: there is none, one lies in a folder that is no split of this dataset, or metadata are unreadable.
    """

    def make(name: str, source: str, place: dict[str, str]) -> Item:
        start = name.removesuffix("depth.png")
        mask = {"mask": source.removesuffix("depth.png") + "mask.png"} if f"{start}mask.png" in tree else {}
        beside = {key: f"{start}{key}.yaml" for key in ("info_depth", "metadata")}
        companions = {key: tree[path] for key, path in beside.items() if path in tree}
        label = _label(companions.get("metadata"), place["split"])
        return Item(
            "eyecandies", place["category"], place["split"], label, place["index"], tree[name], source, extra=mask,
            companions=companions,
        )  # fmt: skip

    return find_items(tree, "eyecandies", PATTERN, LAYOUT, SPLITS, make)


def _label(metadata: RawFile | None, split: str) -> str:
    if split in ("train", "val"):
        return "good"
    if split == "test_private" or metadata is None:
        return "unknown"
    try:
        anomalous = _yaml(metadata)["anomalous"]
    except (DataError, KeyError, TypeError) as error:
        raise DataError(f"{metadata} does not say whether the sample is anomalous: {error}") from error
    if anomalous not in (0, 1):
        raise DataError(f"{metadata}: anomalous must be 0 or 1, got {anomalous!r}")
    return "anomalous" if anomalous else "good"


def read(item: Item) -> DepthMap:
    """The metric depth of a map.

    Raises:
        DataError: not a 16-bit PNG, or its bounds are absent, not numbers or in the wrong order.
    """
    codes = decode_png(item.file.read())
    if "info_depth" not in item.companions:
        raise DataError(f"its bounds are missing: no {item.stem}_info_depth.yaml")
    bounds = item.companions["info_depth"]
    try:
        content = _yaml(bounds)
        low, high = (content["normalization"][key] for key in ("min", "max"))
    except (KeyError, TypeError) as error:
        raise DataError(f"{bounds.name} holds no normalization.min and .max") from error
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (low, high)) or high < low:
        raise DataError(f"{bounds.name}: normalization must be two numbers, min <= max, got {low!r} and {high!r}")
    return DepthMap.from_values(codes / np.float64(65535) * (high - low) + low)


def _yaml(file: RawFile) -> Any:
    try:
        return yaml.safe_load(file.read())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DataError(f"{file.name} is not readable YAML") from error
