"""Progress with rate, time left and peak memory: a bar on a terminal, plain lines everywhere else."""

import multiprocessing
import resource
import sys
import time

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dino_depth.terminal import plain, say

__all__ = ["Progress", "peak_memory"]


def peak_memory() -> int:
    """Largest resident memory of this process so far, bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Progress:
    """Reports how far a loop is, on standard error.

    Args:
        title: what is being done.
        total: number of steps.
        unit: what a step is, plural, for the rate.
        done: steps done before this process, when it resumes.
        every: seconds between plain lines.
    """

    def __init__(self, title: str, total: int, unit: str = "items", done: int = 0, every: float = 10.0):
        self.title, self.total, self.unit, self.every = title, total, unit, every
        self.first = self.done = done
        self.note = ""
        self.last = done  # what the last plain line said
        self.start = self.said = time.monotonic()
        self.bar = None

    def __enter__(self):
        console = Console(stderr=True)
        # Several processes would draw their bars over each other.
        if console.is_terminal and multiprocessing.parent_process() is None:
            columns = [TextColumn("{task.description}"), BarColumn(None), TextColumn("{task.completed}/{task.total}")]
            columns += [TimeRemainingColumn(compact=True), TextColumn("{task.fields[note]}")]
            self.bar = Bar(*columns, console=console, expand=True)
            self.task = self.bar.add_task(escape(plain(self.title)), total=self.total, completed=self.done, note="")
            self.bar.start()
        return self

    def __exit__(self, kind, error, traceback):
        if self.bar is not None:
            self.bar.stop()
        elif kind is None and self.done != self.last:
            self._say()

    def advance(self, steps: int = 1, note: str = ""):
        """Counts ``steps`` more; ``note`` is a short figure to show beside them."""
        self.done += steps
        self.note = note or self.note
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done, note=escape(plain(self._figures())))
        elif time.monotonic() - self.said >= self.every:
            self._say()

    def _figures(self) -> str:
        elapsed = max(time.monotonic() - self.start, 1e-9)
        rate = (self.done - self.first) / elapsed
        parts = [f"{rate:.3g} {self.unit}/s", f"{peak_memory() / 2**30:.1f} GiB"]
        return " ".join(parts + [self.note]).strip()

    def _say(self):
        self.said, self.last = time.monotonic(), self.done
        rate = (self.done - self.first) / max(self.said - self.start, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        ending = f", {left:.0f} s left" if 0 < left < float("inf") else ""
        say(f"{self.title}: {self.done}/{self.total} ({self._figures()}{ending})", error=True)
