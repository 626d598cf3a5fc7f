"""Jobs on a Slurm cluster: submitted through submitit, requeued when their time is up, followed without accounting.

Traps: submitit gives a step's ``srun`` no number of cores, and since Slurm 22.05 a step without one gets a single core;
a job that is submitted from inside a job inherits its ``SLURM_*`` variables; ``sacct``, from which submitit learns a
job's state, needs a database that not every cluster has, so ``squeue`` and ``scontrol`` are asked instead.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import UncompletedJobError
from submitit.helpers import DelayedSubmission, clean_env

from dino_depth.errors import ConfigError, Interrupted, ReportedError
from dino_depth.terminal import say

__all__ = ["Resumable", "SubmitConfig", "cancel", "minutes", "outcome", "queued", "require_slurm", "submit"]

# A job that has reached its time limit this often makes no progress in it.
MOST_TIMEOUTS = 20
OURS = {"array", "dependency", "error", "job-name", "kill-on-invalid-dep", "nodes", "ntasks-per-node", "open-mode",
        "output", "requeue", "signal"}  # fmt: skip


@dataclass
class SubmitConfig:
    """Run a command as jobs of a Slurm cluster.

    Attributes:
        tasks: jobs of the array among which the work is dealt.
        nodes: nodes of a pretraining.
        gpus_per_node: GPUs on each of them, with a process for each; 0 pretrains on CPUs, one process a node.
        cpus_per_task: cores of each job of an array, and with them its processes, or of each process of a pretraining;
            0 means 1, and ``data.workers`` more for a pretraining.
        gpus_per_task: GPUs of each job of an array.
        time: limit of each, as Slurm writes it: minutes, h:mm:ss or d-hh:mm:ss. A job that reaches it is requeued and
            goes on.
        warning: seconds before that limit at which a job is told: a step, and a checkpoint or what a task has begun,
            must fit into it.
        partition: where to run; empty: the cluster's default.
        account: whom to charge; empty: the cluster's default.
        constraint: features that a node must have.
        container: options of the pyxis plug-in without their ``--container-``, such as
            ``{image: /images/depth.sqsh, mounts: "/data:/data"}``; the jobs' commands then run in that container.
        python: how the nodes, or the container, start Python, such as ``apptainer exec --nv depth.sif python3``; empty:
            the interpreter that runs this command.
        sbatch: any other option of sbatch, such as ``{mem: 16G, qos: long, exclusive: true}``.
        wait: stay until the last job has ended, show progress, and end with its exit code.
    """

    tasks: int = 1
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int = 0
    gpus_per_task: int = 0
    time: str = "1:00:00"
    warning: int = 60
    partition: str = ""
    account: str = ""
    constraint: str = ""
    container: dict[str, bool | int | str] = field(default_factory=dict)
    python: str = ""
    sbatch: dict[str, bool | int | str] = field(default_factory=dict)
    wait: bool = False


@dataclass(frozen=True)
class Resumable:
    """A call that, started again when its job was requeued, skips what it has done before.

    It must be importable by name, not from ``__main__``. A reported failure is one line in the job's log, and its exit
    code is the job's.
    """

    function: Callable[..., Any]
    arguments: tuple

    def __call__(self):
        try:
            self.function(*self.arguments)
        except ReportedError as error:
            if isinstance(error, Interrupted) and _runs():
                # SIGTERM, yet Slurm has not ended the job: it announces preemption. submitit's handler requeues.
                os.kill(os.getpid(), signal.SIGUSR2)
            say(f"dino-depth: {' '.join(str(error).split())}", error=True)
            raise SystemExit(error.exit_code) from None

    def checkpoint(self) -> DelayedSubmission:
        """What submitit starts when the job was requeued."""
        return DelayedSubmission(self)


def _runs() -> bool:
    """Whether the job that this process belongs to is still meant to run."""
    # Not SLURM_JOB_ID: for one task of an array it is the whole array's.
    state = ["squeue", "--noheader", f"--jobs={submitit.JobEnvironment().job_id}", "--format=%T"]
    return subprocess.run(state, capture_output=True, text=True).stdout.strip() == "RUNNING"


def require_slurm(config: SubmitConfig):
    """Refuses impossible options, and a machine without Slurm.

    Raises:
        ConfigError: a value is out of range, or ``sbatch`` sets what is set here.
        ReportedError: Slurm's commands are missing or their controller does not answer.
    """
    counts = {"tasks": 1, "nodes": 1, "gpus_per_node": 0, "cpus_per_task": 0, "gpus_per_task": 0, "warning": 1}
    for key, least in counts.items():
        if getattr(config, key) < least:
            raise ConfigError(f"{key} must be {least} or more, got {getattr(config, key)}")
    minutes(config.time)
    if config.container and "image" not in config.container:
        raise ConfigError(f"container needs an image, got {', '.join(config.container)}")
    if taken := sorted(OURS & {key.replace("_", "-") for key in config.sbatch}):
        raise ConfigError(f"sbatch.{taken[0]} is set by submit itself: leave it out")
    _slurm("sinfo", "--noheader")


def minutes(time: str) -> int:
    """A limit in Slurm's notation, in whole minutes, rounded up.

    Raises:
        ConfigError: another notation, or no time at all.
    """
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise ConfigError(f"time must be minutes, mm:ss, h:mm:ss, d-hh, d-hh:mm or d-hh:mm:ss, got {time!r}")
    days, dash, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # After days come hours; without them a lone number, or the first of two, is minutes.
    if not dash and len(parts) < 3:
        parts.insert(0, 0)
    hours, whole, seconds = (parts + [0, 0])[:3]
    total = (int(days or 0) * 24 + hours) * 60 + whole + -(-seconds // 60)
    if not total:
        raise ConfigError(f"time must be more than nothing, got {time!r}")
    return total


def submit(
    config: SubmitConfig,
    logs: Path,
    name: str,
    calls: Sequence[Callable[[], Any]],
    gpus: int = 0,
    after: str = "",
    only_if_done: bool = False,
    **parameters: Any,
) -> str:
    """Submits the calls as one job array, or one call as a job, and returns its id.

    Args:
        logs: folder of submitit's files and of the jobs' output, on a file system that the nodes share.
        after: id of the job or array that must end first.
        only_if_done: it must also succeed, or these jobs are cancelled.
        parameters: submitit's own, where a job is not one process on one node.

    Raises:
        ReportedError: what Slurm says against it.
    """
    executor = submitit.SlurmExecutor(logs, max_num_timeout=MOST_TIMEOUTS)
    optional = {key: getattr(config, key) for key in ("partition", "account", "constraint") if getattr(config, key)}
    cores = config.cpus_per_task or 1
    step = [f"--cpus-per-task={cores}", *parameters.pop("srun_args", []), *_container(config)]
    if gpus:
        optional["gpus_per_node"] = gpus
    if after:
        optional["dependency"] = f"{'afterok' if only_if_done else 'afterany'}:{after}"
    optional |= {"nodes": 1, "ntasks_per_node": 1} | parameters
    additional = {**config.sbatch, "requeue": True, "kill_on_invalid_dep": "yes"}
    executor.update_parameters(
        job_name=name, cpus_per_task=cores, time=minutes(config.time), srun_args=step, signal_delay_s=config.warning,
        array_parallelism=len(calls), additional_parameters=additional, **optional,
    )  # fmt: skip
    # clean_env forgets where this Slurm's configuration is, too.
    kept = {key: os.environ[key] for key in ("SLURM_CONF",) if key in os.environ}
    with clean_env() if "SLURM_JOB_ID" in os.environ else nullcontext():
        os.environ.update(kept)
        try:
            jobs = executor.submit_array(calls)
        except (UncompletedJobError, OSError) as error:
            raise ReportedError(f"Slurm does not take the jobs: {' '.join(str(error).split())}") from None
    return jobs[0].job_id.partition("_")[0]


def _container(config: SubmitConfig) -> list[str]:
    """What ``srun`` is told of the container, and of Python in it."""
    options = ((f"--container-{key.replace('_', '-')}", value) for key, value in config.container.items())
    told = [name if value is True else f"{name}={value}" for name, value in options if value is not False]
    # submitit has an option for this, which it forgets in arrays: so its own interpreter is dropped here.
    return [*told, "sh", "-c", f'shift; exec {config.python} "$@"', "sh"] if config.python else told


def queued(jobs: Sequence[str]) -> list[str]:
    """Those of the jobs that have not ended."""
    waiting = set(_slurm("squeue", "--noheader", "--format=%F").split())
    return [job for job in jobs if job in waiting]


def cancel(jobs: Sequence[str]):
    """Ends jobs, whatever state they are in."""
    _slurm("scancel", *jobs)


def outcome(job: str) -> tuple[str, int] | None:
    """The final state and exit code of a job; None while it has not ended.

    A job that ended minutes ago is forgotten: its state is then ``UNKNOWN``.
    """
    if queued([job]):
        return None
    try:
        stated = _slurm("scontrol", "--oneliner", "show", "job", job)
    except ReportedError as error:
        if "Invalid job id" in str(error):
            return "UNKNOWN", 1
        raise
    state, code = (re.search(rf"\b{key}=(\w+)", stated)[1] for key in ("JobState", "ExitCode"))
    return state, int(code)


def _slurm(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise ReportedError(
            f"{command[0]} is not on this machine: submit where Slurm's commands are, or run the command itself here"
        ) from None
    if done.returncode:
        raise ReportedError(" ".join(done.stderr.split()) or f"{command[0]} fails with {done.returncode}")
    return done.stdout
