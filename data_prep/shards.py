"""Raw dataset to depth shards: planned up front, written in parallel, atomically and resumably.

The sorted list of files is cut into chunks of ``samples_per_shard``; one worker turns one chunk into one tar. So a
shard's bytes depend on its chunk alone, not on the number of workers, the order of a directory listing or on how often
the run was killed. Until the manifest is written, ``OUT/.progress`` holds the configuration, one row per finished shard
and every unfinished file.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from importlib import import_module, util
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType

import data_prep
from data_prep.folder import FolderOptions
from data_prep.item import SYNTHETIC, DepthItem, sample_keys
from data_prep.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    count,
    digest_json,
    file_fault,
    library_versions,
    sync_folder,
    temporary_name,
    write_json,
)
from data_prep.output import PROGRESS, continue_or_begin, exclusive, verify_finished, writing
from data_prep.shrink import shrink
from data_prep.workers import run_tasks
from dino_depth.config import suggestion
from dino_depth.depth import UNIT, encode_png
from dino_depth.errors import ConfigError, DataError
from dino_depth.progress import Progress

__all__ = ["PrepareConfig", "prepare", "readers"]

SMALLEST_SIDE = 14


@dataclass
class PrepareConfig:
    """Raw dataset to shards.

    Attributes:
        dataset: the reader: mvtec3d, eyecandies, or folder for any directory of depth files.
        root: folder of the raw dataset (or of one of its categories).
        out: folder for the shards and their manifest; continued where a killed run left it.
        workers: processes; 0 is one per core. Does not change a byte of the output.
        samples_per_shard: maps per tar file; plan for more shards than training has ranks times workers.
        max_side: longest side of a stored map, pixels; larger maps shrink by a whole factor, to a representative valid
            value of each block, so that missing and valid pixels never mix. 0 keeps every pixel.
        max_drop_fraction: a larger share of unusable files fails the run.
        folder: how to read people's own files (dataset ``folder`` only).
    """

    dataset: str
    root: str
    out: str
    workers: int = 0
    samples_per_shard: int = 512
    max_side: int = 0
    max_drop_fraction: float = 0.01
    folder: FolderOptions = field(default_factory=FolderOptions)


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: its number, the folder, the reader's name and the files with their keys."""

    index: int
    out: Path
    reader: str
    max_side: int
    items: list[DepthItem]
    keys: list[str]

    @property
    def file(self) -> str:
        return f"depth-{self.index:06d}.tar"


def prepare(config: PrepareConfig) -> dict:
    """Writes ``config.out`` and returns its manifest; a finished folder is verified and left alone.

    Raises:
        ConfigError: unknown dataset, a value out of range, or ``out`` holds something else.
        DataError: ``root`` has another layout, or too many of its files are unusable.
        Interrupted: stopped by a signal; the same command continues.
        ReportedError: ``out`` cannot be written, is in use, or a worker was killed.
    """
    reader = _reader(config.dataset)
    resolved = _resolve(config)
    # Not resolve(): the name of a linked category folder is the one the user sees.
    root, out = Path(os.path.abspath(config.root)), Path(config.out)
    if not root.is_dir():
        raise DataError(f"root {config.root} is not a folder")
    options = [getattr(config, config.dataset)] if hasattr(config, config.dataset) else []
    items = sorted(reader.items(root, *options), key=lambda item: item.source)
    keys = sample_keys(items)
    plan = {"config": resolved, "versions": library_versions()}
    listing = {"count": len(items), "sha256": digest_json([item.source for item in items])}

    with writing(out), exclusive(out) as already_finished:
        if already_finished:
            manifest = verify_finished(out, resolved, listing)
            print(f"{out} was finished before and is intact: {_total(manifest)}")
            return manifest
        continue_or_begin(out, plan)
        rows = _write_shards(config, out, items, keys)
        manifest = _manifest(reader, plan, listing, items, rows) | _origin(root)
        write_json(out / MANIFEST, manifest, out / PROGRESS)
    print(_summary(manifest))
    print(f"{_total(manifest)} in {out}")
    return manifest


def readers() -> list[str]:
    """The dataset names: the modules of this package that define ``items`` and ``read``."""
    names = []
    for module in iter_modules(data_prep.__path__):
        spec = util.find_spec(f"{data_prep.__name__}.{module.name}")
        source = (spec.loader.get_source(spec.name) or "") if not module.ispkg else ""
        if "\ndef items(" in source and "\ndef read(" in source:
            names.append(module.name)
    return names


def _reader(name: str) -> ModuleType:
    known = readers()
    if name not in known:
        raise ConfigError(f"unknown dataset {name!r}{suggestion(name, known)} (known: {', '.join(known)})")
    return import_module(f"{data_prep.__name__}.{name}")


def _resolve(config: PrepareConfig) -> dict:
    """The settings that influence a shard's bytes."""
    if config.samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard must be at least 1, got {config.samples_per_shard}")
    if config.max_side and config.max_side < SMALLEST_SIDE:
        raise ConfigError(f"max_side must be 0 or at least {SMALLEST_SIDE}, got {config.max_side}")
    if not 0 <= config.max_drop_fraction <= 1:
        raise ConfigError(f"max_drop_fraction must be within 0..1, got {config.max_drop_fraction}")
    if config.workers < 0:
        raise ConfigError(f"workers must be 0 or more, got {config.workers}")
    resolved = {key: getattr(config, key) for key in ("dataset", "samples_per_shard", "max_side")}
    if hasattr(config, config.dataset):
        resolved[config.dataset] = asdict(getattr(config, config.dataset))
    return resolved


def _write_shards(config: PrepareConfig, out: Path, items: list[DepthItem], keys: list[str]) -> list[dict]:
    """Writes every shard that is not yet there; the rows, in order."""
    size = config.samples_per_shard
    tasks = [
        ShardTask(start // size, out, config.dataset, config.max_side, items[start:][:size], keys[start:][:size])
        for start in range(0, len(items), size)
    ]
    expected = {task.file for task in tasks}
    for path in out.glob("*.tar"):
        # Left by a killed run whose root has shrunk since.
        if path.name not in expected:
            path.unlink()
    rows: dict[str, dict] = {}
    dropped: list[dict] = []
    with ExitStack() as stack:
        progress = stack.enter_context(Progress("prep", len(items), "maps"))
        finished = stack.enter_context(closing(run_tasks(write_shard, tasks, config.workers, progress.advance)))
        for row in finished:
            rows[row["file"]] = row
            dropped += row["dropped"]
            if len(dropped) > config.max_drop_fraction * len(items):
                dropped.sort(key=lambda drop: drop["path"])
                faults = "; ".join(f"{drop['path']}: {drop['reason']}" for drop in dropped[:5])
                more = f"; and {len(dropped) - 5} more" if len(dropped) > 5 else ""
                raise DataError(
                    f"{len(dropped)} of {len(items)} files are unusable, more than max_drop_fraction "
                    f"{config.max_drop_fraction} allows: {faults}{more}"
                )
    return [rows[task.file] for task in tasks]


def write_shard(task: ShardTask, tick: Callable[[int], None]) -> dict:
    """Writes one shard, or finds it written before, and returns its row; ``tick`` is called with each map done."""
    path, progress = task.out / task.file, task.out / PROGRESS
    row_path = progress / f"{task.file}.json"
    inputs = digest_json([task.keys, [[item.source, item.label, *_stamp(item.path)] for item in task.items]])
    row = _finished_row(row_path, path, inputs)
    if row is not None:
        tick(len(task.items))
        return row
    temporary = progress / temporary_name(task.file)
    reader = _reader(task.reader)
    dropped: list[dict] = []
    try:
        with open(temporary, "wb") as raw:
            file = _HashingFile(raw)
            with tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for key, item in zip(task.keys, task.items, strict=True):
                    try:
                        members = _members(reader, item, task.max_side)
                    except DataError as error:
                        dropped.append({"path": item.source, "reason": str(error)})
                    else:
                        for suffix, content in members:
                            tar.addfile(_header(f"{key}.{suffix}", len(content)), io.BytesIO(content))
                    tick(1)
            raw.flush()
            os.fsync(raw.fileno())
        samples = len(task.items) - len(dropped)
        if samples:
            os.replace(temporary, path)
        else:
            path.unlink(missing_ok=True)
        sync_folder(task.out)
    finally:
        temporary.unlink(missing_ok=True)
    row = {"file": task.file, "sha256": file.sha256.hexdigest(), "bytes": file.bytes, "samples": samples}
    row |= {"inputs": inputs, "dropped": dropped}
    write_json(row_path, row, progress)
    return row


def _members(reader: ModuleType, item: DepthItem, max_side: int) -> list[tuple[str, bytes]]:
    depth_map = reader.read(item)
    if min(depth_map.depth.shape) < SMALLEST_SIDE:
        raise DataError(f"{depth_map.depth.shape[0]}x{depth_map.depth.shape[1]} is below {SMALLEST_SIDE} pixels a side")
    if max_side:
        depth_map = shrink(depth_map, max_side)
    png, near, far = encode_png(depth_map)
    height, width = depth_map.depth.shape
    description = {
        **item.extra, "near": near, "far": far, "unit": UNIT[depth_map.kind], "kind": depth_map.kind,
        "source": item.source, "dataset": item.dataset, "category": item.category, "split": item.split,
        "label": item.label, "group": item.group, "height": height, "width": width,
        "valid_fraction": float(depth_map.valid.mean()),
    }  # fmt: skip
    return [("depth.png", png), ("json", json.dumps(description, sort_keys=True).encode())]


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


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of a raw file, so that a repaired file is read again."""
    try:
        status = path.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def _finished_row(row_path: Path, path: Path, inputs: str) -> dict | None:
    try:
        row = json.loads(row_path.read_bytes())
        intact = row["inputs"] == inputs and (row["samples"] == 0 or not file_fault(path, row))
        return row if intact else None
    except (OSError, ValueError, KeyError, TypeError):
        # Rows only save work: without one the shard is written again.
        return None


def _manifest(reader: ModuleType, plan: dict, listing: dict, items: list[DepthItem], rows: list[dict]) -> dict:
    dropped = [drop for row in rows for drop in row["dropped"]]
    unusable = {drop["path"] for drop in dropped}
    kept = [item for item in items if item.source not in unusable]
    if not kept:
        raise DataError(f"none of {len(items)} files is usable: {dropped[0]['path']}: {dropped[0]['reason']}")
    shards = [{key: row[key] for key in ("file", "sha256", "bytes", "samples")} for row in rows if row["samples"]]
    return {
        "format": FORMAT, "version": VERSION,
        "datasets": sorted({item.dataset for item in kept}),
        **reader.describe(items),
        "config": plan["config"], "config_hash": digest_json(plan["config"]),
        "versions": plan["versions"],
        "files_listed": listing,
        "total": len(kept),
        "counts": count((item.dataset, item.category, item.split, item.label) for item in kept),
        "shards": shards,
        "dropped": dropped,
    }  # fmt: skip


def _origin(root: Path) -> dict:
    """What a rendered tree says of itself: its licence is not that of the dataset whose layout it has."""
    for folder in (root, root.parent):
        if (folder / SYNTHETIC).is_file():
            try:
                stated = json.loads((folder / SYNTHETIC).read_text(encoding="utf-8"))
                return {"licence": str(stated["licence"]), "synthetic": True}
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{folder / SYNTHETIC}: not what synth writes: {error!r}") from None
    return {"synthetic": False}


def _total(manifest: dict) -> str:
    size = sum(shard["bytes"] for shard in manifest["shards"])
    unit = 2**30 if size >= 2**30 else 2**20
    return (
        f"{manifest['total']} maps in {len(manifest['shards'])} shards, {size / unit:.1f} {'GM'[unit == 2**20]}iB, "
        f"{len(manifest['dropped'])} files dropped"
    )


def _summary(manifest: dict) -> str:
    """A table of samples per category and split, at most 80 columns wide."""
    rows = {}
    for categories in manifest["counts"].values():
        for category, splits in categories.items():
            rows[category] = {split: sum(labels.values()) for split, labels in splits.items()}
    names = sorted({split for row in rows.values() for split in row})
    if len(names) > 4:
        rows, names = {category: {"maps": sum(row.values())} for category, row in rows.items()}, ["maps"]
    lines = [f"{'category':24}" + "".join(f"{name[:13]:>14}" for name in names)]
    lines += [
        f"{category[:24]:24}" + "".join(f"{row.get(name, 0):14}" for name in names) for category, row in rows.items()
    ]
    return "\n".join(lines)
