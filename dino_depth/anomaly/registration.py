"""Rigid registration of a test instance with the training instance: robust point-to-plane ICP, and views in its frame.

The rig stands still and the part is never put down twice at the same place, so pixels of the same view show other
places of it. ``register`` finds the motion that brings a cloud onto another: point-to-plane ICP (Chen and Medioni 1992)
with Tukey's biweight on the residuals, so that a defect does not pull. ``moved_sample`` renders nothing: it moves the
measured pixels of each view to where the camera would have seen them had the part lain as in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import KDTree
from scipy.spatial.transform import Rotation

from dino_depth.anomaly.dataset import Sample, given
from dino_depth.anomaly.geometry import Camera, SquareFit, lift, project
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = ["Cloud", "Motion", "RegistrationConfig", "make_cloud", "moved_maps", "moved_sample", "register"]

CLOUD_POINTS = 40_000
SOURCE_POINTS = 8_000
ROUNDS = 60
REACH = 0.05  # of the target's diagonal: how far correspondences are looked for at first
SHARPEST = 4.685  # Tukey's constant: 95 % efficiency for normal noise
SETTLED = 1e-7  # radians, and shares of the diagonal
LARGEST_DEGREES = 20.0
LARGEST_SHIFT = 0.15  # of the diagonal
SMALLEST_INLIERS = 0.5
JUMP = 0.02  # of the depth: neighbours farther apart lie on two surfaces


@dataclass
class RegistrationConfig:
    """Whether test instances are brought to where the training instance lay.

    Attributes:
        method: ``none``, as in the papers; ``icp`` by rigid registration of the two clouds, which every head can run
            with. A registration that fails is logged, and the instance is scored as it lies.
    """

    method: Literal["none", "icp"] = "none"


@dataclass(frozen=True, eq=False)
class Cloud:
    """Points of a surface.

    Attributes:
        points: (n, 3) float64, world metres.
        normals: (n, 3) float64, unit length, towards the camera.
    """

    points: np.ndarray
    normals: np.ndarray

    @property
    def diagonal(self) -> float:
        """Of the bounding box, metres."""
        return float(np.linalg.norm(np.ptp(self.points, axis=0)))


@dataclass(frozen=True, eq=False)
class Motion:
    """A rigid motion and how well it fits.

    Attributes:
        matrix: (4, 4) float64 from the world of the test instance to that of the training instance, metres.
        residual: median distance of the points from the target's planes afterwards, metres.
        inliers: share of the points that have a partner.
        before: median distance without the motion, metres.
        failed: why it is not to be trusted; empty if it is. ``matrix`` is then the identity.
    """

    matrix: np.ndarray
    residual: float
    inliers: float
    before: float
    failed: str = ""

    @property
    def degrees(self) -> float:
        return float(np.degrees(Rotation.from_matrix(self.matrix[:3, :3]).magnitude()))

    def facts(self) -> dict[str, Any]:
        """For reports: degrees, millimetres, share, reason."""
        shift = 1000 * float(np.linalg.norm(self.matrix[:3, 3]))
        return {
            "degrees": round(self.degrees, 4),
            "shift_mm": round(shift, 4),
            "residual_mm": round(1000 * self.residual, 4),
            "before_mm": round(1000 * self.before, 4),
            "inliers": round(self.inliers, 4),
            "failed": self.failed,
        }


def surface_normals(camera: Camera, depth: DepthMap) -> tuple[np.ndarray, np.ndarray]:
    """Normals (height, width, 3) float64 in world coordinates, towards the camera, and where they are known.

    From central differences of the points; unknown at borders, beside missing pixels and across jumps of depth.
    """
    height, width = depth.depth.shape
    rows, columns = np.indices((height, width)).reshape(2, -1)
    points = lift(camera, np.stack([columns, rows], 1), depth.depth.ravel()).reshape(height, width, 3)
    known = np.zeros((height, width), bool)
    normals = np.zeros((height, width, 3))
    if min(height, width) < 3:
        return normals, known
    z, valid = depth.depth, depth.valid
    across, down = points[1:-1, 2:] - points[1:-1, :-2], points[2:, 1:-1] - points[:-2, 1:-1]
    near = JUMP * z[1:-1, 1:-1]
    smooth = (abs(z[1:-1, 2:] - z[1:-1, :-2]) < near) & (abs(z[2:, 1:-1] - z[:-2, 1:-1]) < near)
    inner = valid[1:-1, 1:-1] & valid[1:-1, 2:] & valid[1:-1, :-2] & valid[2:, 1:-1] & valid[:-2, 1:-1] & smooth
    normal = np.cross(down, across)
    length = np.linalg.norm(normal, axis=-1, keepdims=True)
    normals[1:-1, 1:-1] = normal / np.maximum(length, 1e-30)
    known[1:-1, 1:-1] = inner & (length[..., 0] > 0)
    away = ((points - camera.camera_to_world[:3, 3]) * normals).sum(-1) > 0
    normals[away] *= -1
    return normals, known


def make_cloud(depths: Sequence[DepthMap], cameras: Sequence[Camera], masks: Sequence[np.ndarray]) -> Cloud:
    """The surface that views show, thinned evenly over their pixels to some ten thousand points.

    Args:
        masks: (height, width) bool, the object in each view.

    Raises:
        DataError: no pixel has a normal.
    """
    stride = max(1, int(np.sqrt(sum(np.count_nonzero(mask) for mask in masks) / CLOUD_POINTS)))
    points, normals = [], []
    for depth, camera, mask in zip(depths, cameras, masks, strict=True):
        smoothed = _smoothed(depth)
        normal, known = surface_normals(camera, smoothed)
        chosen = np.zeros_like(mask)
        chosen[::stride, ::stride] = True
        rows, columns = np.nonzero(chosen & mask & known)
        points.append(lift(camera, np.stack([columns, rows], 1), depth.depth[rows, columns]))
        normals.append(normal[rows, columns])
    if not sum(map(len, points)):
        raise DataError("no pixel of the object has neighbours on its surface: nothing to register")
    # Rows as a saved model has them, so that a loaded one gives the same bits.
    return Cloud(*(np.ascontiguousarray(np.concatenate(part)) for part in (points, normals)))


def _smoothed(depth: DepthMap) -> DepthMap:
    """A 3 x 3 median where all of it is valid: sensor noise of a pixel would turn normals by tens of degrees."""
    calm = ndimage.median_filter(depth.depth, 3)
    whole = ndimage.minimum_filter(depth.valid, 3)
    return DepthMap(np.where(whole, calm, depth.depth), depth.valid, depth.kind)


def register(source: Cloud, target: Cloud) -> Motion:
    """The motion that brings ``source`` onto ``target``, which lies near already.

    Returns:
        The motion; where it does not fit, the identity with the reason in ``failed``.
    """
    step = max(1, len(source.points) // SOURCE_POINTS)
    points, tree, diagonal = source.points[::step], KDTree(target.points), target.diagonal
    centre = target.points.mean(0)
    matrix, reach = np.eye(4), REACH * diagonal
    before, _ = _distances(points, tree, target, reach)
    for _ in range(ROUNDS):
        here = points @ matrix[:3, :3].T + matrix[:3, 3]
        away, nearest = tree.query(here, distance_upper_bound=reach)
        found = np.isfinite(away)
        if np.count_nonzero(found) < 6:
            return _failure(before, "the clouds do not overlap")
        normals, moved = target.normals[nearest[found]], here[found] - centre
        distance = ((target.points[nearest[found]] - here[found]) * normals).sum(1)
        scale = 1.4826 * np.median(np.abs(distance))
        weight = np.clip(1 - np.square(distance / max(SHARPEST * scale, 1e-9 * diagonal)), 0, None) ** 2
        rows = np.concatenate([np.cross(moved, normals) / diagonal, normals], 1)  # rotation in units of the diagonal
        normal_matrix = (rows * weight[:, None]).T @ rows
        # Directions in which the surface slides over itself, as a ball's rotation, are left as they are.
        values, axes = np.linalg.eigh(normal_matrix)
        kept = values > 1e-4 * values[-1]
        move = axes[:, kept] @ ((axes[:, kept].T @ (rows.T @ (weight * distance))) / values[kept])
        turn, shift = move[:3] / diagonal, move[3:]
        step_matrix = np.eye(4)
        step_matrix[:3, :3] = Rotation.from_rotvec(turn).as_matrix()
        step_matrix[:3, 3] = centre + shift - step_matrix[:3, :3] @ centre
        matrix = step_matrix @ matrix
        reach = max(reach * 0.7, 0.01 * diagonal)
        if np.linalg.norm(turn) < SETTLED and np.linalg.norm(shift) < SETTLED * diagonal:
            break
    residual, inliers = _distances(points @ matrix[:3, :3].T + matrix[:3, 3], tree, target, reach)
    moved_centre = np.linalg.norm(matrix[:3, :3] @ centre + matrix[:3, 3] - centre)
    motion = Motion(matrix, residual, inliers, before)
    if motion.degrees > LARGEST_DEGREES or moved_centre > LARGEST_SHIFT * diagonal:
        return _failure(before, f"it turns by {motion.degrees:.1f} degrees and moves by {1000 * moved_centre:.1f} mm")
    if inliers < SMALLEST_INLIERS:
        return _failure(before, f"only {100 * inliers:.0f} % of the points meet the training instance")
    if residual > before:
        return _failure(before, f"{1000 * residual:.3f} mm afterwards, {1000 * before:.3f} mm before")
    return motion


def _distances(points: np.ndarray, tree: KDTree, target: Cloud, reach: float) -> tuple[float, float]:
    """Median distance from the planes of the nearest points, and the share of points that have one within reach."""
    away, nearest = tree.query(points, distance_upper_bound=reach)
    found = np.isfinite(away)
    if not found.any():
        return float("inf"), 0.0
    chosen = nearest[found]
    planes = np.abs(((points[found] - target.points[chosen]) * target.normals[chosen]).sum(1))
    return float(np.median(planes)), float(found.mean())


def _failure(before: float, reason: str) -> Motion:
    return Motion(np.eye(4), before, 0.0, before, reason)


def flow(depth: DepthMap, camera: Camera, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each pixel of a view goes when the part moves by ``matrix``.

    Returns:
        (height, width, 2) float64 displacement (columns, rows) and (height, width) float64 depth there, metres; where
        the view has no depth, the nearest pixel's displacement, and 0.
    """
    height, width = depth.depth.shape
    rows, columns = np.nonzero(depth.valid)
    points = lift(camera, np.stack([columns, rows], 1), depth.depth[rows, columns])
    places, z = project(camera, points @ matrix[:3, :3].T + matrix[:3, 3])
    moves, deep = np.zeros((height, width, 2)), np.zeros((height, width))
    moves[rows, columns] = np.nan_to_num(places - np.stack([columns, rows], 1))
    deep[rows, columns] = z
    nearest = ndimage.distance_transform_edt(~depth.valid, return_distances=False, return_indices=True)
    return moves[tuple(nearest)], deep


def moved_sample(sample: Sample, images: Sequence[np.ndarray], depths: Sequence[DepthMap],
                 cameras: Sequence[Camera], matrix: np.ndarray) -> tuple[Sample, list[np.ndarray]]:  # fmt: skip
    """The sample as its cameras would have seen it, had the part been moved by ``matrix``; motions are small.

    Returns:
        The sample with pixels in memory, and the displacement (height, width, 2) of each view's pixels, for
        ``moved_maps``.
    """
    views, moves = [], []
    for view, image, depth, camera in zip(sample.views, images, depths, cameras, strict=True):
        move, deep = flow(depth, camera, matrix)
        rows, columns = np.indices(depth.depth.shape).astype(np.float64)
        origin = np.stack([rows, columns])
        for _ in range(4):  # origin + move(origin) = place, by fixed points: motions are small and smooth
            at = [ndimage.map_coordinates(move[..., axis], origin, order=1, mode="nearest") for axis in (1, 0)]
            origin = np.stack([rows - at[0], columns - at[1]])
        planes = image[..., None] if image.ndim == 2 else image
        drawn = np.stack(
            [ndimage.map_coordinates(planes[..., c].astype(np.float32), origin, order=1, mode="nearest")
             for c in range(planes.shape[2])], -1,
        )  # fmt: skip
        drawn = np.rint(drawn).astype(np.uint8).reshape(image.shape)
        nearest = np.rint(origin).astype(np.int64)
        inside = ((nearest >= 0) & (nearest < np.array(depth.depth.shape)[:, None, None])).all(0)
        nearest = nearest.clip(0, np.array(depth.depth.shape)[:, None, None] - 1)
        valid = inside & depth.valid[tuple(nearest)]
        # Interpolated where all neighbours are one surface, the nearest pixel's elsewhere.
        smooth = ndimage.map_coordinates(deep, origin, order=1, mode="nearest")
        close = deep[tuple(nearest)]
        whole = ndimage.map_coordinates(depth.valid.astype(np.float32), origin, order=1, mode="constant") > 0.999
        value = np.where(whole & (abs(smooth - close) < JUMP * close), smooth, close)
        moved = DepthMap(np.where(valid, value, 0), valid & (value > 0), depth.kind)
        views.append(replace(view, read_image=given(drawn), read_depth=given(moved)))
        moves.append(move)
    return replace(sample, views=tuple(views)), moves


def moved_maps(maps: dict[str, torch.Tensor], moves: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Maps (V, n, n) of moved views at the pixels they were measured at: the inverse of ``moved_sample`` for maps."""
    back = {}
    for name, part in maps.items():
        count = part.shape[-1]
        views = []
        for values, move in zip(part, moves, strict=True):
            fit = SquareFit(*move.shape[:2], count)
            rows, columns = np.indices((count, count)).reshape(2, -1)
            pixels = fit.from_square(np.stack([columns, rows], 1).astype(np.float64))
            at = [ndimage.map_coordinates(move[..., axis], pixels.T[::-1], order=1, mode="nearest") for axis in (0, 1)]
            places = fit.to_square(pixels + np.stack(at, 1))
            found = ndimage.map_coordinates(values.numpy().astype(np.float64), places.T[::-1], order=1, mode="nearest")
            views.append(torch.from_numpy(found.reshape(count, count)).float())
        back[name] = torch.stack(views)
    return back
