"""Folders of posed frames, the documented form, which is that of 7-Scenes too.

ROOT/[SCENE/]NAME.depth.png     16 bits, millimetres, 0 and 65535 missing; or .tiff or .npy, metres
             NAME.pose.txt      4 x 4, camera to world, metres
             camera-intrinsics.txt   3 x 3, pixels; also in a folder above; 7-Scenes' own has none (585, 320, 240)
"""

from pathlib import Path

import numpy as np

from data_prep.formats import decode_npy, decode_png, decode_tiff
from dino_depth.anomaly.dataset import named
from dino_depth.anomaly.geometry import Camera
from dino_depth.bench.data import Source, View
from dino_depth.bench.sources import Options, evenly, files
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = ["FORM", "read", "read_depth", "read_matrix", "recognises"]

FORM = "NAME.depth.png beside NAME.pose.txt"
SUFFIXES = (".depth.png", ".depth.tiff", ".depth.npy")
INTRINSICS = "camera-intrinsics.txt"
SEVEN_SCENES = np.array([[585.0, 0, 320], [0, 585, 240], [0, 0, 1]])
MILLIMETRE, MISSING = 1e-3, 65535


def recognises(folder: Path) -> bool:
    return any(files(folder, suffix) for suffix in SUFFIXES)


def read(folder: Path, options: Options) -> Source:
    """Raises DataError where a pose, the intrinsics or a file is missing or is not what it should be."""
    scenes: dict[Path, list[Path]] = {}
    for suffix in SUFFIXES:
        for path in files(folder, suffix):
            scenes.setdefault(path.parent, []).append(path)
    views = []
    for scene in sorted(scenes):
        name = folder.name if scene == folder else str(scene.relative_to(folder))
        views += [_view(path, name, folder) for path in evenly(sorted(scenes[scene]), options.frames)]
    return Source(folder.name, f"{len(scenes)} scenes of posed frames", views)


def _view(path: Path, scene: str, root: Path) -> View:
    stem = path.name.split(".depth.")[0]
    pose = path.with_name(f"{stem}.pose.txt")
    if not pose.is_file():
        raise DataError(f"{path}: its pose {pose.name} is missing")
    depth = read_depth(path)
    camera = (*depth.depth.shape, _intrinsics(path.parent, root, depth), read_matrix(pose, (4, 4)))
    return View(scene, stem, depth, named(str(pose), Camera, *camera))


def read_depth(path: Path, unit: float = MILLIMETRE) -> DepthMap:
    """Depth of a 16-bit PNG (``unit`` metres a step), TIFF or npy file (metres).

    Raises:
        DataError: not such a file, or nothing in it is valid.
    """
    content = path.read_bytes()

    def decode() -> DepthMap:
        if path.suffix != ".png":
            return DepthMap.from_values({".npy": decode_npy, ".tiff": decode_tiff}[path.suffix](content))
        codes = decode_png(content)
        return DepthMap.from_values(np.where(codes == MISSING, 0, codes) * np.float32(unit))

    return named(str(path), decode)


def read_matrix(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """A matrix of numbers in a text file.

    Raises:
        DataError: it has another shape, or holds something else.
    """
    try:
        matrix = np.loadtxt(path, ndmin=2)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a matrix of numbers: {' '.join(str(error).split())[:120]}") from None
    if matrix.shape != shape:
        raise DataError(f"{path}: must be {shape[0]}x{shape[1]} numbers, got {matrix.shape[0]}x{matrix.shape[1]}")
    return matrix


def _intrinsics(folder: Path, root: Path, depth: DepthMap) -> np.ndarray:
    while True:
        path = folder / INTRINSICS
        if path.is_file():
            return read_matrix(path, (3, 3))
        if folder == root:
            break
        folder = folder.parent
    if depth.depth.shape == (480, 640) and next(folder.rglob("frame-??????.depth.png"), None):
        return SEVEN_SCENES
    raise DataError(f"{root / INTRINSICS} is missing: 3x3 numbers, pixels")
