"""MVTec AD: photographs of 15 kinds of objects and textures, colour or grey PNGs.

    ROOT/<category>/train/good/<stem>.png
                   /test/<good or defect>/<stem>.png
                   /ground_truth/<defect>/<stem>_mask.png      paired by stem, never an image

ROOT may also be one category's folder, an archive of either, or a folder with such archives. Some categories are stored
in grey; they are read as three equal channels. The siblings MVTec LOCO and MVTec AD 2 have splits that this dataset
lacks, so that their trees are refused.
"""

from data_prep.item import Item, Published, find_items, read_image
from data_prep.tree import RawTree

__all__ = ["LICENCE", "PUBLISHED", "items", "read_image"]

LICENCE = "MVTec AD, CC BY-NC-SA 4.0 (non-commercial)"
LAYOUT = "[<category>/]{train,test}/<label>/*.png"
# Any name like that of a split, so that a tree with other splits is refused and not half read.
PATTERN = r"(?:.*/)?(?P<category>[^/]+)/(?P<split>(?:train|val|test)[^/]*)/(?P<label>[^/]+)/(?P<stem>[^/]+)\.(?i:png)"
SPLITS = ("train", "test")
COUNTS = {
    "bottle": (209, 20, 63), "cable": (224, 58, 92), "capsule": (219, 23, 109), "carpet": (280, 28, 89),
    "grid": (264, 21, 57), "hazelnut": (391, 40, 70), "leather": (245, 32, 92), "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141), "screw": (320, 41, 119), "tile": (230, 33, 84), "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40), "wood": (247, 19, 60), "zipper": (240, 32, 119),
}  # fmt: skip
PLACES = (("train", "good"), ("test", "good"), ("test", "anomalous"))
PUBLISHED: list[Published] = [
    (category, *place, number)
    for category, numbers in COUNTS.items()
    for place, number in zip(PLACES, numbers, strict=True)
]


def items(tree: RawTree) -> list[Item]:
    """Every photograph of a dataset or of one category.

    Raises:
        DataError: there is none, or one lies in a folder that is no split of this dataset.
    """

    def make(name: str, source: str, place: dict[str, str]) -> Item:
        category, split, label, stem = (place[key] for key in ("category", "split", "label", "stem"))
        root = name.removesuffix(source.partition("/")[2])
        mask = f"ground_truth/{label}/{stem}_mask.png"
        extra = {"mask": f"{category}/{mask}"} if root + mask in tree else {}
        return Item("mvtec_ad", category, split, label, stem, tree[name], source, extra=extra)

    return find_items(tree, "mvtec_ad", PATTERN, LAYOUT, SPLITS, make)
