"""Defects of a surface whose extent is known exactly: which triangles they moved or made, and where they painted.

Lengths are shares of the object's longest side. Dents and bumps displace all vertices within a ball along one
direction, by a smooth field whose slope stays below 1: a mesh of any kind stays free of self-intersections, and a thin
wall bends as a whole. Missing parts are cut out and therefore need a watertight mesh.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.defects import tangents
from data_prep.synthetic.engines import Manifold

__all__ = ["BOTH", "DEPTH", "IMAGE", "Damaged", "Paint", "changed_points", "damage_surface", "refine"]

DEPTH, IMAGE, BOTH = ("dent", "bump", "missing"), ("scratch", "stain"), ("stained_dent",)
CHANGE = 0.004  # a smaller displacement is no defect
STAIN, SCRATCH_WIDTH, SCRATCH_LENGTH = 0.7, 0.15, 1.5  # shares of a defect's radius; half width and half length
MISSING = 2.0  # radius of the ball that is cut out, in amplitudes
FACETS = 12  # edges along the radius of a dent


@dataclass(frozen=True)
class Paint:
    """Another albedo within ``radius`` of a segment from ``start`` to ``end``, on the side of ``normal``, (3,) each."""

    start: np.ndarray
    end: np.ndarray
    radius: float
    normal: np.ndarray
    factor: float

    def covers(self, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
        """(points,) bool for points (points, 3) of the surface and their outward normals."""
        return (_segment_distances(self.start, self.end, points) < self.radius) & (normals @ self.normal > 0)


@dataclass(frozen=True)
class Damaged:
    """A defective mesh.

    Attributes:
        vertices: (vertices, 3) float64.
        faces: (triangles, 3) int32.
        changed: (triangles,) bool, the triangles that lie where the sound object has no surface.
        paint: the albedo that the defect changes, or None.
    """

    vertices: np.ndarray
    faces: np.ndarray
    changed: np.ndarray
    paint: Paint | None


def damage_surface(
    kind: str,
    vertices: np.ndarray,
    faces: np.ndarray,
    solid: Manifold | None,
    place: tuple[np.ndarray, np.ndarray],
    size: tuple[float, float, float],
    spacing: float,
    rng: Generator,
) -> Damaged:
    """The object with a defect.

    Args:
        kind: one of ``DEPTH``, ``IMAGE`` and ``BOTH``.
        vertices: (vertices, 3) of the sound object, its longest side 1.
        solid: the sound object; None where the mesh is not watertight, and then ``kind`` is not "missing".
        place: point (3,) on the surface and outward normal (3,).
        size: amplitude and radius of a dent, and the step of the albedo, either way.
        spacing: the longest edge within a dent.
    """
    (point, normal), (amplitude, radius, step) = place, size
    paint, changed = None, np.zeros(len(faces), bool)
    if kind in IMAGE + BOTH:
        along, _ = tangents(normal, rng)
        reach = SCRATCH_LENGTH * radius * along if kind == "scratch" else np.zeros(3)
        width = SCRATCH_WIDTH * radius if kind == "scratch" else STAIN * radius
        paint = Paint(point - reach, point + reach, width, normal, 1 + float(rng.choice([-step, step])))
    if kind == "missing":
        ball = Manifold.sphere(MISSING * amplitude, 40).translate(tuple(point))
        [tool] = ball.to_mesh().run_original_id
        mesh = (solid - ball).to_mesh()
        vertices, faces = mesh.vert_properties[:, :3].astype(np.float64), mesh.tri_verts.astype(np.int32)
        changed = np.repeat(np.array(mesh.run_original_id) == tool, np.diff(mesh.run_index) // 3)
    elif kind not in IMAGE:
        vertices, faces, _ = refine(vertices, faces, min(spacing, radius / FACETS), (point, radius))
        share = np.minimum(np.linalg.norm(vertices - point, axis=1) / radius, 1)
        height = amplitude * (1 - share**2) ** 2
        vertices = vertices + (height if kind == "bump" else -height)[:, None] * normal
        changed = (height > CHANGE)[faces].all(1)
    return Damaged(vertices, faces, changed, paint)


def changed_points(damaged: Damaged, spacing: float) -> np.ndarray:
    """Points (points, 3) that cover the surface a defect changed, no further than ``spacing`` from each other."""
    pieces = []
    if damaged.changed.any():
        vertices, faces, _ = refine(damaged.vertices, damaged.faces[damaged.changed], spacing)
        pieces += [vertices[np.unique(faces)], vertices[faces].mean(1)]
    if paint := damaged.paint:
        middle, reach = (paint.start + paint.end) / 2, np.linalg.norm(paint.end - paint.start) / 2 + paint.radius
        vertices, faces, _ = refine(damaged.vertices, damaged.faces, spacing, (middle, reach))
        corners = vertices[faces]  # (triangles, 3 corners, 3)
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        for points in (corners[:, 0], corners[:, 1], corners[:, 2], corners.mean(1)):
            pieces.append(points[paint.covers(points, normals)])
    return np.concatenate(pieces) if pieces else np.zeros((0, 3))


def refine(
    vertices: np.ndarray, faces: np.ndarray, longest: float, ball: tuple[np.ndarray, float] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Halves edges until none is longer than ``longest``; neighbours agree, so that no cracks open.

    Args:
        ball: centre (3,) and radius: only edges of triangles that may reach into it are halved.

    Returns:
        The vertices, the first of them the given ones, the faces (triangles, 3) int32, and the given triangle that
        each of them is a piece of.
    """
    parents = np.arange(len(faces))
    while True:
        edges = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2).astype(np.int64), axis=1)
        codes, first, place = np.unique(
            edges[:, 0] * len(vertices) + edges[:, 1], return_index=True, return_inverse=True
        )
        starts, ends = vertices[edges[first, 0]], vertices[edges[first, 1]]
        long = np.linalg.norm(ends - starts, axis=1) > longest
        if ball is not None:
            # An edge outside the ball can belong to a triangle whose middle lies in it.
            corners = vertices[faces]
            middle = corners.mean(1)
            reach = np.linalg.norm(corners - middle[:, None], axis=2).max(1) + ball[1]
            near = np.zeros(len(long), bool)
            near[place.reshape(-1, 3)[np.linalg.norm(middle - ball[0], axis=1) < reach]] = True
            long &= near
        if not long.any():
            return vertices, faces, parents
        # (triangles, 3): the new vertex in the middle of the edges from corner 0, 1 and 2, or -1.
        middles = np.where(long, len(vertices) + np.cumsum(long) - 1, -1)[place.reshape(-1, 3)]
        vertices = np.concatenate([vertices, ((starts + ends) / 2)[long]])
        faces, source = _split(faces, middles)
        parents = parents[source]


def _split(faces: np.ndarray, middles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each triangle in one to four pieces, by which of its edges have a ``middle``; and where each piece comes from."""
    count = (middles >= 0).sum(1)
    # Turned so that with one halved edge it is the first one, and with two the last one is whole.
    turn = np.where(count == 1, np.argmax(middles >= 0, 1), np.where(count == 2, np.argmin(middles >= 0, 1) + 1, 0))
    order = (turn[:, None] + np.arange(3)) % 3
    a, b, c = np.take_along_axis(faces, order, 1).T
    ab, bc, ca = np.take_along_axis(middles, order, 1).T
    pieces = {
        0: [(a, b, c)],
        1: [(a, ab, c), (ab, b, c)],
        2: [(ab, b, bc), (a, ab, bc), (a, bc, c)],
        3: [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)],
    }
    parts, sources = [], []
    for halved, triangles in pieces.items():
        chosen = np.flatnonzero(count == halved)
        for corners in triangles:
            parts.append(np.stack(corners, 1)[chosen])
            sources.append(chosen)
    return np.concatenate(parts).astype(np.int32), np.concatenate(sources)


def _segment_distances(start: np.ndarray, end: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distances of points (points, 3) to the segment from ``start`` to ``end``, (3,) each, which may be a point."""
    along = end - start
    share = np.clip((points - start) @ along / max(along @ along, 1e-30), 0, 1)
    return np.linalg.norm(start + share[:, None] * along - points, axis=1)
