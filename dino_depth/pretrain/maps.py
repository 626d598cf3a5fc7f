"""Where training has its maps: in their shards, decoded in this machine's memory, or on the device.

All three answer alike. Workers :meth:`~Reader.load` a map and draw its crops, and cut them unless the map is on the
device. What is cut, and from which values, is the same: bit for bit from shards and memory, within half a code from the
device (``resident.py``).
"""

import math
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from dino_depth import distributed
from dino_depth.depth import CODINGS, UNIT, DepthMap
from dino_depth.pretrain.shared_arrays import SharedArrays
from dino_depth.progress import Progress
from dino_depth.sample import sample_map
from dino_depth.shards import DepthShards

__all__ = ["Maps", "MapsInMemory", "MapsInShards", "Reader"]

KINDS = tuple(UNIT)


class Reader(Protocol):
    """What workers have of the maps; it is sent to them."""

    def load(self, index: int) -> tuple[np.ndarray, DepthMap | None]:
        """(height, width) bool, which pixels are valid; and the map, unless it is on the device.

        Raises:
            ReportedError: the map cannot be read.
        """


class Maps(Protocol):
    """The maps of a run.

    Attributes:
        shards: where they are from.
        reader: what workers have of them.
    """

    shards: DepthShards
    reader: Reader


class MapsInShards:
    """Maps that are decoded whenever one is asked for."""

    def __init__(self, shards: DepthShards):
        self.shards, self.reader = shards, self

    def load(self, index: int) -> tuple[np.ndarray, DepthMap]:
        depth_map, _ = self.shards.sample(index)
        return depth_map.valid, depth_map


class _Codes:
    """The 16-bit codes of every map, and what they mean, in memory that processes share."""

    def __init__(self, arrays: SharedArrays):
        self.arrays = arrays

    def keep(self, index: int, codes: np.ndarray, description: dict):
        self.of(index)[:] = codes
        for name in ("near", "far"):
            self.arrays[name][index] = description[name]
        self.arrays["kind"][index] = KINDS.index(description["kind"])
        self.arrays["coding"][index] = CODINGS.index(description.get("coding", "linear"))
        self.arrays["plane"][4 * index : 4 * index + 4] = description.get("plane", np.nan)

    def of(self, index: int) -> np.ndarray:
        """(height, width) uint16."""
        start, end = self.arrays["starts"][index : index + 2].tolist()
        return self.arrays["codes"][start:end].reshape(-1, int(self.arrays["widths"][index]))

    def load(self, index: int) -> tuple[np.ndarray, DepthMap]:
        description = {name: float(self.arrays[name][index]) for name in ("near", "far")}
        description |= {"kind": KINDS[self.arrays["kind"][index]], "coding": CODINGS[self.arrays["coding"][index]]}
        plane = self.arrays["plane"][4 * index : 4 * index + 4].tolist()
        description["plane"] = None if math.isnan(plane[0]) else plane
        depth_map = sample_map(self.of(index), description)
        return depth_map.valid, depth_map


class MapsInMemory:
    """Maps decoded into memory, once on each machine, for all its ranks and their workers.

    Args:
        workers: threads that decode, in each rank a share of the maps.

    Raises:
        DataError: a map does not decode.
    """

    def __init__(self, shards: DepthShards, workers: int):
        self.shards = shards
        shapes = np.array([shards.shape(index) for index in range(len(shards))], np.int64)  # (maps, 2)
        layout = {"codes": (int(shapes.prod(1).sum()), "<u2"), "starts": (len(shards) + 1, "<i8")}
        layout |= {"widths": (len(shards), "<i8"), "near": (len(shards), "<f8"), "far": (len(shards), "<f8")}
        layout |= {"kind": (len(shards), "<u1"), "coding": (len(shards), "<u1")}
        layout |= {"plane": (4 * len(shards), "<f8")}
        alike = [rank for rank, name in enumerate(distributed.gather(_machine())) if name == _machine()]
        leads = distributed.rank() == alike[0]
        arrays = SharedArrays(layout) if leads else None
        places = distributed.gather(arrays.place if leads else "")
        if leads:
            arrays["starts"][1:], arrays["widths"][:] = shapes.prod(1).cumsum(), shapes[:, 1]
        self.reader = _Codes(arrays or SharedArrays(layout, places[alike[0]]))
        distributed.barrier()
        mine = range(alike.index(distributed.rank()), len(shards), len(alike))
        shown = Progress("maps to memory", len(mine), "maps") if distributed.rank() == 0 else nullcontext()
        with shown as progress, ThreadPoolExecutor(max(1, workers)) as pool:
            try:
                for _ in pool.map(lambda index: self.reader.keep(index, *shards.codes(index)), mine):
                    if progress:
                        progress.advance()
            finally:
                pool.shutdown(cancel_futures=True)
        distributed.barrier()


def _machine() -> str:
    """The same for processes that find each other's memory: on one machine, and in one container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)
