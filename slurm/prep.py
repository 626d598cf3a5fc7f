"""``prep`` as a job array: each task writes a fixed set of shards, and one last job writes the manifest.

The raw files are listed and dealt to shards once, where the jobs are submitted, so whatever is wrong with the
configuration, the roots or the model fails there and at once. Tasks agree on nothing but the shards' folder: a shard's
bytes follow from its files, so it does not matter which task writes it, how often it is interrupted, or if two do.
"""

import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from data_prep.output import PROGRESS, exclusive, shared, verify_finished, writing
from data_prep.shard_writer import finished_row
from data_prep.shards import Plan, PrepareConfig, begin, finish, plan, prepare, write_share
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError, Interrupted, ReportedError
from dino_depth.progress import Progress
from dino_depth.slurm import jobs
from dino_depth.slurm.jobs import Resumable, SubmitConfig
from dino_depth.storage import RemotePath, location

__all__ = ["deal", "submit"]

JOBS = "jobs.txt"
POLL_SECONDS = 3.0


def submit(config: SubmitConfig, arguments: list[str]):
    """Submits what is missing of ``prep``'s shards, and the job that finishes them.

    Raises:
        ConfigError: as ``prep`` does, or jobs submitted before are still writing there.
        DataError: as ``prep`` does; with ``wait``, when shards are missing at the end.
        ReportedError: Slurm refuses the jobs; with ``wait``, when the last job fails.
    """
    prepared = _everywhere(parse(PrepareConfig, arguments, "dino-depth submit prep", ("dataset",)))
    if prepared.dry_run:
        prepare(prepared)
        return
    jobs.require_slurm(config)
    if config.gpus_per_task == 0 and prepared.pseudo_depth.device == "cuda":
        raise ConfigError("pseudo_depth.device cuda needs --gpus-per-task 1 or more")
    planned = plan(prepared, "cuda" if config.gpus_per_task and prepared.pseudo_depth.device != "cpu" else "cpu")
    logs = planned.out.with_name(planned.out.name + ".slurm")
    with writing(planned.out), exclusive(planned.out, planned.remote) as already_finished:
        if already_finished:
            verify_finished(planned.destination, planned.config, planned.listed)
            print(f"{planned.destination} was finished before: nothing is submitted")
            return
        _refuse_second_array(planned, logs)
        begin(planned)
        shares = deal(planned, config.tasks)
    # From here on a plain run is kept out, and the tasks are let in.
    with writing(logs), shared(planned.out, planned.remote):
        last = _submit(config, planned, shares, logs)
    if config.wait:
        _wait(last, planned, logs)


def _everywhere(config: PrepareConfig) -> PrepareConfig:
    """The configuration with every path absolute, so that it holds in any working directory."""
    model = config.pseudo_depth.model
    if os.path.isdir(os.path.expanduser(model)):
        model = os.path.abspath(os.path.expanduser(model))
    return replace(
        config,
        root=_absolute(config.root),
        out=config.out if isinstance(location(config.out), RemotePath) else _absolute(config.out),
        staging=_absolute(config.staging),
        roots={name: _absolute(root) for name, root in config.roots.items()},
        pseudo_depth=replace(config.pseudo_depth, model=model),
    )


def _absolute(path: str) -> str:
    return path and os.path.abspath(path)


def deal(planned: Plan, tasks: int) -> list[Resumable]:
    """The shards that are not yet written, dealt to at most ``tasks`` calls."""
    if written := sum(task.row_path.exists() for task in planned.tasks):
        print(f"checking {written} shards that were written before", flush=True)
    missing = [task for task in planned.tasks if finished_row(task) is None]
    shares = [missing[first::tasks] for first in range(min(tasks, len(missing)))]
    # Without the listings, which only the manifest needs: they would travel with every task.
    return [Resumable(write_share, (replace(planned, listings=[], tasks=share), share)) for share in shares]


def _refuse_second_array(planned: Plan, logs: Path):
    with suppress(FileNotFoundError):
        if running := jobs.queued((logs / JOBS).read_text(encoding="utf-8").split()):
            ids = " ".join(running)
            out = planned.destination
            raise ConfigError(f"out {out} is being written by the jobs {ids}: wait for them, or scancel {ids}")


def _submit(config: SubmitConfig, planned: Plan, shares: list[Resumable], logs: Path) -> str:
    logs.mkdir(parents=True, exist_ok=True)
    name, submitted = f"prep-{planned.destination.name}", []
    if shares:
        submitted.append(jobs.submit(config, logs, name, shares, config.gpus_per_task))
        (logs / JOBS).write_text(" ".join(submitted), encoding="utf-8")
        shards = sum(len(share.arguments[1]) for share in shares)
        print(f"job {submitted[0]}: {shards} of {len(planned.tasks)} shards, dealt to {len(shares)} tasks")
    alone = replace(config, cpus_per_task=1)
    last = jobs.submit(alone, logs, f"{name}-finish", [Resumable(finish, (planned,))], after="".join(submitted))
    submitted.append(last)
    (logs / JOBS).write_text(" ".join(submitted), encoding="utf-8")
    print(f"job {last}: writes the manifest{' when they have ended' if shares else ''}")
    print(f"queue   squeue --jobs={','.join(submitted)}")
    print(f"logs    {logs}/{submitted[0]}*_log.err")
    print(f"cancel  scancel {' '.join(submitted)}", flush=True)
    return last


def _wait(last: str, planned: Plan, logs: Path):
    """Shows the shards that are written until the last job has ended."""

    def written() -> int:
        return len(list((planned.out / PROGRESS).glob("*.tar.json")))

    try:
        with Progress("prep", len(planned.tasks), "shards", done=written()) as progress:
            while (ended := jobs.outcome(last)) is None:
                progress.advance(max(0, written() - progress.done))
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise Interrupted(f"no longer waiting; the jobs go on: squeue --jobs={last}") from None
    state, code = ended
    if state == "COMPLETED":
        print(f"{planned.destination} is finished")
        return
    kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, Interrupted)}
    log = logs / f"{last}_0_log.err"
    # A job that was cancelled before it began has no log.
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line for line in lines if line.startswith("dino-depth: ")]
    reason = said[-1].removeprefix("dino-depth: ") if said else f"job {last} ended as {state}; see {log}"
    raise kinds.get(code, ReportedError)(reason)
