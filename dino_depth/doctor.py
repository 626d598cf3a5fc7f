"""What this machine offers and what a run on it will use."""

import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from dino_depth.device import has_bfloat16_units
from dino_depth.onednn import multiply_with_onednn, wants_onednn
from dino_depth.vit import probe_attention

__all__ = ["DoctorConfig", "doctor"]

BACKENDS = ("grouped", "varlen", "xformers")
PACKAGES = ("torch", "torchvision", "timm", "transformers", "xformers", "webdataset", "numpy", "pillow", "submitit")
RENDERING = ("embreex", "manifold3d", "trimesh")  # the extra render


@dataclass
class DoctorConfig:
    """Print what this machine offers.

    Attributes:
        path: folder whose disk is looked at.
    """

    path: str = "."


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def doctor(config: DoctorConfig):
    """Prints accelerator, attention backends (each called once), disk, memory and shared memory, then the choices."""
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    rows += [(package, _version(package)) for package in PACKAGES + RENDERING]
    if cuda:
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            rows.append((f"gpu {index}", f"{gpu.name}, {_gib(gpu.total_memory)}"))
    else:
        rows.append(("accelerator", "none that torch sees"))
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows.append(("processor", f"{cores} cores usable, {_gib(pages)} memory"))
    rows.append(("disk free", f"{_gib(shutil.disk_usage(config.path).free)} at {Path(config.path).resolve()}"))
    if not cuda and wants_onednn():
        reason = multiply_with_onednn()
        rows.append(
            ("float32 products", f"by MKL: {reason}" if reason else "by oneDNN: MKL makes no use of AVX-512 here")
        )
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm")
        small = "" if shared.total > 2**30 else "  (small: batches of workers pass through it)"
        rows.append(("shared memory", f"{_gib(shared.free)} free of {_gib(shared.total)}{small}"))
    working = []
    for backend in BACKENDS:
        reason = probe_attention(backend, device, dtype)
        rows.append((f"attention {backend}", "works" if reason is None else f"no: {reason}"))
        working += [backend] if reason is None else []
    for name, value in rows:
        print(f"{name:19} {value}"[:79])
    workers = max(0, cores - 1) if cores > 2 else 0
    products = "bfloat16" if has_bfloat16_units(torch.device(device)) else "float32 (no bfloat16 units)"
    print(f"\nA run will use {device}, matrix products in {products}, attention {working[0]}")
    print(f"Suggested on this machine: --data.workers {workers}")
    usable = [name for name in working if name != "grouped"]
    if usable:
        print(f"Also usable: {', '.join(f'--model.attention {name}' for name in usable)}")
