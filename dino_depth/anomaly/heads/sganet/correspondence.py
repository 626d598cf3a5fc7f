"""Cells of two views that show the same place, by measured depth and calibration (SGANet, section 3.5, in words)."""

import numpy as np

from dino_depth.anomaly.geometry import SquareFit, project
from dino_depth.anomaly.views import Views

__all__ = ["corresponding_cells"]


def corresponding_cells(
    views: Views, first: int, second: int, tolerance: float = 0.01, mutual: bool = False
) -> np.ndarray:
    """C_vu: (n, 2) int64 places of cells of ``first`` and of ``second`` in their grids; each of ``first`` at most once.

    The point at a cell's centre, or at the object's pixel nearest to it within the cell, is projected into the other
    view. It counts where it lies before that camera, inside its image, and as deep as was measured there: what is
    hidden by something else, or falls on a hole, shows nothing of the place.

    Args:
        tolerance: by how much both depths may differ, share of the depth.
        mutual: only pairs that the second view finds as well.
    """
    pairs = _directed(views, first, second, tolerance)
    if mutual:
        back = {(i, j) for j, i in _directed(views, second, first, tolerance).tolist()}
        pairs = np.array([pair for pair in pairs.tolist() if tuple(pair) in back], np.int64).reshape(-1, 2)
    return pairs


def _directed(views: Views, first: int, second: int, tolerance: float) -> np.ndarray:
    points, shown = views.cell_points
    cells = np.flatnonzero(shown[first])
    pixels, depth = project(views.cameras[second], points[first].reshape(-1, 3)[cells])
    seen = views.depths[second]
    height, width = seen.depth.shape
    with np.errstate(invalid="ignore"):
        inside = (depth > 0) & (pixels > -0.5).all(1) & (pixels < [width - 0.5, height - 0.5]).all(1)
    cells, pixels, depth = cells[inside], pixels[inside], depth[inside]
    columns, rows = np.rint(pixels).astype(np.int64).clip(0, [width - 1, height - 1]).T
    there = seen.depth[rows, columns]
    visible = seen.valid[rows, columns] & (np.abs(depth - there) <= tolerance * depth)
    count = shown.shape[-1]
    places = np.rint(SquareFit(height, width, count).to_square(pixels)).astype(np.int64).clip(0, count - 1)
    return np.stack([cells, places[:, 1] * count + places[:, 0]], 1)[visible]
