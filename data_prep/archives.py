"""Files of a raw dataset in the archives it is published in, read at their place.

Nothing is unpacked. Members of a zip or a plain tar are read anywhere. A compressed tar can only be read forwards, so
its files have an order, and whoever reads them in that order decompresses the archive once.

Archives are untrusted: names that lead outside, files of absurd size and files that grow five-hundredfold are refused.
"""

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from dino_depth.errors import DataError

__all__ = ["ARCHIVE", "RawFile", "hidden", "index_archive"]

LARGEST_FILE = 2**31
# deflate reaches 1030 to 1 on zeros only; no depth map or photograph comes near.
LARGEST_RATIO = 500
RATIO_MATTERS = 2**26
# By their first bytes: what an archive is called says nothing (Eyecandies ships tars named .zip).
COMPRESSED = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}
ZIP = (b"PK\3\4", b"PK\5\6", b"PK\7\x08")
ARCHIVE = re.compile(r"\.(zip|tar|tgz|txz|tar\.(gz|xz|bz2))$", re.IGNORECASE)
# Small descriptions beside the data are read while a compressed tar is indexed: going back for them would decompress
# everything before them again. Of pictures the header is kept, which holds their size.
DESCRIPTIONS = (".json", ".yaml", ".yml", ".csv")
KEPT_DESCRIPTIONS = 2**28  # bytes in all
HEAD = 64
PADDING = 2**16
LARGEST_HEADER = 2**28  # a kept description is read at once as well
BROKEN = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, RuntimeError,
          NotImplementedError, KeyError)  # fmt: skip


@dataclass(frozen=True)
class RawFile:
    """One file of a raw dataset; small, and readable in any process.

    Attributes:
        container: the folder or archive it lies in.
        member: its name there, with forward slashes.
        size: bytes; None in a folder, where nobody looked yet.
        time: when it was changed, as its archive says.
        offset: where its content begins in a tar, after decompression; None elsewhere.
        order: place in the order of reading; (container, offset) in a compressed tar, the same for all others.
        content: the whole content, of a small description in a compressed tar.
        head: the first 64 bytes, of a file in a compressed tar.
    """

    container: str
    member: str
    size: int | None = None
    time: float = 0.0
    offset: int | None = None
    order: tuple[str, int] = ("", 0)
    content: bytes | None = None
    head: bytes | None = None

    @property
    def name(self) -> str:
        return self.member.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return os.path.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        """The ending with its dot, lower case."""
        return os.path.splitext(self.name)[1].lower()

    @property
    def path(self) -> Path | None:
        """Where it lies on disk; None in an archive."""
        return Path(self.container, self.member) if self.size is None else None

    def __str__(self) -> str:
        return os.path.join(self.container, self.member)

    def stamp(self) -> tuple[int, int]:
        """Size and time, so that a repaired file is read again."""
        if self.path is None:
            return self.size, round(self.time * 10**9)
        try:
            status = self.path.stat()
        except OSError:
            return -1, -1
        return status.st_size, status.st_mtime_ns

    def read(self, most: int = LARGEST_FILE) -> bytes:
        """The content.

        Raises:
            DataError: it cannot be read, is empty, is larger than ``most``, or is not what its archive promises. The
                reason names neither the file nor this machine.
        """
        if self.content is not None:
            content = self.content
        else:
            if self.size is not None and self.size > most:
                raise DataError(f"the file is larger than {most >> 20} MiB")
            try:
                content = self._read(most)
            except OSError as error:
                raise DataError(f"cannot be read: {error.strerror or error}") from error
            except BROKEN as error:
                raise DataError(f"cannot be read from its archive ({type(error).__name__}: {error})") from error
        if not content:
            raise DataError("the file is empty")
        if len(content) > most:
            raise DataError(f"the file is larger than {most >> 20} MiB")
        if self.size is not None and len(content) != self.size:
            raise DataError(f"its archive promises {self.size} bytes and holds {len(content)}")
        return content

    def _read(self, most: int) -> bytes:
        if self.path is not None:
            with open(self.path, "rb", opener=_at_once) as file:
                # Asking for ``most`` bytes would allocate as many.
                return file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
        if self.offset is None:
            with _zip(self.container).open(self.member) as file:
                return file.read(most + 1)
        file = _tar(self.container)
        file.seek(self.offset)
        return file.read(self.size)

    def read_head(self) -> bytes:
        """The first 64 bytes, or fewer."""
        if self.head is not None:
            return self.head
        if self.path is None:
            return self.read()[:HEAD]
        try:
            with open(self.path, "rb", opener=_at_once) as file:
                return file.read(HEAD)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from error


def _at_once(path: str, flags: int) -> int:
    """Opens a file; a pipe among the files is empty, instead of waiting for a writer forever."""
    return os.open(path, flags | os.O_NONBLOCK)


@lru_cache(maxsize=8)
def _zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=8)
def _tar(path: str) -> BinaryIO:
    """The decompressed bytes of a tar; going back in a compressed one starts from its beginning."""
    return _open_tar(path)


def _open_tar(path: str) -> BinaryIO:
    return (_compression(path) or open)(path, "rb")


def _compression(path: str | Path) -> Callable[..., BinaryIO] | None:
    """What opens a compressed tar; None for any other file."""
    with open(path, "rb") as file:
        start = file.read(8)
    return next((opened for magic, opened in COMPRESSED.items() if start.startswith(magic)), None)


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(262)
    # A zip may stand behind a program that unpacks it, and a tar may hold a zip at its end.
    is_tar = start[257:] == b"ustar" or _compression(path) is not None
    return start.startswith(ZIP) or (not is_tar and zipfile.is_zipfile(path))


class _TarStream:
    """What tarfile reads a tar from while it is indexed: refuses absurd sizes, and keeps what was read last."""

    def __init__(self, file: BinaryIO):
        self.file, self.last = file, b""
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            # Python would take the memory before it reads.
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self.file.read(size)
        return self.last


def hidden(name: str) -> bool:
    """Whether a file or folder of that name is no part of a dataset."""
    return name.startswith(".") or name == "__MACOSX"


def index_archive(path: Path, shown: str) -> dict[str, RawFile]:
    """Every visible file in an archive, by a clean name.

    Args:
        shown: the archive's name in the order of reading.

    Raises:
        DataError: it is broken, cut short, encrypted or hostile.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    found = {}
    try:
        indexing = _index_zip if _is_zip(path) else _index_tar
        for file in indexing(path, shown):
            name = _clean(file.member, path)
            if name and not any(map(hidden, name.split("/"))):
                found[name] = file
    except DataError:
        raise
    except BROKEN as error:
        raise DataError(f"{path}: not a readable archive ({type(error).__name__}: {error})") from error
    return found


def _clean(member: str, archive: Path) -> str:
    parts = [part for part in member.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts or member.startswith(("/", "\\")) or "\0" in member or re.match("[A-Za-z]:", member):
        raise DataError(f"{archive}: its member {member!r} would lie outside of it: the archive is damaged or hostile")
    return "/".join(parts)


def _index_zip(path: Path, shown: str) -> Iterator[RawFile]:
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            if entry.flag_bits & 1:
                raise DataError(f"{path}: its member {entry.filename!r} is encrypted")
            _refuse_bomb(path, entry.filename, entry.file_size, entry.compress_size)
            # The checksum tells two contents apart that the coarse times of a zip do not.
            yield RawFile(str(path), entry.filename, entry.file_size, float(entry.CRC))


def _refuse_bomb(path: Path, member: str, size: int, compressed: int):
    if size > RATIO_MATTERS and size > LARGEST_RATIO * compressed:
        raise DataError(
            f"{path}: {compressed} bytes grow to {size} with its member {member!r}: the archive is damaged or hostile"
        )


def _index_tar(path: Path, shown: str) -> Iterator[RawFile]:
    sequential, compressed = _compression(path) is not None, path.stat().st_size
    links: list[tuple[str, str]] = []
    seen: dict[str, RawFile] = {}
    kept = 0
    with _open_tar(str(path)) as file, tarfile.open(fileobj=(stream := _TarStream(file)), mode="r:") as archive:
        for member in archive:
            if member.size < 0:
                # Followed, it would lead back, and round in circles.
                raise DataError(f"{path}: its member {member.name!r} has {member.size} bytes: the archive is damaged")
            if sequential:
                _refuse_bomb(path, member.name, member.offset_data + member.size, compressed)
            if member.issym() or member.islnk():
                folder = os.path.dirname(member.name) if member.issym() else ""
                links.append((member.name, os.path.normpath(os.path.join(folder, member.linkname))))
            elif member.issparse():
                raise DataError(f"{path}: its member {member.name!r} is a sparse file: pack the archive again")
            elif member.isreg():
                time = float(member.mtime) if 0 <= member.mtime < 2**40 else 0.0
                file = RawFile(str(path), member.name, member.size, time, member.offset_data)
                if sequential:
                    keep = member.name.lower().endswith(DESCRIPTIONS) and kept + member.size <= KEPT_DESCRIPTIONS
                    kept += member.size * keep
                    early = archive.extractfile(member).read(None if keep else HEAD)
                    file = replace(file, order=(shown, member.offset_data), head=early[:HEAD])
                    file = replace(file, content=early) if keep else file
                seen[os.path.normpath(member.name)] = file
                yield file
            # tarfile remembers every header; nobody asks for them again.
            archive.members = []
        if stream.last != bytes(tarfile.BLOCKSIZE):
            # Cut or damaged between two members, a tar would simply seem to hold fewer.
            raise DataError(f"{path}: cut short after {len(seen)} files: it lacks the mark at its end")
        # The checksum of a compressed archive stands at its end, behind some padding.
        stream.read(PADDING)
    for name, target in links:
        if target not in seen:
            raise DataError(f"{path}: its member {name!r} is a link to {target!r}, which it does not hold")
        yield replace(seen[target], member=name)
