"""Cameras: pixels to rays, depth to points, points to pixels, and the square that encoders see.

The pixel convention of the anomaly package, stated here only: the centre of the pixel in column c and row r is at
(c, r), whole numbers, as OpenCV and the renderer have it; the image covers -0.5 .. width - 0.5. Resizing by s therefore
moves u to s * (u + 0.5) - 0.5. (``dino_depth.resample`` counts from the corner of the image: its x is u + 0.5.)

Camera axes are x to the right, y down and z along the optical axis. Depth is the z of a point in metres, not the length
of its ray. Poses are (4, 4) matrices from camera to world coordinates, metres.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from dino_depth.errors import DataError

__all__ = [
    "Camera", "SquareFit", "back_project", "lift", "lift_mask", "overlap", "project", "rays", "resize_camera",
]  # fmt: skip

RIGID = 1e-3  # largest departure of a rotation from orthonormality: poses are often written with few digits
NEWTON_STEPS = 20
INVERTED = 1e-3  # pixels: how well a distortion must be undone
LENSES = (0, 4, 5)  # numbers of distortion coefficients
STEP = 16  # pixels between the rays that are undistorted in a large image; and rows that are lifted at once
LARGE = 2**19  # pixels: from here on the rays between are interpolated


@dataclass(frozen=True, eq=False)
class Camera:
    """A calibrated pinhole camera.

    Attributes:
        height: of the image, pixels.
        width: of the image, pixels.
        matrix: (3, 3) float64, focal lengths and principal point in pixels.
        camera_to_world: (4, 4) float64 rigid, metres.
        distortion: OpenCV's k1, k2, p1, p2 and, where given, k3; empty for none.

    Raises:
        DataError: a matrix has the wrong shape or values that are not finite, a focal length is not positive, the pose
            is not rigid, or there are neither 0, 4 nor 5 coefficients.
    """

    height: int
    width: int
    matrix: np.ndarray
    camera_to_world: np.ndarray
    distortion: tuple[float, ...] = ()

    def __post_init__(self):
        matrix, pose = np.asarray(self.matrix, np.float64), np.asarray(self.camera_to_world, np.float64)
        if self.height < 1 or self.width < 1:
            raise DataError(f"height and width must be positive, got {self.height} and {self.width}")
        if matrix.shape != (3, 3) or not np.isfinite(matrix).all() or matrix[2].tolist() != [0, 0, 1]:
            raise DataError(f"matrix must be (3, 3), finite, with the last row 0 0 1, got {matrix.tolist()}")
        if min(matrix[0, 0], matrix[1, 1]) <= 0 or matrix[1, 0] != 0:
            raise DataError(f"matrix must have positive focal lengths and no entry below them, got {matrix.tolist()}")
        if pose.shape != (4, 4) or not np.isfinite(pose).all() or pose[3].tolist() != [0, 0, 0, 1]:
            raise DataError(f"camera_to_world must be (4, 4), finite, with the last row 0 0 0 1, got {pose.tolist()}")
        turn = pose[:3, :3]
        if abs(turn @ turn.T - np.eye(3)).max() > RIGID or np.linalg.det(turn) < 0:
            raise DataError(f"camera_to_world must hold a rotation, got {turn.tolist()}")
        if len(self.distortion) not in LENSES or not np.isfinite(self.distortion).all():
            raise DataError(f"distortion must be k1 k2 p1 p2 [k3] or empty, got {self.distortion}")
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "camera_to_world", pose)
        object.__setattr__(self, "distortion", tuple(map(float, self.distortion)))


def resize_camera(camera: Camera, height: int, width: int) -> Camera:
    """The camera of its image at another resolution.

    Raises:
        DataError: the new size has another shape; one pixel of rounding is allowed.
    """
    if (height, width) == (camera.height, camera.width):
        return camera
    if abs(height * camera.width - width * camera.height) > max(camera.height, camera.width):
        raise DataError(f"calibrated at {camera.height}x{camera.width}, which has another shape than {height}x{width}")
    scale = np.array([width / camera.width, height / camera.height])
    matrix = camera.matrix.copy()
    matrix[:2, :2] *= scale[:, None]
    matrix[:2, 2] = scale * (matrix[:2, 2] + 0.5) - 0.5
    return replace(camera, height=height, width=width, matrix=matrix)


def rays(camera: Camera) -> np.ndarray:
    """Directions (height, width, 3) float64 in camera coordinates, with z = 1: a point is its ray times its depth."""
    rows, columns = np.indices((camera.height, camera.width)).reshape(2, -1)
    x, y = _flat(camera, columns, rows)
    return np.stack([x, y, np.ones_like(x)], 1).reshape(camera.height, camera.width, 3)


def lift(camera: Camera, pixels: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """World points (n, 3) float64, metres, of pixels (n, 2) given as (column, row) at depths (n,), metres."""
    return _to_world(camera, *_flat(camera, pixels[:, 0], pixels[:, 1]), np.asarray(depth, np.float64)).T


def lift_mask(camera: Camera, depth: np.ndarray, mask: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """World points of a mask's pixels, in blocks that stay in a core's cache.

    The points are those of :func:`lift`, bit for bit, but where the lens distorts an image of ``LARGE`` pixels or more:
    there every ``STEP``-th ray is undistorted, and those between are interpolated. On a lens like SiM3D's (k1 -0.08, 5
    coefficients, 4096 x 3000) that moves a point at 0.7 m by 0.0002 mm at most; ``tests/test_geometry.py`` holds it
    below a hundredth of a pixel.

    Args:
        depth, mask: (height, width) of the camera, metres and bool.

    Yields:
        Rows and columns of a block, and (3, n) float64 world metres of the mask's pixels in it, row by row.
    """
    columns, rows = (np.flatnonzero(mask.any(axis)) for axis in (0, 1))
    if not len(rows):
        return
    across = slice(int(columns[0]), int(columns[-1]) + 1)
    for first in range(int(rows[0]), int(rows[-1]) + 1, STEP):
        down = slice(first, min(first + STEP, int(rows[-1]) + 1))
        here = mask[down, across]
        if here.any():
            x, y = (part[here] for part in _flat_block(camera, down, across))
            yield down, across, _to_world(camera, x, y, depth[down, across][here].astype(np.float64))


def _to_world(camera: Camera, x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """(3, n) of directions (n,) at depths (n,)."""
    # Coordinates in rows of their own, here and in what is returned: millions of points are several times faster so.
    local = np.stack([x * depth, y * depth, depth])
    turn = camera.camera_to_world[:3, :3]
    # BLAS takes another way, of other last bits, for a single vector.
    points = turn @ local if local.shape[1] != 1 else (turn @ local.repeat(2, 1))[:, :1]
    points += camera.camera_to_world[:3, 3:]
    return points


def _flat_block(camera: Camera, down: slice, across: slice) -> tuple[np.ndarray, np.ndarray]:
    """x and y (rows, columns) at z = 1 of the directions in which a block's pixels look."""
    if not any(camera.distortion) or camera.height * camera.width < LARGE:
        rows, columns = np.mgrid[down, across]
        x, y = _flat(camera, columns.ravel(), rows.ravel())
        return x.reshape(rows.shape), y.reshape(rows.shape)
    known = _flat_rows(camera.height, camera.width, camera.matrix.tobytes(), camera.distortion)[..., across]
    place = np.arange(down.start, down.stop) / STEP
    low = np.minimum(place.astype(np.int64), known.shape[1] - 2)
    weight = (place - low)[:, None]
    return tuple(part[low] + weight * (part[low + 1] - part[low]) for part in known)


@lru_cache(maxsize=2)
def _flat_rows(height: int, width: int, matrix: bytes, distortion: tuple[float, ...]) -> np.ndarray:
    """x and y (2, k, width) of every ``STEP``-th row; the views of a rig share them."""
    camera = Camera(height, width, np.frombuffer(matrix).reshape(3, 3), np.eye(4), distortion)
    rows, columns = (np.arange(-(-(side - 1) // STEP) + 1) * STEP for side in (height, width))
    down, across = (part.ravel() for part in np.meshgrid(rows, columns, indexing="ij"))
    known = np.stack(_flat(camera, across, down)).reshape(2, len(rows), len(columns))
    place = np.arange(width) / STEP
    low = np.minimum(place.astype(np.int64), len(columns) - 2)
    return known[..., low] + (place - low) * (known[..., low + 1] - known[..., low])


def back_project(camera: Camera, depth: np.ndarray) -> np.ndarray:
    """World points (height, width, 3) float64, metres, of a whole depth map (height, width), metres.

    Raises:
        DataError: the map has not the camera's size.
    """
    if depth.shape != (camera.height, camera.width):
        raise DataError(f"depth is {depth.shape[0]}x{depth.shape[1]}, its camera {camera.height}x{camera.width}")
    rows, columns = np.indices(depth.shape).reshape(2, -1)
    return lift(camera, np.stack([columns, rows]).T, depth.ravel()).reshape(*depth.shape, 3)


def project(camera: Camera, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where world points (n, 3), metres, appear.

    Returns:
        Pixels (n, 2) float64 as (column, row), NaN for points that are not before the camera, inside the image or
        not; and depths (n,) float64, metres.
    """
    turn, place = camera.camera_to_world[:3, :3], camera.camera_to_world[:3, 3]
    local = (np.asarray(points, np.float64) - place) @ turn
    depth = local[:, 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        flat = np.where(depth[:, None] > 0, local[:, :2] / depth[:, None], np.nan)
    return _distort(camera, flat) @ camera.matrix[:2, :2].T + camera.matrix[:2, 2], depth


def _flat(camera: Camera, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y (n,) at z = 1 of the directions in which pixels look."""
    y = (rows - camera.matrix[1, 2]) / camera.matrix[1, 1]
    x = (columns - camera.matrix[0, 2] - camera.matrix[0, 1] * y) / camera.matrix[0, 0]
    if any(camera.distortion):
        x, y = _undistort(camera, np.stack([x, y], 1)).T
    return x, y


def _distort(camera: Camera, flat: np.ndarray) -> np.ndarray:
    """Where the lens puts directions (n, 2), as the camera model of OpenCV's documentation has it."""
    if not any(camera.distortion):
        return flat
    k1, k2, p1, p2, k3 = (*camera.distortion, 0.0)[:5]
    x, y = flat.T
    square = x * x + y * y
    radial = 1 + square * (k1 + square * (k2 + square * k3))
    return np.stack(
        [
            x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x),
            y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y,
        ],
        1,
    )


def _undistort(camera: Camera, seen: np.ndarray) -> np.ndarray:
    """The inverse of :func:`_distort`, by Newton's method with the exact Jacobian."""
    k1, k2, p1, p2, k3 = (*camera.distortion, 0.0)[:5]
    flat = seen.copy()
    tolerance = INVERTED / max(camera.matrix[0, 0], camera.matrix[1, 1])
    for _ in range(NEWTON_STEPS):
        off = _distort(camera, flat) - seen
        if abs(off).max() < tolerance * 1e-3:
            return flat
        x, y = flat.T
        square = x * x + y * y
        radial = 1 + square * (k1 + square * (k2 + square * k3))
        slope = 2 * (k1 + square * (2 * k2 + square * 3 * k3))
        xx = radial + slope * x * x + 2 * p1 * y + 6 * p2 * x
        yy = radial + slope * y * y + 6 * p1 * y + 2 * p2 * x
        xy = slope * x * y + 2 * p1 * x + 2 * p2 * y
        with np.errstate(all="ignore"):
            step = np.stack([yy * off[:, 0] - xy * off[:, 1], xx * off[:, 1] - xy * off[:, 0]], 1)
            flat = flat - step / (xx * yy - xy * xy)[:, None]
    if not abs(_distort(camera, flat) - seen).max() < tolerance:
        raise DataError(f"distortion {camera.distortion} folds the image over itself: it cannot be undone everywhere")
    return flat


@dataclass(frozen=True)
class SquareFit:
    """How an image lies in the square that an encoder sees: centred, its longer side as long as the square's.

    The same as ``dino_depth.resample.fit_square``.

    Attributes:
        height: of the image, pixels.
        width: of the image, pixels.
        size: of the square, pixels.
    """

    height: int
    width: int
    size: int

    @property
    def side(self) -> int:
        return max(self.height, self.width)

    @property
    def padding(self) -> np.ndarray:
        """(2,) pixels of the image left of it and above it."""
        return np.array([self.side - self.width, self.side - self.height]) / 2

    def to_square(self, pixels: np.ndarray) -> np.ndarray:
        """Places (n, 2) in the square of places (n, 2) in the image, both (column, row)."""
        return self.size / self.side * (pixels + 0.5 + self.padding) - 0.5

    def from_square(self, pixels: np.ndarray) -> np.ndarray:
        """The inverse of :meth:`to_square`."""
        return self.side / self.size * (pixels + 0.5) - 0.5 - self.padding

    def fit(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (..., n, n) that cover the square from maps (..., height, width) of the image, n being ``size``.

        Each place is the mean of the pixels of its area, and 0 where the square is padding: the inverse of ``unfit``
        where the square is as long as the image, averaged where it is shorter.
        """
        for axis, pixels in ((-2, self.height), (-1, self.width)):
            weight = torch.from_numpy(overlap(pixels, self.side, self.size)).to(maps)
            weight = weight / weight.sum(1, keepdim=True).clamp_min(1e-12)
            maps = weight @ maps if axis == -2 else maps @ weight.T
        return maps

    def unfit(
        self, maps: torch.Tensor | np.ndarray, down: slice = slice(None), across: slice = slice(None)
    ) -> torch.Tensor | np.ndarray:
        """Maps (..., height, width) of the image from maps (..., n, n) that cover the square with any number of cells.

        Bilinear between the centres of the cells; beyond the outermost ones their values continue. With rows and
        columns it is that part of them, in the same bits.
        """
        if isinstance(maps, np.ndarray):
            return self.unfit(torch.from_numpy(maps), down, across).numpy()
        for axis, part, padding in (
            (-2, np.arange(self.height)[down], self.padding[1]),
            (-1, np.arange(self.width)[across], self.padding[0]),
        ):
            cells = maps.shape[axis]
            place = cells / self.side * (part + 0.5 + padding) - 0.5
            place = np.clip(place, 0, cells - 1)
            low = np.minimum(place.astype(np.int64), max(cells - 2, 0))
            weight = torch.from_numpy(place - low).to(maps)
            weight = weight[:, None] if axis == -2 else weight
            low = torch.from_numpy(low).to(maps.device)
            high = torch.clamp(low + 1, max=cells - 1)
            maps = torch.lerp(maps.index_select(axis, low), maps.index_select(axis, high), weight)
        return maps


def overlap(pixels: int, side: int, cells: int) -> np.ndarray:
    """The share of each cell that each pixel covers along one axis, (cells, pixels) float32."""
    edges = np.arange(cells + 1) * side / cells - (side - pixels) / 2
    start = np.arange(pixels)
    length = np.minimum(edges[1:, None], start + 1) - np.maximum(edges[:-1, None], start)
    return (np.clip(length, 0, None) * cells / side).astype(np.float32)
