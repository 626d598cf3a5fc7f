"""A trial of an evaluation, a class with a seed: the metrics of its instances once all of them are scored."""

import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import replace
from logging import getLogger
from typing import Any

import numpy as np

from dino_depth.anomaly.baselines import TEMPLATE
from dino_depth.anomaly.dataset import Benchmark
from dino_depth.anomaly.heads import open_head
from dino_depth.anomaly.results import Run
from dino_depth.anomaly.scored import read_scored
from dino_depth.anomaly.scoring import HEAD, Scored, measure
from dino_depth.errors import GateError

__all__ = ["Trial", "make_trial"]

log = getLogger("dino_depth")

Trial = tuple[dict[str, Any], dict[str, np.ndarray]]  # as in results.json, and the bootstrap's values by metric


def make_trial(run: Run, benchmark: Benchmark, category: str, seed: int) -> Trial:
    """Measures a class whose instances are all scored.

    Raises:
        DataError: a file is missing or damaged; the message names it.
        GateError: the head's own figures say that its results must not be believed.
    """
    start, metrics = time.monotonic(), run.config.metrics
    samples = benchmark.samples(category, "test")
    files = [read_scored(run.scored(category, seed, sample.name)) for sample in samples]
    rows, facts = [row for row, _ in files], [fact for _, fact in files]
    checks = json.loads(run.checks(category).read_bytes())
    checks |= _gated(run, category, seed, [fact["health"] for fact in facts if fact["health"]])
    forms = [fact["form"] for fact, sample in zip(facts, samples, strict=True) if sample.label == "anomalous"]
    located = forms[0] if forms else "none"
    if located == "none":
        rows = [{name: replace(scored, regions={}) for name, scored in row.items()} for row in rows]
    labels = np.array([int(sample.label == "anomalous") for sample in samples])
    kind = "pixels" if benchmark.pixels or samples[0].views[0].camera is None else "voxels"
    # The same instances are drawn for every seed and every method, others for every class.
    key = zlib.crc32(category.encode())
    values, intervals, draws = measure(_of(rows, HEAD), labels, kind, metrics, key)
    baselines, less = {}, {}
    for name in rows[0]:
        if name == TEMPLATE:
            baselines[name], _, theirs = measure(_of(rows, name), labels, kind, metrics, key)
            less = {metric: draws[metric] - theirs[metric] for metric in draws}
        elif name != HEAD:
            baselines[name], _, _ = measure(_of(rows, name), labels, kind, metrics, None)
    good = np.array([row[HEAD].score for row, label in zip(rows, labels, strict=True) if not label])
    instances = [
        {"name": sample.name, "label": sample.label, "defect": sample.defect, "score": row[HEAD].score,
         "file": (run.place(category, seed) / f"{sample.name}.npz").relative_to(run.path).as_posix()}
        for sample, row in zip(samples, rows, strict=True)
    ]  # fmt: skip
    trial = {
        "category": category,
        "seed": seed,
        "metrics": values,
        "intervals": intervals,
        "baselines": baselines,
        "less_template": {
            metric: {"value": values[metric] - baselines[TEMPLATE][metric]} | _bounds(part, metrics.level)
            for metric, part in less.items()
        },
        "good_scores": {"lowest": good.min(), "median": np.median(good), "highest": good.max()},
        "cost": _cost([fact["cost"] for fact in facts], time.monotonic() - start),
        "instances": instances,
        "checks": checks,
        "ground_truth": located,
    }
    return trial, draws | {f"{metric} less {TEMPLATE}": part for metric, part in less.items()}


def _of(rows: Sequence[dict[str, Scored]], name: str) -> list[Scored]:
    return [row[name] for row in rows]


def _bounds(draws: np.ndarray, level: float) -> dict[str, float]:
    return dict(zip(("low", "high"), np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]).tolist(), strict=True))


def _cost(parts: Sequence[dict[str, Any]], metrics: float) -> dict[str, Any]:
    """The sum of the instances' costs, and the largest memory."""
    seconds: dict[str, float] = {}
    for part in parts:
        for stage, value in part["seconds"].items():
            seconds[stage] = seconds.get(stage, 0) + value
    seconds["metrics"] = metrics
    total = {key: sum(part[key] for part in parts) for key in ("encodes", "fits")}
    total["seconds"] = {stage: round(value, 3) for stage, value in seconds.items()}
    for key in dict.fromkeys(key for part in parts for key in part if key.startswith("peak_")):
        total[key] = max(part.get(key, 0) for part in parts)
    return total


def _gated(run: Run, category: str, seed: int, health: list[dict[str, float]]) -> dict[str, float]:
    """The medians of the head's figures of sound instances, also appended to the run's ``metrics.jsonl``.

    Raises:
        GateError: the head says that results with such figures must not be believed, and refuses them.
    """
    if not health:
        return {}
    names = dict.fromkeys(name for figures in health for name in figures)
    medians = {name: float(np.median([figures[name] for figures in health if name in figures])) for name in names}
    head = run.config.head
    method, settings = open_head(head.name), getattr(head, head.name)
    verdict = method.verdict(settings, medians) if hasattr(method, "verdict") else ""
    line = {"category": category, "seed": seed, "instances": len(health), **medians, "verdict": verdict}
    with open(run.path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    if verdict:
        if settings.gates == "refuse":
            raise GateError(f"{category}, seed {seed}: {verdict}; head.{head.name}.gates report goes on all the same")
        log.warning("%s, seed %d: %s", category, seed, verdict)
    return medians
