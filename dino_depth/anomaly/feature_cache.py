"""A folder of features by the content they were computed from, bounded in bytes, the least recently used removed first.

    <sha256 of the key>.features    sha256 of the rest, 32 bytes; float16, little-endian, in C order
    <sha256 of the key>.HOST.PROCESS.part   being written
    lock                            locked while files are written and removed

Any number of processes may use a folder at once. Whatever stops a process, an entry is whole or absent; one that was
damaged later does not match its own sha256, is removed and counts as absent.
"""

import errno
import fcntl
import hashlib
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from pathlib import Path

import numpy as np

from dino_depth.errors import ConfigError, ReportedError

__all__ = ["FeatureCache"]

DIGEST = hashlib.sha256().digest_size
SUFFIX, PARTIAL = ".features", ".part"
STALE_SECONDS = 3600  # a younger partial file may be another process's
# Some cluster file systems are mounted without locks; two writers may then exceed the limit by what each of them adds.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
log = getLogger("dino_depth")


class FeatureCache:
    """Arrays of float16 by key.

    Args:
        folder: where; made when something is stored.
        gib: size that its files never exceed, GiB. Each process keeps to its own limit.

    Raises:
        ConfigError: ``gib`` is not above 0.
    """

    def __init__(self, folder: str | Path, gib: float = 20.0):
        if not gib > 0:
            raise ConfigError(f"limit of the feature cache must be above 0 GiB, got {gib}")
        self.folder, self.limit = Path(folder), int(gib * 2**30)
        self._warned = False

    def read(self, key: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The array of a key, or None where there is none.

        Args:
            key: hexadecimal.
            shape: what it has.
        """
        path = self.folder / f"{key}{SUFFIX}"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ReportedError(f"{path}: {error.strerror or error}") from error
        payload = memoryview(content)[DIGEST:]
        if len(payload) != 2 * int(np.prod(shape)) or hashlib.sha256(payload).digest() != content[:DIGEST]:
            log.warning("%s is damaged: its features are computed again", path)
            path.unlink(missing_ok=True)
            return None
        try:
            # The kernel's own time stamps tell only some milliseconds apart.
            os.utime(path, ns=(time.time_ns(), time.time_ns()))
        except FileNotFoundError:
            pass  # another process made room meanwhile
        return np.frombuffer(payload, "<f2").reshape(shape)

    def write(self, arrays: Mapping[str, np.ndarray]):
        """Stores float16 arrays; those that are too large for the limit are left out.

        Raises:
            ReportedError: the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._exclusive():
                # One look at the folder for all that fit together: it may hold a hundred thousand entries.
                together = sum(2 * array.size + DIGEST for array in arrays.values())
                roomy = together <= self.limit and self._make_room(together)
                for key, array in arrays.items():
                    if roomy or self._make_room(2 * array.size + DIGEST):
                        self._store(key, np.ascontiguousarray(array, "<f2").tobytes())
        except OSError as error:
            reason = f"feature cache {self.folder}: {error.strerror or error}"
            raise ReportedError(f"{reason}: free some space, or name another folder or none") from error

    def _store(self, key: str, payload: bytes):
        partial = self.folder / f"{key}.{socket.gethostname()}.{os.getpid()}{PARTIAL}"
        with open(partial, "wb") as file:
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
        os.utime(partial, ns=(time.time_ns(), time.time_ns()))
        os.replace(partial, self.folder / f"{key}{SUFFIX}")

    def _make_room(self, size: int) -> bool:
        """Removes what a kill left behind, and old entries until ``size`` bytes more are within the limit."""
        if size > self.limit:
            if not self._warned:
                log.warning("one entry of %s has %d bytes, more than its limit: not stored", self.folder, size)
            self._warned = True
            return False
        entries = []
        for entry in os.scandir(self.folder):
            try:
                state = entry.stat()
            except FileNotFoundError:
                continue  # without locks: another process has removed or renamed it
            if entry.name.endswith(SUFFIX):
                entries.append((state.st_mtime_ns, entry.name, state.st_size))
            elif entry.name.endswith(PARTIAL) and time.time() - state.st_mtime > STALE_SECONDS:
                Path(entry.path).unlink(missing_ok=True)
        used = size + sum(entry[2] for entry in entries)
        for _, name, taken in sorted(entries) if used > self.limit else ():
            if used <= self.limit:
                break
            (self.folder / name).unlink(missing_ok=True)
            used -= taken
        return True

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            yield
        finally:
            os.close(lock)
