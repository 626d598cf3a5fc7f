"""Baselines that look at no anomaly: whatever they score, a benchmark's artefacts score without a method.

In the real cable_gland of MVTec 3D-AD the share of missing pixels alone separates good from bad; a constant on the
object reaches an AUPRO of 0.67 at 30 % where a background of zeros counts as normal. So every result shows these rows
beside the methods'.
"""

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

from dino_depth.anomaly.dataset import Sample, Voxels
from dino_depth.anomaly.volume import ScoredVolume

__all__ = ["constant_map", "leak_score", "leak_score_volume", "statistics"]

NEIGHBOUR = 20  # pixels around a defect that the leak statistic leaves out


def statistics(sample: Sample, foregrounds: list[np.ndarray]) -> dict[str, float]:
    """Trivial instance scores, each a mean over the views: larger may be taken for more anomalous.

    Args:
        foregrounds: (height, width) bool of each view, the object.

    Returns:
        ``fraction_missing`` of the pixels; ``mean_intensity`` of the image on the object, 0 to 1; ``mean_depth`` of the
        object, metres; ``object_share`` of the pixels.

    Raises:
        DataError: a view cannot be read.
    """
    rows = []
    for view, mask in zip(sample.views, foregrounds, strict=True):
        depth_map, image = view.read_depth(), view.read_image()
        rows.append(
            {
                "fraction_missing": 1 - depth_map.valid.mean(),
                "mean_intensity": image[mask].mean() / 255,
                "mean_depth": depth_map.depth[mask].mean(dtype=np.float64),
                "object_share": mask.mean(),
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def constant_map(mask: np.ndarray) -> np.ndarray:
    """The map (height, width) float32 that knows the object and nothing else: 1 on it, 0 elsewhere."""
    return mask.astype(np.float32)


def leak_score(scores: np.ndarray, truth: np.ndarray, region: np.ndarray) -> float:
    """The instance score without the defect: the maximum over the pixels farther than 20 pixels from ground truth.

    Its I-AUROC should be about 0.5. Where it is not, something other than the defect tells anomalous samples apart.

    Args:
        scores: (height, width).
        truth: (height, width) bool.
        region: (height, width) bool, the pixels that count.

    Returns:
        NaN where nothing is left.
    """
    left = region & (ndimage.distance_transform_edt(~truth) > NEIGHBOUR) if truth.any() else region
    return float(scores[left].max()) if left.any() else float("nan")


def leak_score_volume(volume: ScoredVolume, truth: Voxels, distance: float) -> float:
    """The same of a volume: the maximum over the voxels farther than ``distance`` metres from ground truth."""
    left = np.ones(len(volume.score), bool)
    if len(truth.index):
        left = KDTree(truth.centers).query(volume.voxels.centers, distance_upper_bound=distance)[0] > distance
    return float(volume.score[left].max()) if left.any() else float("nan")
