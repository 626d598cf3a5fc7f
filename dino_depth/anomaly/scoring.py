"""What a scorer says of an instance, as the metrics need it, and the metrics of a class with their intervals.

Two kinds of results have the same parts. A volume counts empty voxels as normal, which SiM3D's published floors imply,
or leaves them out (" occupied"); a single view counts all pixels, the background being zero, or only those of the
object region, its holes filled (" object"). Baselines are scored like heads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from dino_depth.anomaly.baselines import LEAK, PERFECT, uninformed_maps
from dino_depth.anomaly.dataset import Sample, Truth, Voxels
from dino_depth.anomaly.foreground import filled
from dino_depth.anomaly.metrics import (
    Regions,
    bootstrap,
    coverage,
    pooled_aupro,
    regions,
    resampled_aupro,
    resampled_auroc,
    voxel_regions,
)
from dino_depth.anomaly.trivial import leak_score, leak_score_volume
from dino_depth.anomaly.volume import Aggregation, ScoredVolume, VoxelConfig, accumulate, combine, truth_voxels
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError

__all__ = ["HEAD", "Judged", "MetricsConfig", "Scored", "judge_view", "judge_volume", "measure"]

HEAD = "head"  # the row of the method itself, beside the baselines
LEAK_VOXELS = 10  # around a defect that the leak statistic leaves out
PARTIAL = {"voxels": " occupied", "pixels": " object"}  # the suffix of metrics over part of the normals

Kind = Literal["voxels", "pixels"]


@dataclass
class MetricsConfig:
    """How results are measured. What is unknown about SiM3D's metric is a setting here or in ``volume``.

    Attributes:
        limits: of the false positive rate, for V-AUPRO and AUPRO; MVTec 3D-AD and Eyecandies use 0.3 and 0.01.
        connectivity: neighbours that make a component, 6, 18 or 26 of a voxel and 4 or 8 of a pixel; by default the
            components that the ground truth names, else all neighbours.
        pooling: ``class`` has one curve over all instances; ``sample`` is the mean over anomalous instances.
        nominal: good instances count into the false positive rate.
        resamples: of the bootstrap over instances.
        level: probability of the intervals.
    """

    limits: tuple[float, ...] = (0.01,)
    connectivity: int | None = None
    pooling: Literal["class", "sample"] = "class"
    nominal: bool = True
    resamples: int = 1000
    level: float = 0.95

    def __post_init__(self):
        if not self.limits or not all(0 < limit <= 1 for limit in self.limits):
            raise ConfigError(f"metrics.limits: need false positive rates within (0, 1], got {list(self.limits)}")
        if self.resamples < 1:
            raise ConfigError(f"metrics.resamples: must be at least 1, got {self.resamples}")
        if not 0 < self.level < 1:
            raise ConfigError(f"metrics.level: must lie within (0, 1), got {self.level}")


@dataclass(frozen=True, eq=False)
class Scored:
    """What one scorer says of one instance.

    Attributes:
        score: of the instance; NaN where there is none.
        regions: its scores in space by suffix of the metric, "" and one of ``PARTIAL``; empty without ground truth.
    """

    score: float
    regions: dict[str, Regions]


@dataclass(frozen=True, eq=False)
class Judged:
    """One instance as its files and metrics need it.

    Attributes:
        rows: of the head, and of every baseline.
        arrays: what is kept of the prediction.
        truth: anomalous voxels, or masks; None where there is no ground truth.
        points: (n, 3) world metres of the volume's voxels; None for a single view.
    """

    rows: dict[str, Scored]
    arrays: dict[str, np.ndarray]
    truth: Voxels | tuple[np.ndarray, ...] | None
    points: np.ndarray | None


def judge_volume(
    sample: Sample,
    maps: dict[str, torch.Tensor],
    depths: Sequence[DepthMap],
    foregrounds: Sequence[np.ndarray],
    truth: Truth | None,
    config: VoxelConfig,
    metrics: MetricsConfig,
    seed: int,
) -> Judged:
    """Scores an instance of several calibrated views in its volume.

    Args:
        maps: of each modality, (views, n, n).
        foregrounds: (height, width) bool of each view.
        seed: of the random baseline.

    Raises:
        DataError: as ``volume.accumulate`` and ``volume.truth_voxels``.
    """
    volume = accumulate(maps, sample, depths, foregrounds, config, truth)
    grid, label = volume.voxels, None
    defects = None
    if truth is not None:
        defects, label = truth_voxels(truth, sample, depths, grid)
        if metrics.connectivity is not None:
            label = None
        elif label is not None:
            # Defects that fell together on a coarser grid leave gaps in the numbers.
            label = np.unique(label, return_inverse=True)[1].astype(np.int32) + 1

    def located(scores: np.ndarray) -> dict[str, Regions]:
        if defects is None:
            return {}
        found = voxel_regions(
            grid.index, scores, defects.index, grid.shape, labels=label, connectivity=metrics.connectivity
        )
        return {"": found, PARTIAL["voxels"]: replace(found, empty_normal=0)}

    rows = {HEAD: Scored(volume.instance_score, located(volume.score))}
    controls = uninformed_maps(sample, np.ones(len(grid.index), bool), seed)
    if defects is not None:
        places = (np.ravel_multi_index(part.index.astype(np.int64).T, grid.shape) for part in (grid, defects))
        controls[PERFECT] = np.isin(*places).astype(np.float32)
    for name, scores in controls.items():
        rows[name] = Scored(float(scores.max()), located(scores))
    if defects is not None:
        rows[LEAK] = Scored(leak_score_volume(volume, defects, LEAK_VOXELS * grid.size), {})
    return Judged(rows, _volume_arrays(volume, defects, label), defects, grid.centers)


def _volume_arrays(volume: ScoredVolume, defects: Voxels | None, label: np.ndarray | None) -> dict[str, np.ndarray]:
    grid = volume.voxels
    arrays = {
        "origin": grid.origin,
        "size": np.float64(grid.size),
        "shape": np.array(grid.shape, np.int64),
        "index": grid.index,
        "score": volume.score,
        "views": volume.views,
        "outside": np.float64(volume.outside),
    }
    if defects is not None:
        arrays["truth_index"] = defects.index
        if label is not None:
            arrays["truth_component"] = label
    return arrays


def judge_view(
    sample: Sample,
    maps: dict[str, torch.Tensor],
    foreground: np.ndarray,
    truth: Truth | None,
    aggregation: Aggregation,
    metrics: MetricsConfig,
    seed: int,
) -> Judged:
    """Scores an instance of one view in its pixels; arguments as ``judge_volume``.

    Raises:
        DataError: scores are not finite, or the mask has another size than the view.
    """
    scores = combine(maps, 0, foreground, aggregation)
    masks = None if truth is None else truth.masks
    if masks is not None and masks[0].shape != scores.shape:
        found = " and ".join("x".join(map(str, part)) for part in (masks[0].shape, scores.shape))
        raise DataError(f"{sample.category}/{sample.name}: mask and depth map are {found}")
    region = filled(foreground)

    def located(scores: np.ndarray) -> dict[str, Regions]:
        if masks is None:
            return {}
        shared = {"scores": scores, "ground_truth": masks[0], "connectivity": metrics.connectivity}
        return {"": regions(**shared), PARTIAL["pixels"]: regions(**shared, normal=region)}

    rows = {HEAD: Scored(float(scores[foreground].max()), located(scores))}
    controls = uninformed_maps(sample, foreground, seed)
    if masks is not None:
        controls[PERFECT] = (masks[0] & foreground).astype(np.float32)
    for name, values in controls.items():
        rows[name] = Scored(float(values.max()), located(values))
    if masks is not None:
        rows[LEAK] = Scored(leak_score(scores, masks[0], foreground), {})
    return Judged(rows, {}, masks, None)


def measure(
    scored: Sequence[Scored], labels: np.ndarray, kind: Kind, config: MetricsConfig, seed: int | None
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, np.ndarray]]:
    """The metrics of one scorer over the instances of a class.

    Args:
        labels: (instances,) 0 or 1, in the order of ``scored``.
        seed: of the bootstrap, which draws instances within each label; None leaves out the intervals.

    Returns:
        The values by name; [low, high] of each that has an interval; and (resamples,) values of each of those.

    Raises:
        DataError: no instance is good, or none is anomalous.
    """
    values, intervals, draws = {}, {}, {}
    for name, metric in _metrics(scored, labels, kind, config).items():
        if seed is None:
            values[name] = float(metric(np.ones((1, len(labels)), np.int64))[0])
            continue
        seen = []

        def recorded(counts: np.ndarray, metric=metric, seen=seen) -> np.ndarray:
            seen.append(metric(counts))
            return seen[-1]

        found = bootstrap(recorded, labels, resamples=config.resamples, seed=seed, level=config.level)
        values[name], intervals[name], draws[name] = found.value, [found.low, found.high], seen[-1]
    located = [one.regions[""] for one in scored if one.regions]
    if located and kind == "voxels":
        values["coverage"] = coverage(located)
    return values, intervals, draws


def _metrics(
    scored: Sequence[Scored], labels: np.ndarray, kind: Kind, config: MetricsConfig
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Each metric as a function of how often every instance occurs."""
    if not 0 < labels.sum() < len(labels):
        raise DataError(f"both good and anomalous instances are needed, got {labels.sum()} anomalous of {len(labels)}")
    found = {}
    scores = np.array([one.score for one in scored])
    if np.isfinite(scores).all():
        instances = [regions(np.array([score]), np.array([label])) for score, label in zip(scores, labels, strict=True)]
        found["I-AUROC"] = lambda counts: resampled_auroc(instances, counts)
    if not any(one.regions for one in scored):
        return found
    whole, partial = "", PARTIAL[kind]
    located = {suffix: [one.regions[suffix] for one in scored] for suffix in (whole, partial)}
    # Empty voxels are so many that an AUROC over them says nothing.
    for suffix in (partial,) if kind == "voxels" else (whole, partial):
        name = f"{'V' if kind == 'voxels' else 'P'}-AUROC{suffix}"
        found[name] = lambda counts, parts=located[suffix]: resampled_auroc(parts, counts)
    for limit in config.limits:
        for suffix in (whole, partial):
            name = f"{'V-' if kind == 'voxels' else ''}AUPRO@{100 * limit:g}%{suffix}"
            found[name] = _aupro(located[suffix], limit, config)
    return found


def _aupro(parts: list[Regions], limit: float, config: MetricsConfig) -> Callable[[np.ndarray], np.ndarray]:
    anomalous = np.array([len(part.size) > 0 for part in parts])
    chosen = [part for part, defective in zip(parts, anomalous, strict=True) if defective]
    if config.pooling == "sample":
        values = np.array([pooled_aupro([part], limit=limit) for part in chosen])
        return lambda counts: counts[:, anomalous] @ values / counts[:, anomalous].sum(1)
    if config.nominal:
        return lambda counts: resampled_aupro(parts, counts, limit=limit)
    return lambda counts: resampled_aupro(chosen, counts[:, anomalous], limit=limit)
