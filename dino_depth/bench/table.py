"""One table of a bench in four forms: 80 columns of text, Markdown, CSV and JSON."""

import csv
import io
import json
import textwrap
from pathlib import Path

from dino_depth.bench.speed import SIZES
from dino_depth.picture import write_page
from dino_depth.terminal import plain

__all__ = ["as_markdown", "as_text", "rows_of_csv", "text_of", "write_tables"]

WIDTH, FIRST, CELL = 80, 26, 9
SPEED = {f"ms_{size}": f"ms {size}" for size in SIZES}


def text_of(estimate: dict | None, digits: int, sign: bool = False) -> tuple[str, str]:
    """A value and its interval as short text, without the zero before the point."""
    if estimate is None:
        return "-", ""
    parts = [f"{estimate[key]:{'+' if sign else ''}.{digits}f}" for key in ("value", "low", "high")]
    value, low, high = (part.replace("0.", ".", 1) if part.lstrip("+-").startswith("0.") else part for part in parts)
    return value, f"{low}..{high}"


def _shown(result: dict, source: dict) -> list[str]:
    return [key for key in result["figures"] if any(source["estimates"][row].get(key) for row in source["rows"])]


def _short(row: str, width: int) -> str:
    return row if len(row) <= width else "…" + row[1 - width :]


def as_text(result: dict) -> str:
    """The table for a terminal."""
    lines = [f"size {result['size']} px, {result['cells']}x{result['cells']} cells; 95 % bootstrap intervals"]
    for source in result["sources"]:
        counted = f"{source['views']} views of {source['scenes']} scenes"
        counted += f", {source['inspections']} parts with defects" if source["inspections"] else ""
        lines += ["", *textwrap.wrap(f"{source['name']}: {source['what']}; {counted}", WIDTH)]
        lines += [f"  no {name}: {reason}" for name, reason in source["missing"].items()]
        keys = _shown(result, source)
        lines += _block(result, source, keys)
        lines += _difference_block(result, source, keys)
        lines += _loss_block(result, source, keys)
    if result["speed"]:
        lines += [
            "",
            f"{'milliseconds a map':{FIRST + CELL}}" + "".join(f"{title:>{CELL}}" for title in SPEED.values()),
        ]
        for label, times in result["speed"].items():
            cells = "".join(f"{'-' if times[key] is None else format(times[key], '.1f'):>{CELL}}" for key in SPEED)
            lines.append(f"{_short(label, FIRST + CELL):{FIRST + CELL}}{cells}")
    for one in result["encoders"]:
        lines += textwrap.wrap(f"{one['label']}: absent: {one['note']}", WIDTH) if one["note"] else []
    return "\n".join(plain(line.rstrip()) for line in lines).rstrip()


def _heading(result: dict, keys: list[str], title: str) -> str:
    arrows = {"higher": "", "lower": " v"}
    names = [result["figures"][key]["title"] + arrows[result["figures"][key]["better"]] for key in keys]
    return f"{title:{FIRST}}" + "".join(f"{name:>{CELL}}" for name in names)


def _block(result: dict, source: dict, keys: list[str]) -> list[str]:
    lines = [_heading(result, keys, "(v: lower is better)")]
    for row in source["rows"]:
        cells = [text_of(source["estimates"][row][key], result["figures"][key]["digits"]) for key in keys]
        lines.append(f"{_short(row, FIRST - 1):{FIRST}}" + "".join(f"{value:>{CELL}}" for value, _ in cells))
        # Two digits of an interval: nobody reads the third, and eighty columns hold no more.
        ranges = [_range(source["estimates"][row][key], result["figures"][key]["digits"]) for key in keys]
        lines.append(f"{'':{FIRST}}" + "".join(f"{interval:>{CELL}}" for interval in ranges))
    return lines


def _range(estimate: dict | None, digits: int, sign: bool = False) -> str:
    return (
        "" if estimate is None else text_of(estimate, min(digits, 2) if digits > 1 else 0, sign)[1].replace("..", "-")
    )


def _difference_block(result: dict, source: dict, keys: list[str]) -> list[str]:
    """The first row less every other one; * where the interval excludes 0."""
    first, *others = source["rows"]
    pairs = {entry["against"]: entry for entry in source["differences"] if entry["row"] == first}
    if not others:
        return []
    lines = ["", f"{first} less each other; * where the paired interval excludes 0"]
    lines.append(_heading(result, keys, ""))
    for other in others:
        cells = []
        for key in keys:
            entry = pairs[other][key]
            value, _ = text_of(entry, result["figures"][key]["digits"], sign=True)
            clear = entry is not None and (entry["low"] > 0 or entry["high"] < 0)
            cells.append(value + ("*" if clear else " "))
        lines.append(f"{_short(other, FIRST - 1):{FIRST}}" + "".join(f"{cell:>{CELL}}" for cell in cells))
    return lines


def _loss_block(result: dict, source: dict, keys: list[str]) -> list[str]:
    names = list(next(iter(source["losses"].values())))
    if not names:
        return []
    lines = ["", "loss under a disturbance of what is asked; * where the interval excludes 0"]
    lines.append(_heading(result, keys, ""))
    for row in source["rows"]:
        for name in names:
            cells = []
            for key in keys:
                entry = source["losses"][row][name][key]
                value, _ = text_of(entry, result["figures"][key]["digits"])
                clear = entry is not None and (entry["low"] > 0 or entry["high"] < 0)
                cells.append(value + ("*" if clear else " "))
            title = f"{_short(row, FIRST - 8)} {name}"
            lines.append(f"{title:{FIRST}}" + "".join(f"{cell:>{CELL}}" for cell in cells))
    return lines


def as_markdown(result: dict) -> str:
    """The figures as Markdown, with their intervals."""
    lines = []
    for source in result["sources"]:
        keys = _shown(result, source)
        titles = [
            result["figures"][key]["title"] + (" ↓" if result["figures"][key]["better"] == "lower" else "")
            for key in keys
        ]
        lines += [f"**{source['name']}**: {source['what']}; {source['views']} views of {source['scenes']} scenes.", ""]
        lines += [f"| encoder | {' | '.join(titles)} |", "|---" * (len(keys) + 1) + "|"]
        for row in source["rows"]:
            cells = []
            for key in keys:
                value, interval = text_of(source["estimates"][row][key], result["figures"][key]["digits"])
                cells.append(f"{value} ({interval})" if interval else value)
            lines.append(f"| {row} | {' | '.join(cells)} |")
        lines.append("")
    if result["speed"]:
        lines += [f"| milliseconds | {' | '.join(SPEED.values())} |", "|---" * (len(SPEED) + 1) + "|"]
        for label, times in result["speed"].items():
            cells = ["-" if times[key] is None else f"{times[key]:.1f}" for key in SPEED]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def rows_of_csv(result: dict) -> list[list]:
    """One row for each number: source, row, against (of a difference), disturbance (of a loss), figure and interval."""
    rows = [["source", "row", "against", "disturbance", "figure", "value", "low", "high"]]

    def add(place: list, estimates: dict):
        for key in result["figures"]:
            if entry := estimates.get(key):
                rows.append([*place, key, entry["value"], entry["low"], entry["high"]])

    for source in result["sources"]:
        for row in source["rows"]:
            add([source["name"], row, "", ""], source["estimates"][row])
            for name, losses in source["losses"][row].items():
                add([source["name"], row, "", name], losses)
        for entry in source["differences"]:
            add([source["name"], entry["row"], entry["against"], ""], entry)
    for label, times in result["speed"].items():
        rows += [["", label, "", "", key, value, "", ""] for key, value in times.items() if value is not None]
    return rows


def write_tables(result: dict, folder: Path):
    """bench.json, bench.csv and bench.md."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows_of_csv(result))
    write_page(folder / "bench.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    write_page(folder / "bench.csv", buffer.getvalue())
    write_page(folder / "bench.md", as_markdown(result))
