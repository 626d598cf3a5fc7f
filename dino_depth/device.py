"""The device a process computes on, and in which precision."""

import contextlib
import ctypes
import os
import sys

import torch

from dino_depth.errors import ConfigError
from dino_depth.onednn import multiply_with_onednn, wants_onednn

__all__ = ["autocast", "gpu_figures", "has_bfloat16_units", "pick_device", "return_memory", "reuse_memory"]


def has_bfloat16_units(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    A CPU without AMX or AVX-512 BF16 does not; docs/performance.md.
    """
    return device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """bfloat16 matrix products, for ``bf16`` on a device that has units for them."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16" and has_bfloat16_units(device))


def pick_device(name: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` as a device of this process's rank, which is made ready for it.

    Raises:
        ConfigError: ``cuda`` was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no CUDA device; run dino-depth doctor")
    if name == "cpu" or not torch.cuda.is_available():
        if wants_onednn():
            multiply_with_onednn()
        return torch.device("cpu")
    # Crops and rows differ in number from step to step: fixed segments would be cut into pieces that fit none of them.
    # Read at the first allocation.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # A process may be shown its own GPU only.
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def gpu_figures(device: torch.device) -> dict[str, float]:
    """Memory that tensors took at most and that is reserved, GiB, and the share of the last second in which a kernel
    ran; nothing on a CPU, no share where the driver's library is not to be had."""
    if device.type != "cuda":
        return {}
    figures = {
        "gpu_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
        "gpu_reserved_gib": torch.cuda.memory_reserved(device) / 2**30,
    }
    # NVIDIA's library raises a type of its own where a container hides it; a run does not end for that.
    with contextlib.suppress(Exception):
        figures["gpu_busy"] = torch.cuda.utilization(device) / 100
    return figures


def reuse_memory():
    """Keeps freed memory in the process: a step frees and asks again for hundreds of megabytes of temporaries, and
    giving them back to the kernel costs a tenth of a CPU step in page faults."""
    _tell_malloc((-4, 0), (-1, 2**31 - 1), (-2, 2**28))  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD


@contextlib.contextmanager
def return_memory():
    """Gives freed tensors of 8 MiB and more back to the kernel: where temporaries and what stays are of one size, holes
    that fit neither grow the heap to several times what lives in it."""
    _tell_malloc((-3, 2**23))  # M_MMAP_THRESHOLD
    try:
        yield
    finally:
        _tell_malloc((-3, 2**25))  # what it comes to by itself


def _tell_malloc(*settings: tuple[int, int]):
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            mallopt = ctypes.CDLL(None).mallopt
            for parameter, value in settings:
                mallopt(parameter, value)
