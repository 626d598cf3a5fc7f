"""The folder of an evaluation: what is done so far, and its results as JSON, CSV and Markdown.

    config.yaml     the settings; a run is continued with the same ones only
    run.json        what the encoders and the benchmark were
    results.json    all cells, means and published rows; like results.csv and .md, written anew after every cell
    cells/<category>/seed<k>.json       a finished cell, a class with a seed: it is not computed again
    predictions/<category>/seed<k>/<instance>.npz and .ply, and resamples.npz with the bootstrap's values
    figures/<category>/<instance>.npz   pictures for the report
    heads/                              fitted heads, unless they are elsewhere; see fitted.py

Every file is whole or absent. Apart from ``cost``, results depend on settings, weights and data only. Processes that
compute different cells may share a folder; the tables are written by one that has it for itself.
"""

import csv
import fcntl
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dino_depth.anomaly.config import everywhere
from dino_depth.anomaly.feature_cache import NO_LOCKS
from dino_depth.config import config_keys, find_config, load_config, save_config
from dino_depth.errors import ConfigError, DataError

__all__ = ["Run", "published_rows", "write_arrays", "write_ply", "write_whole"]

# Settings that do not change what a cell holds, so they may differ when a run is continued.
FREE = {"out", "seeds", "categories", "encoder.cache", "encoder.cache_gib", "encoder.batch", "head.cache"}
# Settings of ModMap that the name of its results tells where they are not the default.
TOLD = ("sources", "aggregate", "modality", "view_shift", "ensemble")
PLY = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("scalar_score", "<f4")])


def write_whole(path: Path, content: bytes):
    """Writes a file that exists either whole or not at all; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.tmp")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]):
    """Writes an npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
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
    """The published figures of a benchmark, one of paper, table, method, setup, category, metric and value each.

    Raises:
        DataError: the shipped file is damaged.
    """
    path = find_config("published")
    rows = []
    try:
        for table in yaml.safe_load(path.read_text(encoding="utf-8")):
            if table["benchmark"] != benchmark or table.get("setup", "") != setup:
                continue
            shared = {key: table[key] for key in ("paper", "table")}
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
        cells: finished ones by (category, seed).

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
        self.facts = facts
        self.cells = self._read_cells()

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

    def _read_cells(self) -> dict[tuple[str, int], dict]:
        cells = {}
        for path in (self.path / "cells").glob("*/seed*.json"):
            try:
                cell = json.loads(path.read_bytes())
                cells[cell["category"], cell["seed"]] = cell
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{path}: no cell: {error}") from error
        return cells

    @contextmanager
    def held(self, shared: bool = False) -> Iterator[None]:
        """Keeps other processes from writing here; ``shared`` with those that compute other cells.

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
            yield

    def place(self, category: str, seed: int) -> Path:
        """Where the predictions of a cell go."""
        return self.path / "predictions" / category / f"seed{seed}"

    def add(self, cell: dict[str, Any], draws: dict[str, np.ndarray]):
        """Keeps a finished cell, whose predictions are written, and the bootstrap's values of its metrics."""
        category, seed, content = cell["category"], cell["seed"], _json(cell)
        write_arrays(self.place(category, seed) / "resamples.npz", draws)
        write_whole(self.path / "cells" / category / f"seed{seed}.json", content)
        self.cells[category, seed] = json.loads(content)

    def write_results(self, categories: list[str]):
        """Writes the result files of what is there for these classes and the seeds asked for."""
        wanted = [(category, seed) for category in categories for seed in range(self.config.seeds)]
        cells = [self.cells[key] for key in wanted if key in self.cells]
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
            "metrics": list(cells[0]["metrics"]) if cells else [],
            "cells": cells,
            "mean": self._means(cells),
            "published": published_rows(self.config.data.name, setup),
            "complete": len(cells) == len(wanted),
        }
        write_whole(self.path / "results.json", _json(results))
        write_whole(self.path / "results.csv", _table(results).encode())
        write_whole(self.path / "results.md", _page(results).encode())

    def _means(self, cells: list[dict]) -> dict[str, dict[str, float]]:
        """Mean over classes of the mean over seeds, with the interval of a bootstrap over instances and seeds."""
        by_class: dict[str, list[dict]] = {}
        for cell in cells:
            by_class.setdefault(cell["category"], []).append(cell)
        means = {}
        for name in cells[0]["metrics"] if cells else []:
            if not all(name in cell["metrics"] for cell in cells):
                continue
            values = [np.mean([cell["metrics"][name] for cell in group]) for group in by_class.values()]
            means[name] = {"value": float(np.mean(values))}
            if all(name in cell["intervals"] for cell in cells):
                draws = np.mean([self._drawn(group, name) for group in by_class.values()], 0)
                half = (1 - self.config.metrics.level) / 2
                low, high = np.quantile(draws, [half, 1 - half])
                means[name] |= {"low": float(low), "high": float(high)}
        return means

    def _drawn(self, cells: list[dict], name: str) -> np.ndarray:
        """(resamples,) means over seeds that are drawn, too; the instances drawn are the same for all seeds."""
        rows = []
        for cell in cells:
            path = self.place(cell["category"], cell["seed"]) / "resamples.npz"
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    rows.append(arrays[name])
            except (OSError, ValueError, KeyError) as error:
                raise DataError(f"{path}: unreadable: {error}") from error
        values = np.stack(rows)  # (seeds, resamples)
        random = np.random.default_rng(zlib.crc32(cells[0]["category"].encode()))
        chosen = random.integers(len(values), size=values.shape)
        return np.take_along_axis(values, chosen, 0).mean(0)


def _method(config: Any) -> str:
    """The name of the head with what tells apart its variants in the tables of the papers and their controls."""
    head, volume = config.head, config.volume
    variant = [head.patchcore.modality]
    if head.name == "modmap":
        variant = [f"conditioning {head.modmap.conditioning}"]
        plain = type(head.modmap)()
        variant += [
            f"{key} {getattr(head.modmap, key)}" for key in TOLD if getattr(head.modmap, key) != getattr(plain, key)
        ]
        variant += [f"aggregation {volume.aggregation}"] if volume.aggregation != type(volume)().aggregation else []
    return ", ".join([head.name, *variant, *(["one model of all classes"] if head.multiclass else [])])


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"


def _table(results: dict) -> str:
    """One figure in a row: category, seed, scorer, metric, value, low, high."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["category", "seed", "scorer", "metric", "value", "low", "high"])
    for cell in results["cells"]:
        place = [cell["category"], cell["seed"]]
        for metric, value in cell["metrics"].items():
            writer.writerow([*place, results["head"], metric, value, *cell["intervals"].get(metric, ["", ""])])
        for row, metrics in cell["baselines"].items():
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
    metrics, cells = results["metrics"], results["cells"]
    head = results["head"]
    setup = f", {results['setup']}" if results["setup"] else ""
    lines = [f"# {head} on {results['benchmark']}{setup}", ""]
    if not results["complete"]:
        lines += [f"Not complete: {len(cells)} cells of {len(results['categories']) * len(results['seeds'])}.", ""]
    level = f"{100 * results['config']['metrics']['level']:g} %"
    lines += [
        f"{len(results['seeds'])} seeds; {level} bootstrap intervals over instances, of the mean over seeds as well.",
        "",
    ]
    lines += _row(["category", "seed", *metrics]) + _row(["---"] * (2 + len(metrics)))
    for cell in cells:
        figures = [_figure(cell["metrics"].get(name), cell["intervals"].get(name)) for name in metrics]
        lines += _row([cell["category"], str(cell["seed"]), *figures])
    means = [results["mean"].get(name, {}) for name in metrics]
    bounds = [(mean["low"], mean["high"]) if "low" in mean else None for mean in means]
    figures = [_figure(mean.get("value"), bound) for mean, bound in zip(means, bounds, strict=True)]
    lines += _row(["**mean**", "", *figures])
    lines += ["", "## Scorers that look at no anomaly, and the ceiling", "", "Mean over classes and seeds.", ""]
    lines += _row(["scorer", *metrics]) + _row(["---"] * (1 + len(metrics)))
    for name in dict.fromkeys(row for cell in cells for row in cell["baselines"]):
        rows = [cell["baselines"].get(name, {}) for cell in cells]
        found = [[row[metric] for row in rows if metric in row] for metric in metrics]
        lines += _row([name, *(_figure(float(np.mean(values)) if values else None) for values in found)])
    return "\n".join(lines + _published(results)) + "\n"


def _published(results: dict) -> list[str]:
    """The published means of the metrics that were measured."""
    rows = [row for row in results["published"] if row["category"] == "mean" and row["metric"] in results["metrics"]]
    if not rows:
        return []
    note = "V-AUPRO depends on the extent of the grid: values on other grids do not compare."
    if results["synthetic"]:
        note = f"The data here are synthetic: these figures are of the real {results['benchmark']} and do not compare."
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    table: dict[tuple, dict[str, float]] = {}
    for row in rows:
        table.setdefault((row["method"], row["paper"], row["table"]), {})[row["metric"]] = row["value"]
    lines = ["", "## Published means", "", note, ""]
    lines += _row(["method", "from", *metrics]) + _row(["---"] * (2 + len(metrics)))
    for (method, paper, number), values in table.items():
        lines += _row([method, _source(paper, number), *(_figure(values.get(metric)) for metric in metrics)])
    ours = [results["mean"].get(metric, {}).get("value") for metric in metrics]
    return lines + _row([f"**{results['head']}**", "this run", *map(_figure, ours)])


def _source(paper: str, table: int | None) -> str:
    return paper if table is None else f"{paper}, table {table}"


def _figure(value: float | None, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")


def _row(cells: list[str]) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]
