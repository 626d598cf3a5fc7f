"""What the synthetic benchmark shows of the heads: one table a command, paired over data sets, with intervals.

    python benchmarks/ladder.py TABLE SIM3D --image EXPORT --depth EXPORT --out FOLDER [--steps 600] [--tokens 32]
        [--rows NAME ...] [--categories NAME ...] [--seeds 1] [--set KEY VALUE ...]

SIM3D is a tree of ``dino-depth synth sim3d``; each of its objects is one data set. A table is one of

    ladder      CFM, conditioned CFM and ModMap, its controls, and PatchCore (tables 3 and 6)
    modalities  either map of ModMap alone, and how both meet (table 10)
    sources     number of source views at inference (table 8)
    shift       view ids that are off by one at inference
    multiclass  one model of all objects (table 7)
    encoders    other encoders of depth under the same head (table 4)
    steps       numbers of training steps
    baselines   the other methods of the papers' tables; EfficientAD needs --set --head.efficientad.teacher FILE
    methods     heads of every kind, registered and not
    depth       encoders of depth by themselves: PatchCore's bank of all cells

All heads train for equally many steps on the same features; the rows of different tables share features, fitted heads
and finished trials in FOLDER. A row is the mean over data sets of V-AUPRO@1 % over occupied voxels, and its paired
difference from the table's reference with a bootstrap interval over data sets: 90 %, so that its lower end is a
one-sided 95 % bound. A run that was stopped continues; ``--rows`` lets processes share the work.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from dino_depth.anomaly.evaluate import EvaluateConfig, evaluate
from dino_depth.anomaly.metrics import bootstrap
from dino_depth.config import parse

METRIC = "V-AUPRO@1% occupied"
BASELINES = ("random scores", "constant on the object", "perfect scorer")
STEPS = (150, 300, 600, 1500)
VIEW = ["--head.modmap.conditioning", "view"]
MODMAP = ("ModMap, minimum over all sources", [])
CFM_VIEW = ("CFM conditioned on the view", VIEW)


def source_rows() -> dict[str, tuple[str, list[str]]]:
    counts = {f"sources_{k}": (f"sources: {k}", ["--head.modmap.sources", str(k)]) for k in (1, 2, 4)}
    return {"target": ("source = target only", ["--head.modmap.sources", "target"]), **counts, "modmap": MODMAP}


def step_rows() -> dict[str, tuple[str, list[str]]]:
    rows = {}
    for steps in STEPS:
        words = ["--head.modmap.steps", str(steps)]
        rows[f"cfm_view_{steps}"] = (f"conditioned CFM, {steps} steps", VIEW + words)
        rows[f"modmap_{steps}"] = (f"ModMap, {steps} steps", words)
    return rows


def depth_row(encoder: str) -> list[str]:
    return ["--head.name", "patchcore", "--head.patchcore.modality", "depth", "--head.patchcore.share", "1.0",
            "--encoder.depth", encoder]  # fmt: skip


# The product of both distances of unit vectors, blurred; see configs/sim3d_cfm_published.yaml.
CFM_MAP = ["--head.modmap.conditioning", "none", "--head.modmap.distance", "euclidean", "--head.modmap.modality",
           "product", "--prepare.smoothing", "4.69"]  # fmt: skip
RESIDUAL = ["--head.name", "residual", "--prepare.registration.method", "icp"]
TEMPLATE = ["--head.name", "template", "--head.template.modality", "image"]
PATCHCORE = ["--head.name", "patchcore", "--head.patchcore.modality", "image", "--head.patchcore.share", "1.0"]
REGISTERED = ["--prepare.registration.method", "icp"]


def baseline_rows() -> dict[str, tuple[str, list[str]]]:
    fpfh = ["--encoder.depth", "fpfh?patch={patch}"]
    bank, m3dm = ["--head.name", "patchcore", "--head.patchcore.modality"], ["--head.name", "m3dm"]
    ast = ["--head.name", "ast", "--encoder.depth", "raw-patches?patch={patch}"]
    return {
        "patchcore_image": ("PatchCore, image", [*bank, "image"]),
        "patchcore_depth": ("PatchCore, the same network on depth", [*bank, "depth"]),
        "patchcore_both": ("PatchCore, both", [*bank, "both"]),
        "patchcore_fpfh": ("PatchCore, FPFH", [*bank, "depth", *fpfh]),
        "btf": ("BTF, image + FPFH as they come", ["--head.name", "btf", *fpfh]),
        "btf_scaled": ("BTF, image + FPFH scaled", ["--head.name", "btf", "--head.btf.scale", "spread", *fpfh]),
        "m3dm": ("M3DM, image + FPFH", [*m3dm, *fpfh]),
        "m3dm_left_out": ("M3DM, image + FPFH, views left out", [*m3dm, *fpfh, "--head.m3dm.leave_out", "true"]),
        "m3dm_fusion": ("M3DM, image + FPFH, three banks", [*m3dm, *fpfh, "--head.m3dm.fusion", "true"]),
        "m3dm_network": ("M3DM, the same network on image and depth", m3dm),
        "ast": ("AST, image + depth values", ast),
        "efficientad": ("EfficientAD", ["--head.name", "efficientad"]),
    }


# Table -> (reference row, {row: (what it is, settings that differ from ModMap's defaults)}).
TABLES = {
    "ladder": ("cfm_view", {
        "cfm": ("CFM", ["--head.modmap.conditioning", "none"]),
        "cfm_view": CFM_VIEW,
        "modmap": MODMAP,
        "target": ("ModMap, source = target only", ["--head.modmap.sources", "target"]),
        "mean": ("ModMap, mean over all sources", ["--head.modmap.aggregate", "mean"]),
        "ensemble": ("minimum over 4 conditioned CFMs", [*VIEW, "--head.modmap.ensemble", "4"]),
        "cfm_view_cells": (
            "CFM conditioned on the view, as many cells a step as ModMap",
            [*VIEW, "--head.modmap.tokens", "{pair_cells}"],
        ),
        "patchcore": ("PatchCore, both modalities", ["--head.name", "patchcore"]),
    }),
    "modalities": ("modmap", {
        "modmap": ("maximum of both maps", []),
        "minimum": ("minimum", ["--volume.aggregation", "min"]),
        "product": ("product", ["--volume.aggregation", "prod"]),
        "average": ("mean", ["--volume.aggregation", "mean"]),
        "image": ("image map alone", ["--head.modmap.modality", "image"]),
        "depth": ("depth map alone", ["--head.modmap.modality", "depth"]),
    }),
    "sources": ("modmap", source_rows()),
    "shift": ("modmap", {
        "modmap": MODMAP,
        "modmap_shift": ("ModMap, view ids shifted by one", ["--head.modmap.view_shift", "1"]),
        "cfm_view": CFM_VIEW,
        "cfm_view_shift": ("conditioned CFM, view ids shifted by one", [*VIEW, "--head.modmap.view_shift", "1"]),
    }),
    "multiclass": ("modmap", {
        "modmap": ("a ModMap for each object", []),
        "multiclass": ("one ModMap for all objects", ["--head.multiclass", "true"]),
    }),
    "encoders": ("modmap", {
        "modmap": ("pretrained depth encoder", []),
        "random": ("the same, random weights (of standardize.py)", ["--encoder.depth", "{depth}_random"]),
        "raw": ("raw patches", ["--encoder.depth", "raw-patches?patch={patch}"]),
        "fpfh": ("FPFH", ["--encoder.depth", "fpfh?patch={patch}"]),
    }),
    "steps": ("modmap_1500", step_rows()),
    "baselines": ("patchcore_image", baseline_rows()),
    "methods": ("cfm_view", {
        "residual": ("residual, depth + image, registered", RESIDUAL),
        "residual_plain": ("residual, depth + image, as it lies", ["--head.name", "residual"]),
        "residual_depth": ("residual, depth, registered", [*RESIDUAL, "--head.residual.maps", "[depth]"]),
        "residual_image": ("residual, image, registered", [*RESIDUAL, "--head.residual.maps", "[image]"]),
        "residual_features": (
            "residual, features of the image, registered", [*RESIDUAL, "--head.residual.maps", "[features]"],
        ),
        "template": ("template, image", TEMPLATE),
        "template_registered": ("template, image, registered", TEMPLATE + REGISTERED),
        "patchcore": ("PatchCore, image", PATCHCORE),
        "patchcore_registered": ("PatchCore, image, registered", PATCHCORE + REGISTERED),
        "cfm": ("CFM", ["--head.modmap.conditioning", "none"]),
        "cfm_published": ("CFM, its authors' map", CFM_MAP),
        "cfm_view": CFM_VIEW,
        "modmap": MODMAP,
    }),
    "depth": ("tiny", {
        "tiny": ("tiny", depth_row("tiny")),
        "untrained": ("tiny, untrained", depth_row("random:tiny")),
        "lite0": ("EfficientNet-lite0 on depth as a grey picture", depth_row("lite0")),
        "raw": ("raw patches", depth_row("raw-patches?patch={patch}")),
        "surface": ("means of normals and curvature", depth_row("surface?patch={patch}")),
        "fpfh": ("FPFH", depth_row("fpfh?patch={patch}")),
    }),
}  # fmt: skip


def measured(options: argparse.Namespace, row: str, words: list[str]) -> dict[str, dict]:
    """The finished trials of every data set."""
    out = Path(options.out)
    common = ["--data.root", options.root, "--out", str(out / row), "--device", "cpu", "--seeds", str(options.seeds)]
    common += ["--encoder.cache", str(out / "features"), "--head.cache", str(out / "heads")]
    common += ["--encoder.image", options.image, "--encoder.depth", options.depth, "--encoder.size", str(options.size)]
    common += ["--head.modmap.steps", str(options.steps), "--head.modmap.tokens", str(options.tokens), *options.set]
    common += ["--categories", json.dumps(options.categories)] if options.categories else []
    # A step takes 48 pairs of views of ModMap, but of a CFM only as many as there are views, 12.
    facts = {"depth": options.depth, "patch": options.patch, "pair_cells": 4 * options.tokens}
    evaluate(parse(EvaluateConfig, [*common, *(word.format(**facts) for word in words)], "ladder"))
    found: dict[str, list[dict]] = {}
    for trial in json.loads((out / row / "results.json").read_text())["trials"]:
        found.setdefault(trial["category"], []).append(trial)
    return found


def interval(values: np.ndarray) -> str:
    found = bootstrap(lambda counts: counts @ values / counts.sum(1), np.zeros(len(values)), resamples=10000, level=0.9)
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def table(reference: str, meaning: dict[str, str], trials: dict[str, dict[str, list[dict]]]) -> str:
    names = sorted(set.intersection(*(set(found) for found in trials.values())))
    score, detection = (
        {
            row: np.array([np.mean([trial["metrics"][metric] for trial in found[name]]) for name in names])
            for row, found in trials.items()
        }
        for metric in (METRIC, "I-AUROC")
    )
    lines = [f"{len(names)} data sets: {', '.join(names)}", ""]
    lines += [f"| | {METRIC} | less {meaning[reference]} | ahead in | I-AUROC |", "|---|---|---|---|---|"]
    for row, values in score.items():
        paired = ahead = ""
        if row != reference and reference in score:
            difference = values - score[reference]
            paired, ahead = interval(difference), f"{np.count_nonzero(difference > 0)} of {len(names)}"
        lines.append(f"| {meaning[row]} | {values.mean():.3f} | {paired} | {ahead} | {detection[row].mean():.3f} |")
    first = next(iter(trials.values()))
    for baseline in BASELINES:
        values = [first[name][0]["baselines"][baseline][METRIC] for name in names]
        lines.append(f"| {baseline} | {np.mean(values):.3f} | | | |")
    lines += ["", "| data set | " + " | ".join(meaning[row] for row in score) + " |", "|---" * (len(score) + 1) + "|"]
    for place, name in enumerate(names):
        lines.append(f"| {name} | " + " | ".join(f"{values[place]:.3f}" for values in score.values()) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("root")
    parser.add_argument("--image", required=True)
    parser.add_argument("--depth", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rows", nargs="+", default=[], help="of the table; all if not given")
    parser.add_argument("--categories", nargs="+", default=[])
    parser.add_argument("--seeds", type=int, default=1, help="heads for each data set")
    parser.add_argument(
        "--steps", type=int, default=600, help="the paper's 200 epochs of 12 x 12 pairs in batches of 48"
    )
    parser.add_argument("--tokens", type=int, default=32, help="training cells drawn per pair and step")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--patch", type=int, default=14, help="of the rows without a network")
    parser.add_argument("--set", nargs=argparse.REMAINDER, default=[], help="further settings of dino-depth evaluate")
    options = parser.parse_args()
    reference, rows = TABLES[options.table]
    rows = {row: rows[row] for row in options.rows or rows}
    trials = {row: measured(options, row, words) for row, (_, words) in rows.items()}
    print(table(reference, {row: meaning for row, (meaning, _) in TABLES[options.table][1].items()}, trials))


if __name__ == "__main__":
    main()
