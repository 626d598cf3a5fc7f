"""Signals that end a run: between two steps, with a checkpoint, or at once while there is nothing to save yet."""

import signal
import threading

from dino_depth.errors import Interrupted
from dino_depth.pretrain.loading import SIGNALS

__all__ = ["Stop"]


class Stop:
    """Catches ``SIGNALS`` as long as it is entered.

    Attributes:
        steps: whether steps are made; a signal is then remembered, else it ends the run where it is.
        asked: whether one came.
        name: its name.
    """

    def __init__(self, out: str):
        self.out, self.steps, self.asked, self.name = out, False, False, "another rank"
        self._before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        self.asked, self.name = True, signal.Signals(number).name
        if not self.steps:
            raise Interrupted(f"{self.out}: stopped before the first step by {self.name}; continue with --resume")

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
