"""The plain recipe against what may be added to it, at equal compute, over seeds, judged on parts for choosing.

    python benchmarks/levers.py train SHARDS --out FOLDER [--seconds 300] [--seeds 3] [--arms plain dense ...]
    python benchmarks/levers.py judge FOLDER [--data families]

``train`` gives each run as many steps as the seconds of CPU time pay at the cost of its arm's steps, measured first
(where only the input or the start differs, that of the plain recipe's); warm-ups keep their share. A folder that has an
encoder is left as it is, so a run that was stopped continues.
``judge`` prints the columns of ``dino-depth bench``: means over seeds, differences from the plain recipe with 95 %
intervals over parts (of the means over seeds, resampled together), and in how many of the seeds that both have an arm
is ahead.
"""

import argparse
import json
import resource
import sys
from pathlib import Path

import torch
from timed_training import call

from dino_depth.bench.columns import columns
from dino_depth.bench.features import cell_features
from dino_depth.bench.intervals import estimate, resample
from dino_depth.bench.sources import Options, open_source
from dino_depth.frozen import load_frozen

TINY = Path(__file__).parents[1] / "dino_depth/shipped/tiny"
# The network of the encoder that ships, and the plain recipe at its size.
COMMON = """--config pretrain_tiny --crops.global_scale [0.3,1.0] --crops.local_scale [0.08,0.3] --crops.local_crops 2
    --loss.dino_weight 1 --loss.ibot_weight 1 --loss.koleo_weight 0.02 --loss.surface_weight 0 --loss.prototypes 512
    --loss.hidden 512 --loss.bottleneck 128 --loss.teacher_temperature 0.02 --loss.teacher_temperature_start 0.02
    --loss.teacher_temperature_warmup 0 --optim.freeze_last_layer 0""".split()
DISTILL = ["--distill.teacher", "lite0", "--distill.size", "160"]
ALONE = [f"--loss.{name}_weight=0" for name in ("dino", "ibot", "koleo")]
ARMS = {
    "plain": [],
    "dense": ["--loss.dense_weight", "1.0"],
    "distill": [*DISTILL, *ALONE],
    "distill_beside": DISTILL,
    "surface": ["--loss.surface_weight", "1.0", *ALONE],
    "surface_beside": ["--loss.surface_weight", "10.0"],
    "init_from": ["--init_from", str(TINY)],
    **{name: ["--data.normalization.method", name] for name in ("minmax", "log", "max")},
}
COSTLY = {"--loss.dense_weight", "--loss.surface_weight", "--distill.teacher"}  # what changes the cost of a step
WARM_UP = 0.075  # of the steps, as in pretrain_tiny
SHORT, LONG = 10, 40  # steps of the two runs that tell what a step costs
UNTRAINED = "untrained"


def pretrain(shards: str, out: Path, arm: str, steps: int, seed: int) -> float:
    """Seconds of CPU time that the run took."""
    words = ["--data.shards", shards, "--out", str(out), "--train.steps", str(steps), "--train.seed", str(seed)]
    words += ["--optim.warmup", str(round(WARM_UP * steps)), "--train.checkpoint_every", str(steps)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    call("pretrain", *COMMON, *ARMS[arm], *words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def train(options: argparse.Namespace):
    options.out.mkdir(parents=True, exist_ok=True)
    costs = options.out / "seconds_per_step.json"
    known = json.loads(costs.read_text()) if costs.is_file() else {}
    for arm in ("plain", *options.arms):
        if arm != "plain" and not COSTLY & {*ARMS[arm]}:
            known[arm] = known["plain"]
        elif arm not in known:
            runs = [
                pretrain(options.shards, options.out / f"{arm}-rate{steps}", arm, steps, 0) for steps in (SHORT, LONG)
            ]
            known[arm] = (runs[1] - runs[0]) / (LONG - SHORT)
            costs.write_text(json.dumps(known) + "\n")
    print(json.dumps(known), flush=True)
    for seed in range(options.seeds):
        for arm in options.arms:
            run = options.out / f"{arm}-{seed}"
            if (run / "export").is_dir():
                continue
            steps = round(options.seconds / known[arm])
            seconds = pretrain(options.shards, run, arm, steps, seed)
            call("export", str(run), "--out", str(run / "export"), "--image_size", "224")
            print(f"{arm}-{seed}: {steps} steps, {seconds:.0f} s of CPU time", flush=True)


def judge(options: argparse.Namespace):
    torch.set_num_threads(1)
    source = open_source(options.data, Options(16, options.objects, 4, 0, True))
    used = {name: module for name, module in columns().items() if not module.missing(source, options.size)}
    specs = {UNTRAINED: [f"random:{TINY}"]}
    for arm in ARMS:
        if found := sorted(options.folder.glob(f"{arm}-[0-9]/export")):
            specs[arm] = [str(path) for path in found]
    groups = {
        "views": source.views,
        "inspections": [view for one in source.inspections for view in (*one.bank, *one.tested)],
    }
    counts, drawn = {}, {}
    for arm, names in specs.items():
        drawn[arm] = []
        for name in names:
            encoder = load_frozen(name, modality="depth")
            seen = {
                kind: cell_features(encoder, views, (view.depth for view in views), options.size)
                for kind, views in groups.items() if views
            }  # fmt: skip
            figures = {}
            for module in used.values():
                sums = module.measure(source, options.size, seen[module.ASKED], seen[module.ASKED])
                counts.setdefault(len(sums), resample(len(sums), 2000, 0))
                figures |= module.figures(counts[len(sums)] @ sums)
            drawn[arm].append(figures)
            print(f"{arm}: {name}", file=sys.stderr, flush=True)
    about = {key: figure for module in used.values() for key, figure in module.FIGURES.items()}
    for key, figure in about.items():
        print(f"\n{figure.title} ({figure.better} is better)\n")
        print("| | mean over seeds | each | less plain | ahead in |\n|---|---|---|---|---|")
        for arm, runs in drawn.items():
            values = [float(run[key][0]) for run in runs]
            line = f"| {arm} | {sum(values) / len(values):.3f} | {', '.join(f'{value:.3f}' for value in values)} |"
            if arm == "plain":
                print(f"{line} | |")
                continue
            plain = torch.stack([run[key] for run in drawn["plain"]])
            other = torch.stack([run[key] for run in runs])
            found = estimate(other.mean(0) - plain.mean(0))
            sign = 1 if figure.better == "higher" else -1
            pairs = [(run[key][0], beside[key][0]) for run, beside in zip(runs, drawn["plain"], strict=False)]
            won = sum(bool(sign * (run - beside) > 0) for run, beside in pairs)
            ahead = "" if arm == UNTRAINED else f"{won} of {len(pairs)}"
            print(f"{line} {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}] | {ahead} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train")
    one.add_argument("shards")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--seconds", type=float, default=300)
    one.add_argument("--seeds", type=int, default=3)
    one.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    two = commands.add_parser("judge")
    two.add_argument("folder", type=Path)
    two.add_argument("--data", default="families")
    two.add_argument("--objects", type=int, default=2)
    two.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    {"train": train, "judge": judge}[options.command](options)


if __name__ == "__main__":
    main()
