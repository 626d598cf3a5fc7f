"""VisA: photographs as JPEG with an upper-case ending, masks of the anomalous ones, and tables of splits.

``<category>/Data/Images/{Normal,Anomaly}/NNNN.JPG``, ``<category>/Data/Masks/Anomaly/NNNN.png`` whose values are kinds
of defects from 1 on, ``<category>/image_anno.csv`` (image,label,mask) and, in ``split_csv``, ``1cls.csv``,
``2cls_highshot.csv`` and ``2cls_fewshot.csv`` (object,split,label,image,mask). Training and test images lie in one
folder; only the tables tell them apart.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.synthetic.photograph import KINDS, draw_light, draw_surface, photograph, save
from data_prep.synthetic.plan import Counts, Sample, generator
from data_prep.synthetic.render import Camera
from data_prep.synthetic.shots import Setup, shoot

__all__ = ["archives", "finish", "prepare", "samples", "write"]

NAME = Path(__file__).stem
SETUP = Setup(distances=(0.3, 0.7), tilts=(0, 30))
FOCAL_PER_SIZE = 5.5
FOLDERS = {"normal": "Normal", "anomaly": "Anomaly"}
# Training images of both labels in the tables for two classes: one of so many.
TRAINING = {"2cls_highshot": (3, 5), "2cls_fewshot": (1, 5)}


def samples(category: str, counts: Counts) -> Iterator[Sample]:
    """Sound training samples and, numbered on, sound test samples; half of the test samples are anomalous."""
    anomalous = counts.test // 2
    for index in range(counts.train + counts.test - anomalous):
        yield Sample(category, "train" if index < counts.train else "test", "normal", index)
    yield from (Sample(category, "test", "anomaly", index) for index in range(anomalous))


def prepare(root: Path, category: str, size: int, seed: int) -> None:
    for folder in ("Images/Normal", "Images/Anomaly", "Masks/Anomaly"):
        (root / category / "Data" / folder).mkdir(parents=True)


def write(root: Path, sample: Sample, size: int, plane: float, seed: int) -> None:
    # An image does not depend on its split, which the number of training samples decides.
    rng = generator(seed, NAME, sample.category, sample.label, sample.index)
    picture = Sample(sample.category, "all", sample.label, sample.index)
    defect = _kind(sample) if sample.label == "anomaly" else None
    camera = Camera(size, FOCAL_PER_SIZE * size, (size - 1) / 2, (size - 1) / 2)
    shot = shoot((seed, NAME), picture, defect, camera, SETUP, plane, rng)
    image = photograph(shot, draw_surface(shot, defect, rng), draw_light(rng), rng)
    Image.fromarray(image).save(root / _image(sample), "JPEG", quality=90)
    if defect:
        save(shot.mask * np.uint8(1 + KINDS.index(defect)), root / _mask(sample))


def _kind(sample: Sample) -> str:
    return KINDS[sample.index % len(KINDS)]


def _image(sample: Sample) -> str:
    return f"{sample.category}/Data/Images/{FOLDERS[sample.label]}/{sample.index:04d}.JPG"


def _mask(sample: Sample) -> str:
    return f"{sample.category}/Data/Masks/Anomaly/{sample.index:04d}.png" if sample.label == "anomaly" else ""


def finish(root: Path, samples: list[Sample]) -> None:
    """Writes the tables."""
    ordered = sorted(samples, key=lambda sample: (sample.category, _image(sample)))
    for category in sorted({sample.category for sample in ordered}):
        rows = [
            (_image(sample), _kind(sample) if sample.label == "anomaly" else "normal", _mask(sample))
            for sample in ordered
            if sample.category == category
        ]
        _table(root / category / "image_anno.csv", ("image", "label", "mask"), rows)
    splits = {"1cls": [sample.split for sample in ordered]}
    for name, (some, of) in TRAINING.items():
        splits[name] = ["train" if sample.index % of < some else "test" for sample in ordered]
    (root / "split_csv").mkdir()
    for name, column in splits.items():
        rows = [
            (sample.category, split, sample.label, _image(sample), _mask(sample))
            for sample, split in zip(ordered, column, strict=True)
        ]
        _table(root / "split_csv" / f"{name}.csv", ("object", "split", "label", "image", "mask"), rows)


def _table(path: Path, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def archives(root: Path) -> list[tuple[str, str]]:
    """The archives that the dataset is published as, each with the folder it holds; "" is the whole tree."""
    return [("VisA_20220922.tar", "")]
