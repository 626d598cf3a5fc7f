"""Eyecandies from twelve views: what turned views must be, the folder of them, and an evaluation in their pixels."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from data_prep.synthetic import SynthConfig, synth
from dino_depth.anomaly.benchmarks import BenchmarkConfig, open_benchmark
from dino_depth.anomaly.benchmarks.eyecandies12_views import (
    PrepViewsConfig,
    prep_views,
    rotation,
    source_camera,
    surface,
    turned,
    turns,
)
from dino_depth.anomaly.dataset import Sample, Truth
from dino_depth.anomaly.evaluate import EvaluateConfig, evaluate
from dino_depth.anomaly.geometry import lift, project, rays
from dino_depth.anomaly.metrics import aupro, auroc
from dino_depth.anomaly.report import ReportConfig, report
from dino_depth.anomaly.scoring import MetricsConfig, judge_views, measure
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError

SIDE = 96
CENTER, RADIUS = np.array([0.01, -0.015, 0.4]), 0.11


def sphere(side=SIDE):
    """Camera, depth and mask of a sphere, in closed form."""
    camera = source_camera(side, side)
    directions = rays(camera)
    a, b, c = (directions**2).sum(2), directions @ CENTER, CENTER @ CENTER - RADIUS**2
    inside = b * b - a * c
    mask = inside > 0
    return camera, np.where(mask, (b - np.sqrt(np.where(mask, inside, 0))) / a, 0), mask


def made(side=SIDE, slope=80.0, jump=0.05):
    camera, depth, mask = sphere(side)
    return surface(camera, depth, mask, jump, slope), depth


def world_points(view):
    rows, columns = np.nonzero(view.valid)
    return lift(view.camera, np.stack([columns, rows], 1), view.depth[view.valid])


def test_there_are_twelve_views_in_an_order():
    config = PrepViewsConfig()
    assert len(turns(config)) == 12 and turns(config)[3:6] == [(-15, 30), (0, -30), (0, -15)]
    assert turns(replace(config, order="snake"))[3:6] == [(-15, 30), (0, 30), (0, 15)]


def test_rotations_are_about_y_and_then_about_x():
    down, right = np.array([0.0, 1, 0]), np.array([1.0, 0, 0])
    np.testing.assert_allclose(rotation(90, 0) @ down, [0, 0, 1], atol=1e-12)
    np.testing.assert_allclose(rotation(0, 90) @ right, [0, 0, -1], atol=1e-12)
    np.testing.assert_allclose(rotation(90, 90) @ right, [0, 1, 0], atol=1e-12)  # not R_y R_x, which leaves it at -z
    turn = rotation(20, -35)
    np.testing.assert_allclose(turn @ turn.T, np.eye(3), atol=1e-12)


def test_the_view_that_is_not_turned_is_the_source():
    source, depth = made()
    (view,) = turned(source, [(0.0, 0.0)])
    assert view.valid.sum() > 0.9 * (depth > 0).sum()
    assert np.array_equal(view.depth[view.valid], depth[view.valid])
    image = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    assert np.array_equal(view.color(image)[view.valid], image[view.valid]) and not view.color(image)[~view.valid].any()
    # A ray through every pixel's centre gives the same, so what is copied is what would be cast.
    (cast,) = turned(source, [(1e-9, 0.0)])
    both = cast.valid & view.valid
    assert both.mean() > 0.9 * view.valid.mean()
    np.testing.assert_allclose(cast.depth[both], view.depth[both], rtol=1e-6)


def test_turned_views_show_the_surface_of_the_source():
    source, depth = made()
    pixel = 0.4 / source.camera.matrix[0, 0]
    for view in turned(source, turns(PrepViewsConfig())):
        off = np.linalg.norm(world_points(view) - CENTER, axis=1) - RADIUS
        assert len(off) > 0.5 * (depth > 0).sum()
        assert abs(off).max() < pixel * np.tan(np.radians(80)) and np.median(abs(off)) < 0.05 * pixel
        assert (off < 1e-6).all()  # chords lie within a sphere


def test_twelve_cameras_look_at_one_point_from_one_distance():
    source, _ = made()
    cameras = [view.camera for view in turned(source, turns(PrepViewsConfig()))]
    places = np.array([camera.camera_to_world[:3, 3] for camera in cameras])
    far = np.linalg.norm(places - source.center, axis=1)
    np.testing.assert_allclose(far, np.linalg.norm(source.center), rtol=1e-12)
    seen = np.array([project(camera, source.center[None])[0][0] for camera in cameras])
    np.testing.assert_allclose(seen, np.broadcast_to(seen[0], seen.shape), atol=1e-9)
    assert len({tuple(np.round(place, 9)) for place in places}) == 12


def test_a_sphere_turned_about_its_middle_keeps_its_silhouette():
    source, depth = made(slope=90.0, jump=1.0)
    for view in turned(replace(source, center=CENTER), [(15.0, 0.0), (0.0, -30.0), (-15.0, 30.0)]):
        assert not (view.valid & ~ndimage.binary_dilation(depth > 0, iterations=1)).any()
        # What the source did not see is a crescent on one side; elsewhere nothing is missing.
        missing = (depth > 0) & ~view.valid
        inside = ndimage.binary_erosion(depth > 0, iterations=3)
        at = np.argwhere(missing & inside) - np.argwhere(depth > 0).mean(0)
        assert np.mean(at @ at.mean(0) > 0) > 0.95 and view.valid.sum() > 0.6 * (depth > 0).sum()


def test_pixels_return_where_they_came_from():
    source, _ = made()
    for view in turned(source, [(15.0, 0.0), (-15.0, 30.0)]):
        rows, columns = np.nonzero(view.valid)
        chosen = view.weights.argmax(2)[view.valid]
        flat = view.pixels[view.valid][np.arange(len(chosen)), chosen]
        place = np.full(SIDE * SIDE, -1)
        place[source.pixels[:, 1] * SIDE + source.pixels[:, 0]] = np.arange(len(source.points))
        there, _ = project(view.camera, source.points[place[flat]])
        off = np.abs(there - np.stack([columns, rows], 1)).max(1)
        # The nearest corner is at most a pixel of the source away, which steep parts stretch.
        assert np.mean(off <= 1) > 0.9 and np.median(off) < 0.6
        np.testing.assert_allclose(view.weights[view.valid].sum(1), 1, atol=1e-12)


def test_masks_keep_their_share_of_the_object_but_for_foreshortening():
    source, depth = made()
    mask = np.zeros((SIDE, SIDE), bool)
    mask[44:56, 42:54] = True
    share = mask.sum() / (depth > 0).sum()
    for (x, y), view in zip(turns(PrepViewsConfig()), turned(source, turns(PrepViewsConfig())), strict=True):
        found = view.nearest(mask)
        assert not (found & ~view.valid).any()
        tilt = np.cos(np.radians(abs(x))) * np.cos(np.radians(abs(y)))
        assert 0.8 * tilt * share < found.sum() / view.valid.sum() < 1.7 * share


def test_triangles_do_not_bridge_jumps_nor_run_along_rays():
    camera = source_camera(40, 40)
    depth = np.full((40, 40), 0.5)
    depth[:, 20:] = 0.6
    source = surface(camera, depth, np.ones_like(depth, bool), 0.02, 80.0)
    columns = source.pixels[source.triangles][..., 0]
    assert not ((columns < 20).any(1) & (columns >= 20).any(1)).any() and len(source.triangles) == 2 * 39 * 38
    with pytest.raises(DataError, match="the object has no surface"):
        surface(camera, np.where(np.indices((40, 40)).sum(0) % 2, 0.5, 0.9), np.ones_like(depth, bool), 0.02, 80.0)


def test_pixels_of_all_views_are_pooled_and_holes_are_none():
    random = np.random.default_rng(0)
    scores = random.random((2, 3, 16, 16)).astype(np.float32)  # samples, views
    shown = np.zeros((16, 16), bool)
    shown[3:13, 3:13] = True
    shown[6, 6] = False  # a hole
    masks = np.zeros((2, 3, 16, 16), bool)
    masks[1, 0, 4:6, 4:7] = masks[1, 2, 9:12, 9:11] = masks[1, 2, 4, 4] = True
    scored = []
    for sample in range(2):
        held = Sample("part", str(sample), "test", "anomalous" if sample else "good", None, (), lambda: None)
        maps = {"image": torch.from_numpy(scores[sample])}
        truth = Truth("masks", masks=tuple(masks[sample]))
        judged = judge_views(held, {0: maps}, [shown] * 3, truth, "max", MetricsConfig((0.3,)))[0]
        scored.append(judged.rows["head"])
        assert judged.rows["head"].score == scores[sample][:, shown].max()
        assert judged.rows["perfect scorer"].score == sample
    labels = np.array([0, 1])
    values, _, _ = measure(scored, labels, "pixels", MetricsConfig((0.3,)), None)
    given = np.where(shown, scores, 0).reshape(-1, 16, 16)
    every = np.ones((16, 16), bool)
    every[6, 6] = False
    flat = masks.reshape(-1, 16, 16)
    for suffix, region in (("", every), (" object", shown)):
        chosen = np.broadcast_to(region, flat.shape)
        expected = aupro(given, flat, limit=0.3, connectivity=8, normal=chosen)
        assert values[f"AUPRO@30%{suffix}"] == pytest.approx(expected, abs=1e-12)
        counted = chosen | flat
        assert values[f"P-AUROC{suffix}"] == pytest.approx(auroc(given[counted], flat[counted]), abs=1e-12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("eyecandies")
    synth(
        SynthConfig(
            "eyecandies", str(root / "raw"), per_category=2, test_per_category=12, validation_per_category=1, size=96,
            categories=["hex_nut"], workers=1,
        )
    )  # fmt: skip
    prep_views(PrepViewsConfig(str(root / "raw"), str(root / "views"), x=(-15.0, 0.0), y=(0.0, 20.0)))
    return root


def test_the_folder_is_a_benchmark_of_many_views(folder):
    benchmark = open_benchmark(BenchmarkConfig("eyecandies12", str(folder / "views")))
    (category,) = benchmark.categories
    assert benchmark.pixels and len(benchmark.samples(category, "train")) == 1
    test = benchmark.samples(category, "test")
    assert [sample.label for sample in test].count("anomalous") == 3 and len(test) == 6
    raw = open_benchmark(BenchmarkConfig("eyecandies", str(folder / "raw")))
    source = {sample.name: sample for sample in raw.samples(category, "test")}
    for sample in test:
        views, truth = sample.views, sample.read_truth()
        assert len(views) == 4 and len(truth.masks) == 4
        before = source[sample.name.split("_")[0]]
        assert before.label == sample.label
        plain, depth = before.views[0].read_image(), before.views[0].read_depth()
        kept = views[2].read_depth()  # x 0, y 0
        assert 100 < kept.valid.sum() < 0.9 * depth.valid.sum()
        np.testing.assert_allclose(kept.depth[kept.valid], depth.depth[kept.valid], rtol=1e-6)
        assert np.array_equal(views[2].read_image()[kept.valid], plain[kept.valid])
        expected = before.read_truth().masks[0] & kept.valid
        assert np.array_equal(truth.masks[2], expected)


def test_a_second_call_goes_on_and_other_settings_are_refused(folder):
    settings = PrepViewsConfig(str(folder / "raw"), str(folder / "views"), x=(-15.0, 0.0), y=(0.0, 20.0))
    place = next((folder / "views").glob("*/test/*_bad"))
    kept = (place / "calibration.json").read_bytes()
    (place / "calibration.json").write_text("touched")
    prep_views(settings)
    assert (place / "calibration.json").read_text() == "touched"
    (place / "calibration.json").write_bytes(kept)
    with pytest.raises(ConfigError, match="begun with other settings"):
        prep_views(replace(settings, lighting=1))
    changes = {"x": (), "y": (1.0, 1.0), "lighting": 6, "slope": 0.0, "out": "", "categories": ["X"]}
    for key, value in changes.items():
        change = {key: value}
        with pytest.raises(ConfigError, match=key):
            prep_views(replace(settings, **change))
    with pytest.raises(DataError, match="needs train/9999"):
        prep_views(replace(settings, train="9999", out=str(folder / "other")))


def test_an_evaluation_in_the_pixels_of_the_views(folder, tmp_path):
    words = ["--data.name", "eyecandies12", "--data.root", str(folder / "views"), "--foreground.method", "valid"]
    words += [
        "--encoder.image",
        "raw-patches?patch=8",
        "--encoder.depth",
        "raw-patches?patch=8",
        "--encoder.size",
        "96",
    ]
    words += ["--metrics.limits", "[0.3]", "--metrics.resamples", "20", "--head.name", "sganet"]
    words += ["--head.sganet.steps", "2", "--head.sganet.adjacency", "angle", "--head.sganet.gates", "report"]
    evaluate(parse(EvaluateConfig, [*words, "--out", str(tmp_path / "run")], "test"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    wanted = {"I-AUROC", "P-AUROC", "P-AUROC object", "AUPRO@30%", "AUPRO@30% object"}
    assert set(results["mean"]) == wanted and results["complete"]
    (trial,) = results["trials"] if "trials" in results else results["cells"]
    assert trial["ground_truth"] == "masks" and {"gap", "distance", "spread"} <= set(trial["checks"])
    assert trial["baselines"]["perfect scorer"]["P-AUROC"] > 0.99
    assert {row["method"] for row in results["published"]} >= {"SGANet", "MVAD"}
    report(ReportConfig(str(tmp_path / "run")))
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_a_folder_that_is_none_says_what_makes_one(tmp_path):
    with pytest.raises(DataError, match="dino-depth prep-views makes such a folder"):
        open_benchmark(BenchmarkConfig("eyecandies12", str(tmp_path)))
