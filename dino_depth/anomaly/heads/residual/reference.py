"""The training instance as the residual head keeps it, and how far a measured point lies from its surface."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial import KDTree
from torch import Tensor

from dino_depth.anomaly.geometry import Camera, lift, project
from dino_depth.anomaly.registration import surface_normals
from dino_depth.depth import DepthMap

__all__ = ["NEIGHBOURS", "Reference", "Surface", "plane_distance", "sampled", "thin_view", "without_low_frequencies"]

AROUND = 32  # points that a place of the surface is averaged over
FACING = 0.7  # cosine between normals of one side of the part
LARGEST = 400_000  # points of a surface
BLOCK = 8192  # points that are compared at a time, for the processor's cache
PITCH = 8  # the neighbour of a place whose distance says how far apart points lie there
NEIGHBOURS = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]


@dataclass(frozen=True, eq=False)
class Reference:
    """One view of a training instance, thinned to the working size.

    Attributes:
        image: (height, width) float32 luminance, 0 to 1.
        depth: (height, width) float32 metres, 0 where missing.
        camera: of that size.
    """

    image: np.ndarray
    depth: np.ndarray
    camera: Camera

    def surface(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Points and normals (height, width, 3) float64 in world coordinates, and where both are known."""
        height, width = self.depth.shape
        valid = self.depth > 0
        calm = ndimage.median_filter(self.depth, 3)
        whole = ndimage.minimum_filter(valid, 3)
        smooth = DepthMap(np.where(whole, calm, self.depth), valid)
        rows, columns = np.indices((height, width)).reshape(2, -1)
        points = lift(self.camera, np.stack([columns, rows], 1), smooth.depth.ravel()).reshape(height, width, 3)
        normals, known = surface_normals(self.camera, smooth)
        # At edges the surface has no direction: there a point is compared along the ray.
        away = points - self.camera.camera_to_world[:3, 3]
        rays = -away / np.maximum(np.linalg.norm(away, axis=-1, keepdims=True), 1e-12)
        return points, np.where(known[..., None], normals, rays), valid

    @cached_property
    def planes(self) -> np.ndarray:
        """(4, (height + 2) * (width + 2)) float64: of each pixel and a border the normal n and n p of its point p.

        A point q lies n q - n p from the plane; NaN where nothing is known.
        """
        points, normals, valid = self.surface()
        planes = np.full((4, *(side + 2 for side in valid.shape)), np.nan)
        inner = planes[:, 1:-1, 1:-1]
        inner[:3, valid], inner[3, valid] = normals[valid].T, (points[valid] * normals[valid]).sum(1)
        return planes.reshape(4, -1)

    def state(self) -> dict[str, Any]:
        """Plain values and tensors."""
        camera = self.camera
        return {
            "image": torch.from_numpy(np.rint(self.image * 65535).astype(np.int32)),
            "depth": torch.from_numpy(self.depth),
            "matrix": torch.from_numpy(camera.matrix),
            "pose": torch.from_numpy(camera.camera_to_world),
            "distortion": list(camera.distortion),
        }

    @classmethod
    def of_state(cls, state: dict[str, Any]) -> "Reference":
        depth = state["depth"].numpy()
        camera = Camera(*depth.shape, state["matrix"].numpy(), state["pose"].numpy(), tuple(state["distortion"]))
        return cls((state["image"].numpy() / 65535).astype(np.float32), depth, camera)


@dataclass(frozen=True, eq=False)
class Surface:
    """All that the views of an instance show.

    Attributes:
        points: (n, 3) float64, world metres.
        normals: (n, 3) float64, unit length, towards the camera.
        tree: of the points.
    """

    points: np.ndarray
    normals: np.ndarray
    tree: KDTree

    @classmethod
    def of(cls, views: Sequence[Reference]) -> "Surface":
        """From some hundred thousand pixels, evenly thinned."""
        surfaces = [view.surface() for view in views]
        stride = max(1, int(sum(np.count_nonzero(valid) for _, _, valid in surfaces) // LARGEST))
        points, normals = (
            np.concatenate([surface[part][surface[2]][::stride] for surface in surfaces]) for part in (0, 1)
        )
        return cls(points, normals, KDTree(points))

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Signed distance (n,) of points (n, 3) from the surface, metres, positive outside.

        The nearest of many noisy points is too near, so it only says where: the distance is that from the mean plane of
        the points around it that face the same way.
        """
        if not len(points):
            return np.zeros(0)
        away, nearest = self.tree.query(points)
        apart, around = self.tree.query(self.points[nearest], k=min(AROUND, len(self.points)))
        apart, around = apart.reshape(len(points), -1), around.reshape(len(points), -1)
        facing = (self.normals[around] * self.normals[nearest][:, None]).sum(2) > FACING
        weight = facing[..., None] / np.maximum(facing.sum(1), 1)[:, None, None]
        middle, normal = ((part[around] * weight).sum(1) for part in (self.points, self.normals))
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
        plane = ((points - middle) * normal).sum(1)
        # Beside an edge of the part the plane of the face runs on where there is no part; between points it does not.
        beside = np.sqrt(np.maximum(away**2 - plane**2, 0)) > apart[:, min(PITCH, apart.shape[1] - 1)]
        return np.where(plane < 0, -1.0, 1.0) * np.where(beside, np.maximum(np.abs(plane), away), np.abs(plane))


def thin_view(image: np.ndarray, depth: DepthMap, camera: Camera, side: int) -> tuple[Reference, int]:
    """A view at no more than ``side`` pixels along its longer side, and the step between the pixels that were kept.

    Depth is thinned, so that every pixel keeps the ray it was measured on; the image is averaged over the step.
    """
    step = max(1, -(-max(depth.depth.shape) // side))
    if step > 1:
        image = ndimage.uniform_filter(image, step)[::step, ::step]
        scaled = camera.matrix.copy()
        scaled[:2] /= step
        height, width = depth.depth[::step, ::step].shape
        camera = replace(camera, height=height, width=width, matrix=scaled)
    kept = np.ascontiguousarray(depth.depth[::step, ::step] * depth.valid[::step, ::step])
    # As the state keeps it, so that a head that was loaded gives the same bits.
    return Reference((np.rint(image * 65535) / 65535).astype(np.float32), kept, camera), step


def plane_distance(
    points: np.ndarray, reference: Reference, neighbours: Sequence[tuple[int, int]] = NEIGHBOURS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How far points (n, 3), world metres, lie from the surface that a training view shows where they appear in it.

    The plane is that of the pixel a point falls on or of one of its eight neighbours, whichever is nearest, so that a
    pixel's width at an edge of the part is no deviation.

    Args:
        neighbours: rows down and columns across, -1 to 1, of the pixels that are looked at; the nearest of many noisy
            planes is too near, so what measures takes the pixel itself.

    Returns:
        Signed distance (n,) float64, metres, positive towards the camera; where the view shows a surface, (n,) bool;
        and the places (n, 2) of the points in the view, (column, row).
    """
    height, width = reference.depth.shape
    places, _ = project(reference.camera, points)
    near = np.rint(np.where(np.isfinite(places), places, -9)).astype(np.int64)
    there = np.flatnonzero(((near >= 0) & (near < [width, height])).all(1))
    signed, size = np.zeros(len(points)), np.full(len(points), np.inf)
    for start in range(0, len(there), BLOCK):
        chosen = there[start : start + BLOCK]
        first, second, third = points[chosen].T
        middle = (near[chosen, 1] + 1) * (width + 2) + near[chosen, 0] + 1
        found, least = np.zeros(len(chosen)), np.full(len(chosen), np.inf)
        for down, across in neighbours:
            at = middle + (down * (width + 2) + across)
            distance = reference.planes[0].take(at) * first
            distance += reference.planes[1].take(at) * second
            distance += reference.planes[2].take(at) * third
            distance -= reference.planes[3].take(at)
            away = np.abs(distance)
            better = away < least
            np.copyto(found, distance, where=better)
            np.copyto(least, away, where=better)
        signed[chosen], size[chosen] = found, least
    return signed, np.isfinite(size), places


def sampled(maps: Tensor, places: np.ndarray) -> Tensor:
    """Bilinear values (n, channels) of (height, width, channels) at places (n, 2), (column, row); borders continue."""
    height, width = maps.shape[:2]
    at = torch.from_numpy(places).to(maps.dtype)
    limit = torch.tensor([width - 1, height - 1], dtype=maps.dtype)
    at = torch.minimum(at.clamp_min(0), limit)
    low = at.floor().long()
    high = torch.minimum(low + 1, limit.long())
    part = (at - low).unbind(1)
    rows = [maps[y, x] for y in (low[:, 1], high[:, 1]) for x in (low[:, 0], high[:, 0])]
    top = torch.lerp(rows[0], rows[1], part[0][:, None])
    return torch.lerp(top, torch.lerp(rows[2], rows[3], part[0][:, None]), part[1][:, None])


def without_low_frequencies(values: np.ndarray, mask: np.ndarray, deviation: float) -> np.ndarray:
    """(height, width) less its Gaussian average within a mask; 0 off it."""
    down, across = (_gaussian(side, deviation) for side in mask.shape)
    weight, low = (down @ part.astype(np.float32) @ across.T for part in (mask, np.where(mask, values, 0)))
    return np.where(mask, values - low / np.maximum(weight, 1e-6), 0)


@lru_cache(maxsize=8)
def _gaussian(side: int, deviation: float) -> np.ndarray:
    """(side, side) float32: ``gaussian_filter1d`` as a product, ten times as fast where the Gaussian is wide."""
    return ndimage.gaussian_filter1d(np.eye(side), deviation, axis=0).astype(np.float32)
