"""Real-IAD D3: organised X, Y, Z tiffs; JSON files say which, in which split and with which label.

The release, unpacked or in its archives:

    ROOT/realiad_d3_jsons/<category>.json                         or realiad_d3_jsons.zip
    ROOT/realiad_d3_raw/<category>/OK/<S number>/*_XYZ_*.tiff     or <category>.zip; depth is channel 2
                                  /[NG/]<defect>/<S number>/...

    {"meta": {"prefix": "<category>/"},
     "train": [{"xyz_path", "image_path", "mask_path", "anomaly_class", ...}], "validation": [...], "test": [...]}

and the re-arranged tree of the official code, where there are no JSON files:

    ROOT/<category>/{train,test}/{GOOD,good,<defect>}/xyz/*.tiff

JSON files are followed, nothing is globbed. Where their paths start differs between the loaders in use, so the first
of these that exists is taken, below ``realiad_d3_raw`` and then beside ``realiad_d3_jsons``:
``<prefix>/<path>``, ``<category>/<prefix>/<path>``, ``<category>/<path>``, ``<path>``. Hyphens and underscores, which
both occur in category names, are the same. A category without any folder was not downloaded and is left out.

- X and Y may be constants that tell good from defective samples: they are dropped, and nothing is derived from them.
- NaN and 0 mean "missing", and so do single negative values. Some tiffs are (3, height, width).
- Unit and sign of Z are unconfirmed, guesses that :class:`RealIadD3Options` can change and that every map is held to:
  see ``plausibility``.
- ``validation`` seems to repeat files of ``test``. A file is kept once: in test, else in train.
- ``ps`` pictures are photometric-stereo normals, not depth. They, the point clouds (ASCII in most categories, binary in
  some) and the five lightings are not read.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from data_prep.archives import RawFile
from data_prep.formats import decode_tiff
from data_prep.item import Item, Published, find_items
from data_prep.plausibility import refuse_negative
from data_prep.tree import RawTree
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError

__all__ = ["PUBLISHED", "RealIadD3Options", "describe", "items", "read"]

NAME = "real_iad_d3"
LICENCE = "Real-IAD D3, CC BY-NC-SA 4.0 (non-commercial)"
LAYOUT = "realiad_d3_jsons/<category>.json, or [<category>/]{train,test}/<label>/xyz/*.tiff"
LISTING = r"(?P<before>(?:.*/)?)realiad_d3_jsons/(?:.*/)?(?P<category>[^/]+)\.json"
RAW = re.compile(r"(?:.*/)?realiad_d3_raw/")
REARRANGED = r"(?:.*/)?(?P<category>[^/]+)/(?P<split>[^/]+)/(?P<label>[^/]+)/xyz/(?P<stem>[^/]+)\.(?i:tiff?)"
# In this order: of a file that several lists name, the first one's entry is kept.
SPLITS = ("test", "train", "validation")
LARGEST_LISTING = 2**26
PER_METRE = {"m": 1, "mm": 1_000, "um": 1_000_000}
CATEGORIES = (
    "audio_jack_socket", "common_mode_filter", "connector_housing_female", "crimp_st_cable_mount_box",
    "dc_power_connector", "ethernet_connector", "ferrite_bead", "fork_crimp_terminal", "fuse_holder",
    "headphone_jack_socket", "humidity_sensor", "knob_cap", "lattice_block_plug", "lego_pin_connector_plate",
    "lego_propeller", "limit_switch", "miniature_lifting_motor", "power_jack", "purple_clay_pot",
    "telephone_spring_switch",
)  # fmt: skip
# The 2,424 entries of the validation lists are no count of files: most or all of them repeat the test lists.
PUBLISHED: list[Published] = [
    *((category, "train", "good", 200) for category in CATEGORIES), (None, "train", None, 4000),
    (None, "test", None, 4450),
]  # fmt: skip


@dataclass
class RealIadD3Options:
    """What the files of Real-IAD D3 mean.

    Attributes:
        unit: unit of Z: mm, m or um. The dataset does not state it, mm is a guess; a map whose median depth is then
            outside ``plausible.median`` is refused.
        larger_is: farther, a guess too; nearer for heights and for cameras that look along -Z. A map with many
            different negative Z is refused where larger is farther.
        offset: where larger is nearer: distance of Z = 0 from the camera, metres.
    """

    unit: Literal["mm", "m", "um"] = "mm"
    larger_is: Literal["farther", "nearer"] = "farther"
    offset: float = 0.0


def items(tree: RawTree, options: RealIadD3Options) -> list[Item]:
    """Every organised cloud that the JSON files list, or that lies in a re-arranged tree.

    A listed file that is missing among others becomes an item that cannot be read, so that it counts as dropped.

    Raises:
        ConfigError: the offset is out of range or contradicts ``larger_is``.
        DataError: a JSON file is not what the release holds, none of a category's files is at its place, or the tree
            has neither layout.
    """
    if not 0 <= options.offset < np.inf or (options.offset and options.larger_is == "farther"):
        raise ConfigError(f"real_iad_d3.offset {options.offset} must be 0 or more, and needs larger_is nearer")
    listings = tree.find(LISTING)
    if not listings:
        return _rearranged(tree, options)
    tree.mount_archives()
    places = _Places(tree)
    found: list[Item] = []
    seen: dict[str, RawFile] = {}
    for match, name in listings:
        category, listing = _spelling(match["category"]), tree[name]
        if category in seen:
            raise DataError(f"{listing}: {category} is listed by {seen[category]} too")
        seen[category] = listing
        # Root may be the folder of the JSON files itself: then nothing in the tree lies beside it.
        beside = name[: max(0, match.end("before") - len(tree.name) - 1)]
        found += _listed(tree, places, listing, category, beside, options)
    if not found:
        raise DataError(
            f"{tree.root}: none of the {len(seen)} categories that {listings[0][1]} and its like list is there: "
            "expected realiad_d3_raw/<category>/ or realiad_d3_raw/<category>.zip"
        )
    return found


class _Places:
    """Where listed paths lie in a tree."""

    def __init__(self, tree: RawTree):
        self.by_spelling = {_spelling(name): name for name in tree.names} | {name: name for name in tree.names}
        self.raw = list(dict.fromkeys(match[0] for match in map(RAW.match, tree.names) if match))

    def tried(self, beside: str, category: str, prefix: str, path: str) -> list[str]:
        """The names that ``path`` may have in the tree, in the order of trying."""
        below = (prefix, f"{category}/{prefix}", f"{category}/", "")
        return list(dict.fromkeys(f"{top}{folder}{path}" for top in [*self.raw, beside] for folder in below))

    def find(self, tried: list[str]) -> str | None:
        known = self.by_spelling
        return next((found for name in tried if (found := known.get(name) or known.get(_spelling(name)))), None)

    def holds_folder(self, category: str) -> bool:
        return any(f"/{category}/" in f"/{name}" for name in self.by_spelling)


def _spelling(name: str) -> str:
    return name.replace("-", "_")


def _listed(
    tree: RawTree, places: _Places, listing: RawFile, category: str, beside: str, options: RealIadD3Options
) -> list[Item]:
    """The items of one JSON file; none where the category was not downloaded."""
    lists, prefix = _parse(listing)
    kept: dict[str, Item] = {}
    also: dict[str, list[str]] = {}
    absent: list[str] = []
    for split in SPLITS:
        for place, entry in enumerate(lists[split]):
            where = f"{split}[{place}]"
            path = _path(listing, where, entry, "xyz_path")
            label = _label(listing, where, entry)
            path = _below(path, prefix, category)
            tried = places.tried(beside, category, prefix, path)
            name = places.find(tried)
            key = name or path
            if key in kept:
                if kept[key].label != label:
                    raise DataError(f"{listing}: {where}: {path} is {label} here and {kept[key].label} in another list")
                also[key].append(split)
                continue
            extra = {}
            for shown, field in (("image", "image_path"), ("mask", "mask_path")):
                if entry.get(field) not in (None, ""):
                    picture = _below(_path(listing, where, entry, field), prefix, category)
                    if places.find(places.tried(beside, category, prefix, picture)):
                        extra[shown] = f"{category}/{picture}"
            if name is None:
                absent.append(f"{listing}: {where}.xyz_path {path!r} is none of {', '.join(tried[:4])}")
                extra["absent"] = f"{listing.name} names it as {where}.xyz_path, no such file"
            # A file that is missing has its first possible place, where it may yet appear.
            file = tree[name] if name else RawFile(str(tree.root), tried[0])
            kept[key] = Item(
                NAME, category, split, label, file.stem, file, f"{category}/{path}", extra=extra, options=options
            )
            also[key] = []
    if not kept:
        raise DataError(f"{listing}: its lists are empty")
    if len(absent) == len(kept):
        if places.holds_folder(category):
            raise DataError(f"{absent[0]}, and so for all {len(absent)} files")
        return []
    return _grouped([_marked(kept[key], also[key]) for key in kept])


def _parse(listing: RawFile) -> tuple[dict[str, list[dict]], str]:
    """The lists by split, and the prefix: empty, or with a slash at its end."""
    try:
        content = json.loads(listing.read(LARGEST_LISTING))
    except (DataError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, DataError) else "not readable JSON"
        raise DataError(f"{listing}: {reason}") from error
    if not isinstance(content, dict):
        raise DataError(f"{listing}: must hold the lists train and test, got {_shown(content)}")
    lists = {}
    for split in SPLITS:
        # Copies with a two-way split have no validation list.
        lists[split] = content.get(split, [] if split == "validation" else None)
        if not isinstance(lists[split], list) or not all(isinstance(entry, dict) for entry in lists[split]):
            raise DataError(f"{listing}: {split} must be a list of objects, got {_shown(lists[split])}")
    meta = content.get("meta", {})
    prefix = meta.get("prefix", "") if isinstance(meta, dict) else None
    if prefix in ("", ".", "./"):
        return lists, ""
    return lists, _path(listing, "meta", {"prefix": prefix}, "prefix") + "/"


def _path(listing: RawFile, where: str, entry: dict[str, Any], field: str) -> str:
    """A path of a JSON file, relative and with forward slashes."""
    value = entry.get(field)
    if isinstance(value, str) and value.isprintable():
        slashed = value.replace("\\", "/")
        parts = [part for part in slashed.split("/") if part not in ("", ".")]
        if parts and ".." not in parts and not re.match("/|[A-Za-z]:", slashed):
            return "/".join(parts)
    raise DataError(f"{listing}: {where}.{field} must be a relative path without '..', got {_shown(value)}")


def _label(listing: RawFile, where: str, entry: dict[str, Any]) -> str:
    label = entry.get("anomaly_class")
    if not isinstance(label, str) or not label or not label.isprintable():
        raise DataError(f"{listing}: {where}.anomaly_class must be a name, got {_shown(label)}")
    return "good" if label == "OK" else label


def _below(path: str, prefix: str, category: str) -> str:
    """The path from the category's folder on."""
    for start in (prefix, f"{category}/"):
        if start and _spelling(path).startswith(_spelling(start)) and len(path) > len(start):
            return path[len(start) :]
    return path


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return repr(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"


def _marked(item: Item, also: list[str]) -> Item:
    return replace(item, extra=item.extra | {"also_listed_in": ", ".join(sorted(also))}) if also else item


def _grouped(found: list[Item]) -> list[Item]:
    """The folder of an S number is one object: where it holds several maps, they are one scene."""
    folders = [item.source.rpartition("/")[0] for item in found]
    uses = Counter(folders)
    return [
        replace(item, group=folder) if uses[folder] > 1 and re.search(r"/S\d+$", folder) else item
        for item, folder in zip(found, folders, strict=True)
    ]


def _rearranged(tree: RawTree, options: RealIadD3Options) -> list[Item]:
    def make(name: str, source: str, place: dict[str, str]) -> Item:
        folder = name[: name.rindex("xyz/")]
        shown = source[: source.rindex("xyz/")]
        stem = place["stem"].replace("_XYZ", "_RGBL05")
        beside = {"image": [f"rgb/{stem}.jpg"], "mask": [f"gt/{stem}.png", f"gt/rgb/{stem}.png"]}
        extra = {
            key: shown + path for key, paths in beside.items() for path in reversed(paths) if f"{folder}{path}" in tree
        }
        label = "good" if place["label"].lower() == "good" else place["label"]
        return Item(
            NAME, _spelling(place["category"]), place["split"], label, place["stem"], tree[name], source, extra=extra,
            options=options,
        )  # fmt: skip

    return find_items(tree, NAME, REARRANGED, LAYOUT, ("train", "test"), make)


def read(item: Item) -> DepthMap:
    """The metric depth of a cloud; where Z is not finite or 0 it is missing.

    Raises:
        DataError: the file is missing, no float tiff of three channels, without any valid point, or of a sign that
            contradicts ``larger_is`` and ``offset``.
    """
    if "absent" in item.extra:
        raise DataError(item.extra["absent"])
    options: RealIadD3Options = item.options
    # Whole numbers up to a million are exact in float32, so the quotient is the nearest one to the true depth.
    with np.errstate(invalid="ignore"):
        stored = _z(decode_tiff(item.file.read(), stack=True))
        depth = stored / np.float32(PER_METRE[options.unit])
        if options.larger_is == "farther":
            refuse_negative(stored, NAME)
            return DepthMap(depth, (depth > 0) & (depth < np.inf))
        seen = np.isfinite(stored) & (stored != 0)
        depth = options.offset - depth.astype(np.float64)
        above = np.count_nonzero(seen & (depth <= 0))
        if above:
            raise DataError(f"{above} points reach the camera: real_iad_d3.offset {options.offset} is too small")
        return DepthMap(depth, seen)


def _z(points: np.ndarray) -> np.ndarray:
    """(height, width) third coordinate; a view."""
    if points.ndim != 3 or 3 not in (points.shape[0], points.shape[2]) or points.dtype.kind != "f":
        raise DataError(
            f"expected float X, Y, Z (height, width, 3) or (3, height, width), got {points.shape} {points.dtype}"
        )
    return points[..., 2] if points.shape[2] == 3 else points[2]


def describe(items: list[Item]) -> dict[str, Any]:
    """For the manifest: licence, what is assumed, repeated files by the lists that name them, categories not found."""
    repeated = Counter({"validation_in_test": 0})
    for item in items:
        repeated.update(
            f"{split}_in_{item.split}" for split in item.extra.get("also_listed_in", "").split(", ") if split
        )
    return {
        "licence": LICENCE,
        "unit_assumed": items[0].options.unit,
        "larger_is_assumed": items[0].options.larger_is,
        **dict(sorted(repeated.items())),
        "categories_absent": sorted(set(CATEGORIES) - {item.category for item in items}),
    }
