"""``dino-depth tables``: the rows of the papers' tables that this machine has weights for, beside the published ones.

    TABLES/tables.md        every table: our figure with its interval, the published one, and the difference
    TABLES/tables.json      the same, a figure each, with what it cost
    TABLES/runs/<setup>/<row>/      the evaluation of a row, see ``results.py``: same settings, same run
    TABLES/logs/<setup>/<row>.log   what it printed
    TABLES/features, heads          encoded views and fitted heads, which rows share

``configs/published.yaml`` has the figures and ``configs/tables.yaml`` what computes each row. A row is a process of
``dino-depth evaluate`` of its own: one that fails says why and keeps no other from running. The same command continues:
finished rows are read, others go on where they were. Weights are looked for on this machine only, unless ``online``.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dino_depth.anomaly.benchmarks import BenchmarkConfig, open_benchmark
from dino_depth.anomaly.config import EvaluateConfig, everywhere
from dino_depth.anomaly.evaluate import stopping
from dino_depth.anomaly.results import Run, published_rows, write_whole
from dino_depth.config import find_config, load_config, parse, suggestion
from dino_depth.errors import ConfigError, DataError, Interrupted, ReportedError
from dino_depth.settings import load_yaml
from dino_depth.terminal import say

__all__ = ["TablesConfig", "WeightsConfig", "tables"]

PAPERS = {"modmap": "ModMap", "sganet": "SGANet"}  # as their names begin in published.yaml
SETUPS = ("real2real", "synth2real")
NUMBERS = {"modmap": (1, 2, 3, 4, 6, 7, 8, 9, 10), "sganet": (2, 3, 7, 8, 9)}


@dataclass
class WeightsConfig:
    """Encoders by the names that ``dino-depth evaluate`` knows; empty: rows that need one say so.

    Attributes:
        dinov2: of images, and of depth as a grey picture.
        dinov3: the same of table 9.
        wrn101: WideResNet-101, PatchCore's and BTF's.
        efficientnet_b5: AST's.
        resnet34: MVAD's.
        fpfh: needs open3d.
        dino_depth: an export of ``dino-depth export``, the depth encoder of ModMap.
        point_mae: file of the authors' weights, ``pretrain.pth``.
        pdn: file with the weights of EfficientAD's teacher.
        penalty: folder of pictures of anything for EfficientAD; empty: without its penalty.
    """

    dinov2: str = "transformers:facebook/dinov2-base"
    dinov3: str = "transformers:facebook/dinov3-vitb16-pretrain-lvd1689m"
    wrn101: str = "timm:wide_resnet101_2.tv_in1k?layers=2-3"
    efficientnet_b5: str = "timm:tf_efficientnet_b5.aa_in1k?blocks=6"
    resnet34: str = "timm:resnet34?layers=1-2-3"
    fpfh: str = "fpfh"
    dino_depth: str = ""
    point_mae: str = ""
    pdn: str = ""
    penalty: str = ""


@dataclass
class TablesConfig:
    """Run the published rows that this machine has weights for; the same command again continues.

    Attributes:
        out: folder of the tables.
        data: where the benchmark's files are; the setup is the table's.
        tables: those to make, such as ``[modmap-1, sganet-9]``; all if empty.
        methods: rows to compute, by their names in ``configs/tables.yaml``; all if empty.
        categories: classes; all if empty, and those that a table has alone for that table.
        seeds: number of seeds of each row.
        device: ``auto``, ``cuda`` or ``cpu``.
        weights: the encoders.
        online: weights may come from the Hub.
        settings: further settings of ``dino-depth evaluate`` for every row, by dotted key.
        submit: options of ``dino-depth submit``, such as ``{tasks: 8, gpus_per_task: 1}``: rows that are not finished
            become job arrays, and the same command, later, writes the tables.
    """

    out: str = ""
    data: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    tables: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)
    seeds: int = 3
    device: str = "auto"
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    online: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    submit: dict[str, bool | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One row of one table.

    Attributes:
        table: such as ``modmap-1``.
        published: by metric and category.
        words: the arguments of its evaluation, without ``--out``; None where it cannot run.
        place: setup and name of the run, which rows of equal words share.
        reason: why it cannot run.
    """

    table: str
    paper: str
    setup: str
    method: str
    published: dict[str, dict[str, float]]
    words: tuple[str, ...] | None
    place: str
    reason: str = ""


def tables(config: TablesConfig) -> None:
    """Computes the rows that are missing and writes all tables after each.

    Raises:
        ConfigError: a name, a folder or a setting that cannot work.
        DataError: the benchmark is not there, or a shipped file is damaged.
        Interrupted: a signal came; what is finished is kept.
    """
    rows = chosen_rows(config)
    out = Path(config.out)
    todo = {row.place: row for row in rows if row.words is not None}
    reasons = {row.place: row.reason for row in rows if row.words is None}
    for number, (place, row) in enumerate(todo.items(), 1):
        if _finished(out, row):
            continue
        say(f"row {number} of {len(todo)}: {place}")
        if reason := _compute(config, out, row):
            reasons[place] = reason
            say(f"  {reason}")
        _write(config, rows, reasons)
    _write(config, rows, reasons)
    say(f"{out / 'tables.md'}: {sum(_finished(out, row) for row in rows)} of {len(rows)} rows")


def chosen_rows(config: TablesConfig) -> list[Row]:
    """The rows of the tables asked for, whether they can run or not; reads names of files only.

    Raises:
        ConfigError, DataError: as ``tables``.
    """
    if not config.out:
        raise ConfigError("--out is missing: name the folder of the tables")
    if config.data.name != "sim3d":
        raise ConfigError(f"data.name {config.data.name}: the tables are of sim3d")
    if config.seeds < 1:
        raise ConfigError(f"seeds: must be at least 1, got {config.seeds}")
    known = [f"{paper}-{number}" for paper, numbers in NUMBERS.items() for number in numbers]
    recipes = _recipes()
    for key, given, names in (("tables", config.tables, known), ("methods", config.methods, list(recipes))):
        for name in given:
            if name not in names:
                raise ConfigError(f"{key}: unknown {name!r}{suggestion(name, names)}")
    categories = open_benchmark(config.data).categories
    rows, places = [], {}
    for setup in SETUPS:
        for (table, paper, method), published in _published(setup).items():
            words, reason = (None, "it is not in configs/tables.yaml")
            alone = {name for figures in published.values() for name in figures}
            if method in recipes:
                words, reason = _words(config, recipes[method], setup, alone, categories)
            # Rows of other tables have their place, too, so that it does not depend on what was asked for.
            name = re.sub(r"[^a-z0-9]+", "_", f"{table} {method}".lower().replace("+", "and")).strip("_")
            place = places.setdefault((setup, words or method), f"{setup}/{name}")
            if (config.tables and table not in config.tables) or (config.methods and method not in config.methods):
                continue
            rows.append(Row(table, paper, setup, method, published, words, place, reason))
    return rows


def _recipes() -> dict[str, dict[str, Any]]:
    path = find_config("tables")
    try:
        recipes = load_yaml(path.read_text(encoding="utf-8"))
        return {str(name): {"config": recipe["config"], **recipe} for name, recipe in recipes.items()}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}") from error


def _published(setup: str) -> dict[tuple[str, str, str], dict[str, dict[str, float]]]:
    """{(table, paper, method): {metric: {category: value}}} of both papers, in their order."""
    found: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for row in published_rows("sim3d", setup):
        for paper, begins in PAPERS.items():
            if row["paper"].startswith(begins) and row["table"] in NUMBERS[paper]:
                key = f"{paper}-{row['table']}", row["paper"], row["method"]
                found.setdefault(key, {}).setdefault(row["metric"], {})[row["category"]] = row["value"]
    return found


def _words(
    config: TablesConfig, recipe: dict[str, Any], setup: str, alone: set[str], categories: Sequence[str]
) -> tuple[tuple[str, ...] | None, str]:
    """The arguments of a row's evaluation, or None and why there are none."""
    try:
        find_config(recipe["config"])
    except ConfigError:
        return None, f"this version has no configuration {recipe['config']}"
    data, wanted = config.data, config.categories
    words = ["--config", recipe["config"], "--data.root", data.root, "--data.sim3d.setup", setup]
    for modality in ("image", "depth"):
        if modality not in recipe:
            continue
        name = recipe[modality]
        spec = getattr(config.weights, name) if name else ""
        if name and not spec:
            return None, f"no weights of {name}: name them by --weights.{name}"
        if name == "point_mae" and not spec.startswith(("point-mae:", "random:")):
            spec = f"point-mae:{spec}"
        words += [f"--encoder.{modality}", spec]
    if recipe.get("pdn"):
        if not config.weights.pdn:
            return None, "no weights of the teacher: name them by --weights.pdn"
        words += ["--head.efficientad.teacher", config.weights.pdn]
        words += ["--head.efficientad.penalty", config.weights.penalty] if config.weights.penalty else []
    if "mean" not in alone:  # a table of single classes
        missing = sorted(alone - set(categories))
        if missing:
            return None, f"the data have no class {', '.join(missing)}"
        wanted = sorted(alone)
    words += ["--categories", json.dumps(wanted)] if wanted else []
    for key, value in {**recipe.get("set", {}), **config.settings}.items():
        words += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    return (*words, "--seeds", str(config.seeds), "--device", config.device), ""


def _run_folder(out: Path, row: Row) -> Path:
    return out / "runs" / row.place


def _arguments(out: Path, row: Row) -> list[str]:
    caches = ["--encoder.cache", str(out / "features"), "--head.cache", str(out / "heads")]
    return [*row.words, "--out", str(_run_folder(out, row)), *caches]


def _finished(out: Path, row: Row) -> bool:
    """Whether the row's results are there, complete, and of these settings."""
    folder = _run_folder(out, row)
    if row.words is None or not (folder / "results.json").is_file():
        return False
    try:
        if not json.loads((folder / "results.json").read_bytes())["complete"]:
            return False
        before = load_config(EvaluateConfig, folder / "config.yaml")
        wanted = parse(EvaluateConfig, _arguments(out, row), "dino-depth tables")
    except (OSError, ValueError, KeyError, ReportedError):
        return False
    old, new = (json.dumps(asdict(everywhere(one))) for one in (before, wanted))
    return old == new


def _compute(config: TablesConfig, out: Path, row: Row) -> str:
    """Runs or submits a row; why there is no result, or nothing."""
    log = out / "logs" / f"{row.place}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = ["evaluate", *_arguments(out, row)]
    if config.submit:
        options = [part for key, value in config.submit.items() for part in (f"--{key}", str(value).lower())]
        command = ["submit", *options, *command]
    environment = os.environ if config.online else os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with open(log, "wb") as file, stopping():
        process = subprocess.Popen(
            [sys.executable, "-m", "dino_depth.cli", *command], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [f"it ended with code {code}"]
    if code == Interrupted.exit_code:
        raise Interrupted(f"{row.place} was interrupted; run the same command again to continue")
    if code:
        return f"cannot run: {said[-1].removeprefix('dino-depth: ')[:400]}"
    if _finished(out, row):
        return ""
    queue = next((line.split(maxsplit=1)[1] for line in said if line.startswith("queue ")), said[-1])
    return f"submitted, and the same command writes the row when its jobs have ended: {queue[:200]}"


def _figures(out: Path, row: Row) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, float]]:
    """{metric: {category: {value, low, high}}} of a finished row, and what an instance and the run cost."""
    folder = _run_folder(out, row)
    run = Run(load_config(EvaluateConfig, folder / "config.yaml"))
    results = json.loads((folder / "results.json").read_bytes())
    trials = results["trials"]
    groups = {name: [trial for trial in trials if trial["category"] == name] for name in results["categories"]}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for category, group in [*groups.items(), ("mean", trials)]:
        for metric, figure in run.means(group).items():
            found.setdefault(metric, {})[category] = figure
    costs = [trial["cost"] for trial in trials]
    instances = sum(len(trial["instances"]) for trial in trials)
    scoring = sum(cost["seconds"].get(stage, 0) for cost in costs for stage in ("score", "volume"))
    return found, {
        "fit_seconds": sum(cost["seconds"].get("fit", 0) for cost in costs) / len(costs),
        "instance_seconds": scoring / instances,
        "peak_memory_gib": max(cost["peak_memory_gib"] for cost in costs),
    }


def _write(config: TablesConfig, rows: Sequence[Row], reasons: dict[str, str]):
    """Both files, of what is there."""
    out = Path(config.out)
    done = {row.place: _figures(out, row) for row in {row.place: row for row in rows}.values() if _finished(out, row)}
    content = []
    for row in rows:
        figures, cost = done.get(row.place, ({}, {}))
        facts = {"table": row.table, "paper": row.paper, "setup": row.setup, "method": row.method, "run": row.place}
        for metric, published in row.published.items():
            # Classes of ours are told where the table has classes at all.
            others = [other.published[metric] for other in rows if (other.table, other.setup) == (row.table, row.setup)]
            own = figures.get(metric, {}) if max(map(len, others)) > 1 else {}
            names = list(dict.fromkeys([*published, *own]))
            for name in names:
                ours = figures.get(metric, {}).get(name, {})
                line = facts | {"metric": metric, "category": name, "published": published.get(name)} | ours
                if ours and name in published:
                    line["difference"] = ours["value"] - published[name]
                content.append(line | cost | ({} if row.place in done else {"reason": reasons.get(row.place, "waits")}))
    write_whole(out / "tables.json", json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
    synthetic = (Path(config.data.root) / "SYNTHETIC.json").is_file()
    write_whole(out / "tables.md", _page(content, synthetic, config.seeds).encode())


def _page(content: list[dict[str, Any]], synthetic: bool, seeds: int) -> str:
    lines = ["# The published tables, recomputed", ""]
    lines += [f"Ours of {seeds} seeds [interval over instances and seeds] / published (difference).", ""]
    if synthetic:
        lines += ["**The data are synthetic: published figures are of the real SiM3D and do not compare.**", ""]
    for table in dict.fromkeys((line["table"], line["paper"], line["setup"]) for line in content):
        part = [line for line in content if (line["table"], line["paper"], line["setup"]) == table]
        lines += [f"## {table[1]}, table {table[0].partition('-')[2]}, {table[2]}", ""]
        for metric in dict.fromkeys(line["metric"] for line in part):
            cells = {(line["method"], line["category"]): line for line in part if line["metric"] == metric}
            categories = list(dict.fromkeys(category for _, category in cells))
            categories.sort(key=lambda name: name == "mean")  # the mean comes last
            lines += [f"| {metric} | " + " | ".join(categories) + " | s / instance | GiB |"]
            lines += ["|---" * (len(categories) + 3) + "|"]
            for method in dict.fromkeys(method for method, _ in cells):
                row = [cells.get((method, category), {}) for category in categories]
                cost = next((line for line in row if "instance_seconds" in line), {})
                costs = [f"{cost[key]:.2f}" if key in cost else "–" for key in ("instance_seconds", "peak_memory_gib")]
                lines += [f"| {method} | " + " | ".join([*map(_cell, row), *costs]) + " |"]
            lines.append("")
        reasons = {line["method"]: line["reason"] for line in part if "reason" in line}
        lines += [f"- {method}: {reason}" for method, reason in reasons.items()] + [""] * bool(reasons)
    return "\n".join(lines)


def _cell(line: dict[str, Any]) -> str:
    """Ours with its interval, the published figure and the difference."""
    published = line.get("published")
    told = "–" if published is None else f"{published:.3f}"
    if "value" not in line:
        return f"– / {told}"
    bounds = f" [{line['low']:.3f}, {line['high']:.3f}]" if "low" in line else ""
    difference = f" ({line['difference']:+.3f})" if "difference" in line else ""
    return f"{line['value']:.3f}{bounds} / {told}{difference}"
