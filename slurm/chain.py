"""``chain``: prep, pretrain, export and evaluate by one command, each stage starting when the one before succeeded.

Every stage is submitted as it is by itself, with its own resources; only what one stage makes and the next one reads
is filled in. All are submitted at once: a stage that fails cancels those after it, through Slurm's dependencies.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from data_prep.output import places
from data_prep.shards import PrepareConfig
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.config import PretrainConfig, parse
from dino_depth.errors import ConfigError, ReportedError
from dino_depth.publish.export import ExportConfig
from dino_depth.slurm import jobs
from dino_depth.slurm.jobs import SubmitConfig
from dino_depth.slurm.submission import absolute, logs_beside, noted, wait
from dino_depth.storage import RemotePath, location

__all__ = ["ChainConfig", "submit"]

CLASSES = {"prep": PrepareConfig, "pretrain": PretrainConfig, "export": ExportConfig, "evaluate": EvaluateConfig}
FOLDERS = {"prep": "shards", "pretrain": "run", "export": "export", "evaluate": "evaluation"}
# Options of submit that mean nothing to a pretraining, or to the others.
FOREIGN = {"pretrain": ("tasks", "gpus_per_task")}
OTHERS_FOREIGN = ("nodes", "gpus_per_node")
# The setting of a stage that names what the stage before it has made.
READS = {"pretrain": "data.shards", "export": "run", "evaluate": "encoder.depth"}


@dataclass
class ChainConfig:
    """From raw data to results, as jobs that wait for each other; a stage that is not named is left out.

    A stage holds the settings of its command and, besides them, ``config``, a file that they change, and ``slurm``, the
    options of ``submit`` that differ for this stage. See configs/chain.yaml.

    Attributes:
        out: folder for ``shards``, ``run``, ``export`` and ``evaluation``, each unless the stage's own ``out`` says
            otherwise.
        prep: raw data to shards.
        pretrain: shards to a run.
        export: run to an encoder.
        evaluate: encoder to results.
    """

    out: str = ""
    prep: dict[str, Any] | None = None
    pretrain: dict[str, Any] | None = None
    export: dict[str, Any] | None = None
    evaluate: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Stage:
    name: str
    slurm: SubmitConfig
    arguments: list[str]
    out: str
    logs: Path


def submit(config: SubmitConfig, arguments: list[str]) -> str:
    """Submits all stages that are not finished.

    Returns:
        The id of the last job; empty where everything is finished.

    Raises:
        ConfigError, DataError: as the stages, whose name stands before it; no job remains then. With ``wait``, when a
            stage fails.
        ReportedError: Slurm refuses a job; with ``wait``, when a stage fails.
    """
    for word in arguments:
        stage, *keys = word.partition("=")[0].removeprefix("--").split(".")
        if stage in CLASSES and len(keys) > 1:
            # The parser would forget what else stands in the group.
            raise ConfigError(f"{word}: groups of a stage's settings are set in the file only")
    chain = parse(ChainConfig, arguments, "dino-depth submit chain")
    jobs.require_slurm(config)
    with tempfile.TemporaryDirectory() as folder:
        stages = _stages(chain, config, Path(folder))
        submitted = _submit(stages, Path(folder))
    if not submitted:
        print("every stage was finished before")
        return ""
    order = ", ".join(f"{stage.name} {job}" for stage, job in submitted)
    print("== all of them")
    print(f"chain   {order}: each begins when the one before has succeeded")
    print(f"cancel  scancel {' '.join(_all_jobs(submitted))}", flush=True)
    if config.wait:
        _wait(submitted)
    return submitted[-1][1]


def _stages(chain: ChainConfig, common: SubmitConfig, folder: Path) -> list[_Stage]:
    """The stages that are asked for, whose settings are all known ones."""
    if not chain.out:
        raise ConfigError("out is empty: name a folder for what the chain makes")
    sections = {name: getattr(chain, name) for name in CLASSES if getattr(chain, name) is not None}
    if not sections:
        raise ConfigError(f"the chain has no stage: name some of {', '.join(CLASSES)} (see configs/chain.yaml)")
    names = list(CLASSES)
    first, last = names.index(next(iter(sections))), names.index(list(sections)[-1])
    if absent := [name for name in names[first:last] if name not in sections]:
        raise ConfigError(f"the chain has {names[first]} and {names[last]}, but not {absent[0]} between them")
    stages: list[_Stage] = []
    for name, section in sections.items():
        out = section.get("out") or str(Path(chain.out) / FOLDERS[name])
        out = out if isinstance(location(out), RemotePath) else absolute(out)
        words = _words(name, section, out, stages[-1].out if stages else "", folder)
        slurm = _options(name, section.get("slurm", {}), common, folder)
        local = places(out, absolute(section.get("staging", "")))[0] if name == "prep" else Path(out)
        stages.append(_Stage(name, slurm, words, out, logs_beside(local)))
    return stages


def _words(name: str, section: dict[str, Any], out: str, made: str, folder: Path) -> list[str]:
    """The command line of a stage: its file, what the stage before it ``made``, and its settings, which win."""
    settings = {key: value for key, value in section.items() if key not in ("config", "out", "slurm")}
    words = ["--config", section["config"]] if section.get("config") else []
    # ``run`` of an export must stand on the command line, wherever it comes from.
    if made := settings.pop(READS.get(name, ""), made):
        words += [f"--{READS[name]}", made]
    words += [*_file(folder / f"{name}.yaml", settings), "--out", out]
    with _named(name, folder):
        parse(CLASSES[name], words, f"dino-depth {name}")
    return words


def _options(name: str, given: Any, common: SubmitConfig, folder: Path) -> SubmitConfig:
    """The options of ``submit`` for a stage."""
    if not isinstance(given, dict):
        raise ConfigError(f"{name}.slurm: must hold options of submit, got {given!r}")
    if foreign := [key for key in FOREIGN.get(name, OTHERS_FOREIGN) if key in given]:
        raise ConfigError(f"{name}.slurm: {foreign[0]} means nothing to {name}")
    with _named(f"{name}.slurm", folder):
        found = parse(SubmitConfig, _file(folder / "slurm.yaml", asdict(common) | given), "dino-depth submit")
        jobs.require_slurm(found)
    return replace(found, wait=False)


def _file(path: Path, settings: dict[str, Any]) -> list[str]:
    """The settings as a file on a command line, where they are checked as those of any file."""
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return ["--config", str(path)]


@contextmanager
def _named(stage: str, folder: Path) -> Iterator[None]:
    """Says which stage a failure belongs to, instead of the file in ``folder`` that its settings passed through."""
    try:
        yield
    except ReportedError as error:
        text = re.sub(rf"{re.escape(str(folder))}/\w+\.yaml: ", "", str(error))
        raise type(error)(f"{stage}: {text}") from None


def _submit(stages: list[_Stage], folder: Path) -> list[tuple[_Stage, str]]:
    """Submits the stages, all or none."""
    submitted: list[tuple[_Stage, str]] = []
    try:
        for stage in stages:
            after = {"after": submitted[-1][1]} if submitted else {}
            print(f"== {stage.name}", flush=True)
            with _named(stage.name, folder):
                job = import_module(f"dino_depth.slurm.{stage.name}").submit(stage.slurm, stage.arguments, **after)
            if job:
                submitted.append((stage, job))
    except BaseException:
        if submitted:
            with suppress(ReportedError):
                jobs.cancel(_all_jobs(submitted))
        raise
    return submitted


def _all_jobs(submitted: list[tuple[_Stage, str]]) -> list[str]:
    """Besides the last job of each stage, those before it, from the first on."""
    return [each for stage, job in submitted for each in noted(stage.logs) or [job]]


def _wait(submitted: list[tuple[_Stage, str]]):
    for place, (stage, job) in enumerate(submitted):
        with _named(stage.name, stage.logs):
            wait(job, stage.logs, f"chain: {stage.name}", len(submitted), "stages", lambda n=place: n)
        print(f"{stage.name} is finished: {stage.out}", flush=True)
