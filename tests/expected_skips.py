"""With EXPECTED_SKIPS set, a test that skips for another reason than those it names fails: a green run ran the rest.

``EXPECTED_SKIPS="gpu open3d"`` names keys of ``REASONS``; empty, no test may skip. Unset, as in ``make test``, any may.
Its functions are hooks of pytest, which ``conftest.py`` imports.
"""

import os
import re

import pytest

__all__ = ["pytest_make_collect_report", "pytest_runtest_makereport"]

REASONS = {
    "gpu": r"(no|needs a) CUDA device|this machine has a (CUDA device|GPU)|there is a real GPU|does not work here",
    "open3d": r"open3d is not installed",
    "slurm": r"apt-get install slurmctld|slurmd needs root",
    "browser": r"no Chromium on this machine",
    "shared": r"shared/\S+ is not beside this checkout",
    "root": r"needs root, to become another user",
}


def _expected(names: str | None) -> str:
    """What a reason has to match."""
    if names is None:
        return ""
    if unknown := set(names.split()) - set(REASONS):
        raise pytest.UsageError(f"EXPECTED_SKIPS: {', '.join(sorted(unknown))} is none of {', '.join(REASONS)}")
    return "|".join(REASONS[name] for name in names.split()) or "(?!)"


EXPECTED = _expected(os.environ.get("EXPECTED_SKIPS"))


def _refuse(report):
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not re.search(EXPECTED, reason):
            report.outcome, report.longrepr = "failed", f"unexpected skip, see tests/expected_skips.py: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return _refuse((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return _refuse((yield))
