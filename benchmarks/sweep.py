"""What one setting does to a short pretraining: several values, several seeds, each probed on unseen maps.

    python benchmarks/sweep.py --work FOLDER --setting optim.lr --values 0.0028 0.0113 0.045
    python benchmarks/sweep.py --work FOLDER --setting loss.prototypes --values 64 256 4096 --seeds 3 --jobs 2

Everything else is the demo's configuration, or that of ``--config``; ``--more`` passes further words to every run
(``--more "--train.batch 64 --optim.warmup 15"``). ``--maps N`` gives every value of ``train.batch`` as many maps
instead of as many steps, with a warm-up over a quarter of them. Without ``--shards`` maps are rendered first. Prints a
Markdown table of gains on random initialisation: mean over seeds, smallest and largest seed, and half the widest 95 %
interval of a single probe, which is over maps and knows nothing of seeds. FOLDER keeps every run; a rerun does what is
missing.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from normalization import FIGURES, call


def render(work: Path, per_category: int) -> str:
    raw, shards = work / "raw", work / "shards"
    if not raw.exists():
        counts = ["--per_category", str(per_category), "--test_per_category", "0"]
        call("synth", "mvtec3d", "--out", str(raw), "--size", "144", "--validation_per_category", "32", *counts)
    call("prep", "mvtec3d", "--root", str(raw), "--out", str(shards))
    return str(shards)


def measure(options: argparse.Namespace, shards: str, value: str, seed: int) -> dict:
    """The probe of one run, with the exit code of its pretraining: 4 where the health gate ended it."""
    run = Path(options.work) / f"{options.setting}-{value}-{seed}"
    if not (run / "probe.json").is_file():
        words = ["--data.shards", shards, "--data.workers", "0", "--train.threads", "1", "--train.seed", str(seed)]
        steps = options.maps // int(value) if options.maps else options.steps
        words += ["--train.steps", str(steps), *(["--optim.warmup", str(steps // 4)] if options.maps else [])]
        words += [
            "--train.checkpoint_every",
            str(max(1, steps // 12)),
            *options.more.split(),
        ]  # where a gate may end it
        words += [f"--{options.setting}", value]
        code = call("pretrain", "--config", options.config, "--out", str(run), "--resume", *words)
        (run / "gate").write_text(str(code))
        call("probe", str(run), "--shards", shards, "--out", str(run / "probe.json"))
    return json.loads((run / "probe.json").read_text())["figures"] | {"gate": (run / "gate").read_text()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True)
    parser.add_argument("--shards")
    parser.add_argument("--setting", required=True)
    parser.add_argument("--values", nargs="+", required=True)
    parser.add_argument("--config", default="pretrain_demo")
    parser.add_argument("--more", default="")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--maps", type=int, default=0, help="of --setting train.batch: maps instead of steps")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--per_category", type=int, default=64)
    options = parser.parse_args()
    if options.maps and options.setting != "train.batch":
        parser.error("--maps needs --setting train.batch")
    shards = options.shards or render(Path(options.work), options.per_category)
    trials = [(value, seed) for value in options.values for seed in range(options.seeds)]
    with ThreadPoolExecutor(options.jobs) as pool:
        probes = dict(zip(trials, pool.map(lambda trial: measure(options, shards, *trial), trials), strict=True))
    print(f"| {options.setting} | gate |" + "".join(f" {name}, gain |" for name in FIGURES))
    print("|---|---|" + "---|" * len(FIGURES))
    for value in options.values:
        rows = [probes[value, seed] for seed in range(options.seeds)]
        gates = " ".join(row["gate"] for row in rows)
        print(
            f"| {value} | {gates} | "
            + " | ".join(_cell([row[name]["gain"] for row in rows]) for name in FIGURES)
            + " |"
        )


def _cell(gains: list[dict]) -> str:
    """Mean over seeds, the seeds' range, and half the widest interval over maps of a single seed."""
    values = [gain["value"] for gain in gains]
    width = max(gain["high"] - gain["low"] for gain in gains) / 2
    return f"{sum(values) / len(values):+.3f} [{min(values):+.3f}, {max(values):+.3f}] ± {width:.3f}"


if __name__ == "__main__":
    main()
