"""The settings of ``dino-depth evaluate``."""

import os
from dataclasses import dataclass, field, replace
from typing import Literal

from dino_depth.anomaly.benchmarks import BenchmarkConfig
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads.modmap import ModMapConfig
from dino_depth.anomaly.heads.patchcore import PatchCoreConfig
from dino_depth.anomaly.scoring import MetricsConfig
from dino_depth.anomaly.volume import VoxelConfig
from dino_depth.frozen import FAMILIES
from dino_depth.frozen.exported import DEFAULT
from dino_depth.frozen.specs import parse_spec

__all__ = ["EncoderConfig", "EvaluateConfig", "HeadConfig", "everywhere"]

FROM_FILES = ("", "transformers", "defm")  # families whose names may be paths


@dataclass
class EncoderConfig:
    """The frozen encoders; see ``dino_depth/frozen/__init__.py`` for their names.

    Attributes:
        image: of the images; empty for none.
        depth: of the depth maps; empty for none.
        size: side of the padded square that encoders see, pixels.
        depth_size: the same of depth alone, where its patches are of another size; empty: ``size``.
        cache: folder of encoded views, which runs may share; empty: ``features`` in the run's folder.
        cache_gib: size it never exceeds, GiB.
        batch: views encoded at once.
    """

    image: str = ""
    depth: str = ""
    size: int = 896
    depth_size: int | None = None
    cache: str = ""
    cache_gib: float = 20.0
    batch: int = 8


@dataclass
class HeadConfig:
    """The method.

    Attributes:
        name: of the head whose settings below count.
        multiclass: one model for all classes instead of one for each.
        cache: folder of fitted heads, which runs may share: settings that only act when a head scores then cost no
            fit; empty: ``heads`` in the run's folder.
        modmap: ModMap, and CFM as its first two steps.
        patchcore: PatchCore.
    """

    name: Literal["modmap", "patchcore"] = "modmap"
    multiclass: bool = False
    cache: str = ""
    modmap: ModMapConfig = field(default_factory=ModMapConfig)
    patchcore: PatchCoreConfig = field(default_factory=PatchCoreConfig)


@dataclass
class EvaluateConfig:
    """Evaluate frozen encoders and a head on a benchmark; the same command again continues a run.

    Attributes:
        out: folder of the results.
        data: which benchmark, and where its files are.
        categories: classes; all if empty.
        seeds: number of seeds, 0, 1, ...
        device: ``auto`` (cuda where there is one), ``cuda`` or ``cpu``.
        encoder: the frozen encoders.
        head: the method.
        foreground: which pixels are the object.
        volume: the grid of voxels, and how the modalities' maps meet (that also for a single view).
        metrics: what is measured.
    """

    out: str = ""
    data: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    categories: list[str] = field(default_factory=list)
    seeds: int = 1
    device: Literal["auto", "cuda", "cpu"] = "auto"
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    foreground: ForegroundConfig = field(default_factory=ForegroundConfig)
    volume: VoxelConfig = field(default_factory=VoxelConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)


def everywhere(config: EvaluateConfig) -> EvaluateConfig:
    """The configuration with every path absolute, so that it holds in any working directory."""
    encoder, data = config.encoder, config.data
    places = {name: _absolute_name(getattr(encoder, name)) for name in ("image", "depth")}
    return replace(
        config,
        out=_absolute(config.out),
        data=replace(data, root=_absolute(data.root)),
        encoder=replace(encoder, **places, cache=_absolute(encoder.cache)),
        head=replace(config.head, cache=_absolute(config.head.cache)),
    )


def _absolute(path: str) -> str:
    return path and os.path.abspath(path)


def _absolute_name(text: str) -> str:
    """The name of an encoder, absolute where a file or folder of its name is here."""
    if not text:
        return text
    spec = parse_spec(text, tuple(FAMILIES))
    if spec.family not in FROM_FILES or spec.name == DEFAULT or not os.path.exists(spec.name):
        return text
    name, mark, options = text.partition("?")
    return name.removesuffix(spec.name) + os.path.abspath(spec.name) + mark + options
