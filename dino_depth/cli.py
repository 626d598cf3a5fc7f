"""``dino-depth COMMAND``: parses, calls one function and maps failures to exit codes.

0 done · 1 failed · 2 usage or configuration · 3 data invalid · 4 gate failed · 75 interrupted and resumable
"""

import errno
import importlib
import logging
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

from dino_depth import __version__
from dino_depth.config import parse, suggestion
from dino_depth.errors import ConfigError, Interrupted, ReportedError
from dino_depth.terminal import TerminalWarnings, say
from dino_depth.urls import redacted

__all__ = ["main"]


@dataclass(frozen=True)
class Command:
    """Where a command lives: ``module.function(module.config)``, with some fields given by position or a short name."""

    help: str
    module: str
    config: str
    function: str
    positional: tuple[str, ...] = ()
    short: tuple[tuple[str, str], ...] = ()


COMMANDS = {
    "demo": Command("synthetic raw data to an exported encoder and a report", "dino_depth.demo", "DemoConfig", "demo"),
    "synth": Command("render a dataset in a real layout", "data_prep.synthetic", "SynthConfig", "synth", ("layout",)),
    "prep": Command("raw dataset to shards", "data_prep.shards", "PrepareConfig", "prepare", ("dataset",)),
    "prep-views": Command(
        "Eyecandies from many views",
        "dino_depth.anomaly.benchmarks.eyecandies12_views",
        "PrepViewsConfig",
        "prep_views",
    ),
    "inspect": Command("a page to see shards", "data_prep.inspect", "InspectConfig", "inspect", ("shards",)),
    "check": Command("verify shards or own parts", "data_prep.check", "CheckConfig", "check", ("shards",)),
    "pretrain": Command("train an encoder on shards", "dino_depth.pretrain.train", "PretrainConfig", "pretrain"),
    "probe": Command("measure an encoder", "dino_depth.probing.probe", "ProbeConfig", "probe", ("encoder",)),
    "export": Command(
        "a run's encoder or a model for others", "dino_depth.publish.export", "ExportConfig", "export", ("run",)
    ),
    "evaluate": Command(
        "frozen encoders and a head on a benchmark",
        "dino_depth.anomaly.evaluate",
        "EvaluateConfig",
        "evaluate",
        short=(("--views", "--head.modmap.sources"),),
    ),
    "bench": Command("judge encoders as users would", "dino_depth.bench.run", "BenchConfig", "bench", ("encoders...",)),
    "tables": Command("the papers' tables, recomputed", "dino_depth.anomaly.tables", "TablesConfig", "tables"),
    "report": Command("a page about an evaluation", "dino_depth.anomaly.report", "ReportConfig", "report", ("run",)),
    "fit": Command("a model from good parts of your own", "dino_depth.inspection.fit", "FitConfig", "fit", ("parts",)),
    "predict": Command(
        "inspect scans with a model", "dino_depth.inspection.predict", "PredictConfig", "predict", ("model", "scans")
    ),
    "calibrate": Command(
        "add good parts to a model's decision",
        "dino_depth.inspection.fit",
        "CalibrateConfig",
        "calibrate",
        ("model", "parts"),
    ),
    "convert": Command(
        "SiM3D, BOP or point clouds to own parts",
        "dino_depth.inspection.convert",
        "ConvertConfig",
        "convert",
        ("form", "root"),
    ),
    "doctor": Command("what this machine offers", "dino_depth.doctor", "DoctorConfig", "doctor"),
}
EXPORT_MODEL = Command(
    "write a model's encoders and head as one graph", "dino_depth.inspection.deploy", "DeployConfig", "deploy",
    ("model",),
)  # fmt: skip
CHECK_PARTS = Command("verify own parts", "dino_depth.inspection.check", "PartsConfig", "check", ("parts",))


def _usage() -> str:
    lines = ["usage: dino-depth COMMAND [--key value ...]", "", "commands:"]
    lines += [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    lines += ["  submit     run a command as jobs of a Slurm cluster"]
    lines += ["", "dino-depth COMMAND --help lists a command's settings; --config FILE.yaml sets them from a file."]
    return "\n".join([*lines, "Exit codes: 0 done, 1 failed, 2 usage, 3 data invalid, 4 gate failed, 75 resumable."])


def _run(arguments: list[str]):
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return
    if arguments[0] in ("-V", "--version"):
        print(f"dino-depth {__version__}")
        return
    name, *rest = arguments
    if name == "submit":
        importlib.import_module("dino_depth.slurm.submit").main(rest)
        return
    if name not in COMMANDS:
        known = [*COMMANDS, "submit"]
        raise ConfigError(f"unknown command {name!r}{suggestion(name, known)}; see dino-depth --help")
    command = COMMANDS[name]
    if name == "check" and _are_parts(rest):
        command = CHECK_PARTS
    elif name == "export" and rest and (Path(rest[0]) / "model.json").is_file():
        command = EXPORT_MODEL
    module = importlib.import_module(command.module)
    if name == "pretrain":
        rest = _resume_with_own_config(rest)
    for short, option in command.short:
        rest = [re.sub(rf"^{short}(?==|$)", option, word) for word in rest]
    config = parse(getattr(module, command.config), rest, f"dino-depth {name}", command.positional)
    getattr(module, command.function)(config)


def _are_parts(arguments: list[str]) -> bool:
    """Whether ``check`` is given a folder of own parts instead of shards."""
    root = Path(arguments[0]) if arguments else Path()
    return bool(arguments) and ((root / "rig.json").is_file() or any(root.glob("view_*")) or any(root.glob("*/view_*")))


def _resume_with_own_config(arguments: list[str]) -> list[str]:
    """``pretrain --out RUN --resume`` needs no --config: the run folder holds it."""
    # What --option=value joins is taken apart first, so that both spellings mean the same.
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if "--resume" in words and "--config" not in words and "--out" in words[:-1]:
        saved = Path(words[words.index("--out") + 1]) / "config.yaml"
        if saved.is_file():
            return ["--config", str(saved), *arguments]
    return arguments


def _describe(error: OSError) -> str:
    place = error.filename or ""
    hint = "; free some space and run again" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else ""
    return f"{place}: {error.strerror or error}{hint}".removeprefix(": ")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    logging.getLogger("dino_depth").handlers = [TerminalWarnings()]
    try:
        _run(sys.argv[1:] if arguments is None else arguments)
    except ReportedError as error:
        message, code = str(error), error.exit_code
    except KeyboardInterrupt:
        message, code = "interrupted; run the same command again to continue", Interrupted.exit_code
    except OSError as error:
        message, code = _describe(error), 1
    except MemoryError as error:
        message, code = f"out of memory: {error}", 1
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        # Not foreseen, so the trace is what helps; the last line still says what happened.
        traceback.print_exc()
        message, code = f"{type(error).__name__}: {error}", 1
    else:
        return 0
    say(f"dino-depth: {redacted(' '.join(message.split()))}", error=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
