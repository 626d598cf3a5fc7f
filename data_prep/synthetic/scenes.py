"""Scenes for pretraining: parts of all families alone, in heaps and in rooms, seen from any side by any sensor.

The world's unit is the longest side of the scene's largest part until a camera is chosen: the distance decides how many
metres that is. z points up; a scene's floor, if it has one, is z = 0.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.spatial.transform import Rotation

from data_prep.synthetic.families import FAMILIES, build_family
from data_prep.synthetic.parts import triangles
from data_prep.synthetic.render import Camera, Scene
from data_prep.synthetic.sensors import SENSORS
from dino_depth.errors import DataError

__all__ = ["World", "build_world", "shoot_world"]

PARTS = (0.2, 1.5)  # metres from the camera to the middle of a part or heap
ROOMS = (0.6, 2.0)  # to the middle of a room
FOCAL = {"part": (1.0, 4.5), "heap": (1.0, 3.5), "room": (0.8, 1.6)}  # in image widths
FILL = {"part": (0.3, 1.3), "heap": (0.5, 1.6), "room": (0.6, 1.5)}  # of the image, by the longest side
KINDS, SHARES = ("part", "heap", "room"), (0.55, 0.3, 0.15)
LEAST = 0.06  # share of pixels that must see something
ATTEMPTS = 200


@dataclass(frozen=True)
class World:
    """Triangles before planes; ``walls`` are (normal, point), the floor among them. ``extent`` is its longest side."""

    kind: str
    vertices: np.ndarray
    faces: np.ndarray
    walls: list[tuple[np.ndarray, np.ndarray]]
    extent: float


def build_world(family: str, plane: float, rng: Generator) -> World:
    """A scene whose first part is of ``family``.

    Args:
        plane: probability that there is a floor at all; a room always has one.
    """
    kind = str(rng.choice(KINDS, p=SHARES))
    count = {"part": 1, "heap": int(rng.integers(2, 7)), "room": int(rng.integers(2, 9))}[kind]
    supported = kind == "room" or rng.random() < plane
    names = [family, *rng.choice(sorted(FAMILIES), count - 1)]
    vertices, faces, known = [], [], 0
    for number, name in enumerate(names):
        points, corners = triangles(build_family(name, rng))
        # On a floor most parts lie as they were built; the others fell.
        if not supported or rng.random() < (0.3 if kind == "part" else 0.7):
            points = points @ Rotation.random(random_state=rng).as_matrix().T
            points = points - [0, 0, points[:, 2].min()]
        if number:
            angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.2, 0.9 if kind == "heap" else 2.0)
            lift = rng.uniform(0, 0.6) * (rng.random() < 0.4) if kind == "heap" else 0.0
            points = points * rng.uniform(0.3, 1.2) + [reach * np.cos(angle), reach * np.sin(angle), lift]
        vertices.append(points)
        faces.append(corners + known)
        known += len(points)
    vertices = np.concatenate(vertices)
    extent = float(np.ptp(vertices, axis=0).max())
    walls = [(np.array([0.0, 0.0, 1.0]), np.zeros(3))] if supported else []
    if kind == "room" or rng.random() < 0.15:
        first = rng.uniform(0, 2 * np.pi)
        for turn in range(int(rng.integers(1, 3))):
            angle = first + turn * np.pi / 2
            inward = np.array([np.cos(angle), np.sin(angle), 0.0])
            walls.append((inward, -rng.uniform(0.5, 1.2) * extent * inward))
    return World(kind, vertices, np.concatenate(faces).astype(np.int32), walls, extent)


def shoot_world(world: World, size: int, rng: Generator) -> np.ndarray:
    """Depth (size, size) float32 metres of a random view by a random sensor, 0 where it measures nothing.

    Raises:
        DataError: no view saw enough.
    """
    for _ in range(ATTEMPTS):
        camera, scene = _look(world, size, rng)
        seen = scene.render(camera)
        # A camera inside a part, or that looks past everything, is drawn anew.
        if (seen.depth > 0).mean() < LEAST or seen.part.sum() < 0.02 * size**2:
            continue
        near = np.quantile(seen.depth[seen.depth > 0], 0.02)
        if near < 0.08:
            continue
        chances = np.array([share for _, share in SENSORS])
        sensor = SENSORS[int(rng.choice(len(SENSORS), p=chances / chances.sum()))][0]
        baseline = rng.uniform(0.03, 0.2) * float(np.median(seen.depth[seen.part]))
        direction = rng.uniform(0, 2 * np.pi)
        second = baseline * np.array([np.cos(direction), np.sin(direction), 0.0])
        one_eyed = sensor.__name__ in ("perfect", "time_of_flight")
        lit = seen.depth > 0 if one_eyed else scene.lit(seen, camera, second)
        measured = sensor(seen, camera, lit, rng)
        if np.count_nonzero(measured) >= LEAST * size**2:
            return measured
    raise DataError(f"no view of a {world.kind} saw enough in {ATTEMPTS} draws at {size} pixels")


def _look(world: World, size: int, rng: Generator) -> tuple[Camera, Scene]:
    """A camera at the origin that looks at a place in the world, and the world moved before it, in metres."""
    low, high = ROOMS if world.kind == "room" else PARTS
    distance = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    focal = float(np.exp(rng.uniform(*np.log(FOCAL[world.kind]))))
    center = (size - 1) / 2 + rng.uniform(-0.04, 0.04, 2) * size
    camera = Camera(size, focal * size, float(center[0]), float(center[1]))
    scale = rng.uniform(*FILL[world.kind]) * distance / focal / world.extent
    middle = (world.vertices.min(0) + world.vertices.max(0)) / 2
    target = middle + rng.uniform(-0.25, 0.25, 3) * np.ptp(world.vertices, axis=0)
    backwards = _side(world, rng)  # from the target to the camera
    forward = -backwards
    up = np.array([0.0, 0.0, 1.0]) if abs(forward[2]) < 0.99 else np.array([0.0, 1.0, 0.0])
    right = np.cross(forward, up)
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])  # rows: x, y, z of the camera
    roll = rng.normal(0, 0.15) if world.kind == "room" else rng.uniform(0, 2 * np.pi)
    rotation = Rotation.from_euler("z", roll).as_matrix() @ rotation
    origin = target + backwards * distance / scale

    def seen_from(points: np.ndarray) -> np.ndarray:
        return scale * (points - origin) @ rotation.T

    planes = []
    for normal, point in world.walls:
        turned = rotation @ normal
        offset = float(turned @ seen_from(point))
        # A wall between the camera and its target is left out, as the missing side of a doll's house.
        if offset < 0:
            planes.append((turned, offset))
    return camera, Scene(seen_from(world.vertices), world.faces, planes)


def _side(world: World, rng: Generator) -> np.ndarray:
    """A unit direction from which the world is seen: from above a floor if there is one, from anywhere if not."""
    direction = rng.standard_normal(3)
    direction /= np.linalg.norm(direction)
    if not world.walls:
        return direction
    height = {"part": rng.uniform(0.25, 1), "heap": rng.uniform(0.3, 1), "room": rng.uniform(0.1, 0.8)}[world.kind]
    if np.allclose(world.walls[0][0], [0, 0, 1]):
        direction[2] = height
        direction[:2] *= np.sqrt(max(1 - height**2, 0)) / np.linalg.norm(direction[:2])
    return direction
