"""Depth maps out of WebDataset tars by index, in any order (see ``order.py`` for the one training takes).

Where a map lies in its tar, and what it is, stands in the tar alone: so every shard is opened once at the start, remote
ones by way of the cache of ``storage.py``. A remote dataset larger than that cache works, at the cost of fetching
shards again and again, as training reads maps in any order.
"""

import json
import os
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dino_depth import distributed
from dino_depth.config import DataConfig
from dino_depth.depth import DepthMap, decode, decode_png, read_codes
from dino_depth.errors import ConfigError, DataError
from dino_depth.progress import Progress
from dino_depth.storage import RemotePath, ShardCache, location, open_shard

__all__ = ["DepthShards"]


MANIFEST_VERSION = 2
DOWNLOADS = 8  # at a time


@dataclass(frozen=True)
class _Entry:
    """Where one sample's PNG lies, and its description."""

    shard: int
    offset: int
    size: int
    meta: dict


class DepthShards:
    """The samples of one or more shard folders, in the order of their shards.

    Args:
        folders: folder made by ``prep``, local or at an fsspec URL, or a list of them.
        splits: keep only samples of these splits; empty keeps all.
        cache: for the shards of URLs; by default the one of ``DataConfig()``.

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
    ):
        names = [folders] if isinstance(folders, str) else folders
        self.folders = [location(str(name)) for name in names if name]
        if not self.folders:
            raise ConfigError("data.shards is empty: name a folder made by dino-depth prep")
        self.cache = cache or ShardCache()
        self.paths: list[Path | RemotePath] = []
        self.entries: list[_Entry] = []
        self.manifests: list[dict] = []
        self._rows: list[dict] = []
        found = set()
        for folder in self.folders:
            self._rows += self._listed(folder)
        self._announce_cache()
        for shard in self._indexed():
            for entry in shard:
                found.add(entry.meta["split"])
                if not splits or entry.meta["split"] in splits:
                    self.entries.append(entry)
        if not self.entries:
            where = ", ".join(map(str, self.folders))
            raise ConfigError(f"{where}: no sample of splits {list(splits)}; found {sorted(found)}")
        self._files: dict[int, int] = {}
        self._resident: list[np.ndarray] | None = None

    @classmethod
    def configured(cls, data: DataConfig) -> "DepthShards":
        """The samples that a run reads."""
        return cls(data.shards, data.splits, ShardCache(data.cache, data.cache_gib))

    def _listed(self, folder: Path | RemotePath) -> list[dict]:
        """The manifest's rows of a folder's shards, whose paths it notes."""
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes().decode("utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder}: no manifest.json; is this a finished folder of dino-depth prep?") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{folder / 'manifest.json'}: not JSON: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
            version = manifest.get("version") if isinstance(manifest, dict) else None
            wanted = f"this program reads {MANIFEST_VERSION}: prepare it anew"
            raise DataError(f"{folder / 'manifest.json'}: version {version!r}, {wanted}")
        self.manifests.append(manifest)
        for shard in manifest["shards"]:
            if not (isinstance(shard, dict) and {"file", "bytes", "sha256"} <= shard.keys()):
                raise DataError(f"{folder / 'manifest.json'}: a shard needs file, bytes and sha256, got {shard}")
            path = folder / shard["file"]
            if isinstance(path, Path):
                size = path.stat().st_size if path.is_file() else None
                if size != shard["bytes"]:
                    state = "missing" if size is None else f"{size} bytes"
                    raise DataError(f"{path}: {state}, the manifest says {shard['bytes']} bytes; run dino-depth check")
            self.paths.append(path)
        return manifest["shards"]

    def _remote(self) -> list[int]:
        return [shard for shard, path in enumerate(self.paths) if isinstance(path, RemotePath)]

    def _announce_cache(self):
        """Says before the work begins that it will be slow."""
        size = sum({self._rows[shard]["sha256"]: self._rows[shard]["bytes"] for shard in self._remote()}.values())
        if size > self.cache.limit and distributed.rank() == 0:
            print(
                f"the remote shards have {size / 2**30:.3g} GiB, cache_gib is {self.cache.limit / 2**30:.3g}: "
                f"shards will be fetched again and again into {self.cache.folder}",
                file=sys.stderr,
                flush=True,
            )

    def _indexed(self) -> Iterator[list[_Entry]]:
        """The entries of every shard, in order."""
        remote = self._remote()
        if not remote:
            yield from map(self._index, range(len(self.paths)))
            return
        shown = Progress("open shards", len(self.paths), "shards") if distributed.rank() == 0 else nullcontext()
        with shown as progress, ThreadPoolExecutor(DOWNLOADS) as pool:
            try:
                for entries in pool.map(self._index, range(len(self.paths))):
                    if progress:
                        progress.advance()
                    yield entries
            finally:
                pool.shutdown(cancel_futures=True)

    def _index(self, shard: int) -> list[_Entry]:
        path = self.paths[shard]
        try:
            with open_shard(path.parent, self._rows[shard], self.cache) as file:
                return _index(file, path, shard)
        except OSError as error:
            raise DataError(f"{path}: unreadable shard: {error}") from None

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self):
        return self.__dict__ | {"_files": {}}

    def png(self, index: int) -> bytes:
        """The bytes of a sample's depth PNG."""
        entry = self.entries[index]
        if isinstance(path := self.paths[entry.shard], RemotePath):
            # Opened each time: an evicted shard that is held open would keep its disk blocks.
            with self.cache.open(path, self._rows[entry.shard]) as file:
                return os.pread(file.fileno(), entry.size, entry.offset)
        if entry.shard not in self._files:
            self._files[entry.shard] = os.open(self.paths[entry.shard], os.O_RDONLY)
        # Reads at an offset: forked workers share the descriptor but no file position.
        return os.pread(self._files[entry.shard], entry.size, entry.offset)

    def sample(self, index: int) -> tuple[DepthMap, dict]:
        """A depth map and its description (key, dataset, category, split, label, near, far, kind, ...).

        Raises:
            DataError: the PNG does not decode or contradicts its description.
        """
        meta = self.entries[index].meta
        try:
            if self._resident is not None:
                return decode(self._resident[index], meta["near"], meta["far"], meta["kind"]), meta
            return decode_png(self.png(index), meta["near"], meta["far"], meta["kind"]), meta
        except DataError as error:
            raise DataError(f"{self.paths[self.entries[index].shard]}: sample {meta['key']}: {error}") from None

    def make_resident(self):
        """Decodes every map into memory once; forked workers share the pages."""
        self._resident = [read_codes(self.png(index)) for index in range(len(self))]


def _index(file: BinaryIO, path: Path | RemotePath, shard: int) -> list[_Entry]:
    """Entries of one tar, from its headers and sample descriptions."""
    images, metas = {}, {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.name.endswith(".depth.png"):
                    images[member.name.removesuffix(".depth.png")] = (member.offset_data, member.size)
                elif member.name.endswith(".json"):
                    metas[member.name.removesuffix(".json")] = json.loads(tar.extractfile(member).read())
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable shard: {error}") from None
    if images.keys() != metas.keys():
        alone = sorted(images.keys() ^ metas.keys())[0]
        raise DataError(f"{path}: sample {alone}: depth.png or json is missing")
    return [_Entry(shard, *place, {**metas[key], "key": key}) for key, place in images.items()]
