"""One shard: a fixed list of raw files becomes one tar, atomically, and a row that says so.

A shard's bytes depend on its files alone: not on who writes it, how often that was killed, or what else is written.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

from data_prep import pseudo_depth
from data_prep.item import Item, sample_keys
from data_prep.manifest import digest_json, file_fault, sync_folder, temporary_name, write_file, write_json
from data_prep.output import PROGRESS
from data_prep.plausibility import PlausibilityConfig, refuse_unless_plausible, summarise
from data_prep.pseudo_depth import FlatDepth, Model, PseudoDepthConfig
from data_prep.shrink import shrink
from data_prep.workers import available_cores
from dino_depth.depth import UNIT, Coding, DepthMap, codes_png, encode, fit_plane_of_codes
from dino_depth.errors import DataError
from dino_depth.shard_format import JSON, PNG, shard_file
from dino_depth.shard_index import index_shard
from dino_depth.storage import RemotePath

__all__ = ["ShardTask", "finished_row", "finished_rows", "makes_images", "reader_module", "upload", "write_shard"]

SMALLEST_SIDE = 14
WINDOW = 64  # images that are read together, so that images of one shape meet in a batch


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
        index: its number.
        out: folder of the shards.
        reader: name of the reader.
        max_side: longest side of a stored map, pixels; 0 keeps every pixel.
        items: the files, of one dataset.
        shared: keys at which some of them would meet others, see :func:`data_prep.item.sample_keys`.
        model: what turns images into depth; None where the reader reads depth.
        pseudo_depth: and how.
        coding: of depth in the stored PNGs.
        plausible: what a map must be like to be stored.
        remote: where the finished shard is moved to from ``out``, if it is.
        of: shards of the folder in all.
    """

    index: int
    out: Path
    reader: str
    max_side: int
    items: Sequence[Item]
    shared: frozenset[str]
    model: Model | None = None
    pseudo_depth: PseudoDepthConfig | None = None
    remote: RemotePath | None = None
    coding: Coding = "linear"
    plausible: PlausibilityConfig = field(default_factory=PlausibilityConfig)
    of: int = 1

    @property
    def keys(self) -> list[str]:
        return sample_keys(self.items, self.shared)

    @property
    def file(self) -> str:
        return shard_file(self.index, self.of)

    @property
    def row_path(self) -> Path:
        return self.out / PROGRESS / f"{self.file}.json"

    @property
    def index_path(self) -> Path:
        """Where the shard's part of the folder's index waits for the others."""
        return self.out / PROGRESS / f"{self.file}.index"


def reader_module(name: str) -> ModuleType:
    """The reader of that name: the module of this package that is called so."""
    return import_module(f"data_prep.{name}")


def makes_images(reader: ModuleType) -> bool:
    """Whether a reader reads images, which become depth by estimation."""
    return hasattr(reader, "read_image")


def write_shard(task: ShardTask, tick: Callable[[int], None]) -> dict:
    """Writes one shard, or finds it written before, and returns its row; ``tick`` is called with each map done."""
    inputs = _inputs(task)
    row = finished_row(task, inputs)
    if row is not None:
        upload(task, row)
        tick(len(task.items))
        return row
    path, progress = task.out / task.file, task.out / PROGRESS
    temporary = progress / temporary_name(task.file)
    dropped: list[dict] = []
    for folder in (path.parent, temporary.parent):
        folder.mkdir(exist_ok=True)
    try:
        with open(temporary, "wb") as raw:
            file = _HashingFile(raw)
            with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for key, item, members in _samples(task):
                    if isinstance(members, DataError):
                        flat = isinstance(members, FlatDepth)
                        dropped.append({"path": item.source, "reason": str(members), "flat": flat})
                    else:
                        for suffix, content in members:
                            tar.addfile(_header(f"{key}.{suffix}", len(content)), io.BytesIO(content))
                    tick(1)
            raw.flush()
            os.fsync(raw.fileno())
        samples = len(task.items) - len(dropped)
        if samples:
            with open(temporary, "rb") as written:
                write_file(task.index_path, index_shard(written, samples).pieces(), progress)
            os.replace(temporary, path)
        else:
            path.unlink(missing_ok=True)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
    row = {"file": task.file, "sha256": file.sha256.hexdigest(), "bytes": file.bytes, "samples": samples}
    row |= {"inputs": inputs, "dropped": dropped}
    write_json(task.row_path, row, progress)
    upload(task, row)
    return row


def finished_row(task: ShardTask, inputs: str | None = None) -> dict | None:
    """The row of a shard that was written from the same files and is intact, else None."""
    path = task.out / task.file
    try:
        row = json.loads(task.row_path.read_bytes())
        if row["inputs"] != (inputs or _inputs(task)) or (row["samples"] and not task.index_path.is_file()):
            return None
        if row["samples"] and task.remote is not None and not path.exists():
            # Only an upload whose size was right removes the file here.
            return row if (task.remote / task.file).size() == row["bytes"] else None
        return row if row["samples"] == 0 or not file_fault(path, row) else None
    except (OSError, ValueError, KeyError, TypeError):
        # Rows only save work: without one the shard is written again.
        return None


def finished_rows(tasks: list[ShardTask]) -> dict[str, dict | None]:
    """:func:`finished_row` of every task by its shard's name, of several at once."""
    with ThreadPoolExecutor(available_cores()) as pool:  # reading and hashing leave Python's lock to the others
        return dict(zip([task.file for task in tasks], pool.map(finished_row, tasks), strict=True))


def upload(task: ShardTask, row: dict):
    """Moves a finished shard to where it shall be, if that is not ``out``; a kill at any moment loses nothing."""
    if task.remote is None:
        return
    path, target = task.out / task.file, task.remote / task.file
    if not row["samples"]:
        target.remove()
    elif path.exists():
        target.put(path)
        path.unlink()


def _inputs(task: ShardTask) -> str:
    return digest_json([task.keys, [[item.source, item.label, *item.file.stamp()] for item in task.items]])


Members = list[tuple[str, bytes]]


def _samples(task: ShardTask) -> Iterator[tuple[str, Item, Members | DataError]]:
    """The tar members of every file, in order, or why it has none."""
    maps = _read(task) if task.model is None else _estimate(task, task.model, task.pseudo_depth)
    for key, item, found in zip(task.keys, task.items, maps, strict=True):
        try:
            yield key, item, found if isinstance(found, DataError) else _members(task, item, *found)
        except DataError as error:
            yield key, item, error


def _read(task: ShardTask) -> Iterator[tuple[DepthMap, dict] | DataError]:
    reader = reader_module(task.reader)
    for item in task.items:
        try:
            yield reader.read(item), {}
        except DataError as error:
            yield error


def _estimate(task: ShardTask, model: Model, config: PseudoDepthConfig) -> Iterator[tuple[DepthMap, dict] | DataError]:
    reader = reader_module(task.reader)
    # Which images share a batch follows from the shard alone, and with it every rounding error.
    for start in range(0, len(task.items), WINDOW):
        images, results = {}, {}
        for place, item in enumerate(task.items[start:][:WINDOW]):
            try:
                images[place] = reader.read_image(item)
            except DataError as error:
                results[place] = error
        names = [task.items[start + place].source for place in images]
        results |= zip(images, pseudo_depth.estimate(model, config, list(images.values()), names), strict=True)
        for place in sorted(results):
            found = results.pop(place)
            yield found if isinstance(found, DataError) else (found[0], {"pseudo_depth": found[1]})


def _members(task: ShardTask, item: Item, depth_map: DepthMap, extra: dict) -> Members:
    if min(depth_map.depth.shape) < SMALLEST_SIDE:
        raise DataError(f"{depth_map.depth.shape[0]}x{depth_map.depth.shape[1]} is below {SMALLEST_SIDE} pixels a side")
    if task.max_side:
        depth_map = shrink(depth_map, task.max_side)
    codes, near, far = encode(depth_map, task.coding)
    summary = summarise(codes, near, far, depth_map.kind, task.coding)
    refuse_unless_plausible(depth_map, codes, summary, task.plausible, task.reader, item.options)
    height, width = depth_map.depth.shape
    plane, share = fit_plane_of_codes(codes, near, far, depth_map.kind, task.coding)
    description = {
        **item.extra, **extra, "near": near, "far": far, "coding": task.coding, "median": summary.median,
        "distinct": summary.distinct, "unit": UNIT[depth_map.kind], "kind": depth_map.kind,
        "source": item.source, "dataset": item.dataset, "category": item.category, "split": item.split,
        "label": item.label, "group": item.group, "height": height, "width": width,
        "valid_fraction": summary.valid, "plane": [*map(float, plane), share],
    }  # fmt: skip
    return [(PNG, codes_png(codes)), (JSON, json.dumps(description, sort_keys=True).encode())]


def _header(name: str, size: int) -> tarfile.TarInfo:
    """A tar header that says nothing about this machine or this moment: TarInfo's own time and owner are 0."""
    header = tarfile.TarInfo(name)
    header.size, header.mode = size, 0o444
    return header


class _HashingFile:
    """Counts and hashes what passes on its way to a file."""

    def __init__(self, file: io.BufferedWriter):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        self.bytes += len(content)
        return self.file.write(content)
