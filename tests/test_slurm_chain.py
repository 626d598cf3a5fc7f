"""The chain from raw data to results: as it is submitted, and on a real cluster of two nodes."""

from pathlib import Path

import pytest
import test_slurm
import test_slurm_evaluate
import yaml
from test_slurm import until
from test_slurm_evaluate import configured, results, scripts, state

from data_prep.synthetic import SynthConfig, synth
from dino_depth.anomaly.evaluate import begin
from dino_depth.config import parse, save_config
from dino_depth.errors import ConfigError, DataError
from dino_depth.pretrain.train import pretrain
from dino_depth.slurm import chain, evaluate, export, jobs
from dino_depth.slurm.chain import ChainConfig
from dino_depth.slurm.jobs import SubmitConfig
from dino_depth.slurm.submit import main

fake_slurm = test_slurm.fake_slurm
tree, settings = test_slurm_evaluate.tree, test_slurm_evaluate.settings
nodes, cluster = test_slurm_evaluate.nodes, test_slurm_evaluate.cluster


def chain_file(path: Path, **sections) -> list[str]:
    path.write_text(yaml.safe_dump({"out": str(path.parent / "made")} | sections))
    return ["chain", "--config", str(path)]


@pytest.fixture
def trained(tiny) -> Path:
    """The folder of a finished run."""
    tiny.train.steps = 2
    pretrain(tiny)
    return Path(tiny.out)


def deployed(settings: Path) -> dict:
    """An evaluation of an export for squares of 84 pixels: six patches a side, as the image encoder has."""
    encoder = {"image": "raw-patches?patch=16", "size": 96, "depth_size": 84}
    return {"config": str(settings), "encoder": encoder}


def test_stages_depend_on_each_other_and_read_what_the_one_before_makes(
    settings, trained, tmp_path, fake_slurm, capsys
):
    words = chain_file(
        tmp_path / "chain.yaml",
        export={"run": str(trained), "image_size": 84, "slurm": {"time": "10"}},
        evaluate=deployed(settings) | {"slurm": {"tasks": 2, "partition": "small"}},
    )
    main(["--account", "me", "--partition", "big", *words])
    found = scripts(fake_slurm)
    assert "dependency" not in found["export-export"] and found["export-export"]["time"] == "10"
    assert found["evaluate-evaluation-begin"]["dependency"] == "afterok:1"
    assert found["evaluate-evaluation"]["dependency"] == "afterok:2"
    # However the tasks end, but not where there was no encoder.
    assert found["evaluate-evaluation-finish"]["dependency"] == "afterany:3,afterok:2"
    assert {each["account"] for each in found.values()} == {"me"}
    assert [found[name]["partition"] for name in ("export-export", "evaluate-evaluation")] == ["big", "small"]
    assert all(each["kill-on-invalid-dep"] == "yes" for each in found.values())
    printed = capsys.readouterr().out
    assert "chain   export 1, evaluate 4" in printed and "scancel 1 2 3 4" in printed


def test_where_a_later_stage_cannot_be_submitted_no_job_remains(settings, trained, tmp_path, fake_slurm):
    (fake_slurm / "scancel").write_text('#!/bin/sh\necho "$@" > "$FAKE/cancelled"\n')
    (fake_slurm / "scancel").chmod(0o755)
    words = chain_file(
        tmp_path / "chain.yaml",
        export={"run": str(trained), "image_size": 84},
        evaluate=deployed(settings) | {"categories": ["spur_gaer"]},
    )
    with pytest.raises(ConfigError, match="^evaluate: categories: unknown class 'spur_gaer'"):
        main(words)
    assert (fake_slurm / "cancelled").read_text() == "1\n"


def test_what_an_earlier_encoder_made_is_not_taken_for_the_new_one(settings, trained, tmp_path, fake_slurm):
    (tmp_path / "export" / "transformers").mkdir(parents=True)
    words = ["--run", str(trained), "--out", f"{tmp_path}/export"]
    with pytest.raises(ConfigError, match="export was exported before what is trained now: remove it"):
        export.submit(SubmitConfig(), words, after="5")
    assert export.submit(SubmitConfig(), words) == ""
    begin(configured(settings, tmp_path / "evaluation"))
    words = ["--config", str(settings), "--out", f"{tmp_path}/evaluation", "--encoder.depth", f"{tmp_path}/new"]
    with pytest.raises(ConfigError, match="evaluation was begun with an earlier encoder: remove it"):
        evaluate.submit(SubmitConfig(), words, after="5")
    assert not scripts(fake_slurm)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({}, "the chain has no stage"),
        ({"prep": {}, "export": {}}, "has prep and export, but not pretrain between them"),
        ({"prepp": {}}, "unknown key 'prepp'; did you mean 'prep'"),
        ({"prep": {"max_sied": 5}}, "^prep: unknown key 'max_sied'; did you mean 'max_side'"),
        ({"pretrain": {"data": {"worker": 4}}}, "^pretrain: unknown key 'data.worker'; did you mean 'data.workers'"),
        ({"prep": {"slurm": {"task": 5}}}, "^prep.slurm: unknown key 'task'; did you mean 'tasks'"),
        ({"prep": {"slurm": {"time": 7200}}}, "^prep.slurm: time must be text, got 7200"),
        ({"prep": {"slurm": {"nodes": 2}}}, "^prep.slurm: nodes means nothing to prep"),
        ({"pretrain": {"slurm": {"tasks": 2}}}, "^pretrain.slurm: tasks means nothing to pretrain"),
        ({"prep": {"slurm": {"tasks": 0}}}, "^prep.slurm: tasks must be 1 or more"),
        (
            {"prep": {"config": "prep/split_d"}},
            "^prep: --config prep/split_d: no such file; did you mean 'prep/split_c'",
        ),
        ({"export": {"image_size": 84}}, "^export: --run is missing"),
        ({"out": "", "prep": {}}, "out is empty"),
    ],
)
def test_impossible_chains(tmp_path, fake_slurm, sections, message):
    with pytest.raises(ConfigError, match=message):
        main(chain_file(tmp_path / "chain.yaml", **sections))
    assert not scripts(fake_slurm)


def test_groups_of_settings_are_not_overwritten_from_the_command_line(tmp_path, fake_slurm):
    """One level deep a setting is replaced, and nothing beside it."""
    words = chain_file(tmp_path / "chain.yaml", prep={"dataset": "mvtec3d", "root": "nowhere", "max_side": 64})
    with pytest.raises(ConfigError, match=r"^--prep\.visa\.table=x: groups of a stage's settings"):
        main([*words, "--prep.visa.table=x"])
    with pytest.raises(ConfigError, match="^prep: max_side must be 0 or at least"):
        main([*words, "--prep.max_side", "1"])
    with pytest.raises(DataError, match="^prep: .*nowhere"):
        main([*words, "--prep.samples_per_shard", "9"])


def test_the_shipped_chain_is_complete_and_its_settings_are_known(tmp_path, fake_slurm):
    shipped = parse(ChainConfig, ["--config", "chain"], "test")
    shipped.out = str(tmp_path)
    stages = chain._stages(shipped, SubmitConfig(account="me"), tmp_path)
    assert [stage.name for stage in stages] == ["prep", "pretrain", "export", "evaluate"]
    assert {stage.slurm.account for stage in stages} == {"me"}
    assert [stage.slurm.tasks for stage in stages] == [50, 1, 1, 8]


# A real cluster


def test_a_stage_that_fails_cancels_those_after_it(cluster, settings, trained, tmp_path, capsys):
    words = chain_file(
        tmp_path / "chain.yaml",
        export={"run": str(trained), "image_size": 84, "shards": str(tmp_path / "nowhere")},
        evaluate=deployed(settings),
    )
    with pytest.raises(DataError, match="^export: .*nowhere"):
        main(["--wait", *words])
    submitted = capsys.readouterr().out.rpartition("scancel ")[2].split()
    until(lambda: not jobs.queued(submitted))
    states = [state(job) for job in submitted]
    assert "JobState=FAILED" in states[0] and len(states) == 4
    assert all("JobState=CANCELLED" in each and "Reason=DependencyNeverSatisfied" in each for each in states[1:])
    assert not (tmp_path / "made" / "evaluation").exists()


def test_the_chain_makes_results_of_raw_data(cluster, settings, tiny, tmp_path, monkeypatch, capsys):
    """And the same command submits nothing afterwards."""
    monkeypatch.chdir(tmp_path)
    words = ["mvtec3d", "--out", "raw", "--categories", "1", "--per_category", "8", "--test_per_category", "4"]
    synth(parse(SynthConfig, [*words, "--size", "64", "--workers", "1"], "test", ("layout",)))
    tiny.train.steps = 2
    save_config(tiny, tmp_path / "tiny.yaml")
    words = chain_file(
        tmp_path / "chain.yaml",
        prep={"dataset": "mvtec3d", "root": "raw", "samples_per_shard": 6, "slurm": {"tasks": 2}},
        pretrain={"config": "tiny.yaml"},
        export={"image_size": 84, "samples": 2},
        evaluate=deployed(settings) | {"categories": ["spur_gear"], "seeds": 1},
    )
    main(["--wait", *words])
    out = tmp_path / "made"
    found = results(out / "evaluation")
    assert found["complete"] and found["config"]["encoder"]["depth"] == str(out / "export")
    assert (out / "shards" / "manifest.json").is_file() and (out / "export" / "parity.json").is_file()
    assert yaml.safe_load((out / "run" / "config.yaml").read_text())["data"]["shards"] == [str(out / "shards")]
    capsys.readouterr()
    main(words)
    printed = capsys.readouterr().out
    assert printed.count("nothing is submitted") == 4 and "every stage was finished before" in printed
