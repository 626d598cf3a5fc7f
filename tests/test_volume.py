"""Anomaly volumes against a slow twin, foregrounds against brute force, and the trivial baselines."""

import pickle
import threading
import tracemalloc
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from multiview_scene import CENTRE, RADII, ellipsoid_depth, off_ellipsoid, ring
from scipy import ndimage

from dino_depth.anomaly import volume as volume_module
from dino_depth.anomaly.dataset import Benchmark, Sample, Truth, View, Voxels
from dino_depth.anomaly.foreground import ForegroundConfig, _opened, cell_share, filled, foreground
from dino_depth.anomaly.geometry import SquareFit, back_project
from dino_depth.anomaly.instances import read_ahead
from dino_depth.anomaly.metrics import pooled_aupro
from dino_depth.anomaly.regions import voxel_regions
from dino_depth.anomaly.trivial import constant_map, leak_score, leak_score_volume, statistics
from dino_depth.anomaly.volume import (
    VoxelConfig,
    accumulate,
    accumulate_each,
    check_size,
    class_grid,
    combine,
    scored_points,
    truth_voxels,
)
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError


def scene(views=3, height=60, width=80, truth=None):
    cameras = ring(views, height, width)
    depths = [DepthMap.from_values(ellipsoid_depth(camera)) for camera in cameras]
    images = [np.full((height, width), 100 + number, np.uint8) for number in range(views)]
    seen = tuple(
        View(str(number), partial(np.copy, image), partial(DepthMap.from_values, depth.depth), camera)
        for number, (image, depth, camera) in enumerate(zip(images, depths, cameras, strict=True))
    )
    return Sample("egg", "egg_01_bad", "test", "anomalous", None, seen, partial(type(truth), truth)), depths


def random_maps(views, cells=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(views, cells, cells, generator=generator) for name in ("depth", "image")}


def masks(depths):
    return [depth.valid for depth in depths]


def slow_volume(maps, sample, depths, foregrounds, grid, aggregation):
    """Every pixel by itself: the dictionary of the highest score of each voxel."""
    together = {"max": max, "min": min, "mean": lambda pair: sum(pair) / 2, "prod": np.prod}[aggregation]
    found = {}
    for view, depth in enumerate(depths):
        fit = SquareFit(*depth.depth.shape, maps["image"].shape[-1])
        native = [fit.unfit(maps[name][view].double()).numpy() for name in ("image", "depth")]
        points = back_project(sample.views[view].camera, depth.depth)
        for row, column in zip(*np.nonzero(foregrounds[view] & depth.valid), strict=True):
            index = tuple(np.floor((points[row, column] - grid.origin) / grid.size).astype(int).tolist())
            score = together([part[row, column] for part in native])
            found[index] = max(found.get(index, -np.inf), score)
    return found


@pytest.mark.parametrize("aggregation", ["max", "min", "prod", "mean"])
def test_the_volume_equals_the_slow_twin(aggregation):
    sample, depths = scene()
    keep = [depth.valid & (np.indices(depth.valid.shape).sum(0) % 5 > 0) for depth in depths]
    maps = random_maps(3)
    config = VoxelConfig(size_mm=9, extent="union", aggregation=aggregation)
    volume = accumulate(maps, sample, depths, keep, config)
    slow = slow_volume(maps, sample, depths, keep, volume.voxels, aggregation)
    assert [tuple(row) for row in volume.voxels.index.tolist()] == sorted(slow)
    assert np.allclose(volume.score, [slow[key] for key in sorted(slow)], atol=1e-5)
    assert (volume.score < 0).any() and volume.outside == 0
    assert volume.instance_score == pytest.approx(max(slow.values()), abs=1e-5)


@pytest.mark.parametrize("aggregation", ["max", "prod"])
def test_points_and_their_scores_are_the_pixels_whose_maximum_is_the_volume(aggregation):
    sample, depths = scene()
    maps, keep = random_maps(3), masks(depths)
    volume = accumulate(maps, sample, depths, keep, VoxelConfig(size_mm=4, aggregation=aggregation))
    best = {}
    for points, scores in scored_points(maps, sample, depths, keep, aggregation):
        assert len(points) == len(scores) > 0
        for place, score in zip(np.floor((points - volume.voxels.origin) / volume.voxels.size), scores, strict=True):
            best[tuple(place)] = max(score, best.get(tuple(place), -np.inf))
    assert best == {tuple(place): score for place, score in zip(volume.voxels.index, volume.score, strict=True)}


def test_several_scorers_have_the_bits_of_each_alone_and_are_lifted_once(monkeypatch):
    sample, depths = scene(4)
    scorers = [random_maps(4), {"depth": random_maps(4)["image"]}, {"image": -random_maps(4)["depth"]}]
    lifted, lift = [], volume_module._lifted
    monkeypatch.setattr(volume_module, "_lifted", lambda *given: lifted.append(given) or lift(*given))
    grid = class_grid(VoxelConfig(size_mm=4, extent="cube"), (), ())
    alone = [accumulate(maps, sample, depths, masks(depths), VoxelConfig(size_mm=4), None, grid) for maps in scorers]
    assert len(lifted) == 3 * 4
    together = accumulate_each(scorers, sample, depths, masks(depths), VoxelConfig(size_mm=4), None, grid)
    assert len(lifted) == 4 * 4
    for one, other in zip(together, alone, strict=True):
        assert np.array_equal(one.voxels.index, other.voxels.index) and one.outside == other.outside
        assert np.array_equal(one.score, other.score) and np.array_equal(one.views, other.views)
        assert one.score.dtype == other.score.dtype and one.views.dtype == other.views.dtype


def test_occupied_voxels_lie_on_the_surface_and_count_their_views():
    sample, depths = scene(views=4)
    volume = accumulate(random_maps(4), sample, depths, masks(depths), VoxelConfig(size_mm=4))
    # A voxel's centre is within half its diagonal of some surface point.
    assert (off_ellipsoid(volume.voxels.centers) * RADII.min()).max() < 0.004 * np.sqrt(3) / 2
    assert volume.views.min() == 1 and 2 <= volume.views.max() <= 4


def test_the_score_at_one_pixel_reaches_its_voxel():
    """A hot cell of a map ends up where that cell's pixels are in the world: the convention of pixel centres."""
    sample, depths = scene(views=2)
    maps = {"image": torch.zeros(2, 80, 80)}
    row, column = 33, 42
    assert depths[1].valid[row, column]
    fit = SquareFit(60, 80, 80)
    square = fit.to_square(np.array([[column, row]], float))[0]
    maps["image"][1, round(square[1]), round(square[0])] = 7
    volume = accumulate(maps, sample, depths, masks(depths), VoxelConfig(size_mm=1))
    hot = volume.voxels.centers[volume.score.argmax()]
    expected = back_project(sample.views[1].camera, depths[1].depth)[row, column]
    assert volume.instance_score == 7 and abs(hot - expected).max() <= 0.0005 + 1e-6


def test_the_order_of_views_does_not_matter():
    sample, depths = scene(views=3)
    maps = random_maps(3)
    turned = Sample("egg", "egg", "test", "good", None, sample.views[::-1], sample.read_truth)
    one = accumulate(maps, sample, depths, masks(depths), VoxelConfig(size_mm=5))
    flipped = {name: part.flip(0) for name, part in maps.items()}
    other = accumulate(flipped, turned, depths[::-1], masks(depths)[::-1], VoxelConfig(size_mm=5))
    assert np.array_equal(one.voxels.index, other.voxels.index)
    assert np.array_equal(one.score, other.score) and np.array_equal(one.views, other.views)


def test_memory_grows_with_one_view_and_not_with_all():
    peaks = {}
    for views in (4, 16):
        sample, depths = scene(views, 240, 320)
        maps, kept = random_maps(views), masks(depths)
        tracemalloc.start()
        accumulate(maps, sample, depths, kept, VoxelConfig(size_mm=5))
        peaks[views] = tracemalloc.get_traced_memory()[1] - 240 * 320 * views  # the masks of valid foreground
        tracemalloc.stop()
    assert peaks[16] < 1.6 * peaks[4]  # the volume itself grows a little


def test_an_almost_empty_grid_costs_no_memory():
    sample, depths = scene()
    tracemalloc.start()
    volume = accumulate(random_maps(3), sample, depths, masks(depths), VoxelConfig(size_mm=1, extent="cube"))
    assert volume.voxels.shape == (1000, 1000, 1000)
    assert tracemalloc.get_traced_memory()[1] < 30e6
    tracemalloc.stop()


def test_the_grid_is_that_of_the_ground_truth():
    sample, depths = scene()
    voxels = Voxels(np.array([-0.3, -0.3, -0.3]), 0.01, (60, 60, 60), np.array([[30, 30, 30]]))
    volume = accumulate(random_maps(3), sample, depths, masks(depths), VoxelConfig(), Truth("voxels", voxels))
    assert volume.voxels.shape == (60, 60, 60) and volume.voxels.size == 0.01
    found, component = truth_voxels(Truth("voxels", voxels), sample, depths, volume.voxels)
    assert np.array_equal(found.index, voxels.index) and component is None


def test_a_class_has_one_grid_whatever_its_instances_are():
    sample, depths = scene()
    train = [(sample, view, depth, depth.valid) for view, depth in enumerate(depths)]
    voxels = Voxels(np.array([-0.3, -0.3, -0.3]), 0.01, (60, 60, 60), np.array([[30, 30, 30]]))
    defect, good = Truth("voxels", voxels), Truth("points", points=np.zeros((0, 3)))
    grid = class_grid(VoxelConfig(), iter(()), iter([None, defect]))
    for truth in (defect, good, None):
        volume = accumulate(random_maps(3), sample, depths, masks(depths), VoxelConfig(), truth, grid)
        assert volume.voxels.shape == (60, 60, 60) and np.array_equal(volume.voxels.origin, voxels.origin)
    elsewhere = Truth("voxels", Voxels(voxels.origin + 0.05, 0.01, (60, 60, 60), voxels.index))
    volume = accumulate(random_maps(3), sample, depths, masks(depths), VoxelConfig(), elsewhere, grid)
    assert np.array_equal(volume.voxels.origin, voxels.origin + 0.05)
    other = Truth("voxels", Voxels(voxels.origin, 0.01, (60, 60, 61), voxels.index))
    with pytest.raises(DataError, match="60x60x61 of 10 mm, that of its class 60x60x60 of 10 mm.*volume.extent union"):
        accumulate(random_maps(3), sample, depths, masks(depths), VoxelConfig(), other, grid)
    # The union holds the training instance and what is anomalous, wherever that is.
    union = VoxelConfig(size_mm=5, extent="union", margin_mm=20)
    plain = class_grid(union, train, [])
    expected = accumulate(random_maps(3), sample, depths, masks(depths), union).voxels
    assert plain.shape == expected.shape and np.array_equal(plain.origin, expected.origin)
    far = Truth("points", points=np.array([[0.5, 0.0, 0.0]]))
    wide = class_grid(union, train, [far])
    assert wide.origin[0] + wide.size * wide.shape[0] == pytest.approx(0.525) and wide.shape[1] == plain.shape[1]
    assert class_grid(VoxelConfig(extent="cube"), iter(()), iter(())).shape == (500, 500, 500)


def test_a_size_that_would_not_be_applied_is_refused():
    voxels = Voxels(np.zeros(3), 0.002, (60, 60, 60), np.array([[30, 30, 30]]))
    truth = Truth("voxels", voxels)
    check_size(VoxelConfig(size_mm=2), truth, "egg")
    check_size(VoxelConfig(size_mm=1, extent="union"), truth, "egg")
    check_size(VoxelConfig(size_mm=1), Truth("points", points=np.zeros((1, 3))), "egg")
    with pytest.raises(ConfigError, match="volume.size_mm 1: the ground truth of egg has voxels of 2 mm.*extent union"):
        check_size(VoxelConfig(size_mm=1), truth, "egg")


def test_points_outside_the_grid_are_counted():
    sample, depths = scene()
    volume = accumulate(random_maps(3), sample, depths, masks(depths), VoxelConfig(extent="cube", cube_mm=160))
    points = np.concatenate(
        [back_project(v.camera, d.depth)[d.valid] for v, d in zip(sample.views, depths, strict=True)]
    )
    assert volume.outside == pytest.approx((abs(points) >= 0.08).any(1).mean(), abs=1e-9) and volume.outside > 0.05


def test_truth_of_every_kind_marks_the_same_voxels():
    """A cap of the ellipsoid as points, masks and voxels of a finer grid."""
    sample, depths = scene(views=6)
    clouds = [back_project(v.camera, d.depth) for v, d in zip(sample.views, depths, strict=True)]
    caps = tuple((cloud[..., 2] > 0.1) & depth.valid for cloud, depth in zip(clouds, depths, strict=True))
    points = np.concatenate([cloud[cap] for cloud, cap in zip(clouds, caps, strict=True)])
    grid = accumulate(random_maps(6), sample, depths, masks(depths), VoxelConfig(size_mm=8)).voxels
    by_points, component = truth_voxels(Truth("points", points=points), sample, depths, grid)
    by_masks, _ = truth_voxels(Truth("masks", masks=caps), sample, depths, grid)
    assert component is None and np.array_equal(by_points.index, by_masks.index) and len(by_points.index) > 20
    named = Truth("voxels", by_points, component=np.arange(len(by_points.index)) + 1)
    again, component = truth_voxels(named, sample, depths, grid)
    assert np.array_equal(again.index, by_points.index) and np.array_equal(component, named.component)


def test_a_perfect_scorer_reaches_one_through_projection_and_metric():
    sample, depths = scene(views=4, height=120, width=160)
    cap = [back_project(v.camera, d.depth)[..., 2] > 0.1 for v, d in zip(sample.views, depths, strict=True)]
    truth = Truth("masks", masks=tuple(mask & depth.valid for mask, depth in zip(cap, depths, strict=True)))
    fit = SquareFit(120, 160, 160)
    maps = torch.zeros(4, 160, 160)
    for view, mask in enumerate(truth.masks):
        maps[view, 20:140] = torch.from_numpy(mask).float()
    assert np.array_equal(fit.unfit(maps[0]).numpy() > 0.5, truth.masks[0])
    volume = accumulate({"image": maps}, sample, depths, masks(depths), VoxelConfig(size_mm=4), truth)
    voxels, _ = truth_voxels(truth, sample, depths, volume.voxels)
    regions = voxel_regions(volume.voxels.index, volume.score, voxels.index, volume.voxels.shape)
    assert pooled_aupro([regions], limit=0.01) == pytest.approx(1, abs=1e-12)


def test_what_cannot_be_projected_is_one_clear_line():
    sample, depths = scene()
    maps, kept = random_maps(3), masks(depths)
    with pytest.raises(DataError, match="3 views, but parts for \\[2, 3\\]"):
        accumulate({"image": maps["image"][:2]}, sample, depths, kept, VoxelConfig())
    broken = {"image": maps["image"].clone()}
    broken["image"][1] = torch.nan
    with pytest.raises(DataError, match="not finite in view 1"):
        accumulate(broken, sample, depths, kept, VoxelConfig())
    with pytest.raises(DataError, match="too large.*size_mm"):
        accumulate(maps, sample, depths, kept, VoxelConfig(size_mm=0.1, extent="cube"))
    far = Truth("voxels", Voxels(np.array([5.0, 5, 5]), 0.01, (9, 9, 9), np.array([[1, 1, 1]])))
    with pytest.raises(DataError, match="none of .* foreground pixels falls into the grid"):
        accumulate(maps, sample, depths, kept, VoxelConfig(), far)
    grid = accumulate(maps, sample, depths, kept, VoxelConfig(extent="cube")).voxels
    with pytest.raises(DataError, match="1 of 1 places of the ground truth lie outside"):
        truth_voxels(far, sample, depths, grid)
    blind = Sample("egg", "egg", "test", "good", None, (View("0", np.copy, np.copy, None),) * 3, sample.read_truth)
    with pytest.raises(DataError, match="without a camera"):
        accumulate(maps, blind, depths, kept, VoxelConfig())
    with pytest.raises(ConfigError, match="size_mm"):
        VoxelConfig(size_mm=0)


def test_combined_maps_are_zero_off_the_foreground():
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:6] = True
    maps = {"image": torch.full((1, 2, 2), 3.0), "depth": torch.full((1, 4, 4), 2.0)}
    for aggregation, value in (("max", 3), ("min", 2), ("prod", 6), ("mean", 2.5)):
        assert np.array_equal(combine(maps, 0, mask, aggregation), np.where(mask, np.float32(value), 0))


# Samples


def test_voxels_out_of_order_or_out_of_the_grid_are_refused():
    def build(index, **parts):
        return Voxels(**({"origin": np.zeros(3), "size": 1.0, "shape": (4, 4, 4), "index": np.array(index)} | parts))

    assert build([[0, 0, 1], [0, 1, 0]]).centers.tolist() == [[0.5, 0.5, 1.5], [0.5, 1.5, 0.5]]
    for index, message in (([[0, 1, 0], [0, 0, 1]], "order"), ([[0, 0, 1]] * 2, "order"), ([[0, 0, 4]], "outside")):
        with pytest.raises(DataError, match=message):
            build(index)
    with pytest.raises(DataError, match="positive"):
        build([[0, 0, 0]], size=0.0)


def test_a_benchmark_refuses_classes_whose_instances_differ_in_views():
    one, _ = scene(views=2)
    other = Sample("egg", "egg_02", "test", "good", None, one.views[:1], one.read_truth)
    with pytest.raises(DataError, match="numbers of views differ: test/egg_02 has 1, test/egg_01_bad has 2"):
        Benchmark("b", "", ("egg",), {"egg": [one, other]}.__getitem__).samples("egg", "test")
    with pytest.raises(DataError, match="no train sample"):
        Benchmark("b", "", ("egg",), {"egg": [one]}.__getitem__).samples("egg", "train")
    with pytest.raises(ConfigError, match="unknown category 'eg' of b; did you mean 'egg'"):
        Benchmark("b", "", ("egg",), {}.__getitem__).samples("eg", "train")


def test_samples_travel_to_other_processes():
    sample, _ = scene()
    again = pickle.loads(pickle.dumps(sample))
    assert np.array_equal(again.views[1].read_depth().depth, sample.views[1].read_depth().depth)


def test_views_are_read_once_and_in_order_while_others_are_used():
    sample, depths = scene(views=3)
    seen, released = [], threading.Event()

    def reading(name, read, wait=False):
        def once():
            if wait:
                assert released.wait(60)
            seen.append(name)
            return read()

        return once

    def broken():
        raise DataError("cut short")

    views = [
        replace(view, read_depth=reading(f"depth {n}", view.read_depth, n == 1),
                read_image=reading(f"image {n}", broken if n == 2 else view.read_image))
        for n, view in enumerate(sample.views)
    ]  # fmt: skip
    with read_ahead(replace(sample, views=tuple(views))) as resident:
        # The first view is there although the second cannot be read yet.
        assert np.array_equal(resident.views[0].read_depth().depth, depths[0].depth) and "depth 1" not in seen
        released.set()
        assert np.array_equal(resident.views[1].read_depth().depth, depths[1].depth)
        assert resident.views[1].read_depth() is resident.views[1].read_depth()
        with pytest.raises(DataError, match="egg/egg_01_bad, view 2: cut short"):
            resident.views[2].read_image()
    assert seen == [f"{part} {n}" for n in range(3) for part in ("depth", "image")]


# Foreground


def test_the_largest_component_survives_an_opening():
    values = np.zeros((30, 40))
    values[5:20, 5:25] = 1
    values[10, 25:35] = 1  # a thread that an opening cuts
    values[8:12, 35:39] = 1
    mask = foreground(DepthMap.from_values(values), ForegroundConfig("largest"))
    expected = np.zeros_like(mask)
    expected[5:20, 5:25] = True
    assert np.array_equal(mask, expected)
    with pytest.raises(DataError, match="foreground.method largest leaves nothing"):
        foreground(DepthMap.from_values(np.eye(20)), ForegroundConfig("largest"))


@pytest.mark.parametrize("shape", [(1, 9), (2, 2), (3, 3), (40, 31), (31, 40)])
def test_an_opening_by_shifts_is_that_of_scipy(shape):
    for seed, share in enumerate((0.3, 0.8, 0.95, 1.0)):
        mask = np.random.default_rng(seed).random(shape) < share
        assert np.array_equal(_opened(mask), ndimage.binary_opening(mask, np.ones((3, 3), bool)))


def test_a_foreground_is_opened_in_a_square_of_a_size():
    """Each pixel of a smaller square is its nearest of the map, and each of the map its nearest of the square."""
    mask = np.zeros((60, 80), bool)
    mask[10:50, 20:70] = True
    mask[25:30, 70:80] = True  # five pixels high: two of the square's, which an opening takes away
    depth_map = DepthMap.from_values(mask.astype(np.float64))
    found = foreground(depth_map, ForegroundConfig(size=32))
    expected = mask.copy()
    expected[25:30, 70:] = False
    assert (found & ~mask).sum() == 0 and (found ^ expected)[:, 73:].sum() == 0
    assert (found ^ expected).sum() < 0.06 * expected.sum()
    assert foreground(depth_map, ForegroundConfig())[27, 75]
    same = foreground(depth_map, ForegroundConfig(size=80))
    assert np.array_equal(same, foreground(depth_map, ForegroundConfig()))
    with pytest.raises(ConfigError, match=r"foreground\.size: must be at least 1 pixel, got 0"):
        ForegroundConfig(size=0)


def test_a_table_and_a_wall_are_no_foreground():
    rows, columns = np.mgrid[:90, :120]
    table = 0.7 / (1 + 0.004 * (rows - 45))  # a plane is affine in the inverse of depth
    wall = 0.72 / (1 + 0.0005 * (columns - 60))
    depth = np.minimum(table, wall)
    thing = np.hypot(rows - 50, columns - 60) < 18
    depth[thing] -= 0.03
    depth[20:24, 20:24] = 0
    noise = np.random.default_rng(0).normal(0, 5e-4, depth.shape) * (depth > 0)
    mask = foreground(DepthMap.from_values(depth + noise), ForegroundConfig("plane"))
    assert (mask ^ thing).sum() < 0.02 * thing.sum()


def test_an_object_without_a_background_is_kept_whole():
    rows, columns = np.mgrid[:60, :60]
    thing = np.hypot(rows - 30, columns - 30) < 15
    depth_map = DepthMap.from_values(np.where(thing, 0.5 + 0.001 * rows, 0))
    opened = foreground(depth_map, ForegroundConfig("largest"))
    assert np.array_equal(foreground(depth_map, ForegroundConfig("plane")), opened)
    assert np.array_equal(foreground(depth_map, ForegroundConfig("valid")), thing)


def test_the_object_region_holds_the_holes_and_grows():
    mask = np.zeros((20, 20), bool)
    mask[5:15, 5:15] = True
    mask[8:10, 8:10] = False
    assert filled(mask)[8:10, 8:10].all() and filled(mask).sum() == 100
    assert filled(mask, 2)[3, 10] and not filled(mask, 2)[2, 10]


@pytest.mark.parametrize(("shape", "cells"), [((30, 40), 7), ((28, 28), 4), ((13, 9), 16)])
def test_the_share_of_a_cell_is_exact(shape, cells):
    """Against counting on a grid so fine that every pixel and every cell is a whole number of its points."""
    mask = np.random.default_rng(cells).random(shape) < 0.6
    height, width = shape
    side = max(shape)
    fine = np.zeros((2 * side * cells,) * 2)
    rows = (side - height) * cells + np.arange(2 * cells * height)
    columns = (side - width) * cells + np.arange(2 * cells * width)
    fine[np.ix_(rows, columns)] = mask.repeat(2 * cells, 0).repeat(2 * cells, 1)
    expected = fine.reshape(cells, 2 * side, cells, 2 * side).mean((1, 3))
    assert np.allclose(cell_share(mask, cells), expected, atol=1e-5)


# Trivial baselines


def test_trivial_statistics_are_means_over_views():
    sample, depths = scene()
    found = statistics(sample, [view.read_depth().valid for view in sample.views])
    assert found["fraction_missing"] == pytest.approx(np.mean([1 - depth.valid.mean() for depth in depths]))
    assert found["object_share"] == pytest.approx(1 - found["fraction_missing"])
    assert found["mean_intensity"] == pytest.approx(101 / 255)
    assert found["mean_depth"] == pytest.approx(np.mean([depth.depth[depth.valid].mean() for depth in depths]))
    assert np.array_equal(constant_map(depths[0].valid), depths[0].valid)


def test_the_leak_statistic_forgets_the_defect_and_its_neighbourhood():
    scores, truth, region = np.zeros((80, 80)), np.zeros((80, 80), bool), np.ones((80, 80), bool)
    truth[10, 10] = True
    scores[10, 10], scores[10, 30], scores[10, 31] = 9, 8, 3
    assert leak_score(scores, truth, region) == 3
    assert leak_score(scores, np.zeros_like(truth), region) == 9
    assert np.isnan(leak_score(scores, truth, np.hypot(*(np.indices((80, 80)) - 10)) < 20))


def test_the_leak_statistic_of_a_volume_leaves_out_a_distance():
    sample, depths = scene()
    volume = accumulate(random_maps(3), sample, depths, masks(depths), VoxelConfig(size_mm=8))
    hot = volume.voxels.index[volume.score.argmax()]
    truth = Voxels(volume.voxels.origin, volume.voxels.size, volume.voxels.shape, hot[None])
    away = np.linalg.norm(volume.voxels.centers - truth.centers, axis=1)
    assert leak_score_volume(volume, truth, 0.05) == volume.score[away > 0.05].max() < volume.instance_score
    nothing = Voxels(truth.origin, truth.size, truth.shape, np.zeros((0, 3), np.int32))
    assert leak_score_volume(volume, nothing, 0.05) == volume.instance_score
    assert abs(volume.voxels.centers.mean(0) - CENTRE).max() < 0.05
