"""MVTec LOCO AD: photographs with structural anomalies (damage) and logical ones (the wrong part).

``<category>/{train,validation}/good/NNN.png``, ``<category>/test/<good or anomaly>/NNN.png`` and, for each anomalous
image, a folder ``<category>/ground_truth/<anomaly>/NNN/`` of masks ``000.png``, ``001.png``. The anomalies are
``logical_anomalies`` and ``structural_anomalies``. A logical one is a part of another category: one mask shows it,
another where the right part should be.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data_prep.synthetic.parts import CATEGORIES
from data_prep.synthetic.photograph import KINDS, draw_light, draw_surface, photograph, save
from data_prep.synthetic.plan import Counts, Sample, generator
from data_prep.synthetic.render import Camera
from data_prep.synthetic.shots import Setup, shoot

__all__ = ["archives", "prepare", "samples", "write"]

NAME = Path(__file__).stem
SETUP = Setup(distances=(0.3, 0.7), tilts=(0, 15))
FOCAL_PER_SIZE = 5.5
LOGICAL, STRUCTURAL = "logical_anomalies", "structural_anomalies"


def samples(category: str, counts: Counts) -> Iterator[Sample]:
    """Defect-free training and validation samples; half of the test samples are anomalous, both kinds in turn."""
    yield from (Sample(category, "train", "good", index) for index in range(counts.train))
    yield from (Sample(category, "validation", "good", index) for index in range(counts.validation))
    anomalous = counts.test // 2
    yield from (Sample(category, "test", "good", index) for index in range(counts.test - anomalous))
    for place in range(anomalous):
        yield Sample(category, "test", (LOGICAL, STRUCTURAL)[place % 2], place // 2)


def prepare(root: Path, category: str, size: int, seed: int) -> None:
    for folder in ("train/good", "validation/good", "test/good"):
        (root / category / folder).mkdir(parents=True)


def write(root: Path, sample: Sample, size: int, plane: float, seed: int) -> None:
    key = (seed, NAME, sample.category, sample.split, sample.label, sample.index)
    rng = generator(*key)
    defect = str(rng.choice(KINDS)) if sample.label == STRUCTURAL else None
    camera = Camera(size, FOCAL_PER_SIZE * size, (size - 1) / 2, (size - 1) / 2)
    shown = sample
    if sample.label == LOGICAL:
        others = [category for category in CATEGORIES if category != sample.category]
        shown = replace(sample, category=str(rng.choice(others)))
    shot = shoot((seed, NAME), shown, defect, camera, SETUP, plane, rng)
    name = f"{sample.index:03d}"
    image = photograph(shot, draw_surface(shot, defect, rng), draw_light(rng), rng)
    save(image, root / sample.category / sample.split / sample.label / f"{name}.png")
    masks = []
    if sample.label == STRUCTURAL:
        masks = [shot.mask]
    elif sample.label == LOGICAL:
        right = shoot((seed, NAME), sample, None, camera, SETUP, plane, generator(*key, "right"))
        masks = [shot.seen.part, right.seen.part]
    for place, mask in enumerate(masks):
        save(mask, root / sample.category / "ground_truth" / sample.label / name / f"{place:03d}.png")


def archives(root: Path) -> list[tuple[str, str]]:
    """The archives that the dataset is published as, each with the folder it holds; "" is the whole tree."""
    return [("mvtec_loco_anomaly_detection.tar.xz", "")]
