"""MVTec 3D-AD: organised point clouds, float32 tiffs of X, Y and Z in metres; a missing point is (0, 0, 0).

    ROOT/<category>/{train,validation,test}/<good or defect>/xyz/<stem>.tiff      depth is channel 2
                                                            /rgb/<stem>.png
                                                            /gt/<stem>.png         optional, paired by stem

ROOT may also be one category's folder. A ground-truth pixel is the id of a defect class (0 good, 255, 254, ...; see
class_ids.json where it exists), so the label comes from the folder's name, never from the mask's values.
"""

import json

import numpy as np

from data_prep.formats import decode_tiff, image_size
from data_prep.item import Item, Published, find_items
from data_prep.tree import RawTree
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = ["PUBLISHED", "describe", "items", "read"]

LICENCE = "MVTec 3D-AD, CC BY-NC-SA 4.0 (non-commercial)"
LAYOUT = "[<category>/]{train,validation,test}/<label>/xyz/*.tiff"
PATTERN = r"(?:.*/)?(?P<category>[^/]+)/(?P<split>[^/]+)/(?P<label>[^/]+)/xyz/(?P<stem>[^/]+)\.(?i:tiff?)"
SPLITS = ("train", "validation", "test")
INSPECTED_MAPS = 8
EMPTY_BORDER = 0.05
COUNTS = {
    "bagel": (244, 22, 22, 88), "cable_gland": (223, 23, 21, 87), "carrot": (286, 29, 27, 132),
    "cookie": (210, 22, 28, 103), "dowel": (288, 34, 26, 104), "foam": (236, 27, 20, 80),
    "peach": (361, 42, 26, 106), "potato": (300, 33, 22, 92), "rope": (298, 33, 32, 69), "tire": (210, 29, 25, 87),
}  # fmt: skip
PLACES = (("train", "good"), ("validation", "good"), ("test", "good"), ("test", "anomalous"))
PUBLISHED: list[Published] = [
    (category, *place, number)
    for category, numbers in COUNTS.items()
    for place, number in zip(PLACES, numbers, strict=True)
]


def items(tree: RawTree) -> list[Item]:
    """Every organised cloud of a dataset or of one category.

    Raises:
        DataError: there is none, one lies in a folder that is no split of this dataset, or class_ids.json is unclear.
    """
    class_ids: dict[str, dict[str, int]] = {}

    def make(name: str, source: str, place: dict[str, str]) -> Item:
        category, split, label, stem = (place[key] for key in ("category", "split", "label", "stem"))
        folder = name[: name.rindex("xyz/")]
        root = folder.removesuffix(f"{split}/{label}/")
        if root not in class_ids:
            class_ids[root] = _class_ids(tree, f"{root}class_ids.json")
        extra: dict[str, str | int] = {}
        if f"{folder}gt/{stem}.png" in tree:
            extra["mask"] = f"{source[: source.rindex('xyz/')]}gt/{stem}.png"
        if label in class_ids[root]:
            extra["class_id"] = class_ids[root][label]
        image = f"{folder}rgb/{stem}.png"
        companions = {"rgb": tree[image]} if image in tree else {}
        return Item("mvtec3d", category, split, label, stem, tree[name], source, extra=extra, companions=companions)

    return find_items(tree, "mvtec3d", PATTERN, LAYOUT, SPLITS, make)


def _class_ids(tree: RawTree, name: str) -> dict[str, int]:
    if name not in tree:
        return {}
    try:
        return {str(label): int(number) for number, label in json.loads(tree[name].read()).items()}
    except (DataError, ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{tree[name]} must map class ids to names: {error}") from error


def read(item: Item) -> DepthMap:
    """The metric depth of a cloud; points that are (0, 0, 0) or not finite are missing.

    Raises:
        DataError: not a float (height, width, 3) tiff, a point behind the camera, no valid point, or a size that is
            neither its image's nor that of the image padded to a square (which preprocessing does).
    """
    depth, missing = _z(_points(item))
    behind = np.count_nonzero((depth <= 0) & ~missing)
    if behind:
        raise DataError(f"{behind} points have Z <= 0, behind the camera")
    size = _image_size(item)
    if size is not None and depth.shape not in (size, (max(size), max(size))):
        raise DataError(f"the cloud is {depth.shape[0]}x{depth.shape[1]}, its rgb image {size[0]}x{size[1]}")
    return DepthMap(depth, ~missing)


def _points(item: Item) -> np.ndarray:
    # The mask that a file holds beside its cloud only repeats which points are (0, 0, 0).
    points = decode_tiff(item.file.read(), masked=False)
    if points.ndim != 3 or points.shape[2] != 3 or points.dtype.kind != "f":
        raise DataError(f"expected float X, Y, Z (height, width, 3), got {points.shape} {points.dtype}")
    return points


def _z(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Z of points (height, width, 3), and where they are (0, 0, 0) or not finite."""
    # Channels apart, each in one piece: passes over interleaved ones are many times slower.
    x, y, depth = np.ascontiguousarray(np.moveaxis(points, -1, 0))
    return depth, (x == 0) & (y == 0) & (depth == 0) | ~(np.isfinite(x) & np.isfinite(y) & np.isfinite(depth))


def _image_size(item: Item) -> tuple[int, int] | None:
    return image_size(item.companions["rgb"]) if "rgb" in item.companions else None


def describe(items: list[Item]) -> dict[str, bool | str]:
    """For the manifest: the licence, and whether the tree was preprocessed in place.

    The usual preprocessing fits the supporting plane to the border of the cloud, zeroes it and all small clusters,
    and pads to a square with zeros. Raw clouds show the plane at their border, so a category counts as preprocessed
    where the outermost hundredth of the map is empty in the median of a few maps, or where a map was padded beyond
    its image. Depth itself stays metric either way.
    """
    evidence = {}
    for category in sorted({item.category for item in items}):
        members = sorted(
            (item for item in items if item.category == category), key=lambda item: (item.file.order, item.source)
        )
        reason = _preprocessing(members[:: max(1, len(members) // INSPECTED_MAPS)][:INSPECTED_MAPS])
        if reason:
            evidence[category] = reason
    reasons = "; ".join(f"{category}: {reason}" for category, reason in evidence.items())
    return {
        "licence": LICENCE,
        "preprocessed": bool(evidence),
        "preprocessed_reason": reasons or "the border of the maps shows the supporting plane",
    }


def _preprocessing(members: list[Item]) -> str:
    borders = []
    for item in members:
        try:
            valid = ~_z(_points(item))[1]
        except DataError:
            continue
        size = _image_size(item)
        if size is not None and valid.shape != size and valid.shape == (max(size), max(size)):
            return f"clouds of {valid.shape[0]}x{valid.shape[1]} are padded beyond images of {size[0]}x{size[1]}"
        band = max(1, max(valid.shape) // 100)
        inner = np.zeros_like(valid)
        inner[band:-band, band:-band] = True
        borders.append(valid[~inner].mean())
    if borders and np.median(borders) < EMPTY_BORDER:
        return f"{np.median(borders):.1%} of the border is valid, the plane was removed"
    return ""
