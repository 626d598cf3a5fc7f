"""MVTec AD 2: photographs of eight scenarios; the test images show a scene under several lights.

    ROOT/<category>/{train,validation}/good/<scene>_<light>.png
                   /test_public/{good,bad}/<scene>_<light>.png
                   /test_public/ground_truth/bad/<scene>_<light>_mask.png      never an image
                   /{test_private,test_private_mixed}/<scene>_<light>.png      flat, without labels

A scene is a number, a light regular, overexposed, underexposed, shift_1 to shift_3, or mixed. Images of one scene
differ in light only, so that their depth is nearly the same: they share a group. Numbers begin anew in each folder, and
nothing says whether the two private splits show the same scenes, so a group ends with its folder.

ROOT may also be one category's folder, an archive of either, or a folder with such archives.
"""

import re

from data_prep.item import Item, Published, find_items, read_image
from data_prep.tree import RawTree
from dino_depth.errors import DataError

__all__ = ["LICENCE", "PUBLISHED", "items", "read_image"]

LICENCE = "MVTec AD 2, CC BY-NC-SA 4.0 (non-commercial)"
LAYOUT = "[<category>/]{train,validation,test_public}/<label>/*.png or [<category>/]test_private/*.png"
# Any name like that of a split, so that a tree with other splits is refused and not half read.
PATTERN = (
    r"(?:.*/)?(?P<category>[^/]+)/(?P<split>(?:train|val|test)[^/]*)/"
    r"(?:(?!ground_truth/)(?P<label>[^/]+)/)?(?P<stem>[^/]+)\.(?i:png)"
)
SPLITS = ("train", "validation", "test_public", "test_private", "test_private_mixed")
# None: the images lie in the split's folder itself.
LABELS = {
    "train": ("good",), "validation": ("good",), "test_public": ("good", "bad"), "test_private": (None,),
    "test_private_mixed": (None,),
}  # fmt: skip
COUNTS = {
    "can": (412, 321), "fabric": (387, 314), "fruit_jelly": (263, 255), "rice": (313, 277), "sheet_metal": (137, 142),
    "vial": (291, 276), "wallplugs": (293, 232), "walnuts": (432, 228),
}  # fmt: skip
PUBLISHED: list[Published] = [
    *((category, "train", "good", train) for category, (train, _) in COUNTS.items()),
    (None, "validation", "good", 302),
    (None, "test_public", None, 1084),
    *(
        (category, split, "unknown", private)
        for split in ("test_private", "test_private_mixed")
        for category, (_, private) in COUNTS.items()
    ),
]


def items(tree: RawTree) -> list[Item]:
    """Every photograph of a dataset or of one category; ``extra["light"]`` names its light.

    The label is "unknown" in the private splits. An image whose name gives no scene and light is a scene of its own.

    Raises:
        DataError: there is none, or one lies in a folder that is no split or no label of this dataset.
    """

    def make(name: str, source: str, place: dict[str, str]) -> Item:
        category, split, label, stem = (place[key] for key in ("category", "split", "label", "stem"))
        if label not in LABELS[split]:
            expected = " or ".join(f"{split}/{label}/*.png" if label else f"{split}/*.png" for label in LABELS[split])
            raise DataError(f"{tree.root / name} is no image of mvtec_ad2: expected {expected}")
        mask = f"{split}/ground_truth/{label}/{stem}_mask.png"
        masked = name.removesuffix(source.partition("/")[2]) + mask in tree
        extra = {"mask": f"{category}/{mask}"} if masked else {}
        group = None
        if numbered := re.fullmatch(r"(\d+)_(.+)", stem):
            group = f"{source.rpartition('/')[0]}/{numbered[1]}"
            extra["light"] = numbered[2]
        return Item("mvtec_ad2", category, split, label or "unknown", stem, tree[name], source, group, extra)

    return find_items(tree, "mvtec_ad2", PATTERN, LAYOUT, SPLITS, make)
