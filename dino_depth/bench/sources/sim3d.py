"""SiM3D, real or of ``synth sim3d``: every instance is a scene, its good training instances and masks are inspected."""

from pathlib import Path

import numpy as np

from dino_depth.anomaly.benchmarks.sim3d import Sim3dOptions, open_benchmark
from dino_depth.anomaly.dataset import Sample
from dino_depth.bench.data import Inspection, Source, View
from dino_depth.bench.sources import Options, evenly
from dino_depth.errors import DataError

__all__ = ["FORM", "read", "recognises"]

FORM = "CLASS/CLASS_real/depth"


def recognises(folder: Path) -> bool:
    return any((path / f"{path.name}_real").is_dir() for path in folder.iterdir() if path.is_dir())


def read(folder: Path, options: Options) -> Source:
    """Raises DataError where the tree is not as :mod:`dino_depth.anomaly.benchmarks.sim3d` reads it."""
    benchmark = open_benchmark(str(folder), Sim3dOptions())
    views, inspected = [], []
    for category in benchmark.categories:
        training = _views(benchmark.samples(category, "train")[0], category)
        tested = []
        for sample in benchmark.samples(category, "test"):
            shown = _views(sample, category)
            views += evenly(shown, options.frames)
            tested += _with_masks(sample, shown)
        if any(view.defect is not None for view in tested):
            inspected.append(Inspection(category, tuple(training), tuple(tested)))
    return Source(folder.name, f"{len(benchmark.categories)} classes of SiM3D", views, inspected)


def _views(sample: Sample, category: str) -> list[View]:
    found = []
    for view in sample.views:
        if view.camera is None:
            raise DataError(f"{category}/{sample.name} view {view.name}: no calibration")
        found.append(View(sample.name, view.name, view.read_depth(), view.camera, category))
    return found


def _with_masks(sample: Sample, views: list[View]) -> list[View]:
    """The views that can be scored: all of a good instance, of an anomalous one those whose mask is not empty."""
    if sample.label == "good":
        return views
    truth = sample.read_truth()
    if truth is None or truth.masks is None:
        return []
    return [
        View(view.scene, view.name, view.depth, view.camera, view.category, defect=np.asarray(mask))
        for view, mask in zip(views, truth.masks, strict=True)
        if mask.any()
    ]
