"""What each step from CFM to ModMap adds, on synthetic data sets in SiM3D's layout: paired, with intervals.

    python benchmarks/ladder.py SIM3D --image EXPORT --depth EXPORT --out FOLDER [--steps 600] [--tokens 32]
        [--heads cfm cfm_view modmap ensemble] [--categories NAME ...]

SIM3D is a tree of ``dino-depth synth sim3d``; each of its objects is one data set. All heads train for equally many
steps on the same features. The table holds the mean over data sets of V-AUPRO@1 % over occupied voxels, and the paired
difference of each head from the conditioned CFM with a bootstrap interval over data sets: 90 %, so that its lower end
is a one-sided 95 % bound. A run that was stopped continues.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dino_depth.anomaly.evaluate import EvaluateConfig, evaluate
from dino_depth.anomaly.metrics import bootstrap
from dino_depth.config import parse

METRIC = "V-AUPRO@1% occupied"
REFERENCE = "cfm_view"
HEADS = {
    "cfm": ["--head.modmap.conditioning", "none"],
    "cfm_view": ["--head.modmap.conditioning", "view"],
    "modmap": [],
    "target": ["--head.modmap.sources", "target"],
    "mean": ["--head.modmap.aggregate", "mean"],
    "ensemble": ["--head.modmap.conditioning", "view", "--head.modmap.ensemble", "4"],
    "patchcore": ["--head.name", "patchcore"],
}
MEANING = {
    "cfm": "CFM",
    "cfm_view": "CFM conditioned on the view",
    "modmap": "ModMap, minimum over all sources",
    "target": "ModMap, source = target only",
    "mean": "ModMap, mean over all sources",
    "ensemble": "minimum over 4 conditioned CFMs",
    "patchcore": "PatchCore",
}


def measured(options: argparse.Namespace, head: str) -> dict[str, dict]:
    """The finished cell of every data set."""
    out = Path(options.out)
    words = ["--data.root", options.root, "--out", str(out / head), "--encoder.cache", str(out / "features")]
    words += ["--encoder.image", options.image, "--encoder.depth", options.depth, "--encoder.size", str(options.size)]
    words += ["--head.modmap.steps", str(options.steps), "--head.modmap.tokens", str(options.tokens)]
    words += ["--device", "cpu", *HEADS[head]]
    words += ["--categories", json.dumps(options.categories)] if options.categories else []
    evaluate(parse(EvaluateConfig, words, "ladder"))
    cells = json.loads((out / head / "results.json").read_text())["cells"]
    return {cell["category"]: cell for cell in cells}


def interval(values: np.ndarray) -> str:
    found = bootstrap(lambda counts: counts @ values / counts.sum(1), np.zeros(len(values)), resamples=10000, level=0.9)
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def table(cells: dict[str, dict[str, dict]]) -> str:
    names = sorted(set.intersection(*(set(found) for found in cells.values())))
    score = {head: np.array([found[name]["metrics"][METRIC] for name in names]) for head, found in cells.items()}
    detection = {head: np.mean([found[name]["metrics"]["I-AUROC"] for name in names]) for head, found in cells.items()}
    lines = [f"{len(names)} data sets: {', '.join(names)}", ""]
    lines += [f"| head | {METRIC} | less {MEANING[REFERENCE]} | ahead in | I-AUROC |", "|---|---|---|---|---|"]
    for head, values in score.items():
        difference = values - score[REFERENCE] if REFERENCE in score else np.zeros(len(names))
        paired = interval(difference) if head != REFERENCE and REFERENCE in score else ""
        ahead = f"{np.count_nonzero(difference > 0)} of {len(names)}" if paired else ""
        lines.append(f"| {MEANING[head]} | {values.mean():.3f} | {paired} | {ahead} | {detection[head]:.3f} |")
    for row in ("random scores", "constant on the object", "perfect scorer"):
        first = next(iter(cells.values()))
        lines.append(f"| {row} | {np.mean([first[name]['baselines'][row][METRIC] for name in names]):.3f} | | | |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root")
    parser.add_argument("--image", required=True)
    parser.add_argument("--depth", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=["cfm", "cfm_view", "modmap", "ensemble"])
    parser.add_argument("--categories", nargs="+", default=[])
    parser.add_argument(
        "--steps", type=int, default=600, help="the paper's 200 epochs of 12 x 12 pairs in batches of 48"
    )
    parser.add_argument("--tokens", type=int, default=32, help="training cells drawn per pair and step")
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    cells = {head: measured(options, head) for head in options.heads}
    print(table(cells))


if __name__ == "__main__":
    main()
