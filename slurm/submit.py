"""``dino-depth submit [--key value ...] COMMAND ...``: runs a command on a Slurm cluster.

The same from a checkout: ``python slurm/submit.py [--key value ...] COMMAND ...``. What stands before the command's
name is for Slurm; what follows it is the command's own.
"""

import sys
from importlib import import_module

from dino_depth.config import parse, suggestion
from dino_depth.errors import ConfigError
from dino_depth.slurm.jobs import SubmitConfig

__all__ = ["main"]

# Each module defines ``submit(config, arguments)``.
COMMANDS = {
    "prep": "dino_depth.slurm.prep",
    "pretrain": "dino_depth.slurm.pretrain",
    "export": "dino_depth.slurm.export",
    "evaluate": "dino_depth.slurm.evaluate",
    "chain": "dino_depth.slurm.chain",
}
# What a job array has, and what one job of many processes has; a chain has both.
ARRAY, MANY = ("tasks", "gpus_per_task"), ("nodes", "gpus_per_node")
SWITCHES = ("--help", "-h", "--print_config", "--wait")


def main(arguments: list[str]):
    """Submits the jobs of a command and says how to follow them.

    Raises:
        ConfigError: an option or the command's own arguments cannot work.
        ReportedError: there is no Slurm here, or it refuses the jobs.
    """
    options, rest = _split(arguments)
    config = parse(SubmitConfig, options, f"dino-depth submit [--key value ...] {'|'.join(COMMANDS)}")
    if not rest:
        raise ConfigError(f"name what to run: dino-depth submit [--key value ...] {'|'.join(COMMANDS)} ...")
    if rest[0] not in COMMANDS:
        known = list(COMMANDS)
        raise ConfigError(f"submit cannot run {rest[0]!r}{suggestion(rest[0], known)} (it can: {', '.join(known)})")
    if rest[0] != "chain":
        _refuse(config, ARRAY if rest[0] == "pretrain" else MANY, rest[0])
    import_module(COMMANDS[rest[0]]).submit(config, rest[1:])


def _refuse(config: SubmitConfig, options: tuple[str, ...], command: str):
    """Refuses options that mean nothing to a command, rather than run it without what they ask for."""
    for key in options:
        if getattr(config, key) != getattr(SubmitConfig(), key):
            instead = "nodes and gpus_per_node" if command == "pretrain" else "tasks and gpus_per_task"
            raise ConfigError(f"{key} means nothing to {command}: it takes {instead}")


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The options, and the command with its arguments: it begins at the first word that is no option and no value."""
    place = 0
    while place < len(arguments) and arguments[place].startswith("-"):
        switch = arguments[place] in SWITCHES and arguments[place + 1 : place + 2] not in (["true"], ["false"])
        place += 1 if switch or "=" in arguments[place] else 2
    return arguments[:place], arguments[place:]


if __name__ == "__main__":
    from dino_depth import cli

    sys.exit(cli.main(["submit", *sys.argv[1:]]))
