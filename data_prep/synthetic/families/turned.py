"""Parts from a lathe: solids of revolution, some with a second operation."""

import math

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.engines import CrossSection, Manifold
from data_prep.synthetic.families.sweeps import rounded, tube
from data_prep.synthetic.parts import around, box, cylinder, difference, turned, union


def _profile(radii: np.ndarray, heights: np.ndarray, softenings: int) -> np.ndarray:
    """(points, 2) of radius and height from the axis at the bottom to the axis at the top, corners rounded."""
    outline = np.stack([radii, heights], 1)
    ends = [(0.0, heights[0])], [(0.0, heights[-1])]
    return np.concatenate([ends[0], rounded(outline, softenings), ends[1]])


def bottle(rng: Generator) -> Manifold:
    body, neck, height = rng.uniform(0.22, 0.45), rng.uniform(0.08, 0.14), rng.uniform(0.5, 0.75)
    radii = np.array([body * 0.85, body, body, body * rng.uniform(0.8, 1), neck, neck, neck * 1.25, neck * 1.25])
    levels = np.array([0, 0.04, height * 0.5, height, height + rng.uniform(0.08, 0.2), 0.93, 0.935, 1])
    solid = turned([tuple(point) for point in _profile(radii, levels, 2)])
    return solid - cylinder(neck * 0.75, 0.2, (0, 0, 0.85), segments=24)


def bowl(rng: Generator) -> Manifold:
    depth, wall = rng.uniform(0.25, 0.8), rng.uniform(0.04, 0.08)
    bend = rng.uniform(0.3, 1.2)
    place = np.linspace(0, 1, 14)
    outside = np.stack([0.35 + 0.65 * place**bend, depth * place ** rng.uniform(0.8, 2)], 1)
    inside = outside[::-1] - (wall, 0)
    inside[:, 1] = np.maximum(inside[:, 1], wall)
    return turned([(0, 0), *map(tuple, outside), *map(tuple, inside), (0, wall)])


def pulley(rng: Generator) -> Manifold:
    grooves, width, bore = int(rng.integers(1, 5)), rng.uniform(0.18, 0.3), rng.uniform(0.12, 0.3)
    depth, outline = rng.uniform(0.12, 0.25), [(bore, 0.0), (1.0, 0.0)]
    for place in range(grooves):
        start = place * width
        outline += [(1, start + 0.04), (1 - depth, start + 0.4 * width), (1 - depth, start + 0.6 * width)]
        outline += [(1, start + width - 0.04), (1, start + width)]
    top = grooves * width
    solid = turned([*outline, (bore, top)])
    if rng.random() < 0.6:
        holes = int(rng.integers(3, 7))
        hole = cylinder(rng.uniform(0.08, 0.14), 2 * top, ((bore + 1 - depth) / 2, 0, -0.1), segments=20)
        solid = difference(solid, around(hole, holes))
    return solid


def wheel_rim(rng: Generator) -> Manifold:
    width, drop, spokes = rng.uniform(0.35, 0.8), rng.uniform(0.08, 0.18), int(rng.integers(4, 11))
    rim = [(1, 0), (1, 0.06), (0.95, 0.08), (0.95 - drop, width * 0.3), (0.95 - drop, width * 0.7)]
    rim += [(0.95, width - 0.08), (1, width - 0.06), (1, width)]
    wall = [(radius - 0.07, level) for radius, level in reversed(rim)]
    hub, face = rng.uniform(0.14, 0.24), rng.uniform(0.2, 0.7) * width
    spoke = box(0.85 - drop, rng.uniform(0.06, 0.16), 0.09, ((0.85 - drop) / 2 + 0.05, 0, face))
    hub_solid = turned([(hub * 0.4, face - 0.05), (hub, face - 0.05), (hub, face + 0.15), (hub * 0.4, face + 0.15)])
    bore = cylinder(hub * 0.4, 2, (0, 0, -0.5), segments=20)
    return difference(union([turned([*rim, *wall]), *around(spoke, spokes), hub_solid]), [bore])


def flanged_bush(rng: Generator) -> Manifold:
    bore, wall, length = rng.uniform(0.3, 0.55), rng.uniform(0.08, 0.2), rng.uniform(0.5, 1.8)
    flange, thick = rng.uniform(0.15, 0.4), rng.uniform(0.08, 0.2)
    outer = bore + wall
    solid = turned(
        [(bore, 0), (outer + flange, 0), (outer + flange, thick), (outer, thick), (outer, length - 0.05)]
        + [(outer - 0.05, length), (bore + 0.03, length), (bore, length - 0.03)]
    )
    if rng.random() < 0.5:
        solid = solid - box(3, rng.uniform(0.05, 0.15), length * 0.6, (0, 0, length * 0.6))
    return solid


def piston(rng: Generator) -> Manifold:
    length, rings, bowl_depth = rng.uniform(0.9, 1.4), int(rng.integers(2, 5)), rng.uniform(0.05, 0.2)
    outline = [(0.8, 0.0), (1.0, 0.0)]
    for place in range(rings):
        level = length - 0.12 - 0.14 * (rings - place - 1)
        outline += [(1, level - 0.09), (0.93, level - 0.09), (0.93, level - 0.03), (1, level - 0.03)]
    outline += [(1, length), (0.65, length), (0.5, length - bowl_depth), (0, length - bowl_depth)]
    solid = turned([*outline, (0, length * 0.75), (0.8, length * 0.6)])
    pin = cylinder(rng.uniform(0.16, 0.24), 3, (0, 0, -1.5), segments=24).rotate((90, 0, 0))
    return solid - pin.translate((0, 0, length * 0.35))


def bolt(rng: Generator) -> Manifold:
    shank, length, threads = rng.uniform(0.12, 0.2), rng.uniform(0.7, 1.6), int(rng.integers(8, 18))
    start = length * rng.uniform(0.2, 0.5)
    levels = np.linspace(start, length, 2 * threads + 1)
    outline = [(0, 0), (shank, 0), (shank, start)]
    outline += [(shank * (1.0 if place % 2 else 0.84), level) for place, level in enumerate(levels)]
    rod = turned([*outline, (0, length)], segments=24)
    across, high = shank * rng.uniform(1.7, 2.1), shank * rng.uniform(1.0, 1.5)
    head = cylinder(across, high, (0, 0, -high), segments=6)
    if rng.random() < 0.5:
        head = cylinder(across * 0.9, high, (0, 0, -high), segments=28)
        head = head - cylinder(across * 0.5, high, (0, 0, -1.5 * high), segments=6)
    return (rod + head).rotate((90, 0, rng.uniform(0, 360)))


def finial(rng: Generator) -> Manifold:
    steps = int(rng.integers(5, 11))
    radii = rng.uniform(0.08, 0.45, steps)
    levels = np.concatenate([[0], np.cumsum(rng.uniform(0.06, 0.3, steps - 1))])
    return turned([tuple(point) for point in _profile(radii, levels, int(rng.integers(0, 4)))])


def mug(rng: Generator) -> Manifold:
    radius, height, wall = rng.uniform(0.35, 0.5), rng.uniform(0.75, 1.1), rng.uniform(0.03, 0.06)
    taper = rng.uniform(0.8, 1.1)
    cup = [(0, 0), (radius * taper, 0), (radius, height), (radius - wall, height), (radius * taper - wall, wall)]
    turn = np.linspace(-math.pi / 2, math.pi / 2, 14)
    bow = rng.uniform(0.2, 0.35)
    path = np.stack([radius * 0.97 + bow * np.cos(turn), 0 * turn, height / 2 + 0.32 * height * np.sin(turn)], 1)
    handle = tube(path, rng.uniform(0.04, 0.07), 12)
    inside = [(0, wall), (radius * taper - wall, wall), (radius - wall, height + 0.1), (0, height + 0.1)]
    return turned([*cup, (0, wall)]) + (handle - turned(inside))


def funnel(rng: Generator) -> Manifold:
    mouth, spout, wall = rng.uniform(0.7, 1.0), rng.uniform(0.1, 0.2), rng.uniform(0.03, 0.06)
    cone, length = rng.uniform(0.4, 1.0), rng.uniform(0.3, 0.8)
    outside = [(spout, 0), (spout * 1.2, length), (mouth, length + cone), (mouth, length + cone + 0.1)]
    inside = [(radius - wall, level) for radius, level in reversed(outside)]
    return turned([*outside, *inside])


def knurled_nut(rng: Generator) -> Manifold:
    ridges, high, bore = int(rng.integers(14, 30)), rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.45)
    outline = CrossSection.circle(1, 60)
    notch = CrossSection.circle(rng.uniform(0.05, 0.09), 10).translate((1, 0))
    for turn in range(ridges):
        outline = outline - notch.rotate(360 * turn / ridges)
    collar = turned([(bore, 0), (rng.uniform(0.6, 0.8), 0), (0.6, high * 1.6), (bore, high * 1.6)])
    return (outline - CrossSection.circle(bore, 28)).extrude(high) + collar


BUILDERS = (bottle, bowl, pulley, wheel_rim, flanged_bush, piston, bolt, finial, mug, funnel, knurled_nut)
