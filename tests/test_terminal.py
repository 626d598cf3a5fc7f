"""Names from data cannot colour, move or reorder what a terminal shows."""

import logging
import unicodedata

import numpy as np
import pytest

from dino_depth import progress
from dino_depth.cli import main
from dino_depth.progress import Progress
from dino_depth.terminal import plain
from tests.conftest import depth_scene

WILD = "a\x1b[31m\rb\u202ec"
TOLD = r"a\x1b[31m\rb\u202ec"


def is_clean(text: str) -> bool:
    return not any(unicodedata.category(sign).startswith("C") for sign in text if sign != "\n")


def test_only_what_a_terminal_would_obey_is_escaped():
    assert plain(WILD + "\n\udcff") == TOLD + r"\n\udcff"
    assert plain("Grüße, 5 µm, 深度 []") == "Grüße, 5 µm, 深度 []"


@pytest.mark.parametrize("words", [[WILD], ["check", WILD], ["pretrain", f"--{WILD}", "3"], ["report", f"/{WILD}"]])
def test_an_error_is_one_clean_line(words, capsys):
    assert main(words) in (2, 3)
    said = capsys.readouterr().err
    assert is_clean(said) and said.count("\n") == 1 and r"\x1b[31m" in said


def test_tables_and_lines_of_wild_names_are_clean(tmp_path, capsys):
    folder = tmp_path / "raw" / "train" / WILD
    folder.mkdir(parents=True)
    for index in range(3):
        np.save(folder / f"{index}{WILD}.npy", depth_scene(index))
    prep = ["prep", "folder", "--root", str(tmp_path / "raw"), "--out", str(tmp_path / "shards"), "--workers", "1"]
    prep += ["--folder.unit", "m", "--folder.name", "wild"]
    assert main([*prep, "--dry_run"]) == 0
    assert TOLD[:8] in (said := capsys.readouterr().out) and is_clean(said)
    main(prep)
    main(["check", str(tmp_path / "shards")])
    main(["inspect", str(tmp_path / "shards"), "--out", str(tmp_path / f"{WILD}.html")])
    assert is_clean("".join(capsys.readouterr()))


def test_progress_and_warnings_are_clean(monkeypatch, capsys):
    main(["--version"])
    logging.getLogger("dino_depth").warning("the map of %s", WILD)
    with Progress(WILD, 1) as bar:
        bar.advance(note=WILD)
    said = capsys.readouterr().err
    assert is_clean(said) and said.count(TOLD) == 3
    monkeypatch.setattr(progress.Console, "is_terminal", True)
    with Progress("[red]" + WILD, 1) as bar:
        bar.advance()
        assert bar.bar.tasks[0].description == r"\[red]" + TOLD
