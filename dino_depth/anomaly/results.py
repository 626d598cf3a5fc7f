"""The folder of an evaluation: what is done so far, and its results as JSON, CSV and Markdown.

    config.yaml     the settings; a run is continued with the same ones only
    run.json        what the encoders and the benchmark were
    results.json    all trials, means and published rows; like results.csv and .md, written anew after every trial
    trials/<category>/seed<k>.json      a finished trial, a class with a seed: it is not computed again
    trials/<category>/checks.json       what the data of a class were found to be
    scored/<category>/seed<k>/<instance>.npz    scored instances of trials that are not finished; see scored.py
    predictions/<category>/seed<k>/<instance>.npz and .ply, and resamples.npz with the bootstrap's values
    figures/<category>/<instance>.npz   pictures for the report
    heads/                              fitted heads, unless they are elsewhere; see fitted.py

Every file is whole or absent. Apart from ``cost``, results depend on settings, weights and data only. Processes that
score different instances may share a folder; trials and tables are written by one that has it for itself.
"""

import csv
import fcntl
import io
import json
import os
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dino_depth.anomaly.baselines import PERFECT, RANDOM, TEMPLATE
from dino_depth.anomaly.config import everywhere
from dino_depth.anomaly.heads import open_head
from dino_depth.config import config_keys, find_config, load_config, save_config
from dino_depth.errors import ConfigError, DataError
from dino_depth.lock import NO_LOCKS
from dino_depth.settings import load_yaml

__all__ = ["GOOD", "Run", "alone", "published_rows", "undefined", "write_arrays", "write_ply", "write_whole"]

# Settings that do not change what a trial holds, so they may differ when a run is continued.
FREE = {"out", "seeds", "categories", "processes", "encoder.cache", "encoder.cache_gib", "encoder.batch", "head.cache"}
ALONE = "\\* Of one good or one anomalous instance: the interval does not see how instances differ, and is too narrow."
UNDEFINED = "No anomalous test instance, so that no metric is defined, and left out of the means: {}."
GOOD = ("lowest", "median", "highest")  # of the scores of good instances
PLY = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("scalar_score", "<f4")])


def write_whole(path: Path, content: bytes):
    """Writes a file that exists either whole or not at all, whoever else writes it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_arrays(path: Path, arrays: dict[str, np.ndarray], compressed: bool = True):
    """Writes an npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    write_whole(path, buffer.getvalue())


def write_ply(path: Path, points: np.ndarray, scores: np.ndarray):
    """Writes points (n, 3) and scores (n,) as binary PLY with what CloudCompare takes for a scalar field."""
    rows = np.empty(len(points), PLY)
    for axis, name in enumerate("xyz"):
        rows[name] = points[:, axis]
    rows["scalar_score"] = scores
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [f"property float {name}" for name in PLY.names]
    write_whole(path, "\n".join([*lines, "end_header", ""]).encode() + rows.tobytes())


def published_rows(benchmark: str, setup: str) -> list[dict[str, Any]]:
    """The published figures of a benchmark, one of paper, table, scale, method, setup, category, metric and value each.

    Figures of different scales, "" being the benchmark's own, do not compare.

    Raises:
        DataError: the shipped file is damaged.
    """
    path = find_config("published")
    rows = []
    try:
        for table in load_yaml(path.read_text(encoding="utf-8")):
            if table["benchmark"] != benchmark or table.get("setup", "") != setup:
                continue
            shared = {key: table[key] for key in ("paper", "table")} | {"scale": table.get("scale", "")}
            for metric, methods in table["metrics"].items():
                for method, values in methods.items():
                    categories = [table["categories"][-1]] if len(values) == 1 else table["categories"]
                    for category, value in zip(categories, values, strict=True):
                        named = {"method": method, "setup": setup, "category": category}
                        rows.append(shared | named | {"metric": metric, "value": value})
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: {type(error).__name__} {' '.join(str(error).split())}") from error
    return rows


class Run:
    """Opens the folder of an evaluation, new or to be continued.

    Args:
        config: an EvaluateConfig.
        facts: what must not change either, such as the fingerprints of encoders; None: as they were when it began.

    Attributes:
        trials: finished ones by (category, seed).
        verdict: one sentence on the results, once they are written.

    Raises:
        ConfigError: no folder is named, it holds something else, or a setting changed.
        DataError: a fact changed, or a file is damaged.
    """

    def __init__(self, config: Any, facts: dict[str, Any] | None = None):
        if not config.out:
            raise ConfigError("--out is missing: name the folder of the results")
        self.path, self.config = Path(config.out), config
        if (self.path / "config.yaml").is_file():
            facts = self._check_unchanged(facts)
        elif facts is None:
            raise ConfigError(f"--out {self.path}: no evaluation was begun there")
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(f"--out {self.path}: is no evaluation and not empty; name a new folder")
        else:
            write_whole(self.path / "run.json", _json(facts))
            # Last, and in one step: a run exists once its configuration does.
            save_config(config, self.path / "config.yaml.tmp")
            os.replace(self.path / "config.yaml.tmp", self.path / "config.yaml")
        self.facts, self.verdict = facts, ""
        self.trials = self._read_trials()

    def _check_unchanged(self, facts: dict[str, Any] | None) -> dict[str, Any]:
        """The facts, which nothing contradicts; of paths it counts where they lead from here."""
        before = load_config(type(self.config), self.path / "config.yaml")
        for key in config_keys(type(self.config)):
            old, new = (reduce(getattr, key.split("."), everywhere(config)) for config in (before, self.config))
            if key not in FREE and not is_dataclass(new) and json.dumps(old) != json.dumps(new):
                raise ConfigError(f"--out {self.path}: {key} was {old!r} when it began and is {new!r} now")
        path = self.path / "run.json"
        try:
            known = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: unreadable: {error}") from error
        facts = known if facts is None else facts
        for key in sorted(known.keys() | facts.keys()):
            if known.get(key) != facts.get(key):
                raise DataError(f"{path}: {key} was {known.get(key)!r} when it began and is {facts.get(key)!r} now")
        return facts

    def _read_trials(self) -> dict[tuple[str, int], dict]:
        if (self.path / "cells").is_dir():
            raise ConfigError(
                f"--out {self.path}: written before trials had their name: rename its folder cells to trials"
            )
        trials = {}
        for path in (self.path / "trials").glob("*/seed*.json"):
            try:
                trial = json.loads(path.read_bytes())
                trials[trial["category"], trial["seed"]] = trial
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}: no trial: {error}") from error
        return trials

    @contextmanager
    def held(self, shared: bool = False) -> Iterator[None]:
        """Keeps other processes from writing here; ``shared`` with those that score other instances.

        Raises:
            ConfigError: another process writes here.
        """
        with open(self.path / "config.yaml", "rb+") as file:
            try:
                fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"--out {self.path} is being written by another process") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            else:
                for left in () if shared else self.path.rglob("*.tmp"):  # by a process that was killed
                    left.unlink(missing_ok=True)
            yield

    def place(self, category: str, seed: int) -> Path:
        """Where the predictions of a trial go."""
        return self.path / "predictions" / category / f"seed{seed}"

    def scored(self, category: str, seed: int, instance: str) -> Path:
        """Where a scored instance is kept until its trial is finished."""
        return self.path / "scored" / category / f"seed{seed}" / f"{instance}.npz"

    def checks(self, category: str) -> Path:
        """Where it is said what the data of a class were found to be."""
        return self.path / "trials" / category / "checks.json"

    def waiting(self, category: str, instance: str) -> list[int]:
        """The seeds that an instance has still to be scored with."""
        done = (
            (category, seed) in self.trials or self.scored(category, seed, instance).is_file()
            for seed in range(self.config.seeds)
        )
        return [seed for seed, found in enumerate(done) if not found]

    def add(self, trial: dict[str, Any], draws: dict[str, np.ndarray]):
        """Keeps a finished trial, whose predictions are written, and the bootstrap's values of its metrics."""
        category, seed, content = trial["category"], trial["seed"], _json(trial)
        write_arrays(self.place(category, seed) / "resamples.npz", draws)
        write_whole(self.path / "trials" / category / f"seed{seed}.json", content)
        self.trials[category, seed] = json.loads(content)
        for instance in trial["instances"]:
            self.scored(category, seed, instance["name"]).unlink(missing_ok=True)
        for folder in (self.path / "scored" / category / f"seed{seed}", self.path / "scored" / category):
            with suppress(OSError):  # other seeds, or what is still being written
                folder.rmdir()

    def write_results(self, categories: list[str]):
        """Writes the result files of what is there for these classes and the seeds asked for."""
        wanted = [(category, seed) for category in categories for seed in range(self.config.seeds)]
        trials = [self.trials[key] for key in wanted if key in self.trials]
        config = json.loads(json.dumps(asdict(self.config)))
        for key in FREE:
            *groups, last = key.split(".")
            reduce(dict.__getitem__, groups, config).pop(last)
        setup = self.facts["setup"]
        results = {
            "benchmark": self.config.data.name,
            "setup": setup,
            "synthetic": self.facts["synthetic"],
            "head": _method(self.config),
            "config": config,
            "seeds": list(range(self.config.seeds)),
            "categories": categories,
            "metrics": list(dict.fromkeys(name for trial in trials for name in trial["metrics"])),
            "trials": trials,
            "mean": self.means(trials),
            "less_template": self.less_template(trials),
            "template": self._template(trials),
            "published": published_rows(self.config.data.name, setup),
            "complete": len(trials) == len(wanted),
        }
        results["verdict"] = self.verdict = verdict(results)
        write_whole(self.path / "results.json", _json(results))
        write_whole(self.path / "results.csv", _table(results).encode())
        write_whole(self.path / "results.md", _page(results).encode())

    def means(self, trials: list[dict]) -> dict[str, dict[str, float]]:
        """Mean over classes of the mean over seeds, with the interval of a bootstrap over instances and seeds.

        Classes without anomalous instances, which no metric is defined for, are left out.
        """
        means = {}
        defined = [trial for trial in trials if trial["metrics"]]
        by_class = _by_class(defined)
        for name in defined[0]["metrics"] if defined else []:
            if not all(name in trial["metrics"] for trial in defined):
                continue
            values = [np.mean([trial["metrics"][name] for trial in group]) for group in by_class]
            means[name] = {"value": float(np.mean(values))}
            if all(name in trial["intervals"] for trial in defined):
                means[name] |= self._interval(by_class, name)
        return means

    def less_template(self, trials: list[dict]) -> dict[str, dict[str, float]]:
        """What the means are above those of the template on the same resampled instances, with intervals."""
        means = {}
        defined = [trial for trial in trials if trial["metrics"]]
        by_class = _by_class(defined)
        for name in defined[0].get("less_template", {}) if defined else []:
            if all(name in trial.get("less_template", {}) for trial in defined):
                values = [np.mean([trial["less_template"][name]["value"] for trial in group]) for group in by_class]
                paired = self._interval(by_class, f"{name} less {TEMPLATE}")
                means[name] = {"value": float(np.mean(values))} | paired
        return means

    def _template(self, trials: list[dict]) -> str:
        """What the template compares, or why there is none."""
        if not self.config.metrics.template:
            return "metrics.template is off"
        if not any(TEMPLATE in trial["baselines"] for trial in trials):
            return "no class has one training instance of several calibrated views"
        features = "features of the images" if self.facts.get("image encoder") else "raw patches of the images"
        return f"{features}, the same cell of the same view of the training instance"

    def _interval(self, by_class: list[list[dict]], name: str) -> dict[str, float]:
        draws = np.mean([self._drawn(group, name) for group in by_class], 0)
        half = (1 - self.config.metrics.level) / 2
        return dict(zip(("low", "high"), np.quantile(draws, [half, 1 - half]).tolist(), strict=True))

    def _drawn(self, trials: list[dict], name: str) -> np.ndarray:
        """(resamples,) means over seeds that are drawn, too; the instances drawn are the same for all seeds."""
        rows = []
        for trial in trials:
            path = self.place(trial["category"], trial["seed"]) / "resamples.npz"
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    rows.append(arrays[name])
            except (OSError, ValueError, KeyError) as error:
                raise DataError(f"{path}: unreadable: {error}") from error
        values = np.stack(rows)  # (seeds, resamples)
        random = np.random.default_rng(zlib.crc32(trials[0]["category"].encode()))
        chosen = random.integers(len(values), size=values.shape)
        return np.take_along_axis(values, chosen, 0).mean(0)


def _by_class(trials: list[dict]) -> list[list[dict]]:
    groups: dict[str, list[dict]] = {}
    for trial in trials:
        groups.setdefault(trial["category"], []).append(trial)
    return list(groups.values())


def _method(config: Any) -> str:
    """The name of the head with what tells apart its variants in the tables of the papers and their controls."""
    head, around = config.head, config.prepare
    parts = [open_head(head.name).title(getattr(head, head.name))]
    if config.volume.aggregation != type(config.volume)().aggregation:
        parts.append(f"aggregation {config.volume.aggregation}")
    parts += ["registered"] if around.registration.method != "none" else []
    parts += ["standardised features"] if around.standardize else []
    parts += [f"smoothing {around.smoothing:g}"] if around.smoothing else []
    parts += ["one model of all classes"] if head.multiclass else []
    return ", ".join(parts)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


def _table(results: dict) -> str:
    """One figure in a row: category, seed, scorer, metric, value, low, high."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["category", "seed", "scorer", "metric", "value", "low", "high"])
    for trial in results["trials"]:
        place = [trial["category"], trial["seed"]]
        for metric, value in trial["metrics"].items():
            writer.writerow([*place, results["head"], metric, value, *trial["intervals"].get(metric, ["", ""])])
        for row, metrics in trial["baselines"].items():
            for metric, value in metrics.items():
                writer.writerow([*place, row, metric, value, "", ""])
    for metric, mean in results["mean"].items():
        bounds = [mean.get("low", ""), mean.get("high", "")]
        writer.writerow(["mean", "", results["head"], metric, mean["value"], *bounds])
    for row in results["published"]:
        scorer = f"{row['method']} ({_source(row['paper'], row['table'])})"
        writer.writerow([row["category"], "", scorer, row["metric"], row["value"], "", ""])
    return text.getvalue()


def _page(results: dict) -> str:
    metrics, trials = results["metrics"], results["trials"]
    head = results["head"]
    setup = f", {results['setup']}" if results["setup"] else ""
    lines = [f"# {head} on {results['benchmark']}{setup}", ""]
    if not results["complete"]:
        lines += [f"Not complete: {len(trials)} trials of {len(results['categories']) * len(results['seeds'])}.", ""]
    level = f"{100 * results['config']['metrics']['level']:g} %"
    single = alone(trials)
    lines += [
        *([f"**{results['verdict']}**", ""] if results["verdict"] else []),
        f"{len(results['seeds'])} seeds; {level} bootstrap intervals over instances, of the mean over seeds as well.",
        *_truths(trials),
        *([ALONE] if single else []),
        *([UNDEFINED.format(", ".join(good))] if (good := undefined(trials)) else []),
        "",
    ]
    if metrics:
        lines += _own(results, single)
    if good:
        lines += ["", "## Scores of good instances", ""]
        lines += _row(["category", "seed", "instances", *GOOD]) + _row(["---"] * (3 + len(GOOD)))
        for trial in trials:
            count = sum(instance["label"] == "good" for instance in trial["instances"])
            figures = [f"{trial['good_scores'][key]:.4g}" for key in GOOD]
            lines += _row([trial["category"], str(trial["seed"]), str(count), *figures])
    if metrics:
        lines += _beside(results)
    return "\n".join(lines + _published(results)) + "\n"


def _own(results: dict, single: set[str]) -> list[str]:
    """The table of trials and their mean."""
    metrics, trials = results["metrics"], results["trials"]
    lines = _row(["category", "seed", *metrics]) + _row(["---"] * (2 + len(metrics)))
    for trial in trials:
        bounds = [trial["intervals"].get(name) for name in metrics]
        figures = [_figure(trial["metrics"].get(name), bound) for name, bound in zip(metrics, bounds, strict=True)]
        if trial["category"] in single:
            figures = [figure + " *" * bool(bound) for figure, bound in zip(figures, bounds, strict=True)]
        lines += _row([trial["category"], str(trial["seed"]), *figures])
    means = [results["mean"].get(name, {}) for name in metrics]
    bounds = [(mean["low"], mean["high"]) if "low" in mean else None for mean in means]
    figures = [_figure(mean.get("value"), bound) for mean, bound in zip(means, bounds, strict=True)]
    figures = [figure + " *" * bool(bound and single) for figure, bound in zip(figures, bounds, strict=True)]
    lines += _row(["**mean**", "", *figures])
    return lines


def _beside(results: dict) -> list[str]:
    """The table of what stands beside the run."""
    metrics, trials = results["metrics"], results["trials"]
    lines = ["", "## Scorers that look at no anomaly, a template, and the ceiling", ""]
    lines += [f"Mean over classes and seeds. Template: {results['template']}.", ""]
    lines += _row(["scorer", *metrics]) + _row(["---"] * (1 + len(metrics)))
    for name in dict.fromkeys(row for trial in trials for row in trial["baselines"]):
        rows = [trial["baselines"].get(name, {}) for trial in trials]
        found = [[row[metric] for row in rows if metric in row] for metric in metrics]
        lines += _row([name, *(_figure(float(np.mean(values)) if values else None) for values in found)])
    if less := results["less_template"]:
        found = [less.get(metric, {}) for metric in metrics]
        figures = [_figure(one.get("value"), (one["low"], one["high"]) if one else None, "+") for one in found]
        lines += _row(["**this run less template**", *figures])
    return lines


def verdict(results: dict) -> str:
    """One sentence: the leading metric beside random scores, the template and the ceiling, and what it is not above."""
    if results["trials"] and not results["metrics"]:
        ends = [trial["good_scores"][key] for trial in results["trials"] for key in ("lowest", "highest")]
        return (
            "I-AUROC and AUPRO are not defined: all test instances are good. "
            f"Their scores lie between {min(ends):.4g} and {max(ends):.4g}."
        )
    metric = next(iter(results["metrics"]), None)
    if metric not in results["mean"]:
        return ""
    mean, beside = results["mean"][metric], {}
    defined = [trial for trial in results["trials"] if trial["metrics"]]
    for name in (RANDOM, TEMPLATE, PERFECT):
        found = [trial["baselines"].get(name, {}).get(metric) for trial in defined]
        if found and None not in found:
            beside[name] = float(np.mean(found))
    bound = (mean["low"], mean["high"]) if "low" in mean else None
    said = ", ".join(
        [f"{metric} {_figure(mean['value'], bound)}", *(f"{name} {_figure(v)}" for name, v in beside.items())]
    )
    if less := results["less_template"].get(metric):
        said += f"; less template {_figure(less['value'], (less['low'], less['high']), '+')}"
    if RANDOM in beside and mean.get("low", mean["value"]) <= beside[RANDOM]:
        return f"Not shown to be above random scores: {said}."
    if less and less["low"] <= 0:
        return f"Not shown to be above the template: {said}."
    return f"{said}."


def undefined(trials: list[dict]) -> list[str]:
    """Classes without anomalous instances, which no metric is defined for."""
    return list(dict.fromkeys(trial["category"] for trial in trials if not trial["metrics"]))


def alone(trials: list[dict]) -> set[str]:
    """Classes with a single good or a single anomalous instance, which a bootstrap over instances cannot vary."""
    found = set()
    for trial in trials:
        labels = [instance["label"] for instance in trial["instances"]]
        if min(labels.count(label) for label in ("good", "anomalous")) == 1:
            found.add(trial["category"])
    return found


def _truths(trials: list[dict]) -> list[str]:
    """The form that the ground truth of each class has: figures of different forms do not compare."""
    forms: dict[str, list[str]] = {}
    for category, form in {trial["category"]: trial.get("ground_truth") for trial in trials}.items():
        if form:  # results of before do not say
            forms.setdefault(form, []).append(category)
    if len(forms) < 2:
        return [f"Ground truth: {form}." for form in forms]
    groups = "; ".join(f"{form} ({', '.join(names)})" for form, names in forms.items())
    return [f"Ground truth: {groups}."]


def _published(results: dict) -> list[str]:
    """The published means of the metrics that were measured: a table for each scale, since those do not compare."""
    rows = [row for row in results["published"] if row["category"] == "mean" and row["metric"] in results["metrics"]]
    if not rows:
        return []
    note = "V-AUPRO depends on the extent of the grid: values on other grids do not compare."
    if results["synthetic"]:
        note = f"The data here are synthetic: these figures are of the real {results['benchmark']} and do not compare."
    lines = []
    for scale in dict.fromkeys(row.get("scale", "") for row in rows):
        lines += ["", "## Published means" + (f", {scale}" if scale else ""), "", note, ""]
        lines += _published_table(results, [row for row in rows if row.get("scale", "") == scale])
    return lines


def _published_table(results: dict, rows: list[dict]) -> list[str]:
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    table: dict[tuple, dict[str, float]] = {}
    for row in rows:
        table.setdefault((row["method"], row["paper"], row["table"]), {})[row["metric"]] = row["value"]
    lines = _row(["method", "from", *metrics]) + _row(["---"] * (2 + len(metrics)))
    for (method, paper, number), values in table.items():
        lines += _row([method, _source(paper, number), *(_figure(values.get(metric)) for metric in metrics)])
    ours = [results["mean"].get(metric, {}).get("value") for metric in metrics]
    return lines + _row([f"**{results['head']}**", "this run", *map(_figure, ours)])


def _source(paper: str, table: int | None) -> str:
    return paper if table is None else f"{paper}, table {table}"


def _figure(value: float | None, interval: tuple[float, float] | None = None, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.3f}" + (f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]" if interval else "")


def _row(columns: list[str]) -> list[str]:
    return ["| " + " | ".join(columns) + " |"]
