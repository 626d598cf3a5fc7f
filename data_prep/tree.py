"""The files of a raw dataset by their names: a folder, an archive, or a folder of archives."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.archives import ARCHIVE, RawFile, hidden, index_archive
from dino_depth.errors import DataError

__all__ = ["RawTree"]


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
            members = index_archive(self.root / archive, archive)
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

    def identity(folder: str) -> tuple[int, int]:
        try:
            status = os.stat(folder)
        except OSError as error:
            fail(error)
        return status.st_dev, status.st_ino

    above: dict[str, frozenset[tuple[int, int]]] = {str(root): frozenset()}
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        here = above.pop(folder) | {identity(folder)}
        entered = []
        for name in sorted(subfolders):
            path = os.path.join(folder, name)
            if not hidden(name) and identity(path) not in here:
                entered.append(name)
                above[path] = here
        subfolders[:] = entered
        prefix = os.path.relpath(folder, root).replace(os.sep, "/") + "/" if folder != str(root) else ""
        yield from (prefix + name for name in files if not hidden(name))
