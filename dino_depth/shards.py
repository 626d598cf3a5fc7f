"""Depth maps out of WebDataset tars by index, in any order (see ``pretrain/order.py`` for the one training takes).

Where a map lies, and what it is, stands in the folder's index, which is mapped into memory (``shard_index.py``):
opening ten million maps costs no more than opening ten, and processes of one machine share them. Of a remote folder
only the index is fetched at the start, and a shard by way of the cache of ``storage.py`` when one of its maps is read.
Folders of before there was an index are indexed here, by opening every shard.
"""

import os
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dino_depth import distributed
from dino_depth.config import DataConfig
from dino_depth.depth import DepthMap, read_codes
from dino_depth.errors import ConfigError, DataError
from dino_depth.progress import Progress
from dino_depth.sample import sample_map
from dino_depth.shard_format import parse_description, read_manifest
from dino_depth.shard_index import NAMES, SampleIndex, index_shard
from dino_depth.storage import RemotePath, ShardCache, location, open_shard

__all__ = ["DepthShards"]

DOWNLOADS = 8  # at a time
OPEN_FILES = 128
HEADER = 24  # bytes of a PNG up to its width and height


class DepthShards:
    """The samples of one or more shard folders, in the order of their shards.

    Args:
        folders: folder made by ``prep``, local or at an fsspec URL, or a list of them.
        splits: keep only samples of these splits; empty keeps all.
        cache: for the shards of URLs; by default the one of ``DataConfig()``.
        window: number of shards that are read at a time, where the reader keeps to that; 0: any are.

    Raises:
        ConfigError: no folder given, or no sample is left.
        DataError: a shard is missing, cut short or disagrees with the manifest.
        ReportedError: the network fails, or the cache cannot be written.
    """

    def __init__(
        self,
        folders: str | list[str],
        splits: list[str] | tuple[str, ...] = (),
        cache: ShardCache | None = None,
        window: int = 0,
    ):
        names = [folders] if isinstance(folders, str) else folders
        self.folders = [location(str(name)) for name in names if name]
        if not self.folders:
            raise ConfigError("data.shards is empty: name a folder made by dino-depth prep")
        self.cache, self.splits = cache or ShardCache(), list(splits)
        self.manifests = [read_manifest(folder) for folder in self.folders]
        # Of every shard its folder and its row of the manifest; shards of a folder follow each other.
        self._shards = [
            (folder, row)
            for folder, manifest in zip(self.folders, self.manifests, strict=True)
            for row in manifest["shards"]
        ]
        self._first = np.cumsum([0, *(len(manifest["shards"]) for manifest in self.manifests)])
        if distributed.rank() == 0:
            self._announce_cache(window)
            self._check_sizes()
        self._indices = [self._open_index(number) for number in range(len(self.folders))]
        self._find_runs()
        self._files = lru_cache(OPEN_FILES)(_File)

    @classmethod
    def configured(cls, data: DataConfig) -> "DepthShards":
        """The samples that a run reads."""
        return cls(data.shards, data.splits, ShardCache(data.cache, data.cache_gib), data.window)

    @property
    def paths(self) -> list[Path | RemotePath]:
        """Of every shard."""
        return [folder / row["file"] for folder, row in self._shards]

    def _announce_cache(self, window: int):
        """Says before the work begins that it will be slow."""
        sizes = {row["sha256"]: row["bytes"] for folder, row in self._shards if isinstance(folder, RemotePath)}
        # While the last maps of one window are read, the first of the next one are.
        needed = min(sum(sizes.values()), 2 * window * max(sizes.values(), default=0) if window else np.inf)
        if needed > self.cache.limit:
            what, way = ("two windows of", "lower data.window") if window else ("the", "data.window reads them in turn")
            print(
                f"{what} remote shards have {needed / 2**30:.3g} GiB, cache_gib is {self.cache.limit / 2**30:.3g}: "
                f"shards will be fetched again and again into {self.cache.folder}; {way}",
                file=sys.stderr,
                flush=True,
            )

    def _check_sizes(self):
        for folder, row in self._shards:
            if isinstance(folder, Path):
                try:
                    _check_size(os.stat(folder / row["file"]).st_size, row["bytes"])
                except OSError:
                    raise DataError(f"{folder / row['file']}: missing; run dino-depth check") from None
                except DataError as error:
                    raise DataError(f"{folder / row['file']}: {error}") from None

    def _open_index(self, number: int) -> SampleIndex:
        folder, manifest = self.folders[number], self.manifests[number]
        if (row := manifest.get("index")) is None:
            return SampleIndex.join([*self._walked(number)])
        path = folder / row["file"]
        try:
            with open_shard(folder, row, self.cache) as file:
                _check_size(os.fstat(file.fileno()).st_size, row["bytes"])
                index = SampleIndex.open(file)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; run dino-depth check") from None
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if len(index) != manifest["total"]:
            raise DataError(f"{path}: {len(index)} samples, the manifest says {manifest['total']}")
        return index

    def _walked(self, number: int) -> Iterator[SampleIndex]:
        """The rows of every shard of a folder without an index, in order."""
        folder, shards = self.folders[number], range(self._first[number], self._first[number + 1])
        if isinstance(folder, Path):
            yield from map(self._walk, shards)
            return
        shown = Progress("open shards", len(shards), "shards") if distributed.rank() == 0 else nullcontext()
        with shown as progress, ThreadPoolExecutor(DOWNLOADS) as pool:
            try:
                for index in pool.map(self._walk, shards):
                    if progress:
                        progress.advance()
                    yield index
            finally:
                pool.shutdown(cancel_futures=True)

    def _walk(self, shard: int) -> SampleIndex:
        folder, row = self._shards[shard]
        try:
            with open_shard(folder, row, self.cache) as file:
                return index_shard(file, row["samples"])
        except OSError as error:
            raise DataError(f"{folder / row['file']}: unreadable shard: {error}") from None
        except DataError as error:
            raise DataError(f"{folder / row['file']}: {error}") from None

    def _find_runs(self):
        """Notes the rows of the chosen splits as runs of rows: of sorted data a few, whatever the number of rows."""
        found, runs = set(), []
        for number, index in enumerate(self._indices):
            found |= set(index.names["split"])
            mask = self._mask(index)
            if mask is None:
                runs.append((number, 0, len(index)))
            else:
                edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=0, append=0)).reshape(-1, 2)
                runs += [(number, start, end) for start, end in edges.tolist()]
        self._runs = np.array(runs, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._runs[:, 2] - self._runs[:, 1])
        if not len(self):
            where = ", ".join(map(str, self.folders))
            raise ConfigError(f"{where}: no sample of splits {self.splits}; found {sorted(found)}")

    def _mask(self, index: SampleIndex) -> np.ndarray | None:
        """(rows,) bool, the rows of the chosen splits; None: all of them."""
        wanted = np.array([name in self.splits for name in index.names["split"]], bool)
        return wanted[index.columns["split"]] if self.splits and not wanted.all() else None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self):
        # What lies in files is opened again by whoever gets this.
        indices = [None if manifest.get("index") else index for manifest, index in self._stored()]
        return self.__dict__ | {"_files": None, "_indices": indices}

    def __setstate__(self, state: dict):
        self.__dict__ |= state
        self._indices = [index or self._open_index(number) for number, index in enumerate(self._indices)]
        self._files = lru_cache(OPEN_FILES)(_File)

    def _stored(self) -> Iterator[tuple[dict, SampleIndex]]:
        return zip(self.manifests, self._indices, strict=True)

    def _locate(self, index: int) -> tuple[int, int]:
        """The folder of a sample, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        run = int(np.searchsorted(self._ends, index, "right"))
        number, _, end = self._runs[run].tolist()
        return number, end - int(self._ends[run]) + int(index)

    def key(self, index: int) -> str:
        """The name of a sample."""
        number, row = self._locate(index)
        return self._indices[number].key(row)

    def path(self, index: int) -> Path | RemotePath:
        """The shard of a sample."""
        folder, row = self._shard_of(*self._locate(index))
        return folder / row["file"]

    def folder(self, index: int) -> Path | RemotePath:
        """The shard folder of a sample."""
        return self.folders[self._locate(index)[0]]

    def count_datasets(self) -> dict[tuple[Path | RemotePath, str], int]:
        """Samples by folder and dataset."""
        counts: dict[tuple[Path | RemotePath, str], int] = {}
        for folder, index in zip(self.folders, self._indices, strict=True):
            column, mask = index.columns["dataset"], self._mask(index)
            found = np.bincount(column if mask is None else column[mask], minlength=len(index.names["dataset"]))
            for name, count in zip(index.names["dataset"], found.tolist(), strict=True):
                counts[folder, name] = counts.get((folder, name), 0) + count
        return {place: count for place, count in counts.items() if count}

    def _shard_of(self, number: int, row: int) -> tuple[Path | RemotePath, dict]:
        shard, count = int(self._indices[number].columns["shard"][row]), len(self.manifests[number]["shards"])
        if not 0 <= shard < count:
            raise DataError(f"{self.folders[number]}: the index names shard {shard} of {count}; run dino-depth check")
        return self._shards[self._first[number] + shard]

    def column(self, name: str) -> np.ndarray:
        """(samples,) of the index; of one of ``NAMES`` places in :meth:`names`. ``shard`` counts over all folders."""
        parts = []
        for number, index in enumerate(self._indices):
            values, mask = index.columns[name], self._mask(index)
            values = values if mask is None else values[mask]
            if name == "shard" and number:
                values = values + self._first[number]
            elif name in NAMES and len(self._indices) > 1:
                places = {word: place for place, word in enumerate(self.names(name))}
                values = np.array([places[word] for word in index.names[name]], np.int32)[values]
            parts.append(values)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def names(self, name: str) -> list[str]:
        """The names that ``column(name)`` counts: also such as no chosen sample has."""
        if len(self._indices) == 1:
            return self._indices[0].names[name]
        return sorted({word for index in self._indices for word in index.names[name]})

    def values(self, name: str) -> np.ndarray:
        """(samples,) text: the dataset, category, split or label of every sample."""
        return np.array(self.names(name))[self.column(name)]

    def _read(self, index: int, member: str, most: int = 2**31) -> bytes:
        number, row = self._locate(index)
        columns = self._indices[number].columns
        offset, size = int(columns[member][row]), min(int(columns[f"{member}_size"][row]), most)
        folder, shard = self._shard_of(number, row)
        if not (offset >= 0 and 0 <= size <= shard["bytes"]):
            raise DataError(f"the index says {size} bytes at {offset}; run dino-depth check")
        if isinstance(folder, RemotePath):
            # Opened each time: an evicted shard that is held open would keep its disk blocks.
            with self.cache.open(folder / shard["file"], shard) as file:
                return os.pread(file.fileno(), size, offset)
        try:
            file = self._files(folder / shard["file"], shard["bytes"])  # open for as long as somebody holds it
            # At an offset: forked workers share the descriptor but no file position.
            return os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}") from None

    def png(self, index: int) -> bytes:
        """The bytes of a sample's depth PNG."""
        return self._read(index, "png")

    def description(self, index: int) -> dict[str, Any]:
        """What a sample's ``json`` says (dataset, category, split, label, near, far, kind, ...), and its ``key``."""
        return parse_description(self._read(index, "json")) | {"key": self.key(index)}

    def sample(self, index: int) -> tuple[DepthMap, dict]:
        """A depth map and its description.

        Raises:
            DataError: the PNG does not decode or contradicts its description.
        """
        return self._decoded(index)[1:]

    def codes(self, index: int) -> tuple[np.ndarray, dict]:
        """(height, width) uint16, the stored codes of a map, and its description, which they do not contradict.

        Raises:
            DataError: as :meth:`sample` does.
        """
        codes, _, description = self._decoded(index)
        return codes, description

    def _decoded(self, index: int) -> tuple[np.ndarray, DepthMap, dict]:
        try:
            codes, description = read_codes(self.png(index)), self.description(index)
            return codes, sample_map(codes, description), description
        except DataError as error:
            raise DataError(f"{self.path(index)}: sample {self.key(index)}: {error}") from None

    def shape(self, index: int) -> tuple[int, int]:
        """Height and width of a map, as its PNG's header says."""
        try:
            width, height = struct.unpack(">II", self._read(index, "png", HEADER)[-8:])
        except struct.error:
            raise DataError(f"{self.path(index)}: sample {self.key(index)}: unreadable depth PNG") from None
        return height, width


class _File:
    """A shard held open until nobody reads it any more."""

    def __init__(self, path: Path, size: int):
        self.descriptor = os.open(path, os.O_RDONLY)
        _check_size(os.fstat(self.descriptor).st_size, size)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _check_size(size: int, stated: int):
    if size != stated:
        raise DataError(f"{size} bytes, the manifest says {stated} bytes; run dino-depth check")
