"""``dino-depth tables``: published rows computed, resumed, submitted and written beside the published figures."""

import json
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from data_prep.synthetic import SynthConfig, synth
from dino_depth import cli
from dino_depth.anomaly import tables as made
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.tables import TablesConfig, chosen_rows, tables
from dino_depth.config import config_keys, find_config, parse
from dino_depth.errors import ConfigError, Interrupted

RAW = "raw-patches?patch=16"
SETTINGS = {
    "encoder.size": 64, "head.modmap.steps": 3, "head.modmap.image_to_depth": [8], "head.modmap.depth_to_image": [8],
    "metrics.resamples": 20,
}  # fmt: skip
WEIGHTS = {"dinov2": RAW, "dino_depth": RAW, "fpfh": RAW, "wrn101": "random:timm:no_such_network?layers=2-3"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("sim3d") / "tree"
    words = ["sim3d", "--out", str(root), "--categories", "2", "--size", "64", "--test_per_category", "2"]
    words += ["--workers", "1", "--sim3d.views", "3", "--sim3d.voxel", "0.03"]
    synth(parse(SynthConfig, words, "test", ("layout",)))
    return root


def config(tree, out, **changes):
    given = {
        "tables": ["modmap-1"],
        "methods": ["PatchCore DINO-v2"],
        "seeds": 2,
        "device": "cpu",
        "settings": SETTINGS,
    }
    changed = TablesConfig(str(out), **(given | changes))
    changed.data.root = str(tree)
    for key, value in WEIGHTS.items():
        setattr(changed.weights, key, value)
    return changed


class InProcess:
    """Runs a row's command here, as its process would, and counts."""

    calls: list = []

    def __init__(self, command, stdout, stderr, env):
        assert env["HF_HUB_OFFLINE"] == "1" and command[1:3] == ["-m", "dino_depth.cli"]
        self.command, self.stdout = command[3:], stdout
        InProcess.calls.append(self.command)

    def wait(self):
        import contextlib
        import io

        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = cli.main(list(self.command))
        self.stdout.write(said.getvalue().encode())
        return code


@pytest.fixture(scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "subprocess", SimpleNamespace(Popen=InProcess, STDOUT=subprocess.STDOUT))
        yield InProcess


@pytest.fixture(scope="module")
def found(tree, tmp_path_factory, quick):
    """Four tables; what a machine with these weights can compute of them."""
    out = tmp_path_factory.mktemp("tables")
    methods = ["PatchCore DINO-v2", "PatchCore WRN-101", "EfficientAD", "ModMap", "ModMap, max", "ModMap, 36 views"]
    wanted = config(tree, out, tables=["modmap-1", "modmap-8", "modmap-10", "sganet-2"], methods=methods)
    tables(wanted)
    return wanted, json.loads((out / "tables.json").read_bytes()), len(quick.calls)


def test_every_published_row_of_the_tables_can_be_told_and_parsed(tree, tmp_path):
    recipes = yaml.safe_load(find_config("tables").read_text())
    full = config(tree, tmp_path, tables=[], methods=[], settings={})
    full.weights.pdn = full.weights.point_mae = "file.pth"
    rows = chosen_rows(full)
    assert {row.method for row in rows} == recipes.keys()
    counts = {table: sum(row.table == table for row in rows) for table in {row.table for row in rows}}
    expected = {
        "modmap-1": 15, "modmap-2": 15, "modmap-3": 2, "modmap-4": 4, "modmap-6": 2, "modmap-7": 4, "modmap-8": 4,
        "modmap-9": 2, "modmap-10": 4, "sganet-2": 7, "sganet-3": 7, "sganet-7": 5, "sganet-8": 4, "sganet-9": 4,
    }  # fmt: skip
    assert counts == expected
    keys, configs = config_keys(EvaluateConfig), {}
    for row in rows:
        if row.words is None:
            assert row.table == "modmap-8", row
            continue
        assert row.words[row.words.index("--data.sim3d.setup") + 1] == row.setup
        assert {word[2:] for word in row.words if word.startswith("--")} - {"config"} <= set(keys)
        configs.setdefault(row.words[1], row)
    for row in configs.values():
        parsed = parse(EvaluateConfig, list(row.words), "test")
        for modality in ("image", "depth"):
            assert getattr(parsed.encoder, modality) == "" or recipes[row.method].get(modality) != ""
    places = {}
    for row in rows:
        assert places.setdefault(row.place, row.words) == row.words
    assert len({place.lower() for place in places}) == len(places)


def test_rows_of_equal_settings_are_computed_once_and_resumed(found, quick, tree):
    wanted, lines, calls = found
    rows = chosen_rows(wanted)
    assert {row.place for row in rows if row.method in ("ModMap", "ModMap, max")} == {"real2real/modmap_1_modmap"}
    assert calls == 3  # both PatchCores and ModMap
    quick.calls.clear()
    tables(wanted)
    assert [call[2] for call in quick.calls] == ["sim3d_patchcore"]  # that which failed
    assert json.loads((made.Path(wanted.out) / "tables.json").read_bytes()) == lines
    (row,) = (row for row in rows if row.method == "PatchCore DINO-v2" and row.table == "modmap-1")
    assert made._finished(made.Path(wanted.out), row)
    (more,) = chosen_rows(config(tree, wanted.out, seeds=3))
    assert more.place == row.place and not made._finished(made.Path(wanted.out), more)


def test_figures_stand_beside_the_published_ones(found):
    wanted, lines, _ = found
    published = {line["method"]: line for line in lines if line["category"] == "mean" and line["table"] == "modmap-1"}
    folder = made.Path(wanted.out) / "runs" / "real2real" / "modmap_1_patchcore_dino_v2"
    results = json.loads((folder / "results.json").read_bytes())
    (line,) = (
        line for line in lines
        if (line["table"], line["method"], line["metric"], line["category"])
        == ("modmap-1", "PatchCore DINO-v2", "V-AUPRO@1%", "mean")
    )  # fmt: skip
    assert line["value"] == results["mean"]["V-AUPRO@1%"]["value"] and line["low"] <= line["value"] <= line["high"]
    assert line["published"] == 0.671 and line["difference"] == pytest.approx(line["value"] - 0.671)
    assert line["instance_seconds"] > 0 and line["peak_memory_gib"] > 0
    for category in results["categories"]:
        (own,) = (
            line for line in lines
            if (line["table"], line["method"], line["metric"], line["category"])
            == ("modmap-1", "PatchCore DINO-v2", "V-AUPRO@1%", category)
        )  # fmt: skip
        values = [trial["metrics"]["V-AUPRO@1%"] for trial in results["trials"] if trial["category"] == category]
        assert own["value"] == pytest.approx(np.mean(values)) and own["published"] is None and "difference" not in own
    assert {"ModMap", "EfficientAD"} <= published.keys()
    page = (made.Path(wanted.out) / "tables.md").read_text()
    assert "## ModMap (Costanzino et al. 2026), table 10, real2real" in page and "do not compare" in page
    assert f"{line['value']:.3f} [{line['low']:.3f}, {line['high']:.3f}] / 0.671 ({line['difference']:+.3f})" in page
    assert "## SGANet (2026), table 2, real2real" in page and "/ 0.867 (" in page


def test_rows_that_cannot_run_say_why(found):
    wanted, lines, _ = found
    reasons = {line["method"]: line["reason"] for line in lines if "reason" in line}
    assert reasons.keys() == {"PatchCore WRN-101", "EfficientAD", "ModMap, 36 views"}
    assert reasons["EfficientAD"] == "no weights of the teacher: name them by --weights.pdn"
    assert reasons["ModMap, 36 views"] == "the data have no class sink_cabinet"
    assert reasons["PatchCore WRN-101"].startswith("cannot run: encoder random:timm:no_such_network")
    page = (made.Path(wanted.out) / "tables.md").read_text()
    assert all(f"- {method}: {reason}" in page for method, reason in reasons.items())
    assert all("value" not in line for line in lines if "reason" in line)


def test_a_row_runs_in_a_process_of_its_own_and_looks_for_no_network(tree, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(made, "subprocess", subprocess)
    wanted = config(tree, tmp_path / "out", methods=["PatchCore DINO-v2"], seeds=1)
    assert parse(TablesConfig, ["--out", "x", "--data.root", "y"], "test").online is False
    tables(wanted)
    lines = json.loads((tmp_path / "out" / "tables.json").read_bytes())
    assert all("value" in line for line in lines if line["category"] == "mean")
    assert "1 of 1 rows" in capsys.readouterr().out
    assert (tmp_path / "out" / "logs" / "real2real" / "modmap_1_patchcore_dino_v2.log").is_file()


def test_a_signal_ends_the_tables_and_an_array_takes_their_rows(tree, tmp_path, monkeypatch):
    commands = []

    class Ends:
        code = Interrupted.exit_code

        def __init__(self, command, stdout, stderr, env):
            commands.append(command[3:])
            stdout.write(b"job 7: writes the results\nqueue   squeue --jobs=6,7\ncancel  scancel 6 7\n")

        def wait(self):
            return self.code

    monkeypatch.setattr(made, "subprocess", SimpleNamespace(Popen=Ends, STDOUT=subprocess.STDOUT))
    with pytest.raises(Interrupted, match="real2real/modmap_1_patchcore_dino_v2 was interrupted"):
        tables(config(tree, tmp_path / "a"))
    Ends.code = 0
    tables(config(tree, tmp_path / "b", submit={"tasks": 4, "wait": False}))
    assert commands[1][:6] == ["submit", "--tasks", "4", "--wait", "false", "evaluate"]
    lines = json.loads((tmp_path / "b" / "tables.json").read_bytes())
    said = "submitted, and the same command writes the row when its jobs have ended: squeue --jobs=6,7"
    assert {line["reason"] for line in lines} == {said}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tables": ["modmap-5"]}, "tables: unknown 'modmap-5'"),
        ({"methods": ["PatchCor WRN-101"]}, "methods: unknown .*did you mean 'PatchCore WRN-101'"),
        ({"seeds": 0}, "seeds: must be at least 1"),
        ({"out": ""}, "--out is missing"),
    ],
)
def test_what_cannot_be_is_one_line(tree, tmp_path, change, message):
    wanted = config(tree, change.pop("out", tmp_path), **change)
    with pytest.raises(ConfigError, match=message):
        tables(wanted)
