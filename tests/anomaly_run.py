"""A run folder as ``evaluate`` writes it, of an ellipsoid with a bright dent, for tests of the report."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from multiview_scene import RADII, ellipsoid_depth, ring

from dino_depth.anomaly.dataset import Sample, View
from dino_depth.anomaly.features import SampleFeatures
from dino_depth.anomaly.figures import write_figures
from dino_depth.anomaly.foreground import cell_share
from dino_depth.anomaly.geometry import back_project
from dino_depth.anomaly.views import Views
from dino_depth.anomaly.volume import VoxelConfig, accumulate
from dino_depth.depth import DepthMap

LONG = "wood_<b>&_of_a_name_too_long_for_the_screen_of_a_telephone"
METRICS = ["I-AUROC", "V-AUPRO@1%", "coverage"]


def make_sample(name: str, views: int, bad: bool, seed: int = 0, height: int = 60, width: int = 80) -> Sample:
    """An ellipsoid seen by a ring, brighter around its defect."""
    random = np.random.default_rng(seed)
    made = []
    for place, camera in enumerate(ring(views, height, width)):
        depth = ellipsoid_depth(camera)
        depth_map = DepthMap(np.where(depth > 0, depth, 1), depth > 0)
        near = defect_at(back_project(camera, depth_map.depth)) if bad else np.zeros(depth.shape)
        image = (
            np.where(depth > 0, 90 + 130 * near + random.normal(0, 8, depth.shape), 15).clip(0, 255).astype(np.uint8)
        )
        made.append(View(f"{place + 1}", lambda image=image: image, lambda made=depth_map: made, camera))
    label = "anomalous" if bad else "good"
    return Sample("part", name, "test", label, "dent" if bad else None, tuple(made), lambda: None)


def defect_at(points: np.ndarray) -> np.ndarray:
    """1 at the defect on the ellipsoid, falling to 0 at 3 cm from it."""
    place = np.array([0.03, -0.02, 0.02]) + RADII * [0.6, 0, 0.8]
    return np.clip(1 - np.linalg.norm(points - place, axis=-1) / 0.03, 0, 1)


def write_instance(run: Path, category: str, sample: Sample, seeds: list[int], cells: int, mm: float, detail: bool):
    """Predictions of every seed, figures once; the rows of results.json."""
    bad = sample.label == "anomalous"
    depths = [view.read_depth() for view in sample.views]
    points = [back_project(view.camera, depth.depth) for view, depth in zip(sample.views, depths, strict=True)]
    share = np.stack([cell_share(depth.valid, cells) for depth in depths])
    rows = []
    for seed in seeds:
        random = np.random.default_rng([seed, int(sample.name[:2])])
        maps = {}
        for modality in ("image", "depth"):
            native = np.stack([0.05 + (0.3 * defect_at(part) if bad else 0 * part[..., 0]) for part in points])
            square = np.pad(native, ((0, 0), ((native.shape[2] - native.shape[1]) // 2,) * 2, (0, 0)))
            pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(square), cells).float()
            maps[modality] = pooled + torch.from_numpy(random.random(pooled.shape, np.float32)) * 0.08
        volume = accumulate(maps, sample, depths, [d.valid for d in depths], VoxelConfig(mm, "union"))
        grid_ = volume.voxels
        hit = defect_at(grid_.centers) > 0.4 if bad else np.zeros(len(grid_.index), bool)
        unseen = np.array([[0, 0, 0]], np.int32) if bad else np.empty((0, 3), np.int32)
        truth = np.concatenate([unseen, grid_.index[hit]])
        path = run / "predictions" / category / f"seed{seed}" / f"{sample.name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(
            path, origin=grid_.origin, size=grid_.size, shape=grid_.shape, index=grid_.index, score=volume.score,
            truth_index=truth, truth_component=np.ones(len(truth), np.int32),
            **{f"{modality}_map": part.numpy().astype(np.float16) for modality, part in maps.items()},
        )  # fmt: skip
        rows.append({"name": sample.name, "label": sample.label, "defect": sample.defect,
                     "score": volume.instance_score, "file": str(path.relative_to(run))})  # fmt: skip
    mixed = torch.from_numpy(np.random.default_rng(9).random((*share.shape, 12), np.float32))
    mixed[..., 0] += torch.from_numpy(share) * 3
    features = SampleFeatures(mixed, mixed.flip(1), torch.from_numpy(share))
    pairs = {name: part[:, None] + 0.05 * torch.arange(len(share))[:, None, None] for name, part in maps.items()}

    def pair_maps(target):
        return {name: part[target] for name, part in pairs.items()}

    seen = Views(sample, SimpleNamespace(get=lambda *_: features))
    write_figures(
        run / "figures" / category / f"{sample.name}.npz", seen,
        truth=replace(grid_, index=truth), detail=detail, pair_maps=pair_maps if detail else None,
    )  # fmt: skip
    return rows


def make_run(run: Path, categories=("plate", LONG), seeds=(0, 1), views=3, cells=10, mm=6.0, good=2, bad=4, **shape):
    """A finished run folder in the schema of ``evaluate``."""
    trials = []
    for place, category in enumerate(categories):
        by_seed = {seed: [] for seed in seeds}
        for number in range(good + bad):
            name = f"{number:02d}_{'bad' if number >= good else 'good'}"
            sample = make_sample(name, views, number >= good, number, **shape)
            rows = write_instance(run, category, sample, list(seeds), cells, mm, number == good)
            for seed, row in zip(seeds, rows, strict=True):
                by_seed[seed].append(row)
        for seed in seeds:
            values = {
                "I-AUROC": 0.8 + 0.05 * place + 0.02 * seed,
                "V-AUPRO@1%": 0.61,
                "coverage": 0.97,
            }
            trials.append(
                {
                    "category": category, "seed": seed, "metrics": values,
                    "intervals": {"I-AUROC": [0.7, 0.9 + 0.02 * seed]},
                    "baselines": {"fraction missing": {"I-AUROC": 0.5},
                                  "perfect scorer": {"I-AUROC": 1.0, "V-AUPRO@1%": 0.98}},
                    "cost": {"encodes": 12, "fits": 1, "seconds": {"encode": 200.0, "fit": 3.25},
                             "peak_memory_gib": 1.5},
                    "instances": by_seed[seed],
                    "checks": {"overlap_train": 0.012, "truth_off_surface": 0.0344},
                }
            )  # fmt: skip
    paper = {"paper": "A et al.", "table": 1, "method": "ModMap", "setup": "real2real", "metric": "I-AUROC"}
    published = [
        paper | {"category": "mean", "value": 0.844},
        paper | {"category": LONG, "value": 0.945},
        paper | {"category": "plastic_stool", "value": 0.909},
        paper | {"category": "mean", "value": 0.623, "table": None, "method": "CFM"},
        paper | {"category": "mean", "value": 0.6, "metric": "AUPRO@30%"},
    ]
    results = {
        "benchmark": "sim3d", "setup": "real2real", "synthetic": False, "head": "modmap", "seeds": list(seeds),
        "config": {"encoder": {"image": "timm:vit", "depth": "exports/<depth>"}, "metrics": {"level": 0.9}},
        "categories": list(categories), "metrics": METRICS, "trials": trials, "published": published, "complete": True,
        "mean": {"I-AUROC": {"value": 0.835, "low": 0.8, "high": 0.87},
                 "coverage": {"value": 0.97}},
    }  # fmt: skip
    (run / "results.json").write_text(json.dumps(results))
    return results


def edit(run, change):
    results = json.loads((run / "results.json").read_text())
    change(results)
    (run / "results.json").write_text(json.dumps(results))
