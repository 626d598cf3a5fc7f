"""AUROC and AUPRO against brute force over every threshold, closed forms, SciPy and literal resampling."""

import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage, stats

from dino_depth.anomaly import metrics
from dino_depth.anomaly.metrics import (
    Interval,
    aupro,
    auroc,
    bootstrap,
    coverage,
    label_components,
    pooled_aupro,
    regions,
    resampled_aupro,
    resampled_auroc,
    voxel_regions,
)
from dino_depth.errors import ConfigError, DataError

RANKS = {2: {4: 1, 8: 2}, 3: {6: 1, 18: 2, 26: 3}}


def labelled(mask, connectivity=None):
    rank = mask.ndim if connectivity is None else RANKS[mask.ndim][connectivity]
    return ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, rank))[0]


def brute_force(scores, truths, limit, connectivity=None, normals=None, weights=None):
    """The PRO curve at every score that occurs, straight between its points, cut at the limit; all float64."""
    weights = weights or [np.ones(score.shape) for score in scores]
    normals = normals or [np.ones(score.shape, bool) for score in scores]
    labels = [labelled(t, connectivity) if t.dtype == bool else t for t in truths]
    x, y = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([score.ravel() for score in scores]))[::-1]:
        hits = [score >= threshold for score in scores]
        counted = [normal & (label == 0) for normal, label in zip(normals, labels, strict=True)]
        false = sum(w[hit & n].sum() for w, hit, n in zip(weights, hits, counted, strict=True))
        overlaps = []
        for weight, hit, label in zip(weights, hits, labels, strict=True):
            for component in range(1, label.max() + 1):
                inside = label == component
                overlaps.append(weight[hit & inside].sum() / weight[inside].sum())
        x.append(false / sum(w[n].sum() for w, n in zip(weights, counted, strict=True)))
        y.append(np.mean(overlaps))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(zip(x, y, strict=True), list(zip(x, y, strict=True))[1:], strict=False):
        if x1 <= limit:
            area += (x1 - x0) * (y0 + y1) / 2
        elif x0 < limit:
            area += (limit - x0) * (y0 + y0 + (y1 - y0) * (limit - x0) / (x1 - x0)) / 2
    return area / limit


def random_sample(random, shape, levels, share=0.15):
    """Scores of few or many levels, informative to a random degree, and a mask of a few blobs."""
    mask = ndimage.gaussian_filter(random.normal(size=shape), 0.7)
    mask = mask > np.quantile(mask, 1 - share)
    scores = random.normal(size=shape) + random.uniform(0, 3) * mask
    if levels:
        scores = np.round(scores * levels / 4)
    return scores, mask


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("levels", [0, 3, 12])
def test_aupro_equals_brute_force_over_every_threshold(dimensions, levels):
    random = np.random.default_rng(100 * dimensions + levels)
    components = 0
    for _ in range(60):
        shape = tuple(random.integers(3, 9 if dimensions == 2 else 6, dimensions))
        scores, mask = random_sample(random, shape, levels, random.uniform(0.05, 0.4))
        scores = scores.astype(random.choice([np.float32, np.float64]))
        limit = random.choice([0.01, 0.05, 0.3, 1.0, random.uniform(0.001, 1)])
        # In three dimensions it is what says that they are a volume.
        connectivity = random.choice([*([None] if dimensions == 2 else []), *RANKS[dimensions]])
        normal = random.random(shape) < 0.7 if random.random() < 0.5 else None
        weights = random.integers(0, 4, shape) + mask.astype(float) if random.random() < 0.5 else None
        if not mask.any() or not (~mask if normal is None else normal & ~mask).any():
            continue
        if weights is not None and not weights[~mask if normal is None else normal & ~mask].any():
            continue
        got = aupro(scores, mask, limit=limit, connectivity=connectivity, normal=normal, weights=weights)
        one = [given if given is None else [given] for given in (normal, weights)]
        assert got == pytest.approx(brute_force([scores], [mask], limit, connectivity, *one), abs=1e-9)
        components += labelled(mask, connectivity).max()
    assert components > 60


@pytest.mark.parametrize("levels", [0, 4])
def test_pooled_aupro_equals_brute_force_also_with_samples_without_defects(levels):
    random = np.random.default_rng(levels)
    for _ in range(40):
        samples = [random_sample(random, (6, 7), levels) for _ in range(4)]
        scores, masks = [list(column) for column in zip(*samples, strict=True)]
        masks[0][:] = False
        limit = random.uniform(0.01, 0.6)
        assert aupro(scores, masks, limit=limit) == pytest.approx(brute_force(scores, masks, limit), abs=1e-9)


def test_labels_are_components_whatever_touches():
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(9, 9)), np.zeros((9, 9), np.int16)
    labels[2:4, 2:4], labels[4:7, 2:6] = 1, 2
    assert aupro(scores, labels, limit=0.3) == pytest.approx(brute_force([scores], [labels], 0.3), abs=1e-9)
    assert aupro(scores, labels, limit=0.3) != aupro(scores, labels > 0, limit=0.3)
    labels[0, 8] = 1
    found = aupro(scores, labels, limit=0.3, truth="labels")
    assert found == pytest.approx(brute_force([scores], [labels], 0.3), abs=1e-9)
    with pytest.raises(DataError, match="label 1 is in 2 parts: a mask must be boolean, or say truth='mask'"):
        aupro(scores, labels, limit=0.3)


def test_a_type_does_not_decide_silently():
    """0 and 1 in integers are no longer a single component: they are refused, or told to be a mask."""
    random = np.random.default_rng(4)
    scores, masks = (
        list(column) for column in zip(*[random_sample(random, (9, 11), 0) for _ in range(4)], strict=True)
    )
    expected = aupro(scores, masks, limit=0.3)
    for dtype in (np.uint8, np.int64):
        integers = [mask.astype(dtype) for mask in masks]
        with pytest.raises(DataError, match="label 1 is in .* parts"):
            aupro(scores, integers, limit=0.3)
        assert aupro(scores, integers, limit=0.3, truth="mask") == expected
        assert aupro(scores, [255 * mask for mask in integers], limit=0.3, truth="mask") == expected
        assert aupro(scores, integers, limit=0.3, truth="labels") != expected
    whole = np.zeros((9, 11), np.uint8)
    whole[2:5, 3:6] = 1
    assert aupro(scores[0], whole, limit=0.3) == aupro(scores[0], whole > 0, limit=0.3)
    assert aupro(scores[0], 0 * whole + np.eye(9, 11, dtype=int), limit=0.3) > 0  # corners touch


def test_a_stack_of_images_is_told_from_a_volume():
    random = np.random.default_rng(5)
    scores, masks = zip(*[random_sample(random, (8, 9), 0) for _ in range(5)], strict=True)
    stack, truth = np.stack(scores), np.stack(masks)
    normal, weights = random.random(stack.shape) < 0.8, random.integers(1, 3, stack.shape)
    with pytest.raises(
        DataError,
        match=r"\(5, 8, 9\) may be one volume or many images: connectivity 26",
    ):
        aupro(stack, truth)
    for connectivity in (4, 8):
        several = {"connectivity": connectivity, "limit": 0.3}
        expected = aupro(list(scores), list(masks), normal=list(normal), weights=list(weights), **several)
        assert aupro(stack, truth, normal=normal, weights=weights, **several) == expected
        assert aupro(stack[:, None], truth[:, None].astype(int), truth="mask", **several) == aupro(
            list(scores), list(masks), **several
        )
    assert aupro(stack, truth, connectivity=26, limit=0.3) != aupro(stack, truth, connectivity=8, limit=0.3)
    with pytest.raises(DataError, match="integers of shape .* say truth='labels' of components, or 'mask'"):
        aupro(stack, truth.astype(int))
    with pytest.raises(DataError, match="stacks of images differ in shape"):
        aupro(stack, truth, normal=normal[:4], connectivity=8)
    for image in (stack[..., None], stack[0][..., None]):
        with pytest.raises(DataError, match=r"9, 1\) ends with height and width, and 1 seem to be channels"):
            aupro(image, image > 1, connectivity=8)
    with pytest.raises(DataError, match=r"\(8, 9, 3\) ends with height and width, and 3 seem to be channels"):
        aupro(np.zeros((8, 9, 3)), np.ones((8, 9, 3), np.uint8), connectivity=8, truth="mask")
    with pytest.raises(ConfigError, match="truth must be one of auto, mask, labels, got 'masks'"):
        aupro(stack, truth, truth="masks")


def test_an_element_of_weight_two_counts_as_two():
    random = np.random.default_rng(1)
    scores, labels = random.integers(0, 5, 40).astype(float), random.integers(0, 3, 40)
    weights = random.integers(1, 4, 40)
    for score in (lambda *a, **k: aupro(*a, limit=0.2, **k), lambda s, t, **k: auroc(s, t > 0, **k)):
        repeated = score(np.repeat(scores, weights), np.repeat(labels, weights))
        assert score(scores, labels, weights=weights) == pytest.approx(repeated, abs=1e-12)


def test_perfect_scores_give_one_and_inverted_ones_zero():
    random = np.random.default_rng(2)
    mask = random_sample(random, (20, 20, 20), 0)[1]
    for limit in (0.01, 0.3, 1.0):
        assert aupro(mask * 1.0, mask, limit=limit, connectivity=26) == pytest.approx(1, abs=1e-12)
        assert aupro(mask * -1.0, mask, limit=limit, connectivity=26) == pytest.approx(0, abs=1e-12)
    assert auroc(mask * 1.0, mask) == 1 and auroc(mask * -1.0, mask) == 0


def test_constant_scores_give_half_the_limit():
    mask = random_sample(np.random.default_rng(3), (20, 20), 0)[1]
    for limit in (0.01, 0.3, 1.0):
        assert aupro(np.full(mask.shape, 7.0), mask, limit=limit) == pytest.approx(limit / 2, abs=1e-12)
    assert auroc(np.zeros(mask.shape), mask) == 0.5


def random_volume(random, side=60, occupied=0.003, defects=6, radius=2):
    """Coordinates of occupied voxels and of defects among them, and a score of no information for each."""
    index = np.argwhere(random.random((side,) * 3) < occupied)
    blobs = []
    for centre in index[random.choice(len(index), defects, replace=False)]:
        ball = np.argwhere(np.ones((2 * radius + 1,) * 3)) - radius
        blobs.append(np.clip(ball[(ball**2).sum(1) <= radius**2] + centre, 0, side - 1))
    defect = np.unique(np.concatenate(blobs), axis=0)
    return np.unique(np.concatenate((index, defect)), axis=0), defect, (side,) * 3


def test_random_scores_give_half_the_limit_over_occupied_voxels_and_1_minus_f_over_2l_with_empty_ones():
    random = np.random.default_rng(4)
    for occupied, limit in ((0.003, 0.01), (0.02, 0.01), (0.004, 0.05)):
        off_all, off_occupied = [], []
        for _ in range(12):
            index, defect, shape = random_volume(random, occupied=occupied)
            scores = random.random(len(index)) + 1e-6
            share = (len(index) - len(defect)) / (np.prod(shape) - len(defect))
            expected = 1 - share / (2 * limit) if share <= limit else limit / (2 * share)
            off_all.append(pooled_aupro([voxel_regions(index, scores, defect, shape)], limit=limit) - expected)
            few = voxel_regions(index, scores, defect, shape, empty_normal=0)
            off_occupied.append(pooled_aupro([few], limit=limit) - limit / 2)
        for off, most in ((off_all, 0.1), (off_occupied, 0.02)):
            assert abs(np.mean(off)) < 4 * np.std(off) / np.sqrt(len(off)) < most


@pytest.mark.parametrize("negative", [False, True])
def test_a_sparse_volume_gives_what_the_dense_one_gives(negative):
    random = np.random.default_rng(5)
    for _ in range(20):
        shape = tuple(random.integers(4, 8, 3))
        occupied = random.random(shape) < 0.4
        mask = random_sample(random, shape, 0, 0.2)[1]
        dense = np.where(occupied, random.integers(-2 if negative else 0, 4, shape), 0.0)
        index, defects, order = np.argwhere(occupied), np.argwhere(mask), random.permutation(occupied.sum())
        limit, connectivity = random.uniform(0.01, 0.9), random.choice([6, 18, 26])
        sparse = voxel_regions(index[order], dense[occupied][order], defects, shape, connectivity=connectivity)
        expected = aupro(dense, mask, limit=limit, connectivity=connectivity)
        assert pooled_aupro([sparse], limit=limit) == pytest.approx(expected, abs=1e-12)
        few = voxel_regions(index, dense[occupied], defects, shape, connectivity=connectivity, empty_normal=0)
        expected = aupro(dense, mask, limit=limit, connectivity=connectivity, normal=occupied)
        assert pooled_aupro([few], limit=limit) == pytest.approx(expected, abs=1e-12)
        assert coverage([sparse]) == pytest.approx((occupied & mask).sum() / mask.sum())
        labels = label_components(defects, connectivity)
        order = random.permutation(len(defects))
        given = voxel_regions(index, dense[occupied], defects[order], shape, labels=labels[order])
        assert pooled_aupro([given], limit=limit) == pytest.approx(pooled_aupro([sparse], limit=limit), abs=1e-12)


def test_unobserved_ground_truth_caps_the_score_of_a_perfect_scorer():
    index, shape = np.array([[0, 0, 0], [0, 0, 1], [5, 5, 5]]), (10, 10, 10)
    defects = np.array([[0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 0, 4]])
    sample = voxel_regions(index, np.array([0.1, 1.0, 0.1]), defects, shape, empty_normal=0)
    assert coverage([sample]) == 0.25
    assert pooled_aupro([sample]) == 0.25


@pytest.mark.parametrize("shape", [(12,), (9, 14), (7, 8, 9), (4, 4, 4, 4)])
def test_components_are_those_of_the_dense_array_and_in_its_order(shape):
    random = np.random.default_rng(6)
    for share in (0.1, 0.3, 0.6):
        mask = random.random(shape) < share
        for rank in range(1, len(shape) + 1):
            structure = ndimage.generate_binary_structure(len(shape), rank)
            expected = ndimage.label(mask, structure)[0][mask]
            index, count = np.argwhere(mask), int(structure.sum()) - 1
            np.testing.assert_array_equal(label_components(index, count), expected)
            order = random.permutation(len(index))
            np.testing.assert_array_equal(
                label_components(index[order].astype(np.uint8), count), label_components(index, count)[order]
            )
        np.testing.assert_array_equal(label_components(index + 1000), expected)


def test_a_mask_is_not_taken_for_coordinates():
    """Its rows would be places in 40 dimensions, which have 3^40 neighbours."""
    with pytest.raises(DataError, match="coordinates in 40 dimensions: give np.argwhere of a mask"):
        label_components(np.eye(40, dtype=np.uint8))


@pytest.mark.parametrize("far", [1280, 1400, 2**20])
def test_components_far_apart_are_told_apart_on_grids_of_any_size(far):
    """Places of grids below 2^31 elements are 32 bits wide: 1288^3 are, 1408^3 would wrap round."""
    mask = np.random.default_rng(8).random((8, 8, 8)) < 0.2
    expected, count = ndimage.label(mask, np.ones((3, 3, 3)))
    near = np.argwhere(mask)
    index = np.concatenate([near, near + far])
    labels = label_components(index)
    np.testing.assert_array_equal(labels, np.concatenate([expected[mask], expected[mask] + count]))
    shape, scores = (far + 8,) * 3, np.random.default_rng(9).random(len(index))
    sample = voxel_regions(index, scores, index[::2], shape)
    assert sample.empty_normal == (far + 8) ** 3 - len(index)
    np.testing.assert_array_equal(sample.normal, scores[1::2])
    np.testing.assert_array_equal(sample.defect[: len(index[::2])], scores[::2])


def test_auroc_is_the_rank_statistic_of_mann_and_whitney():
    random = np.random.default_rng(7)
    for levels in (2, 5, 1000):
        scores, labels = random.integers(0, levels, 300).astype(float), random.random(300) < 0.3
        statistic = stats.mannwhitneyu(scores[labels], scores[~labels]).statistic
        expected = statistic / labels.sum() / (~labels).sum()
        assert auroc(scores, labels) == pytest.approx(expected, abs=1e-12)
        assert auroc(scores.reshape(10, 30), labels.reshape(10, 30).astype(int)) == pytest.approx(expected, abs=1e-12)
        assert aupro(scores, labels.astype(int), limit=1) == pytest.approx(expected, abs=1e-12)


def test_auroc_agrees_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(8)
    scores, labels, weights = random.integers(0, 9, 200), random.random(200) < 0.4, random.random(200)
    expected = sklearn.roc_auc_score(labels, scores, sample_weight=weights)
    assert auroc(scores, labels, weights) == pytest.approx(expected, abs=1e-9)


def sampled(scores, mask, limit, thresholds):
    """The polygon of MVTec 3D-AD's evaluation code, a threshold and a component at a time."""
    labels = labelled(mask)
    normals = np.sort(scores[labels == 0])
    points = [(1.0, 1.0)]
    for rank in np.linspace(0, len(normals) - 1, thresholds, dtype=int):
        overlaps = [(scores[labels == k] > normals[rank]).mean() for k in range(1, labels.max() + 1)]
        points.append((1 - (rank + 1) / len(normals), np.mean(overlaps)))
    points.sort()
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if x0 < limit:
            end = min(x1, limit)
            height = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + height) / 2
    return area / limit


def test_thresholds_reproduce_the_polygon_of_the_mvtec_evaluation_code():
    random = np.random.default_rng(9)
    for levels in (0, 6):
        for limit in (0.01, 0.3):
            scores, mask = random_sample(random, (30, 30), levels)
            for thresholds in (10, 99, 300):
                expected = sampled(scores, mask, limit, thresholds)
                assert aupro(scores, mask, limit=limit, thresholds=thresholds) == pytest.approx(expected, abs=1e-9)


def test_99_thresholds_cannot_resolve_one_percent():
    """Random scores on 0.3 % of a volume: one trapezoid gives .49 where the exact area is 1 - f / 2L."""
    random = np.random.default_rng(10)
    index, defect, shape = random_volume(random)
    scores, mask = np.zeros(shape), np.zeros(shape, bool)
    scores[tuple(index.T)], mask[tuple(defect.T)] = random.random(len(index)) + 1e-6, True
    share = (len(index) - len(defect)) / mask.size
    assert aupro(scores, mask, thresholds=99, connectivity=26) == pytest.approx(0.49, abs=0.01)
    assert aupro(scores, mask, connectivity=26) == pytest.approx(1 - share / 0.02, abs=0.08)


@pytest.mark.parametrize("levels", [0, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [1, 7, metrics.BLOCK])
def test_resampling_equals_scoring_the_resampled_samples(levels, weighted, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    random = np.random.default_rng(11)
    scores, masks = zip(*[random_sample(random, (8, 9), levels) for _ in range(5)], strict=True)
    masks[0][:] = False
    weights = [random.integers(1, 3, mask.shape) if weighted else None for mask in masks]
    samples = [regions(s, m, weights=w) for s, m, w in zip(scores, masks, weights, strict=True)]
    samples[1] = regions(
        np.float32([0.5, 1, 0]), np.array([0, 1, 0]), empty_normal=7, empty_defect=np.array([2]), weights=None
    )
    counts = np.concatenate((np.ones((1, 5), int), random.integers(0, 3, (12, 5)) + [0, 1, 0, 0, 0]))
    for limit in (0.02, 0.4):
        expected = [pooled_aupro(np.repeat(np.array(samples, object), row), limit=limit) for row in counts]
        np.testing.assert_allclose(resampled_aupro(samples, counts, limit=limit), expected, atol=1e-12)


def test_resampled_auroc_equals_auroc_of_the_resampled_elements():
    random = np.random.default_rng(12)
    scores, masks = zip(*[random_sample(random, (6, 6), 5) for _ in range(4)], strict=True)
    counts = random.integers(0, 3, (10, 4)) + [1, 0, 0, 0]
    got = resampled_auroc([regions(*pair) for pair in zip(scores, masks, strict=True)], counts)
    scores, masks = np.stack(scores), np.stack(masks)
    expected = [auroc(np.repeat(scores, row, 0), np.repeat(masks, row, 0)) for row in counts]
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_bootstrap_draws_within_strata_and_is_reproducible():
    seen = []

    def metric(counts):
        seen.append(counts)
        return counts @ np.arange(6.0)

    strata = np.array([0, 1, 0, 1, 1, 1])
    first = bootstrap(metric, strata, resamples=200, seed=3)
    assert first == bootstrap(metric, strata, resamples=200, seed=3) != bootstrap(metric, strata, resamples=200, seed=4)
    assert (seen[1][:, strata == 0].sum(1) == 2).all() and (seen[1][:, strata == 1].sum(1) == 4).all()
    assert first.value == 15 and first.low < 15 < first.high


def test_bootstrap_of_a_mean_covers_it_as_often_as_it_says():
    random = np.random.default_rng(13)
    inside = 0
    for trial in range(200):
        values = random.normal(size=40)
        got = bootstrap(lambda counts, v=values: counts @ v / counts.sum(1), np.zeros(40), seed=trial, level=0.9)
        assert isinstance(got, Interval)
        inside += got.low <= 0 <= got.high
    assert 0.8 < inside / 200 < 0.96


def test_the_paired_difference_of_a_method_with_itself_is_zero_and_narrower_than_unpaired_otherwise():
    random = np.random.default_rng(14)
    scores, masks = zip(*[random_sample(random, (12, 12), 0) for _ in range(12)], strict=True)
    ours = [regions(*pair) for pair in zip(scores, masks, strict=True)]
    worse = [regions(s + random.normal(0, 0.3, s.shape), m) for s, m in zip(scores, masks, strict=True)]
    strata = np.zeros(12)

    def difference(first, second):
        return bootstrap(
            lambda counts: resampled_aupro(first, counts, limit=0.3) - resampled_aupro(second, counts, limit=0.3),
            strata, resamples=300,
        )  # fmt: skip

    nothing = difference(ours, ours)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    paired, alone = difference(ours, worse), bootstrap(lambda c: resampled_aupro(ours, c, limit=0.3), strata)
    assert paired.high - paired.low < alone.high - alone.low


SCORES, MASK = np.arange(12.0).reshape(3, 4), np.eye(3, 4, dtype=bool)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: aupro(SCORES, MASK & False), "no defect"),
        (lambda: aupro(SCORES, MASK | True), "normal"),
        (lambda: aupro(SCORES, MASK, normal=MASK), "normal"),
        (lambda: aupro(np.where(MASK, np.nan, SCORES), MASK), "3 NaN of 12"),
        (lambda: aupro(SCORES, MASK[:2]), r"ground_truth has shape \(2, 4\)"),
        (lambda: aupro(SCORES, MASK * 255), "mask is bool"),
        (lambda: aupro(SCORES, -MASK.astype(int)), "from -1"),
        (lambda: aupro(SCORES, MASK * 1.0), "float64"),
        (lambda: aupro(SCORES, MASK, weights=-SCORES), "weights"),
        (lambda: aupro(SCORES, MASK, weights=1.0 * ~MASK), "weight 0"),
        (lambda: aupro(SCORES, MASK, normal=SCORES), "normal must be boolean"),
        (lambda: aupro([SCORES], [MASK, MASK]), "1 arrays"),
        (lambda: aupro(SCORES[0], MASK[0]), "flat array"),
        (lambda: auroc(SCORES, MASK & False), "both classes"),
        (lambda: auroc(SCORES, MASK * 2), "0 and 1, got 2"),
        (lambda: auroc(SCORES * np.nan, MASK), "NaN"),
        (lambda: auroc(SCORES, MASK[:1]), "shape"),
        (lambda: auroc(SCORES.astype(str), MASK), "real numbers"),
        (lambda: coverage([regions(SCORES, MASK & False)]), "coverage"),
        (lambda: voxel_regions(np.array([[0, 4]]), np.ones(1), np.array([[0, 1]]), (3, 4)), "leave the grid"),
        (lambda: voxel_regions(np.array([[0, 1]]), np.ones(1), np.array([[-1, 1]]), (3, 4)), "leave the grid"),
        (lambda: voxel_regions(np.array([[0, 2**32]]), np.ones(1), np.array([[0, 1]]), (3, 4)), "leave the grid"),
        (lambda: voxel_regions(np.array([[0, 1]]), np.ones(1), np.array([[0, 1]]), (2**40, 2**40)), "too large"),
        (
            lambda: voxel_regions(np.array([[0, 1]]), np.ones(1), np.array([[0, 1]]), (3, 4), empty_normal=-1),
            "not be negative",
        ),
        (lambda: voxel_regions(np.array([[0, 1]] * 2), np.ones(2), np.array([[0, 1]]), (3, 4)), "twice"),
        (lambda: voxel_regions(np.array([[0, 1]]), np.ones(1), np.array([[0, 1]] * 2), (3, 4)), "twice"),
        (lambda: voxel_regions(np.array([[0, 1]]), np.ones(2), np.array([[0, 1]]), (3, 4)), "1 occupied"),
        (
            lambda: voxel_regions(np.array([[0, 1]]), np.ones(1), np.array([[0, 1]]), (3, 4), labels=np.array([2])),
            "1 to C",
        ),
        (lambda: resampled_aupro([regions(SCORES, MASK)], np.zeros((2, 1))), "resample"),
        (lambda: bootstrap(lambda counts: counts.sum(1), np.zeros(0)), "strata"),
    ],
)
def test_data_that_cannot_be_scored_are_one_line(call, words):
    with pytest.raises(DataError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: aupro(SCORES, MASK, limit=0),
        lambda: aupro(SCORES, MASK, limit=30),
        lambda: aupro(SCORES, MASK, connectivity=26),
        lambda: aupro(SCORES, MASK.astype(int), connectivity=8),
        lambda: aupro(SCORES, MASK, thresholds=1),
        lambda: aupro(SCORES, MASK, thresholds=99, weights=SCORES),
        lambda: bootstrap(lambda counts: counts.sum(1), np.zeros(3), level=95),
    ],
)
def test_settings_that_cannot_work_are_refused(call):
    with pytest.raises(ConfigError):
        call()


def test_infinite_scores_have_their_rank():
    scores = np.where(MASK, np.inf, SCORES)
    scores[0, 1] = -np.inf
    assert aupro(scores, MASK, limit=0.3) == pytest.approx(1) and auroc(scores, MASK) == 1


def test_metrics_load_nothing_of_the_rest_of_the_project():
    code = (
        "import sys, dino_depth.anomaly.metrics\n"
        "print(*[m for m in sys.modules if m in ('torch', 'timm', 'transformers') or m.startswith('dino_depth.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {"dino_depth.anomaly", "dino_depth.anomaly.metrics", "dino_depth.anomaly.regions", "dino_depth.errors"}
    assert set(done.stdout.split()) == loaded | {"dino_depth.transformers_hooks"}  # which waits for transformers
