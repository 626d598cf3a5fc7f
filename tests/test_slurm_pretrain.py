"""Pretraining on Slurm: its job's script and ranks by themselves, and on a real cluster of two nodes."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout, suppress
from pathlib import Path

import pytest
import torch
from slurm_cluster import running_cluster, unavailable
from test_slurm import SECONDS, SUBMIT, environment_of, fake_slurm, script, until  # noqa: F401 - a fixture

from dino_depth import checkpoint
from dino_depth.config import PretrainConfig, parse, save_config
from dino_depth.errors import ConfigError, DataError, GateError, Interrupted
from dino_depth.slurm import pretrain
from dino_depth.slurm.pretrain import MOST_FAILURES, Rank
from dino_depth.slurm.submission import logs_beside, noted
from dino_depth.slurm.submit import main

STEPS = 120
SMALL = f"""
--data.workers 1 --data.resident false --crops.global_size 42 --crops.local_size 14 --crops.local_crops 2
--model.dim 32 --model.depth 2 --model.heads 2 --model.drop_path 0.25
--loss.prototypes 32 --loss.hidden 32 --loss.bottleneck 16 --optim.warmup 2
--train.batch 8 --train.steps {STEPS} --train.checkpoint_every 10 --train.log_every 1 --train.device cpu
--health.every 40 --health.target_entropy 1 --health.used 0
"""


@pytest.fixture
def settings(tiny, tmp_path, monkeypatch) -> Path:
    """A configuration file with paths relative to where it is used."""
    monkeypatch.chdir(tmp_path)
    tiny.out, tiny.data.shards = "run", os.path.relpath(tiny.data.shards)
    tiny.data.workers, tiny.train.device = 3, "auto"
    save_config(tiny, tmp_path / "tiny.yaml")
    return tmp_path / "tiny.yaml"


def checkpoints(run: Path, *steps: int):
    for step in steps:
        checkpoint.checkpoint_path(run, step).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.checkpoint_path(run, step).touch()


# What is submitted


def test_options_reach_sbatch_and_srun(settings, tmp_path, fake_slurm, capsys):  # noqa: F811
    options = "--nodes 4 --gpus-per-node 8 --time 12:00:00 --partition big --account me --constraint h100"
    container = ["--container", "{image: /i.sqsh, mounts: '/data:/data', mount_home: true, writable: false}"]
    more = [*container, "--python", "nice python3", "--sbatch", "{mem: 0, exclusive: true}"]
    main([*options.split(), *more, "pretrain", "--config", "tiny.yaml", "--train.batch", "32", "--loss.koleo_weight=0"])
    found = script(fake_slurm, "pretrain-run")
    shown = {
        "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8", "time": "720", "partition": "big", "account": "me",
        "constraint": "h100", "mem": "0", "exclusive": "", "requeue": "", "job-name": "pretrain-run",
        "cpus-per-task": "4", "signal": "USR2@60", "open-mode": "append",
    }  # fmt: skip
    assert shown.items() <= found.items() and "array" not in found
    told = "--cpus-per-task=4 --kill-on-bad-exit=1 --wait=0 --container-image=/i.sqsh --container-mounts=/data:/data "
    told += "--container-mount-home sh -c 'shift; exec nice python3 \"$@\"' sh "
    assert told in found["srun"]
    assert found["error"].startswith(f"{tmp_path}/run.slurm/")
    printed = capsys.readouterr().out
    assert f"job 1: {tmp_path}/run on 4 nodes, 32 processes\n" in printed
    for command in ("squeue --jobs=1", "scancel 1", f"{tmp_path}/run.slurm/1*_log.err", f"{tmp_path}/run/metrics"):
        assert command in printed


def test_a_job_and_its_successor_are_not_submitted_twice(settings, tmp_path, fake_slurm, capsys):  # noqa: F811
    command = ["pretrain", "--config", "tiny.yaml"]
    main(command)
    (fake_slurm / "queue").write_text("1\n")
    with pytest.raises(ConfigError, match="run is being written by the jobs 1: wait for them, or scancel 1"):
        main(command)
    (fake_slurm / "queue").write_text("")
    checkpoints(tmp_path / "run", 4)
    (tmp_path / "run" / "config.yaml").touch()
    main(command)
    assert "1 processes, from step 4\n" in capsys.readouterr().out
    checkpoints(tmp_path / "run", 8)
    main(command)
    assert "run was finished before: nothing is submitted" in capsys.readouterr().out
    assert len(list(fake_slurm.glob("*.sh"))) == 2


@pytest.mark.parametrize(
    ("options", "arguments", "error", "message"),
    [
        ("--nodes 3", "", ConfigError, "train.batch 8 must divide by train.accumulate 1 times 3 processes"),
        ("--gpus-per-node 16", "", ConfigError, "times 16 processes"),
        ("--nodes 0", "", ConfigError, "nodes must be 1 or more, got 0"),
        ("", "--train.device cuda", ConfigError, "train.device cuda needs --gpus-per-node 1 or more"),
        ("", "--train.batches 8", ConfigError, "did you mean '--train.batch'"),
        ("", "--data.shards nowhere", DataError, "nowhere has no manifest.json"),
        ("", "--out full", ConfigError, "full: folder is not empty and holds no run"),
        ("--tasks 4", "", ConfigError, "tasks means nothing to pretrain: it takes nodes and gpus_per_node"),
        ("--gpus-per-task 1", "", ConfigError, "gpus_per_task means nothing to pretrain"),
        ("--container.mounts /a:/a", "", ConfigError, "container needs an image, got mounts"),
        ("--sbatch.nodes 2", "", ConfigError, "sbatch.nodes is set by submit itself"),
    ],
)
def test_impossible_submissions(settings, tmp_path, fake_slurm, options, arguments, error, message):  # noqa: F811
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(error, match=message):
        main([*options.split(), "pretrain", "--config", "tiny.yaml", *arguments.split()])
    assert not list(fake_slurm.glob("*.sh"))


def test_an_array_takes_no_nodes(fake_slurm):  # noqa: F811
    with pytest.raises(ConfigError, match="nodes means nothing to prep: it takes tasks and gpus_per_task"):
        main(["--nodes", "2", "prep", "folder", "--root", "x", "--out", "out"])


@pytest.mark.parametrize(("gpus", "given", "device"), [(0, "auto", "cpu"), (2, "auto", "cuda"), (2, "cpu", "cpu")])
def test_a_run_holds_in_any_working_directory_and_continues_what_it_finds(tmp_path, monkeypatch, gpus, given, device):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start").mkdir()
    config = PretrainConfig(out="run", init_from="start")
    config.data.shards, config.train.device = ["a", "s3://bucket/shards"], given
    found = pretrain._everywhere(config, gpus)
    assert (found.out, found.init_from, found.resume) == (f"{tmp_path}/run", f"{tmp_path}/start", True)
    assert (found.data.shards, found.data.cache) == ([f"{tmp_path}/a", "s3://bucket/shards"], "")
    assert found.train.device == device
    config.init_from = "someone/encoder"
    assert pretrain._everywhere(config, gpus).init_from == "someone/encoder"


# The job's script


class Script:
    """A submitted script, run with an ``srun`` that ends as it is told."""

    def __init__(self, folder: Path, run: Path):
        self.folder, self.run, self.logs = folder, run, logs_beside(run)
        (self.path,) = folder.glob("*.sh")
        (folder / "srun").write_text('#!/bin/sh\nsh "$FAKE/step"\n')
        (folder / "scontrol").write_text('#!/bin/sh\necho "$@" > "$FAKE/asked"\n')
        (folder / "queue").write_text("RUNNING\n")

    def end(self, code: int, noted: str = "") -> tuple[int, str, str]:
        """Its exit code, what it says and what it asks of Slurm, after what ``srun`` and the first rank say."""
        (self.folder / "noted").write_text(noted)
        copied = f'cp "$FAKE/noted" {shlex.quote(str(self.logs))}/17_end; ' if noted else ""
        (self.folder / "step").write_text(f"{copied}exit {code}\n")
        asked = self.folder / "asked"
        asked.unlink(missing_ok=True)
        environment = os.environ | {"SLURM_JOB_ID": "17"}
        ended = subprocess.run(["bash", self.path], capture_output=True, text=True, env=environment)
        return ended.returncode, ended.stderr, asked.read_text() if asked.exists() else ""


@pytest.fixture
def job(settings, tmp_path, fake_slurm) -> Script:  # noqa: F811
    # A name that a shell would take apart.
    main(["pretrain", "--config", "tiny.yaml", "--out", "a 'run"])
    return Script(fake_slurm, tmp_path / "a 'run")


def test_a_stopped_run_is_requeued_as_often_as_it_is_stopped(job):
    checkpoints(job.run, 4, 12)
    for _ in range(2 * MOST_FAILURES):
        code, said, asked = job.end(137, "75\nrun: stopped after step 12 by SIGUSR2\n")
        assert (code, asked) == (75, "requeue 17\n")
        assert said.startswith("dino-depth: run: stopped after step 12 by SIGUSR2\nrequeued; goes on after ")
        assert "checkpoint step-00000012.pt" in said


@pytest.mark.parametrize("kind", [ConfigError, DataError, GateError])
def test_a_deliberate_end_is_final_and_keeps_its_exit_code(job, kind):
    """Although ``srun`` reports the other ranks, which it killed."""
    code, said, asked = job.end(137, f"{kind.exit_code}\nrank 3 on n1: it's (no) good\n")
    assert (code, said, asked) == (kind.exit_code, "dino-depth: rank 3 on n1: it's (no) good\n", "")
    assert job.end(0) == (0, "", "")


def test_failures_without_progress_are_counted(job):
    checkpoints(job.run, 4)
    for _ in range(MOST_FAILURES - 1):
        assert job.end(137)[2] == "requeue 17\n"
    checkpoints(job.run, 8)
    for _ in range(MOST_FAILURES - 1):
        assert job.end(1, "1\nrank 1 on n2: it died\n")[2] == "requeue 17\n"
    code, said, asked = job.end(137)
    assert (code, asked) == (137, "") and "srun ended with exit code 137" in said
    shutil.rmtree(job.run)
    assert job.end(137)[2] == "requeue 17\n"


def test_a_cancelled_job_stays_cancelled_although_its_script_still_runs(job):
    (job.folder / "queue").write_text("COMPLETING\n")
    assert job.end(137)[::2] == (137, "") and job.end(75)[::2] == (75, "")


# One process of a run


@pytest.fixture
def rank(tmp_path, monkeypatch) -> Callable[..., Rank]:
    """A rank of two nodes with two processes each, whose training ends as it is told."""

    def make(number: int, outcome: Exception | None = None, restarts: int = 0, job: int = 17) -> Rank:
        values = {
            "JOB_ID": job, "NTASKS": 4, "JOB_NUM_NODES": 2, "NODEID": number // 2, "JOB_NODELIST": "n[1-2]",
            "PROCID": number, "LOCALID": number % 2, "RESTART_COUNT": restarts, "LAUNCH_NODE_IPADDR": "10.0.0.1",
        }  # fmt: skip
        for name, value in values.items():
            monkeypatch.setenv(f"SLURM_{name}", str(value))
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
        for number in before:  # as submitit does
            signal.signal(number, lambda *_: None)

        def train(_):
            assert signal.getsignal(signal.SIGUSR2) == signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            if outcome:
                raise outcome

        monkeypatch.setattr(pretrain, "pretrain", train)
        return Rank(PretrainConfig(), tmp_path)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    with monkeypatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")
        yield make
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_rank_joins_the_others(rank):
    rank(3)()
    shown = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}
    assert shown.items() <= os.environ.items()


def test_jobs_and_restarts_that_may_meet_on_a_node_use_different_ports(rank):
    ports = set()
    for job in (17, 18, 19, 500):
        for restarts in range(5):
            rank(0, job=job, restarts=restarts)()
            ports.add(int(os.environ["MASTER_PORT"]))
    assert len(ports) == 20 and min(ports) >= 20000 and max(ports) < 32000


def test_the_first_reason_counts_and_other_ranks_do_not_end_rank_0(rank, tmp_path, capsys):
    assert rank(1, Interrupted("stopped after step 3"))() is None
    assert not (tmp_path / "17_end").exists()
    with pytest.raises(SystemExit) as ended:
        rank(0, Interrupted("stopped after step 3"))()
    assert ended.value.code == 75 and (tmp_path / "17_end").read_text() == "75\nstopped after step 3\n"
    (tmp_path / "17_end").unlink()
    with pytest.raises(SystemExit) as ended:
        rank(2, DataError("a.tar: cut\nshort"))()
    assert ended.value.code == 3
    with pytest.raises(RuntimeError, match="gone"):
        rank(0, RuntimeError("a peer is gone"))()
    code, reason = (tmp_path / "17_end").read_text().splitlines()
    assert code == "3" and re.fullmatch(r"rank 2 on \S+: a.tar: cut short", reason)
    assert capsys.readouterr().err == f"dino-depth: {reason}\n"


# A real cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    if reason := unavailable():
        pytest.skip(reason)
    with running_cluster() as environment:
        yield environment


class Run:
    """A run of two processes on two nodes, as a user submits it, and what a test does to it."""

    def __init__(self, environment: dict[str, str], settings: Path, name: str):
        self.environment, self.settings = environment, settings
        self.path, self.id = settings.parent / name, ""

    def command(self, options: str, *arguments: str) -> list[str]:
        """What the user types, in the folder of the settings."""
        words = ["--time", "10", "--cpus-per-task", "1", *options.split(), "pretrain"]
        return [*words, "--config", self.settings.name, "--out", self.path.name, *arguments]

    def submit(self, options: str = "--nodes 2", *arguments: str) -> str:
        """Submits without the seconds in which a process starts, and returns what is printed."""
        printed = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
            for name in ("SLURM_CONF", "PATH"):
                patch.setenv(name, self.environment[name])
            patch.chdir(self.settings.parent)
            main(self.command(options, *arguments))
        return self.noted(printed.getvalue())

    def noted(self, printed: str) -> str:
        """What is printed, whose job is from now on the one that is meant."""
        if found := re.match(r"job (\d+): ", printed):
            self.id = found[1]
        return printed

    def slurm(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def shown(self, key: str) -> str:
        return re.search(rf"\b{key}=(\S*)", self.slurm("scontrol", "--oneliner", "show", "job", self.id))[1]

    def step(self) -> int:
        """The last step of which a measurement is written."""
        with suppress(FileNotFoundError, IndexError, ValueError):
            return json.loads((self.path / "metrics.jsonl").read_text().splitlines()[-1])["step"]
        return 0

    def goes_on(self, since: int) -> int:
        """Waits until some steps after ``since`` are done, and returns how many there are."""
        return until(lambda: self.step() if self.step() >= since + 4 else 0)

    def comes_back(self, restarts: int):
        """Waits until the job was requeued, and not more often, and runs again.

        Hurried by ``scontrol update StartTime=now`` it may fail for the end of its earlier script.
        """
        until(lambda: self.shown("Restarts") == str(restarts))
        until(lambda: self.shown("JobState") == "RUNNING")

    def ends_soon(self):
        """Sets the limit to the next minute that is more than the half minute away in which Slurm looks at it."""
        hours, minutes, seconds = map(int, self.shown("RunTime").split(":"))
        limit = -(-(60 * (60 * hours + minutes) + seconds + 40) // 60)
        self.slurm("scontrol", "update", f"JobId={self.id}", f"TimeLimit={limit}")

    def ranks(self) -> dict[str, int]:
        """The process of each node that trains; those that load its data were started after it."""
        found = {}
        for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda folder: -int(folder.name)):
            environment = environment_of(int(folder.name))
            with suppress(OSError):
                python = Path(os.readlink(folder / "exe")).name.startswith("python")
                if python and f"SLURM_JOB_ID={self.id}\0".encode() in environment:
                    found[re.search(rb"SLURMD_NODENAME=(\w+)", environment)[1].decode()] = int(folder.name)
        return found

    def log(self) -> str:
        return (self.path / "run.log").read_text()

    def finish(self) -> dict:
        """The last state of the finished run, each of whose steps was measured once."""
        until(lambda: self.shown("JobState") not in ("RUNNING", "PENDING", "COMPLETING"))
        assert self.shown("JobState") == "COMPLETED", self.errors()
        steps = [json.loads(line)["step"] for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, STEPS + 1))
        return checkpoint.load(checkpoint.checkpoints(self.path)[-1])

    def errors(self) -> str:
        return "".join(path.read_text() for path in sorted(logs_beside(self.path).glob(f"{self.id}_*_log.err")))


@pytest.fixture(scope="module")
def training(shards, tmp_path_factory) -> Path:
    """Some seconds of training, in a folder of its own."""
    folder = tmp_path_factory.mktemp("slurm")
    config = parse(PretrainConfig, ["--config", "pretrain_demo", *SMALL.split()], "test")
    config.data.shards = os.path.relpath(shards, folder)
    save_config(config, folder / "tiny.yaml")
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def expected(cluster, training) -> dict:
    """The last state of a run that nothing interrupts."""
    run = Run(cluster, training, "uninterrupted")
    command = [sys.executable, str(SUBMIT), *run.command(f"--nodes 2 --wait --python {sys.executable}")]
    ended = subprocess.run(command, cwd=training.parent, env=cluster, capture_output=True, text=True, timeout=SECONDS)
    assert ended.returncode == 0, ended.stderr
    printed = run.noted(ended.stdout)
    assert f"job {run.id}: {run.path} on 2 nodes, 2 processes\n" in printed and f"{run.path} is finished" in printed
    assert run.shown("NodeList") == "n[1-2]" and run.shown("Restarts") == "0"
    assert "finished before: nothing is submitted" in run.submit()
    return run.finish()


def assert_same(state: dict, expected: dict):
    for network in ("student", "teacher"):
        assert state[network].keys() == expected[network].keys()
        assert all(torch.equal(weights, expected[network][key]) for key, weights in state[network].items()), network


def warned(process: int) -> bool:
    """Whether a process that stands still has got SIGUSR2, or is gone, as Slurm lets it go on sometimes."""
    with suppress(FileNotFoundError):
        status = Path(f"/proc/{process}/status").read_text()
        return any(int(word, 16) >> (signal.SIGUSR2 - 1) & 1 for word in re.findall(r"(?:Sig|Shd)Pnd:\s*(\w+)", status))
    return True


def test_the_time_limit_twice(cluster, training, expected):
    """Slurm's own limit, which it looks at twice a minute: the ranks stand still until it has warned them."""
    run, step = Run(cluster, training, "limited"), 0
    run.submit()
    for restarts in (1, 2):
        step = run.goes_on(step)
        ranks = run.ranks().values()
        for process in ranks:
            os.kill(process, signal.SIGSTOP)
        run.ends_soon()
        until(lambda ranks=ranks: all(map(warned, ranks)))
        for process in ranks:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)
        until(lambda restarts=restarts: run.shown("Restarts") == str(restarts))
        run.slurm("scontrol", "update", f"JobId={run.id}", "TimeLimit=10")
        run.comes_back(restarts)
        assert run.log().count("by SIGUSR2; continue") == restarts
    assert_same(run.finish(), expected)
    assert run.shown("Restarts") == "2" and "Traceback" not in run.errors()


def test_requeue_and_preemption(cluster, training, expected):
    run = Run(cluster, training, "requeued")
    run.submit()
    step = run.goes_on(0)
    run.slurm("scontrol", "requeue", run.id)
    run.comes_back(1)
    run.goes_on(step)
    # How preemption with a grace time begins.
    run.slurm("scancel", "--signal=TERM", run.id)
    run.comes_back(2)
    assert_same(run.finish(), expected)
    assert run.shown("Restarts") == "2" and run.log().count("by SIGTERM; continue") == 2


def test_lost_processes_and_a_cancelled_job(cluster, training, expected):
    run = Run(cluster, training, "lost")
    run.submit()
    step = run.goes_on(0)
    os.kill(run.ranks()["n2"], signal.SIGKILL)
    run.comes_back(1)
    step = run.goes_on(step)
    run.slurm("scancel", f"{run.id}.0")
    run.comes_back(2)
    step = run.goes_on(step)
    run.slurm("scancel", run.id)
    until(lambda: not run.slurm("squeue", "--noheader", f"--jobs={run.id}"))
    assert run.shown("JobState") == "CANCELLED" and run.shown("Restarts") == "2" and not run.ranks()
    assert ", from step " in run.submit()
    assert_same(run.finish(), expected)


def test_a_cancelled_run_comes_back_on_another_number_of_nodes_and_processes(cluster, training, expected):
    run = Run(cluster, training, "elastic")
    printed = run.submit("--nodes 2 --gpus-per-node 2", "--train.device", "cpu")
    assert f"{run.path} on 2 nodes, 4 processes" in printed
    run.goes_on(0)
    run.slurm("scancel", run.id)
    until(lambda: not run.slurm("squeue", "--noheader", f"--jobs={run.id}"))
    assert "on 1 nodes, 1 processes, from step " in run.submit("--nodes 1")
    found, wanted = run.finish()["teacher"], expected["teacher"]
    apart = sum((found[key] - wanted[key]).square().sum() for key in wanted).sqrt()
    size = sum(wanted[key].square().sum() for key in wanted).sqrt()
    # Sums are rounded in another order; a state twenty steps older is 3e-4 away.
    assert apart <= 1e-4 * size


def test_settings_that_changed_end_the_job_for_good_with_their_exit_code(cluster, training, expected):
    """On two processes of one node."""
    run = Run(cluster, training, "uninterrupted")
    with pytest.raises(ConfigError, match="train.steps was 120 when .* began and is 130 now"):
        run.submit("--gpus-per-node 2 --wait", "--train.steps", "130", "--train.device", "cpu")
    run.id = noted(logs_beside(run.path))[0]
    assert run.shown("JobState") == "FAILED" and run.shown("ExitCode") == "2:0" and run.shown("Restarts") == "0"
    assert run.shown("NumTasks") == "2" and run.shown("NodeList") in ("n1", "n2")
