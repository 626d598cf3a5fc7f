"""Memory and time of every head on one instance of SiM3D's size: 36 views of 896 px, 64 x 64 cells of 768 channels.

    python benchmarks/heads.py --out FOLDER [--views 36] [--size 896] [--channels 768] [--heads patchcore ast ...]
        [--steps 1]

The views are those of ``sim3d_scale.py`` at that size; features are the pixels of each patch through a fixed random
matrix, so that no encoder counts. Each head is fitted in a process of its own on one instance and scores another of the
same views; heads that train take ``steps`` steps, which is all their memory and a known share of their time. Peak
memory is that of the process less what it had before the head: the interpreter, torch and the features of one instance.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import torch
from sim3d_scale import write_tree

from dino_depth.anomaly import heads
from dino_depth.anomaly.benchmarks import BenchmarkConfig, open_benchmark
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads import Context
from dino_depth.anomaly.heads.efficientad.networks import KERNELS, pdn
from dino_depth.anomaly.views import Views
from dino_depth.frozen import load_frozen

GIB = 2.0**30


def encoder(modality: str, channels: int):
    """The pixels of each patch, projected, and noise: all views are one picture, and equal rows are no bank."""
    found = load_frozen("raw-patches?patch=14", modality=modality)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(found.dim, channels, generator=generator) / found.dim**0.5

    def to_features(inputs: torch.Tensor) -> torch.Tensor:
        features = found.to_features(inputs) @ matrix
        return features + 0.1 * torch.randn(features.shape, generator=generator)

    return replace(found, dim=channels, to_features=to_features)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def settings(module, folder: Path, steps: int):
    """The defaults, with few steps where a head has some, and random weights where it wants a teacher's."""
    named, changed = {field.name for field in fields(module.Config)}, {}
    if "teacher" in named and isinstance(module.Config().teacher, str):
        torch.manual_seed(0)
        torch.save(pdn(KERNELS[False], [3, 128, 256, 256, 384]).state_dict(), folder / "teacher.pth")
        changed["teacher"] = str(folder / "teacher.pth")
    changed |= {name: steps for name in ("steps", "fusion_steps") if name in named}
    return module.Config(**changed, **({"fusion": True} if "fusion" in named else {}))


def measure(name: str, root: Path, options: argparse.Namespace) -> dict:
    module = heads.open_head(name)
    config = settings(module, root, options.steps)
    needs = module.needs(config)
    if "layers" in needs:
        encoders = [load_frozen("random:timm:resnet34?layers=1-2-3", modality=part) for part in ("image", "depth")]
    else:
        encoders = [encoder(part, options.channels) for part in ("image", "depth")]
    size = options.size // 32 * 32 if "layers" in needs else options.size // 14 * 14
    store = FeatureStore(*encoders, size, object_pixels=ForegroundConfig())
    benchmark = open_benchmark(BenchmarkConfig(root=str(root)))
    train, tested = (Views(benchmark.samples("egg", split)[-1], store, resident=True) for split in ("train", "test"))
    if needs & {"image", "depth"}:
        assert train.image is not None and train.depth is not None
    before = peak()
    start = time.process_time()
    head = module.fit([train], config, Context(0, torch.device("cpu")))
    fitted = time.process_time() - start
    start = time.process_time()
    maps = module.score(head, tested)
    scored = time.process_time() - start
    assert all(part.isfinite().all() for part in maps.values())
    return {"head": name, "before": before, "peak": peak(), "fit": fitted, "score": scored}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=36)
    parser.add_argument("--size", type=int, default=896)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--heads", nargs="+", default=heads.names())
    parser.add_argument("--one", action="store_true", help="measure the first head here and print JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = options.out / f"{options.views}x{options.size}"
    height = round(options.size * 3 / 4)
    write_tree(root, argparse.Namespace(views=options.views, height=height, width=options.size, scale=1.0))
    if options.one:
        print(json.dumps(measure(options.heads[0], root, options)))
        return
    print(f"{options.views} views of {options.size} px, {options.channels} channels, {options.steps} steps, one thread")
    for name in options.heads:
        given = [arg for arg in sys.argv[1:] if arg != "--one"]
        command = [sys.executable, __file__, *given, "--heads", name, "--one"]
        found = subprocess.run(command, capture_output=True, text=True)
        if found.returncode:
            print(
                f"{name:12} failed ({found.returncode}): {(found.stderr.strip().splitlines() or ['killed'])[-1][:120]}"
            )
            continue
        one = json.loads(found.stdout.splitlines()[-1])
        print(f"{name:12} fit {one['fit']:7.1f} s, score {one['score']:7.1f} s, peak {one['peak']:5.1f} GiB, "
              f"of which the head {one['peak'] - one['before']:5.1f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
