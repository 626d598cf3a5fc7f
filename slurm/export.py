"""``export`` as one job on the CPU."""

from dataclasses import replace
from pathlib import Path

from dino_depth.config import parse
from dino_depth.errors import ConfigError
from dino_depth.publish.export import ExportConfig, export
from dino_depth.slurm import jobs
from dino_depth.slurm.jobs import Resumable, SubmitConfig
from dino_depth.slurm.submission import absolute, announce, logs_beside, note, refuse_second, wait
from dino_depth.storage import RemotePath, location

__all__ = ["submit"]


def submit(config: SubmitConfig, arguments: list[str], after: str = "") -> str:
    """Submits the export of a run, unless it is there.

    Args:
        after: id of the job that trains the run, and must succeed.

    Returns:
        The job's id; empty where nothing is left to do.

    Raises:
        ConfigError: the folder was exported before what is still being trained, or its job is still there; with
            ``wait``, as ``export``.
        ReportedError: Slurm refuses the job; with ``wait``, when it fails.
    """
    wanted = _everywhere(parse(ExportConfig, arguments, "dino-depth submit export", ("run",)))
    if not wanted.out:
        raise ConfigError("--out is missing: name the folder for the export")
    out = Path(wanted.out)
    logs = logs_beside(out)
    jobs.require_slurm(config)
    refuse_second(logs, out)
    # It is moved there in one step, so it is whole.
    if (out / "transformers").is_dir():
        if after:
            raise ConfigError(f"out {out} was exported before what is trained now: remove it, or choose another folder")
        print(f"{out} was exported before: nothing is submitted")
        return ""
    if not after and not (Path(wanted.run) / "config.yaml").is_file():
        raise ConfigError(f"{wanted.run}: no run folder (config.yaml is missing)")
    logs.mkdir(parents=True, exist_ok=True)
    job = jobs.submit(
        config, logs, f"export-{out.name}", [Resumable(export, (wanted,))], after=after, only_if_done=True
    )
    note(logs, [job])
    print(f"job {job}: exports {wanted.run}{' when it is trained' if after else ''}")
    announce(logs, [job])
    if config.wait:
        wait(job, logs, "export", 1, "exports", lambda: int((out / "transformers").is_dir()))
    return job


def _everywhere(config: ExportConfig) -> ExportConfig:
    """The configuration with every path absolute, so that it holds in any working directory."""
    given = config.shards
    shards = [_place(each) for each in given] if isinstance(given, list) else _place(given)
    return replace(
        config,
        run=absolute(config.run),
        out=absolute(config.out),
        checkpoint=absolute(config.checkpoint) if Path(config.checkpoint).is_file() else config.checkpoint,
        shards=shards,
    )


def _place(shards: str) -> str:
    return shards if isinstance(location(shards), RemotePath) else absolute(shards)
