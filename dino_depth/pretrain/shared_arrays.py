"""Arrays that processes of one machine share, in memory that is freed when the last of them ends, however it ends."""

import mmap
import os
import tempfile
import weakref

import numpy as np

__all__ = ["SharedArrays"]

ALIGNMENT = 64  # bytes


class SharedArrays:
    """Named one-dimensional arrays, all 0 at first, in one piece of memory without a name.

    Pickled, they are the place where other processes of this machine find them for as long as this one lives: nothing
    is copied, whichever way processes start.

    Args:
        layout: length and dtype of each array.
        place: of arrays that another process made; None makes new ones.
    """

    def __init__(self, layout: dict[str, tuple[int, str]], place: str | None = None):
        self._layout, ends = layout, {}
        size = 0
        for name, (length, dtype) in layout.items():
            size = -(-size // ALIGNMENT) * ALIGNMENT
            ends[name] = size
            size += length * np.dtype(dtype).itemsize
        if place is not None:
            descriptor, self.place = os.open(place, os.O_RDWR), place
        elif hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("dino-depth")
            self.place = f"/proc/{os.getpid()}/fd/{descriptor}"
            # The descriptor is the memory's only name: it stays open for others to find.
            weakref.finalize(self, os.close, descriptor)
        else:
            descriptor, self.place = tempfile.mkstemp(prefix="dino-depth-")
            weakref.finalize(self, _remove, os.getpid(), self.place)
        if place is None:
            os.truncate(descriptor, max(size, 1))
        memory = mmap.mmap(descriptor, max(size, 1))
        if place is not None or not self.place.startswith("/proc/"):
            os.close(descriptor)
        self._arrays = {
            name: np.frombuffer(memory, dtype, length, ends[name]) for name, (length, dtype) in layout.items()
        }

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __reduce__(self):
        return SharedArrays, (self._layout, self.place)


def _remove(owner: int, path: str):
    if os.getpid() == owner:  # a forked child that ends has the same object
        os.unlink(path)
