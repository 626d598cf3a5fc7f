"""The files of a raw dataset where they lie: in a folder, or in the archives that a dataset is published in.

Nothing is unpacked. Members of a zip or a plain tar are read at their place. A compressed tar can only be read
forwards, so its files have an order, and whoever reads them in that order decompresses the archive once.

Archives are untrusted: names that lead outside, files of absurd size and files that grow a thousandfold are refused.
"""

import bz2
import gzip
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from dino_depth.errors import DataError

__all__ = ["RawFile", "RawTree"]

LARGEST_FILE = 2**31
# deflate reaches 1030 to 1 on zeros only; no depth map or photograph comes near.
LARGEST_RATIO = 500
RATIO_MATTERS = 2**26
COMPRESSED = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".txz": lzma.open, ".bz2": bz2.open}
ARCHIVE = re.compile(r"\.(zip|tar|tgz|txz|tar\.(gz|xz|bz2))$", re.IGNORECASE)
# Small descriptions beside the data are read while a compressed tar is indexed: going back for them would decompress
# everything before them again. Of pictures the header is kept, which holds their size.
DESCRIPTIONS = (".json", ".yaml", ".yml", ".csv")
KEPT_DESCRIPTIONS = 2**28  # bytes in all
HEAD = 64
BROKEN = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, RuntimeError,
          NotImplementedError)  # fmt: skip


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
            with open(self.path, "rb", buffering=0) as file:
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
            with open(self.path, "rb") as file:
                return file.read(HEAD)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}") from error


@lru_cache(maxsize=8)
def _zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


@lru_cache(maxsize=8)
def _tar(path: str) -> BinaryIO:
    """The decompressed bytes of a tar; going back in a compressed one starts from its beginning."""
    return COMPRESSED.get(os.path.splitext(path)[1].lower(), open)(path, "rb")


class RawTree:
    """Every visible file below a folder, or in an archive, by its name relative to it.

    Args:
        root: a folder or an archive (zip, tar, tar.gz, tar.xz, tar.bz2).

    Raises:
        DataError: there is no such folder or archive, a folder cannot be listed, or the archive is broken or hostile.
    """

    def __init__(self, root: str | Path):
        # Not resolve(): the name of a linked folder is the one the user sees.
        self.root = Path(os.path.abspath(root))
        self.name = ARCHIVE.sub("", self.root.name)
        self._files: dict[str, RawFile] = {}
        self._mounted = False
        if self.root.is_dir():
            self._files = {name: RawFile(str(self.root), name) for name in _walk(self.root)}
        elif self.root.is_file() and ARCHIVE.search(self.root.name):
            self._files = _index(self.root, self.root.name)
            self._mounted = True
        elif self.root.exists():
            raise DataError(f"root {root} is neither a folder nor a zip or tar archive")
        else:
            raise DataError(f"root {root} is not a folder: nothing is there")

    @property
    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> RawFile:
        return self._files[name]

    def find(self, pattern: str) -> list[tuple[re.Match[str], str]]:
        """The match and name of every file whose name matches, sorted; where none does, the same in the archives.

        Args:
            pattern: regular expression for the whole of ``<name of root>/<name of file>``, so that a group for the
                category also matches where ``root`` is one category's folder.
        """
        expression = re.compile(pattern)
        found = self._matching(expression)
        if not found and self.mount_archives():
            found = self._matching(expression)
        return found

    def _matching(self, expression: re.Pattern[str]) -> list[tuple[re.Match[str], str]]:
        tried = ((expression.fullmatch(f"{self.name}/{name}"), name) for name in self.names)
        return [(match, name) for match, name in tried if match]

    def mount_archives(self) -> bool:
        """Adds the files in the archives below ``root``, as if each were unpacked beside itself.

        An archive is left out where it lies beside a folder of its name. Returns whether files were added.
        """
        if self._mounted:
            return False
        self._mounted = True
        folders = {name[: place.start()] for name in self._files for place in re.finditer("/", name)}
        added: dict[str, RawFile] = {}
        for archive in [name for name in sorted(self._files) if ARCHIVE.search(name)]:
            stem = ARCHIVE.sub("", archive)
            if stem in folders:
                continue
            members = _index(self.root / archive, archive)
            # Some archives hold the folder of their own name, others only its content.
            inner = stem.rpartition("/")[2] + "/"
            wrapped = all(name.startswith(inner) for name in members)
            prefix = stem.removesuffix(inner[:-1]) if wrapped else stem + "/"
            added |= {prefix + name: file for name, file in members.items()}
        self._files = added | self._files
        return bool(added)


def _walk(root: Path) -> Iterator[str]:
    """The names of all visible files below a folder; links are followed, but not in circles."""

    def fail(error: OSError):
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}")

    above: dict[str, frozenset[tuple[int, int]]] = {str(root): frozenset()}
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        status = os.stat(folder)
        here = above.pop(folder) | {(status.st_dev, status.st_ino)}
        entered = []
        for name in sorted(subfolders):
            path = os.path.join(folder, name)
            status = os.stat(path)
            if not _hidden(name) and (status.st_dev, status.st_ino) not in here:
                entered.append(name)
                above[path] = here
        subfolders[:] = entered
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/" if folder != str(root) else ""
        yield from (prefix + name for name in files if not _hidden(name))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _index(path: Path, shown: str) -> dict[str, RawFile]:
    """Every visible file in an archive, by a clean name.

    Args:
        shown: the archive's name in messages and in the order of reading.
    """
    indexing = _index_zip if path.suffix.lower() == ".zip" else _index_tar
    found = {}
    try:
        for file in indexing(path, shown):
            name = _clean(file.member, path)
            if name and not any(map(_hidden, name.split("/"))):
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
    sequential, compressed = path.suffix.lower() in COMPRESSED, path.stat().st_size
    links: list[tuple[str, str]] = []
    seen: dict[str, RawFile] = {}
    end, kept = 0, 0
    with tarfile.open(path, "r:*" if sequential else "r:") as archive:
        for member in archive:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE * member.isreg()
            if sequential:
                _refuse_bomb(path, member.name, end, compressed)
            if member.issym() or member.islnk():
                folder = os.path.dirname(member.name) if member.issym() else ""
                links.append((member.name, os.path.normpath(os.path.join(folder, member.linkname))))
            elif member.issparse():
                raise DataError(f"{path}: its member {member.name!r} is a sparse file: pack the archive again")
            elif member.isreg():
                file = RawFile(str(path), member.name, member.size, member.mtime, member.offset_data)
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
    if not sequential:
        with open(path, "rb") as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                # Cut between two members, a tar would simply seem to hold fewer.
                raise DataError(f"{path}: cut short after {len(seen)} files: it lacks the mark at its end")
    for name, target in links:
        if target not in seen:
            raise DataError(f"{path}: its member {name!r} is a link to {target!r}, which it does not hold")
        yield replace(seen[target], member=name)
