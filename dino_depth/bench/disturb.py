"""The same view by a worse sensor: noise, holes, or another principle. Strengths are fixed, so that losses compare.

Everything is drawn from a seed and the names of the view, whatever else is measured.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from scipy.ndimage import distance_transform_edt, minimum_filter, uniform_filter, zoom

from data_prep.synthetic.plan import generator
from dino_depth.bench.data import View
from dino_depth.depth import DepthMap

__all__ = ["DISTURBANCES", "disturbed", "filled"]

NOISE = 0.003  # standard deviation of a pixel, as a share of its depth
HOLES = 0.2  # of the pixels with depth
HOLE_CELLS = 7  # along a side: of the noise whose lowest values become holes
STEPS, DEVIATION = 8, 0.06  # of a disparity: parts of a pixel it is measured in, and its noise in pixels
NEAREST_DISPARITY = 60.0  # pixels, of the median depth: the baseline fits the working distance, as users choose it
DARK = 0.1  # share of pixels that another sensor loses in patches


def _grain(shape: tuple[int, int], rng: Generator) -> np.ndarray:
    """(height, width): lowest in smooth patches, as dark or shiny surfaces are lost, with fine grain at their edges."""
    coarse = rng.standard_normal((HOLE_CELLS, HOLE_CELLS))
    field = zoom(coarse, (shape[0] / HOLE_CELLS, shape[1] / HOLE_CELLS), order=1, grid_mode=True, mode="nearest")
    field = field[: shape[0], : shape[1]] + 0.3 * rng.standard_normal(shape)
    return field


def _lost(valid: np.ndarray, share: float, rng: Generator) -> np.ndarray:
    field = _grain(valid.shape, rng)
    return valid & (field < np.quantile(field[valid], share))


def noise(depth_map: DepthMap, rng: Generator) -> np.ndarray:
    """Independent normal noise, .3 % of the depth."""
    return depth_map.depth * (1 + NOISE * rng.standard_normal(depth_map.depth.shape))


def holes(depth_map: DepthMap, rng: Generator) -> np.ndarray:
    """A fifth of the pixels that have depth is lost, in patches."""
    return np.where(_lost(depth_map.valid, HOLES, rng), 0, depth_map.depth)


def sensor(depth_map: DepthMap, rng: Generator) -> np.ndarray:
    """Stereo instead: a disparity of 60 pixels at the median depth, matched in windows of 3, with eighths of a pixel.

    Near edges grow by a pixel, neighbours share their noise, and a tenth of the pixels is lost in patches.
    """
    depth, valid = depth_map.depth.astype(np.float64), depth_map.valid
    near = minimum_filter(np.where(valid, depth, np.inf), 3)
    depth = np.where(valid & np.isfinite(near), near, 1.0)
    product = NEAREST_DISPARITY * np.median(depth_map.depth[valid])
    shared = 3 * uniform_filter(rng.standard_normal(depth.shape), 3, mode="wrap")
    disparity = np.rint((product / depth + DEVIATION * shared) * STEPS) / STEPS
    seen = valid & (disparity > 0) & ~_lost(valid, DARK, rng)
    return np.where(seen, product / np.where(disparity > 0, disparity, 1), 0)


DISTURBANCES: dict[str, Callable[[DepthMap, Generator], np.ndarray]] = {
    "noise": noise,
    "holes": holes,
    "sensor": sensor,
}


def disturbed(view: View, name: str, seed: int) -> DepthMap:
    """The map of a view under a disturbance of ``DISTURBANCES``; "" leaves it as it is."""
    if not name:
        return view.depth
    rng = generator(seed, "bench", name, view.scene, view.name)
    return DepthMap.from_values(DISTURBANCES[name](view.depth, rng).astype(np.float32), view.depth.kind)


def filled(depth_map: DepthMap) -> DepthMap:
    """The map with every missing pixel at the depth of the nearest pixel that has one."""
    if depth_map.valid.all():
        return depth_map
    nearest = distance_transform_edt(~depth_map.valid, return_distances=False, return_indices=True)
    return DepthMap(depth_map.depth[tuple(nearest)], np.ones_like(depth_map.valid), depth_map.kind)
