"""What is to be drawn, said before anything is: needs none of the packages that render."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator

__all__ = ["Counts", "Sample", "Sim3dOptions", "generator"]


@dataclass(frozen=True)
class Counts:
    """Samples per category: defect-free training and validation samples, and test samples of both kinds."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class Sample:
    """What identifies a sample, and with the seed determines it.

    Attributes:
        label: the layout's name of its defect, or "good".
        index: its number among the samples of the same category, split and, where the layout has one folder for each
            label, label.
    """

    category: str
    split: str
    label: str
    index: int


@dataclass
class Sim3dOptions:
    """What only the layout sim3d needs. The size of an image is its width.

    Attributes:
        difficulty: how much recordings differ and how large defects are; see data_prep/synthetic/nuisances.py.
        views: views of each instance.
        rings: rings of cameras from low to high that share the views.
        height: height of an image, pixels; as wide as high if not given.
        voxel: edge of a ground-truth voxel, metres; below the distance of neighbouring pixels on the surface (3.7 mm
            at 224 pixels) no view can reach all of them.
        mesh: a file with an object (STL, PLY, OBJ, OFF or GLB, any unit, z up), or a list of them; the name of the
            file is the category's. Without ``categories`` there are no others.
    """

    difficulty: Literal["clean", "mild", "hard"] = "mild"
    views: int = 12
    rings: int = 1
    height: int | None = None
    voxel: float = 0.006
    mesh: str | list[str] | None = None


def generator(*key: object) -> Generator:
    """A random generator that depends on the key only, not on what was drawn before or by whom."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, "<u4"))
