"""Verifies a shard folder against its manifest, sample by sample, and says which maps are hard to believe."""

import math
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.formats import decode_png
from data_prep.item import repeated
from data_prep.manifest import config_differences, count, digest_json, digest_pieces, file_fault, stored_shards
from data_prep.plausibility import PlausibilityConfig, Summary, implausible, summarise
from data_prep.workers import available_cores
from dino_depth.depth import LAST_CODE, UNIT, DepthMap, fit_plane, plane_share
from dino_depth.errors import DataError
from dino_depth.progress import Progress
from dino_depth.sample import sample_map
from dino_depth.shard_format import JSON, MANIFEST, StoredSample, parse_description, read_manifest, read_samples
from dino_depth.shard_index import SampleIndex
from dino_depth.storage import RemotePath, ShardCache, location
from dino_depth.terminal import say

__all__ = ["CheckConfig", "check"]

NUMBERS = ("near", "far", "valid_fraction")
STRINGS = ("unit", "kind", "source", "dataset", "category", "split", "label")
SIDES = ("height", "width")
PLACE = ("dataset", "category", "split", "label")

Place = tuple[str, str, str, str]
Found = tuple[str, dict, Summary]  # key, description and figures of a sample
DOUBTS_SHOWN = 3
PLANE_SLACK = 0.02  # of the share of pixels on a map's plane, which other machines may find by a little another


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
    samples: Counter[Place] = Counter()
    parts: list[SampleIndex] = []
    figures: dict[str, _Figures] = {}
    doubts, doubtful = [], 0
    with Progress("check", manifest["total"], "maps") as progress, ThreadPoolExecutor(available_cores()) as pool:
        try:
            for shard, (found, part) in zip(
                manifest["shards"],
                pool.map(lambda shard: _check_shard(folder, shard, cache), manifest["shards"]),
                strict=True,
            ):
                parts.append(part)
                for key, description, summary in found:
                    samples[tuple(description[name] for name in PLACE)] += 1
                    figures.setdefault(description["dataset"], _Figures()).add(summary)
                    limits = _limits(manifest, description["dataset"])
                    if reason := next((reason for reason, _ in implausible(summary, limits)), ""):
                        doubtful += 1
                        doubts += [f"{shard['file']}: {key}: {reason}"][: DOUBTS_SHOWN - len(doubts)]
                progress.advance(len(found))
        finally:
            pool.shutdown(cancel_futures=True)
    _check_keys(folder, manifest, parts)
    differences = config_differences(count(samples), manifest["counts"], "counts.")
    if differences:
        raise DataError(f"{folder / MANIFEST} disagrees with the samples: {differences[0]}")
    if row := manifest.get("index"):
        _check_index(folder, row, parts, cache)
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 2**20
    for dataset, one in figures.items():
        say(f"{dataset}: {one}")
    if doubts:
        more = f"; and {doubtful - len(doubts)} more" if doubtful > len(doubts) else ""
        say(f"{doubtful} of the maps are hard to believe: {'; '.join(doubts)}{more}")
    say(f"{folder} is intact: {samples.total()} maps in {len(manifest['shards'])} shards, {size:.1f} MiB")


def _limits(manifest: dict, dataset: str) -> PlausibilityConfig:
    """What a map was held to when it was written; shards of before there were limits are held to today's."""
    stated = manifest["config"].get("plausible", {})
    if manifest["config"].get("sources", {}).get(dataset, {}).get("encoding") == "grey":
        return PlausibilityConfig((0, 0), 0, 0, 0, 0, 0, 0)
    return PlausibilityConfig(
        **{name: value for name, value in stated.items() if name in PlausibilityConfig.__dataclass_fields__}
    )


@dataclass
class _Figures:
    """The stored maps of one dataset."""

    near: float = math.inf
    far: float = 0.0
    step: array = field(default_factory=lambda: array("d"))
    distinct: array = field(default_factory=lambda: array("l"))
    unit: str = ""

    def add(self, summary: Summary):
        self.unit, self.near, self.far = UNIT[summary.kind], min(self.near, summary.near), max(self.far, summary.far)
        self.step.append(summary.step)
        self.distinct.append(summary.distinct)

    def __str__(self) -> str:
        step = np.frombuffer(self.step) * (1e6 if self.unit == "m" else 1)
        return (
            f"depth {self.near:.4g}..{self.far:.4g} {self.unit}; one code is {np.median(step):.3g} "
            f"{'um' if self.unit == 'm' else 'relative'} in the median, {step.max():.3g} at most; "
            f"{np.median(self.distinct):,.0f} distinct depths a map, {min(self.distinct):,} at least"
        )


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
    # Web servers do not list folders.
    stored = {} if isinstance(folder, RemotePath) and folder.read_only else stored_shards(folder)
    for extra in sorted(stored.keys() - set(listed)):
        raise DataError(f"{folder / extra} is not in {MANIFEST}")


def _check_shard(folder: Path | RemotePath, shard: dict, cache: ShardCache) -> tuple[list[Found], SampleIndex]:
    """Every sample of a shard, and the rows of the index that belong to it."""
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


def _read_shard(path: Path | RemotePath, file: BinaryIO, shard: dict, damage: str) -> tuple[list[Found], SampleIndex]:
    found: list[Found] = []
    rows: list[tuple[StoredSample, dict]] = []
    try:
        for sample in read_samples(file, shard["samples"]):
            png, json = (os.pread(file.fileno(), size, offset) for offset, size in (sample.png, sample.json))
            try:
                found.append((sample.key, *_check_sample(png, json)))
            except DataError as error:
                raise DataError(f"sample {sample.key}: {error}") from error
            rows.append((sample, found[-1][1]))
        index = SampleIndex.of(rows)
    except DataError as error:
        raise DataError(f"{path}: {damage + '; ' if damage else ''}{error}") from error
    if damage:
        raise DataError(f"{path}: {damage}; its {len(found)} samples can be read")
    return found, index


def _check_keys(folder: Path | RemotePath, manifest: dict, parts: list[SampleIndex]):
    """Refuses keys that differ in case alone, or not at all."""
    pairs = list(zip(manifest["shards"], parts, strict=True))

    def keys() -> Iterator[tuple[str, str]]:
        for shard, part in pairs:
            yield from ((part.key(place), shard["file"]) for place in range(len(part)))

    for twice in repeated(lambda: (key.lower() for key, _ in keys())):
        (_, first), (key, second) = islice((pair for pair in keys() if pair[0].lower() == twice), 2)
        raise DataError(f"{folder / second}: {key}: its key is also in {first}")


def _check_index(folder: Path | RemotePath, row: dict, parts: list[SampleIndex], cache: ShardCache):
    """The stored index against the one that the shards make."""
    path = folder / row["file"]
    if isinstance(path, RemotePath):
        cache.open(path, row, fresh=True).close()
    elif fault := file_fault(path, row):
        raise DataError(f"{path}: {fault}")
    if digest_pieces(SampleIndex.join(parts).pieces()) != row["sha256"]:
        raise DataError(f"{path} disagrees with the shards: run the same `prep` into another folder")


def _check_sample(png: bytes, json: bytes) -> tuple[dict, Summary]:
    """The description of a sample whose PNG agrees with it, and the figures of its map."""
    description = parse_description(json)
    _check_description(description)
    codes, coding = decode_png(png), description.get("coding", "linear")
    depth_map = sample_map(codes, description)
    if codes.shape != (description["height"], description["width"]):
        raise DataError(f"the map is {codes.shape}, {JSON} says {description['height']}, {description['width']}")
    summary = summarise(codes, description["near"], description["far"], depth_map.kind, coding)
    if not math.isclose(summary.valid, description["valid_fraction"], abs_tol=1e-9):
        raise DataError(f"valid_fraction is {summary.valid}, {JSON} says {description['valid_fraction']}")
    # The coding spends the whole range: code 1 is the nearest depth, the last one the farthest.
    used = int(codes[depth_map.valid].min()), int(codes.max())
    expected = (1, LAST_CODE) if description["near"] < description["far"] else (1, 1)
    if used != expected:
        raise DataError(f"codes run over {used}, expected {expected}")
    _check_plane(depth_map)
    if description.get("distinct", summary.distinct) != summary.distinct:
        raise DataError(f"{summary.distinct} distinct codes, {JSON} says {description['distinct']!r}")
    return description, summary


def _check_plane(depth_map: DepthMap):
    """The stored plane against the map; sums are rounded in other ways on other machines, so not bit for bit."""
    if depth_map.plane is None:
        return
    (plane, stated), (fitted, share) = depth_map.plane, fit_plane(depth_map)
    if stated == share and np.array_equal(plane, fitted):
        return
    found = plane_share(depth_map, plane)
    if abs(found - stated) > PLANE_SLACK or found < share - PLANE_SLACK:
        raise DataError(f"its plane holds {found:.3f} of the map, {JSON} says {stated:.3f}; the best holds {share:.3f}")


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
