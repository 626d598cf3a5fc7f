"""``evaluate`` as a job array: each task computes the cells of some heads, and one last job writes the results.

A cell is a class with a seed. Its numbers follow from settings, weights and data, so it does not matter which task
computes it or how often that is interrupted. Heads of one class go to one task where that is possible: they look at
the same views, which are encoded once.

Where the depth encoder is still to be made by another job, what needs it is done by one more job before the array.
"""

from dataclasses import replace
from pathlib import Path

import torch

from data_prep.workers import available_cores
from dino_depth.anomaly.config import EvaluateConfig, everywhere
from dino_depth.anomaly.evaluate import Fit, begin, check, compute, finish, fits
from dino_depth.config import parse
from dino_depth.errors import ConfigError
from dino_depth.frozen import load_frozen
from dino_depth.slurm import jobs
from dino_depth.slurm.jobs import Resumable, SubmitConfig
from dino_depth.slurm.submission import announce, logs_beside, note, refuse_second, wait

__all__ = ["compute_share", "deal", "submit"]


def submit(config: SubmitConfig, arguments: list[str], after: str = "") -> str:
    """Submits the cells that are missing, and the job that writes the results.

    Args:
        after: id of the job that makes the depth encoder, and must succeed.

    Returns:
        The id of the last job; empty where nothing is left to do.

    Raises:
        ConfigError, DataError: as ``evaluate``, or jobs submitted before are still writing there; with ``wait``, when
            cells are missing at the end.
        ReportedError: Slurm refuses the jobs; with ``wait``, when the last job fails.
    """
    wanted = everywhere(parse(EvaluateConfig, arguments, "dino-depth submit evaluate"))
    jobs.require_slurm(config)
    if config.gpus_per_task == 0 and wanted.device == "cuda":
        raise ConfigError("device cuda needs --gpus-per-task 1 or more")
    _, categories = check(wanted)
    out = Path(wanted.out)
    refuse_second(logs_beside(out), out)
    heads = fits(wanted, categories)
    if after:
        _check_without_depth(wanted)
        last = _submit(config, wanted, categories, heads, after)
    else:
        session, _ = begin(wanted, "cpu")
        heads = [(group, seed) for group, seed in heads if any((each, seed) not in session.run.cells for each in group)]
        if not heads:
            finish(wanted, categories)
            print(f"{out} has all cells: its results are written, and nothing is submitted")
            return ""
        # A plain run is kept out, and the tasks are let in.
        with session.run.held(shared=True):
            last = _submit(config, wanted, categories, heads)
    if config.wait:
        cells = [out / "cells" / each / f"seed{seed}.json" for each in categories for seed in range(wanted.seeds)]
        wait(last, logs_beside(out), "evaluate", len(cells), "cells", lambda: sum(map(Path.is_file, cells)))
        print(f"{out} is finished")
    return last


def _check_without_depth(wanted: EvaluateConfig):
    """Refuses what shows before the depth encoder is there."""
    if Path(wanted.out, "config.yaml").exists():
        raise ConfigError(f"out {wanted.out} was begun with an earlier encoder: remove it, or choose another folder")
    if wanted.encoder.image:
        encoder = load_frozen(wanted.encoder.image, modality="image")
        encoder.grid(wanted.encoder.size)


def deal(heads: list[Fit], tasks: int) -> list[list[Fit]]:
    """The heads in order, in at most ``tasks`` parts of nearly the same size."""
    parts = min(tasks, len(heads))
    bounds = [len(heads) * part // parts for part in range(parts + 1)]
    return [heads[first:end] for first, end in zip(bounds, bounds[1:], strict=False)]


def compute_share(config: EvaluateConfig, share: list[Fit], device: str):
    """What a task does, with a thread for each of its cores, also where Slurm does not bind it to them."""
    torch.set_num_threads(available_cores())
    compute(config, share, device)


def _submit(
    config: SubmitConfig, wanted: EvaluateConfig, categories: list[str], heads: list[Fit], after: str = ""
) -> str:
    out = Path(wanted.out)
    logs, name, shares = logs_beside(out), f"evaluate-{out.name}", deal(heads, config.tasks)
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
    cells, total = sum(len(group) for group, _ in heads), len(categories) * wanted.seeds
    print(f"job {array}: {cells} of {total} cells, dealt to {len(shares)} tasks")
    # However the tasks end, but not where they could not begin.
    waits = f"afterany:{array}" + (f",afterok:{begun}" if begun else "")
    last = jobs.submit(alone, logs, f"{name}-finish", [Resumable(finish, (wanted, categories))], dependency=waits)
    submitted.append(last)
    note(logs, submitted)
    print(f"job {last}: writes the results when they have ended")
    announce(logs, submitted)
    return last
