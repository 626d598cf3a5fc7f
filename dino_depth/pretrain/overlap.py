"""What keeps a GPU from waiting for the host: batches made while it computes, figures read a step late.

The host only queues a GPU's work. As long as it never waits for a result, it makes the next batch, and queues the next
step, while the GPU computes this one. On a CPU all of this is the plain thing.
"""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from dino_depth import distributed
from dino_depth.pretrain.batch import Batch

__all__ = ["Behind", "ahead"]


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """``batches``, whose copies and crops run on a stream of their own on a GPU, beside the step before."""
    if device.type != "cuda":
        yield from batches
        return
    copying, computing = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    while True:
        with torch.cuda.stream(copying):
            batch = next(batches, None)
        if batch is None:
            return
        computing.wait_stream(copying)
        batch.used_on(computing)
        yield batch


class Behind:
    """A few numbers of each step, brought to the host without waiting and read when the next step is queued."""

    def __init__(self, device: torch.device):
        self.device = device
        self._waiting: list[tuple[int, Tensor, torch.cuda.Event | None]] = []

    def put(self, step: int, values: Tensor):
        """``values`` (n,) float32 of a step whose work is queued."""
        if self.device.type != "cuda":
            self._waiting.append((step, values, None))
            return
        host = torch.empty(values.shape, pin_memory=True)
        host.copy_(values, non_blocking=True)
        there = torch.cuda.Event()
        there.record()
        self._waiting.append((step, host, there))

    def take(self, all_of_them: bool) -> list[tuple[int, list[float]]]:
        """Steps and their numbers that were not taken yet: the last step's too, or those before it.

        Raises:
            DistBackendError: another rank did not answer within the timeout.
        """
        count = len(self._waiting) - (0 if all_of_them else 1)
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        for _, _, there in ready:
            distributed.wait(there)
        return [(step, values.tolist()) for step, values, _ in ready]

    def idle_since(self, moment: float) -> float:
        """Seconds since ``moment`` in which the device may have had nothing to do: 0 if its work is not done yet."""
        busy = self._waiting and self._waiting[-1][2] is not None and not self._waiting[-1][2].query()
        return 0.0 if busy else time.perf_counter() - moment
