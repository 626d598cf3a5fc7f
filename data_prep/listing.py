"""What the raw datasets hold: their files, counted beside the published counts."""

import json
import os
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.item import SYNTHETIC, Item, Published
from data_prep.manifest import digest_list
from data_prep.shard_writer import makes_images, reader_module
from data_prep.tree import RawTree
from dino_depth.config import suggestion
from dino_depth.errors import ConfigError, DataError
from dino_depth.terminal import plain

__all__ = ["READERS", "Listing", "compare", "known_reader", "list_source", "table", "verdict"]

# The modules of this package that have ``items``, each named as its dataset.
READERS = ["eyecandies", "folder", "mvtec3d", "mvtec_ad", "mvtec_ad2", "mvtec_loco", "real_iad_d3", "visa"]
KINDS = ("good", "unknown")  # every other label is a defect
DIFFERENCES_SHOWN = 5


@dataclass(frozen=True)
class Listing:
    """The files of one raw dataset.

    Attributes:
        reader: name of its reader.
        dataset: its name in the shards.
        root: where it lies.
        items: its files, in the order they are read and written.
        origin: what a rendered tree says of itself: ``synthetic``, and then its ``licence``.
    """

    reader: str
    dataset: str
    root: Path
    items: Sequence[Item]
    origin: dict[str, Any]

    @property
    def images(self) -> bool:
        return makes_images(reader_module(self.reader))

    @property
    def published(self) -> list[Published]:
        return getattr(reader_module(self.reader), "PUBLISHED", [])

    @property
    def description(self) -> dict[str, Any]:
        """For the manifest: the licence, and whatever else its reader can tell of the files."""
        reader = reader_module(self.reader)
        return reader.describe(self.items) if hasattr(reader, "describe") else {"licence": reader.LICENCE}

    @property
    def counts(self) -> Counter[tuple[str, str, str]]:
        """Files by (category, split, label)."""
        return Counter((item.category, item.split, item.label) for item in self.items)

    @property
    def listed(self) -> dict:
        """What tells this listing from another."""
        return {"count": len(self.items), "sha256": digest_list(item.source for item in self.items)}


def known_reader(name: str, key: str) -> str:
    """The name, if it is a reader's.

    Raises:
        ConfigError: it is not; names the nearest and ``key``.
    """
    if name not in READERS:
        raise ConfigError(f"{key}: unknown dataset {name!r}{suggestion(name, READERS)} (known: {', '.join(READERS)})")
    return name


def list_source(name: str, root: str, options: Any) -> Listing:
    """The files that a reader finds below ``root``, a folder or an archive.

    Raises:
        DataError: ``root`` is not there or has another layout.
    """
    if not Path(root).exists():
        raise DataError(f"root {root} is not a folder or archive: nothing is there")
    tree = RawTree(root)
    arguments = () if options is None else (options,)
    items = reader_module(name).items(tree, *arguments)
    # In a compressed archive the order of the archive, so that it is decompressed once; else by name.
    if any(_place(one) > _place(two) for one, two in pairwise(items)):
        items = sorted(items, key=_place)
    return Listing(name, items[0].dataset, tree.root, items, _origin(tree.root))


def _place(item: Item) -> tuple:
    return item.file.order, item.source


def _origin(root: Path) -> dict[str, Any]:
    """What a rendered tree says of itself: its licence is not that of the dataset whose layout it has."""
    for folder in (root, root.parent):
        if (folder / SYNTHETIC).is_file():
            try:
                stated = json.loads((folder / SYNTHETIC).read_text(encoding="utf-8"))
                return {"licence": str(stated["licence"]), "synthetic": True}
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{folder / SYNTHETIC}: not what synth writes: {error!r}") from None
    return {"synthetic": False}


def compare(counts: Counter[tuple[str, str, str]], published: list[Published]) -> list[tuple[Published, int]]:
    """Every published count with the number that was found.

    Args:
        counts: samples by (category, split, label).
    """
    rows = []
    for place in published:
        found = 0
        for (category, split, label), number in counts.items():
            have = ((category,), (split,), (label, label if label in KINDS else "anomalous"))
            found += number * all(want is None or want in has for want, has in zip(place[:3], have, strict=True))
        rows.append((place, found))
    return rows


def table(listing: Listing) -> str:
    """What was found by category, split and label, and each published count that differs; at most 80 columns wide."""
    counts = listing.counts
    compared = {place[:3]: (place[3], found) for place, found in compare(counts, listing.published)}
    lines = [f"{listing.dataset}: {len(listing.items)} {'images' if listing.images else 'depth maps'}"]
    lines += [f"  in {os.fspath(listing.root)}", ""]
    lines.append(f"{'category':22} {'split':16} {'label':20}{'found':>7}{'published':>11}")
    for (category, split, label), number in sorted(counts.items()):
        published, _ = compared.get((category, split, label), ("", 0))
        lines.append(f"{category[:22]:22} {split[:16]:16} {label[:20]:20}{number:7}{published:>11}")
    # What is published of several labels, splits or categories together, or is missing altogether.
    for (category, split, label), (published, found) in compared.items():
        if (category, split, label) not in counts:
            words = (category or "(all)", split or "(all)", label or "(all)")
            lines.append(f"{words[0][:22]:22} {words[1][:16]:16} {words[2][:20]:20}{found:7}{published:>11}")
    lines += ["", *textwrap.wrap(verdict(listing), 80, break_on_hyphens=False)]
    return "\n".join(map(plain, lines))


def verdict(listing: Listing) -> str:
    """One line: which published counts differ, and by how much."""
    dataset, published = listing.dataset, listing.published
    if not published:
        return f"{dataset}: no published counts are known"
    different = [(place, found) for place, found in compare(listing.counts, published) if found != place[3]]
    if not different:
        return f"{dataset}: all {len(published)} published counts are met"
    parts = [
        f"{'/'.join(word or 'all' for word in place[:3])} {found} of {place[3]} ({found - place[3]:+d})"
        for place, found in different[:DIFFERENCES_SHOWN]
    ]
    more = f"; and {len(different) - DIFFERENCES_SHOWN} more" if len(different) > DIFFERENCES_SHOWN else ""
    return f"{dataset}: {len(different)} of {len(published)} published counts differ: {'; '.join(parts)}{more}"
