"""Raw datasets to depth shards: planned up front, written in parallel, atomically and resumably.

The sorted list of a dataset's files is cut into chunks of ``samples_per_shard``; one worker turns one chunk into one
tar. So a shard's bytes depend on its chunk alone, not on the number of workers, the order of a directory listing or on
how often the run was killed. Until the manifest is written, ``OUT/.progress`` holds the configuration, one row per
finished shard and every unfinished file.

``prepare`` does all of it in one process and its workers. A cluster does the same in pieces: ``plan`` and ``begin``
once, ``write_share`` for any subset of the tasks, anywhere, and ``finish`` at the end.
"""

import json
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Literal

from data_prep import pseudo_depth
from data_prep.folder import FolderOptions
from data_prep.item import sample_keys, shared_keys
from data_prep.listing import Listing, known_reader, list_source, table, verdict
from data_prep.manifest import count, digest_json, digest_pieces, library_versions, stored_shards
from data_prep.output import continue_or_begin, exclusive, places, publish, shared, verify_finished, writing
from data_prep.plausibility import PlausibilityConfig, check_limits
from data_prep.pseudo_depth import PseudoDepthConfig
from data_prep.real_iad_d3 import RealIadD3Options
from data_prep.shard_writer import (
    SMALLEST_SIDE,
    ShardTask,
    finished_rows,
    makes_images,
    reader_module,
    upload,
    write_shard,
)
from data_prep.visa import VisaOptions
from data_prep.workers import run_tasks
from dino_depth.errors import ConfigError, DataError
from dino_depth.progress import Progress
from dino_depth.shard_format import FORMAT, INVERSE_VERSION, VERSION
from dino_depth.shard_index import INDEX, SampleIndex, read_index
from dino_depth.storage import RemotePath
from dino_depth.terminal import plain, say

__all__ = ["Plan", "PrepareConfig", "begin", "finish", "plan", "prepare", "write_share"]

MISSING_SHOWN = 3


@dataclass
class PrepareConfig:
    """Raw datasets to shards.

    Attributes:
        dataset: one reader: mvtec3d, eyecandies, real_iad_d3, mvtec_ad, mvtec_loco, mvtec_ad2, visa, or folder for any
            directory of depth files.
        root: its raw data: a folder, one category's folder, an archive or a folder of archives.
        out: folder or fsspec URL for the shards and their manifest; continued where a killed run left it.
        workers: processes; 0 is one per core (images on a GPU: one per GPU). Does not change a byte of the output.
        samples_per_shard: maps per tar file; plan for more shards than training has ranks times workers.
        max_side: longest side of a stored map, pixels; larger maps shrink by a whole factor, to a representative valid
            value of each block, so that missing and valid pixels never mix. 0 keeps every pixel.
        coding: of depth in the 16-bit PNGs: linear, or inverse for scenes with a part near and a wall far away, whose
            codes are linear in inverse depth: finest where it is near.
        plausible: what a map must be like to be stored; one that is not counts as unusable.
        max_drop_fraction: a larger share of unusable files of a dataset fails the run.
        sources: several readers, into one folder of shards, instead of ``dataset``.
        roots: the raw data of each of ``sources``: ``--roots.visa /data/VisA``.
        dry_run: print what is found beside the published counts, and stop.
        staging: local folder for what is being written, where ``out`` is a URL; empty means one in the cache folder
            (``$DINO_DEPTH_CACHE``, else ``~/.cache/dino-depth``). On several machines, one that all of them see.
        folder: how to read people's own files (dataset ``folder`` only).
        real_iad_d3: what the files of Real-IAD D3 mean.
        visa: which of VisA's tables of splits counts.
        pseudo_depth: how images become depth (datasets of images only).
    """

    writes_to_urls: ClassVar[bool] = True

    dataset: str = ""
    root: str = ""
    out: str = ""
    workers: int = 0
    samples_per_shard: int = 512
    max_side: int = 0
    coding: Literal["linear", "inverse"] = "linear"
    plausible: PlausibilityConfig = field(default_factory=PlausibilityConfig)
    max_drop_fraction: float = 0.01
    sources: list[str] = field(default_factory=list)
    roots: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False
    staging: str = ""
    folder: FolderOptions = field(default_factory=FolderOptions)
    real_iad_d3: RealIadD3Options = field(default_factory=RealIadD3Options)
    visa: VisaOptions = field(default_factory=VisaOptions)
    pseudo_depth: PseudoDepthConfig = field(default_factory=PseudoDepthConfig)


@dataclass(frozen=True)
class Plan:
    """What will be written.

    Attributes:
        out: folder of the shards, or of those on their way to ``remote``.
        config: the settings that influence a shard's bytes.
        versions: the libraries that may.
        listings: the files of each dataset.
        listed: what tells them from others, by dataset.
        tasks: the shards, dataset after dataset.
        workers: as configured.
        max_drop_fraction: as configured.
        remote: where the shards go, if that is a URL.
    """

    out: Path
    config: dict
    versions: dict[str, str]
    listings: list[Listing]
    listed: dict[str, dict]
    tasks: list[ShardTask]
    workers: int
    max_drop_fraction: float
    remote: RemotePath | None = None

    @property
    def destination(self) -> Path | RemotePath:
        return self.remote or self.out


def prepare(config: PrepareConfig) -> dict:
    """Writes ``config.out`` and returns its manifest; a finished folder is verified and left alone.

    With ``dry_run`` it prints what it finds, writes nothing and returns {}.

    Raises:
        ConfigError: unknown dataset, a value out of range, ``out`` holds something else or was begun differently, or
            the model of pseudo-depth is not to be had.
        DataError: a root has another layout, or too many of its files are unusable.
        Interrupted: stopped by a signal; the same command continues.
        ReportedError: ``out`` cannot be written, is in use, or a worker was killed.
    """
    if config.dry_run:
        for name, root in _sources(config).items():
            print(table(list_source(name, root, _options(config, name))) + "\n", flush=True)
        return {}
    planned = plan(config)
    with writing(planned.out), exclusive(planned.out, planned.remote) as already_finished:
        if already_finished:
            manifest = verify_finished(planned.destination, planned.config, planned.listed)
            intact = "complete (sizes compared)" if planned.remote else "intact"
            say(f"{planned.destination} was finished before and is {intact}: {_total(manifest)}")
            return manifest
        begin(planned)
        return _finish(planned, _write(planned, planned.tasks))


def plan(config: PrepareConfig, device: str = "") -> Plan:
    """Lists every raw file and deals them to shards; writes nothing.

    Args:
        device: what images become depth on, ``cuda`` or ``cpu``, where other machines do it; empty: decided here.
    """
    sources = _sources(config)
    if not config.out:
        raise ConfigError("out is empty: name a folder for the shards")
    resolved = _resolve(config, sources)
    out, remote = places(config.out, config.staging)
    model = None
    if "pseudo_depth" in resolved:
        model = pseudo_depth.resolve(config.pseudo_depth, device)
        resolved["pseudo_depth"] |= {"model": model.identity, "revision": model.revision, "device": model.device}
    listings = [list_source(name, root, _options(config, name)) for name, root in sources.items()]
    for listing in listings:
        if not listing.origin["synthetic"]:
            say(verdict(listing))
    names = Counter(listing.dataset for listing in listings)
    if twice := [name for name, uses in names.items() if uses > 1]:
        raise ConfigError(f"two sources are called {twice[0]}: give one another folder.name")
    meeting = shared_keys(lambda: chain.from_iterable(listing.items for listing in listings))
    size, tasks = config.samples_per_shard, []
    shards = sum(-(-len(listing.items) // size) for listing in listings)
    for listing in listings:
        estimation = (model, config.pseudo_depth) if listing.images else (None, None)
        for start in range(0, len(listing.items), size):
            chunk = listing.items[start : start + size]
            # With each shard only those that it needs.
            own = meeting and meeting.intersection(key.lower() for key in sample_keys(chunk, frozenset()))
            common = {"remote": remote, "coding": config.coding, "plausible": config.plausible, "of": shards}
            task = ShardTask(len(tasks), out, listing.reader, config.max_side, chunk, own, *estimation, **common)
            tasks.append(task)
    # As a folder's JSON gives it back: lists instead of tuples.
    resolved = json.loads(json.dumps(resolved))
    versions = library_versions() | (model.versions if model else {})
    listed = {listing.dataset: listing.listed for listing in listings}
    return Plan(out, resolved, versions, listings, listed, tasks, config.workers, config.max_drop_fraction, remote)


def begin(planned: Plan):
    """Notes the plan in ``out``, which the caller holds, and removes what a killed run left there."""
    continue_or_begin(planned.out, {"config": planned.config, "versions": planned.versions}, planned.remote)
    expected = {task.file for task in planned.tasks}
    # Left by a killed run whose root has shrunk since.
    for name in stored_shards(planned.out).keys() - expected:
        (planned.out / name).unlink()
    for name in (stored_shards(planned.remote) if planned.remote else {}).keys() - expected:
        (planned.remote / name).remove()


def write_share(planned: Plan, tasks: list[ShardTask]):
    """Writes some of the shards; other processes, on any machine, may write the others at the same time.

    Of the plan it needs neither the listings nor the tasks that others write.
    """
    with writing(planned.out), shared(planned.out, planned.remote):
        _write(planned, tasks)


def finish(planned: Plan) -> dict:
    """Verifies that every shard is there and writes the manifest.

    Raises:
        DataError: a shard is missing or damaged: the same command writes exactly those that are.
    """
    with writing(planned.out), exclusive(planned.out, planned.remote) as already_finished:
        if already_finished:
            return verify_finished(planned.destination, planned.config, planned.listed)
        rows = finished_rows(planned.tasks)
        if missing := [file for file, row in rows.items() if row is None]:
            more = ", ..." if len(missing) > MISSING_SHOWN else ""
            raise DataError(
                f"{planned.destination}: {len(missing)} of {len(rows)} shards are not written "
                f"({', '.join(missing[:MISSING_SHOWN])}{more}): run the same command again to write them"
            )
        for task in planned.tasks:
            upload(task, rows[task.file])
        return _finish(planned, rows)


def _sources(config: PrepareConfig) -> dict[str, str]:
    """The root of every source."""
    if config.dataset and config.sources:
        raise ConfigError(f"dataset {config.dataset!r} and sources {config.sources} contradict: give one")
    if config.dataset:
        if config.roots:
            raise ConfigError(f"dataset {config.dataset!r} is read from root; roots belongs to sources")
        known_reader(config.dataset, "dataset")
        if not config.root:
            raise ConfigError(f"root is empty: name the folder or archive of {config.dataset}")
        return {config.dataset: config.root}
    if not config.sources:
        raise ConfigError("no dataset is named: give one, or sources with roots (see configs/prep)")
    if config.root:
        raise ConfigError(f"root {config.root} belongs to dataset; sources are read from roots")
    if len(set(config.sources)) < len(config.sources):
        raise ConfigError(f"sources names a dataset twice: {config.sources}")
    for name in config.roots:
        known_reader(name, "roots")
    for name in config.sources:
        known_reader(name, "sources")
        if not config.roots.get(name):
            others = [other for other in config.sources if config.roots.get(other)]
            raise ConfigError(
                f"roots.{name} is empty: name the folder or archive of {name}, or leave it out with "
                f"--sources '[{','.join(others)}]'"
            )
    return {name: config.roots[name] for name in config.sources}


def _options(config: PrepareConfig, name: str) -> Any:
    return getattr(config, name, None)


def _resolve(config: PrepareConfig, sources: Iterable[str]) -> dict:
    """The settings that influence a shard's bytes."""
    if config.samples_per_shard < 1:
        raise ConfigError(f"samples_per_shard must be at least 1, got {config.samples_per_shard}")
    if config.max_side and config.max_side < SMALLEST_SIDE:
        raise ConfigError(f"max_side must be 0 or at least {SMALLEST_SIDE}, got {config.max_side}")
    if not 0 <= config.max_drop_fraction <= 1:
        raise ConfigError(f"max_drop_fraction must be between 0 and 1, got {config.max_drop_fraction}")
    if config.workers < 0:
        raise ConfigError(f"workers must be 0 or more, got {config.workers}")
    check_limits(config.plausible)
    options = {name: _options(config, name) for name in sources}
    resolved = {
        "sources": {name: asdict(value) if value is not None else {} for name, value in options.items()},
        "samples_per_shard": config.samples_per_shard,
        "max_side": config.max_side,
        "coding": config.coding,
        "plausible": asdict(config.plausible),
    }
    if any(makes_images(reader_module(name)) for name in sources):
        resolved["pseudo_depth"] = asdict(config.pseudo_depth)
    return resolved


def _write(planned: Plan, tasks: list[ShardTask]) -> dict[str, dict]:
    """Writes the shards that are not yet there; the rows of all, by file."""
    rows: dict[str, dict] = {}
    faults, datasets = Counter(), {task.file: task.items[0].dataset for task in tasks}
    depth = [task for task in tasks if task.model is None]
    images = [task for task in tasks if task.model is not None]
    with Progress("prep", sum(len(task.items) for task in tasks), "maps") as progress:
        # Depth on every core; then images, where a GPU serves one process.
        for share in (depth, images):
            workers = planned.workers or (pseudo_depth.processes(share[0].model) if share is images and share else 0)
            with closing(run_tasks(write_shard, share, workers, progress.advance)) as finished:
                for row in finished:
                    rows[row["file"]] = row
                    dataset = datasets[row["file"]]
                    faults[dataset] += sum(not drop["flat"] for drop in row["dropped"])
                    if faults[dataset] > planned.max_drop_fraction * planned.listed[dataset]["count"]:
                        _refuse_many_faults(planned, rows)
    return rows


def _refuse_many_faults(planned: Plan, rows: dict[str, dict]):
    """Flat pseudo-depth is expected of some textures; only files that cannot be used count as faults."""
    for dataset, drops in _dropped(planned, rows).items():
        faults = sorted((drop for drop in drops if not drop["flat"]), key=lambda drop: drop["path"])
        files = planned.listed[dataset]["count"]
        if len(faults) > planned.max_drop_fraction * files:
            shown = "; ".join(f"{drop['path']}: {drop['reason']}" for drop in faults[:5])
            more = f"; and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise DataError(
                f"{dataset}: {len(faults)} of {files} files are unusable, more than max_drop_fraction "
                f"{planned.max_drop_fraction} allows: {shown}{more}"
            )


def _dropped(planned: Plan, rows: dict[str, dict]) -> dict[str, list[dict]]:
    """The files without a map, by dataset, in the order of the shards."""
    dropped: dict[str, list[dict]] = {}
    for task in planned.tasks:
        dropped.setdefault(task.items[0].dataset, []).extend(rows.get(task.file, {"dropped": []})["dropped"])
    return dropped


def _finish(planned: Plan, rows: dict[str, dict]) -> dict:
    """Writes the manifest and prints what it says."""
    _refuse_many_faults(planned, rows)
    manifest = _manifest(planned, [rows[task.file] for task in planned.tasks], _dropped(planned, rows))
    parts = (read_index(task.index_path) for task in planned.tasks if rows[task.file]["samples"])
    index = SampleIndex.join(parts).pieces()
    size = sum(memoryview(piece).nbytes for piece in index)
    manifest["index"] = {"file": INDEX, "sha256": digest_pieces(index), "bytes": size}
    publish(planned.out, planned.remote, manifest, index)
    print(_summary(manifest))
    say(f"{_total(manifest)} in {planned.destination}")
    return manifest


def _manifest(planned: Plan, rows: list[dict], dropped: dict[str, list[dict]]) -> dict:
    sources, kept = {}, Counter()
    for listing in planned.listings:
        unusable = {drop["path"] for drop in dropped[listing.dataset]}
        maps, alone, scenes = 0, 0, set()
        for item in listing.items:
            if item.source not in unusable:
                maps, alone = maps + 1, alone + (not item.group)
                kept[item.dataset, item.category, item.split, item.label] += 1
                scenes |= {(item.category, item.group)} if item.group else set()
        if not maps:
            first = dropped[listing.dataset][0]
            raise DataError(
                f"none of {len(listing.items)} files of {listing.dataset} is usable: {first['path']}: {first['reason']}"
            )
        sources[listing.dataset] = {
            "reader": listing.reader, **listing.description, **listing.origin,
            "files_listed": listing.listed, "maps": maps,
            # Maps of one scene, under several lights, are near-duplicates: training may take one of them an epoch.
            "scenes": alone + len(scenes),
            "dropped": dropped[listing.dataset],
        }  # fmt: skip
        if listing.images:
            model = next(task.model for task in planned.tasks if task.reader == listing.reader)
            stated = {"model": model.identity, "revision": model.revision, "licence": model.licence}
            sources[listing.dataset]["pseudo_depth"] = stated
    return {
        "format": FORMAT, "version": INVERSE_VERSION if planned.config["coding"] == "inverse" else VERSION,
        "sources": sources,
        "config": planned.config, "config_hash": digest_json(planned.config),
        "versions": planned.versions,
        "total": kept.total(),
        "counts": count(kept),
        "shards": [{key: row[key] for key in ("file", "sha256", "bytes", "samples")} for row in rows if row["samples"]],
    }  # fmt: skip


def _total(manifest: dict) -> str:
    size = sum(shard["bytes"] for shard in manifest["shards"])
    unit = 2**30 if size >= 2**30 else 2**20
    drops = [drop for source in manifest["sources"].values() for drop in source["dropped"]]
    flat = sum(drop["flat"] for drop in drops)
    text = f"{manifest['total']} maps in {len(manifest['shards'])} shards, {size / unit:.1f} {'GM'[unit == 2**20]}iB, "
    return text + f"{len(drops) - flat} files dropped" + (f", {flat} flat images left out" if flat else "")


def _summary(manifest: dict) -> str:
    """A table of samples per category and split, at most 80 columns wide."""
    parts = []
    for dataset, categories in manifest["counts"].items():
        rows = {
            category: {split: sum(labels.values()) for split, labels in splits.items()}
            for category, splits in categories.items()
        }
        names = sorted({split for row in rows.values() for split in row})
        if len(names) > 4:
            rows, names = {category: {"maps": sum(row.values())} for category, row in rows.items()}, ["maps"]
        head = "category" if len(manifest["counts"]) == 1 else dataset
        parts.append(f"{head[:24]:24}" + "".join(f"{name[:13]:>14}" for name in names))
        parts += [
            f"{category[:24]:24}" + "".join(f"{row.get(name, 0):14}" for name in names)
            for category, row in rows.items()
        ]
    return "\n".join(map(plain, parts))
