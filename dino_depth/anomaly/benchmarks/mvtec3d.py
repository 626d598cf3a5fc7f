"""MVTec 3D-AD as a single-view benchmark: V = 1, image, depth and a mask; files as ``data_prep.mvtec3d`` has them.

A mask's pixels hold the id of a class of defects, so anomalous is what is not 0. Good samples may lack the mask.
"""

from functools import partial

from data_prep import mvtec3d
from data_prep.archives import RawFile
from data_prep.item import Item
from data_prep.tree import RawTree
from dino_depth.anomaly.benchmarks.single_view import image_view, read_mask
from dino_depth.anomaly.dataset import Benchmark, Sample
from dino_depth.errors import DataError

__all__ = ["open_benchmark"]

MASKS = r"(?:.*/)?(?P<category>[^/]+)/[^/]+/[^/]+/gt/[^/]+\.png"


def open_benchmark(root: str) -> Benchmark:
    """MVTec 3D-AD, or one category of it; reads file names only.

    Raises:
        DataError: ``root`` is not there or has another layout, or an image is missing.
    """
    tree = RawTree(root)
    masks = {match[0][match.start("category") :]: tree[name] for match, name in tree.find(MASKS)}
    listed: dict[str, list[Sample]] = {}
    for item in mvtec3d.items(tree):
        listed.setdefault(item.category, []).append(_sample(item, masks))
    return Benchmark("mvtec3d", "", tuple(sorted(listed)), partial(dict.__getitem__, listed))


def _sample(item: Item, masks: dict[str, RawFile]) -> Sample:
    if "rgb" not in item.companions:
        raise DataError(f"{item.file}: no rgb/{item.stem}.png beside its folder")
    label = "good" if item.label == "good" else "anomalous"
    view = image_view(item.companions["rgb"], item, mvtec3d.read)
    truth = partial(read_mask, masks.get(item.extra.get("mask")), label, item, mvtec3d.read)
    defect = None if label == "good" else item.label
    return Sample(item.category, f"{item.label}-{item.stem}", item.split, label, defect, (view,), truth)
