"""Does a last phase at a higher resolution help where the encoder is used, at a larger input still?

    python benchmarks/high_resolution.py --work FOLDER --shards SHARDS [--seeds 2]

For every seed the demo's network is pretrained at 98 px; from its last checkpoint one run goes on at 98 px, others for
as many steps at 196 px and at a size drawn for each step. They are probed at 392 and 896 px on held-out maps. Prints a
Markdown table of the phases at 196 px and at several sizes against the others, with paired 95 % intervals over query
maps; FOLDER keeps every run and probe, and a rerun does only what is missing.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from dino_depth.probing.probe import ProbeConfig, load_with_twin, probe_encoders

FIGURES = ("knn_class", "knn_patch", "normal", "curvature")
BASE, SAME, HIGH, MIXED = "no phase", "as many steps at 98 px", "196 px", "98, 140 and 196 px"
# phase -> (global, local) sides; of several, each step draws one
PHASES = {SAME: [(98, 42)], HIGH: [(196, 84)], MIXED: [(98, 42), (140, 56), (196, 84)]}
# side -> gallery maps, query maps, batch, pairs of phase and what it is against
SIZES = {
    392: (512, 256, 16, [(HIGH, BASE), (HIGH, SAME), (MIXED, BASE), (MIXED, SAME), (MIXED, HIGH)]),
    896: (64, 48, 4, [(HIGH, SAME), (MIXED, SAME), (MIXED, HIGH)]),
}


def pretrain(out: Path, shards: str, seed: int, *words: str):
    command = [sys.executable, "-m", "dino_depth.cli", "pretrain", "--config", "pretrain_demo", "--out", str(out)]
    command += ["--resume", "--data.shards", shards, "--data.workers", "0", "--train.seed", str(seed), *words]
    start = time.perf_counter()
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{out}: {done.stderr.strip().splitlines()[-1]}")
    print(f"{out}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--base_steps", default="300")
    parser.add_argument("--steps", default="60")
    options = parser.parse_args()
    print("| seed | input | phase | against |" + "".join(f" {name} |" for name in FIGURES))
    print("|---|---|---|---|" + "---|" * len(FIGURES))
    for seed in range(options.seeds):
        runs = {BASE: Path(options.work) / f"base-{seed}"}
        pretrain(runs[BASE], options.shards, seed, "--train.steps", options.base_steps)
        for name, ((large, small), *more) in PHASES.items():
            runs[name] = Path(options.work) / f"{large}-{len(more)}-{seed}"
            # The schedules of the demo, compressed, from a quarter of its learning rate.
            words = ["--init_from", str(runs[BASE]), "--train.steps", options.steps, "--optim.lr", "0.0028"]
            words += ["--optim.warmup", "4", "--crops.global_size", str(large)]
            words += ["--crops.local_size", str(small), "--crops.sizes", json.dumps(more)]
            pretrain(runs[name], options.shards, seed, *words)
        encoders = {name: load_with_twin(str(run))[0] for name, run in runs.items()}
        for side, (gallery, queries, batch, pairs) in SIZES.items():
            for name, other in pairs:
                path = Path(options.work) / f"{seed}-{side}-{name}-{other}.json".replace(" ", "_")
                if not path.is_file():
                    config = ProbeConfig(
                        str(runs[BASE]), options.shards, size=side, batch=batch, max_gallery=gallery,
                        max_queries=queries, query_splits=["validation"],
                    )  # fmt: skip
                    path.write_text(json.dumps(probe_encoders(encoders[name], encoders[other], config)))
                figures = json.loads(path.read_text())["figures"]
                cells = [_cell(figures[key]) for key in FIGURES]
                print(f"| {seed} | {side} | {name} | {other} | " + " | ".join(cells) + " |", flush=True)


def _cell(figure: dict) -> str:
    """Other -> phase, and the paired gain with its interval."""
    gain = figure["gain"]
    change = f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"
    return f"{figure['random']['value']:.3f} -> {figure['trained']['value']:.3f}, {change}"


if __name__ == "__main__":
    main()
