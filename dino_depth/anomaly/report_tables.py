"""Tables of the report: this run, the trivial baselines and what is published, class by class."""

from collections.abc import Iterable, Sequence

__all__ = ["tables"]

CHECKS = {  # what benchmarks measure of their own settings, in words
    "overlap_train": "training views apart",
    "overlap_test": "test views apart",
    "truth_off_surface": "ground truth off the surface",
}
CONTROLS = {"perfect scorer": "ceiling", "leak statistic": "this run, away from defects"}  # the others are trivial


def tables(results: dict, others: dict[str, dict]) -> dict:
    """Everything the page shows in tables.

    Args:
        results: as ``evaluate`` writes them.
        others: results of runs to compare with, by name.

    Returns:
        ``metrics``, of each its rows and published rows: a title, where it is from, and for the classes and the mean
        (value, interval) as text, either may be empty; ``seeds``, every cell; ``checks`` of each class; ``cost``;
        ``unplaced``, the number of published figures that have no place here.
    """
    categories, metrics = results["categories"], results["metrics"]
    placed = 0
    found = []
    for metric in metrics:
        rows = [{"title": f"{results['head']} (this run)", "kind": "own", "source": "", "cells": _own(results, metric)}]
        for name, other in others.items():
            cells = _own(other, metric, categories)
            rows.append({"title": other["head"], "kind": "other", "source": name, "cells": cells})
        rows += _baselines(results, metric)
        published = _published(results, metric)
        placed += sum(row.pop("rows") for row in published)
        found.append(
            {"name": metric, "rows": rows, "published": published, "open": metric == "I-AUROC" or "AUPRO" in metric}
        )
    cells = sorted(results["cells"], key=lambda cell: (categories.index(cell["category"]), cell["seed"]))
    seeds = [
        (cell["category"], cell["seed"], [_with(cell["metrics"].get(m), cell["intervals"].get(m)) for m in metrics])
        for cell in cells
    ]
    return {
        "metrics": found,
        "seeds": seeds,
        "checks": _checks(cells),
        "cost": _cost(cells),
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
        cells = [cell for cell in results["cells"] if cell["category"] == category]
        ends = [cell["intervals"][metric] for cell in cells if metric in cell["intervals"]]
        interval = [_mean(side) for side in zip(*ends, strict=True)]
        row.append(_with(_mean(cell["metrics"].get(metric) for cell in cells), interval))
    mean = results["mean"].get(metric, {})
    return [*row, _with(mean.get("value"), [mean["low"], mean["high"]] if "low" in mean else None)]


def _baselines(results: dict, metric: str) -> list[dict]:
    rows = []
    for name in dict.fromkeys(name for cell in results["cells"] for name in cell["baselines"]):
        by_class = [
            _mean(
                cell["baselines"].get(name, {}).get(metric) for cell in results["cells"] if cell["category"] == category
            )
            for category in results["categories"]
        ]
        if any(value is not None for value in by_class):
            cells = [(_text(value), "") for value in [*by_class, _mean(by_class)]]
            rows.append({"title": name, "kind": "trivial", "source": CONTROLS.get(name, "trivial"), "cells": cells})
    return rows


def _published(results: dict, metric: str) -> list[dict]:
    """Published rows; of classes that this run does not have only the mean is shown."""
    columns = {name: place for place, name in enumerate([*results["categories"], "mean"])}
    groups: dict[tuple, dict] = {}
    for row in results["published"]:
        place = columns.get(row["category"])
        if row["metric"] != metric or place is None:
            continue
        key = (row["paper"], str(row["table"]), row["method"])
        empty = {"title": row["method"], "kind": "published", "cells": [("", "")] * len(columns), "rows": 0}
        table = "" if row["table"] is None else f", table {row['table']}"
        group = groups.setdefault(key, empty | {"source": row["paper"] + table})
        group["cells"] = [*group["cells"][:place], (_text(row["value"]), ""), *group["cells"][place + 1 :]]
        group["rows"] += 1
    return list(groups.values())


def _checks(cells: list[dict]) -> dict:
    """Of each class, whatever the seed; no row where a benchmark checks nothing."""
    found = {cell["category"]: cell["checks"] for cell in cells}
    names = list(dict.fromkeys(name for checks in found.values() for name in checks))
    rows = [(category, [_text(checks.get(name)) for name in names]) for category, checks in found.items() if checks]
    return {"titles": [CHECKS.get(name, name) for name in names], "rows": rows}


def _cost(cells: list[dict]) -> dict:
    stages = list(dict.fromkeys(stage for cell in cells for stage in cell["cost"]["seconds"]))
    rows = []
    for cell in cells:
        cost = cell["cost"]
        memory = f"{cost['peak_memory_gib']:.2f} GiB"
        if "peak_gpu_memory_gib" in cost:
            memory += f", GPU {cost['peak_gpu_memory_gib']:.2f} GiB"
        seconds = [cost["seconds"].get(stage) for stage in stages]
        rows.append((cell["category"], cell["seed"], cost["encodes"], cost["fits"], seconds, memory))
    return {"stages": stages, "rows": rows}
