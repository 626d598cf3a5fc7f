"""One shot: a random part in a random pose before its background, sound or with one visible defect and its mask."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.defects import damage
from data_prep.synthetic.engines import Manifold
from data_prep.synthetic.parts import build, triangles
from data_prep.synthetic.plan import Sample, generator
from data_prep.synthetic.render import Camera, Pose, Render, Scene, dot, draw_pose
from dino_depth.errors import DataError

__all__ = ["Setup", "Shot", "shoot"]

ATTEMPTS = 40
POSES = 8  # a part that floats freely can show a side on which a kind of defect never shows
SHOTS_PER_PART = 4  # consecutive samples show the same part in other poses


@dataclass(frozen=True)
class Setup:
    """How a layout looks at parts.

    Attributes:
        distances: metres from camera to part, smallest and largest.
        tilts: degrees between the optical axis and the normal of the supporting plane, smallest and largest.
        wall: a wall stands behind the part, so that every ray meets something.
    """

    distances: tuple[float, float]
    tilts: tuple[float, float]
    wall: bool = False


@dataclass(frozen=True)
class Shot:
    """A rendered scene; ``mask`` (size, size) bool are the pixels that its defect changes."""

    scene: Scene
    seen: Render
    mask: np.ndarray
    camera: Camera
    pose: Pose


@lru_cache(maxsize=1)
def _photographed(category: str, *key: object) -> tuple[Manifold, np.ndarray, np.ndarray]:
    """A part and its mesh. It is kept for the next samples because building it takes as long as rendering it."""
    part = build(category, generator(*key, category))
    return part, *triangles(part)


def shoot(
    key: tuple, sample: Sample, defect: str | None, camera: Camera, setup: Setup, plane: float, rng: Generator
) -> Shot:
    """Draws a part, a pose and the background, and renders them.

    A defective part is rendered with and without its defect in the same pose; the mask is where depth or normal differ.
    Draws whose defect is hidden, tiny, or alters most of the part are replaced by other, gradually larger ones, and
    after ``ATTEMPTS`` of them by another pose.

    Args:
        key: what the shape of the part depends on besides the sample: the seed and the layout.
        defect: a key of ``defects.DEFECTS``, "paint" (a spot that only an image shows), or None.
        plane: probability of a supporting plane.

    Raises:
        DataError: no visible defect was found.
    """
    batch = sample.index // SHOTS_PER_PART
    part, vertices, faces = _photographed(sample.category, *key, sample.split, sample.label, batch)
    supported = bool(rng.random() < plane)
    enough = max(8, round(0.0008 * camera.size**2))
    for _ in range(POSES):
        pose = draw_pose(vertices, camera, rng, setup.distances, setup.tilts, free=not supported)
        planes = []
        if supported:
            planes.append((pose.up, float(pose.up @ pose.translation)))
        if setup.wall:
            planes.append(_wall(pose, supported, rng))
        scene = Scene(pose.to_camera(vertices), faces, planes)
        sound = scene.render(camera)
        if defect is None:
            return Shot(scene, sound, np.zeros(sound.part.shape, bool), camera, pose)
        for attempt in range(ATTEMPTS):
            point, normal = _place(sound, camera, rng)
            if defect == "paint":
                radius = (1 + 0.1 * attempt) * pose.scale * rng.uniform(0.05, 0.12)
                points = camera.rays() * sound.depth[..., None]
                damaged, seen, mask = scene, sound, sound.part & (np.linalg.norm(points - point, axis=-1) < radius)
            else:
                damaged = _damaged(defect, part, pose, point, normal, 1 + 0.1 * attempt, planes, rng)
                if damaged is None:
                    continue
                seen = damaged.render(camera)
                mask = _changed(sound, seen, pose)
            if enough <= mask.sum() <= 0.5 * sound.part.sum():
                return Shot(damaged, seen, mask, camera, pose)
    raise DataError(
        f"no visible {defect} found on a {sample.category} in {POSES * ATTEMPTS} draws at {camera.size} pixels"
    )


def _wall(pose: Pose, supported: bool, rng: Generator) -> tuple[np.ndarray, float]:
    forward = np.array([0.0, 0.0, 1.0])
    if supported:
        forward = forward - forward @ pose.up * pose.up
        forward /= np.linalg.norm(forward)
    distance = rng.uniform(1.0, 2.0) * pose.scale
    return -forward, float(-forward @ pose.translation - distance)


def _place(sound: Render, camera: Camera, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random visible surface point and its normal, camera coordinates; well inside the part and seen from above."""
    rays = camera.rays()
    facing = sound.part & (-dot(rays, sound.normal) > 0.5 * camera.ray_lengths())
    margin = max(1, camera.size // 40)
    inside = facing.copy()
    for axis in (0, 1):
        inside &= np.roll(facing, margin, axis) & np.roll(facing, -margin, axis)
    rows, columns = np.nonzero(next(mask for mask in (inside, facing, sound.part) if mask.any()))
    choice = rng.integers(len(rows))
    row, column = rows[choice], columns[choice]
    return rays[row, column] * sound.depth[row, column], sound.normal[row, column]


def _damaged(
    defect: str,
    part: Manifold,
    pose: Pose,
    point: np.ndarray,
    normal: np.ndarray,
    size: float,
    planes: list[tuple[np.ndarray, float]],
    rng: Generator,
) -> Scene | None:
    outward = normal.astype(np.float64) @ pose.rotation
    solid = damage(defect, part, pose.to_part(point.astype(np.float64)), outward / np.linalg.norm(outward), size, rng)
    if solid.is_empty():
        return None
    vertices, faces = triangles(solid)
    return Scene(pose.to_camera(vertices), faces, planes)


def _changed(sound: Render, seen: Render, pose: Pose) -> np.ndarray:
    depth = np.abs(seen.depth - sound.depth) > 0.004 * pose.scale
    normal = dot(seen.normal, sound.normal) < np.cos(np.radians(15))
    return (depth | normal) & (sound.part | seen.part)
