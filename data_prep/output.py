"""The folder that shards are written to: nobody else's, one writer at a time, continued after a kill."""

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.manifest import MANIFEST, config_differences, read_manifest, sync_folder, verify_files, write_json
from dino_depth.errors import ConfigError, ReportedError

__all__ = ["PROGRESS", "continue_or_begin", "exclusive", "shared", "verify_finished", "writing"]

PROGRESS = ".progress"
PLAN = "config.json"
# Some cluster file systems are mounted without them.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns a full disk, missing permission and the like into one line."""
    try:
        yield
    except OSError as error:
        raise ReportedError(f"cannot write {error.filename or out}: {error.strerror or error}") from error


@contextmanager
def exclusive(out: Path) -> Iterator[bool]:
    """Holds ``out`` for this process alone; yields whether a finished folder was found.

    The lock is the kernel's, so a killed process leaves none behind. Its file lies in the progress folder, which the
    holder removes when ``out`` is finished: whoever gets the lock of a removed file tries again.

    Raises:
        ConfigError: ``out`` is no folder, holds something else, or another process writes it.
    """
    progress = out / PROGRESS
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out {out} is not a folder")
    if (out / MANIFEST).exists() and not progress.exists():
        yield True
        return
    if out.exists() and not progress.exists() and any(out.iterdir()):
        raise ConfigError(f"out {out} is not empty and holds no shards of this program: choose another folder")
    with _locked(out, fcntl.LOCK_EX):
        yield (out / MANIFEST).exists()
        if (out / MANIFEST).exists():
            for path in progress.iterdir():
                if path.name != "lock":
                    path.unlink()
            shutil.rmtree(progress)
            sync_folder(out)


@contextmanager
def shared(out: Path) -> Iterator[None]:
    """Holds ``out`` together with other processes that write other shards of the same plan.

    Raises:
        ConfigError: the folder was not begun, or a process holds it for itself.
    """
    if not (out / PROGRESS / PLAN).exists():
        raise ConfigError(f"out {out} was not begun, or is finished: start from the command that plans the shards")
    with _locked(out, fcntl.LOCK_SH):
        yield


@contextmanager
def _locked(out: Path, kind: int) -> Iterator[None]:
    path = out / PROGRESS / "lock"
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino == os.stat(path).st_ino:
                break
        except BlockingIOError:
            os.close(lock)
            raise ConfigError(f"out {out} is being written by another process") from None
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{out}: this file system has no locks, so nothing keeps a second run out", file=sys.stderr)
            break
        os.close(lock)
    try:
        yield
    finally:
        os.close(lock)


def verify_finished(out: Path, resolved: dict, listed: dict[str, dict]) -> dict:
    """The manifest of a finished folder.

    Raises:
        ConfigError: it was made with another configuration or from other files.
        DataError: a shard is missing, extra or damaged.
    """
    manifest = read_manifest(out)
    _refuse_other_config(out, {"config": resolved}, {"config": manifest["config"]})
    for dataset, files in listed.items():
        before = manifest["sources"].get(dataset, {}).get("files_listed")
        if before != files:
            raise ConfigError(
                f"out {out} was prepared from {(before or {}).get('count')} files of {dataset}, "
                f"root now holds {files['count']} or other ones: choose another folder"
            )
    verify_files(out, manifest)
    return manifest


def _refuse_other_config(out: Path, ours: dict, theirs: dict):
    differences = config_differences(ours, theirs)
    if differences:
        raise ConfigError(f"out {out} was begun differently: {'; '.join(differences)}: choose another folder")


def continue_or_begin(out: Path, plan: dict):
    """Notes the plan (configuration and library versions) of a new folder; refuses one begun with another plan."""
    for path in (out / PROGRESS).glob("*.tmp"):
        path.unlink(missing_ok=True)
    path = out / PROGRESS / PLAN
    if not path.exists():
        write_json(path, plan, out / PROGRESS)
        return
    try:
        begun = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: remove {out} and start again") from error
    _refuse_other_config(out, plan, begun)
