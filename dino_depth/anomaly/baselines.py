"""The rows beside every method: scorers that look at no anomaly, a template, and one that knows the ground truth.

What the first reach, the benchmark gives away, and a method has to be read against the best of them. The template is
the simplest method that a fixed rig allows. The last is the ceiling: anomalies where no depth was measured are out of
reach of every method.
"""

import zlib

import numpy as np

from dino_depth.anomaly.dataset import Sample
from dino_depth.anomaly.trivial import statistics

__all__ = ["CONSTANT", "LEAK", "PERFECT", "RANDOM", "TEMPLATE", "random_map", "trivial_scores"]

LEAK = "leak statistic"  # the head's own score without the neighbourhood of defects
RANDOM = "random scores"
CONSTANT = "constant on the object"  # knows the object and nothing else
TEMPLATE = "template"  # the same cell of the same view of the training instance: see ``heads/template.py``
PERFECT = "perfect scorer"  # the ground truth, where the object is seen


def trivial_scores(sample: Sample, foregrounds: list[np.ndarray]) -> dict[str, float]:
    """Instance scores that one number of the input gives, by the name of the row.

    Raises:
        DataError: a view cannot be read, or shows no object.
    """
    return {name.replace("_", " "): value for name, value in statistics(sample, foregrounds).items()}


def random_map(sample: Sample, place: np.ndarray, seed: int) -> np.ndarray:
    """Random scores float32 in (0, 1], others for every sample and seed, and 0 where ``place`` (bool) is not."""
    key = [seed, zlib.crc32(f"{sample.category}/{sample.name}".encode())]
    return (1 - np.random.default_rng(key).random(place.shape, np.float32)) * place
