"""What a scorer says of an instance, as the metrics need it, and the metrics of a class with their intervals.

Two kinds of results have the same parts. A volume counts empty voxels as normal, which SiM3D's published floors imply,
or leaves them out (" occupied"); a single view counts all pixels, the background being zero, or only those of the
object region, its holes filled (" object"). Baselines are scored like heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from dino_depth.anomaly.baselines import CONSTANT, LEAK, PERFECT, RANDOM, random_map
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
from dino_depth.anomaly.regions import label_components
from dino_depth.anomaly.trivial import constant_map, leak_score, leak_score_volume
from dino_depth.anomaly.volume import (
    Aggregation,
    Maps,
    ScoredVolume,
    VoxelConfig,
    accumulate_each,
    combine,
    truth_voxels,
)
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError

__all__ = ["HEAD", "Judged", "MetricsConfig", "Scored", "judge_view", "judge_views", "judge_volume", "measure"]

HEAD = "head"  # the row of the method itself, beside the baselines
LEAK_VOXELS = 10  # around a defect that the leak statistic leaves out
PARTIAL = {"voxels": " occupied", "pixels": " object"}  # the suffix of metrics over part of the normals
NOBODY: Mapping[str, Maps] = MappingProxyType({})

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
        template: a row that compares the same cell of the same view with the training instance, where a class has one
            of several calibrated views, and the run less that row.
    """

    limits: tuple[float, ...] = (0.01,)
    connectivity: int | None = None
    pooling: Literal["class", "sample"] = "class"
    nominal: bool = True
    resamples: int = 1000
    level: float = 0.95
    template: bool = True

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
        form: of the ground truth as it was given: voxels, points, masks or none.
    """

    rows: dict[str, Scored]
    arrays: dict[str, np.ndarray]
    truth: Voxels | tuple[np.ndarray, ...] | None
    points: np.ndarray | None
    form: str = "none"


def judge_volume(
    sample: Sample,
    heads: Mapping[int, Maps],
    depths: Sequence[DepthMap],
    foregrounds: Sequence[np.ndarray],
    truth: Truth | None,
    config: VoxelConfig,
    metrics: MetricsConfig,
    grid: Voxels | None = None,
    others: Mapping[str, Maps] = NOBODY,
) -> dict[int, Judged]:
    """Scores an instance of several calibrated views in its volume.

    Args:
        heads: maps of each head, by its seed, which is that of its random baseline as well.
        foregrounds: (height, width) bool of each view.
        grid: of the class; empty: one for this instance alone.
        others: maps of scorers that have a row beside each head, by the name of the row.

    Returns:
        By seed.

    Raises:
        DataError: as ``volume.accumulate`` and ``volume.truth_voxels``.
    """
    given = [*heads.values(), *others.values()]
    volumes = accumulate_each(given, sample, depths, foregrounds, config, truth, grid)
    grid, label = volumes[0].voxels, None
    defects = None
    if truth is not None:
        defects, label = truth_voxels(truth, sample, depths, grid)
        if metrics.connectivity is not None:
            label = None
        elif label is not None:
            # Defects that fell together on a coarser grid leave gaps in the numbers.
            label = np.unique(label, return_inverse=True)[1].astype(np.int32) + 1

    def row(scores: np.ndarray) -> Scored:
        located = {}
        if defects is not None:
            found = voxel_regions(
                grid.index, scores, defects.index, grid.shape, labels=label, connectivity=metrics.connectivity
            )
            located = {"": found, PARTIAL["voxels"]: replace(found, empty_normal=0)}
        return Scored(float(scores.max()), located)

    everywhere = np.ones(len(grid.index), bool)
    shared = {CONSTANT: row(constant_map(everywhere))}
    shared |= {name: row(volume.score) for name, volume in zip(others, volumes[len(heads) :], strict=True)}
    if defects is not None:
        places = (np.ravel_multi_index(part.index.astype(np.int64).T, grid.shape) for part in (grid, defects))
        shared[PERFECT] = row(np.isin(*places).astype(np.float32))
    judged = {}
    for seed, volume in zip(heads, volumes, strict=False):
        rows = {HEAD: row(volume.score), RANDOM: row(random_map(sample, everywhere, seed)), **shared}
        if defects is not None:
            rows[LEAK] = Scored(leak_score_volume(volume, defects, LEAK_VOXELS * grid.size), {})
        judged[seed] = Judged(rows, _volume_arrays(volume, defects, label), defects, grid.centers)
    return judged


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
    heads: Mapping[int, Maps],
    foreground: np.ndarray,
    truth: Truth | None,
    aggregation: Aggregation,
    metrics: MetricsConfig,
    others: Mapping[str, Maps] = NOBODY,
) -> dict[int, Judged]:
    """Scores an instance of one view in its pixels; arguments and result as ``judge_volume``.

    Raises:
        DataError: scores are not finite, or the mask has another size than the view.
    """
    masks = None if truth is None else truth.masks
    if masks is not None and masks[0].shape != foreground.shape:
        found = " and ".join("x".join(map(str, part)) for part in (masks[0].shape, foreground.shape))
        raise DataError(f"{sample.category}/{sample.name}: mask and depth map are {found}")
    region = filled(foreground)

    def row(scores: np.ndarray) -> Scored:
        located = {}
        if masks is not None:
            given = {"scores": scores, "ground_truth": masks[0], "connectivity": metrics.connectivity}
            located = {"": regions(**given), PARTIAL["pixels"]: regions(**given, normal=region)}
        return Scored(float(scores[foreground].max()), located)

    shared = {CONSTANT: row(constant_map(foreground))}
    shared |= {name: row(combine(maps, 0, foreground, aggregation)) for name, maps in others.items()}
    if masks is not None:
        shared[PERFECT] = row((masks[0] & foreground).astype(np.float32))
    judged = {}
    for seed, maps in heads.items():
        scores = combine(maps, 0, foreground, aggregation)
        rows = {HEAD: row(scores), RANDOM: row(random_map(sample, foreground, seed)), **shared}
        if masks is not None:
            rows[LEAK] = Scored(leak_score(scores, masks[0], foreground), {})
        judged[seed] = Judged(rows, {}, masks, None)
    return judged


def judge_views(
    sample: Sample,
    heads: Mapping[int, Maps],
    foregrounds: Sequence[np.ndarray],
    truth: Truth | None,
    aggregation: Aggregation,
    metrics: MetricsConfig,
    others: Mapping[str, Maps] = NOBODY,
) -> dict[int, Judged]:
    """Scores an instance of several views in the pixels of all of them, pooled; as ``judge_volume``.

    The score of the instance is the maximum over its views (SGANet, section 3.6). Holes of a view, which nobody
    measured, are no pixels; around the object all pixels are normals of score 0.

    Raises:
        DataError: scores are not finite, or masks have other sizes than their views.
    """
    masks = None if truth is None else truth.masks
    sizes = [mask.shape for mask in foregrounds]
    if masks is not None and [mask.shape for mask in masks] != sizes:
        raise DataError(
            f"{sample.category}/{sample.name}: masks are {[mask.shape for mask in masks]}, depth maps {sizes}"
        )
    outside = sum(np.count_nonzero(~filled(mask)) for mask in foregrounds)

    def located(parts: Sequence[np.ndarray]) -> dict[str, Regions]:
        if masks is None:
            return {}
        scores, labels, components = [], [], 0
        for part, mask, shown in zip(parts, masks, foregrounds, strict=True):
            index = np.argwhere(mask)
            label = label_components(index, metrics.connectivity) if len(index) else np.zeros(0, np.int32)
            normal = shown & ~mask
            scores += [part[mask], part[normal]]
            labels += [label + components, np.zeros(np.count_nonzero(normal), np.int32)]
            components += int(label.max(initial=0))
        listed = regions(np.concatenate(scores), np.concatenate(labels), truth="labels")
        return {"": replace(listed, empty_normal=outside), PARTIAL["pixels"]: listed}

    def row(parts: Sequence[np.ndarray]) -> Scored:
        return Scored(max(float(part.max()) for part in parts), located(parts))

    def combined(maps: Maps) -> list[np.ndarray]:
        return [combine(maps, view, mask, aggregation) for view, mask in enumerate(foregrounds)]

    shared = {CONSTANT: row([constant_map(shown) for shown in foregrounds])}
    shared |= {name: row(combined(maps)) for name, maps in others.items()}
    if masks is not None:
        parts = zip(masks, foregrounds, strict=True)
        shared[PERFECT] = row([(mask & shown).astype(np.float32) for mask, shown in parts])
    judged = {}
    for seed, maps in heads.items():
        scores = combined(maps)
        random = [random_map(sample, shown, seed + view) for view, shown in enumerate(foregrounds)]
        rows = {HEAD: row(scores), RANDOM: row(random), **shared}
        if masks is not None:
            left = [leak_score(*parts) for parts in zip(scores, masks, foregrounds, strict=True)]
            rows[LEAK] = Scored(float(np.nanmax(left)) if np.isfinite(left).any() else float("nan"), {})
        judged[seed] = Judged(rows, {}, masks, None)
    return judged


def measure(
    scored: Sequence[Scored], labels: np.ndarray, kind: Kind, config: MetricsConfig, seed: int | None
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, np.ndarray]]:
    """The metrics of one scorer over the instances of a class.

    Args:
        labels: (instances,) 0 or 1, in the order of ``scored``.
        seed: of the bootstrap, which draws instances within each label; None leaves out the intervals.

    Returns:
        The values by name; [low, high] of each that has an interval; and (resamples,) values of each of those.

        Nothing where no instance is anomalous: no metric is defined there.

    Raises:
        DataError: no instance is good.
    """
    values, intervals, draws = {}, {}, {}
    if not labels.any():
        return values, intervals, draws
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
    """Each metric as a function of how often every instance occurs; first the one that tells methods apart."""
    if labels.all():
        raise DataError(f"good instances are needed, got {len(labels)} anomalous ones alone")
    located = {}
    if any(one.regions for one in scored):
        located = {suffix: [one.regions[suffix] for one in scored] for suffix in ("", PARTIAL[kind])}

    def aupros(suffix: str) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        letter = "V-" if kind == "voxels" else ""
        names = {limit: f"{letter}AUPRO@{100 * limit:g}%{suffix}" for limit in config.limits if located}
        return {name: _aupro(located[suffix], limit, config) for limit, name in names.items()}

    found = aupros(PARTIAL[kind])
    scores = np.array([one.score for one in scored])
    if np.isfinite(scores).all():
        instances = [regions(np.array([score]), np.array([label])) for score, label in zip(scores, labels, strict=True)]
        found["I-AUROC"] = lambda counts: resampled_auroc(instances, counts)
    # Empty voxels are so many that an AUROC over them says nothing.
    for suffix, parts in located.items():
        if kind == "pixels" or suffix:
            name = f"{'V' if kind == 'voxels' else 'P'}-AUROC{suffix}"
            found[name] = lambda counts, parts=parts: resampled_auroc(parts, counts)
    return found | aupros("")


def _aupro(parts: list[Regions], limit: float, config: MetricsConfig) -> Callable[[np.ndarray], np.ndarray]:
    anomalous = np.array([len(part.size) > 0 for part in parts])
    chosen = [part for part, defective in zip(parts, anomalous, strict=True) if defective]
    if config.pooling == "sample":
        values = np.array([pooled_aupro([part], limit=limit) for part in chosen])
        return lambda counts: counts[:, anomalous] @ values / counts[:, anomalous].sum(1)
    if config.nominal:
        return lambda counts: resampled_aupro(parts, counts, limit=limit)
    return lambda counts: resampled_aupro(chosen, counts[:, anomalous], limit=limit)
