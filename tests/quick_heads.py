"""Settings that make a head's fit quick, for tests of all heads; one without an entry is fitted with its defaults."""

import atexit
import shutil
import tempfile
from pathlib import Path

import torch

from dino_depth.anomaly.heads.efficientad.networks import KERNELS, pdn

FOLDER = Path(tempfile.mkdtemp(prefix="quick_heads"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)


def teacher_file(path: Path, widths=(4, 5, 6, 8), medium=False, named=False) -> str:
    """A file of random weights in the real format of a patch description network's, of any width."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        network = pdn(KERNELS[medium], [3, *widths])
    weights = network.state_dict()
    if named:
        numbers = list(dict.fromkeys(key.split(".")[0] for key in weights))
        renamed = {f"{number}.": f"conv{place + 1}." for place, number in enumerate(numbers)}
        weights = {renamed[key.split(".")[0] + "."] + key.split(".")[1]: part for key, part in weights.items()}
    torch.save(weights, path)
    return str(path)


QUICK = {
    "ast": {"steps": 3, "teacher": 4, "student": 4},
    "modmap": {"steps": 4, "image_to_depth": (8,), "depth_to_image": (8,)},
    "mvad": {"steps": 2, "blocks": (1, 1, 1), "windows": (4, 2, 2)},
    "sganet": {"steps": 3},
    "efficientad": {"teacher": teacher_file(FOLDER / "teacher.pth"), "steps": 2},
}
