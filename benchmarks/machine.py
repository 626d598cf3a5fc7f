"""One Markdown paragraph: date, chip, driver, versions and revision, for figures that follow it."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from dino_depth.pretrain.run_folder import git_revision, library_versions


def processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}"


def accelerator() -> str:
    if not torch.cuda.is_available():
        return "no GPU"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB), driver {driver}, CUDA {torch.version.cuda}"


def main():
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    print(f"Measured on {datetime.date.today()}: {accelerator()}; {processor()}; Python {platform.python_version()},")
    print(f"{versions}; revision {git_revision()[:12]}.")


if __name__ == "__main__":
    main()
