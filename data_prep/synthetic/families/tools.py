"""Transmission parts, tools and small things of every day."""

import math

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.engines import CrossSection, Manifold
from data_prep.synthetic.families.sweeps import tube
from data_prep.synthetic.parts import box, cylinder, difference, polar, swept, turned, union


def gear_rack(rng: Generator) -> Manifold:
    teeth, depth, width = int(rng.integers(6, 18)), rng.uniform(0.05, 0.1), rng.uniform(0.1, 0.35)
    pitch = 1 / teeth
    outline = [(0.0, 0.0), (1.0, 0.0)]
    for place in reversed(range(teeth)):
        start = place * pitch
        outline += [(start + 0.9 * pitch, 0.15), (start + 0.7 * pitch, 0.15 + depth)]
        outline += [(start + 0.35 * pitch, 0.15 + depth), (start + 0.12 * pitch, 0.15)]
    return CrossSection([outline]).extrude(width).rotate((90, 0, 0))


def bevel_gear(rng: Generator) -> Manifold:
    teeth, height, top = int(rng.integers(12, 24)), rng.uniform(0.3, 0.6), rng.uniform(0.4, 0.7)
    pitch = np.array([0.0, 0.2, 0.35, 0.6, 0.75])
    angles = (2 * math.pi / teeth) * (np.arange(teeth)[:, None] + pitch).ravel()
    ring = polar(np.tile([0.84, 0.84, 1, 1, 0.84], teeth), angles)
    cone = ring.extrude(height, 6, rng.uniform(0, 15), (top, top))
    hub = cylinder(0.4, 0.25, (0, 0, -0.2))
    return (cone + hub) - cylinder(rng.uniform(0.15, 0.25), 3, (0, 0, -1))


def helical_gear(rng: Generator) -> Manifold:
    teeth, height, twist = int(rng.integers(10, 22)), rng.uniform(0.3, 0.8), rng.uniform(15, 50)
    pitch = np.array([0.0, 0.2, 0.35, 0.6, 0.75])
    angles = (2 * math.pi / teeth) * (np.arange(teeth)[:, None] + pitch).ravel()
    root = 1 - rng.uniform(3, 4.2) / teeth
    ring = polar(np.tile([root, root, 1, 1, root], teeth), angles) - CrossSection.circle(rng.uniform(0.2, 0.35), 28)
    return ring.extrude(height, 10, twist)


def sprocket(rng: Generator) -> Manifold:
    teeth, thick = int(rng.integers(10, 22)), rng.uniform(0.06, 0.15)
    blank = CrossSection.circle(1, 64)
    gap = CrossSection.circle(1.15 / teeth * 1.4, 14).translate((0.97, 0))
    for turn in range(teeth):
        blank = blank - gap.rotate(360 * turn / teeth)
    windows = int(rng.integers(0, 7))
    for turn in range(windows):
        blank = blank - CrossSection.circle(0.13, 20).translate((0.55, 0)).rotate(360 * turn / windows)
    hub = cylinder(rng.uniform(0.22, 0.34), thick * rng.uniform(1.2, 4))
    return (blank.extrude(thick) + hub) - cylinder(0.16, 3, (0, 0, -1))


def worm_screw(rng: Generator) -> Manifold:
    turns, wire, pitch = rng.uniform(4, 9), rng.uniform(0.1, 0.16), rng.uniform(0.28, 0.4)
    angle = np.linspace(0, 2 * math.pi * turns, int(turns * 20))
    radial = np.stack([np.cos(angle), np.zeros(len(angle)), np.sin(angle)], 1)
    axial = np.tile([0.0, 1.0, 0.0], (len(angle), 1))
    reach = rng.uniform(0.45, 0.7)
    thread = swept(reach * radial + axial * (pitch / (2 * math.pi) * angle)[:, None], radial, axial, wire, 8)
    length = pitch * turns
    rod = cylinder(reach, length, segments=28).rotate((-90, 0, 0))
    shaft = cylinder(reach * 0.5, length + 1, (0, 0, -0.5), segments=20).rotate((-90, 0, 0))
    return union([thread, rod, shaft])


def chain(rng: Generator) -> Manifold:
    links, wire, gap = int(rng.integers(3, 7)), rng.uniform(0.1, 0.16), rng.uniform(0.45, 0.8)
    turn = np.linspace(0, 2 * math.pi, 33)
    loop = np.stack([gap * np.sign(np.cos(turn)) * np.abs(np.cos(turn)) ** 0.6 + 0, 0.38 * np.sin(turn), 0 * turn], 1)
    link, solids, angle = tube(loop, wire, 10), [], 0.0
    place = np.zeros(3)
    for number in range(links):
        solids.append(link.rotate((90 * (number % 2), 0, 0)).rotate((0, 0, angle)).translate(tuple(place)))
        angle += rng.uniform(-25, 25)
        place = place + 2 * (gap - wire) * np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle)), 0])
    return Manifold.compose(solids)


def wrench(rng: Generator) -> Manifold:
    length, grip, thick = 1.0, rng.uniform(0.07, 0.11), rng.uniform(0.04, 0.08)
    head, other = rng.uniform(0.13, 0.2), rng.uniform(0.11, 0.17)
    outline = CrossSection.square((length, grip), True) + CrossSection.circle(head, 28).translate((-0.5, 0))
    outline = outline + CrossSection.circle(other, 28).translate((0.5, 0))
    jaw = CrossSection.square((2 * head, head)).translate((-2 * head, -head / 2)).rotate(rng.uniform(-20, 20))
    outline = outline - jaw.translate((-0.5, 0)) - CrossSection.circle(other * 0.65, 6).translate((0.5, 0))
    solid = outline.extrude(thick)
    return solid - box(length * 0.6, grip * 0.5, 1, (0, 0, thick * 0.75))


def screwdriver(rng: Generator) -> Manifold:
    ridges, grip = int(rng.integers(4, 9)), rng.uniform(0.09, 0.14)
    angles = np.linspace(0, 2 * math.pi, 60, endpoint=False)
    handle = polar(grip * (1 + 0.1 * np.cos(ridges * angles)), angles).extrude(rng.uniform(0.35, 0.5), 4, 0, (0.8, 0.8))
    blade = turned([(0, -0.6), (0.03, -0.55), (0.035, 0.02), (0, 0.02)], segments=16)
    tip = box(0.07, 0.012, 0.1, (0, 0, -0.66))
    return union([handle, blade, tip]).rotate((90, 0, 0))


def toy_brick(rng: Generator) -> Manifold:
    columns, rows = int(rng.integers(1, 6)), int(rng.integers(1, 4))
    height = float(rng.choice([0.4, 1.2]))
    studs = [
        cylinder(0.3, 0.22, (i - (columns - 1) / 2, j - (rows - 1) / 2, height - 0.01), segments=20)
        for i in range(columns)
        for j in range(rows)
    ]
    body = box(columns, rows, height) - box(columns - 0.3, rows - 0.3, height - 0.15)
    solid = union([body, *studs])
    return solid if rng.random() < 0.7 else solid.rotate((180, 0, 0))


def house_key(rng: Generator) -> Manifold:
    thick, cuts = rng.uniform(0.03, 0.05), int(rng.integers(4, 8))
    bow = polar(rng.uniform(0.2, 0.26) * (1 + 0.1 * np.cos(3 * np.linspace(0, 6.2, 40))), np.linspace(0, 6.2, 40))
    blade = CrossSection.square((0.65, 0.13)).translate((0.15, -0.065))
    outline = bow + blade - CrossSection.circle(0.06, 16).translate((-0.1, 0))
    for x in np.linspace(0.32, 0.74, cuts):
        deep = rng.uniform(0.01, 0.06)
        outline = outline - CrossSection([[(x - 0.035, 0.07), (x, 0.07 - deep), (x + 0.035, 0.07)]])
    return outline.extrude(thick) - box(0.6, 0.02, 1, (0.5, -0.02, thick * 0.7))


def carton(rng: Generator) -> Manifold:
    width, height, wall = rng.uniform(0.4, 1.0), rng.uniform(0.25, 0.9), rng.uniform(0.015, 0.03)
    shell = box(1, width, height) - box(1 - 2 * wall, width - 2 * wall, height, (0, 0, wall))
    flaps = []
    for side in (-1, 1):
        flap = (
            box(1, width * 0.45, wall)
            .translate((0, side * width * 0.22, 0))
            .rotate((side * rng.uniform(-10, 130), 0, 0))
        )
        flaps.append(flap.translate((0, side * width / 2, height)))
        flap = box(0.3, width, wall).translate((side * 0.15, 0, 0)).rotate((0, -side * rng.uniform(-10, 130), 0))
        flaps.append(flap.translate((side * 0.5, 0, height)))
    return union([shell, *flaps[: int(rng.integers(0, 5))]])


def pin_header(rng: Generator) -> Manifold:
    pins, rows = int(rng.integers(3, 10)), int(rng.integers(1, 3))
    bar = box(pins, rows, 0.8)
    pin = box(0.22, 0.22, rng.uniform(1.8, 3.0), (0, 0, -0.8))
    places = [(i - (pins - 1) / 2, j - (rows - 1) / 2, 0) for i in range(pins) for j in range(rows)]
    notch = box(0.3, rows + 1, 0.2, (0, 0, 0.65))
    gaps = [notch.translate((i - pins / 2, 0, 0)) for i in range(1, pins)]
    return union([difference(bar, gaps), *(pin.translate(place) for place in places)])


BUILDERS = (
    gear_rack, bevel_gear, helical_gear, sprocket, worm_screw, chain, wrench, screwdriver, toy_brick, house_key, carton,
    pin_header,
)  # fmt: skip
