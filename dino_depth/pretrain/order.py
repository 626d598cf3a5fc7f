"""Which map training reads at each position: exact epochs, and a position that is a plain number.

Training consumes one endless sequence of *positions*. An epoch is the next N of them, N being the number of units: a
unit is a map, or with ``data.one_per_group`` a scene, whose maps take turns from visit to visit. Without
``data.mixing`` epoch e visits every unit once, in the permutation keyed (seed, e). With it each dataset has an endless
sequence of its own, one permutation of its units after another, and a fixed number of an epoch's places; the
permutation keyed (seed, e) deals the places to the datasets, and each place takes what comes next in its dataset's
sequence.

What a position holds depends on nothing but the position, the settings and the shards. Who reads it, and with how many
workers, does not matter, so a run resumes exactly from the number of maps it has seen.
"""

import math
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dino_depth.config import DataConfig, suggestion
from dino_depth.errors import ConfigError

__all__ = ["EndlessOrder", "epoch_order", "epoch_shares"]

# Last words of generator keys: numpy pads a key with zeros, so (seed, epoch) alone would equal (seed, epoch, 0), and
# (seed, position, 1) draws masks.
DATASET, SCENE = 2, 3


def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """(count,) the permutation of an epoch's places."""
    return np.random.default_rng([seed, epoch]).permutation(count)


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
    """A dataset's units, how many visits an epoch pays them, and the dataset's number."""

    units: np.ndarray
    share: int
    number: int

    def visits(self, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(share,) units that ``epoch`` visits, and for each how often it was visited before."""
        count, first = len(self.units), epoch * self.share
        cycles = np.arange(first, first + self.share) // count
        orders = [
            np.random.default_rng([seed, cycle, self.number, DATASET]).permutation(count)
            for cycle in range(cycles[0], cycles[-1] + 1)
        ]
        start = first % count
        return self.units[np.concatenate(orders)[start : start + self.share]], cycles


class EndlessOrder:
    """``order[position]`` is the sample at a position of the endless sequence of epochs.

    Args:
        descriptions: the samples' metadata, in the order of the shards.
        data: whose ``mixing`` and ``one_per_group`` are followed.
        seed: of every permutation.

    Attributes:
        count: positions of an epoch.

    Raises:
        ConfigError: ``mixing`` does not fit the samples, see :func:`epoch_shares`.
    """

    def __init__(self, descriptions: list[dict], data: DataConfig, seed: int):
        self.seed = seed
        # Unit u is the samples members[starts[u] : starts[u + 1]].
        self._starts, self._members = _units(descriptions, data.one_per_group)
        self.count, self._pools = len(self._starts) - 1, []
        if data.mixing:
            datasets = np.array([descriptions[first]["dataset"] for first in self._members[self._starts[:-1]]])
            shares = epoch_shares(data.mixing, Counter(datasets.tolist()))
            self._pools = [
                _Pool(np.flatnonzero(datasets == name), share, number)
                for number, (name, share) in enumerate(shares.items())
            ]
            self.count = sum(shares.values())
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch not in self._epochs:
            # The last two are kept: at a boundary, reads of both epochs come interleaved.
            self._epochs = dict([*self._epochs.items()][-1:]) | {epoch: self._visits(epoch)}
        units, before = self._epochs[epoch]
        unit = units[place]
        first, size = self._starts[unit], int(self._starts[unit + 1] - self._starts[unit])
        if size == 1:
            return int(self._members[first])
        cycle, turn = divmod(int(before[place]), size)
        turns = np.random.default_rng([self.seed, cycle, int(unit), SCENE]).permutation(size)
        return int(self._members[first + turns[turn]])

    def _visits(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(count,) the units at an epoch's places, and how often each was visited before."""
        order = epoch_order(self.count, self.seed, epoch)
        if not self._pools:
            return order, np.broadcast_to(epoch, self.count)
        units, before, start = np.empty_like(order), np.empty_like(order), 0
        for pool in self._pools:
            places = (order >= start) & (order < start + pool.share)
            units[places], before[places] = pool.visits(self.seed, epoch)
            start += pool.share
        return units, before


def _units(descriptions: list[dict], one_per_group: bool) -> tuple[np.ndarray, np.ndarray]:
    """(units + 1,) where each unit's samples start in (samples,) the samples, in the order of each unit's first one."""
    if not one_per_group:
        return np.arange(len(descriptions) + 1), np.arange(len(descriptions))
    scenes: dict[object, list[int]] = {}
    for index, meta in enumerate(descriptions):
        group = meta["group"]
        scenes.setdefault(index if group is None else (meta["dataset"], meta["category"], group), []).append(index)
    members = [index for scene in scenes.values() for index in scene]
    return np.cumsum([0, *map(len, scenes.values())]), np.array(members)
