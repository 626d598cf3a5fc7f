"""The state of a fit that takes minutes, kept now and then so that a killed process loses little of it."""

import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

__all__ = ["Keeper", "write_state"]

log = getLogger("dino_depth")

EVERY_SECONDS = 60.0  # the least time between two writes


class Keeper:
    """Keeps the state of a training loop in a file.

    A loop restores once, keeps after every step and gives the same bits as one that never stopped. Whoever asked for
    the fit removes the file once the fitted head is safe.

    Args:
        path: of the file; None keeps nothing.
    """

    def __init__(self, path: Path | None):
        self.path, self.last = path, time.monotonic()

    def restore(self) -> Mapping[str, Any] | None:
        """What was kept last; None where nothing was, or where the file is damaged."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # torch raises whatever its zip reader and unpickler meet
            log.warning("%s is damaged, the fit starts anew: %s", self.path, type(error).__name__)
            return None

    def keep(self, state: Callable[[], Mapping[str, Any]]):
        """Writes ``state()``, plain values and tensors, if it is time to."""
        if self.path is None or time.monotonic() - self.last < EVERY_SECONDS:
            return
        write_state(self.path, state())
        self.last = time.monotonic()


def write_state(path: Path, content: Mapping[str, Any]):
    """Writes plain values and tensors to a file that is whole or absent, whoever else writes it; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Jobs of an array may fit the same head at the same time.
    partial = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.part")
    buffer = io.BytesIO()  # torch's own writer hides why a file cannot be written
    torch.save(content, buffer)
    try:
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
