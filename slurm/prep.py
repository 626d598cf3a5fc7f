"""``prep`` as a job array: each task writes a fixed set of shards, and one last job writes the manifest.

The raw files are listed and dealt to shards once, where the jobs are submitted, so whatever is wrong with the
configuration, the roots or the model fails there and at once. Tasks agree on nothing but the shards' folder: a shard's
bytes follow from its files, so it does not matter which task writes it, how often it is interrupted, or if two do.
"""

import os
from dataclasses import replace
from pathlib import Path

from data_prep.output import PROGRESS, exclusive, shared, verify_finished, writing
from data_prep.shard_writer import finished_rows
from data_prep.shards import Plan, PrepareConfig, begin, finish, plan, prepare, write_share
from dino_depth.config import parse
from dino_depth.errors import ConfigError
from dino_depth.slurm import jobs
from dino_depth.slurm.jobs import Resumable, SubmitConfig
from dino_depth.slurm.submission import absolute, announce, logs_beside, note, refuse_second, wait
from dino_depth.storage import RemotePath, location

__all__ = ["deal", "submit"]


def submit(config: SubmitConfig, arguments: list[str]) -> str:
    """Submits what is missing of ``prep``'s shards, and the job that finishes them.

    Returns:
        The id of the last job; empty where nothing is left to do.

    Raises:
        ConfigError: as ``prep`` does, or jobs submitted before are still writing there.
        DataError: as ``prep`` does; with ``wait``, when shards are missing at the end.
        ReportedError: Slurm refuses the jobs; with ``wait``, when the last job fails.
    """
    prepared = _everywhere(parse(PrepareConfig, arguments, "dino-depth submit prep", ("dataset",)))
    if prepared.dry_run:
        prepare(prepared)
        return ""
    jobs.require_slurm(config)
    if config.gpus_per_task == 0 and prepared.pseudo_depth.device == "cuda":
        raise ConfigError("pseudo_depth.device cuda needs --gpus-per-task 1 or more")
    planned = plan(prepared, "cuda" if config.gpus_per_task and prepared.pseudo_depth.device != "cpu" else "cpu")
    logs = logs_beside(planned.out)
    with writing(planned.out), exclusive(planned.out, planned.remote) as already_finished:
        if already_finished:
            verify_finished(planned.destination, planned.config, planned.listed)
            print(f"{planned.destination} was finished before: nothing is submitted")
            return ""
        refuse_second(logs, planned.destination)
        begin(planned)
        shares = deal(planned, config.tasks)
    # From here on a plain run is kept out, and the tasks are let in.
    with writing(logs), shared(planned.out, planned.remote):
        last = _submit(config, planned, shares, logs)
    if config.wait:
        rows = planned.out / PROGRESS
        wait(last, logs, "prep", len(planned.tasks), "shards", lambda: len(list(rows.rglob("*.tar.json"))))
        print(f"{planned.destination} is finished")
    return last


def _everywhere(config: PrepareConfig) -> PrepareConfig:
    """The configuration with every path absolute, so that it holds in any working directory."""
    model = config.pseudo_depth.model
    if os.path.isdir(os.path.expanduser(model)):
        model = os.path.abspath(os.path.expanduser(model))
    return replace(
        config,
        root=absolute(config.root),
        out=config.out if isinstance(location(config.out), RemotePath) else absolute(config.out),
        staging=absolute(config.staging),
        roots={name: absolute(root) for name, root in config.roots.items()},
        pseudo_depth=replace(config.pseudo_depth, model=model),
    )


def deal(planned: Plan, tasks: int) -> list[Resumable]:
    """The shards that are not yet written, dealt to at most ``tasks`` calls."""
    if written := sum(task.row_path.exists() for task in planned.tasks):
        print(f"checking {written} shards that were written before", flush=True)
    rows = finished_rows(planned.tasks)
    missing = [task for task in planned.tasks if rows[task.file] is None]
    shares = [missing[first::tasks] for first in range(min(tasks, len(missing)))]
    # Without the listings, which only the manifest needs: they would travel with every task.
    return [Resumable(write_share, (replace(planned, listings=[], tasks=share), share)) for share in shares]


def _submit(config: SubmitConfig, planned: Plan, shares: list[Resumable], logs: Path) -> str:
    logs.mkdir(parents=True, exist_ok=True)
    name, submitted = f"prep-{planned.destination.name}", []
    if shares:
        submitted.append(jobs.submit(config, logs, name, shares, config.gpus_per_task))
        note(logs, submitted)
        shards = sum(len(share.arguments[1]) for share in shares)
        print(f"job {submitted[0]}: {shards} of {len(planned.tasks)} shards, dealt to {len(shares)} tasks")
    alone = replace(config, cpus_per_task=1)
    last = jobs.submit(alone, logs, f"{name}-finish", [Resumable(finish, (planned,))], after="".join(submitted))
    submitted.append(last)
    note(logs, submitted)
    print(f"job {last}: writes the manifest{' when they have ended' if shares else ''}")
    announce(logs, submitted)
    return last
