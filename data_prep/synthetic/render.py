"""Rays instead of rasters: noise-free depth and normals of a part before planes, its shading, and a depth sensor.

Coordinates are those of the camera, in metres: x to the right, y down, z along the optical axis. The centre of the
pixel in column c and row r is at (c, r). Rays are cast with embreex, the ray tracer trimesh uses; it is called without
trimesh's wrapper because it can return the hit distance of un-normalised rays, which is the depth itself.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.engines import EmbreeScene, TriangleMesh

__all__ = ["Camera", "Pose", "Render", "Scene", "dot", "draw_pose", "sense", "shade"]

MILLIMETRES = np.float32(1000)  # the unit rays are cast in: embree's tolerances suit coordinates around 1..1000


@dataclass(frozen=True)
class Camera:
    """A pinhole with square pixels. ``focal`` and the principal point are in pixels, the image is square."""

    size: int
    focal: float
    center_column: float
    center_row: float

    def rays(self) -> np.ndarray:
        """Ray directions (size, size, 3) float32 with z = 1: a point is its ray times its depth."""
        return _rays(self)

    def ray_lengths(self) -> np.ndarray:
        """Lengths of the rays (size, size) float32."""
        return _ray_lengths(self)


@lru_cache(maxsize=8)
def _rays(camera: Camera) -> np.ndarray:
    places = np.arange(camera.size)
    rays = np.ones((camera.size, camera.size, 3), np.float32)
    rays[..., 0] = ((places - camera.center_column) / camera.focal)[None, :]
    rays[..., 1] = ((places - camera.center_row) / camera.focal)[:, None]
    return rays


@lru_cache(maxsize=8)
def _ray_lengths(camera: Camera) -> np.ndarray:
    rays = _rays(camera)
    return np.sqrt(dot(rays, rays))


def dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Dot products over the last axis; several times faster than multiply and sum over an axis of three."""
    return np.einsum("...i,...i->...", first, second)


@dataclass(frozen=True)
class Pose:
    """Where a part is: camera point = rotation @ (scale * part point) + translation, metres."""

    rotation: np.ndarray
    translation: np.ndarray
    scale: float

    def to_camera(self, points: np.ndarray) -> np.ndarray:
        """Camera coordinates of part points (..., 3)."""
        return (self.scale * points) @ self.rotation.T + self.translation

    def to_part(self, points: np.ndarray) -> np.ndarray:
        """Part coordinates of camera points (..., 3)."""
        return (points - self.translation) @ self.rotation / self.scale

    @property
    def up(self) -> np.ndarray:
        """The normal of the supporting plane, away from it."""
        return self.rotation[:, 2]


def _turn(axis: int, angle: float) -> np.ndarray:
    cosine, sine = np.cos(angle), np.sin(angle)
    i, j = [(1, 2), (2, 0), (0, 1)][axis]
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = cosine
    matrix[i, j], matrix[j, i] = -sine, sine
    return matrix


def draw_pose(
    vertices: np.ndarray,
    camera: Camera,
    rng: Generator,
    distances: tuple[float, float],
    tilts: tuple[float, float],
    fill: tuple[float, float] = (0.62, 0.88),
    free: bool = False,
) -> Pose:
    """A random pose in which the longer side of the part's image is a share ``fill`` of the frame, all of it inside.

    The part is turned by any angle in its plane, the camera is tilted from looking straight down and slightly rolled;
    the size of the part follows from its distance, so that neither tells the category.

    Args:
        vertices: (vertices, 3), longest side of the part 1.
        distances: metres from the camera to the middle of the part.
        tilts: degrees.
        free: any rotation at all, for a part without a supporting plane.
    """
    if free:
        axes = np.linalg.qr(rng.standard_normal((3, 3)))[0]
        rotation = axes * np.linalg.det(axes)
    else:
        tilt, roll, spin = rng.uniform(*np.radians(tilts)), rng.uniform(-0.2, 0.2), rng.uniform(0, 2 * np.pi)
        rotation = _turn(2, roll) @ _turn(0, -tilt) @ np.diag([1.0, -1.0, -1.0]) @ _turn(2, spin)
    share, distance = rng.uniform(*fill), rng.uniform(*distances)
    middle = (vertices.min(0) + vertices.max(0)) / 2
    turned = rotation @ (vertices - middle).T  # (3, vertices)
    slack = (1 - share) * camera.size / 2
    aim = (camera.size - 1) / 2 + rng.uniform(-0.8, 0.8, 2) * slack
    aim = (aim - (camera.center_column, camera.center_row)) / camera.focal
    extent = share * camera.size / camera.focal
    scale, place = extent * distance, aim * distance
    for _ in range(8):
        # Perspective couples size and place: repeat until both fit, in partial steps as a close part is nonlinear.
        depth = np.maximum(scale * turned[2] + distance, 0.2 * distance)
        image = (scale * turned[:2] + place[:, None]) / depth
        low, high = image.min(1), image.max(1)
        scale *= np.sqrt(extent / (high - low).max())
        place = place + (aim - (low + high) / 2) * distance * 0.7
    translation = np.array([*place, distance]) - scale * rotation @ middle
    return Pose(rotation, translation, float(scale))


@dataclass(frozen=True)
class Render:
    """What a perfect sensor sees.

    Attributes:
        depth: (size, size) float32 metres, 0 where a ray meets nothing.
        normal: (size, size, 3) float32 unit normals towards the camera, 0 where a ray meets nothing.
        part: (size, size) bool, pixels of the part.
    """

    depth: np.ndarray
    normal: np.ndarray
    part: np.ndarray


class Scene:
    """A triangle mesh before planes.

    Args:
        vertices: (vertices, 3) metres.
        faces: (triangles, 3) int32.
        planes: (normal, offset) of each plane normal . point = offset, the normal towards the camera.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, planes: list[tuple[np.ndarray, float]]):
        self.vertices, self.planes = vertices, planes
        self.embree = EmbreeScene()
        TriangleMesh(scene=self.embree, vertices=(vertices * MILLIMETRES).astype(np.float32), indices=faces)

    def render(self, camera: Camera) -> Render:
        size, rays = camera.size, camera.rays()
        depth = np.full((size, size), np.inf, np.float32)
        normal = np.zeros((size, size, 3), np.float32)
        for direction, offset in self.planes:
            with np.errstate(divide="ignore"):
                plane = np.float32(offset) / (rays @ direction.astype(np.float32))
            nearer = (plane > 0) & (plane < depth)
            depth[nearer], normal[nearer] = plane[nearer], direction
        part = np.zeros((size, size), bool)
        window = _window(self.vertices, camera)
        directions = np.ascontiguousarray(rays[window].reshape(-1, 3))
        if len(directions):
            hits = self.embree.run(np.zeros_like(directions), directions, output=1)
            shape = rays[window].shape[:2]
            hit = (hits["primID"] >= 0).reshape(shape)
            distance = hits["tfar"].reshape(shape) / MILLIMETRES
            hit &= distance < depth[window]
            facing = hits["Ng"].reshape(*shape, 3)
            # Unit normals towards the camera, whichever way the triangle faces.
            squared = dot(facing, facing)
            facing *= (-np.sign(dot(facing, rays[window])) / np.sqrt(np.where(squared > 0, squared, 1)))[..., None]
            np.copyto(depth[window], distance, where=hit)
            np.copyto(normal[window], facing, where=hit[..., None])
            part[window] = hit
        depth[np.isinf(depth)] = 0
        return Render(depth, normal, part)

    def lit(self, seen: Render, camera: Camera, light: np.ndarray) -> np.ndarray:
        """(size, size) bool: pixels with a surface that the part does not hide from a light at ``light`` (3,)."""
        lit = seen.depth > 0
        corners = [self.vertices, *(_shadow(self.vertices, light, *plane) for plane in self.planes)]
        window = _window(np.concatenate(corners), camera)
        # Start slightly in front of the surface, or it hides itself.
        points = camera.rays()[window] * seen.depth[window][..., None] + np.float32(2e-4) * seen.normal[window]
        points = points.reshape(-1, 3)
        if len(points):
            hidden = self.embree.run(points * MILLIMETRES, light.astype(np.float32) - points, query="OCCLUDED") >= 0
            lit[window] &= ~hidden.reshape(lit[window].shape)
        return lit


def _window(points: np.ndarray, camera: Camera) -> tuple[slice, slice]:
    """The smallest part of the image that holds all points (points, 3)."""
    depth = points[:, 2]
    if depth.min() <= 0:
        return np.s_[:, :]
    bounds = []
    for axis, center in ((1, camera.center_row), (0, camera.center_column)):
        place = camera.focal * points[:, axis] / depth + center
        low, high = np.floor(place.min()), np.ceil(place.max()) + 1
        bounds.append(slice(int(np.clip(low, 0, camera.size)), int(np.clip(high, 0, camera.size))))
    return bounds[0], bounds[1]


def _shadow(vertices: np.ndarray, light: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    """Where the shadows of vertices (vertices, 3) fall on a plane."""
    towards = vertices - light
    with np.errstate(divide="ignore", invalid="ignore"):
        reach = (offset - normal @ light) / (towards @ normal)
    # A shadow that never meets the plane may fall anywhere: a point behind the camera asks for the whole image.
    falls = (reach > 0) & np.isfinite(reach)
    return light + reach[:, None] * towards if falls.all() else np.array([[0.0, 0.0, -1.0]])


def shade(
    seen: Render,
    camera: Camera,
    albedo: np.ndarray,
    gloss: float,
    lights: list[tuple[np.ndarray, float | np.ndarray]],
) -> list[np.ndarray]:
    """One image (size, size) float32, about 0..1, for each light: diffuse and glossy reflection (Blinn-Phong).

    Args:
        albedo: (size, size) float32.
        gloss: strength of the highlight.
        lights: position (3,) metres and strength of each, a number or (size, size).
    """
    rays, normal = camera.rays(), seen.normal
    points = rays * seen.depth[..., None]
    viewer = rays / -camera.ray_lengths()[..., None]
    toward_viewer = dot(viewer, normal)
    images = []
    for position, strength in lights:
        towards = position.astype(np.float32) - points
        length = np.sqrt(dot(towards, towards))
        cosine = dot(towards, normal) / length
        # |towards + viewer| of two unit vectors follows from the angle between them.
        half = np.sqrt(np.maximum(2 + 2 * dot(towards, viewer) / length, 1e-6))
        highlight = np.maximum(cosine + toward_viewer, 0) / half
        for _ in range(5):
            highlight *= highlight  # to the power of 32
        image = np.maximum(cosine, 0) * albedo + np.float32(gloss) * highlight * (cosine > 0)
        images.append(image * np.asarray(strength, np.float32))
    return images


def sense(seen: Render, camera: Camera, lit: np.ndarray, rng: Generator) -> np.ndarray:
    """What a structured-light sensor measures: depth (size, size) float32 metres, 0 where it measures nothing.

    Noise grows with the square of the distance and with the slope. Missing are points the projector does not reach
    (``lit``), surfaces seen at a grazing angle, most pixels along depth edges, and random speckles.
    """
    depth, size = seen.depth, camera.size
    cosine = -dot(camera.rays(), seen.normal) / camera.ray_lengths()
    noise = rng.standard_normal((size + 1, size + 1), np.float32)
    noise = (noise[1:, 1:] + noise[:-1, 1:] + noise[1:, :-1] + noise[:-1, :-1]) / 2  # matching windows overlap
    deviation = np.float32(rng.uniform(0.6e-4, 1.4e-4)) * (depth / np.float32(0.5)) ** 2 / np.maximum(cosine, 0.25)

    coarse = rng.random((size // 3 + 1, size // 3 + 1), np.float32).repeat(3, 0).repeat(3, 1)[:size, :size]
    luck = 0.6 * coarse + 0.4 * rng.random((size, size), np.float32)
    limit = rng.uniform(0.22, 0.4)
    missing = ~lit | (luck < (limit - cosine) / 0.2)
    jump = np.float32(rng.uniform(0.004, 0.008)) * depth
    edge = np.zeros_like(missing)
    down, across = np.abs(np.diff(depth, axis=0)) > jump[1:], np.abs(np.diff(depth, axis=1)) > jump[:, 1:]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    missing |= edge & (luck < 0.7)
    for _ in range(rng.poisson(4)):
        row, column = rng.integers(0, size, 2)
        high, wide = np.maximum(rng.uniform(0.004, 0.02, 2) * size, 0.8)
        rows = np.arange(max(0, int(row - high)), min(size, int(row + high) + 1))
        columns = np.arange(max(0, int(column - wide)), min(size, int(column + wide) + 1))
        inside = ((rows - row) / high)[:, None] ** 2 + ((columns - column) / wide)[None] ** 2
        missing[np.ix_(rows, columns)] |= inside < 1
    return np.where(missing | (depth == 0), 0, depth + deviation * noise).astype(np.float32)
