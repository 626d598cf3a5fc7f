"""Smooth shapes without flat faces: quadrics, lumps, tubes along curves, curved shells."""

import math

import numpy as np
from numpy.random import Generator
from scipy.interpolate import make_interp_spline

from data_prep.synthetic.engines import Manifold
from data_prep.synthetic.families.sweeps import globe, tube
from data_prep.synthetic.parts import lofted, union

LATITUDES, LONGITUDES = 36, 56


def _directions() -> tuple[np.ndarray, np.ndarray]:
    latitude = np.linspace(-math.pi / 2, math.pi / 2, LATITUDES + 2)[1:-1, None]
    return latitude, np.arange(LONGITUDES)[None] * (2 * math.pi / LONGITUDES)


def _waves(rng: Generator, count: int, highest: float) -> np.ndarray:
    """A smooth random function on the sphere, (latitudes, longitudes), about -1..1."""
    latitude, longitude = _directions()
    unit = np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude)], -1)
    unit = np.concatenate(
        [unit, np.broadcast_to(np.sin(latitude), longitude.shape[:0] + unit.shape[:2])[..., None]], -1
    )
    total = np.zeros(unit.shape[:2])
    for _ in range(count):
        axis = rng.standard_normal(3)
        axis *= rng.uniform(1, highest) / np.linalg.norm(axis)
        total += np.cos(unit @ axis + rng.uniform(0, 2 * math.pi))
    return total / math.sqrt(count)


def superquadric(rng: Generator) -> Manifold:
    def power(value: np.ndarray, exponent: float) -> np.ndarray:
        return np.sign(value) * np.abs(value) ** exponent

    latitude, longitude = _directions()
    first, second, half = rng.uniform(0.15, 1.6), rng.uniform(0.15, 1.6), rng.uniform(0.3, 1, 3)
    flat = power(np.cos(latitude), first)
    rings = np.stack(
        [
            half[0] * flat * power(np.cos(longitude), second),
            half[1] * flat * power(np.sin(longitude), second),
            half[2] * power(np.sin(latitude), first) + 0 * longitude,
        ],
        -1,
    )
    if rng.random() < 0.4:
        rings[..., :2] *= 1 + rng.uniform(-0.6, 0.6) * rings[..., 2:] / half[2]
    solid = lofted(rings, np.array([(0, 0, -half[2]), (0, 0, half[2])]))
    return solid.rotate(tuple(rng.choice([0, 90], 3)))


def lump(rng: Generator) -> Manifold:
    radius = np.exp(rng.uniform(0.08, 0.3) * _waves(rng, 8, rng.uniform(2, 6)))
    return globe(radius).scale(tuple(rng.uniform(0.5, 1, 3)))


def fruit(rng: Generator) -> Manifold:
    latitude, longitude = _directions()
    ribs, dimple = int(rng.integers(0, 9)), rng.uniform(0.1, 0.5)
    radius = 1 - dimple * np.exp(-(((math.pi / 2 - np.abs(latitude)) / rng.uniform(0.3, 0.6)) ** 2))
    radius = radius * (
        1 + rng.uniform(0.01, 0.06) * np.cos(ribs * longitude) + rng.uniform(-0.2, 0.2) * np.sin(latitude)
    )
    stem = tube(np.array([(0, 0, 0.4), (0.02, 0, 0.8), (0.08, 0.02, 1.0), (0.16, 0.05, 1.2)]), 0.04, 10)
    body = globe(radius * (1 + 0.02 * _waves(rng, 4, 4))).scale((1, 1, rng.uniform(0.7, 1.1)))
    return (body + stem).rotate((rng.uniform(0, 180), 0, 0))


def _curve(rng: Generator, points: int, steps: int, flat: float = 1.0) -> np.ndarray:
    """A smooth curve (steps, 3) through random points."""
    walk = np.cumsum(rng.standard_normal((points, 3)) * (1, 1, flat), 0)
    return make_interp_spline(np.arange(points), walk, 3)(np.linspace(0, points - 1, steps))


def root_vegetable(rng: Generator) -> Manifold:
    path = np.linspace(0, 1, 30)[:, None] * (1.0, 0, 0) + 0.05 * _curve(rng, 5, 30)
    place = np.linspace(0, 1, 30)
    radius = rng.uniform(0.08, 0.2) * (np.sin(math.pi * np.clip(place, 0.02, 0.98)) ** rng.uniform(0.4, 1))
    radius *= (
        1 + 0.08 * np.sin(2 * math.pi * place * rng.uniform(2, 7) + rng.uniform(0, 6)) - 0.4 * place * rng.random()
    )
    return tube(path, np.maximum(radius, 0.008), 20)


def cable(rng: Generator) -> Manifold:
    path = _curve(rng, int(rng.integers(5, 8)), 80, 0.25)
    wire = rng.uniform(0.06, 0.16)
    ends = [tube(path[part], wire * rng.uniform(1.6, 2.4), 8) for part in (slice(0, 6), slice(-6, None))]
    return Manifold.compose([tube(path, wire, 10)]) + union(ends)


def horn(rng: Generator) -> Manifold:
    turns = np.linspace(0, rng.uniform(0.8, 3.0) * math.pi, 60)
    reach = np.exp(rng.uniform(0.08, 0.2) * turns)
    climb = rng.uniform(0, 0.3) * turns
    path = np.stack([reach * np.cos(turns), reach * np.sin(turns), climb], 1)
    return tube(path, rng.uniform(0.1, 0.35) * reach * np.linspace(0.3, 1, 60), 18)


def ring_knot(rng: Generator) -> Manifold:
    p, q = [(2, 3), (3, 2), (1, 0), (2, 5), (1, 3)][int(rng.integers(5))]
    turns = np.linspace(0, 2 * math.pi, 140)
    reach = 1 + (0.4 * np.cos(q * turns) if q else 0.1 * np.cos(3 * turns))
    path = np.stack([reach * np.cos(p * turns), reach * np.sin(p * turns), 0.4 * np.sin(q * turns)], 1)
    return tube(path, rng.uniform(0.08, 0.2), 14)


def saddle_shell(rng: Generator) -> Manifold:
    """A curved sheet: its upper side, and the same a little lower, closed at the border."""
    count = 40
    u = np.linspace(-0.5, 0.5, count)
    x, y = np.meshgrid(u, u * rng.uniform(0.5, 1), indexing="ij")
    a, b, c = rng.uniform(-1.2, 1.2, 3)
    z = a * x**2 + b * y**2 + c * x * y + rng.uniform(0, 0.06) * np.sin(rng.uniform(4, 14) * x + rng.uniform(0, 6))
    thick = rng.uniform(0.02, 0.06)
    top, bottom = np.stack([x, y, z], -1), np.stack([x, y, z - thick], -1)
    # Each ring runs along the top and back along the bottom.
    rings = np.concatenate([top, bottom[:, ::-1]], 1)
    ends = rings[[0, -1]].mean(1)
    return lofted(rings[:, ::-1], ends)


def bent_pipe(rng: Generator) -> Manifold:
    path, wire = _curve(rng, 4, 40), rng.uniform(0.15, 0.3)
    outer = tube(path, wire, 18)
    return outer - tube(path[[0, 1, 2, 3]], wire * 0.7, 14) - tube(path[-4:], wire * 0.7, 14)


def pebbles(rng: Generator) -> Manifold:
    stones = []
    for _ in range(int(rng.integers(3, 7))):
        stone = globe(np.exp(0.12 * _waves(rng, 5, 3))[::2, ::2]).scale(tuple(rng.uniform(0.2, 0.5, 3)))
        stones.append(
            stone.rotate(tuple(rng.uniform(0, 360, 3))).translate(tuple(rng.uniform(-0.5, 0.5, 3) * (1, 1, 0.3)))
        )
    return union(stones)


BUILDERS = (superquadric, lump, fruit, root_vegetable, cable, horn, ring_knot, saddle_shell, bent_pipe, pebbles)
