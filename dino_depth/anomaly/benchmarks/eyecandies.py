"""Eyecandies as a single-view benchmark: V = 1, image, depth and a mask; files as ``data_prep.eyecandies`` has them.

Training and validation samples are good. Test samples are those of ``test_public``, the ones with published labels;
their ground truth is ``<index>_mask.png``, not zero where anomalous.
"""

from dataclasses import dataclass
from functools import partial

from data_prep import eyecandies
from data_prep.archives import RawFile
from data_prep.item import Item
from data_prep.tree import RawTree
from dino_depth.anomaly.benchmarks.single_view import image_view, read_mask
from dino_depth.anomaly.dataset import Benchmark, Sample
from dino_depth.errors import DataError

__all__ = ["EyecandiesOptions", "open_benchmark"]

SPLITS = {"train": "train", "val": "validation", "test_public": "test"}


@dataclass
class EyecandiesOptions:
    """Which image stands for a sample.

    Attributes:
        lighting: of the six, 0 to 5. Published methods do not agree on one.
    """

    lighting: int = 4


def open_benchmark(root: str, options: EyecandiesOptions) -> Benchmark:
    """Eyecandies below a folder; reads file names and the labels of test samples.

    Raises:
        DataError: ``root`` is not there or has another layout, or an image is missing.
    """
    tree = RawTree(root)
    pattern = rf"(?:.*/)?(?P<category>[^/]+)/[^/]+/data/[^/]+_(?:image_{options.lighting}|mask)\.png"
    images = {match[0][match.start("category") :]: tree[name] for match, name in tree.find(pattern)}
    listed: dict[str, list[Sample]] = {}
    for item in eyecandies.items(tree):
        if item.split in SPLITS:
            listed.setdefault(item.category, []).append(_sample(item, images, options.lighting))
    return Benchmark("eyecandies", "", tuple(sorted(listed)), partial(dict.__getitem__, listed))


def _sample(item: Item, images: dict[str, RawFile], lighting: int) -> Sample:
    start = item.source.removesuffix("depth.png")
    if f"{start}image_{lighting}.png" not in images:
        raise DataError(f"{item.file}: no {item.stem}_image_{lighting}.png beside it (eyecandies.lighting {lighting})")
    view = image_view(images[f"{start}image_{lighting}.png"], item, eyecandies.read)
    truth = partial(read_mask, images.get(f"{start}mask.png"), item.label, item, eyecandies.read)
    return Sample(item.category, item.stem, SPLITS[item.split], item.label, None, (view,), truth)
