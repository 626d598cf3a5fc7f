"""Inspection of one's own parts: what a model decides, measures, writes and refuses."""

import csv
import json
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from inspection_scans import Scanner, arrays
from PIL import Image
from scipy import stats

from dino_depth.anomaly.config import Encoders
from dino_depth.anomaly.heads import open_head
from dino_depth.anomaly.model import PrepareConfig
from dino_depth.cli import main
from dino_depth.errors import ConfigError, DataError
from dino_depth.inspection import predict as predicting
from dino_depth.inspection.convert import write_instance
from dino_depth.inspection.decision import DecisionConfig, decide, needed, split_conformal
from dino_depth.inspection.inspector import InspectionConfig, Inspector
from dino_depth.inspection.model_folder import MODEL, read_folder, write_folder
from dino_depth.inspection.parts import read_parts
from dino_depth.inspection.rig import RIG, rig_json

ROOT = Path(__file__).resolve().parents[1]
SCANNER = Scanner()


def fitted(scanner, parts, **options):
    head = open_head("residual")
    return Inspector.fit(scanner.rig, parts, "residual", head.Config(), InspectionConfig(), device="cpu", **options)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of one part, calibrated with two others, and its folder."""
    inspector = fitted(SCANNER, [SCANNER.good("first", 0)])
    inspector = inspector.calibrated([SCANNER.good(f"good{seed}", seed) for seed in (1, 2)])
    folder = tmp_path_factory.mktemp("model") / "model"
    inspector.save(folder)
    return inspector, folder


@pytest.fixture(scope="module")
def dented():
    return SCANNER.bad("dented", "dent", 0.04, 3)[0]


def write_parts(root: Path, *samples) -> Path:
    for sample in samples:
        images, depths = [view.read_image() for view in sample.views], [view.read_depth() for view in sample.views]
        write_instance(root / sample.name, images, depths, [view.name for view in sample.views], None)
    (root / RIG).write_text(json.dumps(rig_json(SCANNER.rig)))
    return root


def same(one, two):
    assert one.score == two.score and one.anomalous is two.anomalous and one.defects == two.defects
    assert np.array_equal(one.volume.score, two.volume.score)
    assert np.array_equal(one.volume.voxels.index, two.volume.voxels.index)
    for left, right in zip(one.pixel_maps, two.pixel_maps, strict=True):
        assert np.array_equal(left, right)


# The decision


def test_the_smallest_number_that_keeps_five_percent_is_45():
    config = DecisionConfig()
    assert needed(config) == 45
    assert [split_conformal(count, config) for count in (1, 44, 45, 76, 77)] == [0, 0, 1, 1, 2]
    told = decide({str(at): (float(at), 1.0) for at in range(45)}, config)
    assert (
        told.kind == "conformal"
        and told.threshold == 44
        and told.told() == ("false alarms <= 5 % at 90 % confidence, n = 45")
    )


@pytest.mark.parametrize(("rate", "confidence", "count"), [(0.05, 0.9, 60), (0.1, 0.8, 40), (0.3, 0.95, 25)])
def test_the_promise_holds_for_any_continuous_score(rate, confidence, count):
    """Of scores uniform on 0..1 a threshold t has the rate 1 - t, so what is realised is known exactly."""
    config, random = DecisionConfig(rate, confidence), np.random.default_rng(0)
    kept = [
        1 - decide({str(at): (value, 0.0) for at, value in enumerate(random.random(count))}, config).threshold <= rate
        for _ in range(2000)
    ]
    places = split_conformal(count, config)
    exact = stats.beta.cdf(rate, places, count + 1 - places)
    assert exact >= confidence > stats.beta.cdf(rate, places + 1, count - places)
    assert abs(np.mean(kept) - exact) < 4 * np.sqrt(exact * (1 - exact) / 2000)


def test_too_few_parts_say_what_they_allow_and_none_say_so():
    few = decide({"a": (1.0, 2.0), "b": (3.0, 1.0)}, DecisionConfig())
    assert few.kind == "weaker" and (few.threshold, few.map_threshold) == (3.0, 2.0)
    assert few.bound == pytest.approx(1 - 0.1**0.5) and "5 % takes 45" in few.told()
    alone = decide({}, DecisionConfig(), 7.0)
    assert alone.kind == "heuristic" and alone.of(8.0) and not alone.of(7.0) and "without guarantee" in alone.told()
    nothing = decide({}, DecisionConfig())
    assert nothing.kind == "none" and nothing.of(1e9) is None
    with pytest.raises(DataError, match="b: its score is nan"):
        decide({"b": (float("nan"), 0.0)}, DecisionConfig())


@pytest.mark.parametrize(("name", "settings", "kind"), [
    ("patchcore", {"modality": "image"}, "heuristic"),
    ("modmap", {"steps": 2, "tokens": 4, "image_to_depth": (4,), "depth_to_image": (4,)}, "none"),
])  # fmt: skip
def test_a_part_alone_decides_by_its_views_left_out_where_the_head_can(name, settings, kind):
    encoders = Encoders(image="raw-patches?patch=14", depth="raw-patches?patch=14", size=56)
    config = InspectionConfig(encoder=encoders, prepare=PrepareConfig(standardize=True))
    parts, settings = [SCANNER.good("first", 0)], open_head(name).Config(**settings)
    inspector = Inspector.fit(SCANNER.rig, parts, name, settings, config, device="cpu")
    assert inspector.decision.kind == kind
    if kind == "heuristic":
        assert inspector.inspect(parts[0]).score < inspector.decision.threshold
        assert inspector.inspect(SCANNER.good("good", 1)).score < 2 * inspector.decision.threshold


def test_over_random_splits_of_rendered_parts_the_rate_is_kept_as_often_as_promised():
    scanner = Scanner(48, 3)
    inspector = fitted(scanner, [scanner.good("first", 100)])
    scores = np.array([inspector.inspect(scanner.good(str(seed), seed)).score for seed in range(60)])
    config, random, kept, rates = DecisionConfig(0.2, 0.8), np.random.default_rng(0), [], []
    for _ in range(200):
        order = random.permutation(len(scores))
        threshold = decide({str(at): (scores[at], 0.0) for at in order[:20]}, config).threshold
        rates.append(np.mean(scores[order[20:]] > threshold))
        kept.append(rates[-1] <= config.rate)
    assert np.mean(kept) > config.confidence - 3 * np.sqrt(config.confidence * (1 - config.confidence) / 200)
    assert np.mean(rates) > 0.05  # a threshold above everything would keep any promise


# What it measures


def test_dents_and_bumps_are_measured_within_a_tenth_or_the_noise():
    scanner = Scanner(160, 6)
    inspector = fitted(scanner, [scanner.good("first", 0)]).calibrated([scanner.good("good", 1)])
    noise = 1000 * 0.0015 * scanner.subject.scale
    for seed, (kind, sign) in enumerate([("dent", -1), ("bump", 1), ("dent", -1), ("bump", 1)]):
        scan, height = scanner.bad(f"{kind}{seed}", kind, 0.02 + 0.008 * seed, 10 + seed)
        first = inspector.inspect(scan).defects[0]
        assert first.unit == "mm" and np.sign(first.deviation) == sign == np.sign(first.volume)
        assert abs(abs(first.deviation) - height) <= max(0.1 * height, noise), (kind, height, first)
        assert first.interval[0] < first.deviation < first.interval[1]


def test_a_defect_is_where_the_part_changed(model, dented):
    inspection = model[0].inspect(dented)
    assert inspection.anomalous and inspection.reasons
    first, points = inspection.defects[0], []
    for number, (view, picture) in enumerate(zip(dented.views, inspection.found.pixels, strict=True)):
        if view.name not in first.views:
            assert not (picture == 1).any(), number
            continue
        assert (picture == 1).any()
        points.append(view.name)
    assert sorted(points) == sorted(first.views)
    marked = inspection.volume.voxels.centers[inspection.found.voxels == 1] * 1000
    edge = 1000 * inspection.volume.voxels.size
    assert (np.abs(np.array(first.position) - (marked.min(0) + marked.max(0)) / 2) < 2 * edge).all()
    assert 0 < first.area and inspection.volume.score[inspection.found.voxels == 1].max() == first.score
    assert all(one.score >= other.score for one, other in zip(inspection.defects, inspection.defects[1:], strict=False))


def test_a_good_part_is_good_and_a_part_that_lies_elsewhere_is_not(model):
    inspector, _ = model
    calm = inspector.inspect(SCANNER.good("good1", 1))
    assert calm.anomalous is False and not calm.defects and not calm.reasons
    images, depths = arrays(SCANNER.good("turned", 5))
    turned = inspector.predict(images[2:] + images[:2], depths[2:] + depths[:2])
    assert turned.anomalous and (turned.motion.failed or turned.score > inspector.decision.threshold)


# What is kept


def test_a_loaded_model_gives_the_same_bits_from_folders_and_from_arrays(model, dented, tmp_path):
    inspector, folder = model
    direct, loaded = inspector.inspect(dented), Inspector.load(folder, "cpu")
    same(direct, loaded.inspect(dented))
    images, depths = arrays(dented)
    same(direct, loaded.predict(images, depths, "dented"))
    by_name = [dict(zip(inspector.names, part, strict=True)) for part in (images, depths)]
    same(direct, loaded.predict(*by_name))
    _, [sample] = read_parts(write_parts(tmp_path, dented), loaded.rig)
    same(direct, loaded.inspect(sample))
    assert loaded.decision == inspector.decision and not list(folder.glob("*.p*k*l*")) and not list(folder.glob("*.pt"))


def test_other_parts_calibrate_later_and_none_twice(model, tmp_path):
    inspector, folder = model
    copied = tmp_path / "model"
    shutil.copytree(folder, copied)
    parts = write_parts(tmp_path / "more", SCANNER.good("later", 8))
    assert main(["calibrate", str(copied), str(parts), "--device", "cpu"]) == 0
    later = Inspector.load(copied, "cpu").decision
    assert len(later.scores) == 3 and later.scores.items() > inspector.decision.scores.items()
    assert main(["calibrate", str(copied), str(parts), "--device", "cpu"]) == 3
    with pytest.raises(DataError, match="fitted on this part"):
        inspector.calibrated([SCANNER.good("first", 0)])
    assert Inspector.load(copied, "cpu").decision == later


def test_values_and_tensors_come_back_as_they_were(tmp_path):
    import torch

    values = {"a": [1, 2.5, None, True, "x"], "b": {"c": torch.arange(3), "d": (np.eye(2)[:, ::-1], [torch.ones(1)])}}
    write_folder(tmp_path, values)
    found, _ = read_folder(tmp_path)
    assert found["a"] == values["a"] and torch.equal(found["b"]["c"], values["b"]["c"])
    assert isinstance(found["b"]["d"], tuple) and np.array_equal(found["b"]["d"][0], values["b"]["d"][0])
    for wrong in ({"x": object()}, {"x": {1: 2}}, {"x": {"a/b": 2}}):
        with pytest.raises(TypeError):
            write_folder(tmp_path / "other", wrong)


def test_encoders_are_bundled_or_known_by_their_weights(tmp_path):
    """A head that compares features, on single views without a camera."""
    scanner = Scanner(56, 1)
    part = replace(scanner.good("first", 0), views=(replace(scanner.good("first", 0).views[0], camera=None),))
    config = InspectionConfig()
    config.prepare.registration.method = "none"
    config.encoder.image, config.encoder.size = "raw-patches", 56
    head = open_head("patchcore")
    settings = head.Config(modality="image")
    inspector = Inspector.fit(replace(scanner.rig, cameras={}), [part], "patchcore", settings, config, device="cpu")
    assert inspector.decision.kind == "none" and inspector.inspect(part).anomalous is None
    inspector = inspector.calibrated([_without_camera(scanner.good("good", 1))])
    inspector.save(tmp_path / "model", bundle=True)
    loaded = Inspector.load(tmp_path / "model", "cpu")
    bad = _without_camera(scanner.bad("bad", "stained_dent", 0.05, 4)[0])
    one, two = inspector.inspect(bad), loaded.inspect(bad)
    assert one.score == two.score and one.defects == two.defects and one.volume is None
    assert all(defect.unit == "pixels" and len(defect.position) == 2 for defect in one.defects)
    plain = json.loads((tmp_path / "model" / MODEL).read_text())
    plain["encoders"]["image"] = "0" * 64
    (tmp_path / "model" / MODEL).write_text(json.dumps(plain))
    with pytest.raises(DataError, match="other weights"):
        Inspector.load(tmp_path / "model", "cpu")


def _without_camera(sample):
    return replace(sample, views=tuple(replace(view, camera=None) for view in sample.views))


# The commands


def test_fit_then_predict_from_the_command_line(tmp_path, dented, capsys):
    parts = write_parts(tmp_path / "parts", *(SCANNER.good(f"g{seed}", seed) for seed in range(3)))
    model, out = tmp_path / "model", tmp_path / "out"
    assert main(["fit", str(parts), "--out", str(model), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "on 1 part, 2 parts to calibrate" in told and "n = 2" in told and not list(tmp_path.glob("*.fitting"))
    assert main(["fit", str(parts), "--out", str(model)]) == 2
    scans = write_parts(tmp_path / "scans", dented, SCANNER.good("again", 1))
    (scans / "dented/view_03/depth.tiff").rename(tmp_path / "depth.tiff")
    words = ["predict", str(model), str(scans), "--out", str(out), "--device", "cpu"]
    assert main(words) == 3
    assert "1 of 2 scans cannot be inspected, the first: dented" in capsys.readouterr().err
    (tmp_path / "depth.tiff").rename(scans / "dented/view_03/depth.tiff")
    assert main(words) == 0 and main(words) == 0
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["scan"], row["decision"]) for row in rows] == [("again", "good"), ("dented", "anomalous")]
    result = json.loads((out / "dented" / "result.json").read_text())
    assert result["anomalous"] and result["defects"] and result["registration"]["failed"] == ""
    assert {"read", "score", "volume", "defects"} <= result["seconds"].keys()
    assert (out / "dented" / "volume.ply").read_bytes().startswith(b"ply\n")
    page = (out / "dented" / "page.html").read_text()
    assert "Anomalous" in page and "http" not in page.split("<body")[1].split("src=")[0]
    # A kill between a scan's folder and its line of the table.
    lines = (out / "results.csv").read_text().splitlines(keepends=True)
    (out / "results.csv").write_text("".join(lines[:-1]) + lines[-1][:9])
    assert main(words) == 0
    assert (out / "results.csv").read_text() == "".join(lines)


def test_a_cad_file_and_a_rig_take_the_place_of_scans(model, tmp_path, dented, capsys):
    import trimesh

    subject = SCANNER.subject
    trimesh.Trimesh(1000 * subject.scale * subject.vertices, subject.faces, process=False).export(tmp_path / "knob.stl")
    scans = write_parts(tmp_path / "scans", dented, SCANNER.good("good1", 1))
    good = write_parts(tmp_path / "good", *(SCANNER.good(f"g{seed}", seed) for seed in (4, 5)))
    words = ["fit", "--cad", str(tmp_path / "knob.stl"), "--out", str(tmp_path / "model"), "--device", "cpu"]
    assert main(words) == 2 and "--rig is missing" in capsys.readouterr().err
    words += ["--rig", str(scans / RIG)]
    assert main([*words, str(good)]) == 2 and main([*words, "--train", "2"]) == 2
    assert main([*words, "--nominal.unit", "m"]) == 3 and "unit mm" in capsys.readouterr().err
    assert main([*words, "--good", str(good)]) == 0
    told = capsys.readouterr().out
    assert "images are not compared" in told and "residual, depth on 1 part, 2 parts to calibrate" in told
    words = ["predict", str(tmp_path / "model"), str(scans), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*words, "--page", "false"]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [(row["scan"], row["decision"]) for row in rows] == [("dented", "anomalous"), ("good1", "good")]
    scanned = model[0].inspect(dented).defects[0].deviation
    assert abs(float(rows[0]["deviation_mm"]) - scanned) < 1 and not (tmp_path / "out/dented/page.html").exists()


def test_the_example_of_the_docs_runs(tmp_path, dented, capsys, monkeypatch):
    parts = write_parts(tmp_path / "parts", *(SCANNER.good(f"g{seed}", seed) for seed in range(2)))
    scans = write_parts(tmp_path / "scans", dented)
    monkeypatch.chdir(tmp_path)
    example = runpy.run_path(str(ROOT / "docs/examples/inspect.py"))
    example["main"](str(parts), str(scans / "dented"))
    told = capsys.readouterr().out
    assert "dented anomalous" in told and " mm, " in told and "deviation -" in told


BAD = {
    "a missing view": (lambda scans: shutil.rmtree(scans / "dented/view_02"), "view view_02 is missing"),
    "another size": (
        lambda scans: Image.new("L", (90, 90)).save(scans / "dented/view_01/image.png"),
        "90x90 pixels, its camera has 96x96",
    ),
    "depth in millimetres": (lambda scans: _scaled(scans, 1000), "another unit of depth"),
    "another rig": (lambda scans: _moved(scans), "another rig than before"),
    "no part": (lambda scans: _emptied(scans), "the part is not in it"),
    "an empty folder": (lambda scans: shutil.rmtree(scans / "dented"), "no instance in it"),
}


def _scaled(scans, factor):
    for path in scans.glob("dented/*/depth.tiff"):
        tifffile.imwrite(path, tifffile.imread(path) * np.float32(factor))


def _moved(scans):
    rig = json.loads((scans / RIG).read_text())
    rig["cameras"][1]["camera_to_world"][0][3] += 0.01
    (scans / RIG).write_text(json.dumps(rig))


def _emptied(scans):
    for path in scans.glob("dented/*/depth.tiff"):
        depth = tifffile.imread(path)
        rows, columns = np.nonzero(np.isfinite(depth))
        keep = np.zeros(depth.shape, bool)
        middle = len(rows) // 2
        keep[rows[middle] - 3 : rows[middle] + 4, columns[middle] - 3 : columns[middle] + 4] = True
        tifffile.imwrite(path, np.where(keep, depth, np.nan).astype(np.float32))


@pytest.mark.parametrize("name", BAD)
def test_a_scan_that_cannot_be_inspected_is_one_line(model, dented, tmp_path, capsys, name):
    scans = write_parts(tmp_path / "scans", dented)
    change, message = BAD[name]
    change(scans)
    assert main(["predict", str(model[1]), str(scans), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 3
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in last and ("dented" in last or name == "an empty folder" or name == "another rig")
    assert not list((tmp_path / "out").glob("*/result.json"))


DAMAGED = {
    "truncated": (lambda model: _cut(model / "state.safetensors"), "truncated or changed"),
    "another version": (lambda model: _edited(model, format=2), "format is 2, this version reads 1"),
    "no model": (lambda model: (model / MODEL).unlink(), "is no model"),
    "half a file": (lambda model: _cut(model / MODEL), "cannot be read"),
    "a key less": (lambda model: _edited(model, rig=None), "model.json"),
}


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _edited(model, **changes):
    plain = json.loads((model / MODEL).read_text())
    plain = {key: value for key, value in (plain | changes).items() if value is not None}
    (model / MODEL).write_text(json.dumps(plain))


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_model_is_one_line(model, tmp_path, capsys, name):
    folder = tmp_path / "model"
    shutil.copytree(model[1], folder)
    change, message = DAMAGED[name]
    change(folder)
    assert main(["predict", str(folder), str(tmp_path), "--out", str(tmp_path / "out")]) == 3
    assert message in capsys.readouterr().err


def test_arrays_that_are_no_scan_are_refused(model, dented):
    inspector, _ = model
    images, depths = arrays(dented)
    for wrong, message in (
        ((images[:-1], depths), "4 images"),
        ((images, [depths[0] * np.nan, *depths[1:]]), "no depth is measured"),
        ((images, [depths[0][:-1], *depths[1:]]), "differ in size"),
        ((dict(zip(inspector.names[1:], images[1:], strict=True)), depths), "images lack the view view_01"),
    ):
        with pytest.raises(DataError, match=message):
            inspector.predict(*wrong)


def test_what_cannot_be_fitted_is_refused(tmp_path):
    part = _without_camera(Scanner(56, 1).good("first", 0))
    with pytest.raises(ConfigError, match="registration.method icp needs cameras"):
        fitted(Scanner(56, 1), [part])
    parts = write_parts(tmp_path / "parts", SCANNER.good("g", 0))
    assert main(["fit", str(parts), "--out", str(tmp_path / "m"), "--train", "2"]) == 2
    assert main(["fit", str(parts), "--out", str(tmp_path / "m"), "--head.name", "modmap"]) == 2
    assert not (tmp_path / "m").exists()


# Scans that arrive


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def test_scans_that_arrive_are_inspected_once_whole_and_others_moved_aside(model, dented, tmp_path):
    ready = write_parts(tmp_path / "ready", dented, SCANNER.good("good1", 1))
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    shutil.copy(ready / RIG, scans)
    config = predicting.PredictConfig(str(model[1]), str(scans), str(out), settled=0.05, patience=1.0, page=False)
    out.mkdir()
    stopped, raised = threading.Event(), []

    def watch():
        try:
            predicting._watch(config, model[0], out, stopped)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        # Half a scan first: its last view comes when the others were seen already.
        (scans / "dented").mkdir()
        for view in ("view_01", "view_02", "view_03", "view_04"):
            shutil.copytree(ready / "dented" / view, scans / "dented" / view)
        time.sleep(0.3)
        assert not (out / "dented").exists()
        shutil.copytree(ready / "dented" / "view_05", scans / "dented" / "view_05")
        wait_for(lambda: (out / "results.csv").is_file())
        shutil.copytree(ready / "good1", scans / "torn")
        (scans / "torn/view_02/depth.tiff").write_bytes(b"II*\0")
        wait_for(lambda: (out / "rejected/torn/reason.txt").is_file())
        (scans / "away").symlink_to(ready / "good1")
        wait_for(lambda: (out / "rejected/away/reason.txt").is_file())
        shutil.copytree(ready / "good1", scans / "good1")
        wait_for(lambda: (out / "results.csv").read_text().count("\n") == 3)
    finally:
        stopped.set()
        thread.join()
    assert [type(error).__name__ for error in raised] == ["Interrupted"]
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert [(row["scan"], row["decision"]) for row in rows] == [("dented", "anomalous"), ("good1", "good")]
    assert not (scans / "torn").exists() and "view_02" in (out / "rejected/torn/reason.txt").read_text()
    assert not (scans / "away").exists() and not (ready / "good1/reason.txt").exists()
    assert "away is a link to" in (out / "rejected/away/reason.txt").read_text()


def test_a_signal_ends_watching_without_a_scan_lost_or_judged_twice(model, dented, tmp_path):
    scans, out = write_parts(tmp_path / "scans", dented), tmp_path / "out"
    command = [sys.executable, "-m", "dino_depth.cli", "predict", str(model[1]), str(scans), "--out", str(out)]
    command += ["--watch", "--settled", "0", "--device", "cpu"]
    for expected in ("dented: anomalous", "watched"):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
            assert any(expected in line for line in process.stdout)  # reads no farther
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 75
            assert "the same command goes on" in process.stderr.read()
    assert (out / "results.csv").read_text().count("\n") == 2
