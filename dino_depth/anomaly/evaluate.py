"""``dino-depth evaluate``: frozen encoders and a head on a benchmark, from raw views to results with intervals.

For each class every view is encoded once (``FeatureStore``), heads are fitted on the training samples, one for each
seed, and each test instance is scored by all of them: its maps become a volume or stay pixels. Then a trial, a class
with a seed, gets its metrics with bootstrap intervals over instances. What is finished is written at once; a killed
run, started again with the same command, goes on after its last instance. See ``results.py`` for the files.

``evaluate`` does all of it, in one process or several. A cluster does the same in pieces: ``check`` and ``begin`` once,
``compute`` for any range of the ``instances``, anywhere, and ``finish`` at the end.
"""

import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

from dino_depth.anomaly.benchmarks import open_benchmark
from dino_depth.anomaly.config import EncoderConfig, EvaluateConfig, HeadConfig
from dino_depth.anomaly.dataset import Benchmark
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.heads import Facts, open_head
from dino_depth.anomaly.instances import Session, has_template, score_instances
from dino_depth.anomaly.processes import run_processes
from dino_depth.anomaly.results import Run
from dino_depth.anomaly.trials import make_trial
from dino_depth.anomaly.volume import check_size
from dino_depth.config import suggestion
from dino_depth.device import pick_device
from dino_depth.errors import ConfigError, DataError, Interrupted
from dino_depth.frozen import load_frozen
from dino_depth.terminal import say

__all__ = [
    "EncoderConfig", "EvaluateConfig", "HeadConfig", "Instance", "begin", "check", "compute", "deal", "evaluate",
    "finish", "instances", "stopping",
]  # fmt: skip

MISSING_SHOWN = 3
RAW = 8  # pixels of a patch that a template compares where a run has no features of images
log = getLogger("dino_depth")

Instance = tuple[str, str]  # its class and its name


def evaluate(config: EvaluateConfig):
    """Writes the results of all trials.

    Raises:
        ConfigError: a setting that cannot work, or that changed since the run began.
        DataError: a class is empty, a view missing or unreadable, a calibration wrong, or a number not finite; the
            message names it.
        Interrupted: a signal came; what is finished is kept.
    """
    session, categories = begin(config)
    with stopping(), session.run.held():
        wanted = [one for one in instances(session.benchmark, categories) if session.run.waiting(*one)]
        if config.processes > 1 and len(wanted) > 1:
            shares = deal(wanted, config.processes)
            run_processes(_compute, [(config, share) for share in shares])
            wanted = []
        for group in _groups(config, categories):
            score_instances(session, group, [one for one in wanted if one[0] in group])
            for category in group:
                _measure(session.run, session.benchmark, category)
                session.run.write_results(categories)
    say(f"{session.run.path}: {session.run.verdict}")


def check(config: EvaluateConfig) -> tuple[Benchmark, list[str]]:
    """The benchmark and the classes of a configuration whose encoders may still be missing.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a class lacks samples or labels.
    """
    if config.seeds < 1:
        raise ConfigError(f"seeds: must be at least 1, got {config.seeds}")
    if config.processes < 1:
        raise ConfigError(f"processes: must be at least 1, got {config.processes}")
    if not config.out:
        raise ConfigError("--out is missing: name the folder of the results")
    benchmark = open_benchmark(config.data)
    categories = _categories(config, benchmark)
    first = benchmark.samples(categories[0], "train")
    facts = Facts(
        frozenset(name for name in ("image", "depth") if getattr(config.encoder, name)),
        min(benchmark.views(category) for category in categories),
        all(view.camera is not None for view in first[0].views),
        min(len(benchmark.samples(category, "train")) for category in categories),
        len(categories) if config.head.multiclass else 1,
    )
    open_head(config.head.name).check(getattr(config.head, config.head.name), facts)
    if config.prepare.registration.method != "none" and not facts.cameras:
        raise ConfigError(f"prepare.registration.method icp needs calibrated views: {config.data.name} has none")
    for category in () if config.volume.size_mm is None or benchmark.pixels else categories:
        sample = min(benchmark.samples(category, "test"), key=lambda sample: sample.label != "anomalous")
        check_size(config.volume, sample.read_truth(), f"{category}/{sample.name}")
    return benchmark, categories


def begin(config: EvaluateConfig, device: str = "") -> tuple[Session, list[str]]:
    """Loads the encoders and opens the folder, new or to be continued; what trials need, and the classes.

    Args:
        device: where to compute, on machines that share a configuration; empty: as configured.
    """
    chosen = pick_device(device or config.device)
    benchmark, categories = check(config)
    needs = open_head(config.head.name).needs(getattr(config.head, config.head.name))
    encoders = {
        modality: load_frozen(spec, modality=modality, device=chosen) if spec and modality in needs else None
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
    _compare_cache(store, benchmark, categories)
    facts = {f"{name} encoder": part and part.fingerprint for name, part in encoders.items()}
    facts |= {"setup": benchmark.setup, "synthetic": (Path(config.data.root) / "SYNTHETIC.json").is_file()}
    if config.head.multiclass:
        facts["classes of the model"] = categories
    images = None
    if config.metrics.template and any(has_template(benchmark, category) for category in categories):
        images = store if "image" in store.encoders else _raw_images(store, chosen)
    return Session(config, benchmark, store, Run(config, facts), chosen, images), categories


def _raw_images(store: FeatureStore, device: Any) -> FeatureStore:
    """Raw patches of the images on the grid of a run that does not encode them; cheaper than a cache."""
    encoder = load_frozen(f"raw-patches?patch={RAW}", modality="image", device=device)
    return FeatureStore(encoder, None, RAW * store.cells, object_pixels=store.object_pixels, batch=store.batch)


def _compare_cache(store: FeatureStore, benchmark: Benchmark, categories: list[str]):
    """Says at the start where the features of a run do not fit into their cache: the oldest would make room."""
    views = sum(
        len(benchmark.samples(category, split)) * benchmark.views(category)
        for category in categories
        for split in ("train", "test")
    )
    needed = views * store.bytes_per_view()
    if store.cache is not None and needed > store.cache.limit:
        log.warning(
            "the features of %d views take %.1f GiB, encoder.cache_gib is %.1f: another seed or row encodes again; "
            "set encoder.cache_gib %d",
            views,
            needed / 2**30,
            store.cache.limit / 2**30,
            math.ceil(needed / 2**30),
        )


def instances(benchmark: Benchmark, categories: Sequence[str]) -> list[Instance]:
    """All test instances, class by class."""
    return [(category, sample.name) for category in categories for sample in benchmark.samples(category, "test")]


def deal(wanted: Sequence[Any], parts: int) -> list[list[Any]]:
    """Ranges of nearly the same size in order, ``parts`` of them or as many as there are instances."""
    parts = min(parts, len(wanted))
    bounds = [len(wanted) * part // parts for part in range(parts + 1)]
    return [list(wanted[first:end]) for first, end in zip(bounds, bounds[1:], strict=False)]


def compute(config: EvaluateConfig, share: Sequence[Instance], device: str = ""):
    """Scores some instances with all seeds; other processes, on any machine, may score others at the same time.

    Raises:
        As ``evaluate``.
    """
    session, categories = begin(config, device)
    with session.run.held(shared=True):
        _score_share(session, categories, share)


def _compute(config: EvaluateConfig, share: Sequence[Instance]):
    """``compute`` for a process that holds the run's folder."""
    _score_share(*begin(config), share)


def _score_share(session: Session, categories: list[str], share: Sequence[Instance]):
    with stopping():
        for group in _groups(session.config, categories):
            score_instances(session, group, [(category, name) for category, name in share if category in group])


def _groups(config: EvaluateConfig, categories: list[str]) -> list[list[str]]:
    """The classes of each head."""
    return [categories] if config.head.multiclass else [[category] for category in categories]


def finish(config: EvaluateConfig):
    """Measures the trials whose instances are all scored, and writes the results of what is there.

    Raises:
        DataError: instances are not scored: the same command scores exactly those.
    """
    benchmark, categories = check(config)
    run = Run(config)
    missing = [
        f"{category}/{name} seed {seed}"
        for category, name in instances(benchmark, categories)
        for seed in run.waiting(category, name)
    ]
    with run.held():
        for category in categories:
            _measure(run, benchmark, category)
        run.write_results(categories)
    if missing:
        more = ", ..." if len(missing) > MISSING_SHOWN else ""
        total = len(instances(benchmark, categories)) * config.seeds
        raise DataError(
            f"{config.out}: {len(missing)} of {total} instances are not scored "
            f"({', '.join(missing[:MISSING_SHOWN])}{more}): run the same command again to score them"
        )
    say(f"{run.path}: {run.verdict}")


def _measure(run: Run, benchmark: Benchmark, category: str):
    """The trials of a class whose instances are all scored."""
    names = [name for _, name in instances(benchmark, [category])]
    for seed in range(run.config.seeds):
        if (category, seed) not in run.trials and not any(seed in run.waiting(category, name) for name in names):
            run.add(*make_trial(run, benchmark, category, seed))


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
        if set(labels) not in ({"good", "anomalous"}, {"good"}):
            counts = ", ".join(f"{labels.count(label)} {label}" for label in sorted(set(labels)))
            raise DataError(f"{benchmark.name} {category}: need good test samples, anomalous beside them, got {counts}")
    return categories


@contextmanager
def stopping() -> Iterator[None]:
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
