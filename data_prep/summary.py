"""Depth maps in a few figures: distributions, counts beside the published ones, and what was left out."""

import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from data_prep.item import Published
from data_prep.listing import KINDS, compare

__all__ = ["Histogram", "count_table", "drop_groups", "histogram", "paper_table", "readable", "split_order"]

BINS = 32
WIDE_RANGE = 20  # from which ratio of the largest value to the smallest a histogram is logarithmic
PATHS_SHOWN = 3
# The paper's Table 5: the datasets that each split adds, its number of maps, and the sum of the released counts.
PAPER = (
    ("A", ("mvtec3d", "eyecandies"), 19_647, 19_647),
    ("B", ("real_iad_d3",), 4_249, 8_450),
    ("C", ("mvtec_ad", "mvtec_loco", "mvtec_ad2", "visa"), 22_632, 27_830),
)


def split_order(split: str) -> tuple[bool, bool, str]:
    """Sorts training before validation before all else."""
    return not split.startswith("train"), not split.startswith("val"), split


def readable(unit: str, largest: float) -> tuple[float, str]:
    """Factor and unit to write lengths up to ``largest`` in."""
    if unit != "m" or largest >= 1:
        return 1, unit
    return (1e6, "µm") if 0 < largest < 1e-3 else (1000, "mm")


@dataclass(frozen=True)
class Histogram:
    """One distribution, ready to draw in a box of ``WIDTH`` x ``HEIGHT``.

    Attributes:
        title: of the figure.
        median: as text with its unit; of a figure that is the same in every map, that figure.
        bars: (x, y, width, height) of every bin that is not empty.
        middle: x of the median.
        ends: the smallest and the largest value, as text.
        most: number of maps in the fullest bin.
        logarithmic: whether the horizontal axis is.
    """

    WIDTH, HEIGHT = 300, 84

    title: str
    median: str
    bars: list[tuple[float, float, float, float]]
    middle: float
    ends: tuple[str, str]
    most: int
    logarithmic: bool


def histogram(title: str, unit: str, values: np.ndarray) -> Histogram:
    """The distribution of the (maps,) finite ``values`` from the smallest to the largest, in equal bins."""
    scale, unit = readable(unit, values.max())
    values = values * scale
    low, high = float(values.min()), float(values.max())
    median = float(np.median(values))

    def text(value: float) -> str:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"

    ends, label = (text(low), text(high)), f"{text(median)} {unit}".strip()
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return Histogram(title, label, [], 0.0, ends, len(values), False)
    logarithmic = low > 0 and high / low >= WIDE_RANGE
    places = np.log(values) if logarithmic else values
    left, right = places.min(), places.max()
    counts = np.histogram(places, BINS, (left, right))[0]
    most, width = int(counts.max()), Histogram.WIDTH / BINS
    bars = []
    for place, number in enumerate(counts):
        if number:
            # A single map among thousands stays visible.
            height = max(Histogram.HEIGHT * number / most, 1)
            bars.append((round(place * width, 2), round(Histogram.HEIGHT - height, 2), width - 1, round(height, 2)))
    middle = round(Histogram.WIDTH * float((np.median(places) - left) / (right - left)), 1)
    return Histogram(title, label, bars, middle, ends, most, logarithmic)


def count_table(counts: Counter[tuple[str, str, str]], published: list[Published]) -> dict:
    """Maps by category and by split and label, each beside the published count where there is one.

    Defects are counted together, as "anomalous", but those with a published count of their own. What is published of
    several categories or labels together is ``loose``; published categories without a map here are ``absent``.
    """
    compared = compare(counts, published)
    stated = {*KINDS, *(place[2] for place in published)}
    exact = {place[:3]: place[3] for place in published if None not in place[:3]}
    found: Counter[tuple[str, str, str]] = Counter()
    labels: dict[tuple[str, str], list[str]] = {}
    for (category, split, label), number in sorted(counts.items()):
        found[category, split, label if label in stated else "anomalous"] += number
        labels.setdefault((category, split), []).append(f"{label} {number:,}")
    categories = sorted({place[0] for place in found})
    columns = {place[1:] for place in found} | {place[1:] for place in exact if place[0] in categories}
    columns = sorted(columns, key=lambda column: (split_order(column[0]), column[1] != "good", column[1]))
    rows = []
    for category in categories:
        places = [(category, *column) for column in columns]
        cells = [(found[place], exact.get(place)) for place in places]
        rows.append((category, cells, sum(number for number, _ in cells)))
    return {
        "columns": columns,
        "rows": rows,
        "loose": [(place, number) for place, number in compared if None in place[:3]],
        "absent": sorted({place[0] for place in exact} - set(categories)),
        "published": len(published),
        "differing": sum(place[3] != number for place, number in compared),
        "labels": labels if any(label not in stated for _, _, label in counts) else {},
    }


def drop_groups(drops: list[dict]) -> list[dict]:
    """Reasons, told apart by all but their numbers, the most frequent first, with the first paths of each."""
    groups: dict[str, list[dict]] = {}
    for drop in drops:
        groups.setdefault(re.sub(r"-?\d[\d.e+-]*", "#", str(drop["reason"])), []).append(drop)
    ordered = sorted(groups.values(), key=lambda group: -len(group))
    return [
        {"reason": group[0]["reason"], "count": len(group), "paths": [drop["path"] for drop in group[:PATHS_SHOWN]]}
        for group in ordered
    ]


def paper_table(manifest: dict) -> list[dict]:
    """The paper's splits beside the maps here; nothing where no dataset of theirs is real."""
    real = {source["reader"]: source["maps"] for source in manifest["sources"].values() if not source["synthetic"]}
    rows = [
        {"split": split, "readers": names, "paper": paper, "public": public,
         "here": sum(real.get(name, 0) for name in names), "complete": all(name in real for name in names)}
        for split, names, paper, public in PAPER
    ]  # fmt: skip
    return rows if any(row["here"] for row in rows) else []
