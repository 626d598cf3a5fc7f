"""The page about a run of ``evaluate``: every number from its files, volumes and pictures as they are."""

import base64
import html
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from anomaly_run import LONG, defect_at, edit, make_run, make_sample
from multiview_scene import ring
from PIL import Image
from scipy import ndimage
from test_report import Checker

from data_prep.synthetic import SynthConfig, synth
from dino_depth.anomaly.baselines import LEAK, PERFECT, TEMPLATE
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.dataset import Sample, Truth, View
from dino_depth.anomaly.evaluate import evaluate
from dino_depth.anomaly.figures import components, view_pictures
from dino_depth.anomaly.geometry import back_project
from dino_depth.anomaly.packing import pack, turn
from dino_depth.anomaly.report import ReportConfig, report
from dino_depth.anomaly.report_tables import CONTROLS
from dino_depth.anomaly.strips import crop, grid, read_arrays, strips
from dino_depth.anomaly.volume import VoxelConfig, accumulate
from dino_depth.config import parse
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder, its results and its page."""
    run = tmp_path_factory.mktemp("runs") / "ladder"
    run.mkdir()
    results = make_run(run)
    report(ReportConfig(str(run)))
    return run, results, (run / "report.html").read_text(encoding="utf-8")


def rows(page: str) -> list[list[str]]:
    cells = [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.S) for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.S)
    ]
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in cells]


def test_tables_say_what_the_results_say(finished):
    table = rows(finished[2])
    assert ["", "plate", html.escape(LONG.replace("_", " ")), "mean"] in table
    own = "modmap (this run)"
    assert [own, "0.810 0.700 to 0.910", "0.860 0.700 to 0.910", "0.835 0.800 to 0.870"] in table
    assert [own, "0.970", "0.970", "0.970"] in table
    assert ["fraction missing trivial", "0.500", "0.500", "0.500"] in table
    assert ["perfect scorer ceiling", "0.980", "0.980", "0.980"] in table
    assert ["ModMap A et al., table 1", "", "0.945", "0.844"] in table and ["CFM A et al.", "", "", "0.623"] in table
    assert ["plate", "1", "0.820 0.700 to 0.920", "0.610", "0.970"] in table
    assert ["plate", "0.012", "0.034"] in table  # its checks
    assert ["plate", "0", "12", "1", "3.3 min", "3.25 s", "1.50 GiB"] in table
    text = Checker(finished[2]).text
    assert "2 published numbers are of classes or metrics that this run does not have" in text
    assert "depth encoder exports/<depth>" in text and "level: 0.9" in text and "90 % bootstrap" in text
    assert "Unfinished" not in text and "Synthetic data" not in text


def test_results_of_before_trials_had_their_name_are_read(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "ladder")
    edit(run, lambda results: results.update(cells=results.pop("trials")))
    report(ReportConfig(str(run)))
    assert (run / "report.html").read_text() == finished[2]


def test_what_is_no_baseline_is_not_called_trivial():
    assert set(CONTROLS) == {PERFECT, LEAK, TEMPLATE}


def test_an_unfinished_run_says_so(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    results = json.loads((run / "results.json").read_text())
    results |= {"complete": False, "trials": results["trials"][:1], "synthetic": True}
    (run / "results.json").write_text(json.dumps(results))
    report(ReportConfig(str(run), str(tmp_path / "page.html")))
    text = Checker((tmp_path / "page.html").read_text()).text
    assert "Unfinished run: 1 of 4 results are there" in text and "Published rows are of the real sim3d" in text


def test_runs_are_compared(finished, tmp_path):
    other = shutil.copytree(finished[0], tmp_path / "other")
    results = json.loads((other / "results.json").read_text())
    results |= {"head": "patchcore", "mean": {"I-AUROC": {"value": 0.7, "low": 0.6, "high": 0.8}}}
    results["config"]["encoder"]["depth"] = "defm:vit_s14"
    (other / "results.json").write_text(json.dumps(results))
    report(ReportConfig(str(finished[0]), str(tmp_path / "page.html"), [str(other)]))
    page = (tmp_path / "page.html").read_text()
    assert ["patchcore other", "0.810 0.700 to 0.910", "0.860 0.700 to 0.910", "0.700 0.600 to 0.800"] in rows(page)
    captions = re.findall(r"<figcaption>(\w+: [^<]+)</figcaption>", page)
    assert captions[:3] == ["image: timm:vit", "depth: exports/&lt;depth&gt;", "depth: defm:vit_s14"]


def test_page_needs_nothing_else_and_is_reproducible(finished, tmp_path):
    run, _, page = finished
    parsed = Checker(page)
    assert "link" not in parsed.tags and "@import" not in page and "url(" not in page
    assert not re.search(r"https?://", page) and len(page) < 1_500_000
    assert all(re.match(r"data:image/(png|jpeg);base64,", value) for value in parsed.sources)
    report(ReportConfig(str(run), str(tmp_path / "page.html")))
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_instances_are_the_extremes_and_the_median(finished):
    _, results, page = finished
    for category in results["categories"]:
        (trial,) = (trial for trial in results["trials"] if trial["category"] == category and trial["seed"] == 0)
        scores = sorted((row["score"], row["name"]) for row in trial["instances"] if row["label"] == "anomalous")
        expected = [scores[3][1], scores[1][1], scores[0][1]]  # of 4: highest, upper median, lowest
        best = max((row["score"], row["name"]) for row in trial["instances"] if row["label"] == "good")
        assert set(expected + [best[1]]) <= set(re.findall(r"<header><b>(\w+)</b>", page))
    assert page.count("<article") == 8


@pytest.mark.parametrize("layout", ["sim3d", "mvtec3d"])
def test_what_evaluate_writes_is_shown(tmp_path, layout):
    size = ["--size", "64", "--test_per_category", "4", "--workers", "1", "--categories", "1"]
    size += ["--sim3d.views", "3", "--sim3d.voxel", "0.015"] if layout == "sim3d" else ["--per_category", "2"]
    synth(parse(SynthConfig, [layout, "--out", str(tmp_path / "tree"), *size], "test", ("layout",)))
    settings = ["--data.root", str(tmp_path / "tree"), "--data.name", layout, "--out", str(tmp_path / "run")]
    for modality in ("image", "depth"):
        settings += [f"--encoder.{modality}", "raw-patches?patch=16"]
    settings += ["--encoder.size", "96", "--head.modmap.steps", "3", "--metrics.resamples", "20"]
    evaluate(parse(EvaluateConfig, settings, "test"))
    report(ReportConfig(str(tmp_path / "run")))
    page = (tmp_path / "run" / "report.html").read_text()
    text = Checker(page).text
    assert "Synthetic data." in text and "perfect scorer" in text and "image: raw-patches?patch=16" in text
    assert page.count("<article") >= 3 and page.count('class="over"') == 2 * page.count("<article")
    assert page.count('class="outline"') > 0
    volumes = page.count('<div class="slot" data-volume=')
    assert volumes == (page.count("<article") if layout == "sim3d" else 0)
    assert ("All pairs of views" in text and "3 × 3 views" in text) == (layout == "sim3d")


# Volumes


def unpack(packed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    content, n = base64.b64decode(packed.data), packed.voxels
    assert len(content) == 8 * n
    position = np.frombuffer(content, "<i2", 3 * n).reshape(n, 3)
    return position, np.frombuffer(content, np.uint8, n, 6 * n), np.frombuffer(content, np.uint8, n, 7 * n)


@pytest.mark.parametrize("limit", [10_000, 400, 30])
def test_packed_volume_keeps_every_maximum_and_every_defect(limit):
    random = np.random.default_rng(limit)
    index = np.unique(random.integers(5, 25, (3000, 3)), axis=0).astype(np.int32)
    score = random.normal(0, 1, len(index)).astype(np.float32)
    truth = np.unique(np.concatenate([index[:40], [[2, 3, 4], [2, 3, 5]]]), axis=0)
    scale = float(score.min()), float(score.max())
    packed = pack(index, score, truth, 0.002, scale, 128, limit)
    assert packed.voxels <= limit and packed.edge == pytest.approx(0.002 * packed.merged)
    corner = np.concatenate([index, truth]).min(0)
    slow: dict[tuple, float] = {}
    for place, value in zip((index - corner) // packed.merged, score, strict=True):
        slow[tuple(place)] = max(slow.get(tuple(place), -np.inf), value)
    defects = {tuple(place) for place in (truth - corner) // packed.merged}
    position, level, anomalous = unpack(packed)
    assert len({*slow} | defects) == packed.voxels and packed.observed == len(slow)
    for row, (place, value, hit) in enumerate(zip(position.tolist(), level, anomalous, strict=True)):
        assert hit == (tuple(place) in defects)
        if row < packed.observed:
            assert value == round(255 * (slow[tuple(place)] - scale[0]) / (scale[1] - scale[0]))
        else:
            assert value == 0 and tuple(place) not in slow
    assert (np.diff(level.astype(int)) <= 0).all() and tuple(position.max(0) + 1) == packed.shape
    # The next smaller factor would not have fitted.
    if packed.merged > 1:
        finer = (np.concatenate([index, truth]) - corner) // (packed.merged - 1)
        assert len(np.unique(finer, axis=0)) > limit


def test_view_directions_are_a_rotation():
    assert np.allclose(turn(0, 0), [[1, 0, 0], [0, 0, 1], [0, -1, 0]])  # from -y, z up
    axes = turn(0.7, -0.4)
    assert np.allclose(axes @ axes.T, np.eye(3)) and np.linalg.det(axes) == pytest.approx(1)


def test_constant_scores_are_packed():
    packed = pack(np.zeros((1, 3), int), np.ones(1), np.empty((0, 3), int), 1.0, (1.0, 1.0), 3, 10)
    assert (packed.voxels, packed.observed, packed.shape) == (1, 1, (1, 1, 1))


def test_size_is_bounded_by_the_number_of_voxels_shown(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("dino_depth.anomaly.report.VOXELS_SHOWN", 8 * 100)
    report(ReportConfig(str(finished[0]), str(tmp_path / "page.html")))
    about = re.findall(r'data-about="([^"]+)"', (tmp_path / "page.html").read_text())
    counts = [json.loads(text.replace("&#34;", '"'))["voxels"] for text in about]
    assert len(counts) == 8 and 10 < min(counts) and max(counts) <= 100


# Pictures


def test_ground_truth_lies_where_the_views_show_it():
    sample = make_sample("a_bad", 6, True)
    depths = [view.read_depth() for view in sample.views]
    maps = {"image": torch.zeros(6, 8, 8)}
    voxels = accumulate(maps, sample, depths, [d.valid for d in depths], VoxelConfig(2.0, "union")).voxels
    hit = defect_at(voxels.centers) > 0.4
    arrays = view_pictures(sample, replace(voxels, index=voxels.index[hit]), 8)
    seen = []
    for shown, view, depth in zip(arrays["truth"], sample.views, depths, strict=True):
        strength = np.where(depth.valid, defect_at(back_project(view.camera, depth.depth)), 0)
        # 80 x 60 pixels lie on 160 x 160, each twice, 20 pixels from the top and the bottom. A tenth is 3 mm.
        strength = np.pad(np.kron(strength, np.ones((2, 2))), ((20, 20), (0, 0)))
        assert strength[shown].min(initial=1) > 0.3 and shown[strength > 0.5].all()
        seen.append(np.count_nonzero(shown))
    assert max(seen) > 100 and min(seen) == 0  # the far side hides it
    assert arrays["image"].shape == (6, 160, 160) and not arrays["image"][:, :19].any()
    assert list(arrays["views"]) == list("123456") and (arrays["depth"][:, 80, 80] > 0).all()


def test_masks_and_colour_images_of_single_views():
    camera = ring(1)[0]
    mask, image = np.zeros((60, 80), bool), np.zeros((60, 80, 3), np.uint8)
    mask[10:20, 30:50], image[10:20, 30:50] = True, (200, 0, 0)
    depth = DepthMap(np.ones((60, 80)), np.ones((60, 80), bool))
    sample = Sample(
        "a", "b", "test", "anomalous", None, (View("0", lambda: image, lambda: depth, camera),), lambda: Truth("masks")
    )
    arrays = view_pictures(sample, (mask,), 8)
    doubled = np.pad(np.kron(mask, np.ones((4, 4))), ((40, 40), (0, 0))).astype(bool)
    assert np.array_equal(arrays["truth"][0], doubled) and np.array_equal(arrays["image"][0, ..., 0] > 100, doubled)


def test_components_are_those_of_a_singular_value_decomposition():
    random = np.random.default_rng(0)
    features = random.normal(size=(2, 5, 6, 7)) * np.array([9, 5, 3, 1, 0.5, 0.1, 0.1])
    usable = random.random((2, 5, 6)) < 0.7
    found = components(features, usable)
    rows_ = features[usable] - features[usable].mean(0)
    _, _, axes = np.linalg.svd(rows_, full_matrices=False)
    for channel, axis in enumerate(axes[:3]):
        scores = rows_ @ (axis * np.sign(axis[np.abs(axis).argmax()]))
        low, high = np.percentile(scores, [2, 98])
        expected = 255 * np.clip((scores - low) / (high - low), 0, 1)
        assert np.abs(found[usable][:, channel] - expected).max() <= 0.51
    assert not found[~usable].any()


def test_grid_of_pairs_has_sources_down_and_targets_across(finished):
    figures = read_arrays(finished[0] / "figures" / "plate" / "02_bad.npz")
    made = grid(figures, "depth")
    pairs = figures["depth_pairs"]
    assert pairs.shape == (3, 3, 10, 10)
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(made["picture"].split(",")[1]))).convert("RGB")).astype(
        int
    )
    assert picture.shape == (32, 32, 3)
    green = picture[..., 1]
    for target in range(3):
        cell = np.unravel_index((figures["share"][target] > 0).argmax(), (10, 10))
        seen = [green[11 * source + cell[0], 11 * target + cell[1]] for source in range(3)]
        assert seen[0] < seen[1] < seen[2]  # each source adds as much
    minimum = Image.open(io.BytesIO(base64.b64decode(made["minimum"].split(",")[1])))
    assert minimum.size == (32, 10)


def test_what_shows_the_object_in_no_view_is_cropped():
    share = np.zeros((2, 8, 8), np.uint8)
    share[0, 3, 4], share[1, 5, 5] = 9, 1
    pixels = np.arange(2 * 32 * 32).reshape(2, 32, 32)
    pairs = np.arange(4 * 4 * 4).reshape(2, 2, 4, 4)
    found = crop({"image": pixels, "share": share, "depth_pairs": pairs, "score": pixels}, share)
    assert np.array_equal(found["image"], pixels[:, 8:28, 12:28]) and np.array_equal(found["share"], share[:, 2:7, 3:7])
    assert np.array_equal(found["depth_pairs"], pairs[:, :, 1:4, 1:4]) and found["score"] is pixels
    assert np.array_equal(crop({"image": pixels}, 0 * share)["image"], pixels)


def test_overlays_start_where_the_scale_does_and_only_on_the_object(finished):
    figures = read_arrays(finished[0] / "figures" / "plate" / "02_bad.npz")
    scored = np.zeros((3, 10, 10))
    scored[:, 4, 4], scored[:, 5, 5] = 0.2, 1.0
    figures["share"][:] = 0
    figures["share"][:2, 4:6, 4:6] = 255
    image, depth = strips(figures, {"image_map": scored}, {"image": (0.5, 1.0)})
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(image["over"].split(",")[1]))).convert("RGBA"))
    opaque = np.argwhere(picture[..., 3] > 0)
    assert opaque.tolist() == [[5, 5], [5, 15]] and tuple(picture[5, 5]) == (253, 231, 37, 255)
    assert depth["over"] is None and image["places"] == [0, 1, 2]
    outline = np.array(Image.open(io.BytesIO(base64.b64decode(image["outline"].split(",")[1]))).convert("RGBA"))
    truth = np.concatenate(list(figures["truth"]), 1)
    edge = outline[..., 3] > 0
    assert edge.any() and not (edge & truth).any()
    assert not (edge & ~ndimage.binary_dilation(truth)).any()


# Bad input


def without_results(run):
    (run / "results.json").unlink()


def broken_results(run):
    (run / "results.json").write_text("{")


def other_results(run):
    (run / "results.json").write_text('{"benchmark": "sim3d"}')


def without_trials(run):
    edit(run, lambda results: results["trials"].clear())


def without_instances(run):
    edit(run, lambda results: results["trials"][0].pop("instances"))


def without_prediction(run):
    (run / "predictions" / "plate" / "seed0" / "00_good.npz").unlink()


def broken_prediction(run):
    path = run / "predictions" / "plate" / "seed0" / "00_good.npz"
    path.write_bytes(path.read_bytes()[:300])


def broken_figures(run):
    (run / "figures" / "plate" / "02_bad.npz").write_bytes(b"PK\x03\x04 nothing")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_results, r"results.json: no such file; `dino-depth evaluate` writes it"),
        (broken_results, r"results.json: unreadable"),
        (other_results, r"results.json: key setup is missing"),
        (without_trials, r"results.json: no class has been evaluated yet"),
        (without_instances, r"results.json: not as evaluate writes it: KeyError 'instances'"),
        (without_prediction, r"seed0/00_good.npz: the file is missing"),
        (broken_prediction, r"seed0/00_good.npz: unreadable"),
        (broken_figures, r"02_bad.npz: unreadable"),
    ],
)  # fmt: skip
def test_faults_are_one_line(finished, tmp_path, damage, message):
    run = shutil.copytree(finished[0], tmp_path / "copy")
    damage(run)
    with pytest.raises(DataError, match=message) as caught:
        report(ReportConfig(str(run), str(tmp_path / "page.html")))
    assert "\n" not in str(caught.value) and not (tmp_path / "page.html").exists()


def test_a_folder_is_no_page(finished, tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        report(ReportConfig(str(finished[0]), str(tmp_path)))


def test_what_a_run_lacks_is_left_out(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(run / "figures")
    for path in (run / "predictions").rglob("*.npz"):
        np.savez(path, image_map=read_arrays(path)["image_map"])
    report(ReportConfig(str(run), str(tmp_path / "page.html")))
    text = Checker((tmp_path / "page.html").read_text()).text
    assert "All pairs of views" not in text and "Features" not in text and "Click a volume" not in text
