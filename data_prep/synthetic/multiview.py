"""A fixed rig of calibrated cameras around an object, and rays cast at a mesh from any of them.

World coordinates: metres, the origin is the middle of the object's bounding box, z points up. Camera coordinates: x to
the right, y down, z along the optical axis, depth is z. The centre of the pixel in column c and row r is at (c, r), as
in render.py, whose renderings are of one camera with square images at the origin; here a mesh stays where it is and is
seen by many cameras, so that its search tree is built once.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from scipy.spatial.transform import Rotation

from data_prep.synthetic.engines import EmbreeScene, TriangleMesh
from data_prep.synthetic.render import MILLIMETRES, Render, dot

__all__ = ["Pinhole", "Solid", "fit", "jitter", "pinhole", "ring"]

DISTANCE = 0.7  # metres from every camera to the world's origin, as SiM3D's robot keeps it
ELEVATION = 40.0  # degrees of a single ring above the horizon
ELEVATIONS = (20.0, 60.0)  # of the lowest and the highest of several rings
# The calibration that AutoRenderBle publishes for SiM3D's sensor, pixels of an image of 4096 x 3000.
PUBLISHED_WIDTH, PUBLISHED_HEIGHT = 4096, 3000
PUBLISHED_FOCAL, PUBLISHED_CENTER = (3470.28, 3468.90), (2045.80, 1563.63)


@dataclass(frozen=True)
class Pinhole:
    """A camera without distortion; focal lengths and principal point (x, y) in pixels."""

    height: int
    width: int
    focal: tuple[float, float]
    center: tuple[float, float]

    def rays(self) -> np.ndarray:
        """Ray directions (height, width, 3) float32 with z = 1: a point is its ray times its depth."""
        return _rays(self)

    def ray_lengths(self) -> np.ndarray:
        """Lengths of the rays (height, width) float32."""
        return _ray_lengths(self)

    def window(self, points: np.ndarray) -> tuple[slice, slice]:
        """The smallest part of the image that holds all of the points (points, 3), camera coordinates, z > 0."""
        places = points[:, :2] / points[:, 2:] * self.focal + self.center
        low, high = np.floor(places.min(0)).astype(int), np.ceil(places.max(0)).astype(int) + 1
        rows, columns = (
            slice(*np.clip((low[axis], high[axis]), 0, size)) for axis, size in ((1, self.height), (0, self.width))
        )
        return rows, columns

    def matrix(self) -> np.ndarray:
        """The (3, 3) matrix of intrinsics."""
        return np.array([[self.focal[0], 0, self.center[0]], [0, self.focal[1], self.center[1]], [0, 0, 1.0]])


@lru_cache(maxsize=8)
def _rays(camera: Pinhole) -> np.ndarray:
    rays = np.ones((camera.height, camera.width, 3), np.float32)
    rays[..., 0] = ((np.arange(camera.width) - camera.center[0]) / camera.focal[0])[None, :]
    rays[..., 1] = ((np.arange(camera.height) - camera.center[1]) / camera.focal[1])[:, None]
    return rays


@lru_cache(maxsize=8)
def _ray_lengths(camera: Pinhole) -> np.ndarray:
    rays = _rays(camera)
    return np.sqrt(dot(rays, rays))


def pinhole(height: int, width: int) -> Pinhole:
    """SiM3D's sensor at another resolution: the same field of view across, the principal point as far off centre."""
    scale = width / PUBLISHED_WIDTH
    column = scale * (PUBLISHED_CENTER[0] + 0.5) - 0.5
    row = (height - 1) / 2 + scale * (PUBLISHED_CENTER[1] - (PUBLISHED_HEIGHT - 1) / 2)
    return Pinhole(height, width, (scale * PUBLISHED_FOCAL[0], scale * PUBLISHED_FOCAL[1]), (column, row))


def ring(views: int, rings: int) -> np.ndarray:
    """Camera-to-world matrices (views, 4, 4) of cameras that look at the origin, one ring after the other.

    Args:
        rings: rings from low to high with equally many views each.
    """
    elevations = [ELEVATION] if rings == 1 else np.linspace(*ELEVATIONS, rings)
    poses = []
    for elevation in np.radians(elevations):
        for azimuth in np.arange(views // rings) * (2 * np.pi / (views // rings)):
            outward = np.array([*(np.cos(elevation) * np.array([np.cos(azimuth), np.sin(azimuth)])), np.sin(elevation)])
            right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
            pose = np.eye(4)
            pose[:3] = np.stack([right, np.cross(-outward, right), -outward, DISTANCE * outward], 1)
            poses.append(pose)
    return np.stack(poses)


def fit(points: np.ndarray, camera: Pinhole, poses: np.ndarray, fill: float) -> float:
    """The largest factor on ``points`` (points, 3) about the origin with which every view shows all of them.

    Args:
        fill: share of the way from the principal point to the nearer edge that may be used.
    """
    limits = [
        fill * min(center + 0.5, size - 0.5 - center) / focal
        for center, size, focal in zip(camera.center, (camera.width, camera.height), camera.focal, strict=True)
    ]
    seen = points @ poses[:, :3, :3]  # (views, points, 3), camera coordinates but for the distance
    # |scale * x| <= limit * (DISTANCE + scale * z)
    needed = np.abs(seen[..., :2]) - np.array(limits) * seen[..., 2:]
    return float(DISTANCE / (needed / limits).max())


def jitter(rng: Generator, rotation: float, translation: float) -> np.ndarray:
    """(4, 4): a small motion with normally distributed rotation (degrees) and translation (metres) about each axis."""
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_rotvec(np.radians(rotation) * rng.standard_normal(3)).as_matrix()
    pose[:3, 3] = translation * rng.standard_normal(3)
    return pose


class Solid:
    """A triangle mesh to cast rays at.

    Args:
        vertices: (vertices, 3) metres.
        faces: (triangles, 3) int32.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray):
        self.vertices = vertices
        self.embree = EmbreeScene()
        scaled = np.ascontiguousarray(vertices * MILLIMETRES, np.float32)
        TriangleMesh(scene=self.embree, vertices=scaled, indices=np.ascontiguousarray(faces, np.int32))

    def render(self, camera: Pinhole, pose: np.ndarray) -> tuple[Render, np.ndarray]:
        """What a perfect sensor sees, and the triangle (height, width) int32 that each pixel meets, -1 for none.

        Normals are in camera coordinates and point towards the camera, whichever way a triangle faces.

        Args:
            camera: or whatever has the size, rays and window of one.
            pose: (4, 4) from camera coordinates to those of the mesh.
        """
        shape = camera.height, camera.width
        depth, normal = np.zeros(shape, np.float32), np.zeros((*shape, 3), np.float32)
        triangle = np.full(shape, -1, np.int32)
        window = camera.window((self.vertices - pose[:3, 3]) @ pose[:3, :3])
        rays = camera.rays()[window]
        if rays.size:
            turn = pose[:3, :3].astype(np.float32)
            directions = np.ascontiguousarray(rays.reshape(-1, 3) @ turn.T)
            origins = np.broadcast_to((pose[:3, 3] * MILLIMETRES).astype(np.float32), directions.shape)
            hits = self.embree.run(np.ascontiguousarray(origins), directions, output=1)
            met = hits["primID"].reshape(rays.shape[:2])
            facing = (hits["Ng"] @ turn).reshape(rays.shape)
            squared = dot(facing, facing)
            facing *= (-np.sign(dot(facing, rays)) / np.sqrt(np.where(squared > 0, squared, 1)))[..., None]
            hit = met >= 0
            np.copyto(depth[window], hits["tfar"].reshape(hit.shape) / MILLIMETRES, where=hit)
            np.copyto(normal[window], facing, where=hit[..., None])
            triangle[window] = met
        return Render(depth, normal, triangle >= 0), triangle
