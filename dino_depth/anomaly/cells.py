"""One cell of an evaluation: a class with a seed, scored by a fitted head, with its prediction files and metrics."""

import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_depth.anomaly.baselines import trivial_scores
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.dataset import Benchmark, Sample, named
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.figures import write_figures
from dino_depth.anomaly.fitted import Training, fitted_head
from dino_depth.anomaly.foreground import foreground
from dino_depth.anomaly.heads import modmap, patchcore
from dino_depth.anomaly.results import Run, write_arrays, write_ply
from dino_depth.anomaly.scoring import HEAD, Judged, Scored, judge_view, judge_volume, measure
from dino_depth.errors import DataError
from dino_depth.progress import Progress, peak_memory

__all__ = ["Cost", "Session", "fit_head", "make_cell"]

HEADS = {"modmap": modmap, "patchcore": patchcore}

Cell = tuple[dict[str, Any], dict[str, np.ndarray]]  # as in results.json, and the bootstrap's values by metric


class Cost:
    """Counts what a cell takes: views encoded by ``store``, heads fitted, and seconds: ``with cost.of("fit"): ...``."""

    def __init__(self, store: FeatureStore):
        self.store, self.before = store, sum(store.encodes.values())
        self.fits = 0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0) + time.monotonic() - start

    def counted(self) -> dict[str, Any]:
        """Encodes and fits since the start, seconds of each stage, and the peak memory of the process so far."""
        counted = {
            "encodes": sum(self.store.encodes.values()) - self.before,
            "fits": self.fits,
            "seconds": {stage: round(value, 3) for stage, value in self.seconds.items()},
            "peak_memory_gib": round(peak_memory() / 2**30, 3),
        }
        if torch.cuda.is_available():
            counted["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return counted


@dataclass(frozen=True, eq=False)
class Session:
    """What all cells of an evaluation share."""

    config: EvaluateConfig
    benchmark: Benchmark
    store: FeatureStore
    run: Run
    device: torch.device


def fit_head(session: Session, categories: list[str], seed: int, cost: Cost) -> Any:
    """A head fitted on the training samples of some classes, whose places in the list are their class indices."""
    config, features, classes, names = session.config.head, [], [], []
    for index, category in enumerate(categories):
        for sample in session.benchmark.samples(category, "train"):
            with cost.of("encode"):
                features.append(session.store.get(sample))
            classes.append(index)
            names.append(f"{category}/{sample.name}")
    folder, settings = config.cache or session.run.path / "heads", getattr(config, config.name)
    training = Training(names, features, classes)
    with cost.of("fit"):
        head, cost.fits = fitted_head(HEADS[config.name], folder, settings, seed, session.device, training)
    return head


def make_cell(session: Session, head: Any, category: str, class_index: int, seed: int, cost: Cost) -> Cell:
    """Scores the test instances of a class and writes their predictions.

    Raises:
        DataError: an instance cannot be read or scored; the message names it.
    """
    samples = session.benchmark.samples(category, "test")
    checks = next((cell["checks"] for (name, _), cell in session.run.cells.items() if name == category), None)
    with cost.of("check"):
        check = session.benchmark.check_category
        if checks is None:  # whatever the seed
            checks = {} if check is None else check(category)
    detailed = next(sample.name for sample in samples if sample.label == "anomalous")
    rows, instances, located = [], [], None
    with Progress(f"{category}, seed {seed}", len(samples), "instances") as progress:
        for sample in samples:
            path = session.run.place(category, seed) / f"{sample.name}.npz"
            detail = sample.name == detailed
            judged = _instance(session, head, sample, class_index, seed, path, detail, cost)
            if sample.label == "anomalous":
                if located is not None and located != (judged.truth is not None):
                    raise DataError(f"{category}/{sample.name}: ground truth is there for some anomalous samples only")
                located = judged.truth is not None
            rows.append(judged.rows)
            facts = {"name": sample.name, "label": sample.label, "defect": sample.defect}
            facts |= {"score": judged.rows[HEAD].score, "file": path.relative_to(session.run.path).as_posix()}
            instances.append(facts)
            progress.advance()
    if not located:
        rows = [{name: replace(scored, regions={}) for name, scored in row.items()} for row in rows]
    labels = np.array([int(sample.label == "anomalous") for sample in samples])
    kind = "pixels" if samples[0].views[0].camera is None else "voxels"
    metrics = session.config.metrics
    with cost.of("metrics"):
        # The same instances are drawn for every seed and every method, others for every class.
        key = zlib.crc32(category.encode())
        values, intervals, draws = measure([row[HEAD] for row in rows], labels, kind, metrics, key)
        baselines = {
            name: measure([row[name] for row in rows], labels, kind, metrics, None)[0]
            for name in rows[0]
            if name != HEAD
        }
    cell = {
        "category": category,
        "seed": seed,
        "metrics": values,
        "intervals": intervals,
        "baselines": baselines,
        "cost": cost.counted(),
        "instances": instances,
        "checks": checks,
    }
    return cell, draws


def _instance(
    session: Session, head: Any, sample: Sample, class_index: int, seed: int, path: Path, detail: bool, cost: Cost
) -> Judged:
    """Scores one instance and writes what is kept of it."""
    method = HEADS[session.config.head.name]
    with cost.of("read"):
        held = _held(sample)
    with cost.of("encode"):
        features = session.store.get(held)
    with cost.of("score"):
        maps = method.score(head, features, class_index=class_index)
    with cost.of("volume"):
        judged = _judge(session, held, maps, seed)
    with cost.of("write"):
        _write(path, sample, maps, judged)
        if seed == 0:
            pairs = None
            if detail and method is modmap and session.config.head.modmap.conditioning == "cross-view":
                every = range(len(sample.views))
                pairs = partial(modmap.pair_maps, head, features, sources=every, class_index=class_index)
            figure = session.run.path / "figures" / sample.category / path.name
            write_figures(figure, held, features, truth=judged.truth, detail=detail, pair_maps=pairs)
    # Only what the metrics need stays in memory until the class is done.
    return replace(judged, arrays={}, points=None)


def _judge(session: Session, held: Sample, maps: dict[str, torch.Tensor], seed: int) -> Judged:
    config, depths = session.config, [view.read_depth() for view in held.views]
    foregrounds = [foreground(depth, config.foreground) for depth in depths]
    truth = held.read_truth()
    if held.views[0].camera is None:
        aggregation = config.volume.aggregation
        judged = judge_view(held, maps, foregrounds[0], truth, aggregation, config.metrics, seed)
    else:
        judged = judge_volume(held, maps, depths, foregrounds, truth, config.volume, config.metrics, seed)
    trivial = {name: Scored(value, {}) for name, value in trivial_scores(held, foregrounds).items()}
    return replace(judged, rows=judged.rows | trivial)


def _held(sample: Sample) -> Sample:
    """The sample with its views in memory, since several stages look at them.

    Raises:
        DataError: a view cannot be read; the message names it.
    """
    views = []
    for view in sample.views:
        place = f"{sample.category}/{sample.name}, view {view.name}"
        image, depth = (named(place, read) for read in (view.read_image, view.read_depth))
        views.append(replace(view, read_image=partial(_given, image), read_depth=partial(_given, depth)))
    return replace(sample, views=tuple(views))


def _given(value: Any) -> Any:
    return value


def _write(path: Path, sample: Sample, maps: dict[str, torch.Tensor], judged: Judged):
    """The prediction of an instance: npz, and PLY where there is a volume."""
    arrays = dict(judged.arrays)
    arrays |= {f"{modality}_map": part.numpy().astype(np.float16) for modality, part in maps.items()}
    arrays |= {"instance_score": np.float64(judged.rows[HEAD].score), "label": np.array(sample.label)}
    write_arrays(path, arrays)
    if judged.points is not None:
        # Not with_suffix: a name may hold dots.
        write_ply(path.with_name(path.name.removesuffix(".npz") + ".ply"), judged.points, arrays["score"])
