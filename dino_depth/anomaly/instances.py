"""Test instances of an evaluation, each scored by the heads of all seeds: read, encoded, registered and lifted once.

An instance with a seed is the smallest piece of work: its prediction and what the metrics need of it are files of their
own, so any process may score any range of instances, and a killed one goes on after its last.
"""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_depth.anomaly.baselines import TEMPLATE, trivial_scores
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.dataset import Benchmark, Sample, Voxels, named
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.figures import write_figures
from dino_depth.anomaly.fitted import fitted_head
from dino_depth.anomaly.foreground import foreground
from dino_depth.anomaly.heads import Context, open_head
from dino_depth.anomaly.model import Model, PrepareConfig, Scores, fit_model
from dino_depth.anomaly.results import Run, write_arrays, write_ply, write_whole
from dino_depth.anomaly.scored import write_scored
from dino_depth.anomaly.scoring import HEAD, Judged, Scored, judge_view, judge_views, judge_volume
from dino_depth.anomaly.views import Views
from dino_depth.anomaly.volume import Aggregation, Maps, class_grid, scored_points
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError
from dino_depth.lock import Busy
from dino_depth.progress import Progress, peak_memory

__all__ = ["Cost", "Session", "has_template", "read_ahead", "score_instances"]

SOUND = 4  # sound instances that the head's figures are measured on


class Cost:
    """What was taken since the start: views encoded, heads fitted, and seconds: ``with cost.of("fit"): ...``."""

    def __init__(self):
        self.encodes = self.fits = 0
        self.seconds: dict[str, float] = {}

    @contextmanager
    def of(self, stage: str, store: FeatureStore | None = None) -> Iterator[None]:
        start, before = time.monotonic(), sum(store.encodes.values()) if store else 0
        yield
        self.seconds[stage] = self.seconds.get(stage, 0) + time.monotonic() - start
        self.encodes += sum(store.encodes.values()) - before if store else 0

    def counted(self) -> dict[str, Any]:
        """Encodes, fits, seconds of each stage, and the peak memory of the process so far."""
        counted = {
            "encodes": self.encodes,
            "fits": self.fits,
            "seconds": self.seconds,
            "peak_memory_gib": round(peak_memory() / 2**30, 3),
        }
        if torch.cuda.is_available():
            counted["peak_gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        return counted


@dataclass(frozen=True, eq=False)
class Session:
    """What all instances of an evaluation share.

    Attributes:
        images: where the template's features of images are from; None without a template.
    """

    config: EvaluateConfig
    benchmark: Benchmark
    store: FeatureStore
    run: Run
    device: torch.device
    images: FeatureStore | None = None


@dataclass(frozen=True, eq=False)
class _Class:
    """What all instances of a class share.

    Attributes:
        index: of the class, among those of a head.
        models: by seed.
        template: None without.
        grid: of the volumes; None where pixels are measured.
        form: of its ground truth.
        detailed: the instance with pictures of its features and pairs of views.
        sound: instances that the head's figures are measured on.
    """

    index: int
    models: dict[int, Model]
    template: Model | None
    grid: Voxels | None
    form: tuple[str, str]
    detailed: str
    sound: list[str]


def has_template(benchmark: Benchmark, category: str) -> bool:
    """Whether a class has one training instance of several calibrated views, with which a fixed rig compares."""
    train = benchmark.samples(category, "train")
    return len(train) == 1 and len(train[0].views) > 1 and all(view.camera is not None for view in train[0].views)


def score_instances(session: Session, group: list[str], wanted: Sequence[tuple[str, str]]):
    """Scores test instances with the heads of all seeds, but those that are done.

    Args:
        group: the classes that a head serves, whose places are their class indices.
        wanted: class and name of the instances.

    Raises:
        DataError: an instance cannot be read or scored; the message names it.
    """
    waiting = {(category, name): session.run.waiting(category, name) for category, name in wanted}
    fitting = sorted(set().union(*waiting.values()))
    if not fitting:
        return
    costs = {seed: Cost() for seed in fitting}
    train = [
        Views(sample, session.store, index)
        for index, category in enumerate(group)
        for sample in session.benchmark.samples(category, "train")
    ]
    models = _fit(session, train, fitting, costs)
    of_group = {category: [views for views in train if views.sample.category == category] for category in group}
    del train
    for category in dict.fromkeys(category for (category, _), left in waiting.items() if left):
        samples = session.benchmark.samples(category, "test")
        shared = _shared(session, models, of_group.pop(category), category, group.index(category), samples, costs)
        chosen = [sample for sample in samples if waiting.get((category, sample.name))]
        with Progress(category, len(chosen), "instances") as progress:
            for sample in chosen:
                given = {seed: costs[seed] for seed in waiting[category, sample.name]}
                _score(session, shared, sample, given)
                costs |= {seed: Cost() for seed in given}
                progress.advance()


def _fit(session: Session, train: list[Views], seeds: list[int], costs: dict[int, Cost]) -> dict[int, Model]:
    """The models of some seeds, by seed; those that other processes fit at this moment come last."""
    head, method = session.config.head, open_head(session.config.head.name)
    settings, prepare = getattr(head, head.name), session.config.prepare
    with costs[seeds[0]].of("encode", session.store):
        for views in train if method.needs(settings) & {"image", "depth"} else ():
            views.share  # noqa: B018  everything is encoded here, for the clock
    models: dict[int, Model] = {}
    for wait in (False, True):
        for seed in seeds:
            cost = costs[seed]

            def fit(given, settings, context, cost=cost, wait=wait):
                folder = head.cache or session.run.path / "heads"
                found, fits = fitted_head(method, folder, settings, context, given, wait=wait)
                cost.fits += fits
                return found

            if seed not in models:
                with cost.of("wait for a fit" if wait else "fit"):
                    try:
                        models[seed] = fit_model(method, settings, prepare, Context(seed, session.device), train, fit)
                    except Busy:
                        continue
    return models


def _shared(
    session: Session, models: dict[int, Model], train: list[Views], category: str, index: int, samples: list[Sample],
    costs: dict[int, Cost],
) -> _Class:  # fmt: skip
    """What the instances of a class share; its data are checked, unless another process has done that."""
    first = next(iter(costs.values()))
    with first.of("check"):
        path, check = session.run.checks(category), session.benchmark.check_category
        if not path.is_file():
            write_whole(path, json.dumps({} if check is None else check(category)).encode())
    template = None
    if session.images is not None and has_template(session.benchmark, category):
        with first.of("template"):
            method = open_head("template")
            given = [views.encoded(session.images) for views in train]
            template = fit_model(method, method.Config("image"), PrepareConfig(), Context(0, session.device), given)
    pixels = session.benchmark.pixels or samples[0].views[0].camera is None
    anomalous = [sample for sample in samples if sample.label == "anomalous"]
    form = ("", "none")
    if anomalous:
        truth = anomalous[0].read_truth()
        form = anomalous[0].name, "none" if truth is None else truth.kind
    return _Class(
        index,
        models,
        template,
        None if pixels else _grid(session, category, anomalous or samples),
        form,
        (anomalous or samples)[0].name,
        [sample.name for sample in samples if sample.label == "good"][:SOUND],
    )


def _grid(session: Session, category: str, samples: list[Sample]) -> Voxels:
    """The grid of a class, from the ground truth of ``samples``; see ``class_grid``."""

    def train() -> Iterator[tuple[Sample, int, DepthMap, np.ndarray]]:
        for sample in session.benchmark.samples(category, "train"):
            for place, view in enumerate(sample.views):
                source = f"{category}/{sample.name}, view {view.name}"
                depth = named(source, view.read_depth)
                yield sample, place, depth, named(source, foreground, depth, session.config.foreground)

    return class_grid(session.config.volume, train(), (sample.read_truth() for sample in samples))


def _score(session: Session, shared: _Class, sample: Sample, costs: dict[int, Cost]):
    """Scores one instance with some seeds, by their costs, and writes all that is kept of it.

    What the seeds have in common is the first one's cost.
    """
    first, models = next(iter(costs.values())), shared.models
    with read_ahead(sample) as resident:
        views = Views(resident, session.store, shared.index, resident=True)
        with first.of("encode", session.store):
            if session.store.encoders:
                views.share  # noqa: B018  as in _fit
        with first.of("read"):  # what encoding has not waited for
            views.foregrounds  # noqa: B018
            views.images  # noqa: B018
    scores, prepared = {}, None
    for seed, cost in costs.items():
        with cost.of("score", session.store):
            # The seeds of a head differ in nothing that is done around it.
            scores[seed] = models[seed].score(views, sample.name in shared.sound, prepared)
            prepared = scores[seed].prepared
    beside: dict[str, Maps] = {}
    if shared.template is not None:
        with first.of("template"):
            beside[TEMPLATE] = shared.template.score(views.encoded(session.images)).maps
    with first.of("volume"):
        judged = _judge(session, views, scores, beside, shared)
    for seed, cost in costs.items():
        path = session.run.place(sample.category, seed) / f"{sample.name}.npz"
        with cost.of("write"):
            _write(path, views, scores[seed], judged[seed])
            if session.config.volume.points and judged[seed].points is not None:
                _write_points(path, views, scores[seed].maps, session.config.volume.aggregation)
            if seed == 0:
                detail = sample.name == shared.detailed
                pairs = partial(models[seed].pairs, scores[seed].prepared) if detail else None
                figure = session.run.path / "figures" / sample.category / path.name
                write_figures(figure, views, truth=judged[seed].truth, detail=detail, pair_maps=pairs)
        facts = {"form": judged[seed].form, "health": scores[seed].health, "cost": cost.counted()}
        write_scored(session.run.scored(sample.category, seed, sample.name), judged[seed].rows, facts)


def _judge(
    session: Session, views: Views, scores: dict[int, Scores], beside: dict[str, Maps], shared: _Class
) -> dict[int, Judged]:
    config, sample, foregrounds = session.config, views.sample, views.foregrounds
    truth, heads = sample.read_truth(), {seed: found.maps for seed, found in scores.items()}
    form = "none" if truth is None else truth.kind
    if sample.label == "anomalous" and form != shared.form[1]:
        # A defect in voxels and one in masks are not the same size: a lost file would change the figure.
        raise DataError(
            f"{sample.category}/{sample.name}: its ground truth is {form}, that of {shared.form[0]} {shared.form[1]}: "
            "a class has one form"
        )
    if sample.views[0].camera is None:
        aggregation = config.volume.aggregation
        judged = judge_view(sample, heads, foregrounds[0], truth, aggregation, config.metrics, beside)
    elif session.benchmark.pixels:
        aggregation = config.volume.aggregation
        judged = judge_views(sample, heads, foregrounds, truth, aggregation, config.metrics, beside)
    else:
        parts = sample, heads, views.depths, foregrounds, truth, config.volume, config.metrics, shared.grid
        judged = judge_volume(*parts, beside)
    trivial = {name: Scored(value, {}) for name, value in trivial_scores(sample, foregrounds).items()}
    for seed, one in judged.items():
        rows, instance = one.rows | trivial, scores[seed].instance
        if instance is not None:
            rows[HEAD] = replace(rows[HEAD], score=instance)
        judged[seed] = replace(one, rows=rows, form=form)
    return judged


@contextmanager
def read_ahead(sample: Sample) -> Iterator[Sample]:
    """The sample with its views in memory, since several stages look at them; a thread reads them in their order.

    Raises:
        DataError: a view cannot be read; the message names it. It is raised where the view is asked for.
    """
    with ThreadPoolExecutor(1, "read") as reader:
        views = []
        for view in sample.views:
            place = f"{sample.category}/{sample.name}, view {view.name}"
            depth, image = (reader.submit(named, place, read) for read in (view.read_depth, view.read_image))
            views.append(replace(view, read_depth=depth.result, read_image=image.result))
        try:
            yield replace(sample, views=tuple(views))
        finally:
            reader.shutdown(cancel_futures=True)


def _write(path: Path, views: Views, scores: Scores, judged: Judged):
    """The prediction of an instance: npz, and PLY where there is a volume. Maps are kept on the grid of cells."""
    arrays, cells = dict(judged.arrays), views.share.shape[-1]
    for name, part in scores.maps.items():
        kept = part if part.shape[-1] == cells else torch.nn.functional.adaptive_max_pool2d(part, cells)
        arrays[f"{name}_map"] = kept.numpy().astype(np.float16)
    arrays |= {"instance_score": np.float64(judged.rows[HEAD].score), "label": np.array(views.sample.label)}
    write_arrays(path, arrays)
    if judged.points is not None:
        # Not with_suffix: a name may hold dots.
        write_ply(path.with_name(path.name.removesuffix(".npz") + ".ply"), judged.points, arrays["score"])


def _write_points(path: Path, views: Views, maps: Maps, aggregation: Aggregation):
    clouds = scored_points(maps, views.sample, views.depths, views.foregrounds, aggregation)
    for view, (points, score) in zip(views.sample.views, clouds, strict=True):
        write_ply(path.with_name(f"{path.name.removesuffix('.npz')}.{view.name}.ply"), points, score)
