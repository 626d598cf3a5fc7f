"""AUROC, AUPRO and V-AUPRO, exact at any limit, on dense arrays and on sparse volumes. Needs NumPy and SciPy only.

The PRO curve (per-region overlap: Bergmann et al., "Uninformed Students", CVPR 2020, and "The MVTec Anomaly Detection
Dataset", IJCV 2021) holds, for every threshold t, the share of normal elements above t (false positive rate) and the
share of a connected component of the ground truth above t, averaged over components. AUPRO is its area up to a limit
of the false positive rate, divided by that limit; V-AUPRO is the same over voxels (SiM3D: 1 %).

All of it here is one rank statistic. With F>(s) and F>=(s) the shares of normals above s, and not below s,

    AUPRO(L) = 1/C sum_c 1/|c| sum_{j in c} 1/L mean of max(0, L - x) over x in [F>(s_j), F>=(s_j)]

because an element j of component c lifts the curve by 1/(C|c|) at that place: a step if no normal ties with it, else
its part of the straight line across the tie. So no threshold is sampled, ties cost nothing and are exact, the cost is
one sort of the normals whatever the number of components, and the curve is cut at L by linear interpolation. AUROC is
the case of one component and L = 1. Counts are integers, shares float64.

Traps: ground truth is a boolean mask, or integers that label components, and what may be either is refused; a component
that is only partly observed has its unseen elements at score 0, which caps its overlap (`coverage`); V-AUPRO with empty
voxels as normals depends on the extent of the grid, so only values on equal grids compare.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dino_depth.anomaly.regions import Meaning, Regions, coverage, label_components, matches, regions, voxel_regions
from dino_depth.errors import ConfigError, DataError

__all__ = [
    "Interval", "Regions", "aupro", "auroc", "bootstrap", "coverage", "label_components", "pooled_aupro", "regions",
    "resampled_aupro", "resampled_auroc", "voxel_regions",
]  # fmt: skip

LARGEST_CHANNELS = 4
BLOCK = 4096  # defect elements at a time when resampling: resamples x BLOCK float64 values are held


@dataclass(frozen=True)
class Interval:
    """A value on all instances and the bounds of its bootstrap interval of probability ``level``."""

    value: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class _Normals:
    """Normals in ascending order, and the weight below each place where they are not counted one by one."""

    score: np.ndarray
    below: np.ndarray | None
    empty: float

    @classmethod
    def of(cls, samples: Sequence[Regions], dtype: np.dtype) -> "_Normals":
        score = _joined([sample.normal for sample in samples]).astype(dtype, copy=False)
        empty = sum(sample.empty_normal for sample in samples)
        if all(sample.normal_weight is None for sample in samples):
            return cls(np.sort(score), None, empty)
        weight = _joined([_weight(sample) for sample in samples])
        order = np.argsort(score, kind="stable")
        return cls(score[order], np.concatenate(([0.0], np.cumsum(weight[order]))), empty)

    @property
    def total(self) -> float:
        return self.empty + (len(self.score) if self.below is None else self.below[-1])

    def above(self, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Weight of the normals greater than each score, and of those not less than it."""
        first = np.searchsorted(self.score, score)
        last, tied = first.copy(), matches(self.score, first, score)
        last[tied] = np.searchsorted(self.score, score[tied], "right")
        found = []
        for place, has_empty in ((last, score >= 0), (first, score > 0)):
            lower = place if self.below is None else self.below[place]
            found.append(self.total - (lower + self.empty * has_empty))
        return found[0], found[1]


def auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The probability that an anomalous element scores higher than a normal one, a tie counting one half.

    Args:
        scores: array of any shape: one score per instance (I-AUROC) or per pixel (P-AUROC); larger = more anomalous.
        labels: of the same shape, boolean or 0 and 1.
        weights: of the same shape, >= 0: an element of weight 2 counts as two equal ones.

    Raises:
        DataError: a class is empty, a score is NaN, shapes differ, or labels or weights are not as above.
    """
    labels = np.asarray(labels)
    if labels.dtype != bool and (odd := np.isin(labels, (0, 1), invert=True)).any():
        raise DataError(f"labels must be boolean or 0 and 1, got {labels[odd].flat[0]}")
    if not labels.any() or labels.all():
        raise DataError(f"AUROC needs both classes, got {labels.size} labels of which {np.count_nonzero(labels)} are 1")
    sample = regions(scores, labels.astype(np.uint8), weights=weights, truth="labels")
    return _pooled([sample], 1.0, _per_element)


def aupro(
    scores: np.ndarray | Sequence[np.ndarray],
    ground_truth: np.ndarray | Sequence[np.ndarray],
    *,
    limit: float = 0.01,
    connectivity: int | None = None,
    normal: np.ndarray | Sequence[np.ndarray] | None = None,
    weights: np.ndarray | Sequence[np.ndarray] | None = None,
    thresholds: int | None = None,
    truth: Meaning = "auto",
) -> float:
    """Area under the PRO curve up to a false positive rate of ``limit``, divided by ``limit``: 1 is perfect.

    Scores of no information give about limit / 2. Takes one array, or a list of arrays (samples) that are pooled: one
    threshold for all, the false positive rate over all normals, the overlap averaged over all components. All
    arguments that are arrays are then lists. For sparse volumes see `voxel_regions`.

    Args:
        scores: N-dimensional, larger = more anomalous.
        ground_truth: of the same shape: a boolean mask, whose connected components are found, or integer labels,
            0 = no defect, 1 to C = components, each of them in one part.
        limit: largest false positive rate, 0 < limit <= 1.
        connectivity: neighbours of an element of a mask: 4 or 8 in two dimensions, all by default; in three it says
            what they are: 6, 18 or 26 one volume, 4 or 8 a stack of images, (images, height, width), which are pooled.
        normal: of the same shape, boolean: which elements without a defect count as normals; all by default.
        weights: of the same shape, >= 0: an element of weight 2 counts as two equal ones, in the false positive rate
            and in the overlap of its component. Components count equally whatever their size.
        thresholds: instead of the exact area, that of the polygon through so many thresholds at equally spaced ranks
            of the normals, the false positive rate taken from the rank (wrong at ties). This is what the evaluation
            code of MVTec 3D-AD computes, for comparison with figures made by it: 99, at a limit of 1 %, are one
            trapezoid.
        truth: what integers are: "mask", not 0 where there is a defect, or "labels", also of components in several
            parts or in three dimensions. "auto" takes them for labels, and refuses what may be either.

    Raises:
        DataError: no component, no normal, a NaN, shapes, labels or weights that do not fit, or an array that may mean
            two things.
        ConfigError: limit, connectivity or thresholds is impossible.
    """
    if isinstance(scores, Sequence):
        columns = [scores, ground_truth]
        columns += [[None] * len(scores) if given is None else given for given in (normal, weights)]
        if any(len(column) != len(scores) for column in columns):
            raise DataError(
                f"{len(scores)} arrays of scores, but {[len(column) for column in columns[1:]]} of the rest"
            )
        rows = list(zip(*columns, strict=True))
    else:
        rows = [(scores, ground_truth, normal, weights)]
        if np.ndim(ground_truth) > 2 and connectivity in (4, 8):
            rows = _images(rows[0])
    samples = [regions(*row[:2], connectivity=connectivity, normal=row[2], weights=row[3], truth=truth) for row in rows]
    return pooled_aupro(samples, limit=limit, thresholds=thresholds)


def _images(arrays: tuple[np.ndarray | None, ...]) -> list[tuple[np.ndarray | None, ...]]:
    """The images (height, width) of stacks (..., height, width) of one shape; what is None is None for all of them."""
    shapes = {np.shape(array) for array in arrays if array is not None}
    if len(shapes) > 1:
        raise DataError(f"stacks of images differ in shape: {', '.join(map(str, sorted(shapes)))}")
    shape = next(iter(shapes))
    if shape[-1] <= LARGEST_CHANNELS:
        raise DataError(
            f"a stack of images {shape} ends with height and width, and {shape[-1]} seem to be channels: take them away"
        )
    stacks = [None if array is None else np.reshape(array, (-1, *shape[-2:])) for array in arrays]
    return [tuple(None if stack is None else stack[place] for stack in stacks) for place in range(len(stacks[0]))]


def pooled_aupro(samples: Sequence[Regions], *, limit: float = 0.01, thresholds: int | None = None) -> float:
    """`aupro` of separated samples, pooled."""
    _check_limit(limit)
    if thresholds is None:
        return _pooled(samples, limit, _per_component)
    return _sampled(samples, limit, thresholds)


def resampled_aupro(samples: Sequence[Regions], counts: np.ndarray, *, limit: float = 0.01) -> np.ndarray:
    """`pooled_aupro` of resampled samples, exact, without labelling or sorting anything again.

    The false positive rate at a defect element is a weighted sum of per-sample counts, which are found once.

    Args:
        samples: I of them.
        counts: (resamples, I) how often each sample occurs in each resample.

    Returns:
        (resamples,) float64.

    Raises:
        DataError: a resample has no component or no normal.
        ConfigError: limit is impossible.
    """
    _check_limit(limit)
    return _resampled(samples, counts, limit, _per_component)


def resampled_auroc(samples: Sequence[Regions], counts: np.ndarray) -> np.ndarray:
    """As `resampled_aupro`, for `auroc` over all elements of the samples.

    An instance's single score is a sample too, ``regions(np.array([score]), np.array([label]))`` with label 0 or 1.
    """
    return _resampled(samples, counts, 1.0, _per_element)


def bootstrap(
    metric: Callable[[np.ndarray], np.ndarray],
    strata: np.ndarray,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile bootstrap over instances, stratified.

    Instances are drawn with replacement within each stratum, so that no resample lacks a class. An interval of the
    difference of two methods is paired if one metric subtracts them, so that both see the same resamples:

        bootstrap(lambda counts: resampled_aupro(ours, counts) - resampled_aupro(theirs, counts), labels)

    and the mean of one value per data set is ``lambda counts: counts @ values / counts.sum(1)``.

    Args:
        metric: (resamples, instances) integer counts -> (resamples,) values.
        strata: (instances,) stratum of each, such as its label; all equal for none.
        level: probability of the interval; the lower bound of a two-sided 90 % interval is a one-sided 95 % bound.

    Raises:
        DataError: there is no instance, or what ``metric`` raises.
        ConfigError: resamples or level is impossible.
    """
    strata = np.asarray(strata)
    if strata.ndim != 1 or not len(strata):
        raise DataError(f"strata must be one per instance, got shape {strata.shape}")
    if resamples < 1 or not 0 < level < 1:
        raise ConfigError(f"resamples must be at least 1 and 0 < level < 1, got {resamples} and {level}")
    random = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(strata)), np.int64)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        counts[:, members] = random.multinomial(len(members), np.full(len(members), 1 / len(members)), resamples)
    value = metric(np.ones((1, len(strata)), np.int64))
    low, high = np.quantile(metric(counts), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value[0]), float(low), float(high), level)


def _per_component(sample: Regions) -> tuple[np.ndarray, float]:
    """What each defect element weighs, and their sum, where components count equally."""
    return sample.defect_weight / sample.size[sample.component], len(sample.size)


def _per_element(sample: Regions) -> tuple[np.ndarray, float]:
    return sample.defect_weight, float(sample.size.sum())


def _pooled(samples: Sequence[Regions], limit: float, shares: Callable) -> float:
    normals, score, share, total = _together(samples, shares)
    cut = limit * normals.total
    # More listed normals than the limit allows lie above whatever is below the first of these.
    first = len(normals.score) - int(cut) - 1 if normals.below is None else 0
    kept = np.flatnonzero(score >= normals.score[first]) if first > 0 else np.arange(len(score))
    kept = kept[np.argsort(score[kept])]  # in ascending order they are found fastest
    gain = np.zeros(len(score))
    gain[kept] = _gain(*normals.above(score[kept]), cut)
    return float((gain * share).sum() / total)


def _sampled(samples: Sequence[Regions], limit: float, thresholds: int) -> float:
    normals, score, share, total = _together(samples, _per_component)
    if thresholds < 2:
        raise ConfigError(f"thresholds must be at least 2, got {thresholds}")
    if normals.below is not None or normals.empty:
        raise ConfigError("thresholds are ranks: they need every normal listed, and no weights")
    rank, order = np.linspace(0, len(normals.score) - 1, thresholds, dtype=int), np.argsort(score, kind="stable")
    place = np.searchsorted(score[order], normals.score[rank], "right")
    below = np.concatenate(([0.0], np.cumsum(share[order])))[place]
    rate = np.concatenate((1 - (rank[::-1] + 1) / len(normals.score), [1.0]))
    overlap = np.concatenate((1 - below[::-1] / total, [1.0]))
    kept = rate < limit
    x, y = np.append(rate[kept], limit), np.append(overlap[kept], np.interp(limit, rate, overlap))
    return float(np.trapezoid(y, x) / limit)


def _resampled(samples: Sequence[Regions], counts: np.ndarray, limit: float, shares: Callable) -> np.ndarray:
    counts = np.asarray(counts, np.float64)
    if counts.ndim != 2 or counts.shape[1] != len(samples):
        raise DataError(f"counts must have one column for each of {len(samples)} samples, got shape {counts.shape}")
    score = _joined([sample.defect for sample in samples])
    normals = [_Normals.of([sample], score.dtype) for sample in samples]
    total_normal = np.array([one.total for one in normals], np.float64)  # (samples,)
    pairs = [shares(sample) for sample in samples]
    total_share = counts @ np.array([total for _, total in pairs], np.float64)  # (resamples,)
    cut = limit * (counts @ total_normal)[:, None]  # (resamples, 1)
    if not (cut.all() and total_share.all()):
        raise DataError("a resample has no normal or no defect: give strata that hold both")
    share = _joined([share for share, _ in pairs])
    owner = np.repeat(np.arange(len(samples)), [len(sample.defect) for sample in samples])
    order = np.argsort(score, kind="stable")
    area = np.zeros(len(counts))
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        above, not_below = np.stack([one.above(score[block]) for one in normals], 1).astype(np.float64)
        # Past the limit in every sample is past the limit in every mixture of them.
        kept = (above < limit * total_normal[:, None]).any(0)
        gain = _gain(counts @ above[:, kept], counts @ not_below[:, kept], cut)  # (resamples, kept)
        area += (gain * counts[:, owner[block[kept]]]) @ share[block[kept]]
    return area / total_share


def _together(samples: Sequence[Regions], shares: Callable) -> tuple[_Normals, np.ndarray, np.ndarray, float]:
    """Normals, and the scores of defect elements with the share of each and the shares' sum."""
    pairs = [shares(sample) for sample in samples]
    total = sum(total for _, total in pairs)
    if not total:
        raise DataError(f"no defect in the ground truth of {len(samples)} samples")
    score = _joined([sample.defect for sample in samples])
    normals = _Normals.of(samples, score.dtype)
    if not normals.total:
        raise DataError(f"no element of {len(samples)} samples counts as normal")
    return normals, score, _joined([share for share, _ in pairs]), total


def _gain(above: np.ndarray, not_below: np.ndarray, cut: np.ndarray | float) -> np.ndarray:
    """Mean of max(0, 1 - x / cut) over x in [above, not_below]: the area that a defect element adds, 1 at most."""
    tie = not_below - above
    first, last = np.minimum(above, cut), np.minimum(not_below, cut)
    inside = np.divide(last - first, tie, out=np.ones(np.shape(first)), where=tie > 0)
    return (1 - (first + last) / (2 * cut)) * inside


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _weight(sample: Regions) -> np.ndarray:
    return np.ones(len(sample.normal)) if sample.normal_weight is None else sample.normal_weight


def _check_limit(limit: float):
    if not 0 < limit <= 1:
        raise ConfigError(f"limit must be a false positive rate, 0 < limit <= 1, got {limit}")
