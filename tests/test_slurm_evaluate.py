"""Evaluation as a job array: what tasks do, what is submitted, and a real cluster of two nodes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import test_slurm
import yaml
from slurm_cluster import running_cluster, unavailable
from test_slurm import environment_of, until

from data_prep.synthetic import SynthConfig, synth
from dino_depth.anomaly.config import EvaluateConfig, everywhere
from dino_depth.anomaly.evaluate import begin, compute, deal, evaluate, finish, instances
from dino_depth.anomaly.results import Run
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError
from dino_depth.slurm.evaluate import submit
from dino_depth.slurm.jobs import SubmitConfig
from dino_depth.slurm.submission import logs_beside, noted, wait
from dino_depth.slurm.submit import main

fake_slurm = test_slurm.fake_slurm  # a fixture
CLASSES = ("angle_bracket", "spur_gear")
ENCODERS = {"image": "raw-patches?patch=16", "depth": "raw-patches?patch=16", "size": 96}

SMALL = {"head": {"modmap": {"steps": 20, "image_to_depth": [16], "depth_to_image": [16]}}}
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
    for trial in found["trials"]:
        trial.pop("cost")
    return found


def predictions(out: Path) -> dict[str, bytes]:
    folders = (out / "predictions", out / "figures")
    return {str(p.relative_to(out)): p.read_bytes() for each in folders for p in each.rglob("*.*")}


def scored(out: Path) -> set[str]:
    """Instances that are scored, of trials that are not finished."""
    return {path.relative_to(out / "scored").as_posix() for path in (out / "scored").glob("*/*/*.npz")}


# What a task does


def test_instances_are_dealt_in_ranges_and_evenly():
    wanted = [(name, str(number)) for name in "abc" for number in range(3)]
    for tasks in (1, 2, 3, 4, 9, 100):
        shares = deal(wanted, tasks)
        assert sum(shares, []) == wanted and len(shares) == min(tasks, 9)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [{name for name, _ in share} for share in deal(wanted, 3)] == [{"a"}, {"b"}, {"c"}]


def test_ranges_of_instances_make_the_numbers_of_one_run(whole, settings, tmp_path):
    config = configured(settings, tmp_path / "run")
    session, categories = begin(config)
    first, second, third = deal(instances(session.benchmark, categories), 3)
    compute(config, third)
    assert scored(tmp_path / "run") == {f"spur_gear/seed{seed}/{name}.npz" for _, name in third for seed in (0, 1)}
    # A task writes its own instances and no tables, which others would overwrite.
    assert not (tmp_path / "run" / "results.json").exists()
    compute(config, first)
    left = 2 * len(second)
    with pytest.raises(
        DataError, match=rf"run: {left} of 16 instances are not scored \({second[0][0]}/.* seed 0, .*\): run"
    ):
        finish(config)
    assert not results(tmp_path / "run")["complete"] and results(tmp_path / "run")["trials"] == []
    compute(config, second)
    finish(config)
    assert results(tmp_path / "run") == results(whole)
    assert predictions(tmp_path / "run") == predictions(whole)
    assert scored(tmp_path / "run") == set()


def test_a_plain_run_completes_what_tasks_have_left(settings, tmp_path, monkeypatch):
    """Typed with relative paths, which are the same folders."""
    out, few = tmp_path / "run", ("--seeds", "1", "--head.modmap.steps", "5")
    config = everywhere(configured(settings, out, *few))
    session, categories = begin(config)
    share = deal(instances(session.benchmark, categories), 4)[2]
    compute(config, share)
    paths = [out / "predictions" / category / "seed0" / f"{name}.npz" for category, name in share]
    before = [path.stat().st_mtime_ns for path in paths]
    monkeypatch.chdir(tmp_path)
    evaluate(configured(settings, Path("run"), *few, "--data.root", os.path.relpath(config.data.root)))
    assert [path.stat().st_mtime_ns for path in paths] == before
    assert results(out)["complete"] and len(results(out)["trials"]) == 2
    (out / "trials" / "spur_gear" / "seed1.json.tmp").write_bytes(b"{")  # as a kill in mid-write leaves it
    assert len(Run(config).trials) == 2
    (out / "trials" / "spur_gear" / "seed1.json").write_bytes(b"{")
    with pytest.raises(DataError, match=r"spur_gear/seed1\.json: no trial: "):
        Run(config)
    (out / "trials" / "spur_gear" / "seed1.json").unlink()
    Path("other").symlink_to(config.data.root)
    with pytest.raises(ConfigError, match=r"data\.root was"):
        evaluate(configured(settings, Path("run"), *few, "--data.root", "other"))


def test_one_model_of_all_classes_is_fitted_once_for_all_ranges(settings, tmp_path):
    config = configured(settings, tmp_path / "run", "--head.multiclass", "true")
    config.head.modmap.steps = 5
    session, _ = begin(config)
    wanted = instances(session.benchmark, CLASSES)
    compute(config, wanted[4:])
    assert len(scored(tmp_path / "run")) == 8 and len(list((tmp_path / "run" / "heads").glob("*.pt"))) == 2
    compute(config, wanted[:3])
    with pytest.raises(
        DataError, match=r"2 of 16 instances are not scored \(angle_bracket/.* seed 0, angle_.* seed 1\)"
    ):
        finish(config)
    assert [trial["category"] for trial in results(tmp_path / "run")["trials"]] == ["spur_gear", "spur_gear"]
    assert len(list((tmp_path / "run" / "heads").glob("*.pt"))) == 2


def test_tasks_let_each_other_in_and_nobody_else(settings, tmp_path):
    config = configured(settings, tmp_path / "run")
    session, _ = begin(config)
    with session.run.held(shared=True):
        with session.run.held(shared=True), Run(config).held(shared=True):
            pass
        for refused in (evaluate, finish):
            with pytest.raises(ConfigError, match="run is being written by another process"):
                refused(config)
    with session.run.held(), pytest.raises(ConfigError, match="is being written by another process"):
        compute(config, [])
    with pytest.raises(ConfigError, match="elsewhere: no evaluation was begun there"):
        finish(configured(settings, tmp_path / "elsewhere"))


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
    assert "job 1: 8 of 8 instances, dealt to 3 tasks" in printed and "scancel 1 2" in printed
    assert array["error"].startswith(f"{tmp_path}/run.slurm/") and not (tmp_path / "run" / "results.json").exists()
    (fake_slurm / "queue").write_text("2\n")
    with pytest.raises(ConfigError, match="run is being written by the jobs 2: wait for them, or scancel 2"):
        main(command)


def test_only_missing_instances_are_submitted_and_none_where_all_are_there(settings, tmp_path, fake_slurm, capsys):
    config = everywhere(configured(settings, tmp_path / "run"))
    config.head.modmap.steps = 5
    session, _ = begin(config)
    wanted = instances(session.benchmark, CLASSES)
    compute(config, wanted[:7])
    command = ["--tasks", "8", "evaluate", "--config", str(settings), "--out", config.out, "--head.modmap.steps", "5"]
    main(command)
    assert "1 of 8 instances, dealt to 1 tasks" in capsys.readouterr().out and len(scripts(fake_slurm)) == 2
    compute(config, wanted[7:])
    main(command)
    assert "has all instances" in capsys.readouterr().out and len(list(fake_slurm.glob("*.sh"))) == 2
    assert results(tmp_path / "run")["complete"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--categories", "[spur_gaer]"], ConfigError, "unknown class 'spur_gaer'.*did you mean 'spur_gear'"),
        (["--data.root", "nowhere"], DataError, "nowhere"),
        (["--seeds", "0"], ConfigError, "seeds: must be at least 1"),
        (["--processes", "2"], ConfigError, "processes are of one machine: tasks deal out the instances here"),
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


def test_an_array_goes_on_at_its_time_limit_and_a_rerun_scores_what_a_killed_task_has_left(
    cluster, settings, whole, tmp_path
):
    out, words = tmp_path / "run", ["--config", str(settings), "--out", f"{tmp_path}/run"]
    last = submit(SubmitConfig(tasks=2), words)
    array = noted(logs_beside(out))[0]
    # Each task has the four instances of a class. Slurm's warning comes to the first, the second is killed.
    signals = {0: signal.SIGUSR2, 1: signal.SIGKILL}
    left = {task: until(lambda task=task: computing(task))[0] for task in signals}
    # They run for moments at a time, so that neither has scored all before it is seen to have scored one.
    while left:
        for process in left.values():
            os.kill(process, signal.SIGCONT)
        time.sleep(0.05)
        for process in left.values():
            os.kill(process, signal.SIGSTOP)
        for task in [each for each in left if any(CLASSES[each] in name for name in scored(out))]:
            os.kill(left[task], signals[task])
            os.kill(left.pop(task), signal.SIGCONT)
    with pytest.raises(
        DataError, match=r"[1-7] of 16 instances are not scored \(spur_gear/.* seed ..*\): run the same command again"
    ):
        wait(last, logs_beside(out), "test", 1, "jobs", lambda: 0)
    assert "Restarts=1" in state(f"{array}_0") and "Restarts=0" in state(f"{array}_1")
    assert {path.parent.name for path in (out / "trials").glob("*/seed*.json")} == {"angle_bracket"}
    before = {name: (out / "scored" / name).stat().st_mtime_ns for name in scored(out)}
    submit(SubmitConfig(tasks=3, wait=True), words)
    assert before and scored(out) == set()
    assert results(out) == results(whole)
    assert predictions(out) == predictions(whole)
    assert submit(SubmitConfig(), words) == ""
