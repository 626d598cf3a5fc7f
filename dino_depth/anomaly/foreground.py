"""Which pixels show the object, by depth alone, and how much of each cell of an encoder's grid they fill."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from dino_depth.depth import DepthMap, fit_plane
from dino_depth.errors import DataError

__all__ = ["ForegroundConfig", "cell_share", "filled", "foreground"]

BORDER = 10  # pixels: where the supporting plane is looked for
PLANES = 2  # a table and a wall
PLANE_SUPPORT = 0.2  # smallest share of the border that makes a plane a background


@dataclass
class ForegroundConfig:
    """What counts as the object.

    Attributes:
        method: ``largest`` is the largest 4-connected component of the valid pixels after a 3 x 3 opening (SiM3D as
            ModMap's release has it); ``valid`` is every valid pixel; ``plane`` first takes away what lies on the planes
            that the border of the map shows, a table or a wall (MVTec 3D-AD, Eyecandies).
        tolerance: thickness of such a plane, metres (``plane`` only; 0.005 is usual for MVTec 3D-AD).
    """

    method: Literal["largest", "valid", "plane"] = "largest"
    tolerance: float = 0.005


def foreground(depth_map: DepthMap, config: ForegroundConfig) -> np.ndarray:
    """The object's valid pixels, (height, width) bool.

    Raises:
        DataError: nothing is left of the map.
    """
    valid = depth_map.valid
    if config.method == "valid":
        return valid
    if config.method == "plane":
        valid = _without_planes(depth_map, config.tolerance)
    opened = ndimage.binary_opening(valid, np.ones((3, 3), bool))
    labels, count = ndimage.label(opened)
    if not count:
        raise DataError(f"no object in the depth map: foreground.method {config.method} leaves nothing of it")
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def _without_planes(depth_map: DepthMap, tolerance: float) -> np.ndarray:
    """The valid pixels that lie on no plane of the map's border."""
    depth, left = depth_map.depth, depth_map.valid.copy()
    border = np.ones_like(left)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    least = PLANE_SUPPORT * np.count_nonzero(left & border)
    rows, columns = (np.arange(side, dtype=np.float64) / max(depth.shape) for side in depth.shape)
    for _ in range(PLANES):
        edge = left & border
        if np.count_nonzero(edge) < max(3, least):
            break
        shown = DepthMap(depth, edge, depth_map.kind)
        plane, support = fit_plane(shown, tolerance / float(np.median(depth[edge])))
        if support * np.count_nonzero(edge) < least:
            break
        inverse = plane[0] * columns[None] + plane[1] * rows[:, None] + plane[2]
        # Behind its horizon a plane is infinitely far away: nothing lies on it there.
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.where(inverse > 0, 1 / inverse, np.inf) - depth
        left &= distance > tolerance
    return left


def filled(mask: np.ndarray, grow: int = 0) -> np.ndarray:
    """The object region (height, width) bool of a foreground: its holes filled, then grown by ``grow`` pixels.

    What a sensor misses at a defect is a hole in the foreground, so ground truth lies in this region rather than on
    the foreground itself.
    """
    region = ndimage.binary_fill_holes(mask)
    return ndimage.distance_transform_edt(~region) <= grow if grow else region


def cell_share(mask: np.ndarray, cells: int) -> np.ndarray:
    """Share of each cell's area that is foreground, (cells, cells) float32 of the padded square; exact.

    Args:
        mask: (height, width) bool, in the geometry of :class:`dino_depth.anomaly.geometry.SquareFit`.
    """
    height, width = mask.shape
    down, across = (_overlap(pixels, max(height, width), cells) for pixels in (height, width))
    return np.clip(down @ mask.astype(np.float32) @ across.T, 0, 1)


def _overlap(pixels: int, side: int, cells: int) -> np.ndarray:
    """The share of each cell that each pixel covers along one axis, (cells, pixels) float32."""
    edges = np.arange(cells + 1) * side / cells - (side - pixels) / 2
    start = np.arange(pixels)
    length = np.minimum(edges[1:, None], start + 1) - np.maximum(edges[:-1, None], start)
    return (np.clip(length, 0, None) * cells / side).astype(np.float32)
