"""Verifies a shard folder against its manifest, sample by sample."""

import json
import math
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_prep.formats import decode_png
from data_prep.manifest import MANIFEST, config_differences, count, digest_json, file_fault, read_manifest
from data_prep.workers import available_cores
from dino_depth.depth import LAST_CODE, UNIT, decode
from dino_depth.errors import DataError
from dino_depth.progress import Progress
from dino_depth.storage import RemotePath, ShardCache, location

__all__ = ["CheckConfig", "check"]

NUMBERS = ("near", "far", "valid_fraction")
STRINGS = ("unit", "kind", "source", "dataset", "category", "split", "label")
SIDES = ("height", "width")
PNG, JSON = "depth.png", "json"
PLACE = ("dataset", "category", "split", "label")

Place = tuple[str, str, str, str]


@dataclass
class CheckConfig:
    """Verification of a shard folder.

    Attributes:
        shards: the folder, or an fsspec URL of it, all of which is fetched anew, into the cache.
        cache: folder for copies of remote shards; empty means ``$DINO_DEPTH_CACHE``, else ``~/.cache/dino-depth``.
        cache_gib: size that these copies never exceed, GiB.
    """

    shards: str
    cache: str = ""
    cache_gib: float = 100.0


def check(config: CheckConfig) -> None:
    """Verifies every byte and every sample of a shard folder and prints what it holds.

    Raises:
        DataError: the first fault, with the shard and the sample it is in.
    """
    folder = location(config.shards)
    if isinstance(folder, Path) and not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    if isinstance(folder, Path) and (folder / ".progress").exists():
        raise DataError(f"{folder} is unfinished: run the same `prep` again")
    cache = ShardCache(config.cache, config.cache_gib)
    manifest = read_manifest(folder)
    _check_manifest(folder, manifest)
    seen: dict[str, str] = {}
    samples = []
    with Progress("check", manifest["total"], "maps") as progress, ThreadPoolExecutor(available_cores()) as pool:
        try:
            for shard, found in zip(
                manifest["shards"],
                pool.map(lambda shard: _check_shard(folder, shard, cache), manifest["shards"]),
                strict=True,
            ):
                for key, place in found:
                    if key.lower() in seen:
                        raise DataError(f"{folder / shard['file']}: {key}: its key is also in {seen[key.lower()]}")
                    seen[key.lower()] = shard["file"]
                    samples.append(place)
                progress.advance(len(found))
        finally:
            pool.shutdown(cancel_futures=True)
    differences = config_differences(count(samples), manifest["counts"], "counts.")
    if differences:
        raise DataError(f"{folder / MANIFEST} disagrees with the samples: {differences[0]}")
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 2**20
    print(f"{folder} is intact: {len(samples)} maps in {len(manifest['shards'])} shards, {size:.1f} MiB")


def _check_manifest(folder: Path | RemotePath, manifest: dict):
    """The manifest against itself and against the names in the folder."""
    path = folder / MANIFEST
    if digest_json(manifest["config"]) != manifest["config_hash"]:
        raise DataError(f"{path}: config_hash does not belong to config")
    listed = [shard["file"] for shard in manifest["shards"]]
    if len(set(listed)) != len(listed):
        raise DataError(f"{path} lists a shard twice")
    total = sum(shard["samples"] for shard in manifest["shards"])
    if total != manifest["total"]:
        raise DataError(f"{path}: total is {manifest['total']}, its shards hold {total}")
    for extra in sorted(_tars(folder) - set(listed)):
        raise DataError(f"{folder / extra} is not in {MANIFEST}")


def _tars(folder: Path | RemotePath) -> set[str]:
    if isinstance(folder, Path):
        return {path.name for path in folder.glob("*.tar")}
    # Web servers do not list folders.
    return set() if folder.read_only else {name for name in folder.sizes() if name.endswith(".tar")}


def _check_shard(folder: Path | RemotePath, shard: dict, cache: ShardCache) -> list[tuple[str, Place]]:
    """The key and place of every sample of a shard."""
    path = folder / shard["file"]
    if isinstance(path, RemotePath):
        # What arrives damaged is not kept, so its samples are not looked at.
        with cache.open(path, shard, fresh=True) as file:
            return _read_shard(path, file, shard, "")
    damage = file_fault(path, shard)
    try:
        with open(path, "rb") as file:
            return _read_shard(path, file, shard, damage)
    except OSError as error:
        raise DataError(f"{path}: {damage or error}") from error


def _read_shard(path: Path | RemotePath, file: BinaryIO, shard: dict, damage: str) -> list[tuple[str, Place]]:
    found: list[tuple[str, Place]] = []
    try:
        for key, members in _samples(file):
            try:
                description = _check_sample(members)
                found.append((key, tuple(description[name] for name in PLACE)))
            except DataError as error:
                raise DataError(f"sample {key}: {error}") from error
        if len(found) != shard["samples"]:
            last = f", the last is {found[-1][0]}" if found else ""
            raise DataError(f"{len(found)} samples, the manifest says {shard['samples']}{last}")
    except DataError as error:
        raise DataError(f"{path}: {damage + '; ' if damage else ''}{error}") from error
    if damage:
        raise DataError(f"{path}: {damage}; its {len(found)} samples can be read")
    return found


def _samples(file: BinaryIO) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Every sample of a tar: its key and its members by suffix, grouped as WebDataset does."""
    key, members = "", {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not (member.isreg() and stem and dot):
                    raise DataError(f"unexpected member {member.name} after sample {key or '(none)'}")
                this = f"{folder}/{stem}" if folder else stem
                if this != key and members:
                    yield key, members
                    members = {}
                key = this
                if suffix in members:
                    raise DataError(f"sample {key}: two members {suffix}")
                members[suffix] = tar.extractfile(member).read()
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise DataError(f"broken tar after sample {key or '(none)'}: {error}") from error
    if members:
        yield key, members


def _check_sample(members: dict[str, bytes]) -> dict:
    """The description of a sample whose PNG agrees with it."""
    if set(members) != {PNG, JSON}:
        raise DataError(f"members are {', '.join(sorted(members))}, expected {PNG} and {JSON}")
    try:
        description = json.loads(members[JSON])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{JSON} cannot be read: {error}") from error
    if not isinstance(description, dict):
        raise DataError(f"{JSON} is no object")
    _check_description(description)
    codes = decode_png(members[PNG])
    depth_map = decode(codes, description["near"], description["far"], description["kind"])
    if codes.shape != (description["height"], description["width"]):
        raise DataError(f"the map is {codes.shape}, {JSON} says {description['height']}, {description['width']}")
    if not math.isclose(depth_map.valid.mean(), description["valid_fraction"], abs_tol=1e-9):
        raise DataError(f"valid_fraction is {depth_map.valid.mean()}, {JSON} says {description['valid_fraction']}")
    # The coding spends the whole range: code 1 is the nearest depth, the last one the farthest.
    used = int(codes[depth_map.valid].min()), int(codes.max())
    expected = (1, LAST_CODE) if description["near"] < description["far"] else (1, 1)
    if used != expected:
        raise DataError(f"codes run over {used}, expected {expected}")
    return description


def _check_description(description: dict):
    kinds = [(NUMBERS, (int, float)), (STRINGS, (str,)), (SIDES, (int,)), (("group",), (str, type(None)))]
    for names, types in kinds:
        for name in names:
            if name not in description:
                raise DataError(f"{JSON} lacks {name}")
            if not isinstance(description[name], types) or isinstance(description[name], bool):
                raise DataError(f"{JSON}: {name} is {description[name]!r}")
    if description["unit"] != UNIT.get(description["kind"]):
        raise DataError(f"{JSON}: unit {description['unit']!r} does not fit kind {description['kind']!r}")
