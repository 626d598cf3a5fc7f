"""The folder that shards are written to: nobody else's, one writer at a time, continued after a kill.

Shards for a URL (``remote``) are written to a local staging folder ``out``, which has the same lock, plan and rows, and
each is moved when it is finished. The manifest is uploaded last: a remote folder without one is unfinished.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from data_prep.manifest import config_differences, stored_shards, sync_folder, verify_files, write_file, write_json
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.lock import EXCLUSIVE, SHARED, locked
from dino_depth.shard_format import MANIFEST, read_manifest
from dino_depth.shard_index import INDEX
from dino_depth.storage import RemotePath, default_cache, location

__all__ = ["PROGRESS", "continue_or_begin", "exclusive", "places", "publish", "shared", "verify_finished", "writing"]

PROGRESS = ".progress"
PLAN = "config.json"
# What the Hub puts into a new repository.
BESIDE_SHARDS = {".gitattributes", "README.md"}


def places(out: str, staging: str) -> tuple[Path, RemotePath | None]:
    """The local folder to write to, and the remote one that its shards are moved to, if ``out`` is a URL.

    Raises:
        ConfigError: ``out`` is a web server, or ``staging`` is given for a local folder.
    """
    place = location(out)
    if not isinstance(place, RemotePath):
        if staging:
            raise ConfigError(f"staging {staging} belongs to an out that is a URL; out is {out}")
        return place, None
    if place.read_only:
        raise ConfigError(f"out {place}: web servers are read only: write to a store (s3://, hf://) or a local folder")
    name = hashlib.sha256(place.url.encode()).hexdigest()[:16]
    return (Path(staging) if staging else default_cache() / "staging" / name), place


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns a full disk, missing permission and the like into one line."""
    try:
        yield
    except OSError as error:
        raise ReportedError(f"cannot write {error.filename or out}: {error.strerror or error}") from error


@contextmanager
def exclusive(out: Path, remote: RemotePath | None = None) -> Iterator[bool]:
    """Holds ``out`` for this process alone; yields whether a finished folder was found, ``remote`` if that is given.

    The lock is the kernel's, so a killed process leaves none behind. Its file lies in the progress folder, which the
    holder removes when ``out`` is finished: whoever gets the lock of a removed file tries again.

    Raises:
        ConfigError: ``out`` is no folder, holds something else, or another process writes it.
    """
    progress = out / PROGRESS
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out {out} is not a folder")
    if remote is not None and not (progress / PLAN).exists():
        found = remote.sizes()
        if MANIFEST in found:
            yield True
            return
        if foreign := sorted(found.keys() - BESIDE_SHARDS):
            raise ConfigError(
                f"out {remote} holds {foreign[0]}, no {MANIFEST}, and was not begun from staging folder {out}: "
                "choose another folder, or give the staging folder it was begun from"
            )
        if not progress.exists():
            (out / MANIFEST).unlink(missing_ok=True)
    if remote is None and (out / MANIFEST).exists() and not progress.exists():
        yield True
        return
    if out.exists() and not progress.exists() and any(out.iterdir()):
        raise ConfigError(f"out {out} is not empty and holds no shards of this program: choose another folder")
    with _locked(out, remote, EXCLUSIVE):
        if remote is not None:
            # It notes that the remote one is written, but not that it is still there.
            (out / MANIFEST).unlink(missing_ok=True)
        yield (out / MANIFEST).exists()
        if (out / MANIFEST).exists():
            for path in progress.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            shutil.rmtree(progress)
            sync_folder(out)
            if remote is not None:
                (out / MANIFEST).unlink()
                for folder in out.glob("[0-9][0-9][0-9]"):
                    folder.rmdir()
                with suppress(OSError):  # other files lie in it, which are not ours
                    out.rmdir()


@contextmanager
def shared(out: Path, remote: RemotePath | None = None) -> Iterator[None]:
    """Holds ``out`` together with other processes that write other shards of the same plan.

    Raises:
        ConfigError: the folder was not begun, or a process holds it for itself.
    """
    if not (out / PROGRESS / PLAN).exists():
        place = "" if remote is None else " (on several machines, staging must be a folder that all of them see)"
        raise ConfigError(
            f"out {_name(out, remote)} was not begun, or is finished: "
            f"start from the command that plans the shards{place}"
        )
    with _locked(out, remote, SHARED):
        yield


def _name(out: Path, remote: RemotePath | None) -> str:
    return str(out) if remote is None else f"{remote} (staged in {out})"


def _locked(out: Path, remote: RemotePath | None, kind: int) -> AbstractContextManager[None]:
    return locked(out / PROGRESS / "lock", kind, f"out {_name(out, remote)} is being written by another process")


def verify_finished(out: Path | RemotePath, resolved: dict, listed: dict[str, dict]) -> dict:
    """The manifest of a finished folder, of whose remote shards only the sizes are compared with it.

    Raises:
        ConfigError: it was made with another configuration or from other files.
        DataError: a shard is missing, extra or damaged.
    """
    manifest = read_manifest(out)
    _refuse_other_config(str(out), {"config": resolved}, {"config": manifest["config"]})
    for dataset, files in listed.items():
        before = manifest["sources"].get(dataset, {}).get("files_listed")
        if before != files:
            raise ConfigError(
                f"out {out} was prepared from {(before or {}).get('count')} files of {dataset}, "
                f"root now holds {files['count']} or other ones: choose another folder"
            )
    if isinstance(out, RemotePath):
        _verify_sizes(out, manifest)
    else:
        verify_files(out, manifest)
    return manifest


def _verify_sizes(remote: RemotePath, manifest: dict):
    sizes = stored_shards(remote)
    listed = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    for name in sorted(sizes.keys() - listed.keys()):
        raise DataError(f"{remote / name} is not in {MANIFEST}")
    for name, size in listed.items():
        if name not in sizes:
            raise DataError(f"{remote / name}: the shard is missing")
        if sizes[name] != size:
            raise DataError(f"{remote / name}: {sizes[name]} bytes, the manifest says {size}")


def publish(out: Path, remote: RemotePath | None, manifest: dict, index: Iterable[bytes | memoryview]):
    """Writes the index and, last, the manifest of a folder whose shards are all there.

    Of a remote folder a copy of the manifest in ``out`` notes that it is written.

    Raises:
        DataError: a shard is missing, extra or of another size.
    """
    if remote is None:
        write_file(out / INDEX, index, out / PROGRESS)
        write_json(out / MANIFEST, manifest, out / PROGRESS)
        return
    _verify_sizes(remote, manifest)
    path = out / PROGRESS / INDEX
    write_file(path, index, out / PROGRESS)
    (remote / INDEX).put(path)
    path = out / PROGRESS / MANIFEST
    write_json(path, manifest, out / PROGRESS)
    (remote / MANIFEST).put(path)
    os.replace(path, out / MANIFEST)


def _refuse_other_config(out: str, ours: dict, theirs: dict):
    differences = config_differences(ours, theirs)
    if differences:
        raise ConfigError(f"out {out} was begun differently: {'; '.join(differences)}: choose another folder")


def continue_or_begin(out: Path, plan: dict, remote: RemotePath | None = None):
    """Notes the plan (configuration and library versions) of a new folder; refuses one begun with another plan."""
    for path in (out / PROGRESS).rglob("*.tmp"):
        path.unlink(missing_ok=True)
    path = out / PROGRESS / PLAN
    if not path.exists():
        write_json(path, plan, out / PROGRESS)
        return
    try:
        begun = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: remove {out} and start again") from error
    _refuse_other_config(_name(out, remote), plan, begun)
