"""Tables of the report: this run, the trivial baselines and what is published, class by class."""

from collections.abc import Iterable, Sequence

from dino_depth.anomaly.results import GOOD, undefined

__all__ = ["tables"]

CHECKS = {  # what benchmarks measure of their own settings, in words
    "overlap_train": "training views apart",
    "overlap_test": "test views apart",
    "truth_off_surface": "ground truth off the surface",
}
CONTROLS = {  # the others are trivial
    "perfect scorer": "ceiling",
    "leak statistic": "this run, away from defects",
    "template": "the same cell of the training instance",
}


def tables(results: dict, others: dict[str, dict]) -> dict:
    """Everything the page shows in tables.

    Args:
        results: as ``evaluate`` writes them.
        others: results of runs to compare with, by name.

    Returns:
        ``metrics``, of each its rows and, by scale, published rows: a title, where it is from, and for the classes and
        the mean (value, interval) as text, either may be empty; ``seeds``, every trial; ``good``, the scores of good
        instances, where a class has no others; ``checks`` of each class; ``cost``; ``unplaced``, the number of
        published figures that have no place here.
    """
    categories, metrics = results["categories"], results["metrics"]
    placed = 0
    found = []
    for metric in metrics:
        rows = [{"title": f"{results['head']} (this run)", "kind": "own", "source": "", "cells": _own(results, metric)}]
        for name, other in others.items():
            cells = _own(other, metric, categories)
            rows.append({"title": other["head"], "kind": "other", "source": name, "cells": cells})
        rows += _baselines(results, metric) + _less_template(results, metric)
        published = _published(results, metric)
        placed += sum(row.pop("rows") for group in published for row in group["rows"])
        found.append(
            {"name": metric, "rows": rows, "published": published, "open": metric == "I-AUROC" or "AUPRO" in metric}
        )
    trials = sorted(results["trials"], key=lambda trial: (categories.index(trial["category"]), trial["seed"]))
    seeds = [
        (trial["category"], trial["seed"], [_with(trial["metrics"].get(m), trial["intervals"].get(m)) for m in metrics])
        for trial in trials
    ]
    return {
        "metrics": found,
        "seeds": seeds,
        "good": _good(trials) if undefined(trials) else [],
        "checks": _checks(trials),
        "cost": _cost(trials),
        "unplaced": len(results["published"]) - placed,
    }


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _with(value: float | None, ends: Sequence[float] | None) -> tuple[str, str]:
    return _text(value), f"{ends[0]:.3f} to {ends[1]:.3f}" if ends else ""


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _own(results: dict, metric: str, categories: list[str] | None = None) -> list[tuple[str, str]]:
    """A run's values: of each class the mean over seeds, of the interval's ends as well; then its own mean."""
    row = []
    for category in categories or results["categories"]:
        trials = [trial for trial in results["trials"] if trial["category"] == category]
        ends = [trial["intervals"][metric] for trial in trials if metric in trial["intervals"]]
        interval = [_mean(side) for side in zip(*ends, strict=True)]
        row.append(_with(_mean(trial["metrics"].get(metric) for trial in trials), interval))
    mean = results["mean"].get(metric, {})
    return [*row, _with(mean.get("value"), [mean["low"], mean["high"]] if "low" in mean else None)]


def _baselines(results: dict, metric: str) -> list[dict]:
    rows = []
    for name in dict.fromkeys(name for trial in results["trials"] for name in trial["baselines"]):
        by_class = [
            _mean(
                trial["baselines"].get(name, {}).get(metric)
                for trial in results["trials"]
                if trial["category"] == category
            )
            for category in results["categories"]
        ]
        if any(value is not None for value in by_class):
            cells = [(_text(value), "") for value in [*by_class, _mean(by_class)]]
            rows.append({"title": name, "kind": "trivial", "source": CONTROLS.get(name, "trivial"), "cells": cells})
    return rows


def _less_template(results: dict, metric: str) -> list[dict]:
    """What this run is above the template, paired; nothing in runs without."""
    mean = results.get("less_template", {}).get(metric)
    if mean is None:
        return []
    cells = []
    for category in results["categories"]:
        found = [
            trial.get("less_template", {}).get(metric) for trial in results["trials"] if trial["category"] == category
        ]
        found = [one for one in found if one]
        cells.append(_signed({key: _mean(one[key] for one in found) for key in ("value", "low", "high")}))
    cells.append(_signed(mean))
    return [{"title": "this run less template", "kind": "trivial", "source": "paired", "cells": cells}]


def _signed(one: dict[str, float | None]) -> tuple[str, str]:
    if one["value"] is None:
        return "", ""
    return f"{one['value']:+.3f}", f"{one['low']:+.3f} to {one['high']:+.3f}"


def _good(trials: list[dict]) -> list[tuple]:
    return [
        (trial["category"], trial["seed"], [f"{trial['good_scores'][key]:.4g}" for key in GOOD]) for trial in trials
    ]


def _published(results: dict, metric: str) -> list[dict]:
    """Published rows by scale, which do not compare; of classes that this run does not have only the mean is shown."""
    columns = {name: place for place, name in enumerate([*results["categories"], "mean"])}
    scales: dict[str, dict[tuple, dict]] = {}
    for row in results["published"]:
        place = columns.get(row["category"])
        if row["metric"] != metric or place is None:
            continue
        key = (row["paper"], str(row["table"]), row["method"])
        empty = {"title": row["method"], "kind": "published", "cells": [("", "")] * len(columns), "rows": 0}
        table = "" if row["table"] is None else f", table {row['table']}"
        groups = scales.setdefault(row.get("scale", ""), {})
        group = groups.setdefault(key, empty | {"source": row["paper"] + table})
        group["cells"] = [*group["cells"][:place], (_text(row["value"]), ""), *group["cells"][place + 1 :]]
        group["rows"] += 1
    return [{"scale": scale, "rows": list(groups.values())} for scale, groups in scales.items()]


def _checks(trials: list[dict]) -> dict:
    """Of each class, whatever the seed; no row where a benchmark checks nothing."""
    found = {trial["category"]: trial["checks"] for trial in trials}
    names = list(dict.fromkeys(name for checks in found.values() for name in checks))
    rows = [(category, [_text(checks.get(name)) for name in names]) for category, checks in found.items() if checks]
    return {"titles": [CHECKS.get(name, name) for name in names], "rows": rows}


def _cost(trials: list[dict]) -> dict:
    stages = list(dict.fromkeys(stage for trial in trials for stage in trial["cost"]["seconds"]))
    rows = []
    for trial in trials:
        cost = trial["cost"]
        memory = f"{cost['peak_memory_gib']:.2f} GiB"
        if "peak_gpu_memory_gib" in cost:
            memory += f", GPU {cost['peak_gpu_memory_gib']:.2f} GiB"
        seconds = [cost["seconds"].get(stage) for stage in stages]
        rows.append((trial["category"], trial["seed"], cost["encodes"], cost["fits"], seconds, memory))
    return {"stages": stages, "rows": rows}
