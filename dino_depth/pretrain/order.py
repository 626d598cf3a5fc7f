"""Which map training reads at each position: exact epochs, and a position that is a plain number.

Training consumes one endless sequence of *positions*. An epoch is the next N of them, N being the number of units: a
unit is a map, or with ``data.one_per_group`` a scene, whose maps take turns from visit to visit. Without
``data.mixing`` epoch e visits every unit once, in the permutation keyed (seed, e). With it each dataset has an endless
sequence of its own, one permutation of its units after another, and a fixed number of an epoch's places; the
permutation keyed (seed, e) deals the places to the datasets, and each place takes what comes next in its dataset's
sequence.

With ``data.window`` each of these permutations is sorted, keeping its order otherwise, so that a few shards after the
other are read, drawn anew in every epoch: what training from a URL needs to fetch every shard once an epoch.

What a position holds depends on nothing but the position, the settings and the shards. Who reads it, and with how many
workers, does not matter, so a run resumes exactly from the number of maps it has seen.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from dino_depth.config import DataConfig, suggestion
from dino_depth.errors import ConfigError

__all__ = ["Columns", "EndlessOrder", "epoch_order", "epoch_shares", "in_windows"]

# Last words of generator keys: numpy pads a key with zeros, so (seed, epoch) alone would equal (seed, epoch, 0), and
# (seed, position, 1) draws masks.
DATASET, SCENE, WINDOW = 2, 3, 4


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) the permutation of an epoch's places."""
    return _permutation(count, [seed, epoch])


def _permutation(count: int, key: list[int]) -> np.ndarray:
    """``default_rng(key).permutation(count)`` in half the memory."""
    order = np.arange(count, dtype=np.int32 if count < 2**31 else np.int64)
    np.random.default_rng(key).shuffle(order)
    return order


def in_windows(order: np.ndarray, shards: np.ndarray, window: int, key: list[int]) -> np.ndarray:
    """(count,) a random order of units so sorted that each ``window`` shards, drawn at random, are read in turn.

    Args:
        order: (count,) a permutation of the units.
        shards: (count,) number of each unit's shard.
        key: of the permutation of the shards.
    """
    known, place = np.unique(shards, return_inverse=True)
    windows = _permutation(len(known), key)[place] // window  # (count,) number of the window of each unit
    # Of 16 bits where possible, whose sort takes a fifth of the time.
    windows = windows.astype(np.uint16 if len(known) // window < 2**16 else np.int64)
    return order[np.argsort(windows[order], kind="stable")]


def epoch_shares(mixing: dict[str, float], units: dict[str, int]) -> dict[str, int]:
    """Visits an epoch pays to each dataset: shares of the weights by the largest-remainder method, ties by name.

    Args:
        mixing: relative weight of every dataset; 0 leaves it out.
        units: number of units of every dataset; an epoch has as many visits as there are units in those not left out.

    Returns:
        Visits (at least 1) by dataset, sorted by name, without those left out.

    Raises:
        ConfigError: a dataset that is not there or has no weight; weights that are negative, not finite or all zero; a
            weight too small for one visit an epoch.
    """
    held = ", ".join(sorted(units))
    for name, weight in mixing.items():
        if name not in units:
            raise ConfigError(
                f"data.mixing: no sample of dataset {name!r} (found: {held}){suggestion(str(name), [*units])}"
            )
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"data.mixing.{name} is {weight}: a weight is a finite number, 0 or more")
    if missing := sorted(units.keys() - mixing.keys()):
        raise ConfigError(f"data.mixing gives no weight to {', '.join(missing)}: name every dataset, 0 leaves one out")
    names = sorted(name for name, weight in mixing.items() if weight)
    if not names:
        raise ConfigError(f"data.mixing is 0 for every dataset ({held}): at least one weight must be above 0")
    length, total = sum(units[name] for name in names), sum(Fraction(mixing[name]) for name in names)
    quotas = {name: Fraction(mixing[name]) * length / total for name in names}
    shares = {name: math.floor(quota) for name, quota in quotas.items()}
    by_remainder = sorted(names, key=lambda name: shares[name] - quotas[name])
    for name in by_remainder[: length - sum(shares.values())]:
        shares[name] += 1
    if never := [name for name in names if not shares[name]]:
        raise ConfigError(
            f"data.mixing.{never[0]} is {mixing[never[0]]}: less than one of an epoch's {length} visits; "
            "raise it, or leave the dataset out with 0"
        )
    return shares


@dataclass(frozen=True)
class _Pool:
    """A dataset's units, how many visits an epoch pays them, the dataset's number, and the units' shards."""

    units: np.ndarray
    share: int
    number: int
    shards: np.ndarray | None
    window: int

    def visits(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(share,) units that ``epoch`` visits, and for each how often it was visited before."""
        count, first = len(self.units), epoch * self.share
        cycles = np.arange(first, first + self.share) // count
        orders = [self._order(seed, cycle) for cycle in range(cycles[0], cycles[-1] + 1)]
        start = first % count
        return self.units[np.concatenate(orders)[start : start + self.share]], cycles

    def _order(self, seed: int, cycle: int) -> np.ndarray:
        order = _permutation(len(self.units), [seed, cycle, self.number, DATASET])
        if self.window:
            order = in_windows(order, self.shards, self.window, [seed, cycle, self.number, WINDOW])
        return order


class Columns(Protocol):
    """What an order needs of samples; :class:`DepthShards` and its index have it."""

    def __len__(self) -> int: ...

    def column(self, name: str) -> np.ndarray: ...

    def names(self, name: str) -> list[str]: ...


class EndlessOrder:
    """``order[position]`` is the sample at a position of the endless sequence of epochs.

    Args:
        samples: in the order of the shards.
        data: whose ``mixing``, ``one_per_group`` and ``window`` are followed.
        seed: of every permutation.

    Attributes:
        count: positions of an epoch.

    Raises:
        ConfigError: ``mixing`` does not fit the samples, see :func:`epoch_shares`, or ``window`` is negative.
    """

    def __init__(self, samples: Columns, data: DataConfig, seed: int):
        if data.window < 0:
            raise ConfigError(f"data.window must be 0 or a number of shards, got {data.window}")
        self.seed, self._window = seed, data.window
        # Unit u is the samples members[starts[u] : starts[u + 1]]; where every unit is one sample, nothing is kept.
        self._starts = self._members = None
        first = slice(None)
        if data.one_per_group:
            self._starts, self._members = _scenes(samples.column("scene"))
            first = self._members[self._starts[:-1]]
        self.count, self._pools = len(samples) if self._starts is None else len(self._starts) - 1, []
        # (units,) the shard that each unit begins in.
        self._shards = samples.column("shard")[first] if data.window else None
        if data.mixing:
            names, datasets = samples.names("dataset"), samples.column("dataset")[first]
            sizes = np.bincount(datasets, minlength=len(names)).tolist()
            shares = epoch_shares(data.mixing, {name: size for name, size in zip(names, sizes, strict=True) if size})
            for number, (name, share) in enumerate(shares.items()):
                units = np.flatnonzero(datasets == names.index(name))
                shards = None if self._shards is None else self._shards[units]
                self._pools.append(_Pool(units, share, number, shards, data.window))
            self.count = sum(shares.values())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch not in self._epochs:
            # The last two are kept: at a boundary, reads of both epochs come interleaved.
            self._epochs = dict([*self._epochs.items()][-1:]) | {epoch: self._visits(epoch)}
        units, before = self._epochs[epoch]
        unit = int(units[place])
        if self._starts is None:
            return unit
        first, size = int(self._starts[unit]), int(self._starts[unit + 1] - self._starts[unit])
        if size == 1:
            return int(self._members[first])
        cycle, turn = divmod(int(before[place]), size)
        turns = np.random.default_rng([self.seed, cycle, unit, SCENE]).permutation(size)
        return int(self._members[first + turns[turn]])

    def _visits(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(count,) the units at an epoch's places, and how often each was visited before."""
        if not self._pools:
            units = epoch_order(self.count, self.seed, epoch)
            if self._window:
                units = in_windows(units, self._shards, self._window, [self.seed, epoch, 0, WINDOW])
            return units, np.broadcast_to(epoch, self.count)
        order = epoch_order(self.count, self.seed, epoch)
        units, before, start = np.empty_like(order), np.empty_like(order), 0
        for pool in self._pools:
            places = (order >= start) & (order < start + pool.share)
            units[places], before[places] = pool.visits(self.seed, epoch)
            start += pool.share
        return units, before


def _scenes(scenes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(units + 1,) where each unit's samples start in (samples,) the samples, in the order of each unit's first one.

    Args:
        scenes: (samples,) number of each sample's scene; 0 is a unit of its own.
    """
    first, grouped = np.arange(len(scenes)), np.flatnonzero(scenes)
    _, firsts, inverse = np.unique(scenes[grouped], return_index=True, return_inverse=True)
    first[grouped] = grouped[firsts[inverse]]  # (samples,) the first sample of each one's unit
    members = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[members], prepend=-1))
    return np.append(starts, len(scenes)), members
