"""MVTec LOCO AD: photographs whose anomalies are structural (damage) or logical (a wrong number, place or kind).

    ROOT/<category>/{train,validation}/good/<stem>.png
                   /test/{good,logical_anomalies,structural_anomalies}/<stem>.png
                   /ground_truth/<anomaly>/<stem>/000.png, 001.png, ...      one folder of masks for each image

ROOT may also be one category's folder, an archive of either, or a folder with such archives. The masks, 1,246 in the
published dataset, are PNGs below the category's folder too, but never images.
"""

from collections import Counter

from data_prep.item import Item, Published, find_items, read_image
from data_prep.tree import RawTree
from dino_depth.errors import DataError

__all__ = ["LICENCE", "PUBLISHED", "items", "read_image"]

LICENCE = "MVTec LOCO AD, CC BY-NC-SA 4.0 (non-commercial)"
LAYOUT = "[<category>/]{train,validation,test}/{good,logical_anomalies,structural_anomalies}/*.png"
# Any name like that of a split, so that a tree with other splits is refused and not half read.
PATTERN = r"(?:.*/)?(?P<category>[^/]+)/(?P<split>(?:train|val|test)[^/]*)/(?P<label>[^/]+)/(?P<stem>[^/]+)\.(?i:png)"
SPLITS = ("train", "validation", "test")
LABELS = {"train": ("good",), "validation": ("good",), "test": ("good", "logical_anomalies", "structural_anomalies")}
COUNTS = {
    "breakfast_box": (351, 62, 102, 83, 90), "juice_bottle": (335, 54, 94, 142, 94), "pushpins": (372, 69, 138, 91, 81),
    "screw_bag": (360, 60, 122, 137, 82), "splicing_connectors": (360, 60, 119, 108, 85),
}  # fmt: skip
PLACES = [(split, label) for split in SPLITS for label in LABELS[split]]
PUBLISHED: list[Published] = [
    (category, *place, number)
    for category, numbers in COUNTS.items()
    for place, number in zip(PLACES, numbers, strict=True)
]


def items(tree: RawTree) -> list[Item]:
    """Every photograph of a dataset or of one category.

    Where an image has masks, ``extra["mask"]`` is the folder that holds them and ``extra["masks"]`` their number.

    Raises:
        DataError: there is none, or one lies in a folder that is no split or no label of this dataset.
    """
    masks: Counter[str] = Counter()

    def make(name: str, source: str, place: dict[str, str]) -> Item:
        category, split, label, stem = (place[key] for key in ("category", "split", "label", "stem"))
        if label not in LABELS[split]:
            folder = tree.root / name.rpartition("/")[0]
            raise DataError(f"{folder} is no label of mvtec_loco in {split}: expected {', '.join(LABELS[split])}")
        if not masks:
            # Here, not before: the first file found may be one in an archive.
            masks.update(name.rpartition("/")[0] for name in tree.names)
        mask = f"ground_truth/{label}/{stem}"
        number = masks[name.removesuffix(source.partition("/")[2]) + mask]
        extra: dict[str, str | int] = {"mask": f"{category}/{mask}", "masks": number} if number else {}
        return Item("mvtec_loco", category, split, label, stem, tree[name], source, extra=extra)

    return find_items(tree, "mvtec_loco", PATTERN, LAYOUT, SPLITS, make)
