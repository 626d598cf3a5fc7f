"""Eyecandies from twelve views, as ``dino-depth prep-views`` writes it: see ``eyecandies12_views.py`` for the files.

Any number of views will do. Results are measured in the pixels of all views, pooled, as the masks are given for them;
pixels that no pixel of the source is seen in are part of no metric.
"""

from functools import partial
from pathlib import Path

import numpy as np

from data_prep.archives import RawFile, hidden
from data_prep.formats import decode_image
from data_prep.tree import refuse_links_out
from dino_depth.anomaly.benchmarks.calibration import CalibrationOptions, read_cameras
from dino_depth.anomaly.benchmarks.eyecandies12_views import SETTINGS
from dino_depth.anomaly.benchmarks.sim3d_views import read_depth
from dino_depth.anomaly.dataset import Benchmark, Sample, Truth, View, named
from dino_depth.errors import DataError

__all__ = ["open_benchmark"]


def open_benchmark(root: str) -> Benchmark:
    """The samples below a folder.

    Raises:
        DataError: ``prep-views`` has not written it, or a link leads out of it.
    """
    path = Path(root)
    if not (path / SETTINGS).is_file():
        raise DataError(f"{root} holds no {SETTINGS}: dino-depth prep-views makes such a folder from Eyecandies")
    refuse_links_out(path)
    categories = tuple(folder.name for folder in _folders(path) if (folder / "train").is_dir())
    if not categories:
        raise DataError(f"{root}: no category with a folder train in it")
    return Benchmark("eyecandies12", "", categories, partial(_listed, path), pixels=True)


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not hidden(folder.name))


def _listed(root: Path, category: str) -> list[Sample]:
    found = [_sample(category, folder, "train", "good") for folder in _folders(root / category / "train")]
    if (root / category / "test").is_dir():
        for folder in _folders(root / category / "test"):
            label = "anomalous" if folder.name.endswith("_bad") else "good"
            found.append(_sample(category, folder, "test", label))
    return found


def _sample(category: str, folder: Path, split: str, label: str) -> Sample:
    views = []
    for name, camera in read_cameras([folder], CalibrationOptions()):
        depth, image = (RawFile(str(folder), member) for member in (f"depth/{name}.npy", f"rgb/{name}.png"))
        for file in (depth, image):
            if not (folder / file.member).is_file():
                raise DataError(f"{folder}: view {name} of its calibration has no {file.member}")
        # Without SiM3D's guesses: depth is written in metres.
        read = partial(read_depth, depth, "m", "prep-views")
        views.append(View(name, partial(named, str(image), _decoded, image), read, camera))
    return Sample(category, folder.name, split, label, None, tuple(views), partial(_truth, folder, label, views))


def _decoded(file: RawFile) -> np.ndarray:
    return decode_image(file.read())


def _truth(folder: Path, label: str, views: list[View]) -> Truth:
    masks = []
    for view in views:
        file = RawFile(str(folder), f"mask/{view.name}.png")
        masks.append(named(str(file), _decoded, file).any(-1))
    if label == "good" and any(mask.any() for mask in masks):
        raise DataError(f"{folder}: its masks show an anomaly, but the sample is labelled good")
    return Truth("masks", masks=tuple(masks))
