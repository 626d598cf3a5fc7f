"""Defects as solids: each takes a sound part and a place on its surface and returns the damaged part.

Lengths are shares of the part's longest side. ``size`` scales a defect: callers enlarge one that cannot be seen.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.engines import Manifold

__all__ = ["DEFECTS", "damage"]


def damage(kind: str, part: Manifold, point: np.ndarray, normal: np.ndarray, size: float, rng: Generator) -> Manifold:
    """``part`` with a defect at the surface ``point`` (3,) with outward ``normal`` (3,), part coordinates."""
    damaged = DEFECTS[kind](part, point, normal, size, rng)
    # Nothing may push through the table.
    return damaged.trim_by_plane((0, 0, 1), 0)


def tangents(normal: np.ndarray, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """Two random unit directions at right angles to each other and to ``normal``."""
    first = np.cross(normal, rng.standard_normal(3))
    first /= np.linalg.norm(first)
    return first, np.cross(normal, first)


def placed(solid: Manifold, x: np.ndarray, y: np.ndarray, z: np.ndarray, origin: np.ndarray) -> Manifold:
    """A solid whose own axes become ``x``, ``y``, ``z``, right-handed, at ``origin``."""
    return solid.transform(np.stack([x, y, z, origin], 1))


def cap(point: np.ndarray, normal: np.ndarray, radius: float, height: float, inward: bool) -> Manifold:
    """The sphere that leaves a cap of ``radius`` and ``height`` above the surface, or below it when ``inward``."""
    sphere = (radius**2 + height**2) / (2 * height)
    side = 1 if inward else -1
    return Manifold.sphere(sphere, 40).translate(tuple(point + side * (sphere - height) * normal))


def dent(part: Manifold, point: np.ndarray, normal: np.ndarray, size: float, rng: Generator) -> Manifold:
    radius = size * rng.uniform(0.05, 0.09)
    return part - cap(point, normal, radius, radius * rng.uniform(0.35, 0.6), True)


def bump(part: Manifold, point: np.ndarray, normal: np.ndarray, size: float, rng: Generator) -> Manifold:
    radius = size * rng.uniform(0.045, 0.08)
    return part + cap(point, normal, radius, radius * rng.uniform(0.4, 0.8), False)


def hole(part: Manifold, point: np.ndarray, normal: np.ndarray, size: float, rng: Generator) -> Manifold:
    depth = rng.uniform(0.15, 0.6)
    drill = Manifold.cylinder(depth + 0.05, size * rng.uniform(0.025, 0.05), -1, 24)
    first, second = tangents(-normal, rng)
    return part - placed(drill, first, second, -normal, point + 0.05 * normal)


def cut(part: Manifold, point: np.ndarray, normal: np.ndarray, size: float, rng: Generator) -> Manifold:
    length, width, depth = size * rng.uniform(0.25, 0.5), size * rng.uniform(0.025, 0.05), size * rng.uniform(0.08, 0.2)
    along, across = tangents(normal, rng)
    saw = Manifold.cube((length, width, depth + 0.1)).translate((-length / 2, -width / 2, -depth))
    return part - placed(saw, along, across, normal, point)


def scratch(part: Manifold, point: np.ndarray, normal: np.ndarray, size: float, rng: Generator) -> Manifold:
    along, _ = tangents(normal, rng)
    width = size * rng.uniform(0.012, 0.018)
    reach = size * rng.uniform(0.12, 0.22) * along
    tip = Manifold.sphere(width, 8)
    groove = Manifold.batch_hull([tip.translate(tuple(point + end + 0.2 * width * normal)) for end in (reach, -reach)])
    return part - groove


def bent(part: Manifold, point: np.ndarray, normal: np.ndarray, size: float, rng: Generator) -> Manifold:
    """One end is folded up about a horizontal line; which end is the side of ``point``, the rest stays in place."""
    direction = np.array([point[0], point[1], 0.0]) + 0.05 * np.array([*rng.standard_normal(2), 0])
    direction /= np.linalg.norm(direction)
    reach = (part.to_mesh().vert_properties[:, :3] @ direction.astype(np.float32)).max()
    start = reach * rng.uniform(0.25, 0.65)
    end, rest = part.split_by_plane(tuple(direction), float(start))
    angle = math.radians(min(size * rng.uniform(7, 14), 25))
    up = np.array([0.0, 0.0, 1.0])
    along, above = (
        math.cos(angle) * direction + math.sin(angle) * up,
        math.cos(angle) * up - math.sin(angle) * direction,
    )
    hinge = start * direction
    side = np.cross(up, direction)
    # Into the frame (direction, side, up) at the hinge and out of it again, turned.
    frame = np.stack([direction, side, up])
    return rest + placed(
        end.transform(np.concatenate([frame, -(frame @ hinge)[:, None]], 1)), along, side, above, hinge
    )


DEFECTS: dict[str, Callable[..., Manifold]] = {
    "bent": bent,
    "bump": bump,
    "cut": cut,
    "dent": dent,
    "hole": hole,
    "scratch": scratch,
}
