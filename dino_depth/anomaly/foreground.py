"""Which pixels show the object, by depth alone, and how much of each cell of an encoder's grid they fill."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from dino_depth.anomaly.geometry import SquareFit, overlap
from dino_depth.depth import DepthMap, fit_plane
from dino_depth.errors import ConfigError, DataError

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
        size: side of the padded square that the map is looked at in, pixels (ModMap's release: 896); empty: as it is.
        tolerance: thickness of such a plane, metres (``plane`` only; 0.005 is usual for MVTec 3D-AD).
    """

    method: Literal["largest", "valid", "plane"] = "largest"
    size: int | None = None
    tolerance: float = 0.005

    def __post_init__(self):
        if self.size is not None and self.size < 1:
            raise ConfigError(f"foreground.size: must be at least 1 pixel, got {self.size}")


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
    if config.size is not None:
        fit = SquareFit(*valid.shape, config.size)
        seen = _largest(_nearest(valid, fit.from_square, (config.size,) * 2), config)
        return valid & _nearest(seen, fit.to_square, valid.shape)
    return _largest(valid, config)


def _nearest(mask: np.ndarray, place: Callable[[np.ndarray], np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """The mask at the pixel nearest to the place of each pixel of another image; False beyond its border."""
    rows, columns = (
        np.rint(place(np.stack([part, part], 1))[:, axis]).astype(int)
        for axis, part in ((1, np.arange(shape[0])), (0, np.arange(shape[1])))
    )
    inside = [(part >= 0) & (part < side) for part, side in zip((rows, columns), mask.shape, strict=True)]
    found = mask[np.ix_(*(part.clip(0, side - 1) for part, side in zip((rows, columns), mask.shape, strict=True)))]
    return found & inside[0][:, None] & inside[1]


def _largest(valid: np.ndarray, config: ForegroundConfig) -> np.ndarray:
    """The largest 4-connected component after a 3 x 3 opening; raises as ``foreground``."""
    columns, rows = (np.flatnonzero(valid.any(axis)) for axis in (0, 1))
    count = 0
    if len(rows):
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]  # all else is background
        labels, count = ndimage.label(_opened(valid[box]))
    if not count:
        flat = f": a part flatter than foreground.tolerance {config.tolerance:g} m?" if config.method == "plane" else ""
        raise DataError(f"no object in the depth map: foreground.method {config.method} leaves nothing of it{flat}")
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    shown = np.zeros_like(valid)
    shown[box] = labels == sizes.argmax()
    return shown


def _opened(mask: np.ndarray) -> np.ndarray:
    """The union of all 3 x 3 squares within a mask, as ``ndimage.binary_opening`` finds it: four shifts each way."""
    core = mask[:, 2:] & mask[:, 1:-1] & mask[:, :-2]  # centres, without the outermost rows and columns
    core = core[2:] & core[1:-1] & core[:-2]
    opened = np.zeros_like(mask)
    if core.size:
        wide = np.zeros((core.shape[0], mask.shape[1]), bool)
        for place in range(3):
            wide[:, place : place + core.shape[1]] |= core
        for place in range(3):
            opened[place : place + core.shape[0]] |= wide
    return opened


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
    down, across = (overlap(pixels, max(height, width), cells) for pixels in (height, width))
    return np.clip(down @ mask.astype(np.float32) @ across.T, 0, 1)
