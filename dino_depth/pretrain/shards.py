"""Depth maps out of WebDataset tars by index, in any order (see ``order.py`` for the one training takes)."""

import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino_depth.depth import DepthMap, decode, decode_png, read_codes
from dino_depth.errors import ConfigError, DataError

__all__ = ["DepthShards"]


MANIFEST_VERSION = 2


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
        folders: folder made by ``prep`` or a list of them.
        splits: keep only samples of these splits; empty keeps all.

    Raises:
        ConfigError: no folder given, or no sample is left.
        DataError: a shard is missing, cut short or disagrees with the manifest.
    """

    def __init__(self, folders: str | list[str], splits: list[str] | tuple[str, ...] = ()):
        self.folders = [Path(folder) for folder in ([folders] if isinstance(folders, str) else folders) if folder]
        if not self.folders:
            raise ConfigError("data.shards is empty: name a folder made by dino-depth prep")
        self.paths: list[Path] = []
        self.entries: list[_Entry] = []
        self.manifests: list[dict] = []
        found = set()
        for folder in self.folders:
            for path in self._listed(folder):
                for entry in _index(path, len(self.paths)):
                    found.add(entry.meta["split"])
                    if not splits or entry.meta["split"] in splits:
                        self.entries.append(entry)
                self.paths.append(path)
        if not self.entries:
            where = ", ".join(map(str, self.folders))
            raise ConfigError(f"{where}: no sample of splits {list(splits)}; found {sorted(found)}")
        self._files: dict[int, int] = {}
        self._resident: list[np.ndarray] | None = None

    def _listed(self, folder: Path) -> list[Path]:
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder}: no manifest.json; is this a finished folder of dino-depth prep?") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{folder / 'manifest.json'}: not JSON: {error}") from None
        if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION:
            version = manifest.get("version") if isinstance(manifest, dict) else None
            raise DataError(
                f"{folder / 'manifest.json'}: version {version!r}, this program reads {MANIFEST_VERSION}: prepare it anew"
            )
        self.manifests.append(manifest)
        paths = []
        for shard in manifest["shards"]:
            path = folder / shard["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != shard["bytes"]:
                state = "missing" if size is None else f"{size} bytes"
                raise DataError(f"{path}: {state}, the manifest says {shard['bytes']} bytes; run dino-depth check")
            paths.append(path)
        return paths

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self):
        return self.__dict__ | {"_files": {}}

    def png(self, index: int) -> bytes:
        """The bytes of a sample's depth PNG."""
        entry = self.entries[index]
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


def _index(path: Path, shard: int) -> list[_Entry]:
    """Entries of one tar, from its headers and sample descriptions."""
    images, metas = {}, {}
    try:
        with tarfile.open(path, "r:") as tar:
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
