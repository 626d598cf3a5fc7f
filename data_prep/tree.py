"""The files of a raw dataset by their names: a folder, an archive, or a folder of archives."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.archives import ARCHIVE, RawFile, hidden, index_archive
from dino_depth.errors import DataError

__all__ = ["RawTree", "refuse_link_out", "refuse_links_out", "walk"]


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
        # None: lies in the folder itself. Objects for ten million files would take gigabytes.
        self._files: dict[str, RawFile | None] = {}
        self._mounted = False
        if self.root.is_dir():
            self._files = dict.fromkeys(walk(self.root))
        elif self.root.is_file() and ARCHIVE.search(self.root.name):
            self._files = index_archive(self.root, self.root.name)
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
        return self._files[name] or RawFile(str(self.root), name)

    def find(self, pattern: str) -> list[tuple[re.Match[str], str]]:
        """The match and name of every file whose name matches, sorted; where none does, the same in the archives.

        Args:
            pattern: regular expression for the whole of ``<name of root>/<name of file>``, so that a group for the
                category also matches where ``root`` is one category's folder.
        """
        expression = re.compile(pattern)
        return [(expression.fullmatch(f"{self.name}/{name}"), name) for name in self.find_names(pattern)]

    def find_names(self, pattern: str) -> list[str]:
        """As :meth:`find`, the names alone."""
        expression = re.compile(pattern)
        found = [name for name in self.names if expression.fullmatch(f"{self.name}/{name}")]
        return found or (self.find_names(pattern) if self.mount_archives() else [])

    @property
    def plain(self) -> bool:
        """Whether every file lies in the folder itself, none in an archive."""
        return not any(self._files.values())

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
            members = index_archive(self.root / archive, archive)
            # Some archives hold the folder of their own name, others only its content.
            inner = stem.rpartition("/")[2] + "/"
            wrapped = all(name.startswith(inner) for name in members)
            prefix = stem.removesuffix(inner[:-1]) if wrapped else stem + "/"
            added |= {prefix + name: file for name, file in members.items()}
        self._files = added | self._files
        return bool(added)


def walk(root: Path) -> Iterator[str]:
    """The names of all visible files below a folder, relative to it; links within it are followed, but not in circles.

    Raises:
        DataError: a folder cannot be listed, or a link leads out of ``root``: what is copied, shown or published would
            then be files that nobody meant to give.
    """
    inside, waiting = os.path.realpath(root), [(str(root), "", frozenset())]
    while waiting:
        folder, prefix, above = waiting.pop()
        try:
            status = os.stat(folder)
            if (here := (status.st_dev, status.st_ino)) in above:
                continue
            with os.scandir(folder) as listed:
                entries = [entry for entry in listed if not hidden(entry.name)]
        except OSError as error:
            raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from None
        for entry in entries:
            if entry.is_symlink():
                refuse_link_out(entry.path, inside)
            if entry.is_dir():
                waiting.append((entry.path, f"{prefix}{entry.name}/", above | {here}))
            else:
                yield prefix + entry.name


def refuse_links_out(root: str | Path):
    """For readers that list folders by themselves; raises DataError as `walk`."""
    for _ in walk(Path(root)):
        pass


def refuse_link_out(link: str | Path, root: str | Path):
    """Raises DataError where ``link`` is one that leads out of the folder ``root``, itself no link."""
    target = os.path.realpath(link)
    if os.path.commonpath([target, root]) != str(root):
        raise DataError(f"{link} is a link to {target}, out of root {root}: name a root that holds both, or copy it")
