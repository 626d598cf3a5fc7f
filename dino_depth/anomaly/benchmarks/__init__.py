"""Benchmarks as lists of samples. A benchmark is a module here with ``open_benchmark``; its file name is its name.

These are the only modules of the package that read raw data, with the decoders of ``data_prep``.
"""

import importlib
from dataclasses import dataclass, field

from dino_depth.anomaly.benchmarks.eyecandies import EyecandiesOptions
from dino_depth.anomaly.benchmarks.sim3d import Sim3dOptions
from dino_depth.anomaly.dataset import Benchmark
from dino_depth.config import suggestion
from dino_depth.errors import ConfigError

__all__ = ["BENCHMARKS", "BenchmarkConfig", "open_benchmark"]

BENCHMARKS = ("eyecandies", "mvtec3d", "sim3d")


@dataclass
class BenchmarkConfig:
    """Which benchmark, and where its files are.

    Attributes:
        name: sim3d, mvtec3d or eyecandies.
        root: its folder; for mvtec3d and eyecandies also one category's, an archive, or a folder of archives.
        sim3d: what is unknown about SiM3D's files.
        eyecandies: which of six lightings is the image.
    """

    name: str = "sim3d"
    root: str = ""
    sim3d: Sim3dOptions = field(default_factory=Sim3dOptions)
    eyecandies: EyecandiesOptions = field(default_factory=EyecandiesOptions)


def open_benchmark(config: BenchmarkConfig) -> Benchmark:
    """The benchmark of a configuration; reads file names only.

    Raises:
        ConfigError: no such benchmark, or no root.
        DataError: the root is not there or has another layout.
    """
    if config.name not in BENCHMARKS:
        known = list(BENCHMARKS)
        raise ConfigError(f"unknown benchmark {config.name!r}{suggestion(config.name, known)} ({', '.join(known)})")
    if not config.root:
        raise ConfigError(f"root: where are the files of {config.name}?")
    module = importlib.import_module(f"{__name__}.{config.name}")
    options = getattr(config, config.name, None)
    return module.open_benchmark(config.root, *([] if options is None else [options]))
