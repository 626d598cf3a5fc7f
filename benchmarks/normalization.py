"""Which input normalisation pretrains the better encoder: the demo's training with each, probed on unseen maps.

    python benchmarks/normalization.py --work FOLDER [--seeds 2] [--jobs 2]

Half of the rendered training maps stand on a supporting plane, half float before nothing, as objects on a turntable do;
each encoder is probed on either kind alone. Prints a Markdown table of means over seeds with the widest interval of a
single probe; FOLDER keeps every run and probe, and a rerun does only what is missing.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METHODS = ("plane", "minmax", "log", "max")
FIGURES = ("knn_class", "knn_patch", "normal", "curvature")


def call(*words: str):
    """One dino-depth command on one thread."""
    command = ["env", "OMP_NUM_THREADS=1", "OPENBLAS_NUM_THREADS=1", sys.executable, "-m", "dino_depth.cli", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 4):
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    return done.returncode


def measure(work: Path, method: str, seed: int, steps: int) -> dict:
    run = work / f"{method}-{seed}"
    folders = [str(work / "shards" / kind) for kind in ("plane", "floating")]
    if not (run / "floating.json").is_file():
        words = ["--data.shards", json.dumps(folders), "--data.workers", "0", "--data.normalization.method", method]
        words += ["--train.seed", str(seed), "--train.steps", str(steps), "--train.threads", "1"]
        code = call("pretrain", "--config", "pretrain_demo", "--out", str(run), "--resume", *words)
        (run / "gate").write_text(str(code))
        for kind, folder in zip(("plane", "floating"), folders, strict=True):
            call("probe", str(run), "--shards", folder, "--out", str(run / f"{kind}.json"))
    probes = {kind: json.loads((run / f"{kind}.json").read_text()) for kind in ("plane", "floating")}
    return probes | {"gate": (run / "gate").read_text()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--per_category", type=int, default=64)
    options = parser.parse_args()
    work = Path(options.work)
    for kind, plane in (("plane", "1"), ("floating", "0")):
        raw, shards = work / "raw" / kind, work / "shards" / kind
        if not raw.exists():
            words = ["--per_category", str(options.per_category), "--size", "144"]
            words += ["--test_per_category", "0", "--validation_per_category", "50"]
            call("synth", "mvtec3d", "--out", str(raw), "--plane", plane, *words)
        call("prep", "mvtec3d", "--root", str(raw), "--out", str(shards))
    trials = [(method, seed) for method in METHODS for seed in range(options.seeds)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(trials, pool.map(lambda trial: measure(work, *trial, options.steps), trials), strict=True))
    print("| maps | normalisation | gate |" + "".join(f" {name} |" for name in FIGURES))
    print("|---|---|---|" + "---|" * len(FIGURES))
    for kind in ("plane", "floating"):
        for method in METHODS:
            probes = [results[method, seed][kind] for seed in range(options.seeds)]
            gates = " ".join(results[method, seed]["gate"] for seed in range(options.seeds))
            row = [_cell([probe["figures"][name] for probe in probes]) for name in FIGURES]
            print(f"| {kind} | {method} | {gates} | " + " | ".join(row) + " |")


def _cell(figures: list[dict]) -> str:
    """Random -> trained, means over seeds, and half the widest 95 % interval of trained - random."""
    trained = sum(figure["trained"]["value"] for figure in figures) / len(figures)
    random = sum(figure["random"]["value"] for figure in figures) / len(figures)
    width = max(figure["gain"]["high"] - figure["gain"]["low"] for figure in figures) / 2
    return f"{random:.3f} -> {trained:.3f} ({trained - random:+.3f} ± {width:.3f})"


if __name__ == "__main__":
    main()
