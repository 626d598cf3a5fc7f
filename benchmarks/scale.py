"""What opening, ordering, fetching and preparing cost at many maps, measured at some and extrapolated to ten million.

    python benchmarks/scale.py [--maps 100000 1000000] [--to 10000000] [--walk 5000] [--shards 200 2000]

A folder of so many maps is an index, a manifest and sparse files in place of tars of 512: what is measured reads no
map. Every figure is of a fresh process, in processor seconds; memory is what is its own (anonymous pages), not the
mapped index. Extrapolated is along the line through the two largest measurements. What is opened without an index, as
folders of before there was one, has real tars of tiny maps, ``--walk`` of them; ``prep`` writes real shards of one tiny
map.
"""

import argparse
import io
import json
import os
import re
import sys
import tarfile
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from data_prep.folder import FolderOptions
from data_prep.manifest import digest_file, digest_json, digest_pieces
from data_prep.shards import PrepareConfig, plan, prepare
from dino_depth import distributed
from dino_depth.config import DataConfig
from dino_depth.depth import DepthMap, encode_png
from dino_depth.pretrain.order import EndlessOrder
from dino_depth.shard_format import FORMAT, JSON, MANIFEST, PNG, VERSION, shard_file
from dino_depth.shard_index import INDEX, SampleIndex, read_index
from dino_depth.shards import DepthShards

SHARD = 512  # maps
SHARD_BYTES = 2**26
READ = 200_000  # positions that are looked up
CACHE = 0.1  # share of the shards that the cache holds
DATASETS, CATEGORIES = ["lit", "plain"], [f"category{number}" for number in range(40)]


def synthetic(folder: Path, maps: int) -> Path:
    """A shard folder of ``maps`` maps without their bytes: two datasets, one of scenes of six maps."""
    folder.mkdir(parents=True)
    number, count = np.arange(maps), -(-maps // SHARD)
    prefix, digits = b"synthetic/category/train-good-", 9
    keys = np.empty((maps, len(prefix) + digits), np.uint8)
    keys[:, : len(prefix)] = np.frombuffer(prefix, np.uint8)
    for place in range(digits):
        keys[:, len(prefix) + place] = 48 + number // 10 ** (digits - 1 - place) % 10
    lit = number < maps // 2
    columns = {
        "shard": number // SHARD, "png": number % SHARD * 2**17 + 512, "png_size": np.full(maps, 10**5),
        "json": number % SHARD * 2**17 + 2**16, "json_size": np.full(maps, 500), "dataset": ~lit,
        "category": number * len(CATEGORIES) // maps, "split": np.zeros(maps), "label": np.zeros(maps),
        "key_ends": (number + 1) * keys.shape[1],
    }  # fmt: skip
    narrow = {
        name: values.astype(np.int32) for name, values in columns.items() if name not in ("png", "json", "key_ends")
    }
    columns = {name: columns[name].astype(np.int64) for name in ("png", "json", "key_ends")} | narrow
    columns["scene"] = np.where(lit, number // 6 + 1, 0).astype(np.uint64) * np.uint64(2**40 + 1)
    columns["keys"] = keys.reshape(-1)
    names = {"dataset": DATASETS, "category": CATEGORIES, "split": ["train"], "label": ["good"]}
    (folder / INDEX).write_bytes(b"".join(SampleIndex(columns, names).pieces()))
    rows = []
    for shard in range(count):
        path = folder / shard_file(shard, count)
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, SHARD_BYTES)
        samples = min(SHARD, maps - shard * SHARD)
        rows.append({"file": shard_file(shard, count), "sha256": "0" * 64, "bytes": SHARD_BYTES, "samples": samples})
    write_manifest(folder, rows, {"file": INDEX, "sha256": "0" * 64, "bytes": (folder / INDEX).stat().st_size})
    return folder


def walked(folder: Path, maps: int) -> Path:
    """A shard folder of ``maps`` tiny maps without an index."""
    folder.mkdir(parents=True)
    png, near, far = encode_png(DepthMap.from_values(np.linspace(0.5, 0.6, 256).reshape(16, 16)))
    description = {"near": near, "far": far, "coding": "linear", "median": 0.55, "distinct": 256, "unit": "m"}
    description |= {"kind": "metric", "source": "category/train/good/000000.png", "dataset": "lit", "category": "c"}
    description |= {"split": "train", "label": "good", "group": None, "height": 16, "width": 16, "valid_fraction": 1.0}
    rows = []
    for start in range(0, maps, SHARD):
        path, samples = folder / f"depth-{len(rows):06d}.tar", min(SHARD, maps - start)
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in range(start, start + samples):
                for suffix, content in ((PNG, png), (JSON, json.dumps(description).encode())):
                    header = tarfile.TarInfo(f"lit/c/train-good-{number:09d}.{suffix}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
        row = {"file": path.name, "sha256": digest_file(path), "bytes": path.stat().st_size, "samples": samples}
        rows.append(row)
    write_manifest(folder, rows, None)
    return folder


def write_manifest(folder: Path, rows: list[dict], index: dict | None):
    manifest = {"format": FORMAT, "version": VERSION, "sources": {}, "config": {}, "config_hash": digest_json({})}
    manifest |= {"versions": {}, "total": sum(row["samples"] for row in rows), "counts": {}, "shards": rows}
    (folder / MANIFEST).write_text(json.dumps(manifest | ({"index": index} if index else {})))


def own_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def measured(function: Callable[[], object]) -> tuple[object, dict[str, float]]:
    """What the function returns, its processor seconds and the MiB that this process has more afterwards."""
    before, start = own_bytes(), time.process_time()
    result = function()
    seconds = time.process_time() - start
    return result, {"s": seconds, "MiB": (own_bytes() - before) / 2**20}


def opening(folder: Path, rank: int = 0) -> dict[str, float]:
    """Opens a folder as one rank does; only the first looks at the sizes of all shards."""
    with patch.object(distributed, "rank", lambda: rank):
        shards, figures = measured(lambda: DepthShards(str(folder)))
        shards.key(len(shards) - 1)
    return figures


def ordering(folder: Path, settings: dict) -> dict[str, float]:
    """Makes an order and its first epoch, and looks positions up."""
    shards = DepthShards(str(folder))

    def begin() -> EndlessOrder:
        order = EndlessOrder(shards, DataConfig(**settings), 0)
        order[0]
        return order

    order, figures = measured(begin)
    start = time.process_time()
    for position in range(min(READ, order.count)):
        order[position]
    return figures | {"us a map": 1e6 * (time.process_time() - start) / min(READ, order.count)}


def fetching(folder: Path, window: int) -> dict[str, float]:
    """Shards fetched for a map, with a cache of a tenth of them that drops the least recently read."""
    shards = DepthShards(str(folder))
    column, count = shards.column("shard"), len(shards.paths)
    order, cache, fetched = EndlessOrder(shards, DataConfig(window=window), 0), OrderedDict(), 0
    read = min(READ, order.count)
    for position in range(read):
        shard = int(column[order[position]])
        fetched += shard not in cache
        cache[shard] = None
        cache.move_to_end(shard)
        if len(cache) > max(1, CACHE * count):
            cache.popitem(last=False)
    return {"shards a map": fetched / read}


def preparing(folder: Path, shards: int) -> dict[str, float]:
    """Prepares shards of one tiny map each, in this process."""
    (folder / "raw").mkdir(parents=True)
    values = np.random.default_rng(0).uniform(0.5, 0.6, (16, 16)).astype(np.float32)
    np.save(folder / "raw" / "0.npy", values)
    for number in range(1, shards):
        os.link(folder / "raw" / "0.npy", folder / "raw" / f"{number}.npy")
    config = PrepareConfig("folder", str(folder / "raw"), str(folder / "out"), 1, 1, folder=FolderOptions(unit="m"))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        _, figures = measured(lambda: prepare(config))
    return {"ms a shard": 1e3 * figures["s"] / shards}


def peak(function: Callable[[], object]) -> dict[str, float]:
    """Processor seconds, and MiB that this process had more at most while the function ran."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    start, before = time.process_time(), status("VmRSS")
    function()
    return {"s": time.process_time() - start, "MiB": (status("VmHWM") - before) / 2**20}


def status(name: str) -> int:
    """Bytes that the kernel notes of this process."""
    return 1024 * int(re.search(rf"^{name}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])


def planning(folder: Path, maps: int) -> dict[str, float]:
    """Lists so many files and deals them to shards."""
    for number in range(maps):
        scene = folder / f"scene{number // SHARD:06d}"
        if number % SHARD == 0:
            scene.mkdir(parents=True)
        (scene / f"{number:08d}.npy").touch()
    return peak(lambda: plan(PrepareConfig("folder", str(folder), str(folder / "out"), folder=FolderOptions(unit="m"))))


def joining(folder: Path) -> dict[str, float]:
    """Makes the index of a folder from those of its shards, as `prep` does at its end, and its checksum."""
    whole = read_index(folder / INDEX)
    ends = whole.columns["key_ends"]

    def part(start: int) -> SampleIndex:
        columns = {name: values[start : start + SHARD] for name, values in whole.columns.items() if name != "keys"}
        before = int(ends[start - 1]) if start else 0
        keys = whole.columns["keys"][before : int(columns["key_ends"][-1])]
        return SampleIndex(columns | {"key_ends": columns["key_ends"] - before, "keys": keys}, whole.names)

    return peak(lambda: digest_pieces(SampleIndex.join(map(part, range(0, len(whole), SHARD))).pieces()))


def fresh(function: Callable, *arguments) -> Any:
    """What the function returns, in a process of its own: a copy of this one, which does nothing else."""
    with ProcessPoolExecutor(1, get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def extrapolate(sizes: list[int], values: list[float], to: int) -> float:
    """On the line through the last two points, which noise does not turn down; of one point, in proportion."""
    if len(sizes) == 1:
        return values[0] * to / sizes[0]
    slope = (values[-1] - values[-2]) / (sizes[-1] - sizes[-2])
    return values[-1] + max(slope, 0) * (to - sizes[-1])


def table(sizes: list[int], to: int, found: dict[str, list[dict[str, float]]]) -> str:
    """One line for every figure of every measurement, by number of maps."""
    last = [f"{to:,}, extrapolated"] if to else []
    lines = [
        "| | " + " | ".join([*(f"{size:,}" for size in sizes), *last]) + " |",
        "|---" * (len(sizes) + 1 + len(last)) + "|",
    ]
    for what, figures in found.items():
        for unit in figures[0]:
            values = [figure[unit] for figure in figures]
            values += [extrapolate(sizes, values, to)] if to and " a " not in unit else [values[-1]] if to else []
            lines.append(f"| {what}, {unit} | " + " | ".join(f"{value:.3g}" for value in values) + " |")
    return "\n".join(lines)


def measure(sizes: list[int], scratch: Path) -> dict[str, list[dict[str, float]]]:
    """Every measurement of folders with an index, by number of maps."""
    found: dict[str, list[dict[str, float]]] = {}
    mixing = {name: 1.0 for name in DATASETS}
    for maps in sizes:
        folder = fresh(synthetic, scratch / f"{maps}", maps)
        found.setdefault("index on disk", []).append({"MiB": (folder / INDEX).stat().st_size / 2**20})
        window = max(1, int(CACHE * maps / SHARD / 2))
        for what, function, arguments in (
            ("opening, first rank", opening, (0,)),
            ("opening, other ranks", opening, (1,)),
            ("order", ordering, ({},)),
            (f"order, windows of {CACHE / 2:.0%} of the shards", ordering, ({"window": window},)),
            ("order, mixing", ordering, ({"mixing": mixing},)),
            ("order, one_per_group", ordering, ({"one_per_group": True},)),
            ("fetching, any order", fetching, (0,)),
            ("fetching, windows", fetching, (window,)),
            ("prep, the index of all shards", joining, ()),
        ):
            found.setdefault(what, []).append(fresh(function, folder, *arguments))
            print(f"{maps:,} {what}: {found[what][-1]}", file=sys.stderr, flush=True)
        with redirect_stdout(io.StringIO()):
            found.setdefault("prep, its plan", []).append(fresh(planning, scratch / f"raw{maps}", maps))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--to", type=int, default=10_000_000, help="extrapolate to so many; 0: do not")
    parser.add_argument("--walk", type=int, default=5000, help="maps of a folder without an index")
    parser.add_argument("--shards", type=int, nargs="+", default=[200, 2000], help="shards that prep writes")
    options = parser.parse_args()
    sizes = sorted(options.maps)
    with tempfile.TemporaryDirectory() as scratch:
        print(table(sizes, options.to, measure(sizes, Path(scratch))))
        old = fresh(opening, fresh(walked, Path(scratch, "walked"), options.walk))
        print(f"\nwithout an index: {1e6 * old['s'] / options.walk:.0f} us and "
              f"{2**20 * old['MiB'] / options.walk:.0f} bytes a map and rank ({options.walk} maps)")  # fmt: skip
        for shards in options.shards:
            figures = fresh(preparing, Path(scratch, f"prep{shards}"), shards)
            print(f"prep of {shards} shards of one map: {figures['ms a shard']:.2f} ms a shard")


if __name__ == "__main__":
    main()
