"""The settings of ``dino-depth evaluate``."""

from dataclasses import dataclass, field
from typing import Literal

from dino_depth.anomaly.benchmarks import BenchmarkConfig
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads.modmap import ModMapConfig
from dino_depth.anomaly.heads.patchcore import PatchCoreConfig
from dino_depth.anomaly.scoring import MetricsConfig
from dino_depth.anomaly.volume import VoxelConfig

__all__ = ["EncoderConfig", "EvaluateConfig", "HeadConfig"]


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
        modmap: ModMap, and CFM as its first two steps.
        patchcore: PatchCore.
    """

    name: Literal["modmap", "patchcore"] = "modmap"
    multiclass: bool = False
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
