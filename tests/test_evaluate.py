import csv
import json
import os
import re
import shutil
import signal
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import trimesh

from data_prep.synthetic import SynthConfig, synth
from dino_depth.anomaly import cells
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.dataset import Truth, Voxels
from dino_depth.anomaly.evaluate import evaluate
from dino_depth.anomaly.foreground import ForegroundConfig, foreground
from dino_depth.anomaly.geometry import back_project
from dino_depth.anomaly.metrics import aupro, auroc, pooled_aupro, voxel_regions
from dino_depth.anomaly.results import published_rows
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


def test_a_run_holds_every_cell_with_its_costs_and_baselines(whole):
    results = json.loads((whole / "results.json").read_text())
    assert results["complete"] and results["benchmark"] == "sim3d" and results["setup"] == "real2real"
    assert results["synthetic"] and results["head"] == "modmap, conditioning cross-view"
    keys = [(cell["category"], cell["seed"]) for cell in results["cells"]]
    assert keys == [(category, seed) for category in results["categories"] for seed in (0, 1)] and len(keys) == 4
    names = ["I-AUROC", "V-AUROC occupied", "V-AUPRO@1%", "V-AUPRO@1% occupied", "coverage"]
    assert results["metrics"] == names
    for cell in results["cells"]:
        # Each view once per modality, of the training instance and of those tested; the second seed finds them.
        assert cell["cost"]["encodes"] == (0 if cell["seed"] else 2 * VIEWS * (1 + TESTED))
        assert cell["cost"]["fits"] == 1
        assert {"encode", "fit", "score", "volume", "metrics"} <= set(cell["cost"]["seconds"])
        assert 0 < cell["cost"]["peak_memory_gib"] < 100
        assert list(cell["metrics"]) == names and set(cell["intervals"]) == set(names) - {"coverage"}
        for name, (low, high) in cell["intervals"].items():
            assert 0 <= low <= high <= 1, name
        rows = {"fraction missing", "mean intensity", "random scores", "constant on the object", "leak statistic"}
        assert rows < set(cell["baselines"])
        assert cell["baselines"]["constant on the object"]["I-AUROC"] == 0.5
        assert 0 <= cell["baselines"]["leak statistic"]["I-AUROC"] <= 1
        assert cell["baselines"]["perfect scorer"]["V-AUPRO@1% occupied"] > 0.3
        assert [instance["label"] for instance in cell["instances"]].count("anomalous") == TESTED // 2


def test_metrics_are_those_of_the_predictions(whole):
    for cell in json.loads((whole / "results.json").read_text())["cells"]:
        files = [read(whole / instance["file"]) for instance in cell["instances"]]
        labels = np.array([instance["label"] == "anomalous" for instance in cell["instances"]])
        scores = np.array([file["score"].max() for file in files])
        assert scores.tolist() == [instance["score"] for instance in cell["instances"]]
        assert cell["metrics"]["I-AUROC"] == pytest.approx(auroc(scores, labels))
        for suffix, empty in (("", None), (" occupied", 0)):
            located = [
                voxel_regions(
                    file["index"], file["score"], file["truth_index"], file["shape"],
                    labels=file["truth_component"], empty_normal=empty,
                )
                for file in files
            ]  # fmt: skip
            assert cell["metrics"][f"V-AUPRO@1%{suffix}"] == pytest.approx(pooled_aupro(located, limit=0.01))


def test_predictions_hold_maps_and_a_point_cloud(whole):
    cell = json.loads((whole / "results.json").read_text())["cells"][0]
    for instance in cell["instances"]:
        arrays = read(whole / instance["file"])
        assert arrays["image_map"].shape == arrays["depth_map"].shape == (VIEWS, 6, 6)
        assert arrays["image_map"].dtype == np.float16 and str(arrays["label"]) == instance["label"]
        assert float(arrays["instance_score"]) == instance["score"]
        path = (whole / instance["file"]).with_suffix(".ply")
        cloud = trimesh.load(path)
        assert np.allclose(cloud.vertices, arrays["origin"] + (arrays["index"] + 0.5) * arrays["size"], atol=1e-6)
        data = cloud.metadata["_ply_raw"]["vertex"]["data"]
        assert np.array_equal(np.asarray(data["scalar_score"]).ravel(), arrays["score"])
        assert (whole / "figures" / cell["category"] / f"{instance['name']}.npz").is_file()


def test_means_and_intervals_follow_from_the_cells(whole):
    results = json.loads((whole / "results.json").read_text())
    for name, mean in results["mean"].items():
        values = [cell["metrics"][name] for cell in results["cells"]]
        assert mean["value"] == pytest.approx(np.mean(values))
        if name != "coverage":
            assert mean["low"] <= mean["high"]
    for cell in results["cells"]:
        draws = read(whole / "predictions" / cell["category"] / f"seed{cell['seed']}" / "resamples.npz")
        for name, bounds in cell["intervals"].items():
            assert bounds == pytest.approx(np.quantile(draws[name], [0.025, 0.975]))


def test_tables_hold_the_same_figures(whole):
    results = json.loads((whole / "results.json").read_text())
    with open(whole / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for cell in results["cells"]:
        for name, value in cell["metrics"].items():
            wanted = {
                "category": cell["category"],
                "seed": str(cell["seed"]),
                "scorer": results["head"],
                "metric": name,
            }
            (found,) = [row for row in rows if wanted.items() <= row.items()]
            assert float(found["value"]) == value
    page = (whole / "results.md").read_text()
    assert f"{results['mean']['I-AUROC']['value']:.3f}" in page and "do not compare" in page
    assert "ModMap (Costanzino et al. 2026), table 1" in page


def test_a_killed_run_continues_to_the_same_results(whole, tree, tmp_path, monkeypatch):
    out, write, written = tmp_path / "run", cells._write, []

    def stopped(path, *arguments):
        written.append(path)
        if len(written) == TESTED + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        write(path, *arguments)

    monkeypatch.setattr(cells, "_write", stopped)
    with pytest.raises(Interrupted, match="SIGTERM.*again") as stop:
        run(tree, out, "--seeds", "2")
    assert stop.value.exit_code == 75 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    partial = json.loads((out / "results.json").read_text())
    assert not partial["complete"] and len(partial["cells"]) == 1
    run(tree, out, "--seeds", "2")
    continued = json.loads((out / "results.json").read_text())["cells"]
    assert [cell["cost"]["fits"] for cell in continued] == [1, 0, 1, 1]  # the cell that was stopped had its head
    # Four cells less the one that was finished, and the two instances before the signal.
    assert len(written) == TESTED + 2 + 3 * TESTED
    assert without_cost(out / "results.json") == without_cost(whole / "results.json")
    for path in sorted((whole / "predictions").rglob("*.*")):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    run(tree, out, "--seeds", "2")
    assert len(written) == TESTED + 2 + 3 * TESTED


def test_more_seeds_are_added_to_a_run_but_other_settings_refused(tree, copied, tmp_path, monkeypatch):
    root, folder = copied
    out = tmp_path / "run"
    first = run(root, out)["cells"]
    more = run(root, out, "--seeds", "2")
    assert more["cells"][0] == first[0] and len(more["cells"]) == 2
    with pytest.raises(ConfigError, match=r"head\.modmap\.pairs was 48 when it began and is 7 now"):
        run(root, out, "--head.modmap.pairs", "7")
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
    cells = {"": run(tree, tmp_path / "first", *shared)["cells"][0]}
    variants = {
        "sources 2": ["--head.modmap.sources", "2"],
        "sources target": ["--head.modmap.sources", "target"],
        "aggregate mean": ["--head.modmap.aggregate", "mean"],
        "modality image": ["--head.modmap.modality", "image"],
        "view_shift 1": ["--head.modmap.view_shift", "1"],
        "aggregation prod": ["--volume.aggregation", "prod"],
    }
    volumes = {read(tmp_path / "first" / cells[""]["instances"][0]["file"])["score"].tobytes()}
    for name, words in variants.items():
        results = run(tree, tmp_path / name, *shared, *words)
        cells[name] = results["cells"][0]
        assert results["head"] == f"modmap, conditioning cross-view, {name}"
        volumes.add(read(tmp_path / name / cells[name]["instances"][0]["file"])["score"].tobytes())
    assert [cell["cost"]["fits"] for cell in cells.values()] == [1] + [0] * len(variants)
    assert len(volumes) == len(cells)  # all score differently
    again = run(tree, tmp_path / "again", "--categories", "[angle_bracket]", *variants["sources 2"])["cells"][0]
    assert again["cost"]["fits"] == 1
    for key in ("metrics", "intervals", "instances"):
        assert cells[""][key] == json.loads((whole / "results.json").read_text())["cells"][0][key]
        assert again[key] == cells["sources 2"][key]
    other = run(tree, tmp_path / "other", *shared, "--head.modmap.steps", "11")["cells"][0]
    assert other["cost"]["fits"] == 1 and len(list((tmp_path / "heads").iterdir())) == 2


def test_one_model_serves_all_classes(tree, tmp_path, monkeypatch):
    fit, seen = cells.HEADS["modmap"].fit, []

    def counted(features, *arguments, **options):
        seen.append((len(features), options["classes"]))
        return fit(features, *arguments, **options)

    monkeypatch.setattr(cells.HEADS["modmap"], "fit", counted)
    results = run(tree, tmp_path / "run", "--head.multiclass", "true")
    assert seen == [(2, [0, 1])] and len(results["cells"]) == 2 and results["complete"]
    assert results["head"].endswith("one model of all classes")
    assert [cell["cost"]["fits"] for cell in results["cells"]] == [1, 0]


def test_patchcore_learns_from_renderings_and_needs_one_encoder_only(tree, tmp_path):
    arguments = ["--head.name", "patchcore", "--head.patchcore.modality", "depth", "--encoder.image", ""]
    results = run(tree, tmp_path / "run", *arguments, "--data.sim3d.setup", "synth2real")
    cell = results["cells"][0]
    assert cell["cost"]["encodes"] == VIEWS * (1 + TESTED) and results["setup"] == "synth2real"
    assert {row["table"] for row in results["published"]} == {2, 7}
    assert "depth_map" in read(tmp_path / "run" / cell["instances"][0]["file"])
    with pytest.raises(ConfigError, match=r"--encoder\.image is missing: modmap"):
        run(tree, tmp_path / "other", "--encoder.image", "")


@pytest.mark.parametrize("encoder", ["raw-patches", "fpfh", "random:dino-depth"])
def test_depth_encoders_without_weights_go_through_a_run_on_renderings(tree, tmp_path, encoder):
    if encoder == "fpfh":
        pytest.importorskip("open3d", reason="open3d is not installed", exc_type=ImportError)
    arguments = ["--encoder.image", "raw-patches", "--encoder.depth", encoder, "--encoder.size", "84"]
    results = run(tree, tmp_path / "run", *arguments, "--data.sim3d.setup", "synth2real", "--categories", "[spur_gear]")
    assert results["complete"] and results["setup"] == "synth2real" and results["head"].startswith("modmap")
    (cell,) = results["cells"]
    assert cell["cost"]["encodes"] == 2 * VIEWS * (1 + TESTED)
    scores = [read(tmp_path / "run" / instance["file"])["depth_map"] for instance in cell["instances"]]
    assert all(part.shape == (VIEWS, 6, 6) for part in scores) and np.std(np.stack(scores).astype(float)) > 1e-3


def test_36_views_go_through_a_run(tmp_path):
    words = ["sim3d", "--out", str(tmp_path / "tree"), "--categories", "1", "--size", "48", "--test_per_category", "2"]
    words += ["--workers", "1", "--sim3d.views", "36", "--sim3d.voxel", "0.02"]
    synth(parse(SynthConfig, words, "test", ("layout",)))
    results = run(tmp_path / "tree", tmp_path / "run", "--encoder.size", "48", "--head.modmap.sources", "9")
    (cell,) = results["cells"]
    assert cell["cost"]["encodes"] == 2 * 36 * 3 and 0 < cell["checks"]["overlap_train"] < 0.03
    assert read(tmp_path / "run" / cell["instances"][0]["file"])["image_map"].shape == (36, 3, 3)


class Known:
    """A head that scores pixels by a function of the sample, in a grid as fine as its views."""

    INFERENCE = frozenset()

    def __init__(self, of):
        self.of = of

    def fit(self, features, config, seed, device, *, classes=None):
        return self

    def state(self):
        return {}

    def score(self, head, features, *, class_index=0):
        return {"depth": self.of(features)}


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
    judge = cells._judge

    def revealed(session, held, _, seed):
        if benchmark == "sim3d":
            maps, truth = seen_truth(held)
            held = replace(held, read_truth=lambda: truth)
        else:
            maps = held.read_truth().masks[0][None]
            held.views[0].read_depth().valid[:] = True
        return judge(session, held, {"depth": torch.from_numpy(maps.astype(np.float32))}, seed)

    monkeypatch.setitem(cells.HEADS, "patchcore", Known(lambda features: torch.zeros(1, 1, 1)))
    monkeypatch.setattr(cells, "_judge", revealed)
    root, method = (tree, "largest") if benchmark == "sim3d" else (single, "valid")
    arguments = ["--data.name", benchmark, "--head.name", "patchcore", "--foreground.method", method]
    results = run(root, tmp_path / "run", *arguments, "--metrics.limits", "[0.3,0.01]")
    volume, pixels = ["V-AUROC occupied"], ["P-AUROC", "P-AUROC object"]
    for limit in ("30%", "1%"):
        volume += [f"V-AUPRO@{limit}{suffix}" for suffix in ("", " occupied")]
        pixels += [f"AUPRO@{limit}{suffix}" for suffix in ("", " object")]
    names = ["I-AUROC", *([*volume, "coverage"] if benchmark == "sim3d" else pixels)]
    for cell in results["cells"]:
        assert list(cell["metrics"]) == names
        assert list(cell["metrics"].values()) == pytest.approx([1.0] * len(names), abs=1e-9)
        for bounds in cell["intervals"].values():
            assert bounds == pytest.approx([1.0, 1.0], abs=1e-9)


def test_single_view_metrics_are_those_of_dense_maps(single, tmp_path, monkeypatch):
    kept, judge_view = [], cells.judge_view

    def recorded(held, maps, foreground, truth, *arguments):
        kept.append((maps, foreground, truth.masks[0], held.label))
        return judge_view(held, maps, foreground, truth, *arguments)

    monkeypatch.setattr(cells, "judge_view", recorded)
    arguments = ["--data.name", "mvtec3d", "--head.name", "patchcore", "--foreground.method", "plane"]
    results = run(single, tmp_path / "run", *arguments, "--metrics.limits", "[0.3]")
    found = results["cells"][0]
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


FAULTS = {
    no_test_instance: "no instance to test",
    no_good_instance: "need good and anomalous test samples, got 2 anomalous",
    no_image: r"_01_bad: view 3 has no rgb/3_2\.png",
    fewer_views: r"_real.* 3 views.* 4",
    broken_calibration: r"calibration\.json",
    broken_image: r"_02_good.*2_2\.png",
    nothing_measured: r"_02_good.*2\.npy",
    some_truth: "_02_bad: ground truth is there for some anomalous samples only",
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
    monkeypatch.setitem(cells.HEADS, "patchcore", Known(lambda features: maps))
    with pytest.raises(DataError, match="not finite in view"):
        run(copied[0], tmp_path / "run", "--head.name", "patchcore")


def test_without_ground_truth_only_instances_are_ranked(copied, tmp_path):
    root, folder = copied
    for path in [*folder.glob("*/gt.npz"), *folder.glob("*/mask")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    results = run(root, tmp_path / "run", "--volume.size_mm", "15")
    assert results["metrics"] == ["I-AUROC"] and results["mean"]["I-AUROC"]["value"] <= 1
    assert set(results["cells"][0]["baselines"]["random scores"]) == {"I-AUROC"}


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
        cell = run(tree, out, *arguments, "--categories", "[angle_bracket]")["cells"][0]
        parts = []
        for instance in cell["instances"]:
            file = read(out / instance["file"])
            if len(file["truth_index"]):
                part = (file["index"], file["score"], file["truth_index"], file["shape"])
                parts.append(voxel_regions(*part, labels=file["truth_component"]))
        assert len(parts) == TESTED // 2
        assert cell["metrics"]["V-AUPRO@1%"] == pytest.approx(pick(parts))


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
    assert {row["table"] for row in published_rows("eyecandies", "")} == {4, 5, 6}
    for benchmark, setup in (("sim3d", "real2real"), ("sim3d", "synth2real"), ("eyecandies", ""), ("mvtec3d", "")):
        groups = {}
        for row in published_rows(benchmark, setup):
            key = row["paper"], row["table"], row["method"], row["metric"]
            groups.setdefault(key, {})[row["category"]] = row["value"]
        for key, values in groups.items():
            mean = values.pop("mean", None)
            if mean is not None and values:
                assert np.mean(list(values.values())) == pytest.approx(mean, abs=0.0016), key
    rows = published_rows("sim3d", "real2real")
    wanted = {"table": 1, "method": "ModMap", "category": "mean", "metric": "V-AUPRO@1%"}
    (ours,) = [row for row in rows if wanted.items() <= row.items()]
    assert ours["value"] == 0.804
