"""MVTec AD: photographs of parts seen from above, some categories in grey, and a mask of each defect.

``<category>/train/good/NNN.png``, ``<category>/test/<good|defect>/NNN.png`` and
``<category>/ground_truth/<defect>/NNN_mask.png``. There is no validation split.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.synthetic.photograph import KINDS, PAINT, draw_light, draw_surface, photograph, save
from data_prep.synthetic.plan import Counts, Sample, generator
from data_prep.synthetic.render import Camera
from data_prep.synthetic.shots import Setup, shoot

__all__ = ["archives", "prepare", "samples", "write"]

NAME = Path(__file__).stem
SETUP = Setup(distances=(0.3, 0.7), tilts=(0, 15))
FOCAL_PER_SIZE = 5.5
LABELS = {"color" if kind == PAINT else kind: kind for kind in KINDS}
GREY = ("hex_nut", "heat_sink", "stepped_shaft")


def samples(category: str, counts: Counts) -> Iterator[Sample]:
    """Defect-free training samples; half of the test samples have a defect, each kind in turn."""
    yield from (Sample(category, "train", "good", index) for index in range(counts.train))
    defective = counts.test // 2
    yield from (Sample(category, "test", "good", index) for index in range(counts.test - defective))
    labels = list(LABELS)
    for place in range(defective):
        yield Sample(category, "test", labels[place % len(labels)], place // len(labels))


def prepare(root: Path, category: str, size: int, seed: int) -> None:
    for folder in ("train/good", "test/good"):
        (root / category / folder).mkdir(parents=True)


def write(root: Path, sample: Sample, size: int, plane: float, seed: int) -> None:
    rng = generator(seed, NAME, sample.category, sample.split, sample.label, sample.index)
    defect = LABELS.get(sample.label)
    camera = Camera(size, FOCAL_PER_SIZE * size, (size - 1) / 2, (size - 1) / 2)
    shot = shoot((seed, NAME), sample, defect, camera, SETUP, plane, rng)
    image = photograph(shot, draw_surface(shot, defect, rng), draw_light(rng), rng)
    if sample.category in GREY:
        image = np.asarray(Image.fromarray(image).convert("L"))
    folder, stem = root / sample.category, f"{sample.index:03d}"
    save(image, folder / sample.split / sample.label / f"{stem}.png")
    if defect:
        save(shot.mask, folder / "ground_truth" / sample.label / f"{stem}_mask.png")


def archives(root: Path) -> list[tuple[str, str]]:
    """The archives that the dataset is published as, each with the folder it holds; "" is the whole tree."""
    return [("mvtec_anomaly_detection.tar.xz", "")]
