"""Kinds of objects that no family of ``data_prep.synthetic`` makes: what encoders trained on rendered parts never saw.

A builder takes a random generator and returns a watertight solid in any unit.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.engines import CrossSection, Manifold, OpType
from data_prep.synthetic.parts import box, turned, union

__all__ = ["KINDS"]


def _rod(first: np.ndarray, second: np.ndarray, radius: float, end: float | None = None) -> Manifold:
    """A bar with round ends between two points (3,)."""
    balls = [Manifold.sphere(radius, 16).translate(tuple(first))]
    balls.append(Manifold.sphere(radius if end is None else end, 16).translate(tuple(second)))
    return Manifold.batch_hull(balls)


def twisted_prism(rng: Generator) -> Manifold:
    corners, turn = int(rng.integers(3, 7)), rng.uniform(60, 240) * rng.choice([-1, 1])
    angles = np.arange(corners) * (2 * math.pi / corners)
    radii = rng.uniform(0.35, 0.6, corners)
    outline = CrossSection([np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)])
    top = rng.uniform(0.4, 1.0)
    return outline.extrude(rng.uniform(0.9, 1.6), 48, float(turn), (top, top))


def polycube(rng: Generator) -> Manifold:
    cells, place = {(0, 0, 0)}, np.zeros(3, int)
    while len(cells) < int(rng.integers(6, 11)):
        place = place + np.eye(3, dtype=int)[rng.integers(3)] * int(rng.choice([-1, 1]))
        cells.add(tuple(int(value) for value in place))
    return union(box(1.01, 1.01, 1.01, cell) for cell in sorted(cells))


def sponge(rng: Generator) -> Manifold:
    holes, share = int(rng.integers(2, 4)), rng.uniform(0.4, 0.65)
    block = Manifold.cube((1, 1, rng.uniform(0.7, 1.2)), True)
    places = (np.arange(holes) + 0.5) / holes - 0.5
    side = share / holes
    drills = [box(side, side, 3, (x, y, -1.5)) for x in places for y in places]
    across = [drill.rotate((90, 0, 0)) for drill in drills] + [drill.rotate((0, 90, 0)) for drill in drills]
    return block - union([*drills, *across])


def spiked_ball(rng: Generator) -> Manifold:
    count, length, foot = int(rng.integers(9, 20)), rng.uniform(0.35, 0.8), rng.uniform(0.16, 0.26)
    index = np.arange(count) + 0.5
    height, turn = 1 - 2 * index / count, math.pi * (1 + math.sqrt(5)) * index
    flat = np.sqrt(1 - height**2)
    directions = np.stack([flat * np.cos(turn), flat * np.sin(turn), height], 1)
    spikes = [_rod(0.4 * way, (0.5 + length) * way, foot, 0.02) for way in directions]
    return union([Manifold.sphere(0.5, 40), *spikes])


def cut_gem(rng: Generator) -> Manifold:
    points = rng.standard_normal((int(rng.integers(10, 22)), 3))
    points *= rng.uniform(0.6, 1.2, 3) / np.linalg.norm(points, axis=1, keepdims=True)
    return Manifold.hull_points(points)


def turned_stack(rng: Generator) -> Manifold:
    layers, step = int(rng.integers(4, 8)), rng.uniform(12, 40)
    length, width, height = rng.uniform(0.8, 1.2), rng.uniform(0.35, 0.7), rng.uniform(0.12, 0.22)
    shrink = rng.uniform(0.85, 1.0)
    return union(
        box(length * shrink**layer, width * shrink**layer, height * 1.01, (0, 0, layer * height)).rotate(
            (0, 0, step * layer)
        )
        for layer in range(layers)
    )


def honeycomb(rng: Generator) -> Manifold:
    rows, columns, wall = int(rng.integers(3, 6)), int(rng.integers(3, 6)), rng.uniform(0.12, 0.25)
    cell, height = CrossSection.circle(1, 6).rotate(30), rng.uniform(0.6, 2.0)
    places = [(math.sqrt(3) * (column + row % 2 / 2), 1.5 * row) for row in range(rows) for column in range(columns)]
    whole = CrossSection.batch_boolean([cell.scale((1.02, 1.02)).translate(place) for place in places], OpType.Add)
    for place in places:
        whole = whole - cell.scale((1 - wall, 1 - wall)).translate(place)
    return whole.extrude(height)


def sea_shell(rng: Generator) -> Manifold:
    turns, growth, rise = rng.uniform(2.0, 3.2), rng.uniform(0.14, 0.22), rng.uniform(0.3, 1.2)
    angles = np.linspace(0, 2 * math.pi * turns, int(14 * turns))
    reach = np.exp(growth * angles)
    points = np.stack([reach * np.cos(angles), reach * np.sin(angles), -rise * reach], 1)
    radii = 0.42 * reach
    return union(_rod(points[i], points[i + 1], radii[i], radii[i + 1]) for i in range(len(angles) - 1))


def truss(rng: Generator) -> Manifold:
    bays, radius = int(rng.integers(2, 4)), rng.uniform(0.05, 0.09)
    corners = [np.array([x, y, z]) for x in range(bays + 1) for y in (0, 1) for z in (0, 1)]
    bars = []
    for place, first in enumerate(corners):
        for second in corners[place + 1 :]:
            step = np.abs(second - first)
            diagonal = step[0] == 1 and step[1:].sum() == 1 and (first[0] + first[1] + first[2]) % 2 == 0
            if step.sum() == 1 or diagonal:
                bars.append(_rod(first, second, radius))
    return union(bars)


def branches(rng: Generator) -> Manifold:
    rods = []

    def grow(start: np.ndarray, way: np.ndarray, length: float, radius: float, left: int):
        end = start + length * way
        rods.append(_rod(start, end, radius, 0.75 * radius))
        for _ in range(int(rng.integers(2, 4)) if left else 0):
            turned_way = way + 0.75 * rng.standard_normal(3)
            grow(end, turned_way / np.linalg.norm(turned_way), 0.72 * length, 0.75 * radius, left - 1)

    grow(np.zeros(3), np.array([0.0, 0.0, 1.0]), 1.0, 0.17, 3)
    return union(rods)


def amphitheatre(rng: Generator) -> Manifold:
    steps, degrees = int(rng.integers(4, 8)), rng.uniform(120, 260)
    tread, riser, start = rng.uniform(0.12, 0.2), rng.uniform(0.08, 0.16), rng.uniform(0.25, 0.5)
    outline = [(start, 0.0), (start + steps * tread, 0.0), (start + steps * tread, steps * riser)]
    for step in range(steps - 1, 0, -1):
        outline += [(start + step * tread, (step + 1) * riser), (start + step * tread, step * riser)]
    outline.append((start, riser))
    return CrossSection([outline]).revolve(64, float(degrees))


def craters(rng: Generator) -> Manifold:
    block = box(1.2, 1.2, 0.35)
    balls = []
    for _ in range(int(rng.integers(7, 14))):
        radius = rng.uniform(0.08, 0.24)
        x, y = rng.uniform(-0.5, 0.5, 2)
        rim = turned([(0, 0), (1.25 * radius, 0), (0.9 * radius, 0.3 * radius), (0, 0.3 * radius)], segments=28)
        block = block + rim.translate((float(x), float(y), 0.349))
        balls.append(Manifold.sphere(radius, 28).translate((float(x), float(y), 0.35 + 0.3 * radius)))
    return block - union(balls)


KINDS: dict[str, Callable[[Generator], Manifold]] = {
    builder.__name__: builder
    for builder in (
        twisted_prism, polycube, sponge, spiked_ball, cut_gem, turned_stack, honeycomb, sea_shell, truss, branches,
        amphitheatre, craters,
    )
}  # fmt: skip
