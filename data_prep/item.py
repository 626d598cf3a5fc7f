"""One depth map or image of a raw dataset: where it lies, what it shows, and its key in the shards."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.archives import RawFile
from data_prep.formats import decode_image
from data_prep.tree import RawTree
from dino_depth.errors import DataError

__all__ = [
    "SYNTHETIC", "FolderItems", "Item", "Published", "find_items", "read_image", "repeated", "sample_keys",
    "shared_keys", "unexpected_layout",
]  # fmt: skip

# Lies at the root of a rendered tree and says so; real datasets have no such file.
SYNTHETIC = "SYNTHETIC.json"
# A ustar header holds 155 characters of folders and 100 of a name with its suffix.
LONGEST_NAME = 70


# A published number of samples: category, split, label ("anomalous" is every label but good and unknown) and count;
# None stands for all of them together.
Published = tuple[str | None, str | None, str | None, int]


@dataclass(frozen=True)
class Item:
    """One depth map, or one image to be turned into one.

    Attributes:
        dataset: name of the dataset in the shards.
        category: object category, in the dataset's own spelling.
        split: the dataset's own split name.
        label: "good", a defect's name, or "unknown" where the labels are not published.
        stem: the dataset's own name of the sample within its category, split and label.
        file: the file to read.
        source: its name from the category's folder on, with forward slashes.
        group: id of the scene; maps of one scene must not be parted by a split. None: every map is its own scene.
        extra: further JSON values that go into the sample's ``json``.
        companions: other files that the reader needs to decode this one.
        options: the settings that it needs.
    """

    dataset: str
    category: str
    split: str
    label: str
    stem: str
    file: RawFile
    source: str
    group: str | None = None
    extra: dict[str, str | int | float | None] = field(default_factory=dict)
    companions: dict[str, RawFile] = field(default_factory=dict)
    options: Any = None


class FolderItems(Sequence[Item]):
    """Items that are made of their names when they are asked for: in memory, ten million would be 12 GB.

    Args:
        make: makes the item of a name; it goes with every shard to the process that writes it.
        names: of the files, in their order.
    """

    def __init__(self, make: Callable[[str], Item], names: list[str]):
        self.make, self.names = make, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place):
        if isinstance(place, slice):
            return FolderItems(self.make, self.names[place])
        return self.make(self.names[place])


def sample_keys(items: Iterable[Item], shared: Set[str] | None = None) -> list[str]:
    """The key ``dataset/category/split-label-stem`` of every item, unique without regard to case.

    WebDataset ends a key at the first dot of its last component, so every character but ASCII letters, digits, ``_``
    and ``-`` becomes ``_``; keys that meet thereby get a checksum of their source. Long names are cut, with a checksum.

    Args:
        shared: :func:`shared_keys` of these and all other items; None where there are no others.

    Raises:
        DataError: as :func:`shared_keys`, where it is None.
    """
    shared = shared_keys(lambda: items) if shared is None else shared
    keys = ((_key(item), item.source) for item in items)
    return [f"{key}-{_checksum(source)}" if key.lower() in shared else key for key, source in keys]


def shared_keys(items: Callable[[], Iterable[Item]]) -> frozenset[str]:
    """The keys, in lower case, at which several items would meet.

    Args:
        items: goes through all items, each time it is called.

    Raises:
        DataError: two items have one source.
    """
    shared = frozenset(repeated(lambda: (_key(item).lower() for item in items())))
    if shared:
        still = repeated(lambda: (key.lower() for key in sample_keys(items(), shared)))
        for key, count in still.items():
            sources = [item.source for item in items() if sample_keys([item], shared)[0].lower() == key]
            raise DataError(f"{count} files share the sample key {key}: {', '.join(sources[:4])}")
    return shared


def repeated(texts: Callable[[], Iterator[str]]) -> dict[str, int]:
    """The texts that occur more than once and how often, in 8 bytes a text.

    Args:
        texts: goes through all texts, each time it is called.
    """
    hashes = np.sort(np.fromiter(map(hash, texts()), np.int64))
    twice = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    uses = Counter(text for text in texts() if hash(text) in twice) if twice else {}
    return {text: count for text, count in uses.items() if count > 1}


def _key(item: Item) -> str:
    names = item.dataset, item.category, f"{item.split}-{item.label}-{item.stem}"
    return "/".join(map(_tar_name, names))


def _tar_name(name: str) -> str:
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", name) or "_"
    return clean if len(clean) <= LONGEST_NAME else f"{clean[: LONGEST_NAME - 9]}-{_checksum(name)}"


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def find_items(
    tree: RawTree,
    dataset: str,
    pattern: str,
    layout: str,
    splits: tuple[str, ...],
    make: Callable[[str, str, dict[str, str]], Item | None],
) -> list[Item]:
    """The items of every file that matches a layout.

    Args:
        pattern: for :meth:`RawTree.find`, with the groups ``category`` and ``split`` and any others.
        layout: the same in words, for messages.
        splits: the split names of the dataset.
        make: makes the item of a file's name in the tree, its source and the groups; None leaves the file out.

    Raises:
        DataError: there is no such file, or one lies in a folder that is no split of this dataset.
    """
    found = []
    for match, name in tree.find(pattern):
        if match["split"] not in splits:
            folder = tree.root / name[: match.end("split") - len(tree.name) - 1]
            raise DataError(f"{folder} is no split of {dataset}: expected {', '.join(splits)}")
        item = make(name, match[0][match.start("category") :], match.groupdict())
        if item is not None:
            found.append(item)
    if not found:
        raise unexpected_layout(tree, dataset, layout)
    return found


def read_image(item: Item) -> np.ndarray:
    """The (height, width, 3) uint8 colours of a PNG or JPEG image; grey is repeated.

    Raises:
        DataError: not a complete image of 8 bits a channel.
    """
    return decode_image(item.file.read())


def unexpected_layout(tree: RawTree, dataset: str, expected: str) -> DataError:
    """The error of a reader that finds none of its files: what it looked for and what lies there instead."""
    found: list[str] = []
    prefix = ""
    # One way down is enough to recognise a tree: the first folder of the first folder, and so on.
    for _ in range(4):
        inside = (name.removeprefix(prefix) for name in tree.names if name.startswith(prefix))
        entries = sorted({name.partition("/")[0] + "/" * ("/" in name) for name in inside})
        found.append(", ".join(entries[:3] + ["..."] * (len(entries) > 3)))
        folder = next((entry for entry in entries if entry.endswith("/")), None)
        if folder is None:
            break
        prefix += folder
    listing = " > ".join(names for names in found if names) or "nothing"
    return DataError(f"{tree.root} is not a {dataset} tree: expected {expected}, found {listing}")
