"""SGANet: what its steps add on a synthetic benchmark, and what a step of its training takes.

    python benchmarks/sganet.py rows SIM3D --out FILE [--rows NAME ...] [--categories NAME ...] [--encoder lite0]
        [--depth tiny@392] [--cache FOLDER]
    python benchmarks/sganet.py table FILE
    python benchmarks/sganet.py step [--views 36] [--side 64] [--channels 768] [--shown 1.0]

``rows`` fits and scores every row on every object of a tree of ``dino-depth synth sim3d``, in one process that encodes
an object once, and appends a line for each to FILE; a run that was stopped continues. ``--depth`` names another encoder
of depth, ``@`` the side of its input. ``table`` prints them: a row is the mean over objects, with its paired difference
from the untrained row and a bootstrap interval over objects (90 %, so that its lower end is a one-sided 95 % bound).
``step`` takes one step of the training and prints its seconds and memory beside the counted arithmetic.
"""

import argparse
import json
import resource
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dino_depth.anomaly.benchmarks.sim3d import Sim3dOptions, open_benchmark
from dino_depth.anomaly.features import FeatureStore, SampleFeatures
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads import Context, patchcore, sganet
from dino_depth.anomaly.heads.sganet import Config, method
from dino_depth.anomaly.metrics import auroc, bootstrap, pooled_aupro, voxel_regions
from dino_depth.anomaly.model import PrepareConfig, fit_model
from dino_depth.anomaly.views import Views
from dino_depth.anomaly.volume import VoxelConfig, accumulate, truth_voxels
from dino_depth.device import return_memory
from dino_depth.frozen import load_frozen

CPU = torch.device("cpu")
METRICS = ("I-AUROC", "V-AUPRO@1% occupied")
REFERENCE = "untrained"
# The views of one turn: the last one lies beside the first.
PLAIN = Config(adjacency="sequence+wrap")
BASE = replace(PLAIN, semantic=0.0, structural=0.0)
UNTRAINED = replace(PLAIN, untrained=True)
RAW = patchcore.Config(share=1.0, limit=10**6)

ROWS = {
    "raw": ("raw features (PatchCore, no coreset)", patchcore, RAW),
    "untrained": ("untrained", sganet, UNTRAINED),
    "base": ("base: geometric loss alone", sganet, BASE),
    "semantic": ("base + semantic", sganet, replace(BASE, semantic=1.0)),
    "structural": ("base + structural", sganet, replace(BASE, structural=1.0)),
    "all": ("all losses", sganet, PLAIN),
    "shuffled": ("all losses, neighbours in a random order", sganet, replace(PLAIN, shuffled=True)),
    "untrained_shuffled": ("untrained, neighbours in a random order", sganet, replace(UNTRAINED, shuffled=True)),
    "untrained_alone": ("untrained, without residual", sganet, replace(UNTRAINED, residual=False)),
    "fast": ("all losses, learning rate 1e-3", sganet, replace(PLAIN, learning_rate=1e-3)),
    "fast_base": ("base, learning rate 1e-3", sganet, replace(BASE, learning_rate=1e-3)),
    "xavier": ("all losses, random start", sganet, replace(PLAIN, start="xavier")),
    "raw_image": ("raw features of the image", patchcore, replace(RAW, modality="image")),
    "raw_depth": ("raw features of depth", patchcore, replace(RAW, modality="depth")),
    "untrained_image": ("untrained, image alone", sganet, replace(UNTRAINED, modality="image")),
    "untrained_depth": ("untrained, depth alone", sganet, replace(UNTRAINED, modality="depth")),
    **{f"untrained_{k}": (f"untrained, K = {k}", sganet, replace(UNTRAINED, candidates=k)) for k in (1, 2, 4, 16)},
    **{f"base_near_{k}": (f"base, k = {k}", sganet, replace(BASE, neighbours=k)) for k in (1, 3, 4)},
    **{f"all_{k}": (f"all losses, K = {k}", sganet, replace(PLAIN, candidates=k)) for k in (2, 4, 6, 10)},
    **{f"near_{k}": (f"all losses, k = {k}", sganet, replace(PLAIN, neighbours=k)) for k in (1, 3, 4)},
}  # fmt: skip


def measure(options: argparse.Namespace):
    spec, _, side = options.depth.partition("@")
    named = {"image": options.encoder, "depth": spec or options.encoder}
    encoders = [load_frozen(named[name], modality=name, device=CPU) for name in named]
    sizes = options.size, int(side or options.size)
    store = FeatureStore(*encoders, sizes, options.cache or None, object_pixels=ForegroundConfig())
    benchmark = open_benchmark(options.root, Sim3dOptions())
    out = Path(options.out)
    done = {(line["object"], line["row"]) for line in read(out)}
    for category in options.categories or benchmark.categories:
        wanted = [row for row in options.rows or ROWS if (category, row) not in done]
        if not wanted:
            continue
        train = [Views(sample, store, resident=True) for sample in benchmark.samples(category, "train")]
        test = [Views(sample, store, resident=True) for sample in benchmark.samples(category, "test")]
        truth = [sample.read_truth() for sample in benchmark.samples(category, "test")]
        for row in wanted:
            found = {"object": category, "row": row} | scored(*ROWS[row][1:], train, test, truth)
            with out.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)


def scored(head: Any, config: Any, train: list[Views], test: list[Views], truth: list) -> dict[str, float]:
    """The metrics of a head, its module and its settings, on one object."""
    start = time.process_time()
    model = fit_model(head, config, PrepareConfig(), Context(0, CPU), train)
    fitted = time.process_time() - start
    labels, instances, regions, health = [], [], [], []
    for views, defects in zip(test, truth, strict=True):
        sound = views.sample.label == "good" and len(health) < 4
        scores = model.score(views, sound)
        maps = scores.maps
        health += [scores.health] if scores.health else []
        volume = accumulate(maps, views.sample, views.depths, views.foregrounds, VoxelConfig(), defects)
        grid = volume.voxels
        found, label = truth_voxels(defects, views.sample, views.depths, grid)
        if label is not None:
            label = np.unique(label, return_inverse=True)[1].astype(np.int32) + 1
        part = voxel_regions(grid.index, volume.score, found.index, grid.shape, labels=label)
        regions.append(replace(part, empty_normal=0))
        labels.append(int(views.sample.label == "anomalous"))
        instances.append(volume.instance_score)
    figures = {METRICS[0]: auroc(np.array(instances), np.array(labels)), METRICS[1]: pooled_aupro(regions, limit=0.01)}
    if head is sganet:
        figures |= {name: [float(curve[0]), float(curve[-1])] for name, curve in model.head.curves.items()}
    for name in health[0] if health else ():
        figures[name] = float(np.median([one[name] for one in health if name in one]))
    return figures | {"fit_seconds": round(fitted, 1), "seconds": round(time.process_time() - start, 1)}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(options: argparse.Namespace):
    found = {(line["object"], line["row"]): line for line in read(Path(options.file))}
    rows = [row for row in ROWS if any(name == row for _, name in found)]
    objects = sorted({name for name, row in found if row == REFERENCE})
    print(f"| | objects | {' | '.join(f'{name} | less {REFERENCE}' for name in METRICS)} |\n|---" + "|---" * 5 + "|")
    for row in rows:
        there = [name for name in objects if (name, row) in found]
        if not there:
            continue
        parts = []
        for metric in METRICS:
            values, others = (np.array([found[name, one][metric] for name in there]) for one in (row, REFERENCE))
            parts += [f"{values.mean():.3f}", "" if row == REFERENCE else interval(values - others)]
        print(f"| {ROWS[row][0]} | {len(there)} | " + " | ".join(parts) + " |")


def interval(values: np.ndarray) -> str:
    found = bootstrap(lambda counts: counts @ values / counts.sum(1), np.zeros(len(values)), resamples=10000, level=0.9)
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def step(options: argparse.Namespace):
    """One step on random features, and the arithmetic that it has to do."""
    generator = torch.Generator().manual_seed(0)
    shape = options.views, options.side, options.side
    image, depth = (torch.randn(*shape, options.channels, generator=generator) for _ in range(2))
    share = (torch.rand(shape, generator=generator) < options.shown).float()
    features = SampleFeatures(image, depth, share)
    config = replace(PLAIN, geometric=0.0)
    before = time.perf_counter()
    prepared = sganet._prepare(features, share > 0, config, 0, CPU, False)
    print(f"selection {time.perf_counter() - before:.1f} s, {peak():.2f} GiB at most so far")
    modules = sganet._modules(config, (options.channels, options.channels))
    every = [len(view["image"]) for view in prepared.asked]
    least = min(every)
    # Random features have no geometry: as many pairs as there are cells stand for it, four of each view as by default.
    pairs = torch.arange(least), torch.arange(least)
    near = method.neighbourhood(config.adjacency, options.views, config.neighbours)
    matched = {(v, u): pairs for v, others in enumerate(near) for u in others}
    following = [((v + 1) % options.views, pairs) for v in range(options.views)]
    contrast = partial(method.contrast, temperature=config.temperature)
    terms = {"semantic": contrast, "structural": contrast, "geometric": method.geometric_loss}
    before = time.perf_counter()
    with return_memory():
        refined = [prepared.refined(modules, view) for view in range(options.views)]
        total = sum(method.losses(refined, following, matched, terms).values())
        total.backward()
    seconds = time.perf_counter() - before
    counted = arithmetic(every, options.channels)
    print(f"step {seconds:.1f} s, {peak():.2f} GiB at most, features {2 * image.nbytes / 2**30:.2f} GiB")
    loss = float(total.detach())
    print(f"counted {counted / 1e12:.3f} TFLOP, {counted / seconds / 1e9:.0f} GFLOP/s, loss {loss:.4f}")


def arithmetic(cells: list[int], channels: int) -> float:
    """Floating point operations of the matrix products of a step, forwards and backwards."""
    # Query, key and value: three products forwards; a matrix and an input behind each but the first.
    projections = sum(2 * count * channels**2 * (3 + 5) for count in cells) * 2
    attention = sum(2 * count * 16 * channels * (2 + 2) for count in cells) * 2
    # Logits once forwards and once more for the gradient, which is two products; of both contrasts.
    contrasts = sum(2 * count**2 * channels * (2 + 2) for count in cells) * 2
    return projections + attention + contrasts


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    rows = commands.add_parser("rows")
    rows.add_argument("root")
    rows.add_argument("--out", required=True)
    rows.add_argument("--rows", nargs="+", choices=list(ROWS))
    rows.add_argument("--categories", nargs="+")
    rows.add_argument("--encoder", default="lite0")
    rows.add_argument("--depth", default="", help="encoder of depth, as tiny@392; without it that of the image")
    rows.add_argument("--cache", default="", help="folder of encoded views")
    rows.add_argument("--size", type=int, default=224)
    commands.add_parser("table").add_argument("file")
    one = commands.add_parser("step")
    for name, value in (("views", 36), ("side", 64), ("channels", 768)):
        one.add_argument(f"--{name}", type=int, default=value)
    one.add_argument("--shown", type=float, default=1.0, help="share of the cells that show the object")
    options = parser.parse_args()
    {"rows": measure, "table": table, "step": step}[options.command](options)


if __name__ == "__main__":
    main()
