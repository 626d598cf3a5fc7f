"""Mesh files to triangles, by trimesh: STL, PLY, OBJ, GLB, and STEP where cascadio is installed."""

from importlib.util import find_spec
from types import ModuleType

import numpy as np

from dino_depth.errors import ConfigError, DataError

__all__ = ["read_mesh"]

STEP = (".step", ".stp")  # which Open Cascade triangulates, by way of glTF


def read_mesh(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (vertices, 3) float64 in the file's own unit and triangle corners (triangles, 3) int32.

    Raises:
        ConfigError: trimesh, or what it reads STEP with, is not installed.
        DataError: not a readable mesh with an extent.
    """
    trimesh = _trimesh()
    with open(path, "rb"):
        pass  # a file that may not be read is an OSError; whatever follows is of what it holds
    try:
        mesh = trimesh.load_mesh(path)
        vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int32)
    except Exception as error:
        if path.lower().endswith(STEP) and find_spec("cascadio") is None:
            raise ConfigError(f"{path}: STEP files need cascadio: pip install 'dino-depth[step]'") from error
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: not a readable mesh ({type(error).__name__}: {reason})") from error
    if not len(faces) or not np.isfinite(vertices).all() or np.ptp(vertices[faces].reshape(-1, 3), axis=0).max() <= 0:
        raise DataError(f"{path}: the mesh has no triangles or no finite extent")
    used, places = np.unique(faces, return_inverse=True)
    return vertices[used], places.reshape(-1, 3).astype(np.int32)


def _trimesh() -> ModuleType:
    # Only files need it, and not every worker that renders shall load it.
    try:
        import trimesh
    except ImportError as missing:
        raise ConfigError(f"mesh files need {missing.name}: pip install 'dino-depth[render]' ({missing})") from None
    return trimesh
