"""The rows beside every method: scorers that look at no anomaly, and one that knows the ground truth.

What the former reach, the benchmark gives away, and a method has to be read against the best of them. The latter is
the ceiling: anomalies where no depth was measured are out of reach of every method.
"""

import zlib

import numpy as np

from dino_depth.anomaly.dataset import Sample
from dino_depth.anomaly.trivial import constant_map, statistics

__all__ = ["LEAK", "PERFECT", "trivial_scores", "uninformed_maps"]

LEAK = "leak statistic"  # the head's own score without the neighbourhood of defects
PERFECT = "perfect scorer"  # the ground truth, where the object is seen


def trivial_scores(sample: Sample, foregrounds: list[np.ndarray]) -> dict[str, float]:
    """Instance scores that one number of the input gives, by the name of the row.

    Raises:
        DataError: a view cannot be read, or shows no object.
    """
    return {name.replace("_", " "): value for name, value in statistics(sample, foregrounds).items()}


def uninformed_maps(sample: Sample, place: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Scores float32 in space that know where the object is and nothing else, by the name of the row.

    Args:
        place: where it is, bool of any shape; 0 elsewhere.
        seed: of the random scores, which lie in (0, 1] and are others for every sample.
    """
    key = [seed, zlib.crc32(f"{sample.category}/{sample.name}".encode())]
    random = 1 - np.random.default_rng(key).random(place.shape, np.float32)
    return {"random scores": random * place, "constant on the object": constant_map(place)}
