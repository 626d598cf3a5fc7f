"""The settings of ``dino-depth evaluate``."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, make_dataclass, replace
from typing import Any, Literal

from dino_depth.anomaly.benchmarks import BenchmarkConfig
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads import names, open_head
from dino_depth.anomaly.model import PrepareConfig
from dino_depth.anomaly.scoring import MetricsConfig
from dino_depth.anomaly.volume import VoxelConfig
from dino_depth.frozen import FAMILIES
from dino_depth.frozen.exported import DEFAULT
from dino_depth.frozen.specs import parse_spec

__all__ = ["EncoderConfig", "Encoders", "EvaluateConfig", "HeadConfig", "MethodConfig", "everywhere"]

FROM_FILES = ("", "transformers", "defm", "point-mae")  # families whose names may be paths


@dataclass
class Encoders:
    """The frozen encoders; see ``dino_depth/frozen/__init__.py`` for their names.

    Attributes:
        image: of the images; empty for none.
        depth: of the depth maps; empty for none.
        size: side of the padded square that encoders see, pixels.
        depth_size: the same of depth alone, where its patches are of another size; empty: ``size``.
        batch: views encoded at once.
    """

    image: str = ""
    depth: str = ""
    size: int = 896
    depth_size: int | None = None
    batch: int = 8


@dataclass
class EncoderConfig(Encoders):
    """The frozen encoders; see ``dino_depth/frozen/__init__.py`` for their names.

    Attributes:
        image: of the images; empty for none.
        depth: of the depth maps; empty for none.
        size: side of the padded square that encoders see, pixels.
        depth_size: the same of depth alone, where its patches are of another size; empty: ``size``.
        batch: views encoded at once.
        cache: folder of encoded views, which runs may share; empty: ``features`` in the run's folder.
        cache_gib: size it never exceeds, GiB.
    """

    cache: str = ""
    cache_gib: float = 20.0


def method_config(title: str, default: str, options: Sequence[tuple[str, type, Any, str]] = ()) -> type:
    """A configuration with the name of a head and the settings of every head found in ``heads``.

    Args:
        title: of the class.
        default: name of the head.
        options: name, type, default and explanation of what it holds besides.
    """
    known = names()
    heads = [(name, open_head(name).Config) for name in known]
    made = make_dataclass(
        title,
        [
            ("name", Literal[tuple(known)], default),
            *((name, kind, value) for name, kind, value, _ in options),
            *((name, kind, field(default_factory=kind)) for name, kind in heads),
        ],
    )
    made.__module__ = __name__
    told = [("name", "of the head whose settings below count."), *((name, text) for name, _, _, text in options)]
    told += [(name, _first_sentence(kind)) for name, kind in heads]
    made.__doc__ = "The method.\n\n    Attributes:\n" + "".join(f"        {name}: {text}\n" for name, text in told)
    return made


def _first_sentence(kind: type) -> str:
    return " ".join(kind.__doc__.split("\n\n")[0].split())


HeadConfig = method_config(
    "HeadConfig",
    "modmap",
    [
        ("multiclass", bool, False, "one model for all classes instead of one for each."),
        (
            "cache", str, "",
            "folder of fitted heads, which runs may share: settings that only act when a head scores then cost no fit; "
            "empty: ``heads`` in the run's folder.",
        ),
    ],
)  # fmt: skip
MethodConfig = method_config("MethodConfig", "residual")  # of one's own parts


@dataclass
class EvaluateConfig:
    """Evaluate frozen encoders and a head on a benchmark; the same command again continues a run.

    Attributes:
        out: folder of the results.
        data: which benchmark, and where its files are.
        categories: classes; all if empty.
        seeds: number of seeds, 0, 1, ...
        device: ``auto`` (cuda where there is one), ``cuda`` or ``cpu``.
        processes: among which the test instances are dealt, on this machine; they share its cores, and each needs
            the memory of one instance.
        encoder: the frozen encoders.
        head: the method.
        prepare: what is done around it: registration, standardised features, smoothed maps.
        foreground: which pixels are the object.
        volume: the grid of voxels, and how the modalities' maps meet (that also for a single view).
        metrics: what is measured.
    """

    out: str = ""
    data: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    categories: list[str] = field(default_factory=list)
    seeds: int = 1
    device: Literal["auto", "cuda", "cpu"] = "auto"
    processes: int = 1
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
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
