"""A folder of depth maps for pretraining, read by ``prep folder``: parts of all families, any view, several sensors.

``<split>/<family>/NNNNNN.png``, 16 bits, 50 micrometres a step (``--folder.scale 0.00005``), 0 where the sensor
measured nothing. There are no images, no calibration and no defects.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.synthetic.families import FAMILIES
from data_prep.synthetic.plan import Counts, Sample, generator
from data_prep.synthetic.scenes import World, build_world, shoot_world

__all__ = ["CATEGORIES", "DEFAULTS", "STEP", "prepare", "samples", "write"]

NAME = Path(__file__).stem
CATEGORIES = FAMILIES
DEFAULTS = {"size": 160}
STEP = 5e-5  # metres
SHOTS = 3  # of one world


def samples(category: str, counts: Counts) -> Iterator[Sample]:
    for split in ("train", "validation", "test"):
        yield from (Sample(category, split, "good", index) for index in range(getattr(counts, split)))


def prepare(root: Path, category: str, size: int, seed: int) -> None:
    for split in ("train", "validation", "test"):
        (root / split / category).mkdir(parents=True)


@lru_cache(maxsize=1)
def _world(category: str, plane: float, *key: object) -> World:
    return build_world(category, plane, generator(*key, category, "world"))


def write(root: Path, sample: Sample, size: int, plane: float, seed: int) -> None:
    key = (seed, NAME, sample.category, sample.split)
    world = _world(sample.category, plane, *key, sample.index // SHOTS)
    depth = shoot_world(world, size, generator(*key, sample.index))
    codes = np.rint(depth / STEP)
    codes[codes > np.iinfo(np.uint16).max] = 0  # beyond 3.2 m the sensor measures nothing
    Image.fromarray(codes.astype(np.uint16)).save(
        root / sample.split / sample.category / f"{sample.index:06d}.png", compress_level=1
    )
