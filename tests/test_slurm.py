"""Data preparation on Slurm: on a real cluster of two nodes where one can be started, and by submitit without it."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import submitit
from slurm_cluster import running_cluster, unavailable

from data_prep.manifest import digest_file
from data_prep.output import PROGRESS
from data_prep.shards import PrepareConfig, begin, finish, plan, prepare, write_share
from data_prep.workers import available_cores
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError, Interrupted, ReportedError
from dino_depth.slurm import prep
from dino_depth.slurm.jobs import Resumable, minutes
from dino_depth.slurm.submit import main

SUBMIT = Path(__file__).resolve().parents[1] / "slurm" / "submit.py"
SHARDS = 12
SECONDS = 90


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file."""
    return {str(path.relative_to(folder)): digest_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def config(root: Path, out: Path, **values) -> PrepareConfig:
    return PrepareConfig("folder", str(root), str(out), **{"workers": 1, "samples_per_shard": 3} | values)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """34 small maps."""
    root = tmp_path_factory.mktemp("small") / "raw"
    root.mkdir()
    for index in range(34):
        depth = np.random.default_rng(index).uniform(0.5, 0.7, (20, 24))
        np.save(root / f"{index:03}.npy", depth.astype(np.float32))
    return root


@pytest.fixture(scope="module")
def expected(raw, tmp_path_factory) -> dict[str, str]:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("expected") / "out"
    prepare(config(raw, out))
    return contents(out)


# What is submitted


@pytest.mark.parametrize(
    ("time", "expected"),
    [("90", 90), ("0:30", 1), ("10:00", 10), ("2:00:00", 120), ("2:00:01", 121), ("1-0", 1440), ("1-2:03:04", 1564)],
)
def test_limits_are_read_as_slurm_reads_them(time, expected):
    assert minutes(time) == expected


@pytest.mark.parametrize("time", ["", "2h", "1:2:3:4", "-5", "1-", "0:00", "0"])
def test_what_is_no_limit_is_refused(time):
    with pytest.raises(ConfigError, match="time must be"):
        minutes(time)


def test_tasks_own_every_shard_once_and_always_the_same(raw, tmp_path):
    planned = plan(config(raw, tmp_path / "out"))
    for tasks in (1, 5, 100):
        shares = [[task.index for task in call.arguments[1]] for call in prep.deal(planned, tasks)]
        assert len(shares) == min(tasks, SHARDS)
        assert sorted(sum(shares, [])) == list(range(SHARDS))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert shares == [[task.index for task in call.arguments[1]] for call in prep.deal(planned, tasks)]


def test_only_missing_and_damaged_shards_are_dealt_again(raw, tmp_path):
    planned = plan(config(raw, tmp_path / "out"))
    begin_in(planned)
    prep.deal(planned, 3)[1]()
    assert [task.index for task in prep.deal(planned, 1)[0].arguments[1]] == [0, 2, 3, 5, 6, 8, 9, 11]
    (tmp_path / "out" / "depth-000004.tar").write_bytes(b"")
    assert [len(call.arguments[1]) for call in prep.deal(planned, 100)] == [1] * 9


def begin_in(planned):
    (planned.out / PROGRESS).mkdir(parents=True)
    begin(planned)


@pytest.mark.parametrize("tasks", [1, 5])
def test_submitted_calls_make_the_bytes_of_one_process(raw, expected, tmp_path, tasks):
    """The very calls, in processes of their own that submitit starts on this machine."""
    planned = plan(config(raw, tmp_path / "out"))
    begin_in(planned)
    executor = submitit.LocalExecutor(tmp_path / "logs")
    executor.update_parameters(timeout_min=2)
    for job in executor.submit_array(prep.deal(planned, tasks)):
        job.result()
    executor.submit(Resumable(finish, (planned,))).result()
    assert contents(planned.out) == expected


def test_a_requeued_call_starts_from_its_beginning():
    call = Resumable(write_share, ("a plan", "a share"))
    again = call.checkpoint()
    assert again.function is call and not again.args and not again.kwargs


def test_a_failed_call_ends_its_job_with_one_line_and_its_exit_code(raw, tmp_path, capsys):
    planned = plan(config(raw, tmp_path / "out"))
    begin_in(planned)
    prep.deal(planned, 12)[7]()
    with pytest.raises(SystemExit) as stop:
        Resumable(finish, (planned,))()
    assert stop.value.code == DataError.exit_code
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"dino-depth: {planned.out}: 11 of 12 shards are not written (depth-000000.tar, ")


FAKES = {
    "sinfo": "", "srun": "", "squeue": 'cat "$FAKE/queue"', "scontrol": 'sh "$FAKE/job"',
    "sbatch": 'cp "$1" "$FAKE/$$.sh"; sh "$FAKE/answer"',
}  # fmt: skip


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> Path:
    """Commands that only look like Slurm's: ``sbatch`` keeps the script and does what the file ``answer`` says."""
    folder = tmp_path / "fake"
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("")
    (folder / "answer").write_text("echo Submitted batch job $(ls $FAKE/*.sh | wc -l)")
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def script(folder: Path, word: str) -> dict[str, str]:
    """The options of the one submitted script that contains ``word``, and its command."""
    (text,) = (text for text in (path.read_text() for path in folder.glob("*.sh")) if word in text)
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SB" in line)
    return options | {"srun": next(line for line in text.splitlines() if line.startswith("srun"))}


def test_options_reach_sbatch(raw, tmp_path, fake_slurm, monkeypatch, capsys):
    monkeypatch.chdir(raw.parent)
    options = (
        "--tasks 5 --cpus-per-task 4 --gpus-per-task=1 --time 2:00:00 --partition big --account me --constraint a100 "
        "--warning 300"
    )
    command = ["prep", "folder", "--root", "raw", "--out", f"{tmp_path}/out", "--samples-per-shard", "3"]
    main([*options.split(), "--sbatch", "{mem: 16G, exclusive: true}", *command])
    array, last = script(fake_slurm, "--array"), script(fake_slurm, "--dependency")
    shown = {
        "time": "120", "cpus-per-task": "4", "gpus-per-node": "1", "partition": "big", "account": "me", "mem": "16G",
        "constraint": "a100", "exclusive": "", "requeue": "", "array": "0-4%5", "job-name": "prep-out",
        "signal": "USR2@300",
    }  # fmt: skip
    assert shown.items() <= array.items()
    # Since Slurm 22.05 a step has one core unless srun itself is told.
    assert "--cpus-per-task=4" in array["srun"] and "--cpus-per-task=1" in last["srun"]
    assert last["dependency"] == "afterany:1" and last["requeue"] == "" and last["account"] == "me"
    assert "gpus-per-node" not in last
    assert array["error"].startswith(f"{tmp_path}/out.slurm/")
    assert (tmp_path / "out.slurm" / "jobs.txt").read_text() == "1 2"
    printed = capsys.readouterr().out
    assert "job 1: 12 of 12 shards, dealt to 5 tasks" in printed and "scancel 1 2" in printed


def test_a_second_submission_is_refused_while_the_first_is_queued(raw, tmp_path, fake_slurm):
    command = ["prep", "folder", "--root", str(raw), "--out", f"{tmp_path}/out"]
    main(command)
    (fake_slurm / "queue").write_text("1\n7\n2\n")
    with pytest.raises(ConfigError, match="is being written by the jobs 1 2: wait for them, or scancel 1 2"):
        main(command)
    (fake_slurm / "queue").write_text("7\n")
    main(command)


def test_where_every_shard_is_written_only_the_last_job_is_submitted(raw, tmp_path, fake_slurm, capsys):
    planned = plan(config(raw, tmp_path / "out"))
    begin_in(planned)
    prep.deal(planned, 1)[0]()
    main(["--tasks", "3", "prep", "folder", "--root", str(raw), "--out", f"{tmp_path}/out", "--samples-per-shard", "3"])
    assert script(fake_slurm, "prep-out-finish").keys().isdisjoint({"array", "dependency"})
    assert "checking 12 shards" in capsys.readouterr().out and len(list(fake_slurm.glob("*.sh"))) == 1


def test_paths_hold_in_any_working_directory(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    given = parse(PrepareConfig, ["--out", "out", "--roots.visa", "a/visa", "--pseudo_depth.model", "model"], "test")
    found = prep._everywhere(given)
    assert (found.out, found.roots) == (f"{tmp_path}/out", {"visa": f"{tmp_path}/a/visa"})
    assert found.pseudo_depth.model == f"{tmp_path}/model"
    hub = PrepareConfig("visa", "visa", "s3://bucket/shards", staging="staged")
    found = prep._everywhere(hub)
    assert (found.out, found.staging, found.pseudo_depth) == (hub.out, f"{tmp_path}/staged", hub.pseudo_depth)


@pytest.mark.parametrize(
    ("gpus", "device", "expected"), [(0, "auto", "cpu"), (2, "auto", "cuda"), (2, "cuda", "cuda"), (2, "cpu", "cpu")]
)
def test_images_become_depth_on_what_the_tasks_have(raw, tmp_path, fake_slurm, monkeypatch, gpus, device, expected):
    """Whether the machine where the command is typed has a GPU does not matter."""

    def planned(config, device):
        raise ReportedError(f"device {device}")

    monkeypatch.setattr(prep, "plan", planned)
    command = ["--gpus-per-task", str(gpus), "prep", "visa", "--root", str(raw), "--pseudo_depth.device", device]
    with pytest.raises(ReportedError, match=f"device {expected}$"):
        main([*command, "--out", f"{tmp_path}/out"])


@pytest.mark.parametrize(
    ("job", "log", "error", "message"),
    [
        (
            "echo JobState=FAILED ExitCode=3:0 DerivedExitCode=0:0",
            "dino-depth: no depth-1.tar",
            DataError,
            "^no depth-1",
        ),
        ("echo JobState=CANCELLED ExitCode=0:15", "", ReportedError, "job 2 ended as CANCELLED; see .*/2_0_log.err"),
        ("echo error: Invalid job id specified >&2; exit 1", "", ReportedError, "job 2 ended as UNKNOWN"),
        ("echo error: Socket timed out >&2; exit 1", "", ReportedError, "^error: Socket timed out$"),
    ],
)
def test_waiting_ends_as_the_last_job_does(raw, tmp_path, fake_slurm, job, log, error, message):
    command = ["--wait", "prep", "folder", "--root", str(raw), "--out", f"{tmp_path}/out"]
    (fake_slurm / "job").write_text(job)
    if log:
        (tmp_path / "out.slurm").mkdir()
        (tmp_path / "out.slurm" / "2_0_log.err").write_text(f"prep: 1/2\n{log}\nsrun: error: Exited\n")
    with pytest.raises(error, match=message) as raised:
        main(command)
    assert type(raised.value) is error


def test_who_stops_waiting_stops_no_job(raw, tmp_path, fake_slurm, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    (fake_slurm / "queue").write_text("2")
    monkeypatch.setattr(time, "sleep", interrupt)
    with pytest.raises(Interrupted, match="the jobs go on: squeue --jobs=2"):
        main(["--wait", "prep", "folder", "--root", str(raw), "--out", f"{tmp_path}/out"])


def test_slurms_own_words_are_shown(raw, tmp_path, fake_slurm):
    (fake_slurm / "answer").write_text("echo 'sbatch: error: invalid account' >&2; exit 1")
    with pytest.raises(ReportedError, match="sbatch: error: invalid account") as raised:
        main(["prep", "folder", "--root", str(raw), "--out", f"{tmp_path}/out"])
    assert raised.value.exit_code == 1 and "\n" not in str(raised.value)


def test_without_slurm_it_is_one_line(raw, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ReportedError, match="sinfo is not on this machine") as raised:
        main(["prep", "folder", "--root", str(raw), "--out", f"{tmp_path}/out"])
    assert raised.value.exit_code == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to run"),
        (["--wait"], "name what to run"),
        (["--tasks", "2", "prap"], "did you mean 'prep'"),
        (["--task", "2", "prep"], "did you mean '--tasks'"),
        (["--tasks", "0", "prep", "folder", "--root", "x", "--out", "y"], "tasks must be 1 or more, got 0"),
        (["--sbatch", "{array: 5}", "prep", "folder"], "sbatch.array is set by submit itself"),
        (["prep", "folder", "--rot", "x"], "did you mean '--root'"),
        (["prep", "folder", "--root", "x"], "out is empty"),
        (["prep", "folder", "--root", "x", "--pseudo_depth.device", "cuda"], "needs --gpus-per-task"),
    ],
)
def test_impossible_submissions(fake_slurm, arguments, message):
    with pytest.raises(ConfigError, match=message):
        main(arguments)


def test_a_task_starts_as_many_processes_as_it_has_cores(monkeypatch):
    """Also where Slurm does not bind it to them."""
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert available_cores() == 8
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert available_cores() == 3


# A real cluster


@pytest.fixture(scope="module")
def cluster() -> dict[str, str]:
    if reason := unavailable():
        pytest.skip(reason)
    with running_cluster() as environment:
        yield environment


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Enough work for a task to be caught at: 120 names of eleven large maps."""
    root = tmp_path_factory.mktemp("large") / "raw"
    root.mkdir()
    for index in range(120):
        path = root / f"{index:03}.npy"
        if index < 11:
            np.save(path, np.random.default_rng(index).uniform(0.5, 0.7, (1024, 1024)).astype(np.float32))
        else:
            path.hardlink_to(root / f"{index % 11:03}.npy")
    return root


@pytest.fixture(scope="module")
def large_expected(large, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("large_expected") / "out"
    prepare(config(large, out, samples_per_shard=10, workers=2))
    digests = contents(out)
    shutil.rmtree(out)
    return digests


@pytest.fixture
def out(tmp_path) -> Iterator[Path]:
    """Where a test writes a quarter of a gigabyte."""
    yield tmp_path / "out"
    shutil.rmtree(tmp_path / "out", ignore_errors=True)


class Submission:
    """A submission as a user types it, with paths relative to where it is typed."""

    def __init__(self, environment: dict[str, str], root: Path, out: Path, options: str):
        self.environment, self.out = environment, out
        command = [sys.executable, str(SUBMIT), *options.split(), "prep", "folder", "--samples-per-shard", "10"]
        command += ["--root", os.path.relpath(root, out.parent), "--out", out.name]
        self.process = subprocess.Popen(
            command, cwd=out.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def end(self) -> tuple[int, str, str]:
        """Its exit code, what it printed and the last line of its errors and progress."""
        printed, said = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, printed, (said.splitlines() or [""])[-1]

    def slurm(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def writers(self, task: int) -> list[int]:
        """The processes of a task that write a shard at this moment."""
        processes = [int(path.name.split(".")[-2]) for path in (self.out / PROGRESS).glob("depth-*.tmp")]
        return [each for each in processes if f"SLURM_ARRAY_TASK_ID={task}\0".encode() in environment_of(each)]

    def jobs(self) -> list[str]:
        path = self.out.with_name(f"{self.out.name}.slurm") / "jobs.txt"
        return until(lambda: path.exists() and path.read_text().split())

    def ended(self, job: str) -> bool:
        return job not in self.slurm("squeue", "--noheader", "--format=%F").split()

    def restarts(self, task: int) -> str:
        shown = self.slurm("scontrol", "--oneliner", "show", "job", f"{self.jobs()[0]}_{task}")
        return shown.partition("Restarts=")[2].split()[0]


def environment_of(process: int) -> bytes:
    """What a living process was started with; nothing of a dead one."""
    try:
        return Path(f"/proc/{process}/environ").read_bytes()
    except OSError:
        return b""


def until(condition: Callable[[], object]) -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.02)
    return found


def test_an_array_over_two_nodes_makes_the_bytes_of_one_process(cluster, large, large_expected, out):
    # Somebody who submits from inside another job has its variables around.
    inside = {"SLURM_JOB_ID": "1", "SLURM_GPUS_PER_NODE": "3"}
    submission = Submission(cluster | inside, large, out, "--tasks 4 --wait")
    code, printed, line = submission.end()
    assert code == 0, line
    assert "12 of 12 shards, dealt to 4 tasks" in printed and f"{out} is finished" in printed
    assert contents(out) == large_expected
    shown = submission.slurm("scontrol", "--oneliner", "show", "job", submission.jobs()[0])
    assert "NodeList=n1" in shown and "NodeList=n2" in shown and shown.count("JobState=COMPLETED") == 4
    code, printed, _ = Submission(cluster, large, out, "--tasks 4").end()
    assert code == 0 and "was finished before: nothing is submitted" in printed


def test_after_kill_9_a_rerun_writes_just_what_is_missing(cluster, large, large_expected, out):
    submission = Submission(cluster, large, out, "--tasks 2 --wait")
    os.kill(until(lambda: submission.writers(1))[0], signal.SIGKILL)
    code, _, line = submission.end()
    rows = {path.stem for path in (out / PROGRESS).glob("*.tar.json")}
    first = min({f"depth-{index:06}.tar" for index in range(SHARDS)} - rows)
    assert code == DataError.exit_code
    assert f"{SHARDS - len(rows)} of {SHARDS} shards are not written ({first}" in line
    assert len(rows) >= SHARDS / 2
    written = {name: (out / name).stat() for name in rows}
    code, printed, line = Submission(cluster, large, out, "--tasks 100 --wait").end()
    assert code == 0, line
    missing = SHARDS - len(written)
    assert f"{missing} of {SHARDS} shards, dealt to {missing} tasks" in printed
    assert contents(out) == large_expected
    for name, before in written.items():
        after = (out / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def interrupt_both(submission: Submission, first: list[str], second: list[str]):
    """Runs a command of Slurm on each of two tasks in mid-shard, and sees that they end and are started again."""
    for task, command in enumerate((first, second)):
        writers = until(lambda task=task: submission.writers(task))
        submission.slurm(*command, f"{submission.jobs()[0]}_{task}")
        until(lambda writers=writers: not any(map(environment_of, writers)))
    code, _, line = submission.end()
    assert code == 0, line
    assert [submission.restarts(task) for task in (0, 1)] == ["1", "1"]


def test_time_limit_and_preemption_end_the_workers_and_requeue(cluster, large, large_expected, out):
    """Slurm's warning before the limit, and the SIGTERM with which it begins preemption, in pools of two workers."""
    submission = Submission(cluster, large, out, "--tasks 2 --cpus-per-task 2 --wait")
    interrupt_both(submission, ["scancel", "--signal=USR2"], ["scancel", "--signal=TERM"])
    assert contents(out) == large_expected
    # Python's own process for semaphores must live as well; where it does not, it says so here.
    assert "Traceback" not in (out.with_name("out.slurm") / f"{submission.jobs()[0]}_0_0_log.err").read_text()


def test_requeued_tasks_need_no_rerun_and_keep_others_out(cluster, large, large_expected, out):
    submission = Submission(cluster, large, out, "--tasks 2 --wait")
    until(lambda: submission.writers(0) and submission.writers(1))
    code, _, line = Submission(cluster, large, out, "--tasks 2").end()
    assert code == ConfigError.exit_code and "is being written" in line
    with pytest.raises(ConfigError, match="is being written by another process"):
        prepare(config(large, out, samples_per_shard=10))
    interrupt_both(submission, ["scontrol", "requeue"], ["scancel", "--signal=USR2"])
    assert contents(out) == large_expected


def test_a_cancelled_array_stays_cancelled_and_a_plain_run_completes_it(cluster, large, large_expected, out):
    submission = Submission(cluster, large, out, "--tasks 2 --cpus-per-task 2 --partition main")
    assert submission.end()[0] == 0
    array, last = submission.jobs()
    until(lambda: submission.writers(0))
    submission.slurm("scancel", array)
    until(lambda: submission.ended(last))
    assert submission.ended(array) and submission.restarts(0) == "0"
    said = (out.with_name("out.slurm") / f"{last}_0_log.err").read_text()
    assert f"of {SHARDS} shards are not written" in said
    prepare(config(large, out, samples_per_shard=10, workers=2))
    assert contents(out) == large_expected


def test_a_refused_job_is_one_line_with_slurms_words(cluster, large, out):
    code, _, line = Submission(cluster, large, out, "--partition nowhere").end()
    assert code == 1 and "invalid partition specified: nowhere" in line
