"""One HTML page to see a folder of shards: counts, licences, distributions, what was left out, and maps to look at.

Every description of every shard is read, but only the PNGs that are shown are: memory grows by the 32 to 48 bytes that
a map's figures take. The same shards, settings and seed give the same page, which is self-contained, readable offline
and without scripts, and whose size is bounded whatever the number of categories.
"""

import hashlib
import heapq
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import jinja2
import numpy as np

from data_prep.listing import READERS
from data_prep.manifest import config_differences, count
from data_prep.output import PROGRESS
from data_prep.shard_writer import reader_module
from data_prep.shrink import shrink
from data_prep.summary import Histogram, count_table, drop_groups, histogram, paper_table, readable, split_order
from dino_depth.depth import CODINGS, UNIT, Normalization, coding_step, normalize, read_codes
from dino_depth.errors import ConfigError, DataError
from dino_depth.licences import non_commercial
from dino_depth.picture import MISSING, VIRIDIS, colour, data_uri, write_page
from dino_depth.progress import Progress
from dino_depth.sample import sample_map
from dino_depth.shard_format import MANIFEST, parse_description, read_manifest, read_samples
from dino_depth.storage import RemotePath, ShardCache, location, open_shard
from dino_depth.terminal import say

__all__ = ["InspectConfig", "inspect"]

THUMBNAIL = 128  # longest side, pixels
MAPS_SHOWN = 600  # on a page; a thumbnail of a noisy sensor takes 10 kB there
SIZES_SHOWN = 6
STRINGS = ("dataset", "category", "split", "label")


@dataclass
class InspectConfig:
    """A page to see what shards hold.

    Attributes:
        shards: folder made by ``prep``, or an fsspec URL of one.
        out: HTML file to write.
        per_category: maps to show of each category, drawn at random; fewer where the page would show more than 600.
        seed: of that draw.
        cache: folder for copies of remote shards; empty means ``$DINO_DEPTH_CACHE``, else ``~/.cache/dino-depth``.
        cache_gib: size that these copies never exceed, GiB.
    """

    shards: str
    out: str = "inspect.html"
    per_category: int = 8
    seed: int = 0
    cache: str = ""
    cache_gib: float = 100.0


@dataclass(frozen=True)
class _Sample:
    """One sample: its key, its shard's row of the manifest, where its PNG lies there, and its description."""

    key: str
    shard: dict
    offset: int
    size: int
    meta: dict


@dataclass
class _Found:
    """What the shards hold.

    Attributes:
        counts: maps by (dataset, category, split, label).
        figures: of each dataset the figures of its maps, by title and unit.
        sizes: of each dataset its maps by (height, width).
        drawn: of each (dataset, category) a heap of (rank, key, sample), the greatest ranks.
    """

    counts: Counter[tuple[str, str, str, str]] = field(default_factory=Counter)
    figures: dict[str, dict[tuple[str, str], array]] = field(default_factory=dict)
    sizes: dict[str, Counter[tuple[int, int]]] = field(default_factory=dict)
    drawn: dict[tuple[str, str], list[tuple[int, str, _Sample]]] = field(default_factory=dict)


def inspect(config: InspectConfig):
    """Writes the page about ``config.shards``.

    Raises:
        ConfigError: ``per_category`` is below 1 or ``out`` is a folder.
        DataError: the folder is unfinished, or a shard is missing, damaged or disagrees with the manifest.
    """
    folder, out = location(config.shards), Path(config.out)
    if config.per_category < 1:
        raise ConfigError(f"per_category must be at least 1, got {config.per_category}")
    if out.is_dir():
        raise ConfigError(f"out {out} is a folder: name a file")
    if isinstance(folder, Path) and (folder / PROGRESS).exists():
        raise DataError(f"{folder} is unfinished: run the same `prep` again")
    cache = ShardCache(config.cache, config.cache_gib)
    manifest = read_manifest(folder)
    found = _read(folder, manifest, config, cache)
    sheets, each = _sheets(folder, found, cache)
    sources = [_source(folder, name, source, found, sheets, manifest) for name, source in manifest["sources"].items()]
    loader = jinja2.PackageLoader("data_prep", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["signed"] = lambda value: f"{value:+,}".replace("-", "−")
    page = environment.get_template("inspect.html.jinja").render(
        name=folder.resolve().name,
        manifest=manifest,
        size=_bytes(sum(shard["bytes"] for shard in manifest["shards"])),
        config_text=json.dumps(manifest["config"], indent=1),
        sources=sources,
        non_commercial=[source["name"] for source in sources if source["non_commercial"]],
        paper=paper_table(manifest),
        each=each,
        seed=config.seed,
        box=Histogram,
        missing=MISSING,
        viridis=[f"rgb{tuple(row)}" for row in VIRIDIS.astype(int).tolist()],
    )
    write_page(out, page)
    shown = sum(map(len, sheets.values()))
    say(f"{out}: {manifest['total']} maps, {shown} of them shown, {_bytes(out.stat().st_size)}")


def _read(folder: Path | RemotePath, manifest: dict, config: InspectConfig, cache: ShardCache) -> _Found:
    found = _Found()
    with Progress("inspect: descriptions", manifest["total"], "maps") as progress:
        for shard in manifest["shards"]:
            for sample in _samples(folder, shard, cache):
                _count(found, sample, config)
                progress.advance()
    if differences := config_differences(count(found.counts), manifest["counts"], "counts."):
        raise DataError(f"{folder / MANIFEST} disagrees with the samples: {differences[0]}")
    if unknown := found.figures.keys() ^ manifest["sources"].keys():
        raise DataError(f"{folder / MANIFEST}: sources and samples disagree about {min(unknown)}")
    return found


def _open(folder: Path | RemotePath, shard: dict, cache: ShardCache) -> BinaryIO:
    """The shard of a row of the manifest, to read at any place."""
    try:
        return open_shard(folder, shard, cache)
    except FileNotFoundError:
        raise DataError(f"{folder / shard['file']}: the shard is missing") from None
    except OSError as error:
        raise DataError(f"{folder / shard['file']}: cannot be read: {error.strerror}") from None


def _samples(folder: Path | RemotePath, shard: dict, cache: ShardCache) -> Iterator[_Sample]:
    """Every sample of a shard, without reading its PNG.

    Raises:
        DataError: the tar is broken, cut short or not of the size and the number of samples the manifest says.
    """
    path = folder / shard["file"]
    with _open(folder, shard, cache) as file:
        if (size := file.seek(0, os.SEEK_END)) != shard["bytes"]:
            raise DataError(f"{path}: {size} bytes, the manifest says {shard['bytes']}: run dino-depth check")
        file.seek(0)
        try:
            for sample in read_samples(file, shard["samples"]):
                try:
                    meta = _description(os.pread(file.fileno(), sample.json[1], sample.json[0]))
                except DataError as error:
                    raise DataError(f"sample {sample.key}: {error}") from None
                yield _Sample(sample.key, shard, *sample.png, meta)
        except DataError as error:
            raise DataError(f"{path}: {error}") from None


def _description(content: bytes) -> dict:
    """The description of a sample, of which the page shows every key checked here."""
    meta = parse_description(content)
    for key in STRINGS:
        if not isinstance(meta.get(key), str):
            raise DataError(f"json: {key} is {meta.get(key)!r}, expected text")
    for key in ("near", "far", "valid_fraction", "height", "width"):
        if (_number(meta.get(key)) or 0) <= 0:
            raise DataError(f"json: {key} is {meta.get(key)!r}, expected a positive number")
    if meta["near"] > meta["far"]:
        raise DataError(f"json: near {meta['near']} is beyond far {meta['far']}")
    if meta.get("kind") not in UNIT:
        raise DataError(f"json: kind is {meta.get('kind')!r}, expected one of {', '.join(UNIT)}")
    if meta.get("coding", "linear") not in CODINGS:
        raise DataError(f"json: coding is {meta['coding']!r}, expected one of {', '.join(CODINGS)}")
    return meta


def _number(value: Any) -> float | None:
    """The value where it is a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def _object(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _count(found: _Found, sample: _Sample, config: InspectConfig):
    """Adds a sample to the statistics, and to the maps that are shown where its rank is among the greatest."""
    meta = sample.meta
    dataset, category, split, label = (meta[key] for key in STRINGS)
    found.counts[dataset, category, split, label] += 1
    found.sizes.setdefault(dataset, Counter())[int(meta["height"]), int(meta["width"])] += 1
    figures = found.figures.setdefault(dataset, {})
    for title, value in _figures(meta):
        figures.setdefault(title, array("d")).append(value)
    # Drawn by what a sample is called, so that the draw does not depend on how samples are dealt to shards.
    rank = int.from_bytes(hashlib.sha256(f"{config.seed} {sample.key}".encode()).digest()[:8])
    heap = found.drawn.setdefault((dataset, category), [])
    keep = heapq.heappush if len(heap) < min(config.per_category, MAPS_SHOWN) else heapq.heappushpop
    keep(heap, (rank, sample.key, sample))


def _figures(meta: dict) -> Iterator[tuple[tuple[str, str], float]]:
    """((title, unit), value) of every figure of a map; those of estimated depth only where they are recorded."""
    unit = UNIT[meta["kind"]]
    yield ("nearest depth", unit), meta["near"]
    yield ("farthest depth", unit), meta["far"]
    yield ("range of depth", unit), meta["far"] - meta["near"]
    median, coding = _number(meta.get("median")), meta.get("coding", "linear")
    # Shards of before there was another coding do not state the median: their step is the same everywhere.
    if median is not None or coding == "linear":
        yield ("step of a code", unit), coding_step(median or meta["near"], meta["near"], meta["far"], coding)
    if (distinct := _number(meta.get("distinct"))) is not None:
        yield ("distinct depths", ""), distinct
    yield ("valid pixels", "%"), 100 * meta["valid_fraction"]
    record = _object(meta.get("pseudo_depth"))
    if (relief := _number(record.get("relief"))) is not None:
        yield ("relief of disparity", "%"), 100 * relief
    low, high = (_number(_object(record.get("disparity")).get(key)) for key in ("low", "high"))
    if low is not None and high is not None:
        yield ("range of disparity", ""), high - low


def _sheets(
    folder: Path | RemotePath, found: _Found, cache: ShardCache
) -> tuple[dict[tuple[str, str], list[dict]], int]:
    """The maps to show of each (dataset, category) with image and caption, and the most of any."""
    each = max(1, MAPS_SHOWN // len(found.drawn))
    drawn = [heapq.nlargest(each, found.drawn[place]) for place in sorted(found.drawn)[:MAPS_SHOWN]]
    samples = [sample for heap in drawn for *_, sample in heap]
    shown = {}
    with Progress("inspect: pictures", len(samples), "maps") as progress:
        # In the order they are stored, so that each shard is opened once.
        samples.sort(key=lambda sample: (sample.shard["file"], sample.offset))
        for _, together in groupby(samples, key=lambda sample: sample.shard["file"]):
            together = list(together)
            with _open(folder, together[0].shard, cache) as file:
                for sample in together:
                    shown[sample.key] = _shown(folder, file, sample)
                    progress.advance()
    sheets: dict[tuple[str, str], list[dict]] = {}
    for sample in sorted(samples, key=lambda sample: (split_order(sample.meta["split"]), sample.key)):
        sheets.setdefault((sample.meta["dataset"], sample.meta["category"]), []).append(shown[sample.key])
    return sheets, max(map(len, sheets.values()))


def _shown(folder: Path | RemotePath, file: BinaryIO, sample: _Sample) -> dict:
    meta = sample.meta
    file.seek(sample.offset)
    try:
        depth_map = sample_map(read_codes(file.read(sample.size)), meta)
    except DataError as error:
        raise DataError(f"{folder / sample.shard['file']}: sample {sample.key}: {error}") from None
    low, high = np.percentile(depth_map.depth[depth_map.valid], [1, 99])
    try:
        small = shrink(depth_map, THUMBNAIL)
        depth, valid = small.depth, small.valid
    except DataError:
        # So sparse that no block is half valid: single pixels instead of blocks.
        stride = -(-max(depth_map.depth.shape) // THUMBNAIL)
        depth, valid = depth_map.depth[::stride, ::stride], depth_map.valid[::stride, ::stride]
    scale, unit = readable(UNIT[meta["kind"]], meta["far"])
    inputs = normalize(depth_map, Normalization())[depth_map.valid]
    return {
        "input": np.percentile(inputs, [0, 1, 99, 100]).tolist(),
        "image": data_uri(colour(-depth, valid, -high, -low)),
        "split": meta["split"],
        "label": meta["label"],
        "range": f"{scale * meta['near']:.4g}–{scale * meta['far']:.4g} {unit}",
        "key": sample.key,
    }


def _source(folder: Path | RemotePath, name: str, source: dict, found: _Found, sheets: dict, manifest: dict) -> dict:
    """Everything the page says of one dataset."""
    counts = Counter({place[1:]: number for place, number in found.counts.items() if place[0] == name})
    known = not source["synthetic"] and source["reader"] in READERS
    published = getattr(reader_module(source["reader"]), "PUBLISHED", []) if known else []
    maps: Counter[str] = Counter()
    for (category, _, _), number in counts.items():
        maps[category] += number
    shown = ("reader", "licence", "synthetic", "files_listed", "maps", "dropped", "pseudo_depth")
    sizes = sorted(found.sizes[name].items(), key=lambda row: (-row[1], row[0]))
    try:
        drops = [
            drop_groups([drop for drop in source["dropped"] if bool(drop["flat"]) == flat]) for flat in (False, True)
        ]
    except (KeyError, TypeError):
        raise DataError(f"{folder / MANIFEST}: sources.{name}.dropped holds no path, reason and flat") from None
    return {
        "name": name, "reader": source["reader"], "licence": source["licence"], "synthetic": source["synthetic"],
        "non_commercial": non_commercial(source["licence"]),
        "maps": counts.total(), "share": 100 * counts.total() / manifest["total"],
        "files": source["files_listed"].get("count"),
        "facts": {key.replace("_", " "): _words(value) for key, value in source.items() if key not in shown},
        "pseudo_depth": _object(source.get("pseudo_depth")),
        "table": count_table(counts, published),
        "histograms": [histogram(*key, np.array(values)) for key, values in found.figures[name].items()],
        "input": _input([each for place, maps in sheets.items() if place[0] == name for each in maps]),
        "sizes": sizes[:SIZES_SHOWN], "other_sizes": sizes[SIZES_SHOWN:],
        "faults": drops[0], "flat": drops[1],
        "sheets": [(category, maps[category], sheets.get((name, category), [])) for category in sorted(maps)],
    }  # fmt: skip


def _input(shown: list[dict]) -> dict | None:
    """The network's input of the maps shown: its range, and of a middle map that of 98 % of its pixels."""
    if not shown:
        return None
    low, first, last, high = np.array([each["input"] for each in shown]).T
    return {
        "maps": len(shown), "method": Normalization().method, "low": low.min(), "high": high.max(),
        "first": np.median(first), "last": np.median(last),
    }  # fmt: skip


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)


def _bytes(size: int) -> str:
    unit, power = ("GiB", 30) if size >= 2**30 else ("MiB", 20) if size >= 2**20 else ("KiB", 10)
    return f"{size / 2**power:.1f} {unit}"
