"""A folder of features by the content they were computed from, bounded in bytes, the least recently used removed first.

    <sha256 of the key>.features    sha256 of the rest, 32 bytes; float16, little-endian, in C order
    <sha256 of the key>.HOST.PROCESS.part   being written
    lock                            locked while files are written and removed; holds the bytes of all entries, as text

Any number of processes may use a folder at once. Whatever stops a process, an entry is whole or absent; one that was
damaged later does not match its own sha256, is removed and counts as absent. The bytes in ``lock`` are never fewer than
there are, so the folder, which may hold a hundred thousand entries, is looked at only where they reach the limit, and
once by every process.
"""

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
from dino_depth.lock import NO_LOCKS

__all__ = ["DIGEST", "FeatureCache"]

DIGEST = hashlib.sha256().digest_size
SUFFIX, PARTIAL = ".features", ".part"
STALE_SECONDS = 3600  # a younger partial file may be another process's
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
        self._warned = self._looked = False

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
            with self._exclusive() as lock:
                sizes = {key: 2 * array.size + DIGEST for key, array in arrays.items()}
                roomy = sum(sizes.values()) <= self.limit and self._reserve(lock, sum(sizes.values()))
                for key, array in arrays.items():
                    if roomy or self._reserve(lock, sizes[key]):
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

    def _reserve(self, lock: int, size: int) -> bool:
        """Counts ``size`` bytes more, after making room where they would exceed the limit."""
        if size > self.limit:
            if not self._warned:
                log.warning("one entry of %s has %d bytes, more than its limit: not stored", self.folder, size)
            self._warned = True
            return False
        text = os.pread(lock, 32, 0)
        used = int(text) if text.isdigit() else None
        if used is None or not self._looked or used + size > self.limit:
            used = self._make_room(size)
        self._looked = True
        # Before anything is stored: whatever stops the process, they are not too few.
        os.ftruncate(lock, 0)
        os.pwrite(lock, str(used + size).encode(), 0)
        return True

    def _make_room(self, size: int) -> int:
        """Removes what a kill left behind, and old entries until ``size`` bytes more are within the limit.

        Returns:
            The bytes of what is left.
        """
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
        return used - size

    @contextmanager
    def _exclusive(self) -> Iterator[int]:
        """The descriptor of the lock's file, held."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self._looked = False  # others may write the same number at the same time: only the folder says it
            yield lock
        finally:
            os.close(lock)
