"""One depth file of a raw dataset: where it lies, what it shows, and its key in the shards."""

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dino_depth.errors import DataError

__all__ = ["SYNTHETIC", "DepthItem", "relative_source", "sample_keys", "subfolders", "unexpected_layout"]

# Lies at the root of a rendered tree and says so; real datasets have no such file.
SYNTHETIC = "SYNTHETIC.json"
# A ustar header holds 155 characters of folders and 100 of a name with its suffix.
LONGEST_NAME = 70


@dataclass(frozen=True)
class DepthItem:
    """One depth file.

    Attributes:
        dataset: name of the dataset in the shards.
        category: object category, in the dataset's own spelling.
        split: the dataset's own split name.
        label: "good", a defect's name, or "unknown" where the labels are not published.
        stem: the dataset's own name of the sample within its category, split and label.
        path: the file to read.
        source: ``path`` relative to the dataset's folder, with forward slashes.
        group: id of the scene; maps of one scene must not be parted by a split. None: every map is its own scene.
        extra: further JSON values that go into the sample's ``json``.
        options: what the reader needs to decode the file.
    """

    dataset: str
    category: str
    split: str
    label: str
    stem: str
    path: Path
    source: str
    group: str | None = None
    extra: dict[str, str | int | float | None] = field(default_factory=dict)
    options: Any = None


def sample_keys(items: list[DepthItem]) -> list[str]:
    """The key ``dataset/category/split-label-stem`` of every item, unique without regard to case.

    WebDataset ends a key at the first dot of its last component, so every character but ASCII letters, digits, ``_``
    and ``-`` becomes ``_``; keys that meet thereby get a checksum of their source. Long names are cut, with a checksum.

    Raises:
        DataError: two items have one source.
    """
    keys = []
    for item in items:
        folders = [_tar_name(name) for name in (item.dataset, item.category)]
        keys.append("/".join([*folders, _tar_name(f"{item.split}-{item.label}-{item.stem}")]))
    uses = Counter(key.lower() for key in keys)
    for index, item in enumerate(items):
        if uses[keys[index].lower()] > 1:
            keys[index] += f"-{_checksum(item.source)}"
    for key, count in Counter(key.lower() for key in keys).items():
        if count > 1:
            sources = [item.source for item, other in zip(items, keys, strict=True) if other.lower() == key]
            raise DataError(f"{count} files share the sample key {key}: {', '.join(sources[:4])}")
    return keys


def _tar_name(name: str) -> str:
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", name) or "_"
    return clean if len(clean) <= LONGEST_NAME else f"{clean[: LONGEST_NAME - 9]}-{_checksum(name)}"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def relative_source(path: Path, root: Path) -> str:
    """``path`` below ``root`` with forward slashes."""
    return path.relative_to(root).as_posix()


def subfolders(folder: Path) -> list[Path]:
    """The visible folders in ``folder``, sorted by name; empty where ``folder`` is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def unexpected_layout(root: Path, dataset: str, expected: str) -> DataError:
    """The error of a reader that finds none of its files: what it looked for and what lies there instead."""
    found: list[str] = []
    folder = root
    # One way down is enough to recognise a tree: the first folder of the first folder, and so on.
    for _ in range(4):
        entries = sorted(folder.iterdir())
        names = [entry.name + "/" * entry.is_dir() for entry in entries[:3]] + ["..."] * (len(entries) > 3)
        found.append(", ".join(names))
        folder = next((entry for entry in entries if entry.is_dir()), None)
        if folder is None:
            break
    listing = " > ".join(names for names in found if names) or "nothing"
    return DataError(f"{root} is not a {dataset} tree: expected {expected}, found {listing}")
