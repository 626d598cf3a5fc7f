"""What is to be measured on a GPU runs to its end without one, and stops where numbers are wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dino_depth.config import PretrainConfig

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run_script(tmp_path, python: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TINY": "1", "OUT": str(tmp_path / "out"), "PYTHON": python}
    return subprocess.run(["bash", str(BENCHMARKS / "gpu.sh")], env=environment, capture_output=True, text=True)


def test_the_script_writes_its_section(tmp_path):
    done = run_script(tmp_path, sys.executable)
    assert done.returncode == 0, done.stderr[-3000:]
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert f"torch {torch.__version__.split('+')[0]}" in page and "Measured on 20" in page
    for words in (
        "| compiled (aot_eager) against eager, bfloat16 |", "| crops of resident maps", "| as configured |",
        "| without packing |", "| loader, maps on the device |", "GFLOP per image counted", "healthy", "| curvature |",
    ):  # fmt: skip
        assert words in page, (words, page)


def test_the_script_measures_nothing_where_numerics_are_off(tmp_path):
    failing = tmp_path / "python"
    failing.write_text(
        f'#!/bin/sh\ncase $1 in */numerics.py) echo "| off |"; exit 4 ;; esac\nexec {sys.executable} "$@"\n'
    )
    failing.chmod(0o755)
    done = run_script(tmp_path, str(failing))
    assert done.returncode == 4 and "| off |" in done.stderr and "speed" not in done.stderr
    assert not (tmp_path / "out" / "gpu.md").exists()


def test_numerics_that_are_off_end_with_4(benchmarks, monkeypatch, capsys):
    import numerics

    from dino_depth.pretrain import student_teacher

    sinkhorn = student_teacher.sinkhorn
    monkeypatch.setattr(student_teacher, "sinkhorn", lambda *arguments: sinkhorn(*arguments) ** 1.01)
    monkeypatch.setattr(sys, "argv", ["numerics.py", "--tiny", "--device", "cpu", "--backend", "eager"])
    with pytest.raises(SystemExit) as stop:
        numerics.main()
    assert stop.value.code == 4
    assert "beyond the limit: float32 against float32 without sinkhorn\n" in capsys.readouterr().err


def test_operations_counted_and_derived_agree(benchmarks):
    from flops import counted, derived

    config = PretrainConfig()
    config.model.dim, config.model.depth, config.loss.prototypes = 96, 3, 3000
    config.model.heads = 3
    for config.model.drop_path in (0.0, 0.25):
        by_counter, by_formula = counted(config, 8), derived(config, 8)
        # The counter's attention has five products backwards instead of four, and it sees KoLeo.
        assert by_formula < by_counter < 1.03 * by_formula


def test_derived_operations_of_one_block_by_hand(benchmarks, monkeypatch):
    """One global crop pair of one patch of one pixel: every matrix by its size."""
    import flops

    config = PretrainConfig()
    config.crops.global_size = config.crops.local_size = config.model.patch_size = 1
    config.crops.local_crops = 1
    config.model.dim, config.model.depth, config.model.drop_path = 2, 1, 0.0
    config.loss.hidden, config.loss.bottleneck, config.loss.prototypes = 3, 5, 7
    monkeypatch.setattr(flops, "make_masks", lambda *_: torch.ones(1, 2, 1))  # both patches are hidden

    def block(crops, rows):  # two tokens a crop
        attention = crops * (2 * 2 * (2 * 6 + 2 * 2) + 2 * 2 * (2 * 2 * 2))
        return attention + rows * 2 * (2 * 8 + 8 * 2), crops * 2 * 1 * 2

    head = 2 * (2 * 3 + 3 * 3 + 3 * 5 + 5 * 7)
    (taught, seen), (learned, embedded) = block(2, 4), block(3, 5)
    assert flops.derived(config, 1) == taught + seen + 3 * learned + 2 * embedded + head * (4 + 3 * 5)


def test_a_step_is_measured_without_optimisations():
    words = "--config pretrain_demo --batch 2 --steps 1 --threads 1 --no_count --train.device cpu --without".split()
    names = ["stochastic_depth", "fused_adamw", "foreach_ema", "allocator"]
    command = [sys.executable, str(BENCHMARKS / "pretrain_step.py"), *words, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert figures["total"] > 0 and abs(sum(figures["share"].values()) - 1) < 0.01
