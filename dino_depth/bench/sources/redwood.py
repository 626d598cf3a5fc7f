"""Open3D's RGB-D folders, such as Redwood's: ``depth/*.png`` in millimetres and a ``trajectory.log`` of poses.

A pose in the log is a line of three numbers, the first of which counts the frames in the order of the files, and a
4 x 4 matrix, camera to world, metres. Intrinsics: ``intrinsic.json`` as Open3D writes it, or else PrimeSense's.
"""

import json
from pathlib import Path

import numpy as np

from data_prep.archives import hidden
from dino_depth.anomaly.dataset import named
from dino_depth.anomaly.geometry import Camera
from dino_depth.bench.data import Source, View
from dino_depth.bench.sources import Options, evenly, files
from dino_depth.bench.sources.posed import read_depth
from dino_depth.errors import DataError

__all__ = ["FORM", "read", "recognises"]

LOG = "trajectory.log"
FORM = f"depth/*.png and {LOG}"
PRIMESENSE = np.array([[525.0, 0, 319.5], [0, 525, 239.5], [0, 0, 1]])


def _logs(folder: Path) -> list[Path]:
    return [path for path in files(folder, LOG) if path.name == LOG]


def recognises(folder: Path) -> bool:
    return bool(_logs(folder))


def read(folder: Path, options: Options) -> Source:
    """Raises DataError where the log or a depth file is broken, or there is no pose for a file."""
    views = []
    logs = _logs(folder)
    for log in logs:
        scene = log.parent.name
        files = [path for path in sorted(log.parent.glob("depth/*.png")) if not hidden(path.name)]
        poses, matrix = _poses(log), _intrinsics(log.parent)
        if not files:
            raise DataError(f"{log.parent / 'depth'}: no .png file")
        for number, path in evenly(list(enumerate(files)), options.frames):
            if number not in poses:
                raise DataError(f"{log}: no pose of frame {number} ({path.name}); it has {len(poses)} poses")
            depth = read_depth(path)
            camera = named(f"{log}: frame {number}", Camera, *depth.depth.shape, matrix, poses[number])
            views.append(View(scene, path.stem, depth, camera))
    return Source(folder.name, f"{len(logs)} scenes of posed frames", views)


def _poses(log: Path) -> dict[int, np.ndarray]:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line.split() for line in lines if line.strip()]
    poses = {}
    for start in range(0, len(lines), 5):
        block = lines[start : start + 5]
        try:
            pose = np.array([[float(number) for number in line] for line in block[1:]])
            poses[int(block[0][0])] = pose.reshape(4, 4)
        except (ValueError, IndexError):
            raise DataError(f"{log}: pose {start // 5} is not a line of numbers and a 4x4 matrix") from None
    return poses


def _intrinsics(folder: Path) -> np.ndarray:
    path = folder / "intrinsic.json"
    if not path.is_file():
        return PRIMESENSE
    try:
        columns = np.array(json.loads(path.read_text(encoding="utf-8"))["intrinsic_matrix"], np.float64)
        return columns.reshape(3, 3).T
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no intrinsic_matrix of nine numbers: {type(error).__name__} {error}") from None
