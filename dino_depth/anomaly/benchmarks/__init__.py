"""Benchmarks as lists of samples. A benchmark is a module here with ``open_benchmark``; its file name is its name.

These are the only modules of the package that read raw data, with the decoders of ``data_prep``.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from dino_depth.anomaly.benchmarks.eyecandies import EyecandiesOptions
from dino_depth.anomaly.benchmarks.sim3d import Sim3dOptions
from dino_depth.anomaly.dataset import Benchmark, Sample, Truth
from dino_depth.config import suggestion
from dino_depth.errors import ConfigError

__all__ = ["BENCHMARKS", "BenchmarkConfig", "open_benchmark"]

BENCHMARKS = ("eyecandies", "eyecandies12", "mvtec3d", "sim3d")


@dataclass
class BenchmarkConfig:
    """Which benchmark, and where its files are.

    Attributes:
        name: sim3d, mvtec3d, eyecandies or eyecandies12, the last from many views, as ``prep-views`` makes them.
        root: its folder; for mvtec3d and eyecandies also one category's, an archive, or a folder of archives.
        views: only so many views of each instance, every n-th in their order; empty: all. Training, sources and targets
            have the same ones (ModMap, table 8).
        sim3d: what is unknown about SiM3D's files.
        eyecandies: which of six lightings is the image.
    """

    name: str = "sim3d"
    root: str = ""
    views: int | None = None
    sim3d: Sim3dOptions = field(default_factory=Sim3dOptions)
    eyecandies: EyecandiesOptions = field(default_factory=EyecandiesOptions)


def open_benchmark(config: BenchmarkConfig) -> Benchmark:
    """The benchmark of a configuration; reads file names only.

    Raises:
        ConfigError: no such benchmark, no root, or no view; listing a class, more views than it has.
        DataError: the root is not there or has another layout.
    """
    if config.name not in BENCHMARKS:
        known = list(BENCHMARKS)
        raise ConfigError(f"unknown benchmark {config.name!r}{suggestion(config.name, known)} ({', '.join(known)})")
    if not config.root:
        raise ConfigError(f"root: where are the files of {config.name}?")
    module = importlib.import_module(f"{__name__}.{config.name}")
    options = getattr(config, config.name, None)
    benchmark = module.open_benchmark(config.root, *([] if options is None else [options]))
    if config.views is None:
        return benchmark
    if config.views < 1:
        raise ConfigError(f"data.views: must be at least 1, got {config.views}")
    return replace(benchmark, list_category=partial(_list_fewer, benchmark.list_category, config.views))


def _list_fewer(listing: Callable[[str], list[Sample]], count: int, category: str) -> list[Sample]:
    """The samples of a class with ``count`` of their views."""
    samples = []
    for sample in listing(category):
        every = len(sample.views)
        if count > every:
            raise ConfigError(f"data.views {count} exceeds the {every} views of {category}/{sample.name}")
        chosen = [place * every // count for place in range(count)]
        views = tuple(sample.views[place] for place in chosen)
        samples.append(replace(sample, views=views, read_truth=partial(_read_fewer, sample.read_truth, chosen)))
    return samples


def _read_fewer(read: Callable[[], Truth | None], chosen: list[int]) -> Truth | None:
    truth = read()
    if truth is None or truth.masks is None:
        return truth
    return replace(truth, masks=tuple(truth.masks[place] for place in chosen))
