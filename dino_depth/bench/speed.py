"""Milliseconds from a depth map to its features: one map at a time, preparation included, as a user waits for it."""

import statistics
import time

import torch

from dino_depth.bench.data import View
from dino_depth.bench.features import input_size
from dino_depth.errors import ReportedError
from dino_depth.frozen import FrozenEncoder

__all__ = ["SIZES", "milliseconds"]

SIZES = (224, 896)
REPEATS, ENOUGH = 5, 3.0  # repetitions after the first, and seconds after which fewer do


@torch.inference_mode()
def milliseconds(encoder: FrozenEncoder, view: View) -> dict[str, float | None]:
    """The median of a few repetitions at each of ``SIZES`` (the nearest multiple of the patches); None: out of memory.

    The first run, in which libraries prepare themselves, does not count.
    """
    found = {}
    for size in SIZES:
        side, taken, start = input_size(encoder, size), [], time.perf_counter()
        try:
            while len(taken) < 1 + REPEATS and (len(taken) < 2 or time.perf_counter() - start < ENOUGH):
                before = time.perf_counter()
                encoder.encode(encoder.prepare(view.depth, side, view.camera.matrix)[None])
                if encoder.device.type == "cuda":
                    torch.cuda.synchronize(encoder.device)
                taken.append(1000 * (time.perf_counter() - before))
        except (torch.OutOfMemoryError, MemoryError):
            found[f"ms_{size}"] = None
            continue
        except RuntimeError as error:
            raise ReportedError(f"{encoder.name} at {side} pixels: {' '.join(str(error).split())[:200]}") from None
        found[f"ms_{size}"] = statistics.median(taken[1:])
    return found
