"""Synthetic raw datasets: procedural parts before a depth sensor, written in the on-disk layouts of published datasets.

Every sample is drawn from a generator keyed by (seed, layout, category, split, index): the tree does not depend on the
number of processes, and a sample not on how many others there are.
"""

import gzip
import importlib
import json
import lzma
import math
import os
import pkgutil
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO

from data_prep.item import SYNTHETIC
from data_prep.synthetic import layouts
from data_prep.synthetic.plan import Counts, Sample, Sim3dOptions
from dino_depth.config import suggestion
from dino_depth.errors import ConfigError
from dino_depth.progress import Progress

__all__ = ["LAYOUTS", "SynthConfig", "synth"]

LAYOUTS = sorted(module.name for module in pkgutil.iter_modules(layouts.__path__))
CHUNK = 16  # samples in one task of a worker, where the layout does not say


@dataclass
class SynthConfig:
    """Makes a synthetic raw dataset in the on-disk layout of a published one.

    Attributes:
        layout: the dataset whose layout is written: the name of one of prep's readers but folder; sim3d;
            or scenes, maps for pretraining that ``prep folder`` reads.
        out: folder of the raw tree, new or empty.
        per_category: training samples of each category; sim3d has one real and one synthetic instance.
        seed: the same seed gives the same bytes.
        size: height and width of every map, pixels; 400, 224 for sim3d, 160 for scenes, if not given.
        test_per_category: test samples of each category, about half of them defective; two fifths of the training
            samples, at least 12, if not given; 16 for sim3d.
        validation_per_category: defect-free validation samples of each category; a tenth of the training samples, at
            least one, if not given; sim3d has none.
        categories: names of the categories, or how many of them; if not given all: 16, and 68 families for
            scenes.
        plane: probability that a part lies on a supporting plane; without one it floats in any rotation. In sim3d
            parts stand in the middle of their cameras.
        workers: processes; 0 is one for each core.
        archive: pack the finished tree into archives, as the dataset is published.
        sim3d: what only the layout sim3d needs.
    """

    layout: str
    out: str
    per_category: int = 50
    seed: int = 0
    size: int | None = None
    test_per_category: int | None = None
    validation_per_category: int | None = None
    categories: int | list[str] | None = None
    plane: float = 1.0
    workers: int = 0
    archive: bool = False
    sim3d: Sim3dOptions = field(default_factory=Sim3dOptions)


def synth(config: SynthConfig) -> None:
    """Writes the tree.

    Raises:
        ConfigError: an option has an impossible value, the folder is not empty, or the extra ``render`` is missing.
    """
    config, categories, counts = _check(config)
    layout, root, own = _layout(config.layout), Path(config.out), _options(config)
    if config.archive and not hasattr(layout, "archives"):
        raise ConfigError(f"archive: nothing says how {config.layout} is packed when it is published")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ConfigError(f"out: {root} is not an empty folder; name a new one or remove it first")
    for category in categories:
        layout.prepare(root, category, config.size, config.seed, *own)
    # The tree looks like the real dataset; this file is how prep and every model card know that it is not.
    (root / SYNTHETIC).write_text(json.dumps({"licence": "Apache-2.0", "layout": config.layout, "seed": config.seed}))
    samples = [sample for category in categories for sample in layout.samples(category, counts)]
    with Progress(f"synth {config.layout}", len(samples), "samples") as progress:
        for done in _run(config, root, samples):
            progress.advance(done)
    if hasattr(layout, "finish"):
        layout.finish(root, samples)
    if config.archive:
        for name, folder in layout.archives(root):
            pack(root, name, folder, getattr(layout, "ARCHIVES_ARE_TARS", False))


def pack(root: Path, name: str, folder: str, as_tar: bool = False):
    """Moves a folder below ``root``, or with "" all of it, into an archive: a tar, or what its suffix says.

    The same tree gives the same bytes. What an archive of everything holds is left beside it only as SYNTHETIC.json.
    """
    base = root / folder
    files = sorted(path for path in base.rglob("*") if path.is_file() and path.name != SYNTHETIC)
    target = root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    members = [(path, path.relative_to(base.parent if folder else base).as_posix()) for path in files]
    if target.suffix == ".zip" and not as_tar:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, member in members:
                archive.writestr(zipfile.ZipInfo(member), path.read_bytes(), zipfile.ZIP_DEFLATED, 1)
    else:
        with _compressed(target) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
            for path, member in members:
                header = tarfile.TarInfo(member)
                header.size = path.stat().st_size
                with open(path, "rb") as file:
                    archive.addfile(header, file)
    for path in [base] if folder else [path for path in root.iterdir() if path.is_dir() and path != target.parent]:
        shutil.rmtree(path)
    if not folder:
        for path in files:
            path.unlink(missing_ok=True)


def _compressed(path: Path) -> BinaryIO:
    """A file that compresses what is written, and says nothing about when."""
    if path.suffix == ".xz":
        return lzma.open(path, "wb", preset=1)
    return gzip.GzipFile(path, "wb", 6, mtime=0) if path.suffix == ".gz" else open(path, "wb")


def _options(config: SynthConfig) -> tuple:
    """The options that a layout has for itself, if any: the last argument of its functions."""
    return (getattr(config, config.layout),) if hasattr(config, config.layout) else ()


def _check(config: SynthConfig) -> tuple[SynthConfig, list[str], Counts]:
    if config.layout not in LAYOUTS:
        raise ConfigError(
            f"unknown layout {config.layout!r}{suggestion(config.layout, LAYOUTS)} (known: {', '.join(LAYOUTS)})"
        )
    layout = _layout(config.layout)
    from data_prep.synthetic.parts import CATEGORIES

    defaults = {"size": 400} | getattr(layout, "DEFAULTS", {})
    config = replace(config, **{key: value for key, value in defaults.items() if getattr(config, key) is None})
    test = config.test_per_category
    validation = config.validation_per_category
    counts = Counts(
        train=config.per_category,
        validation=max(1, config.per_category // 10) if validation is None else validation,
        test=max(12, config.per_category * 2 // 5) if test is None else test,
    )
    values = {"validation_per_category": counts.validation, "test_per_category": counts.test, "workers": config.workers}
    limits = {"per_category": (config.per_category, 1), "size": (config.size, 32)}
    limits |= {key: (value, 0) for key, value in values.items()}
    for key, (value, least) in limits.items():
        if value < least:
            raise ConfigError(f"{key}: must be at least {least}, got {value}")
    if not 0 <= config.plane <= 1:
        raise ConfigError(f"plane: must be a probability, got {config.plane}")
    names = list(getattr(layout, "CATEGORIES", CATEGORIES))
    given = layout.objects(*_options(config)) if hasattr(layout, "objects") else []
    if config.categories is None:
        return config, given or names, counts
    if isinstance(config.categories, int):
        if not 1 <= config.categories <= len(names):
            raise ConfigError(f"categories: must be 1..{len(names)}, got {config.categories}")
        return config, names[: config.categories] + given, counts
    for name in config.categories:
        if name not in names:
            raise ConfigError(f"categories: unknown category {name!r}{suggestion(name, names)}")
    if not config.categories or len(set(config.categories)) < len(config.categories):
        raise ConfigError(f"categories: must name each category once, got {config.categories}")
    return config, list(config.categories) + given, counts


def _layout(name: str):
    """The module of a layout, loaded only when it is asked for: it renders, which needs the packages of an extra."""
    return importlib.import_module(f"{layouts.__name__}.{name}")


def _run(config: SynthConfig, root: Path, samples: list[Sample]) -> Iterator[int]:
    """Writes all samples and yields how many more are done; a bounded number of tasks waits at any time."""
    size = getattr(_layout(config.layout), "CHUNK", CHUNK)
    chunks = (samples[start : start + size] for start in range(0, len(samples), size))
    fixed = (config.size, config.plane, config.seed, *_options(config))
    tasks = ((config.layout, root, chunk, *fixed) for chunk in chunks)
    workers = min(config.workers or os.cpu_count() or 1, math.ceil(len(samples) / size))
    if workers <= 1:
        yield from (_write(*task) for task in tasks)
        return
    # A fresh interpreter for each worker: a fork would copy whatever threads and libraries the caller holds.
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        waiting = {pool.submit(_write, *task) for task in islice(tasks, 2 * workers)}
        try:
            while waiting:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                waiting |= {pool.submit(_write, *task) for task in islice(tasks, len(finished))}
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _write(layout: str, root: Path, samples: list[Sample], *fixed) -> int:
    for sample in samples:
        _layout(layout).write(root, sample, *fixed)
    return len(samples)
