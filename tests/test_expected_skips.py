"""Unexpected skips fail where a run says which it expects."""

import os
import subprocess
import sys
from pathlib import Path

import expected_skips
import pytest

TESTS = Path(__file__).parent
SKIPS = """
import pytest

@pytest.fixture
def device():
    pytest.skip("no CUDA device")

def test_in_its_fixture(device): ...
def test_in_the_call(): pytest.skip("shared/cases/a.png is not beside this checkout")
@pytest.mark.skip(reason="too tired")
def test_by_a_mark(): ...
@pytest.mark.xfail
def test_that_is_known_to_fail(): assert False
def test_that_passes(): ...
"""
MODULE = "import pytest\npytest.importorskip('no_such_package')\n"


def run(folder: Path, expected: str | None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "EXPECTED_SKIPS"}
    environment |= {"PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment |= {} if expected is None else {"EXPECTED_SKIPS": expected}
    words = ["-p", "expected_skips", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", folder]
    words += ["--continue-on-collection-errors", folder]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], env=environment, capture_output=True, text=True, cwd=folder
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "expected, counts, unexpected",
    [
        (None, "1 passed, 4 skipped, 1 xfailed", ()),
        ("gpu shared", "1 passed, 2 skipped, 1 xfailed, 2 errors", ("too tired", "could not import")),
        ("", "1 failed, 1 passed, 1 xfailed, 3 errors", ("no CUDA", "shared/cases", "too tired", "could not import")),
    ],
)
def test_only_expected_skips_pass(tmp_path, expected, counts, unexpected):
    (tmp_path / "test_a.py").write_text(SKIPS)
    (tmp_path / "test_b.py").write_text(MODULE)
    printed = run(tmp_path, expected)
    assert counts in printed, printed
    assert printed.count("\nunexpected skip, see tests/expected_skips.py: Skipped: ") == len(unexpected), printed
    assert all(f"expected_skips.py: Skipped: {reason}" in printed for reason in unexpected), printed


def test_an_unknown_name_is_refused():
    with pytest.raises(pytest.UsageError, match="gpus is none of gpu, open3d"):
        expected_skips._expected("gpus open3d")
