"""Shard folders by path or fsspec URL, and a bounded local cache of the shards that are read from URLs.

A location is a local path or a URL with ``://`` (``file://`` is a local path). :func:`location` makes a ``Path`` of the
first and a :class:`RemotePath` of the second, which has the few operations of a path that shard folders need.

Local shards are opened where they lie. Remote ones are copied to the cache folder, which several processes share::

    <sha256>.tar            a shard, verified; its modification time is when it was last opened
    <sha256>.<bytes>.lock   locked by whoever fetches that shard; reserves so many bytes
    <sha256>.part           what has arrived of it
    lock                    locked while files are removed, and bytes reserved or given back

Traps: the files never take more than the limit, but an evicted file keeps its disk blocks as long as somebody holds it
open, so a shard is opened for each read and closed after it. File systems may replace the file they download to, so it
cannot carry the lock. aiohttp ends every request after five minutes by default, a large shard's too.
"""

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec import AbstractFileSystem

from dino_depth.config import suggestion
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.urls import redacted, refuse_secrets, refuse_url

__all__ = ["RemotePath", "ShardCache", "default_cache", "location", "open_shard"]

WAITS = (1.0, 4.0, 16.0)  # seconds before each further attempt
STALL_SECONDS = 60.0  # without a byte from a web server
POLL_SECONDS = 0.1
READ_ONLY = ("http", "https")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Client errors that a later attempt may not meet: time-outs, conflicting uploads, too many requests.
PASSING_STATUS = (408, 409, 412, 423, 425, 429)
PERMANENT = (PermissionError, NotImplementedError, IsADirectoryError, NotADirectoryError, TypeError, ValueError)


@dataclass(frozen=True)
class RemotePath:
    """A file or folder at a URL, with the operations of a path that shard folders need.

    What the network or the server does wrong is tried again, and then raised as one line.

    Attributes:
        url: without a slash at its end.

    Raises:
        ConfigError: by every method: the protocol is unknown or needs a package that is not installed.
        ReportedError: by every method: the network or the server fails, or refuses.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.url}/{name}")

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.url.rpartition("/")[0])

    @property
    def read_only(self) -> bool:
        return self.url.partition("://")[0] in READ_ONLY

    def resolve(self) -> "RemotePath":
        return self

    def read_bytes(self) -> bytes:
        """The whole file; raises FileNotFoundError where there is none."""
        return _attempt(self.url, lambda files, path: files.cat_file(path))

    def size(self) -> int | None:
        """Bytes of the file; None where there is none, or the server does not say."""

        def measure(files: AbstractFileSystem, path: str) -> int | None:
            files.invalidate_cache()
            return files.info(path)["size"]

        try:
            return _attempt(self.url, measure)
        except FileNotFoundError:
            return None

    def sizes(self) -> dict[str, int | None]:
        """Bytes of every file in the folder by name, and None for every folder in it; empty where there is nothing."""

        def measure(files: AbstractFileSystem, path: str) -> dict[str, int | None]:
            files.invalidate_cache()
            found = {}
            for entry in files.ls(path, detail=True):
                # Object stores may list an empty object for the folder itself.
                if entry["name"].strip("/") != path.strip("/") or entry["size"]:
                    name = entry["name"].rstrip("/").rpartition("/")[2]
                    found[name] = entry["size"] if entry["type"] == "file" else None
            return found

        try:
            return _attempt(self.url, measure)
        except FileNotFoundError:
            return {}

    def get(self, local: Path):
        """Copies the file to ``local``; raises FileNotFoundError where there is none, OSError where a disk is full."""
        _attempt(self.url, lambda files, path: files.get_file(path, str(local)))

    def put(self, local: Path):
        """Copies ``local`` here and compares the sizes."""
        try:
            _attempt(self.url, lambda files, path: files.put_file(str(local), path))
        except FileNotFoundError as error:
            raise ReportedError(f"{self}: cannot be written: {_one_line(error)}") from error
        there, here = self.size(), local.stat().st_size
        if there != here:
            raise ReportedError(f"{self}: {there} bytes after an upload of {here}: run the same command again")

    def remove(self):
        """Removes the file, if there is one."""
        if self.size() is not None:
            _attempt(self.url, lambda files, path: files.rm_file(path))


def location(text: str) -> Path | RemotePath:
    """Where a path or URL points to.

    Raises:
        ConfigError: a command instead of a URL, or the URL holds what may be secret.
    """
    if "://" not in text:
        return Path(text)
    if text.startswith(("file://", "local://")):
        return Path(fsspec.core.url_to_fs(text)[1])
    if not re.match(r"[\w+.:-]+://", text):
        # WebDataset's pipes. The rest of the command may hold what is secret.
        first = text.replace(":", " ").split()[0]
        raise ConfigError(f"{first}: no command is run to read data: name a folder or a URL")
    refuse_secrets(text)
    return RemotePath(text.rstrip("/"))


def _filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL, and the path in it. fsspec keeps one for each process and thread."""
    protocol, options = url.partition("://")[0], {}
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or protocol
        raise ConfigError(f"{url}: {protocol}:// needs the package {package}: pip install {package}") from error
    except ValueError as error:
        near = suggestion(protocol, fsspec.available_protocols())
        raise ConfigError(f"{url}: unknown protocol {protocol!r}{near}") from error
    if protocol in READ_ONLY:
        import aiohttp

        patience = aiohttp.ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
        options = {"client_kwargs": {"timeout": patience, "trust_env": True}}
    return fsspec.core.url_to_fs(url, **options)


def _attempt(url: str, action: Callable[[AbstractFileSystem, str], Any]) -> Any:
    for wait in (*WAITS, None):
        try:
            return action(*_filesystem(url))
        except (FileNotFoundError, ReportedError):
            raise
        except Exception as error:  # each file system has its own kinds of failures
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise
            if wait is None or _is_permanent(error):
                raise ReportedError(f"{url}: {_one_line(error)}") from error
            time.sleep(wait)


def _is_permanent(error: Exception) -> bool:
    answer = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(answer, "status_code", None) or 0
    return isinstance(error, PERMANENT) or (400 <= status < 500 and status not in PASSING_STATUS)


def _one_line(error: Exception) -> str:
    # Of what a store signed, an error repeats the signature.
    text = redacted(" ".join(str(error).split()))
    return text or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)


def default_cache() -> Path:
    """The cache folder where none is named: ``$DINO_DEPTH_CACHE``, else ``~/.cache/dino-depth``.

    Raises:
        ConfigError: the variable holds a URL.
    """
    named = os.environ.get("DINO_DEPTH_CACHE", "")
    refuse_url(named, "DINO_DEPTH_CACHE")
    return Path(named or Path.home() / ".cache" / "dino-depth")


class ShardCache:
    """Local copies of remote shards by their content, the least recently opened removed beyond a limit.

    Any number of processes and threads may use one folder: a shard is fetched by one of them, the others wait for it.

    Args:
        folder: where; empty means :func:`default_cache`.
        gib: size that the copies never exceed, GiB. Each process keeps to its own.

    Raises:
        ConfigError: ``gib`` is not above 0.
    """

    def __init__(self, folder: str | Path = "", gib: float = 100.0):
        if not gib > 0:
            raise ConfigError(f"cache_gib must be above 0, got {gib}")
        self.folder, self.limit = Path(folder) if folder else default_cache(), int(gib * 2**30)

    def open(self, source: RemotePath, row: dict, fresh: bool = False) -> BinaryIO:
        """A shard for reading.

        Args:
            source: the shard.
            row: its row of the manifest.
            fresh: fetch it also where there is a copy.

        Raises:
            ConfigError: the shard alone is beyond the limit.
            DataError: it is missing, or its size or content is not what ``row`` says, twice.
            ReportedError: the network fails, or the cache folder cannot be written.
        """
        sha256, size = row["sha256"], row["bytes"]
        if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)) or type(size) is not int:
            raise DataError(f"{source}: the manifest says sha256 {sha256!r} and {size!r} bytes")
        if size > self.limit:
            raise ConfigError(
                f"{source}: {size / 2**30:.3g} GiB in one shard, cache_gib is {self.limit / 2**30:.3g}: raise it"
            )
        path = self.folder / f"{sha256}.tar"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if fresh:
                self._drop(path)
            while True:
                if file := self._held(path, size) or self._fetch(source, sha256, size, path):
                    return file
        except OSError as error:
            reason = f"cache {self.folder}: {error.strerror or error}"
            if error.errno in DISK_FULL:
                reason += f" ({source}, {size / 2**20:.1f} MiB): free some space, lower cache_gib, "
                reason += "or name another folder with cache or DINO_DEPTH_CACHE"
            raise ReportedError(reason) from error

    def _held(self, path: Path, size: int) -> BinaryIO | None:
        try:
            file = open(path, "rb")  # noqa: SIM115 - the caller closes it
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size == size:
            _touch(file)
            return file
        file.close()
        self._drop(path)
        return None

    def _drop(self, path: Path):
        with self._exclusive():
            path.unlink(missing_ok=True)

    def _fetch(self, source: RemotePath, sha256: str, size: int, path: Path) -> BinaryIO | None:
        """None where another process fetched the shard, or took all the room, for as long as this waited."""
        claim, part = self.folder / f"{sha256}.{size}.lock", self.folder / f"{sha256}.part"
        lock, roomy = -1, False
        try:
            with self._exclusive():
                lock = os.open(claim, os.O_RDWR | os.O_CREAT, 0o644)
                mine = _try_lock(lock)
                roomy = mine and not path.exists() and self._make_room(size, claim)
                if mine and not roomy:
                    claim.unlink()
            if roomy:
                return _download(source, sha256, size, part, path)
            if not mine:
                fcntl.flock(lock, fcntl.LOCK_EX)
            elif not path.exists():
                time.sleep(POLL_SECONDS)
            return None
        finally:
            # Where nobody can claim meanwhile: so a claim that nobody locks was left by a kill.
            with self._exclusive():
                if roomy:
                    part.unlink(missing_ok=True)
                    claim.unlink()
                if lock >= 0:
                    os.close(lock)

    def _make_room(self, size: int, claim: Path) -> bool:
        """Removes old shards until ``size`` bytes more are within the limit; False where others have reserved it."""
        reserved, shards = size, []
        for path in self.folder.iterdir():
            if re.fullmatch(r"[0-9a-f]{64}\.tar", path.name):
                shards.append((path.stat(), path))
            elif path != claim and (found := re.fullmatch(r"([0-9a-f]{64})\.(\d+)\.lock", path.name)):
                lock = os.open(path, os.O_RDWR)
                if _try_lock(lock):
                    (self.folder / f"{found[1]}.part").unlink(missing_ok=True)
                    path.unlink()
                else:
                    reserved += int(found[2])
                os.close(lock)
        if reserved > self.limit:
            return False
        used = reserved + sum(state.st_size for state, _ in shards)
        for state, path in sorted(shards, key=lambda shard: shard[0].st_mtime_ns):
            if used <= self.limit:
                break
            path.unlink(missing_ok=True)
            used -= state.st_size
        return True

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _touch(file: BinaryIO):
    # The kernel's own time stamps tell only some milliseconds apart.
    os.utime(file.fileno(), ns=(time.time_ns(), time.time_ns()))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _download(source: RemotePath, sha256: str, size: int, part: Path, path: Path) -> BinaryIO:
    """Fetches a shard by way of ``part`` to ``path``; what was damaged on its way arrives whole the second time."""
    for _ in range(2):
        there = source.size()
        if there is not None and there != size:
            fault = f"{there} bytes, the manifest says {size}"
            continue
        try:
            source.get(part)
        except FileNotFoundError as error:
            raise DataError(f"{source}: the shard is missing") from error
        # Opened before it has its name: nobody can remove it in between.
        file = open(part, "rb")  # noqa: SIM115 - the caller closes it
        arrived = os.fstat(file.fileno()).st_size
        if arrived == size and hashlib.file_digest(file, "sha256").hexdigest() == sha256:
            file.seek(0)
            os.fsync(file.fileno())
            _touch(file)
            os.replace(part, path)
            return file
        file.close()
        wrong_size = f"{arrived} bytes, the manifest says {size}"
        fault = "its sha256 differs from the manifest's" if arrived == size else wrong_size
    raise DataError(f"{source}: {fault}")


def open_shard(folder: Path | RemotePath, row: dict, cache: ShardCache) -> BinaryIO:
    """A shard of a folder for reading: where it lies, or its copy in the cache. ``row`` is its row of the manifest."""
    if isinstance(folder, RemotePath):
        return cache.open(folder / row["file"], row)
    return open(folder / row["file"], "rb")
