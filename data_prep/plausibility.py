"""Whether the numbers of a depth map can be what they claim to be, decided in one place for every reader.

A file that reads without an error may still mean something else: "no measurement" stored as a number, millimetres taken
for metres, a mask or a label image in place of depth, a camera that looks along -Z. Each leaves a mark on the map that
would be stored, in its 65,535 codes: one value far away from all others, a median no camera has, a handful of values,
all of the part within a few codes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from dino_depth.depth import LAST_CODE, Coding, DepthMap, Kind, code_depth, coding_step
from dino_depth.errors import ConfigError, DataError

__all__ = ["PlausibilityConfig", "Summary", "check_limits", "implausible", "refuse_marks", "refuse_negative",
           "refuse_unless_plausible", "summarise"]  # fmt: skip

NEGATIVE = 0.05  # share of the values
SAMPLE = 2**14  # pixels
MARKS = (32767, 65504, 65535)  # the largest int16, float16 and uint16: in metres they may still seem to be depth
MARKED = 0.001  # share of the values
DIGITS = 1e-5  # relative to the median: differences below are rounding


@dataclass
class PlausibilityConfig:
    """What a map must be like to be stored. One that is not counts as an unusable file; 0 switches a limit off.

    Attributes:
        median: metres within which the median depth of a metric map lies.
        farthest: metres that no pixel of a metric map exceeds.
        valid: smallest share of valid pixels.
        values: fewest distinct depths, of the 65,535 that a map can hold.
        apart: a value that many pixels have, and that lies farther from all others than so many times their range, is
            taken for a mark of missing pixels.
        step: metres between two neighbouring codes, at the median depth of a metric map, at most.
        codes: fewest codes between the nearest and the median depth, where the file tells more depths apart there.
    """

    median: tuple[float, float] = (0.01, 30.0)
    farthest: float = 1000.0
    valid: float = 0.001
    values: int = 4
    apart: float = 20.0
    step: float = 0.0005
    codes: int = 32


def check_limits(config: PlausibilityConfig):
    """Refuses limits out of range.

    Raises:
        ConfigError: names the first such value.
    """
    low, high = config.median
    for key, fine, rule in (
        ("median", 0 <= low <= high, "two distances in rising order"),
        ("farthest", config.farthest >= 0, "0 or more"),
        ("valid", 0 <= config.valid <= 1, "within 0..1"),
        ("values", config.values >= 0, "0 or more"),
        ("apart", config.apart >= 0, "0 or more"),
        ("step", config.step >= 0, "0 or more"),
        ("codes", config.codes >= 0, "0 or more"),
    ):
        if not fine:
            raise ConfigError(f"plausible.{key} must be {rule}, got {getattr(config, key)}")


@dataclass(frozen=True)
class Summary:
    """A stored map in a few figures, all of which follow from its codes.

    Attributes:
        kind, near, far: of the map.
        median: depth of the middle pixel.
        step: between two neighbouring codes at the median.
        distinct: number of distinct depths.
        valid: share of valid pixels.
        median_code: code of the middle pixel.
        ends: of the nearest and the farthest depth each: that depth, the depth next to it, the share of valid pixels
            that have it, and how many times the range of all others it lies away from them.
        coding: of the codes.
    """

    kind: Kind
    near: float
    far: float
    median: float
    step: float
    distinct: int
    valid: float
    median_code: int
    ends: tuple[tuple[float, float, float, float], ...]
    coding: Coding


def summarise(codes: np.ndarray, near: float, far: float, kind: Kind, coding: Coding) -> Summary:
    """The figures of a map of (height, width) uint16 codes, at least one of which is not 0."""
    counts = np.bincount(codes.reshape(-1), minlength=LAST_CODE + 1)
    total, counts[0] = codes.size - int(counts[0]), 0
    used = np.flatnonzero(counts > 0)
    middle = int(np.searchsorted(np.cumsum(counts), (total + 1) // 2))
    ends = []
    if len(used) > 1:
        first, second, before, last = (int(used[place]) for place in (0, 1, -2, -1))
        nearest, next_near, next_far, farthest = (
            float(code_depth(code, near, far, coding)) for code in (first, second, before, last)
        )
        for end, other, code, distance, others in (
            (nearest, next_near, first, next_near - nearest, farthest - next_near),
            (farthest, next_far, last, farthest - next_far, next_far - nearest),
        ):
            ends.append((end, other, counts[code] / total, distance / others if others > 0 else np.inf))
    median = float(code_depth(middle, near, far, coding))
    step = coding_step(median, near, far, coding)
    return Summary(kind, near, far, median, step, len(used), total / codes.size, middle, tuple(ends), coding)


def implausible(summary: Summary, config: PlausibilityConfig) -> Iterator[tuple[str, str]]:
    """Every reason why a map cannot be what it claims, each with what would settle it: a word of ``REMEDIES``."""
    metric, unit = summary.kind == "metric", " m" if summary.kind == "metric" else ""
    low, high = config.median[0], config.median[1] or np.inf
    if summary.distinct < config.values and summary.distinct == 1:
        yield f"the same depth {summary.near:.6g}{unit} everywhere, as masks have (plausible.values)", "missing"
    outside = f"median depth {summary.median:.4g} m is outside plausible.median {low:g}..{high:g} m"
    if metric and (summary.near > high or summary.far < low):
        yield outside, "unit"
    if metric and config.farthest and summary.far > config.farthest:
        yield f"its farthest depth is {summary.far:.6g} m, beyond plausible.farthest {config.farthest:g}", "missing"
    if summary.distinct < config.values:
        reach = f"{summary.near:.6g}..{summary.far:.6g}{unit}"
        yield f"only {summary.distinct} distinct depths, {reach}, as masks have (plausible.values)", "missing"
    if metric and not low <= summary.median <= high:
        yield outside, "unit"
    if summary.valid < config.valid:
        yield f"only {summary.valid:.2%} of its pixels are valid, plausible.valid is {config.valid:.2%}", ""
    for end, other, share, times in summary.ends if config.apart else ():
        if share >= config.valid and times > config.apart:
            yield (
                (
                    f"{share:.1%} of its pixels have the depth {end:.6g}{unit}, {_times(times)} from the next, "
                    f"{other:.6g}{unit} (plausible.apart {config.apart:g}): it seems to mean that they are missing"
                ),
                "missing",
            )
    if config.step and metric and summary.step > config.step:
        yield (
            (
                f"16-bit codes over {summary.near:.4g}..{summary.far:.4g} m are {summary.step * 1e6:.0f} um apart at "
                f"its median depth, more than plausible.step {config.step * 1e6:g} um"
            ),
            "range",
        )


def _times(times: float) -> str:
    return f"{times:.0f} times the range of all others" if np.isfinite(times) else "far"


def refuse_unless_plausible(
    depth_map: DepthMap, codes: np.ndarray, summary: Summary, config: PlausibilityConfig, reader: str, options: Any
):
    """Refuses a map that cannot be what it claims.

    Args:
        codes: (height, width) of the map.
        reader, options: whose settings the message names.

    Raises:
        DataError: says why, with the value, and which setting would settle it.
    """
    if getattr(options, "encoding", "") == "grey":
        return  # the brightness of a photograph may be anything
    for reason, remedy in implausible(summary, config):
        raise DataError(reason + _remedy(remedy, reader, options, summary.coding))
    if summary.median_code <= config.codes:
        before, after = _told_apart(depth_map.depth, codes, summary.median)
        if before > 2 * after:
            raise DataError(
                f"its nearer half holds {before} depths of which 16-bit codes over {summary.near:.4g}.."
                f"{summary.far:.4g} tell {after} apart (plausible.codes {config.codes})"
                + _remedy("range", reader, options, summary.coding)
            )


def _told_apart(depth: np.ndarray, codes: np.ndarray, median: float) -> tuple[int, int]:
    """Distinct depths, and distinct codes, of a sample of the pixels up to the median depth."""
    stride = max(1, depth.size // SAMPLE)
    depth, codes = depth.reshape(-1)[::stride], codes.reshape(-1)[::stride]
    chosen = (codes > 0) & (depth <= median)
    rounded = np.rint(depth[chosen].astype(np.float64) / (DIGITS * median))
    return len(np.unique(rounded)), len(np.unique(codes[chosen]))


def _remedy(remedy: str, reader: str, options: Any, coding: Coding) -> str:
    """What to do about it, in the settings that the reader has."""
    has = {name: f"{reader}.{name}" for name in ("missing", "farthest", "unit") if hasattr(options, name)}
    if remedy == "unit" and "unit" in has:
        return f": {has['unit']} {options.unit} contradicts the data"
    if remedy == "missing" and "missing" in has:
        return f": name the stored value in {has['missing']}, or give {has['farthest']}"
    if remedy == "range":
        other = "inverse" if coding == "linear" else "linear"
        return ": " + (f"give {has['farthest']}, or " if "farthest" in has else "") + f"coding {other}"
    return ""


def refuse_negative(values: np.ndarray, reader: str, missing: np.ndarray | None = None):
    """Refuses (height, width) stored values that are negative in number: a single negative value means "missing",
    many of them are a coordinate that grows the other way.

    Args:
        reader: whose settings the message names.
        missing: (height, width) bool, values that do not count.

    Raises:
        DataError: names the least and the greatest of them, and the settings.
    """
    if values.dtype.kind == "u":
        return
    with np.errstate(invalid="ignore"):
        below = (values < 0) & (values > -np.inf)
    negative = values[below if missing is None else below & ~missing]
    if len(negative) > NEGATIVE * values.size and len(np.unique(negative[:SAMPLE])) > 2:
        raise DataError(
            f"{len(negative) / values.size:.0%} of the values are negative, {negative.min():g} to {negative.max():g}: "
            f"if larger is nearer, say {reader}.larger_is nearer (and {reader}.offset, where heights are meant)"
        )


def refuse_marks(values: np.ndarray, reader: str, missing: np.ndarray):
    """Refuses (height, width) stored values many of which are the largest number of a 16-bit type, far from all others.

    Args:
        reader: whose settings the message names.
        missing: (height, width) bool, values that do not count.

    Raises:
        DataError: names that value, the next, and the settings.
    """
    mark = float(values.max(where=~missing, initial=0))
    if mark not in MARKS:
        return
    seen = values[~missing]
    others = seen[(seen > 0) & (seen < mark)]
    share = np.count_nonzero(seen == mark) / values.size
    if share >= MARKED and len(others) and mark - float(others.max()) > float(others.max()) - float(others.min()):
        raise DataError(
            f"{share:.1%} of the values are {mark:g}, the next is {others.max():g}: it seems to mean that they are "
            f"missing: name it in {reader}.missing, or give {reader}.farthest"
        )
