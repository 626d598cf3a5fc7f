"""The tests of ``rehearsed.py`` and ``rehearsed_models.py``, in a process that takes a small C library for CUDA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rehearsal import stand_in

from dino_depth.config import save_config


@pytest.mark.parametrize("file", ["rehearsed.py", "rehearsed_models.py"])
def test_on_a_gpu_that_computes_nothing(file, tiny, tmp_path):
    stands_in = stand_in(tmp_path)
    if isinstance(stands_in, str):
        pytest.skip(stands_in)
    cases = str(Path(__file__).with_name(file))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull, cases]
    save_config(tiny, tmp_path / "tiny.yaml")
    environment = os.environ | stands_in | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "REHEARSED": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
