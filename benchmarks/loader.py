"""Maps per second of the data loader (decode, normalise, ten crops, masks), and its wait as a share of a training step.

    python benchmarks/loader.py SHARDS [--config pretrain] [--maps 256] [--workers 0 1 2] [--steps 20]

The wait is what the training loop itself measures over ``--steps`` steps of a real run of the configuration.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from dino_depth.config import PretrainConfig, parse
from dino_depth.pretrain.loading import make_loader, open_maps
from dino_depth.pretrain.maps import Maps
from dino_depth.pretrain.train import pretrain
from dino_depth.shards import DepthShards


def rate(maps: Maps, config: PretrainConfig, count: int) -> float:
    """Maps per second over ``count`` maps, after the first batch."""
    config.train.steps = count // config.train.batch + 2
    loader = make_loader(maps, config, 0, torch.device("cpu"))
    next(loader)
    start = time.perf_counter()
    batches = sum(1 for _ in loader)
    return batches * config.train.batch / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards")
    parser.add_argument("--config", default="pretrain")
    parser.add_argument("--maps", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=20, help="of a real run; 0 skips it")
    options = parser.parse_args()
    words = ["--config", options.config, "--data.shards", options.shards, "--train.batch", str(options.batch)]
    torch.set_num_threads(1)
    for resident in (False, True):
        for workers in options.workers:
            config = parse(PretrainConfig, words, "loader")
            config.data.workers, config.data.resident = workers, resident
            maps = open_maps(DepthShards.configured(config.data), config.data, torch.device("cpu"))
            kept = "resident" if resident else "from disk"
            print(f"{workers} workers, {kept:9}  {rate(maps, config, options.maps):7.1f} maps/s", flush=True)
    if options.steps:
        with tempfile.TemporaryDirectory() as folder:
            config = parse(PretrainConfig, [*words, "--out", folder + "/run", "--data.workers", "1"], "loader")
            config.train.steps, config.train.log_every = options.steps, options.steps
            pretrain(config)
            figures = json.loads(Path(folder, "run", "metrics.jsonl").read_text().splitlines()[-1])
        print(
            f"training: {figures['speed/maps_per_second']:.1f} maps/s, waits {figures['speed/data_wait']:.1%} of a step"
        )


if __name__ == "__main__":
    main()
