"""A folder of mesh files, each a kind of object of its own; rendered in several poses."""

from pathlib import Path

import numpy as np
from numpy.random import Generator
from scipy.spatial.transform import Rotation

from data_prep.archives import hidden
from data_prep.synthetic.meshes import read_mesh
from dino_depth.bench.data import Source
from dino_depth.bench.sources import Options
from dino_depth.bench.sources.synthetic import BANK, TESTED

__all__ = ["FORM", "read", "recognises"]

SUFFIXES = (".glb", ".obj", ".off", ".ply", ".stl")
FORM = f"mesh files that end in {', '.join(SUFFIXES)}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not hidden(path.name))


def recognises(folder: Path) -> bool:
    return bool(_files(folder))


def read(folder: Path, options: Options) -> Source:
    """Raises DataError where a file is no mesh."""
    # Not before it is asked for: rendering needs the packages of an extra.
    from dino_depth.bench.rendered import inspections, orbits

    views, inspected, key = [], [], (options.seed, "bench meshes")
    files = _files(folder)
    for path in files:
        vertices, faces = read_mesh(str(path))

        def build(rng: Generator, vertices=vertices, faces=faces) -> tuple[np.ndarray, np.ndarray]:
            turn = Rotation.random(rng=rng).as_matrix()
            return (vertices @ turn.T).astype(np.float32), faces

        views += orbits(path.name, build, options.objects, options.views, key)
        if options.inspect:
            inspected.append(inspections(path.name, build, BANK, TESTED, key))
    return Source(folder.name, f"{len(files)} meshes, rendered", views, inspected)
