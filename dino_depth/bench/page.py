"""One HTML page about a bench, readable offline: every figure with its interval as a plot, differences and losses."""

from pathlib import Path

import jinja2

from dino_depth.bench.speed import SIZES
from dino_depth.bench.table import text_of
from dino_depth.picture import write_page

__all__ = ["write_page_of"]

PLOT = 300  # width of a plot, in its own units


def write_page_of(result: dict, path: Path):
    """Writes the page of a result of :func:`dino_depth.bench.run.bench`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dino_depth.bench", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html.jinja").render(
        result=result,
        sources=[_source(result, source) for source in result["sources"]],
        sizes=SIZES,
        width=PLOT,
        absent=[one for one in result["encoders"] if one["note"]],
        variants=sorted({row.rpartition(", ")[2] for source in result["sources"] for row in source["rows"]}),
    )
    write_page(path, page)


def _source(result: dict, source: dict) -> dict:
    keys = [key for key in result["figures"] if any(source["estimates"][row].get(key) for row in source["rows"])]
    first = source["rows"][0]
    against = {entry["against"]: entry for entry in source["differences"] if entry["row"] == first}
    names = list(source["losses"][first])
    return {
        **source,
        "figures": [result["figures"][key] for key in keys],
        "charts": [_chart(result, source, key) for key in keys],
        "differences": [
            {"row": row, "cells": [_cell(result, key, against[row][key], True) for key in keys]}
            for row in source["rows"][1:]
        ],
        "losses": [
            {"row": row, "name": name, "cells": [_cell(result, key, source["losses"][row][name][key]) for key in keys]}
            for row in source["rows"] for name in names
        ],
    }  # fmt: skip


def _cell(result: dict, key: str, entry: dict | None, signed: bool = False) -> dict:
    """The text of a difference or loss; ``good`` or ``bad`` where its interval excludes 0."""
    figure = result["figures"][key]
    value, interval = text_of(entry, figure["digits"], signed)
    mark = ""
    if entry is not None and (entry["low"] > 0 or entry["high"] < 0):
        # A difference is good where it points the better way; a loss is good where it is negative.
        upward = entry["low"] > 0
        mark = "good" if upward == (signed and figure["better"] == "higher") else "bad"
    return {"value": value, "interval": interval, "mark": mark}


def _chart(result: dict, source: dict, key: str) -> dict:
    """Rows of a plot: place of the value and of both ends of its interval, 0..PLOT."""
    figure = result["figures"][key]
    role = {one["label"]: one["role"] for one in result["encoders"]}
    found = {row: source["estimates"][row][key] for row in source["rows"]}
    values = [entry[end] for entry in found.values() if entry for end in ("low", "high")]
    low, high = min(values), max(values)
    if figure["unit"] == "" and low >= 0:
        low = 0.0
    span = (high - low) or 1.0
    best = (max if figure["better"] == "higher" else min)(entry["value"] for entry in found.values() if entry)

    def place(value: float) -> float:
        return round(PLOT * (value - low) / span, 1)

    rows = []
    for row, entry in found.items():
        label, _, variant = row.rpartition(", ")
        line = {"label": label, "variant": variant, "role": role[label], "entry": entry}
        if entry:
            value, interval = text_of(entry, figure["digits"])
            line |= {"at": place(entry["value"]), "from": place(entry["low"]), "to": place(entry["high"])}
            line |= {"value": value, "interval": interval, "best": entry["value"] == best}
        rows.append(line)
    return {"figure": figure, "rows": rows, "low": f"{low:.3g}", "high": f"{high:.3g}"}
