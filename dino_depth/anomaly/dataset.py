"""Samples: what every benchmark gives and every later stage takes.

A sample is one object: V views of an image, a depth map and a camera, a label, and ground truth. Listing a benchmark
reads no pixels; a view's ``read_image`` and ``read_depth`` do, each time they are called. Everything here can be sent
to another process.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from dino_depth.anomaly.geometry import Camera
from dino_depth.config import suggestion
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError

__all__ = ["Benchmark", "Sample", "Split", "Truth", "View", "Voxels", "given", "held", "named"]

Split = Literal["train", "validation", "test"]


def named(source: str, read: Callable[..., Any], *arguments: Any) -> Any:
    """``read(*arguments)``, whose DataErrors then name the source: readers do not know where bytes come from."""
    try:
        return read(*arguments)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


@dataclass(frozen=True)
class View:
    """One view of an object.

    Attributes:
        name: stem of its file.
        read_image: the image, (height, width) grey or (height, width, 3) colour, uint8; raises DataError.
        read_depth: the metric depth map of the same height and width; raises DataError.
        camera: None in single-view benchmarks.
    """

    name: str
    read_image: Callable[[], np.ndarray]
    read_depth: Callable[[], DepthMap]
    camera: Camera | None


@dataclass(frozen=True, eq=False)
class Voxels:
    """Some of the voxels of a regular grid along the axes of the world.

    Attributes:
        origin: (3,) float64, metres: the corner of voxel (0, 0, 0), not its centre.
        size: edge of a voxel, metres.
        shape: voxels along x, y and z.
        index: (n, 3) int32, unique and in lexicographic order.

    Raises:
        DataError: a shape, a value or an index is impossible, or indices are not unique and in order.
    """

    origin: np.ndarray
    size: float
    shape: tuple[int, int, int]
    index: np.ndarray

    def __post_init__(self):
        origin, shape = np.asarray(self.origin, np.float64), tuple(int(count) for count in self.shape)
        index = np.asarray(self.index)
        if origin.shape != (3,) or not np.isfinite(origin).all():
            raise DataError(f"origin must be 3 finite numbers, got {origin.tolist()}")
        if not (np.isfinite(self.size) and self.size > 0):
            raise DataError(f"voxel size must be positive, got {self.size}")
        if len(shape) != 3 or min(shape) < 1:
            raise DataError(f"shape must be 3 positive numbers of voxels, got {shape}")
        if index.ndim != 2 or index.shape[1] != 3 or index.dtype.kind not in "iu":
            raise DataError(f"voxel indices must be (n, 3) integers, got {index.shape} {index.dtype}")
        if len(index) and (index.min() < 0 or (index.max(0) >= shape).any()):
            raise DataError(f"voxel indices {index.min(0)}..{index.max(0)} lie outside the grid {shape}")
        if (np.diff(np.ravel_multi_index(index.T.astype(np.int64), shape)) <= 0).any():
            raise DataError("voxel indices must be unique and in lexicographic order")
        object.__setattr__(self, "origin", origin)
        object.__setattr__(self, "size", float(self.size))
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "index", index.astype(np.int32, copy=False))

    @property
    def centers(self) -> np.ndarray:
        """(n, 3) float64 world metres."""
        return self.origin + (self.index + 0.5) * self.size


@dataclass(frozen=True, eq=False)
class Truth:
    """Where a sample is anomalous, in one of three forms; a sample without an anomaly has an empty one.

    Attributes:
        kind: the form that is given.
        voxels: the anomalous voxels.
        points: (n, 3) float64 world metres, anomalous points.
        masks: one (height, width) bool for each view.
        component: (n,) int32 from 1, the defect that each voxel or point belongs to, where that is known.
    """

    kind: Literal["voxels", "points", "masks"]
    voxels: Voxels | None = None
    points: np.ndarray | None = None
    masks: tuple[np.ndarray, ...] | None = None
    component: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """One object.

    Attributes:
        category: object class, in the benchmark's spelling.
        name: of the instance, unique within category and split.
        split: "train", "validation" or "test".
        label: "good", "anomalous", or "unknown" where labels are not published.
        defect: the benchmark's name of the kind of defect; None for good samples and where it gives none.
        views: V of them, in the order of the view ids.
        read_truth: None where the benchmark has no ground truth for it; raises DataError.
    """

    category: str
    name: str
    split: Split
    label: Literal["good", "anomalous", "unknown"]
    defect: str | None
    views: tuple[View, ...]
    read_truth: Callable[[], Truth | None]


def held(sample: Sample) -> Sample:
    """The sample with its views in memory, since several stages look at them.

    Raises:
        DataError: a view cannot be read; the message names it.
    """
    views = []
    for view in sample.views:
        place = f"{sample.category}/{sample.name}, view {view.name}"
        image, depth = (named(place, read) for read in (view.read_image, view.read_depth))
        views.append(replace(view, read_image=given(image), read_depth=given(depth)))
    return replace(sample, views=tuple(views))


def given(value: Any) -> Callable[[], Any]:
    """A reader of what is in memory; like all readers of a sample it can go to another process."""
    return partial(_same, value)


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Benchmark:
    """A benchmark, as the modules in ``benchmarks`` open one.

    Attributes:
        name: of the benchmark.
        setup: how training and test differ, "real2real" or "synth2real"; "" where a benchmark has one setup only.
        categories: object classes, sorted.
        list_category: every sample of a class, all splits; raises DataError.
        check_category: measures what would contradict the settings of a class, from a few samples, and returns it for
            the results; raises DataError. None where nothing can be checked.
        pixels: results are measured in the pixels of all views, though they have cameras, and not in a volume.
    """

    name: str
    setup: str
    categories: tuple[str, ...]
    list_category: Callable[[str], list[Sample]]
    check_category: Callable[[str], dict[str, float]] | None = None
    pixels: bool = False

    def samples(self, category: str, split: Split) -> list[Sample]:
        """The samples of a split, in a fixed order, all with as many views as all others of the class.

        Raises:
            ConfigError: there is no such class.
            DataError: there is no such sample, a view is missing, or the numbers of views differ.
        """
        if category not in self.categories:
            known = list(self.categories)
            raise ConfigError(f"unknown category {category!r} of {self.name}{suggestion(category, known)}")
        listed = self.list_category(category)
        views = {len(sample.views): sample for sample in listed}
        if len(views) > 1:
            counts = ", ".join(f"{sample.split}/{sample.name} has {count}" for count, sample in sorted(views.items()))
            raise DataError(f"{self.name} {category}: numbers of views differ: {counts}")
        found = [sample for sample in listed if sample.split == split]
        if not found:
            raise DataError(f"{self.name} {category}: no {split} sample")
        return found

    def views(self, category: str) -> int:
        """The number of views of every sample of a class."""
        return len(self.samples(category, "train")[0].views)
