"""``dino-depth evaluate``: frozen encoders and a head on a benchmark, from raw views to results with intervals.

A cell is a class with a seed. For each, every view is encoded once (``FeatureStore``), the head is fitted on the
training samples, each test instance is scored, its maps become a volume or stay pixels, and the metrics follow with
bootstrap intervals over instances. A finished cell is written at once; a killed run, started again with the same
command, goes on after it. See ``results.py`` for the files.

``evaluate`` does all of it in one process. A cluster does the same in pieces: ``check`` and ``begin`` once,
``compute`` for any of the ``fits``, anywhere, and ``finish`` at the end.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dino_depth.anomaly.benchmarks import open_benchmark
from dino_depth.anomaly.cells import Cost, Session, fit_head, make_cell
from dino_depth.anomaly.config import EncoderConfig, EvaluateConfig, HeadConfig
from dino_depth.anomaly.dataset import Benchmark
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.results import Run
from dino_depth.config import suggestion
from dino_depth.device import pick_device
from dino_depth.errors import ConfigError, DataError, Interrupted
from dino_depth.frozen import load_frozen

__all__ = [
    "EncoderConfig", "EvaluateConfig", "HeadConfig", "begin", "check", "compute", "evaluate", "finish", "fits",
]  # fmt: skip

MISSING_SHOWN = 3

Fit = tuple[list[str], int]  # the classes of one head, and its seed


def evaluate(config: EvaluateConfig) -> None:
    """Writes the results of all cells.

    Raises:
        ConfigError: a setting that cannot work, or that changed since the run began.
        DataError: a class is empty, a view missing or unreadable, a calibration wrong, or a number not finite; the
            message names it.
        Interrupted: a signal came; finished cells are kept.
    """
    session, categories = begin(config)
    with _stopping(), session.run.held():
        for group, seed in fits(config, categories):
            _fit_and_score(session, group, seed, lambda: session.run.write_results(categories))
        session.run.write_results(categories)


def check(config: EvaluateConfig) -> tuple[Benchmark, list[str]]:
    """The benchmark and the classes of a configuration whose encoders may still be missing.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a class lacks samples or labels.
    """
    if config.seeds < 1:
        raise ConfigError(f"seeds: must be at least 1, got {config.seeds}")
    if not config.out:
        raise ConfigError("--out is missing: name the folder of the results")
    if config.head.name == "modmap" and not (config.encoder.image and config.encoder.depth):
        missing = "depth" if config.encoder.image else "image"
        raise ConfigError(f"--encoder.{missing} is missing: modmap maps features of both modalities")
    benchmark = open_benchmark(config.data)
    return benchmark, _categories(config, benchmark)


def begin(config: EvaluateConfig, device: str = "") -> tuple[Session, list[str]]:
    """Loads the encoders and opens the folder, new or to be continued; what cells need, and the classes.

    Args:
        device: where to compute, on machines that share a configuration; empty: as configured.
    """
    chosen = pick_device(device or config.device)
    benchmark, categories = check(config)
    encoders = {
        modality: load_frozen(spec, modality=modality, device=chosen) if spec else None
        for modality, spec in (("image", config.encoder.image), ("depth", config.encoder.depth))
    }
    encoder = config.encoder
    store = FeatureStore(
        encoders["image"],
        encoders["depth"],
        (encoder.size, encoder.depth_size or encoder.size),
        encoder.cache or Path(config.out) / "features",
        encoder.cache_gib,
        object_pixels=config.foreground,
        batch=encoder.batch,
    )
    facts = {f"{name} encoder": part and part.fingerprint for name, part in encoders.items()}
    facts |= {"setup": benchmark.setup, "synthetic": (Path(config.data.root) / "SYNTHETIC.json").is_file()}
    if config.head.multiclass:
        facts["classes of the model"] = categories
    return Session(config, benchmark, store, Run(config, facts), chosen), categories


def fits(config: EvaluateConfig, categories: list[str]) -> list[Fit]:
    """All heads: one of each class or one of all classes, for each seed; those of the same classes stand together."""
    groups = [categories] if config.head.multiclass else [[category] for category in categories]
    return [(group, seed) for group in groups for seed in range(config.seeds)]


def compute(config: EvaluateConfig, share: list[Fit], device: str = "") -> None:
    """Computes the cells of some heads; other processes, on any machine, may compute others at the same time.

    Raises:
        As ``evaluate``.
    """
    session, _ = begin(config, device)
    with _stopping(), session.run.held(shared=True):
        for group, seed in share:
            _fit_and_score(session, group, seed)


def finish(config: EvaluateConfig, categories: list[str]) -> None:
    """Writes the results of the cells that are there.

    Raises:
        DataError: cells are missing: the same command computes exactly those.
    """
    run = Run(config)
    with run.held():
        run.write_results(categories)
    wanted = [(category, seed) for category in categories for seed in range(config.seeds)]
    if missing := [f"{category} seed {seed}" for category, seed in wanted if (category, seed) not in run.cells]:
        more = ", ..." if len(missing) > MISSING_SHOWN else ""
        raise DataError(
            f"{config.out}: {len(missing)} of {len(wanted)} cells are not computed "
            f"({', '.join(missing[:MISSING_SHOWN])}{more}): run the same command again to compute them"
        )


def _categories(config: EvaluateConfig, benchmark: Benchmark) -> list[str]:
    """The classes, all of whose samples are listed once, so that what is missing is known before anything is computed.

    Raises:
        ConfigError: an unknown class.
        DataError: a class lacks samples or labels.
    """
    if len(set(config.categories)) < len(config.categories):
        raise ConfigError(f"categories: must name each class once, got {config.categories}")
    for category in config.categories:
        if category not in benchmark.categories:
            known = list(benchmark.categories)
            raise ConfigError(
                f"categories: unknown class {category!r} of {benchmark.name}{suggestion(category, known)}"
            )
    categories = list(config.categories or benchmark.categories)
    for category in categories:
        benchmark.samples(category, "train")
        labels = [sample.label for sample in benchmark.samples(category, "test")]
        if set(labels) != {"good", "anomalous"}:
            counts = ", ".join(f"{labels.count(label)} {label}" for label in sorted(set(labels)))
            raise DataError(f"{benchmark.name} {category}: need good and anomalous test samples, got {counts}")
    return categories


@contextmanager
def _stopping() -> Iterator[None]:
    """Turns signals into Interrupted; files are whole at any time."""

    def stop(number, frame):
        raise Interrupted(f"stopped by {signal.Signals(number).name}; run the same command again to continue")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _fit_and_score(session: Session, group: list[str], seed: int, after: Callable[[], None] = lambda: None):
    """One head and the cells it scores, except those that are finished; the first of them bears the cost of the fit."""
    waiting = [category for category in group if (category, seed) not in session.run.cells]
    if not waiting:
        return
    cost = Cost(session.store)
    head = fit_head(session, group, seed, cost)
    for category in waiting:
        session.run.add(*make_cell(session, head, category, group.index(category), seed, cost))
        after()
        cost = Cost(session.store)
