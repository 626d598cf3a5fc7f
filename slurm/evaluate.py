"""``evaluate`` as a job array: each task scores a range of the test instances, and one last job writes the results.

What is written of an instance follows from settings, weights and data, so it does not matter which task scores it or
how often that is interrupted. Instances are dealt in order, so that a task needs the heads of few classes; whichever
comes first fits a head, and the others wait for it.

Where the depth encoder is still to be made by another job, what needs it is done by one more job before the array.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data_prep.workers import available_cores
from dino_depth.anomaly.config import EvaluateConfig, everywhere
from dino_depth.anomaly.evaluate import Instance, begin, check, compute, deal, finish, instances
from dino_depth.anomaly.results import Run
from dino_depth.config import parse
from dino_depth.errors import ConfigError
from dino_depth.frozen import load_frozen
from dino_depth.slurm import jobs
from dino_depth.slurm.jobs import Resumable, SubmitConfig
from dino_depth.slurm.submission import announce, logs_beside, note, refuse_second, wait

__all__ = ["compute_share", "submit"]


def submit(config: SubmitConfig, arguments: list[str], after: str = "") -> str:
    """Submits the instances that are not scored, and the job that writes the results.

    Args:
        after: id of the job that makes the depth encoder, and must succeed.

    Returns:
        The id of the last job; empty where nothing is left to do.

    Raises:
        ConfigError, DataError: as ``evaluate``, or jobs submitted before are still writing there; with ``wait``, when
            instances are missing at the end.
        ReportedError: Slurm refuses the jobs; with ``wait``, when the last job fails.
    """
    wanted = everywhere(parse(EvaluateConfig, arguments, "dino-depth submit evaluate"))
    jobs.require_slurm(config)
    if config.gpus_per_task == 0 and wanted.device == "cuda":
        raise ConfigError("device cuda needs --gpus-per-task 1 or more")
    if wanted.processes > 1:
        raise ConfigError("processes are of one machine: tasks deal out the instances here, leave it at 1")
    benchmark, categories = check(wanted)
    out = Path(wanted.out)
    refuse_second(logs_beside(out), out)
    every = instances(benchmark, categories)
    if after:
        _check_without_depth(wanted)
        last = _submit(config, wanted, every, len(every), after)
    else:
        session, _ = begin(wanted, "cpu")
        waiting = [one for one in every if session.run.waiting(*one)]
        if not waiting:
            finish(wanted)
            print(f"{out} has all instances: its results are written, and nothing is submitted")
            return ""
        # A plain run is kept out, and the tasks are let in.
        with session.run.held(shared=True):
            last = _submit(config, wanted, waiting, len(every))
    if config.wait:
        wait(last, logs_beside(out), "evaluate", len(every), "instances", partial(_done, wanted, every))
        print(f"{out} is finished")
    return last


def _check_without_depth(wanted: EvaluateConfig):
    """Refuses what shows before the depth encoder is there."""
    if Path(wanted.out, "config.yaml").exists():
        raise ConfigError(f"out {wanted.out} was begun with an earlier encoder: remove it, or choose another folder")
    if wanted.encoder.image:
        encoder = load_frozen(wanted.encoder.image, modality="image")
        encoder.grid(wanted.encoder.size)


def _done(wanted: EvaluateConfig, every: list[Instance]) -> int:
    """How many instances are scored with all seeds; 0 before the run begins."""
    if not Path(wanted.out, "config.yaml").is_file():
        return 0
    run = Run(wanted)
    return sum(not run.waiting(*one) for one in every)


def compute_share(config: EvaluateConfig, share: list[Instance], device: str):
    """What a task does, with a thread for each of its cores, also where Slurm does not bind it to them."""
    torch.set_num_threads(available_cores())
    compute(config, share, device)


def _submit(config: SubmitConfig, wanted: EvaluateConfig, waiting: list[Instance], total: int, after: str = "") -> str:
    out = Path(wanted.out)
    logs, name, shares = logs_beside(out), f"evaluate-{out.name}", deal(waiting, config.tasks)
    device = "cuda" if config.gpus_per_task and wanted.device != "cpu" else "cpu"
    alone, submitted, begun = replace(config, cpus_per_task=1), [], ""
    logs.mkdir(parents=True, exist_ok=True)
    if after:
        call = Resumable(begin, (wanted, "cpu"))
        begun = jobs.submit(alone, logs, f"{name}-begin", [call], after=after, only_if_done=True)
        submitted.append(begun)
        note(logs, submitted)
        print(f"job {begun}: looks at the encoder that job {after} makes")
    calls = [Resumable(compute_share, (wanted, share, device)) for share in shares]
    array = jobs.submit(config, logs, name, calls, config.gpus_per_task, after=begun, only_if_done=True)
    submitted.append(array)
    note(logs, submitted)
    print(f"job {array}: {len(waiting)} of {total} instances, dealt to {len(shares)} tasks")
    # However the tasks end, but not where they could not begin.
    waits = f"afterany:{array}" + (f",afterok:{begun}" if begun else "")
    last = jobs.submit(alone, logs, f"{name}-finish", [Resumable(finish, (wanted,))], dependency=waits)
    submitted.append(last)
    note(logs, submitted)
    print(f"job {last}: writes the results when they have ended")
    announce(logs, submitted)
    return last
