"""MVTec AD 2: photographs of scenes, of which the public test shows each under six lights from one place.

``<category>/{train,validation}/good/NNN_regular.png``, ``<category>/test_public/{good,bad}/NNN_<light>.png`` with
``<category>/test_public/ground_truth/bad/NNN_<light>_mask.png``, and without labels
``<category>/test_private/NNN_regular.png`` and ``<category>/test_private_mixed/NNN_mixed.png``. A sample is a scene.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.photograph import KINDS, Light, draw_light, draw_surface, photograph, save
from data_prep.synthetic.plan import Counts, Sample, generator
from data_prep.synthetic.render import Camera
from data_prep.synthetic.shots import Setup, shoot

__all__ = ["archives", "prepare", "samples", "write"]

NAME = Path(__file__).stem
SETUP = Setup(distances=(0.3, 0.7), tilts=(0, 15))
FOCAL_PER_SIZE = 5.5
LIGHTS = ("regular", "overexposed", "underexposed", "shift_1", "shift_2", "shift_3")
PUBLIC, PRIVATE, MIXED = "test_public", "test_private", "test_private_mixed"


def samples(category: str, counts: Counts) -> Iterator[Sample]:
    """Defect-free training and validation scenes; a third of the test scenes in each test split, half of them bad."""
    yield from (Sample(category, "train", "good", index) for index in range(counts.train))
    yield from (Sample(category, "validation", "good", index) for index in range(counts.validation))
    private = counts.test // 3
    for place in range(counts.test - 2 * private):
        yield Sample(category, PUBLIC, ("good", "bad")[place % 2], place // 2)
    for split in (PRIVATE, MIXED):
        yield from (Sample(category, split, ("good", "bad")[index % 2], index) for index in range(private))


def prepare(root: Path, category: str, size: int, seed: int) -> None:
    folders = ["train/good", "validation/good", *(f"{PUBLIC}/{name}" for name in ("good", "bad", "ground_truth/bad"))]
    for folder in (*folders, PRIVATE, MIXED):
        (root / category / folder).mkdir(parents=True)


def write(root: Path, sample: Sample, size: int, plane: float, seed: int) -> None:
    rng = generator(seed, NAME, sample.category, sample.split, sample.label, sample.index)
    defect = str(rng.choice(KINDS)) if sample.label == "bad" else None
    camera = Camera(size, FOCAL_PER_SIZE * size, (size - 1) / 2, (size - 1) / 2)
    shot = shoot((seed, NAME), sample, defect, camera, SETUP, plane, rng)
    surface, regular = draw_surface(shot, defect, rng), draw_light(rng)
    folder = root / sample.category / sample.split
    for name in {PUBLIC: LIGHTS, MIXED: ("mixed",)}.get(sample.split, ("regular",)):
        image = photograph(shot, surface, _changed(regular, name, rng), rng)
        stem = f"{sample.index:03d}_{name}"
        save(image, folder / ("" if sample.split in (PRIVATE, MIXED) else sample.label) / f"{stem}.png")
        if defect and sample.split == PUBLIC:
            save(shot.mask, folder / "ground_truth" / "bad" / f"{stem}_mask.png")


def _changed(regular: Light, name: str, rng: Generator) -> Light:
    if name == "mixed":
        name = str(rng.choice(LIGHTS))
    if name in ("overexposed", "underexposed"):
        return replace(regular, exposure=2.0 if name == "overexposed" else 0.35)
    if name == "regular":
        return regular
    # A shift: the lamp stands elsewhere and has another colour.
    angle = (int(name[-1]) + rng.uniform(-0.2, 0.2)) * np.pi / 2
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    return replace(regular, position=turn @ regular.position, tint=rng.uniform(0.75, 1, 3))


def archives(root: Path) -> list[tuple[str, str]]:
    """The archives that the dataset is published as, each with the folder it holds; "" is the whole tree."""
    return [("mvtec_ad_2.tar.gz", "")]
