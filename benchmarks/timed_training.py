"""Trains for a stated time on given shards, schedules and all, and probes the result; prints Markdown.

    python benchmarks/timed_training.py --shards SHARDS --out RUN --minutes 10 [--config pretrain_small_data] [settings]

The number of steps is what fits the time at the rate of a short run before; warm-ups keep the published recipe's share
of the steps. Making maps resident, compiling and the probe come on top of the time.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from dino_depth.config import PretrainConfig, parse

RATE_STEPS = 40  # of the short run; its last quarter is measured
# Published steps of 125,000.
WARM_UPS = {"optim.warmup": 12500, "optim.freeze_last_layer": 1250, "loss.teacher_temperature_warmup": 37500}


def call(*words: str) -> int:
    """One dino-depth command; a run that its health gate ends is a result too."""
    done = subprocess.run([sys.executable, "-m", "dino_depth.cli", *words], capture_output=True, text=True)
    if done.returncode not in (0, 4):
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()[-2000:]}")
    return done.returncode


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--out", type=Path, required=True, help="new folder of the run; OUT-rate holds the short one")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--config", default="pretrain_small_data")
    options, settings = parser.parse_known_args()
    words = ["--config", options.config, "--data.shards", options.shards, "--data.splits", "[train]", *settings]
    config = parse(PretrainConfig, words, "timed_training")

    short = options.out.with_name(options.out.name + "-rate")
    call("pretrain", *words, "--out", str(short), "--train.steps", str(RATE_STEPS), "--train.log_every", "10")
    rate = metrics(short)[-1]["speed/maps_per_second"]
    steps = max(RATE_STEPS, round(options.minutes * 60 * rate / config.train.batch))
    warm = [word for key, count in WARM_UPS.items() for word in (f"--{key}", str(round(count / 125000 * steps)))]
    if config.loss.teacher_temperature_start == config.loss.teacher_temperature:
        warm = warm[:-2]
    code = call("pretrain", *words, *warm, "--out", str(options.out), "--train.steps", str(steps))
    lines = metrics(options.out)
    call("probe", str(options.out), "--shards", options.shards, "--out", str(options.out / "probe.json"))
    result = json.loads((options.out / "probe.json").read_text())

    seen = lines[-1]["step"] * config.train.batch
    speeds = sorted(line["speed/maps_per_second"] for line in lines)
    waits = [line["speed/data_wait"] for line in lines]
    print(
        f"{options.config}, {lines[-1]['step']:,} of {steps:,} steps of {config.train.batch} maps ({seen:,} samples), "
        f"{'ended by the health gate' if code else 'healthy'}. Median {speeds[len(speeds) // 2]:.4g} maps/s, "
        f"mean wait for data {sum(waits) / len(waits):.1%}, loss {lines[0]['loss']:.2f} to {lines[-1]['loss']:.2f}.\n"
    )
    print("| probe of unseen maps | trained | random | pixels | trained - random, 95 % |\n|---|---|---|---|---|")
    for name, row in result["figures"].items():
        values = " | ".join(f"{row[source]['value']:.3f}" for source in ("trained", "random", "pixels"))
        gain = row["gain"]
        print(f"| {name} | {values} | {gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}] |")


if __name__ == "__main__":
    main()
