"""Evaluation as a job array: what tasks do, what is submitted, and a real cluster of two nodes."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import test_slurm
import yaml
from slurm_cluster import running_cluster, unavailable
from test_slurm import environment_of, until

from data_prep.synthetic import SynthConfig, synth
from dino_depth.anomaly.config import EvaluateConfig, everywhere
from dino_depth.anomaly.evaluate import begin, compute, evaluate, finish, fits
from dino_depth.anomaly.results import Run
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError
from dino_depth.slurm.evaluate import deal, submit
from dino_depth.slurm.jobs import SubmitConfig
from dino_depth.slurm.submission import logs_beside, noted, wait
from dino_depth.slurm.submit import main

fake_slurm = test_slurm.fake_slurm  # a fixture
CLASSES = ("angle_bracket", "spur_gear")
ENCODERS = {"image": "raw-patches?patch=16", "depth": "raw-patches?patch=16", "size": 96}
# Enough steps for a task to be caught at.
SMALL = {"head": {"modmap": {"steps": 100, "image_to_depth": [16], "depth_to_image": [16]}}}
SMALL |= {"metrics": {"resamples": 50}, "seeds": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """Two classes in SiM3D's layout, four views of 64 pixels, two good and two anomalous instances each."""
    root = tmp_path_factory.mktemp("sim3d") / "tree"
    words = ["sim3d", "--out", str(root), "--categories", "2", "--size", "64", "--test_per_category", "4"]
    words += ["--workers", "1", "--sim3d.views", "4", "--sim3d.voxel", "0.015"]
    synth(parse(SynthConfig, words, "test", ("layout",)))
    return root


@pytest.fixture(scope="module")
def settings(tree, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("settings") / "small.yaml"
    path.write_text(yaml.safe_dump({"data": {"root": str(tree)}, "encoder": ENCODERS} | SMALL))
    return path


def configured(settings: Path, out: Path, *arguments: str) -> EvaluateConfig:
    return parse(EvaluateConfig, ["--config", str(settings), "--out", str(out), *arguments], "test")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory) -> Path:
    """What one process makes of two classes with two seeds."""
    out = tmp_path_factory.mktemp("whole") / "run"
    evaluate(configured(settings, out))
    return out


def results(out: Path) -> dict:
    """The results without what they cost."""
    found = json.loads((out / "results.json").read_text())
    for cell in found["cells"]:
        cell.pop("cost")
    return found


def predictions(out: Path) -> dict[str, bytes]:
    folders = (out / "predictions", out / "figures")
    return {str(p.relative_to(out)): p.read_bytes() for each in folders for p in each.rglob("*.*")}


def finished(out: Path) -> set[str]:
    return {path.relative_to(out / "cells").as_posix() for path in (out / "cells").glob("*/seed*.json")}


# What a task does


def test_heads_are_dealt_in_order_and_evenly():
    heads = [([name], seed) for name in "abc" for seed in range(3)]
    for tasks in (1, 2, 3, 4, 9, 100):
        shares = deal(heads, tasks)
        assert sum(shares, []) == heads and len(shares) == min(tasks, 9)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [{group[0] for group, _ in share} for share in deal(heads, 3)] == [{"a"}, {"b"}, {"c"}]


def test_shares_make_the_numbers_of_one_run(whole, settings, tmp_path):
    config = configured(settings, tmp_path / "run")
    _, categories = begin(config)
    first, second, third = deal(fits(config, categories), 3)
    compute(config, third)
    assert finished(tmp_path / "run") == {"spur_gear/seed0.json", "spur_gear/seed1.json"}
    # A task writes its own cells and no tables, which others would overwrite.
    assert not (tmp_path / "run" / "results.json").exists()
    compute(config, first)
    with pytest.raises(DataError, match=r"run: 1 of 4 cells are not computed \(angle_bracket seed 1\): run the same"):
        finish(config, categories)
    assert not results(tmp_path / "run")["complete"] and len(results(tmp_path / "run")["cells"]) == 3
    compute(config, second)
    finish(config, categories)
    assert results(tmp_path / "run") == results(whole)
    assert predictions(tmp_path / "run") == predictions(whole)


def test_a_plain_run_completes_what_tasks_have_left(settings, tmp_path, monkeypatch):
    """Typed with relative paths, which are the same folders."""
    out, few = tmp_path / "run", ("--seeds", "1", "--head.modmap.steps", "5")
    config = everywhere(configured(settings, out, *few))
    compute(config, [(["spur_gear"], 0)])
    before = (out / "cells" / "spur_gear" / "seed0.json").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    evaluate(configured(settings, Path("run"), *few, "--data.root", os.path.relpath(config.data.root)))
    assert (out / "cells" / "spur_gear" / "seed0.json").stat().st_mtime_ns == before
    assert results(out)["complete"] and len(results(out)["cells"]) == 2
    (out / "cells" / "spur_gear" / "seed1.json.tmp").write_bytes(b"{")  # as a kill in mid-write leaves it
    assert len(Run(config).cells) == 2
    (out / "cells" / "spur_gear" / "seed1.json").write_bytes(b"{")
    with pytest.raises(DataError, match=r"spur_gear/seed1\.json: no cell: "):
        Run(config)
    (out / "cells" / "spur_gear" / "seed1.json").unlink()
    Path("other").symlink_to(config.data.root)
    with pytest.raises(ConfigError, match=r"data\.root was"):
        evaluate(configured(settings, Path("run"), *few, "--data.root", "other"))


def test_one_model_of_all_classes_is_one_unit(settings, tmp_path):
    config = configured(settings, tmp_path / "run", "--head.multiclass", "true")
    config.head.modmap.steps = 5
    heads = fits(config, list(CLASSES))
    assert heads == [(list(CLASSES), 0), (list(CLASSES), 1)]
    compute(config, heads[1:])
    assert finished(tmp_path / "run") == {f"{name}/seed1.json" for name in CLASSES}
    with pytest.raises(DataError, match=r"2 of 4 cells .*angle_bracket seed 0, spur_gear seed 0\)"):
        finish(config, list(CLASSES))


def test_tasks_let_each_other_in_and_nobody_else(settings, tmp_path):
    config = configured(settings, tmp_path / "run")
    session, categories = begin(config)
    with session.run.held(shared=True):
        with session.run.held(shared=True), Run(config).held(shared=True):
            pass
        for refused in (evaluate, lambda config: finish(config, categories)):
            with pytest.raises(ConfigError, match="run is being written by another process"):
                refused(config)
    with session.run.held(), pytest.raises(ConfigError, match="is being written by another process"):
        compute(config, [(["spur_gear"], 0)])
    with pytest.raises(ConfigError, match="elsewhere: no evaluation was begun there"):
        finish(configured(settings, tmp_path / "elsewhere"), categories)


def test_paths_hold_in_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("export", "weights", "dino-depth"):
        Path(name).mkdir()
    given = parse(EvaluateConfig, ["--out", "run", "--data.root", "a/raw"], "test")
    given.encoder.depth, given.encoder.image = "export", "random:transformers:weights?mean_std=half"
    given.encoder.cache = "features"
    found = everywhere(given)
    assert (found.out, found.data.root, found.encoder.cache) == tuple(
        f"{tmp_path}/{name}" for name in ("run", "a/raw", "features")
    )
    assert found.encoder.depth == f"{tmp_path}/export"
    assert found.encoder.image == f"random:transformers:{tmp_path}/weights?mean_std=half"
    # What only looks like a folder that is here.
    for name in ("facebook/dinov2-base", "timm:weights", "random:dino-depth?seed=1", ""):
        given.encoder.depth = name
        assert everywhere(given).encoder.depth == name


# What is submitted


def scripts(folder: Path) -> dict[str, dict[str, str]]:
    """The options of every submitted script, by the name of its job."""
    found = {}
    for path in folder.glob("*.sh"):
        lines = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH --")]
        options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines)
        found[options["job-name"]] = options
    return found


def test_options_reach_sbatch_and_a_second_submission_is_refused(settings, tmp_path, fake_slurm, capsys):
    command = ["--tasks", "3", "--cpus-per-task", "2", "--gpus-per-task", "1", "evaluate", "--config", str(settings)]
    command += ["--out", f"{tmp_path}/run", "--device", "auto"]
    main(command)
    found = scripts(fake_slurm)
    array, last = found["evaluate-run"], found["evaluate-run-finish"]
    assert {"array": "0-2%3", "cpus-per-task": "2", "gpus-per-node": "1"}.items() <= array.items()
    assert "dependency" not in array and last["dependency"] == "afterany:1" and "gpus-per-node" not in last
    printed = capsys.readouterr().out
    assert "job 1: 4 of 4 cells, dealt to 3 tasks" in printed and "scancel 1 2" in printed
    assert array["error"].startswith(f"{tmp_path}/run.slurm/") and not (tmp_path / "run" / "results.json").exists()
    (fake_slurm / "queue").write_text("2\n")
    with pytest.raises(ConfigError, match="run is being written by the jobs 2: wait for them, or scancel 2"):
        main(command)


def test_only_missing_cells_are_submitted_and_none_where_all_are_there(settings, tmp_path, fake_slurm, capsys):
    config = everywhere(configured(settings, tmp_path / "run"))
    config.head.modmap.steps = 5
    heads = fits(config, list(CLASSES))
    compute(config, heads[:3])
    command = ["--tasks", "8", "evaluate", "--config", str(settings), "--out", config.out, "--head.modmap.steps", "5"]
    main(command)
    assert "1 of 4 cells, dealt to 1 tasks" in capsys.readouterr().out and len(scripts(fake_slurm)) == 2
    compute(config, heads[3:])
    main(command)
    assert "has all cells" in capsys.readouterr().out and len(list(fake_slurm.glob("*.sh"))) == 2
    assert results(tmp_path / "run")["complete"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--categories", "[spur_gaer]"], ConfigError, "unknown class 'spur_gaer'.*did you mean 'spur_gear'"),
        (["--data.root", "nowhere"], DataError, "nowhere"),
        (["--seeds", "0"], ConfigError, "seeds: must be at least 1"),
        (["--device", "cuda"], ConfigError, "device cuda needs --gpus-per-task 1 or more"),
        (["--encoder.depth", "no/folder/of/mine"], ConfigError, "no such folder"),
        (["--encoder.sise", "7"], ConfigError, "did you mean '--encoder.size'"),
    ],
)
def test_impossible_evaluations_are_refused_where_they_are_typed(
    settings,
    tmp_path,
    fake_slurm,
    arguments,
    error,
    message,
):
    with pytest.raises(error, match=message):
        main(["evaluate", "--config", str(settings), "--out", f"{tmp_path}/run", *arguments])
    assert not scripts(fake_slurm) and not (tmp_path / "run").exists()


# A real cluster


@pytest.fixture(scope="module")
def nodes() -> dict[str, str]:
    if reason := unavailable():
        pytest.skip(reason)
    with running_cluster() as environment:
        yield environment


@pytest.fixture
def cluster(nodes, monkeypatch):
    """Slurm's commands in this process reach a real cluster; starting Python for each takes seconds."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, nodes[name])


def computing(task: int) -> list[int]:
    """The process of a task of the array, which Slurm and submitit have started."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"submitit.core._submit" in command and not command[0].endswith((b"srun", b"slurmstepd:")):
            if f"SLURM_ARRAY_TASK_ID={task}\0".encode() in environment_of(int(process.name)):
                found.append(int(process.name))
    return found


def state(job: str) -> str:
    return subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True).stdout


def test_an_array_goes_on_at_its_time_limit_and_a_rerun_computes_what_a_killed_task_has_left(
    cluster, settings, whole, tmp_path
):
    out, words = tmp_path / "run", ["--config", str(settings), "--out", f"{tmp_path}/run"]
    last = submit(SubmitConfig(tasks=2), words)
    array = noted(logs_beside(out))[0]
    # Each task has two cells. Slurm's warning comes to the one after the first, and the other one is killed there.
    signals = {0: signal.SIGUSR2, 1: signal.SIGKILL}
    left = {task: until(lambda task=task: computing(task))[0] for task in signals}
    while left:
        for task in until(lambda: [each for each in left if f"{CLASSES[each]}/seed0.json" in finished(out)]):
            os.kill(left.pop(task), signals[task])
    with pytest.raises(
        DataError, match=r"1 of 4 cells are not computed \(spur_gear seed 1\): run the same command again"
    ):
        wait(last, logs_beside(out), "test", 1, "jobs", lambda: 0)
    assert "Restarts=1" in state(f"{array}_0") and "Restarts=0" in state(f"{array}_1")
    assert finished(out) == {"angle_bracket/seed0.json", "angle_bracket/seed1.json", "spur_gear/seed0.json"}
    before = {name: (out / "cells" / name).stat().st_mtime_ns for name in finished(out)}
    assert before["angle_bracket/seed0.json"] < before["angle_bracket/seed1.json"]
    submit(SubmitConfig(tasks=3, wait=True), words)
    assert all((out / "cells" / name).stat().st_mtime_ns == moment for name, moment in before.items())
    assert results(out) == results(whole)
    assert predictions(out) == predictions(whole)
    assert submit(SubmitConfig(), words) == ""
