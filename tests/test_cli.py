"""The command line: every command is there, explains itself and names what it does not know."""

import importlib

import pytest

from dino_depth import __version__
from dino_depth.cli import CHECK_PARTS, COMMANDS, main


@pytest.mark.parametrize("command", [*COMMANDS.values(), CHECK_PARTS], ids=lambda command: command.function)
def test_a_command_is_where_the_table_says(command):
    module = importlib.import_module(command.module)
    assert callable(getattr(module, command.function)) and getattr(module, command.config).__doc__


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command(name, capsys):
    assert main([name, "--help"]) == 0
    assert f"dino-depth {name}" in capsys.readouterr().out


def test_usage_and_version(capsys):
    assert main([]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {name} " in usage for name in (*COMMANDS, "submit"))
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"dino-depth {__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    assert main(["pretrian"]) == 2
    assert capsys.readouterr().err.startswith("dino-depth: unknown command 'pretrian'; did you mean 'pretrain'?")
