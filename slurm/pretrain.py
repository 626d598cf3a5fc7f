"""``pretrain`` as one job of many processes, which comes back until the run is finished.

Each task of the job is a rank. The job's script, not a rank, decides what follows when they have all ended, since it
also lives when they are killed:

- Stopped between two steps by Slurm's warning before the time limit (SIGUSR2) or by a preemption (SIGTERM): requeued.
- A process was killed, a node lost or a rank gave up: requeued too, until it fails ``MOST_FAILURES`` times without a
  new checkpoint in between.
- Done, or ended by settings, data or the collapse gate: that is final, and the exit code is the job's.
- ``scancel`` and ``scontrol requeue`` end the script itself: nothing is added to what was asked for.

RUN.slurm/JOB_failures    the newest checkpoint at each failure
RUN.slurm/JOB_end         exit code and reason of the first rank that ended early

Traps: submitit's own handler of SIGUSR2 ends rank 0 in mid-step. ``srun`` knows only the highest exit code of all
ranks, which is that of killed ones. Unless it is told, it lets ranks wait for a dead one; and, on some clusters, it
ends rank 0 while that writes the checkpoint, some seconds after another rank has ended.
"""

import os
import shlex
import signal
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import submitit

from dino_depth.checkpoint import checkpoints
from dino_depth.config import PretrainConfig, parse
from dino_depth.errors import ConfigError, Interrupted, ReportedError
from dino_depth.pretrain.train import check_settings, pretrain
from dino_depth.shards import DepthShards
from dino_depth.slurm import jobs
from dino_depth.slurm.jobs import SubmitConfig
from dino_depth.slurm.submission import absolute, announce, logs_beside, note, refuse_second, wait
from dino_depth.storage import RemotePath, location
from dino_depth.terminal import say

__all__ = ["Rank", "submit"]

MOST_FAILURES = 3
# Below the ports that Linux hands out by itself.
PORTS = range(20000, 32000)
BEGIN = "rm -f {end}"
END = """\
code=$?
reason="srun ended with exit code $code: a process was killed or did not start"
if [ $code -eq 0 ]; then exit 0; fi
if [ -s {end} ]; then {{ read -r code; read -r reason; }} < {end}; fi
newest=$(ls {run}/checkpoints 2> /dev/null | grep '^step-[0-9]*\\.pt$' | tail -n 1)
echo "dino-depth: $reason" >&2
case $code in
    {final}) exit $code ;;
    {interrupted}) ;;
    *)
        echo "${{newest:-none}}" >> {failures}
        if [ "$(grep -cFx "${{newest:-none}}" {failures})" -ge {most} ]; then exit $code; fi ;;
esac
# Cancelled in this moment, the job must stay so.
if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    echo "requeued; goes on after checkpoint ${{newest:-none}}" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code"""


def submit(config: SubmitConfig, arguments: list[str], after: str = "") -> str:
    """Submits a run, or what is left of it.

    Args:
        after: id of the job that makes the shards, and must succeed.

    Returns:
        The job's id; empty where the run is finished.

    Raises:
        ConfigError: settings cannot work, or a job submitted before still works on the run.
        DataError: a shard is missing or cut short; with ``wait``, as ``pretrain``.
        ReportedError: Slurm refuses the job; with ``wait``, when it fails.
    """
    wanted = _everywhere(parse(PretrainConfig, arguments, "dino-depth submit pretrain"), config.gpus_per_node)
    jobs.require_slurm(config)
    per_node = config.gpus_per_node or 1
    run = Path(wanted.out)
    _check_folder(run)
    logs = logs_beside(run)
    refuse_second(logs, run)
    # What another job makes, or would have to be downloaded, is left to the job.
    there = not after and not any(isinstance(location(each), RemotePath) for each in wanted.data.shards)
    check_settings(wanted, config.nodes * per_node, DepthShards.configured(wanted.data) if there else None)
    if _done(run) >= wanted.train.steps:
        print(f"{run} was finished before: nothing is submitted")
        return ""
    logs.mkdir(parents=True, exist_ok=True)
    cores = config.cpus_per_task or wanted.data.workers + 1
    job = jobs.submit(
        replace(config, cpus_per_task=cores), logs, f"pretrain-{run.name}", [Rank(wanted, logs)], config.gpus_per_node,
        after, only_if_done=True, nodes=config.nodes, ntasks_per_node=per_node,
        srun_args=["--kill-on-bad-exit=1", "--wait=0"], setup=[_script(BEGIN, run, logs)],
        teardown=[_script(END, run, logs)],
    )  # fmt: skip
    note(logs, [job])
    from_step = f", from step {_done(run)}" if _done(run) else ""
    print(f"job {job}: {run} on {config.nodes} nodes, {config.nodes * per_node} processes{from_step}")
    announce(logs, [job])
    print(f"metrics tail -F {run / 'metrics.jsonl'}", flush=True)
    if config.wait:
        wait(job, logs, "pretrain", wanted.train.steps, "steps", lambda: _done(run))
        print(f"{run} is finished")
    return job


def _everywhere(config: PretrainConfig, gpus: int) -> PretrainConfig:
    """The configuration with every path absolute and a device, so that it holds on any node.

    The job continues whatever it finds, since it may be its own.
    """
    if config.train.device == "cuda" and not gpus:
        raise ConfigError("train.device cuda needs --gpus-per-node 1 or more")
    if not config.out:
        raise ConfigError("--out is missing: name the run folder")
    device = ("cuda" if gpus else "cpu") if config.train.device == "auto" else config.train.device
    shards = config.data.shards if isinstance(config.data.shards, list) else [config.data.shards]
    found = [each if isinstance(location(each), RemotePath) else absolute(each) for each in shards]
    begun, second = config.init_from, config.distill.teacher
    return replace(
        config,
        out=absolute(config.out),
        resume=True,
        init_from=absolute(begun) if begun and Path(begun).exists() else begun,
        distill=replace(config.distill, teacher=absolute(second) if second and Path(second).exists() else second),
        data=replace(config.data, shards=found, cache=absolute(config.data.cache)),
        train=replace(config.train, device=device),
    )


def _check_folder(run: Path):
    """Refuses a folder of something else."""
    if run.exists() and any(run.iterdir()) and not (run / "config.yaml").is_file():
        raise ConfigError(f"--out {run}: folder is not empty and holds no run")


def _done(run: Path) -> int:
    """The steps after which the newest checkpoint was written."""
    found = checkpoints(run)
    return int(found[-1].stem.removeprefix("step-")) if found else 0


def _script(text: str, run: Path, logs: Path) -> str:
    """Lines of the job's script, with this run's names."""
    final = "|".join(str(kind.exit_code) for kind in ReportedError.__subclasses__() if kind is not Interrupted)
    own = f'{shlex.quote(str(logs))}/"$SLURM_JOB_ID"'
    return text.format(
        run=shlex.quote(str(run)), end=f"{own}_end", failures=f"{own}_failures", final=final,
        interrupted=Interrupted.exit_code, most=MOST_FAILURES,
    )  # fmt: skip


@dataclass(frozen=True)
class Rank:
    """One process of a run, in a step of the job that :func:`submit` submits."""

    config: PretrainConfig
    logs: Path

    def __call__(self):
        here = submitit.JobEnvironment()
        # Outside the loop, which has its own handlers, nothing is to be saved: the script starts the job again.
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(_process_group(here))
        try:
            pretrain(self.config)
        except Interrupted as error:
            # An exit code but 0 would end rank 0, which may still write the checkpoint.
            if here.global_rank == 0:
                self._end(here, error)
        except Exception as error:
            self._end(here, error)

    def _end(self, here: submitit.JobEnvironment, error: Exception):
        """Notes the reason for the job's script, if it is the first, and ends this process with its exit code."""
        known = isinstance(error, ReportedError)
        code = error.exit_code if known else 1
        reason = " ".join(f"{'' if known else type(error).__name__ + ': '}{error}".split())
        if code != Interrupted.exit_code:
            reason = f"rank {here.global_rank} on {here.hostname}: {reason}"
        with suppress(FileExistsError), open(self.logs / f"{here.job_id}_end", "x", encoding="utf-8") as file:
            file.write(f"{code}\n{reason}\n")
        if not known:
            raise error
        # What rank 0 prints stands in one file with what the job's script prints.
        if here.global_rank:
            say(f"dino-depth: {reason}", error=True)
        raise SystemExit(code) from None


def _process_group(here: submitit.JobEnvironment) -> dict[str, str]:
    """What torch wants to know of this process and the others, as torchrun would say it."""
    # Jobs that share a node, and a job and what is left of it from before it was requeued, use different ports.
    place = int(here.raw_job_id) + 997 * int(os.environ.get("SLURM_RESTART_COUNT", 0))
    return {
        "RANK": str(here.global_rank),
        "LOCAL_RANK": str(here.local_rank),
        "WORLD_SIZE": str(here.num_tasks),
        "LOCAL_WORLD_SIZE": str(here.num_tasks // here.num_nodes),
        # The node that runs the job's script is that of rank 0; its address needs no name service.
        "MASTER_ADDR": os.environ["SLURM_LAUNCH_NODE_IPADDR"],
        "MASTER_PORT": str(PORTS[place % len(PORTS)]),
    }
