"""Maps per second of data preparation on one core, against decoding the raw files alone, and its peak memory.

    python benchmarks/prep.py [--readers mvtec3d ...] [--root visa=/data/VisA ...] [--maps 16] [--size 512] [--gate]

Three things are timed for each reader, in processor time and interleaved so that other load on the machine hits all
alike: decoding the raw files (the floor), reading them to depth maps, and the whole way to a finished shard. Readers of
images end at the decoded colours: the model that makes depth of them is not counted, and the floor is nearly all there
is. Without ``--root`` the raw files are rendered; ``folder`` then reads the PNGs of the Eyecandies layout.

Peak memory is that of a fresh process that runs ``dino-depth prep folder`` on many links to one tiny map, so that only
what grows with the number of samples can differ. ``--gate`` exits 4 where a reader takes more than 2.5 times its floor
or memory grows by more than 15 %.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_prep.exr import decode_exr
from data_prep.folder import FolderOptions
from data_prep.formats import decode_image, decode_npy, decode_pfm, decode_pgm, decode_png, decode_tiff
from data_prep.item import Item, shared_keys
from data_prep.listing import READERS, list_source
from data_prep.output import PROGRESS
from data_prep.shard_writer import ShardTask, makes_images, reader_module, write_shard
from data_prep.shards import PrepareConfig
from data_prep.synthetic import LAYOUTS, SynthConfig, synth
from dino_depth.errors import DataError, GateError, ReportedError

TIMES_FLOOR, GROWTH = 2.5, 1.15
FEW, MANY = 100, 10_000
STAGES = ("decode", "read", "whole")
DECODERS = {
    ".png": decode_png, ".pgm": decode_pgm, ".pfm": decode_pfm, ".npy": decode_npy, ".exr": decode_exr,
}  # fmt: skip


def render(layout: str, folder: Path, maps: int, size: int) -> Path:
    """The root of a rendered tree that holds at least ``maps`` training samples."""
    root = folder / layout
    if not root.exists():
        each = -(-maps // 4)
        synth(SynthConfig(layout, str(root), each, size=size, test_per_category=2, categories=4))
    return root


def stages(name: str, items: list[Item], scratch: Path) -> dict[str, Callable[[], None]]:
    """What is timed of a reader: functions that take all ``items`` once."""
    reader = reader_module(name)
    if makes_images(reader):
        return {
            "decode": lambda: [decode_image(item.file.read()) for item in items],
            "whole": lambda: [reader.read_image(item) for item in items],
        }
    decode = DECODERS.get(items[0].file.suffix, decode_tiff)
    shared = shared_keys(lambda: items)

    def whole():
        # A new folder each time: a shard that is there is not written again.
        out = Path(tempfile.mkdtemp(dir=scratch))
        (out / PROGRESS).mkdir()
        row = write_shard(ShardTask(0, out, name, 0, items, shared), lambda done: None)
        if row["samples"] < len(items):
            raise DataError(f"{name}: {row['dropped'][0]['path']}: {row['dropped'][0]['reason']}")

    return {
        "decode": lambda: [decode(item.file.read()) for item in items],
        "read": lambda: [reader.read(item) for item in items],
        "whole": whole,
    }


def time_interleaved(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Processor seconds of every function in every round, after one that is not counted."""
    seconds = {name: [] for name in functions}
    for round_ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if round_:
                seconds[name].append(time.process_time() - start)
    return seconds


def peak_mebibytes(samples: int, scratch: Path) -> float:
    """Peak memory of a process that prepares ``samples`` maps of 16 x 16 pixels."""
    root = scratch / f"{samples}" / "links"
    root.mkdir(parents=True)
    np.save(root / "0.npy", np.random.default_rng(0).uniform(0.5, 0.6, (16, 16)).astype(np.float32))
    for number in range(1, samples):
        os.link(root / "0.npy", root / f"{number}.npy")
    words = ["prep", "folder", "--root", str(root), "--out", str(scratch / f"{samples}" / "out"), "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "dino_depth.cli", *words], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise ReportedError(f"dino-depth {' '.join(words)} ended with exit code {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024  # kibibytes on Linux


def sources(options: argparse.Namespace, scratch: Path) -> dict[str, tuple[Path, FolderOptions]]:
    """Root and folder options of every reader to be timed."""
    found = {}
    for name in options.readers or READERS:
        if name in options.root:
            found[name] = (Path(options.root[name]), FolderOptions())
        elif name in LAYOUTS:
            found[name] = (render(name, scratch, options.maps, options.size), FolderOptions())
        elif name == "folder":
            root = render("eyecandies", scratch, options.maps, options.size)
            found[name] = (root, FolderOptions(glob="**/*_depth.png"))
        else:
            print(f"{name}: no such layout can be rendered; give --root {name}=DIR", file=sys.stderr)
    return found


def named_root(text: str) -> tuple[str, str]:
    name, _, root = text.partition("=")
    if name not in READERS or not root:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=DIR with one of {', '.join(READERS)}")
    return name, root


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", nargs="+", choices=READERS, help="all if not given")
    parser.add_argument("--root", nargs="+", type=named_root, default=[], metavar="NAME=DIR", help="real data")
    parser.add_argument("--maps", type=int, default=16, help="files of each reader in a round")
    parser.add_argument("--size", type=int, default=512, help="height and width of rendered maps")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--gate", action="store_true", help="exit 4 below the targets")
    options = parser.parse_args()
    options.root = dict(options.root)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        # First, while this process is small: what it holds counts as memory of the processes it starts.
        few, many = (peak_mebibytes(samples, scratch) for samples in (FEW, MANY))
        print(f"peak memory of prep: {few:.0f} MiB at {FEW} maps, {many:.0f} MiB at {MANY}, {many / few:.2f} x")
        if many > GROWTH * few:
            failures.append(f"memory: {many / few:.2f} x from {FEW} to {MANY} maps, wanted at most {GROWTH} x")
        print(f"\n{'processor ms per map':20}{'decode':>9}{'read':>9}{'whole':>9}{'maps/s':>9}   whole/decode")
        print(f"{'':56}{'of minima':>12}{'medians':>10}")
        for name, (root, folder_options) in sources(options, scratch).items():
            settings = PrepareConfig(folder=folder_options)
            items = list_source(name, str(root), getattr(settings, name, None)).items
            items = items[:: max(1, len(items) // options.maps)][: options.maps]
            seconds = time_interleaved(stages(name, items, scratch), options.rounds)
            best, middle = (
                {stage: statistic(values) / len(items) * 1e3 for stage, values in seconds.items()}
                for statistic in (min, statistics.median)
            )
            row = "".join(f"{middle[stage]:9.2f}" if stage in middle else f"{'':9}" for stage in STAGES)
            ratio = best["whole"] / best["decode"]
            print(
                f"{name:20}{row}{1e3 / middle['whole']:9.0f}{ratio:12.2f}{middle['whole'] / middle['decode']:10.2f}",
                flush=True,
            )
            if ratio > TIMES_FLOOR:
                failures.append(f"{name}: {ratio:.2f} x decoding, wanted at most {TIMES_FLOOR} x")
    if options.gate and failures:
        raise GateError("; ".join(failures))


if __name__ == "__main__":
    try:
        main()
    except ReportedError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
