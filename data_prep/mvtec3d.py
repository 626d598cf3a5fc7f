"""MVTec 3D-AD: organised point clouds, float32 tiffs of X, Y and Z in metres; a missing point is (0, 0, 0).

    ROOT/<category>/{train,validation,test}/<good or defect>/xyz/<stem>.tiff      depth is channel 2
                                                            /rgb/<stem>.png
                                                            /gt/<stem>.png         optional, paired by stem

ROOT may also be one category's folder. A ground-truth pixel is the id of a defect class (0 good, 255, 254, ...; see
class_ids.json where it exists), so the label comes from the folder's name, never from the mask's values.
"""

import json
from pathlib import Path

import numpy as np

from data_prep.formats import decode_tiff, image_size, read_file
from data_prep.item import DepthItem, relative_source, subfolders, unexpected_layout
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = ["describe", "items", "read"]

LICENCE = "MVTec 3D-AD, CC BY-NC-SA 4.0 (non-commercial)"
LAYOUT = "[<category>/]{train,validation,test}/<label>/xyz/*.tiff"
SPLITS = ("train", "validation", "test")
INSPECTED_MAPS = 8
EMPTY_BORDER = 0.05


def items(root: Path) -> list[DepthItem]:
    """Every organised cloud below ``root``, a dataset's or a category's folder.

    Raises:
        DataError: there is none, or one lies in a folder that is no split of this dataset.
    """
    categories = [root] if _clouds(root) else subfolders(root)
    found = [item for category in categories for item in _category_items(category, category.parent)]
    if not found:
        raise unexpected_layout(root, "mvtec3d", LAYOUT)
    return found


def _clouds(category: Path) -> list[Path]:
    return [
        path
        for path in sorted(category.glob("*/*/xyz/*"))
        if path.suffix.lower() in (".tiff", ".tif") and not path.name.startswith(".")
    ]


def _category_items(category: Path, root: Path) -> list[DepthItem]:
    found = []
    class_ids = _class_ids(category / "class_ids.json")
    for path in _clouds(category):
        split, label = path.parts[-4], path.parts[-3]
        if split not in SPLITS:
            raise DataError(f"{category / split} is no split of mvtec3d: expected {', '.join(SPLITS)}")
        extra: dict[str, str | int] = {}
        mask = path.parents[1] / "gt" / f"{path.stem}.png"
        if mask.is_file():
            extra["mask"] = relative_source(mask, root)
        if label in class_ids:
            extra["class_id"] = class_ids[label]
        source = relative_source(path, root)
        found.append(DepthItem("mvtec3d", category.name, split, label, path.stem, path, source, extra=extra))
    return found


def _class_ids(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    try:
        return {str(label): int(number) for number, label in json.loads(path.read_bytes()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path} must map class ids to names: {error}") from error


def read(item: DepthItem) -> DepthMap:
    """The metric depth of a cloud; points that are (0, 0, 0) or not finite are missing.

    Raises:
        DataError: not a float (height, width, 3) tiff, a point behind the camera, no valid point, or a size that is
            neither its image's nor that of the image padded to a square (which preprocessing does).
    """
    x, y, depth = np.moveaxis(_points(item), -1, 0)
    # Channel by channel: reductions over an axis of three are many times slower.
    missing = (x == 0) & (y == 0) & (depth == 0) | ~(np.isfinite(x) & np.isfinite(y) & np.isfinite(depth))
    behind = np.count_nonzero((depth <= 0) & ~missing)
    if behind:
        raise DataError(f"{behind} points have Z <= 0, behind the camera")
    image = item.path.parents[1] / "rgb" / f"{item.path.stem}.png"
    size = image_size(image)
    if size is not None and depth.shape not in (size, (max(size), max(size))):
        raise DataError(f"the cloud is {depth.shape[0]}x{depth.shape[1]}, its rgb image {size[0]}x{size[1]}")
    return DepthMap(np.where(missing, 0, depth), ~missing)


def _points(item: DepthItem) -> np.ndarray:
    points = decode_tiff(read_file(item.path))
    if points.ndim != 3 or points.shape[2] != 3 or points.dtype.kind != "f":
        raise DataError(f"expected float X, Y, Z (height, width, 3), got {points.shape} {points.dtype}")
    return points


def describe(items: list[DepthItem]) -> dict[str, bool | str]:
    """For the manifest: the licence, and whether the tree was preprocessed in place.

    The usual preprocessing fits the supporting plane to the border of the cloud, zeroes it and all small clusters,
    and pads to a square with zeros. Raw clouds show the plane at their border, so a category counts as preprocessed
    where the outermost hundredth of the map is empty in the median of a few maps, or where a map was padded beyond
    its image. Depth itself stays metric either way.
    """
    evidence = {}
    for category in sorted({item.category for item in items}):
        members = sorted((item for item in items if item.category == category), key=lambda item: item.source)
        reason = _preprocessing(members[:: max(1, len(members) // INSPECTED_MAPS)][:INSPECTED_MAPS])
        if reason:
            evidence[category] = reason
    reasons = "; ".join(f"{category}: {reason}" for category, reason in evidence.items())
    return {
        "licence": LICENCE,
        "preprocessed": bool(evidence),
        "preprocessed_reason": reasons or "the border of the maps shows the supporting plane",
    }


def _preprocessing(members: list[DepthItem]) -> str:
    borders = []
    for item in members:
        try:
            valid = _points(item)[..., 2] != 0
        except DataError:
            continue
        size = image_size(item.path.parents[1] / "rgb" / f"{item.path.stem}.png")
        if size is not None and valid.shape != size and valid.shape == (max(size), max(size)):
            return f"clouds of {valid.shape[0]}x{valid.shape[1]} are padded beyond images of {size[0]}x{size[1]}"
        band = max(1, max(valid.shape) // 100)
        inner = np.zeros_like(valid)
        inner[band:-band, band:-band] = True
        borders.append(valid[~inner].mean())
    if borders and np.median(borders) < EMPTY_BORDER:
        return f"{np.median(borders):.1%} of the border is valid, the plane was removed"
    return ""
