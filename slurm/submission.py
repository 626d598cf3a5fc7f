"""What every command does around its jobs: keeps a second submission out, says how to follow them, waits.

OUT.slurm/            beside the output: submitit's files and the jobs' logs
OUT.slurm/jobs.txt    ids of the last submission, in order
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from dino_depth.errors import ConfigError, DataError, GateError, Interrupted, ReportedError
from dino_depth.progress import Progress
from dino_depth.slurm import jobs

__all__ = ["absolute", "announce", "logs_beside", "note", "noted", "refuse_second", "wait"]

JOBS = "jobs.txt"
POLL_SECONDS = 3.0


def absolute(path: str) -> str:
    """The path as it holds in any working directory; an empty one stays empty."""
    return path and os.path.abspath(path)


def logs_beside(out: Path) -> Path:
    """The folder of the logs of the jobs that write ``out``."""
    return out.with_name(f"{out.name}.slurm")


def note(logs: Path, submitted: Sequence[str]):
    """Remembers the jobs of a submission."""
    (logs / JOBS).write_text(" ".join(submitted), encoding="utf-8")


def noted(logs: Path) -> list[str]:
    """The jobs of the last submission; none if there was none."""
    with suppress(FileNotFoundError):
        return (logs / JOBS).read_text(encoding="utf-8").split()
    return []


def refuse_second(logs: Path, out: object):
    """Keeps a submission out while the jobs of an earlier one have not ended.

    Raises:
        ConfigError: with the ids of those jobs.
    """
    if running := jobs.queued(noted(logs)):
        ids = " ".join(running)
        raise ConfigError(f"out {out} is being written by the jobs {ids}: wait for them, or scancel {ids}")


def announce(logs: Path, submitted: Sequence[str]):
    """Says how to follow and how to cancel the jobs."""
    print(f"queue   squeue --jobs={','.join(submitted)}")
    print(f"logs    {logs}/{submitted[0]}*_log.err")
    print(f"cancel  scancel {' '.join(submitted)}", flush=True)


def wait(last: str, logs: Path, title: str, total: int, unit: str, done: Callable[[], int]):
    """Shows how much is done until a job has ended.

    Args:
        done: how many of ``total`` there are.

    Raises:
        ReportedError: the job did not succeed; the reason is its own last line, the exit code its own.
        Interrupted: Ctrl-C; the jobs go on.
    """
    try:
        with Progress(title, total, unit, done=done()) as progress:
            while (ended := jobs.outcome(last)) is None:
                progress.advance(max(0, done() - progress.done))
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        raise Interrupted(f"no longer waiting; the jobs go on: squeue --jobs={last}") from None
    state, code = ended
    if state == "COMPLETED":
        return
    kinds = {kind.exit_code: kind for kind in (ConfigError, DataError, GateError, Interrupted)}
    raise kinds.get(code, ReportedError)(_reason(last, logs) or f"job {last} ended as {state}; see {_log(last, logs)}")


def _log(job: str, logs: Path) -> Path:
    return logs / f"{job}_0_log.err"


def _reason(last: str, logs: Path) -> str:
    """What the job said, or, where it was cancelled before it began and has no log, one before it."""
    for job in [last, *reversed(noted(logs))]:
        with suppress(FileNotFoundError):
            lines = _log(job, logs).read_text(errors="replace").splitlines()
            said = [line for line in lines if line.startswith("dino-depth: ")]
            return said[-1].removeprefix("dino-depth: ") if said else ""
    return ""
