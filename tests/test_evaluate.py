import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import trimesh
import yaml

from data_prep.synthetic import SynthConfig, synth
from dino_depth.anomaly import evaluate as evaluate_module
from dino_depth.anomaly import instances, trials
from dino_depth.anomaly import results as results_module
from dino_depth.anomaly.benchmarks import BenchmarkConfig, open_benchmark
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.dataset import Truth, Voxels
from dino_depth.anomaly.evaluate import begin, evaluate, finish
from dino_depth.anomaly.foreground import ForegroundConfig, foreground
from dino_depth.anomaly.geometry import back_project
from dino_depth.anomaly.heads import modmap, patchcore
from dino_depth.anomaly.metrics import aupro, auroc, pooled_aupro, voxel_regions
from dino_depth.anomaly.report import ReportConfig, report
from dino_depth.anomaly.results import published_rows
from dino_depth.anomaly.views import Views
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError, Interrupted, ReportedError

VIEWS, TESTED = 4, 4
ENCODERS = [
    "--encoder.image",
    "raw-patches?patch=16",
    "--encoder.depth",
    "raw-patches?patch=16",
    "--encoder.size",
    "96",
]
SMALL = ["--head.modmap.steps", "10", "--head.modmap.image_to_depth", "[16]", "--head.modmap.depth_to_image", "[16]"]
SMALL += ["--metrics.resamples", "50"]


def configured(tree, out, *arguments):
    fixed = ["--data.root", str(tree), "--out", str(out)]
    return parse(EvaluateConfig, [*fixed, *ENCODERS, *SMALL, *arguments], "test")


def run(tree, out, *arguments):
    evaluate(configured(tree, out, *arguments))
    return json.loads((out / "results.json").read_text())


def without_cost(path):
    return re.sub(r'"cost": \{.*?\n   \},', "", path.read_text(), flags=re.S)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two classes in SiM3D's layout, four views of 64 pixels, two good and two anomalous instances each."""
    root = tmp_path_factory.mktemp("sim3d") / "tree"
    synth(parse(SynthConfig, ["sim3d", "--out", str(root), *SIM3D], "test", ("layout",)))
    return root


SIM3D = ["--categories", "2", "--size", "64", "--test_per_category", str(TESTED), "--workers", "1"]
SIM3D += ["--sim3d.views", str(VIEWS), "--sim3d.voxel", "0.015"]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One class in MVTec 3D-AD's layout."""
    root = tmp_path_factory.mktemp("mvtec3d") / "tree"
    arguments = ["--categories", "1", "--size", "96", "--per_category", "2", "--test_per_category", "6"]
    synth(parse(SynthConfig, ["mvtec3d", "--out", str(root), *arguments, "--workers", "1"], "test", ("layout",)))
    return root


@pytest.fixture(scope="module")
def whole(tree, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(tree, out, "--seeds", "2")
    return out


@pytest.fixture
def copied(tree, tmp_path):
    """A tree with one class to damage."""
    root = tmp_path / "tree"
    category = sorted(path.name for path in tree.iterdir() if path.is_dir())[0]
    shutil.copytree(tree / category, root / category)
    return root, root / category


def read(path):
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_a_run_holds_every_trial_with_its_costs_and_baselines(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["complete"] and results["benchmark"] == "sim3d" and results["setup"] == "real2real"
    assert results["synthetic"] and results["head"] == "modmap, conditioning cross-view"
    keys = [(trial["category"], trial["seed"]) for trial in results["trials"]]
    assert keys == [(category, seed) for category in results["categories"] for seed in (0, 1)] and len(keys) == 4
    names = ["V-AUPRO@1% occupied", "I-AUROC", "V-AUROC occupied", "V-AUPRO@1%", "coverage"]
    assert results["metrics"] == names
    for trial in results["trials"]:
        # Each view once per modality, of the training instance and of those tested; the second seed finds them.
        assert trial["cost"]["encodes"] == (0 if trial["seed"] else 2 * VIEWS * (1 + TESTED))
        assert trial["cost"]["fits"] == 1
        # What seeds have in common is the first one's.
        shared = set() if trial["seed"] else {"encode", "check", "read", "template", "volume"}
        assert set(trial["cost"]["seconds"]) == {"fit", "score", "write", "metrics"} | shared
        assert 0 < trial["cost"]["peak_memory_gib"] < 100
        assert list(trial["metrics"]) == names and set(trial["intervals"]) == set(names) - {"coverage"}
        for name, (low, high) in trial["intervals"].items():
            assert 0 <= low <= high <= 1, name
        rows = {"fraction missing", "mean intensity", "random scores", "constant on the object", "leak statistic"}
        rows |= {"template"}
        assert rows < set(trial["baselines"])
        assert trial["baselines"]["constant on the object"]["I-AUROC"] == 0.5
        assert 0 <= trial["baselines"]["leak statistic"]["I-AUROC"] <= 1
        assert trial["baselines"]["perfect scorer"]["V-AUPRO@1% occupied"] > 0.3
        assert [instance["label"] for instance in trial["instances"]].count("anomalous") == TESTED // 2


def test_metrics_are_those_of_the_predictions(whole):
    for trial in json.loads((whole / "results.json").read_text())["trials"]:
        files = [read(whole / instance["file"]) for instance in trial["instances"]]
        labels = np.array([instance["label"] == "anomalous" for instance in trial["instances"]])
        scores = np.array([file["score"].max() for file in files])
        assert scores.tolist() == [instance["score"] for instance in trial["instances"]]
        assert trial["metrics"]["I-AUROC"] == pytest.approx(auroc(scores, labels))
        for suffix, empty in (("", None), (" occupied", 0)):
            located = [
                voxel_regions(
                    file["index"], file["score"], file["truth_index"], file["shape"],
                    labels=file["truth_component"], empty_normal=empty,
                )
                for file in files
            ]  # fmt: skip
            assert trial["metrics"][f"V-AUPRO@1%{suffix}"] == pytest.approx(pooled_aupro(located, limit=0.01))


def test_predictions_hold_maps_and_a_point_cloud(whole):
    trial = json.loads((whole / "results.json").read_text())["trials"][0]
    for instance in trial["instances"]:
        arrays = read(whole / instance["file"])
        assert arrays["image_map"].shape == arrays["depth_map"].shape == (VIEWS, 6, 6)
        assert arrays["image_map"].dtype == np.float16 and str(arrays["label"]) == instance["label"]
        assert float(arrays["instance_score"]) == instance["score"]
        path = (whole / instance["file"]).with_suffix(".ply")
        cloud = trimesh.load(path)
        assert np.allclose(cloud.vertices, arrays["origin"] + (arrays["index"] + 0.5) * arrays["size"], atol=1e-6)
        data = cloud.metadata["_ply_raw"]["vertex"]["data"]
        assert np.array_equal(np.asarray(data["scalar_score"]).ravel(), arrays["score"])
        assert (whole / "figures" / trial["category"] / f"{instance['name']}.npz").is_file()


def test_a_page_leads_with_the_metric_that_separates_and_says_what_is_not_above_random(whole):
    results = json.loads((whole / "results.json").read_text())
    lines = (whole / "results.md").read_text().splitlines()
    mean = results["mean"]["V-AUPRO@1% occupied"]
    random, template, ceiling = (
        np.mean([trial["baselines"][name]["V-AUPRO@1% occupied"] for trial in results["trials"]])
        for name in ("random scores", "template", "perfect scorer")
    )
    less = results["less_template"]["V-AUPRO@1% occupied"]
    said = f"V-AUPRO@1% occupied {mean['value']:.3f} [{mean['low']:.3f}, {mean['high']:.3f}], "
    said += f"random scores {random:.3f}, template {template:.3f}, perfect scorer {ceiling:.3f}; "
    said += f"less template {less['value']:+.3f} [{less['low']:+.3f}, {less['high']:+.3f}]."
    assert results["verdict"].endswith(said)
    assert lines[2] == f"**{results['verdict']}**"
    assert next(line for line in lines if line.startswith("| category")).split(" | ")[2] == "V-AUPRO@1% occupied"
    unshown = "Not shown to be above"
    for low, over, starts in (
        (random, 1, f"{unshown} random"),
        (1, 0, f"{unshown} the template"),
        (1, 1e-6, "V-AUPRO"),
    ):
        results["mean"]["V-AUPRO@1% occupied"]["low"] = low
        results["less_template"]["V-AUPRO@1% occupied"]["low"] = over
        assert results_module.verdict(results).startswith(starts)


def test_a_template_stands_beside_a_run_with_the_paired_difference(tree, whole, tmp_path, capsys):
    """The row is that of a run of the template itself on the same features; its difference from the run is paired."""
    words = ["--head.name", "template", "--head.template.modality", "image", "--encoder.depth", ""]
    alone = run(tree, tmp_path / "run", *words, "--volume.points", "true")
    file = tmp_path / "run" / alone["trials"][0]["instances"][0]["file"]
    clouds = [trimesh.load(path) for path in file.parent.glob(f"{file.stem}.*.ply")]
    highest = max(cloud.metadata["_ply_raw"]["vertex"]["data"]["scalar_score"].max() for cloud in clouds)
    assert len(clouds) == VIEWS and highest == read(file)["score"].max()
    assert f"{tmp_path / 'run'}: {alone['verdict']}" in capsys.readouterr().out.splitlines()
    assert all(one == {"value": 0, "low": 0, "high": 0} for one in alone["less_template"].values())
    results = json.loads((whole / "results.json").read_text())
    assert results["template"].startswith("features of the images, the same cell")
    for trial in results["trials"]:
        (theirs,) = [one for one in alone["trials"] if one["category"] == trial["category"]]
        assert trial["baselines"]["template"] == theirs["metrics"]
        draws, others = (
            read(folder / "predictions" / trial["category"] / f"seed{seed}" / "resamples.npz")
            for folder, seed in ((whole, trial["seed"]), (tmp_path / "run", 0))
        )
        for name, found in trial["less_template"].items():
            assert found["value"] == trial["metrics"][name] - theirs["metrics"][name]
            difference = draws[name] - others[name]
            assert np.array_equal(draws[f"{name} less template"], difference)
            assert [found["low"], found["high"]] == pytest.approx(np.quantile(difference, [0.025, 0.975]))
    # Without image features raw patches are compared; and it can be left out.
    words = ["--head.name", "patchcore", "--head.patchcore.modality", "depth", "--encoder.image", ""]
    words += ["--categories", "[angle_bracket]"]
    raw = run(tree, tmp_path / "raw", *words)
    assert raw["template"].startswith("raw patches of the images") and "template" in raw["trials"][0]["baselines"]
    off = run(tree, tmp_path / "off", *words, "--metrics.template", "false")
    assert off["template"] == "metrics.template is off" and off["less_template"] == {}
    (trial,) = raw["trials"]
    assert off["trials"][0]["baselines"] == {k: v for k, v in trial["baselines"].items() if k != "template"}
    assert off["trials"][0]["metrics"] == trial["metrics"] and "less" not in off["verdict"]


def test_good_instances_alone_are_scored_and_no_metric_is_defined(copied, tree, tmp_path, capsys):
    root, folder = copied
    for path in folder.glob("*_bad"):
        shutil.rmtree(path)
    words = ["--head.name", "residual", "--encoder.image", "", "--encoder.depth", ""]
    results = run(root, tmp_path / "run", *words)
    (trial,) = results["trials"]
    assert results["complete"] and results["metrics"] == [] and results["mean"] == {} == trial["metrics"]
    scores = [instance["score"] for instance in trial["instances"]]
    assert trial["good_scores"] == {"lowest": min(scores), "median": np.median(scores), "highest": max(scores)}
    assert results["verdict"].startswith("I-AUROC and AUPRO are not defined: all test instances are good. Their scores")
    assert results["verdict"] in capsys.readouterr().out
    text = (tmp_path / "run" / "results.md").read_text()
    assert f"| angle_bracket | 0 | 2 | {min(scores):.4g} |" in text and "| 0.000" not in text
    report(ReportConfig(str(tmp_path / "run")))
    page = (tmp_path / "run" / "report.html").read_text()
    assert (
        "angle bracket: no anomalous test instance, so that no metric is defined" in page and results["verdict"] in page
    )
    # Beside a class that has anomalous instances, which alone the means are of.
    shutil.copytree(tree / "spur_gear", root / "spur_gear")
    both = run(root, tmp_path / "both", *words)
    assert both["metrics"][0] == "V-AUPRO@1% occupied" and set(both["trials"][0]["metrics"]) == set()
    assert all(mean["value"] == both["trials"][1]["metrics"][name] for name, mean in both["mean"].items())
    assert both["mean"] and "left out of the means: angle_bracket." in (tmp_path / "both" / "results.md").read_text()
    report(ReportConfig(str(tmp_path / "both"), compare=[str(tmp_path / "run")]))


def test_intervals_of_a_single_instance_are_marked_and_scales_keep_to_tables_of_their_own(copied, tmp_path):
    root, folder = copied
    for label in ("good", "bad"):
        shutil.rmtree(sorted(path for path in folder.iterdir() if label in path.name)[0])
    run(root, tmp_path / "run")
    text = (tmp_path / "run" / "results.md").read_text()
    assert "\\* Of one good or one anomalous instance: the interval" in text
    assert all(
        line.count("] *") == 4 for line in text.splitlines() if line.startswith(("| angle_bracket", "| **mean**"))
    )
    tables = text.split("## Published means")[1:]
    assert "ModMap (Costanzino" in tables[0] and "SGANet (2026)" not in tables[0]
    assert tables[1].startswith(", as rerun by SGANet") and "Costanzino" not in tables[1]


def test_a_cache_that_is_too_small_is_said_at_the_start(tree, whole, tmp_path, caplog):
    begin(configured(tree, tmp_path / "run"))
    taken = sum(path.stat().st_size for path in (whole / "features").glob("*.features"))
    # Every view of every instance has its own features of either modality, but a file may stand for equal pixels.
    assert not caplog.records
    begin(configured(tree, tmp_path / "small", "--encoder.cache_gib", str(0.99 * taken / 2**30)))
    views = 2 * VIEWS * (1 + TESTED)
    assert caplog.messages == [m for m in caplog.messages if m.startswith(f"the features of {views} views take")] != []


def test_means_and_intervals_follow_from_the_trials(whole):
    results = json.loads((whole / "results.json").read_text())
    for name, mean in results["mean"].items():
        values = [trial["metrics"][name] for trial in results["trials"]]
        assert mean["value"] == pytest.approx(np.mean(values))
        if name != "coverage":
            assert mean["low"] <= mean["high"]
    for trial in results["trials"]:
        draws = read(whole / "predictions" / trial["category"] / f"seed{trial['seed']}" / "resamples.npz")
        for name, bounds in trial["intervals"].items():
            assert bounds == pytest.approx(np.quantile(draws[name], [0.025, 0.975]))


def test_tables_hold_the_same_figures(whole):
    results = json.loads((whole / "results.json").read_text())
    with open(whole / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for trial in results["trials"]:
        for name, value in trial["metrics"].items():
            wanted = {
                "category": trial["category"],
                "seed": str(trial["seed"]),
                "scorer": results["head"],
                "metric": name,
            }
            (found,) = [row for row in rows if wanted.items() <= row.items()]
            assert float(found["value"]) == value
    page = (whole / "results.md").read_text()
    assert f"{results['mean']['I-AUROC']['value']:.3f}" in page and "do not compare" in page
    assert "ModMap (Costanzino et al. 2026), table 1" in page


def test_a_killed_run_continues_to_the_same_results(whole, tree, tmp_path, monkeypatch):
    out, write, written = tmp_path / "run", instances._write, []

    def stopped(path, *arguments):
        written.append(path)
        if len(written) == 2 * TESTED + 4:  # the second instance of the second class, with its second seed
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, *arguments)

    monkeypatch.setattr(instances, "_write", stopped)
    with pytest.raises(Interrupted, match="SIGTERM.*again") as stop:
        run(tree, out, "--seeds", "2")
    assert stop.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    partial = json.loads((out / "results.json").read_text())
    assert not partial["complete"] and len(partial["trials"]) == 2
    assert len(list((out / "scored" / "spur_gear").rglob("*.npz"))) == 3
    run(tree, out, "--seeds", "2")
    continued = json.loads((out / "results.json").read_text())["trials"]
    assert [trial["cost"]["fits"] for trial in continued] == [1, 1, 1, 1]  # none was fitted twice
    assert len(written) == 4 * TESTED + 1 and not list(out.glob("scored/*"))
    assert_same(out, whole)
    run(tree, out, "--seeds", "2")
    assert len(written) == 4 * TESTED + 1


def assert_same(out, whole):
    assert without_cost(out / "results.json") == without_cost(whole / "results.json")
    paths = [path for folder in ("predictions", "figures") for path in (whole / folder).rglob("*.*")]
    assert len(paths) > 4 * TESTED
    for path in paths:
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path


def test_processes_make_the_bits_of_one_also_after_one_of_them_was_killed(whole, tree, tmp_path):
    """Three processes, of which one is killed; then two more do what is left. With threads as here, in ``whole``."""
    out, killed = tmp_path / "run", []

    def kill():
        while not killed:
            done = len(list(out.glob("scored/*/*/*.npz")))
            children = multiprocessing.active_children()
            if done and children:
                killed.append(children[-1].pid)
                os.kill(children[-1].pid, signal.SIGKILL)
            time.sleep(0.01)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        watch = threading.Thread(target=kill, daemon=True)
        watch.start()
        with pytest.raises(ReportedError, match="a process was killed .*: run the same command again to continue"):
            run(tree, out, "--seeds", "2", "--processes", "3")
        watch.join()
        left = sum(not path.is_file() for path in expected_files(out, whole))
        assert 0 < left < 4 * TESTED and not multiprocessing.active_children()
        with pytest.raises(DataError, match=f"{left} of {4 * TESTED} instances are not scored .*: run the same comm"):
            finish(configured(tree, out, "--seeds", "2"))
        (out / "predictions" / "00.ply.host.1.tmp").write_bytes(b"what a killed process was writing")
        run(tree, out, "--seeds", "2", "--processes", "2")
    finally:
        torch.set_num_threads(threads)
    assert_same(out, whole)
    assert not list(out.glob("scored/*/*/*.npz")) and not list(out.rglob("*.tmp"))


def expected_files(out, whole):
    for path in (whole / "predictions").rglob("*.ply"):
        yield out / "scored" / path.relative_to(whole / "predictions").with_suffix(".npz")


def test_more_seeds_are_added_to_a_run_but_other_settings_refused(tree, copied, tmp_path, monkeypatch):
    root, folder = copied
    out = tmp_path / "run"
    first = run(root, out)["trials"]
    more = run(root, out, "--seeds", "2")
    assert more["trials"][0] == first[0] and len(more["trials"]) == 2
    with pytest.raises(ConfigError, match=r"head\.modmap\.pairs was 48 when it began and is 7 now"):
        run(root, out, "--head.modmap.pairs", "7")
    (out / "trials").rename(out / "cells")
    with pytest.raises(ConfigError, match="written before trials had their name: rename its folder cells to trials"):
        run(root, out, "--seeds", "2")
    with pytest.raises(ConfigError, match=r"encoder\.depth was 'raw-patches\?patch=16'"):
        run(root, out, "--encoder.depth", "raw-patches?patch=16&depth_as=log")
    (out / "run.json").write_text((out / "run.json").read_text().replace('depth encoder": "', 'depth encoder": "0'))
    with pytest.raises(DataError, match=r"run\.json: depth encoder was"):
        run(root, out)
    with pytest.raises(ConfigError, match="is no evaluation and not empty"):
        run(root, tmp_path)


def test_settings_of_inference_share_one_fit(tree, whole, tmp_path):
    shared = ["--head.cache", str(tmp_path / "heads"), "--encoder.cache", str(tmp_path / "features")]
    shared += ["--categories", "[angle_bracket]"]
    trials = {"": run(tree, tmp_path / "first", *shared)["trials"][0]}
    variants = {
        "sources 2": ["--head.modmap.sources", "2"],
        "sources target": ["--head.modmap.sources", "target"],
        "aggregate mean": ["--head.modmap.aggregate", "mean"],
        "modality image": ["--head.modmap.modality", "image"],
        "view_shift 1": ["--head.modmap.view_shift", "1"],
        "aggregation prod": ["--volume.aggregation", "prod"],
    }
    volumes = {read(tmp_path / "first" / trials[""]["instances"][0]["file"])["score"].tobytes()}
    for name, words in variants.items():
        results = run(tree, tmp_path / name, *shared, *words)
        trials[name] = results["trials"][0]
        assert results["head"] == f"modmap, conditioning cross-view, {name}"
        volumes.add(read(tmp_path / name / trials[name]["instances"][0]["file"])["score"].tobytes())
    assert [trial["cost"]["fits"] for trial in trials.values()] == [1] + [0] * len(variants)
    assert len(volumes) == len(trials)  # all score differently
    again = run(tree, tmp_path / "again", "--categories", "[angle_bracket]", *variants["sources 2"])["trials"][0]
    assert again["cost"]["fits"] == 1
    for key in ("metrics", "intervals", "instances"):
        assert trials[""][key] == json.loads((whole / "results.json").read_text())["trials"][0][key]
        assert again[key] == trials["sources 2"][key]
    other = run(tree, tmp_path / "other", *shared, "--head.modmap.steps", "11")["trials"][0]
    assert other["cost"]["fits"] == 1 and len(list((tmp_path / "heads").iterdir())) == 2


def test_one_model_serves_all_classes(tree, tmp_path, monkeypatch):
    fit, seen = modmap.fit, []

    def counted(train, *arguments):
        seen.append((len(train), [views.class_index for views in train]))
        return fit(train, *arguments)

    monkeypatch.setattr(modmap, "fit", counted)
    results = run(tree, tmp_path / "run", "--head.multiclass", "true")
    assert seen == [(2, [0, 1])] and len(results["trials"]) == 2 and results["complete"]
    assert results["head"].endswith("one model of all classes")
    assert [trial["cost"]["fits"] for trial in results["trials"]] == [1, 0]


def test_patchcore_learns_from_renderings_and_needs_one_encoder_only(tree, tmp_path):
    arguments = ["--head.name", "patchcore", "--head.patchcore.modality", "depth", "--encoder.image", ""]
    results = run(tree, tmp_path / "run", *arguments, "--data.sim3d.setup", "synth2real")
    trial = results["trials"][0]
    assert trial["cost"]["encodes"] == VIEWS * (1 + TESTED) and results["setup"] == "synth2real"
    assert {row["table"] for row in results["published"]} == {2, 7}
    assert "depth_map" in read(tmp_path / "run" / trial["instances"][0]["file"])
    with pytest.raises(ConfigError, match=r"--encoder\.image is missing: modmap"):
        run(tree, tmp_path / "other", "--encoder.image", "")


@pytest.mark.parametrize("encoder", ["raw-patches", "fpfh", "random:dino-depth"])
def test_depth_encoders_without_weights_go_through_a_run_on_renderings(tree, tmp_path, encoder):
    if encoder == "fpfh":
        pytest.importorskip("open3d", reason="open3d is not installed", exc_type=ImportError)
    arguments = ["--encoder.image", "raw-patches", "--encoder.depth", encoder, "--encoder.size", "84"]
    results = run(tree, tmp_path / "run", *arguments, "--data.sim3d.setup", "synth2real", "--categories", "[spur_gear]")
    assert results["complete"] and results["setup"] == "synth2real" and results["head"].startswith("modmap")
    (trial,) = results["trials"]
    assert trial["cost"]["encodes"] == 2 * VIEWS * (1 + TESTED)
    scores = [read(tmp_path / "run" / instance["file"])["depth_map"] for instance in trial["instances"]]
    assert all(part.shape == (VIEWS, 6, 6) for part in scores) and np.std(np.stack(scores).astype(float)) > 1e-3


def test_36_views_go_through_a_run(tmp_path):
    words = ["sim3d", "--out", str(tmp_path / "tree"), "--categories", "1", "--size", "48", "--test_per_category", "2"]
    words += ["--workers", "1", "--sim3d.views", "36", "--sim3d.voxel", "0.02"]
    synth(parse(SynthConfig, words, "test", ("layout",)))
    results = run(tmp_path / "tree", tmp_path / "run", "--encoder.size", "48", "--head.modmap.sources", "9")
    (trial,) = results["trials"]
    assert trial["cost"]["encodes"] == 2 * 36 * 3 and 0 < trial["checks"]["overlap_train"] < 0.03
    assert read(tmp_path / "run" / trial["instances"][0]["file"])["image_map"].shape == (36, 3, 3)


class Known:
    """A head that scores pixels by a function of the sample, in a grid as fine as its views."""

    INFERENCE = frozenset()
    Config = patchcore.Config
    __name__ = "known"

    def __init__(self, of):
        self.of = of

    def needs(self, config):
        return frozenset({"image", "depth"})

    def title(self, config):
        return "known"

    def check(self, config, facts):
        pass

    def fit(self, train, config, context):
        return self

    def state(self):
        return {}

    def score(self, head, views):
        return {"depth": self.of(views)}


def install(monkeypatch, head):
    """The head in place of every other."""
    for module in (instances, trials, evaluate_module, results_module):
        monkeypatch.setattr(module, "open_head", lambda name: head)


def seen_truth(held):
    """Maps that are 1 where a pixel falls into an anomalous voxel, and the ground truth that some pixel sees."""
    truth, maps, hit = held.read_truth(), [], []
    grid = truth.voxels
    anomalous = np.zeros(grid.shape, bool)
    anomalous[tuple(grid.index.T)] = True
    for view in held.views:
        depth = view.read_depth()
        points = back_project(view.camera, depth.depth)
        place = np.floor((points - grid.origin) / grid.size).astype(int).clip(0, np.array(grid.shape) - 1)
        shown = foreground(depth, ForegroundConfig()) & anomalous[tuple(np.moveaxis(place, -1, 0))]
        maps.append(shown)
        hit.append(place[shown])
    found = np.unique(np.concatenate(hit), axis=0).astype(np.int32)
    kept = (grid.index[:, None] == found).all(2).any(1)
    seen = Voxels(grid.origin, grid.size, grid.shape, grid.index[kept])
    return np.stack(maps), Truth("voxels", voxels=seen, component=truth.component[kept])


@pytest.mark.parametrize("benchmark", ["sim3d", "mvtec3d"])
def test_a_perfect_scorer_gets_one_where_everything_is_seen(benchmark, tree, single, tmp_path, monkeypatch):
    """From ground truth through maps, projection, files and tables: 1 in every metric."""
    judge = instances._judge

    def revealed(session, views, scores, *others):
        held = views.sample
        if benchmark == "sim3d":
            maps, truth = seen_truth(held)
            held = replace(held, read_truth=lambda: truth)
        else:
            maps = held.read_truth().masks[0][None]
            held.views[0].read_depth().valid[:] = True
        views = Views(held, session.store, resident=True)
        maps = {"depth": torch.from_numpy(maps.astype(np.float32))}
        return judge(session, views, {seed: replace(one, maps=maps) for seed, one in scores.items()}, *others)

    install(monkeypatch, Known(lambda views: torch.zeros(1, 1, 1)))
    monkeypatch.setattr(instances, "_judge", revealed)
    root, method = (tree, "largest") if benchmark == "sim3d" else (single, "valid")
    arguments = ["--data.name", benchmark, "--head.name", "patchcore", "--foreground.method", method]
    arguments += ["--metrics.template", "false"]
    results = run(root, tmp_path / "run", *arguments, "--metrics.limits", "[0.3,0.01]")
    limits = ("30%", "1%")
    volume = [f"V-AUPRO@{limit} occupied" for limit in limits] + ["I-AUROC", "V-AUROC occupied"]
    pixels = [f"AUPRO@{limit} object" for limit in limits] + ["I-AUROC", "P-AUROC", "P-AUROC object"]
    names = [*volume, *(f"V-AUPRO@{limit}" for limit in limits), "coverage"]
    names = names if benchmark == "sim3d" else pixels + [f"AUPRO@{limit}" for limit in limits]
    for trial in results["trials"]:
        assert list(trial["metrics"]) == names
        assert list(trial["metrics"].values()) == pytest.approx([1.0] * len(names), abs=1e-9)
        for bounds in trial["intervals"].values():
            assert bounds == pytest.approx([1.0, 1.0], abs=1e-9)


def test_single_view_metrics_are_those_of_dense_maps(single, tmp_path, monkeypatch):
    kept, judge_view = [], instances.judge_view

    def recorded(held, heads, foreground, truth, *arguments):
        kept.append((heads[0], foreground, truth.masks[0], held.label))
        return judge_view(held, heads, foreground, truth, *arguments)

    monkeypatch.setattr(instances, "judge_view", recorded)
    arguments = ["--data.name", "mvtec3d", "--head.name", "patchcore", "--foreground.method", "plane"]
    results = run(single, tmp_path / "run", *arguments, "--metrics.limits", "[0.3]")
    found = results["trials"][0]
    scores = []
    for maps, shown, _, _ in kept:
        square = torch.nn.functional.interpolate(maps["both"][None], shown.shape, mode="bilinear")[0, 0].numpy()
        scores.append(np.where(shown, square, np.float32(0)))
    masks = [mask for _, _, mask, _ in kept]
    assert found["metrics"]["AUPRO@30%"] == pytest.approx(aupro(scores, masks, limit=0.3), abs=1e-4)
    assert found["metrics"]["P-AUROC"] == pytest.approx(auroc(np.stack(scores), np.stack(masks)), abs=1e-4)
    labels = np.array([label == "anomalous" for *_, label in kept])
    assert found["metrics"]["I-AUROC"] == pytest.approx(auroc(np.array([part.max() for part in scores]), labels))
    # A constant on the object is worth something where the background counts, and next to nothing where it does not.
    constant = found["baselines"]["constant on the object"]
    assert constant["P-AUROC"] > constant["P-AUROC object"]
    assert "leak statistic" in found["baselines"]


def no_test_instance(folder):
    for path in folder.glob("*_??_*"):
        shutil.rmtree(path)


def no_good_instance(folder):
    for path in folder.glob("*_good"):
        shutil.rmtree(path)


def no_image(folder):
    next(folder.glob("*_01_bad/rgb/3_2.png")).unlink()


def fewer_views(folder):
    (folder / f"{folder.name}_real" / "depth" / "4.npy").unlink()


def broken_calibration(folder):
    (folder / "calibration.json").write_text("{")


def broken_image(folder):
    path = next(folder.glob("*_02_good/rgb/2_2.png"))
    path.write_bytes(path.read_bytes()[:60])


def nothing_measured(folder):
    path = next(folder.glob("*_02_good/depth/2.npy"))
    np.save(path, np.full_like(np.load(path, allow_pickle=False), np.nan))


def some_truth(folder):
    shutil.rmtree(next(folder.glob("*_02_bad/mask")))
    next(folder.glob("*_02_bad/gt.npz")).unlink()


def another_form_of_truth(folder):
    next(folder.glob("*_02_bad/gt.npz")).unlink()


FAULTS = {
    no_test_instance: "no instance to test",
    no_good_instance: "need good test samples, anomalous beside them, got 2 anomalous",
    no_image: r"_01_bad: view 3 has no rgb/3_2\.png",
    fewer_views: r"_real.* 3 views.* 4",
    broken_calibration: r"calibration\.json",
    broken_image: r"_02_good.*2_2\.png",
    nothing_measured: r"_02_good.*2\.npy",
    some_truth: "_02_bad: its ground truth is none, that of angle_bracket_01_bad voxels: a class has one form",
    another_form_of_truth: "_02_bad: its ground truth is masks, that of angle_bracket_01_bad voxels: a class",
}


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_a_damaged_tree_is_named_in_one_line(copied, tmp_path, damage):
    root, folder = copied
    damage(folder)
    with pytest.raises(DataError, match=FAULTS[damage]) as error:
        run(root, tmp_path / "run")
    assert error.value.exit_code == 3 and "\n" not in str(error.value)
    assert not (tmp_path / "run" / "results.json").exists()


def test_scores_that_are_no_numbers_stop_the_run(copied, tmp_path, monkeypatch):
    maps = torch.full((VIEWS, 6, 6), torch.nan)
    install(monkeypatch, Known(lambda views: maps))
    with pytest.raises(DataError, match="not finite in view"):
        run(copied[0], tmp_path / "run", "--head.name", "patchcore")


def test_a_head_of_pixels_goes_through_a_run_and_its_page(tree, whole, tmp_path):
    arguments = ["--config", "sim3d_residual", "--encoder.image", "", "--encoder.depth", ""]
    results = run(tree, tmp_path / "run", *arguments)
    assert results["head"] == "residual, depth + image, registered"
    assert all(trial["cost"]["encodes"] == 0 for trial in results["trials"])
    kept = read(tmp_path / "run" / results["trials"][0]["instances"][0]["file"])
    assert kept["depth_map"].shape == kept["image_map"].shape == (VIEWS, 32, 32)
    report(ReportConfig(str(tmp_path / "run"), compare=[str(whole)]))
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_without_ground_truth_only_instances_are_ranked(copied, tmp_path):
    root, folder = copied
    for path in [*folder.glob("*/gt.npz"), *folder.glob("*/mask")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    results = run(root, tmp_path / "run", "--volume.size_mm", "15")
    assert {trial["ground_truth"] for trial in results["trials"]} == {"none"}
    assert "Ground truth: none." in (tmp_path / "run" / "results.md").read_text().splitlines()
    assert results["metrics"] == ["I-AUROC"] and results["mean"]["I-AUROC"]["value"] <= 1
    assert set(results["trials"][0]["baselines"]["random scores"]) == {"I-AUROC"}


def test_fewer_views_are_fewer_for_training_sources_and_targets(tree, copied, tmp_path):
    root, folder = copied
    for path in folder.glob("*/gt.npz"):
        path.unlink()  # masks are left, one for each view
    results = run(root, tmp_path / "run", "--data.views", "2")
    (trial,) = results["trials"]
    assert trial["cost"]["encodes"] == 2 * 2 * (1 + TESTED) and trial["ground_truth"] == "masks"
    assert read(tmp_path / "run" / trial["instances"][0]["file"])["image_map"].shape[0] == 2
    every, fewer = (
        open_benchmark(BenchmarkConfig(root=str(root), views=views)).samples("angle_bracket", "test")
        for views in (None, 3)
    )
    assert [view.name for view in fewer[0].views] == [every[0].views[place].name for place in (0, 1, 2)]
    bad = next(place for place, sample in enumerate(every) if sample.label == "anomalous")
    whole, part = every[bad].read_truth().masks, fewer[bad].read_truth().masks
    assert len(part) == 3 and all(np.array_equal(a, b) for a, b in zip(part, whole[:3], strict=True))
    with pytest.raises(ConfigError, match=r"data\.views 9 exceeds the 4 views of angle_bracket/"):
        run(root, tmp_path / "more", "--data.views", "9")
    with pytest.raises(ConfigError, match=r"data\.views: must be at least 1, got 0"):
        run(root, tmp_path / "none", "--data.views", "0")


def test_good_instances_without_a_file_are_measured_on_the_same_grid(copied, whole, tmp_path):
    root, folder = copied
    for path in folder.glob("*/gt.npz"):
        if "bad" not in path.parent.name:
            path.unlink()
    results = run(root, tmp_path / "run")
    first = json.loads((whole / "results.json").read_text())["trials"][0]
    assert results["trials"][0]["metrics"] == first["metrics"]
    assert results["trials"][0]["baselines"] == first["baselines"]


def test_what_would_be_ignored_or_cannot_be_done_is_refused_before_anything_is_encoded(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate_module, "load_frozen", None)
    with pytest.raises(ConfigError, match=r"modmap.sources 18 exceeds the 4 views of an instance"):
        run(tree, tmp_path / "run", "--head.modmap.sources", "18")
    with pytest.raises(ConfigError, match=r"volume.size_mm 2: the ground truth of angle_bracket/.* voxels of 15 mm"):
        run(tree, tmp_path / "run", "--volume.size_mm", "2")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "0"], "seeds: must be at least 1"),
        (["--categories", "[angle_brackt]"], "unknown class 'angle_brackt'.*did you mean 'angle_bracket'"),
        (["--metrics.limits", "[0]"], r"metrics\.limits"),
        (["--encoder.size", "100"], "100.*16"),
        (["--out", ""], "--out is missing"),
    ],
)
def test_impossible_settings_are_named(tree, tmp_path, arguments, message):
    with pytest.raises(ReportedError, match=message) as error:
        run(tree, tmp_path / "run", *arguments)
    assert error.value.exit_code == 2


def test_pooling_and_nominal_instances_are_settings(whole, tree, tmp_path):
    for arguments, pick in (
        (["--metrics.pooling", "sample"], lambda parts: np.mean([pooled_aupro([part]) for part in parts])),
        (["--metrics.nominal", "false"], lambda parts: pooled_aupro(parts)),
    ):
        out = tmp_path / arguments[0]
        trial = run(tree, out, *arguments, "--categories", "[angle_bracket]")["trials"][0]
        parts = []
        for instance in trial["instances"]:
            file = read(out / instance["file"])
            if len(file["truth_index"]):
                part = (file["index"], file["score"], file["truth_index"], file["shape"])
                parts.append(voxel_regions(*part, labels=file["truth_component"]))
        assert len(parts) == TESTED // 2
        assert trial["metrics"]["V-AUPRO@1%"] == pytest.approx(pick(parts))


def test_the_ladder_is_three_configurations_that_differ_in_one_setting():
    names = ("sim3d_cfm", "sim3d_cfm_view", "sim3d_modmap")
    shipped = [asdict(parse(EvaluateConfig, ["--config", name], "test")) for name in names]
    steps = [config["head"]["modmap"].pop("conditioning") for config in shipped]
    assert steps == ["none", "view", "cross-view"] and shipped[0] == shipped[1] == shipped[2]
    several = asdict(parse(EvaluateConfig, ["--config", "sim3d_multiclass"], "test"))
    assert several["head"].pop("multiclass") and several["head"]["modmap"].pop("conditioning") == "cross-view"
    assert parse(EvaluateConfig, ["--config", "sim3d_patchcore"], "test").head.name == "patchcore"


def test_published_means_are_those_of_their_classes():
    wanted = {"real2real": {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, "synth2real": {2, 7}}
    for setup, tables in wanted.items():
        assert {row["table"] for row in published_rows("sim3d", setup)} == tables
    assert {row["table"] for row in published_rows("eyecandies12", "")} == {4, 5, 6, 9}
    for benchmark, setup in (("sim3d", "real2real"), ("sim3d", "synth2real"), ("eyecandies12", ""), ("mvtec3d", "")):
        groups = {}
        for row in published_rows(benchmark, setup):
            key = row["paper"], row["table"], row["method"], row["metric"]
            groups.setdefault(key, {})[row["category"]] = row["value"]
        for key, values in groups.items():
            mean = values.pop("mean", None)
            if mean is not None and values:
                assert np.mean(list(values.values())) == pytest.approx(mean, abs=0.0016), key
    rows = published_rows("sim3d", "real2real")
    scales = {"ModMap (Costanzino et al. 2026)": "", "SGANet (2026)": "as rerun by SGANet"}
    assert {(row["paper"], row["scale"]) for row in rows} == set(scales.items())
    wanted = {"table": 1, "method": "ModMap", "category": "mean", "metric": "V-AUPRO@1%"}
    (ours,) = [row for row in rows if wanted.items() <= row.items()]
    assert ours["value"] == 0.804


NEW_HEAD = """
from dataclasses import asdict, dataclass

import torch

INFERENCE = frozenset({"factor"})

@dataclass
class Config:
    \"\"\"Brightness.

    Attributes:
        factor: of the scores.
    \"\"\"

    factor: float = 1.0

@dataclass(frozen=True)
class Bright:
    config: Config

    def state(self):
        return {"config": asdict(self.config)}

def from_state(state, device):
    return Bright(Config(**state["config"]))

def needs(config):
    return frozenset({"pixels"})

def title(config):
    return f"bright, factor {config.factor:g}"

def check(config, facts):
    pass

def fit(train, config, context):
    return Bright(config)

def score(head, views):
    return {"image": head.config.factor * views.pixels(32).mean(1)}
"""


def test_a_file_and_a_configuration_are_a_new_head(tree, tmp_path):
    """In a process of its own, since settings are made of the heads that are there at the start."""
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "bright.py").write_text(NEW_HEAD)
    out = tmp_path / "run"
    settings = {"data": {"root": str(tree)}, "head": {"name": "bright", "bright": {"factor": 2.5}}}
    settings |= {"categories": ["spur_gear"], "metrics": {"resamples": 20}, "out": str(out)}
    (tmp_path / "bright.yaml").write_text(yaml.safe_dump(settings))
    lines = f"from dino_depth.anomaly import heads; heads.__path__.append({str(tmp_path / 'heads')!r})\n"
    lines += f"from dino_depth.cli import main; main(['evaluate', '--config', {str(tmp_path / 'bright.yaml')!r}])"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((out / "results.json").read_text())
    assert results["complete"] and results["head"] == "bright, factor 2.5" and results["verdict"] in done.stdout
    assert results["trials"][0]["metrics"]["I-AUROC"] >= 0 and results["trials"][0]["cost"]["encodes"] == 0
