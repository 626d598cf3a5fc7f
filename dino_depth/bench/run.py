"""``dino-depth bench ENCODER...``: encoders judged as their users would, with intervals, in one table and one page.

docs/bench.md has the protocol. Everything is measured with every encoder on the same maps, cells and resamples.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal

from torch import Tensor

from dino_depth import __version__
from dino_depth.bench.columns import columns
from dino_depth.bench.data import CELL, Source, View
from dino_depth.bench.disturb import DISTURBANCES, disturbed, filled
from dino_depth.bench.features import cell_features, input_size
from dino_depth.bench.intervals import Draws, estimate, resample
from dino_depth.bench.page import write_page_of
from dino_depth.bench.push import check_target, push
from dino_depth.bench.rows import Entry, entries
from dino_depth.bench.sources import Options, open_source
from dino_depth.bench.speed import milliseconds
from dino_depth.bench.table import as_text, write_tables
from dino_depth.device import pick_device
from dino_depth.errors import ConfigError
from dino_depth.progress import Progress

__all__ = ["BenchConfig", "bench"]

VARIANTS = ("raw", "filled")


@dataclass
class BenchConfig:
    """Judge frozen depth encoders by what users do with them; see docs/bench.md.

    Attributes:
        encoders: names of encoders, see docs/encoders.md.
        data: what they are judged on: ``synthetic`` and ``families`` are rendered; or folders of posed frames
            (7-Scenes, Redwood, BOP, SiM3D) or of meshes.
        out: folder for bench.json, bench.csv, bench.md and bench.html; empty: print only.
        size: side of the square every encoder sees, pixels, a multiple of 14; each takes its nearest multiple.
        variants: whether holes stay, are filled with their nearest depth, or one after the other.
        disturbances: under which the loss is measured; [] for none.
        columns: which columns; empty means all.
        speed: measure milliseconds at 224 and 896 pixels too.
        frames: most views of a scene, spread evenly.
        objects: objects of each kind that are rendered.
        views: views of each rendered object.
        resamples: of the bootstrap.
        seed: of rendering, disturbances, untrained networks and the bootstrap.
        push: write the figures of the first encoder into the model card of this folder or Hub repository (owner/name).
        device: ``auto`` (cuda where there is one), ``cuda`` or ``cpu``.
    """

    encoders: list[str]
    data: str | list[str] = "synthetic"
    out: str = ""
    size: int = 224
    variants: list[Literal["raw", "filled"]] = field(default_factory=lambda: list(VARIANTS))
    disturbances: list[str] = field(default_factory=lambda: list(DISTURBANCES))
    columns: list[str] = field(default_factory=list)
    speed: bool = True
    frames: int = 16
    objects: int = 4
    views: int = 4
    resamples: int = 2000
    seed: int = 0
    push: str | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"


def bench(config: BenchConfig) -> dict:
    """Measures, prints the table, and writes ``config.out`` and the card.

    Raises:
        ConfigError: an encoder, a source or a value cannot work.
        DataError: data are missing, have no poses, or do not overlap; weights do not fit.
        ReportedError: a card or repository cannot be written.
    """
    used = _check(config)
    device = pick_device(config.device)
    inspect = any(module.ASKED == "inspections" for module in used.values())
    options = Options(config.frames, config.objects, config.views, config.seed, inspect)
    texts = [config.data] if isinstance(config.data, str) else config.data
    found = entries(config.encoders, config.seed, device)
    sources = [open_source(text, options) for text in texts]
    result = {
        "version": __version__,
        "size": config.size,
        "cells": config.size // CELL,
        "resamples": config.resamples,
        "seed": config.seed,
        "encoders": [_about(entry, config.size) for entry in found],
        "figures": {
            key: {"title": one.title, "words": one.words, "better": one.better, "digits": one.digits, "unit": one.unit}
            for module in used.values() for key, one in module.FIGURES.items()
        },
        "sources": [],
        "speed": {},
    }  # fmt: skip
    present = [entry for entry in found if entry.encoder is not None]
    steps = len(sources) * len(present) * len(config.variants) * (1 + len(config.disturbances))
    with Progress("bench", steps, "passes") as progress:
        for source in sources:
            result["sources"].append(_judge(source, present, used, config, progress))
    if config.speed:
        view = sources[0].views[0]
        result["speed"] = {entry.label: milliseconds(entry.encoder, view) for entry in present}
    print(as_text(result))
    if config.out:
        write_tables(result, Path(config.out))
        write_page_of(result, Path(config.out) / "bench.html")
        print(f"{Path(config.out) / 'bench.html'}")
    if config.push:
        push(result, config.push)
    return result


def _check(config: BenchConfig) -> dict:
    """The columns that are asked for; refuses what cannot work before anything is computed."""
    known = columns()
    if config.size < 4 * CELL or config.size % CELL:
        raise ConfigError(f"--size {config.size}: a multiple of {CELL} from {4 * CELL} on")
    for name, given, allowed in (
        ("columns", config.columns, known), ("disturbances", config.disturbances, DISTURBANCES)
    ):  # fmt: skip
        if wrong := [word for word in given if word not in allowed]:
            raise ConfigError(f"--{name}: {wrong[0]!r} is none of {', '.join(allowed)}")
    if not config.variants:
        raise ConfigError("--variants: raw, filled or both")
    for name, least in {"frames": 2, "objects": 1, "views": 2, "resamples": 1}.items():
        if getattr(config, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, got {getattr(config, name)}")
    out = Path(config.out)
    if config.out and out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: not a folder")
    if config.push:
        check_target(config.push)
    return {name: module for name, module in known.items() if not config.columns or name in config.columns}


def _about(entry: Entry, size: int) -> dict:
    about = {"label": entry.label, "spec": entry.spec, "role": entry.role, "note": entry.note}
    if entry.encoder is not None:
        encoder = entry.encoder
        about |= {"name": encoder.name, "patch": encoder.patch_size, "dim": encoder.dim}
        about |= {"input": input_size(encoder, size), "fingerprint": encoder.fingerprint}
    return about


def _judge(source: Source, present: list[Entry], used: dict, config: BenchConfig, progress: Progress) -> dict:
    """All figures, losses and differences on one source."""
    missing = {name: module.missing(source, config.size) for name, module in used.items()}
    applies = {name: module for name, module in used.items() if not missing[name]}
    draws: dict[tuple[str, str], dict[str, Draws]] = {}  # (row, disturbance) -> {figure: draws}
    counts: dict[int, Tensor] = {}
    for entry in present:
        for variant in config.variants:
            row = f"{entry.label}, {variant}"
            _measure(source, entry, variant, row, applies, config, draws, counts, progress)
    rows = list(dict.fromkeys(row for row, _ in draws))
    keys = [key for module in applies.values() for key in module.FIGURES]
    estimates = {row: {key: _plain(draws[row, ""][key]) for key in keys} for row in rows}
    losses = {
        row: {name: {key: _loss(draws, row, name, key, used) for key in keys} for name in config.disturbances}
        for row in rows
    }
    differences = [
        {"row": one, "against": other, **{key: _plain(draws[one, ""][key] - draws[other, ""][key]) for key in keys}}
        for one, other in combinations(rows, 2)
    ]
    scenes = {view.scene for view in source.views}
    return {
        "name": source.name,
        "what": source.what,
        "views": len(source.views),
        "scenes": len(scenes),
        "inspections": len(source.inspections),
        "missing": {name: reason for name, reason in missing.items() if reason},
        "rows": rows,
        "estimates": estimates,
        "losses": losses,
        "differences": differences,
    }


def _plain(values: Draws) -> dict | None:
    found = estimate(values)
    return None if found is None else {"value": found.value, "low": found.low, "high": found.high}


def _loss(draws: dict, row: str, disturbance: str, key: str, used: dict) -> dict | None:
    """What is lost, positive where the figure gets worse."""
    figure = next(module.FIGURES[key] for module in used.values() if key in module.FIGURES)
    change = draws[row, ""][key] - draws[row, disturbance][key]
    return _plain(change if figure.better == "higher" else -change)


def _measure(
    source: Source, entry: Entry, variant: str, row: str, applies: dict, config: BenchConfig, draws: dict,
    counts: dict[int, Tensor], progress: Progress,
):  # fmt: skip
    """Fills ``draws`` of one row, undisturbed and under every disturbance."""
    change: Callable = filled if variant == "filled" else (lambda depth_map: depth_map)
    groups = {"views": source.views, "inspections": _inspected(source)}
    asked = {module.ASKED for module in applies.values()}

    def features(name: str) -> dict[str, Tensor]:
        return {
            kind: cell_features(
                entry.encoder, group, (change(disturbed(view, name, config.seed)) for view in group), config.size
            )
            for kind, group in groups.items() if kind in asked
        }  # fmt: skip

    known = features("")
    for name in ("", *config.disturbances):
        seen = features(name) if name else known
        drawn = draws[row, name] = {}
        for module in applies.values():
            sums = module.measure(source, config.size, known[module.ASKED], seen[module.ASKED])
            if len(sums) not in counts:
                counts[len(sums)] = resample(len(sums), config.resamples, config.seed)
            drawn |= module.figures(counts[len(sums)] @ sums)
        progress.advance()
    gc.collect()


def _inspected(source: Source) -> list[View]:
    return [view for one in source.inspections for view in (*one.bank, *one.tested)]
