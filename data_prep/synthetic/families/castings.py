"""Cast and milled parts: ribs, bosses, ports and pockets."""

import math

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.engines import CrossSection, Manifold
from data_prep.synthetic.families.sweeps import tube
from data_prep.synthetic.parts import around, box, cylinder, difference, turned, union


def _plate(length: float, width: float, corner: float, height: float) -> Manifold:
    """A plate with round corners, bottom at z = 0."""
    return CrossSection.square((length - 2 * corner, width - 2 * corner), True).offset(corner).extrude(height)


def ribbed_housing(rng: Generator) -> Manifold:
    width, height, wall = rng.uniform(0.6, 1.0), rng.uniform(0.25, 0.7), rng.uniform(0.04, 0.08)
    corner = rng.uniform(0.05, 0.2)
    shell = _plate(1, width, corner, height) - _plate(1 - 2 * wall, width - 2 * wall, corner * 0.8, height).translate(
        (0, 0, wall)
    )
    ribs = [box(wall * 0.6, width - wall, height * rng.uniform(0.3, 0.9), (x, 0, 0)) for x in rng.uniform(-0.4, 0.4, 3)]
    ribs += [box(1 - wall, wall * 0.6, height * rng.uniform(0.3, 0.9), (0, y, 0)) for y in rng.uniform(-0.25, 0.25, 2)]
    boss, places = rng.uniform(0.05, 0.08), [(x * 0.4, y * width * 0.38) for x in (-1, 1) for y in (-1, 1)]
    bosses = [cylinder(boss, height * 0.95, (x, y, 0)) for x, y in places]
    solid = difference(union([shell, *ribs, *bosses]), [cylinder(boss * 0.5, 2, (x, y, wall)) for x, y in places])
    return solid if rng.random() < 0.6 else solid.rotate((180, 0, 0))


def pillow_block(rng: Generator) -> Manifold:
    radius, width, base = rng.uniform(0.28, 0.4), rng.uniform(0.25, 0.45), rng.uniform(0.08, 0.16)
    rise = radius + rng.uniform(0.05, 0.25)
    ring = cylinder(radius, width, (0, 0, -width / 2), segments=40).rotate((90, 0, 0)).translate((0, 0, rise))
    foot, web = box(1.4, width, base), box(2 * radius, width * 0.8, rise)
    bore = cylinder(radius * rng.uniform(0.5, 0.75), 2, (0, 0, -1), segments=36).rotate((90, 0, 0))
    holes = [cylinder(0.07, 2, (x, 0, -0.5), segments=18) for x in (-0.55, 0.55)]
    return difference(union([ring, foot, web]), [bore.translate((0, 0, rise)), *holes])


def lever_arm(rng: Generator) -> Manifold:
    first, second, web = rng.uniform(0.15, 0.28), rng.uniform(0.1, 0.2), rng.uniform(0.06, 0.12)
    heights = rng.uniform(0.12, 0.35, 2)
    bend = rng.uniform(-0.25, 0.25)
    eyes = [CrossSection.circle(radius * 0.8, 28).translate((x, 0)) for radius, x in ((first, -0.5), (second, 0.5))]
    knee = CrossSection.circle(0.12, 20).translate((0, bend))
    arm = CrossSection.batch_hull([eyes[0], knee]) + CrossSection.batch_hull([knee, eyes[1]])
    arm = arm.extrude(web)
    if rng.random() < 0.6:
        arm = arm - arm.scale((0.75, 0.6, 1)).translate((0, bend * 0.4, web * 0.4))
    bosses = [
        cylinder(radius, high, (x, 0, 0)) for radius, high, x in zip((first, second), heights, (-0.5, 0.5), strict=True)
    ]
    bores = [cylinder(radius * 0.55, 2, (x, 0, -0.5)) for radius, x in ((first, -0.5), (second, 0.5))]
    return difference(union([arm, *bosses]), bores)


def port_block(rng: Generator) -> Manifold:
    width, height = rng.uniform(0.5, 0.9), rng.uniform(0.35, 0.8)
    block = box(1, width, height)
    tools, bosses = [], []
    for _ in range(int(rng.integers(3, 8))):
        radius, deep = rng.uniform(0.04, 0.13), rng.uniform(0.15, 0.6)
        drill = turned(
            [(0, -deep), (radius * 0.6, -deep), (radius * 0.6, -0.1), (radius, -0.1), (radius, 0.3), (0, 0.3)]
        )
        collar = turned([(0, -0.05), (radius * 1.5, -0.05), (radius * 1.5, 0.06), (0, 0.06)])
        x, y = rng.uniform(-0.38, 0.38), rng.uniform(-0.35, 0.35)
        side = int(rng.integers(3))
        turn = [(0, 0, 0), (0, 90, 0), (-90, 0, 0)][side]
        place = [(x, y * width, height), (0.5, y * width, height * (0.5 + x)), (x, width / 2, height * (0.5 + y))][side]
        tools.append(drill.rotate(turn).translate(place))
        if rng.random() < 0.4:
            bosses.append(collar.rotate(turn).translate(place))
    return difference(union([block, *bosses]), tools)


def pump_volute(rng: Generator) -> Manifold:
    turns = np.linspace(0, 1.85 * math.pi, 30)
    grow = rng.uniform(0.05, 0.12)
    radius = 0.10 + grow * turns / 2
    reach = 0.55 + radius * 0.5
    path = np.stack([reach * np.cos(turns), reach * np.sin(turns), 0 * turns], 1)
    outlet = path[-1] + np.linspace(0, rng.uniform(0.3, 0.6), 5)[1:, None] * (path[-1] - path[-2]) / np.linalg.norm(
        path[-1] - path[-2]
    )
    scroll = tube(np.concatenate([path, outlet]), np.concatenate([radius, np.full(4, radius[-1])]), 16)
    disc = cylinder(0.6, 0.2, (0, 0, -0.1), segments=40)
    inlet = cylinder(rng.uniform(0.2, 0.3), rng.uniform(0.25, 0.5), (0, 0, 0), segments=30)
    bore = cylinder(0.15, 2, (0, 0, 0.0), segments=24)
    return union([scroll, disc, inlet]) - bore


def pipe_tee(rng: Generator) -> Manifold:
    pipe, reach, collar = rng.uniform(0.18, 0.28), rng.uniform(0.45, 0.7), rng.uniform(1.2, 1.5)
    arms = [(0, 90, 0), (0, -90, 0), (90, 0, 0), (-90, 0, 0)][: int(rng.integers(3, 5))]
    arm = turned(
        [(0, 0), (pipe, 0), (pipe, reach - 0.12), (pipe * collar, reach - 0.1), (pipe * collar, reach), (0, reach)]
    )
    bore = cylinder(pipe * 0.75, 2)
    return difference(union([arm.rotate(turn) for turn in arms]), [bore.rotate(turn) for turn in arms])


def milled_pocket(rng: Generator) -> Manifold:
    width, height = rng.uniform(0.6, 1.0), rng.uniform(0.15, 0.4)
    tools = []
    for _ in range(int(rng.integers(2, 6))):
        size = rng.uniform(0.15, 0.5, 2)
        pocket = _plate(*size, 0.06, 1).rotate((0, 0, rng.choice([0, 0, 30, 45])))
        place = rng.uniform(-0.35, 0.35, 2) * (1, width)
        tools.append(pocket.translate((*place, height * rng.uniform(0.2, 0.8))))
    islands = [cylinder(rng.uniform(0.03, 0.1), height * rng.uniform(0.6, 1.2), (*rng.uniform(-0.3, 0.3, 2), 0))]
    chamfer = box(2, 2, 1).rotate((0, rng.uniform(20, 50), 0)).translate((0.9, 0, height * 0.3))
    return union([difference(box(1, width, height), [*tools, chamfer]), *islands])


def fan_housing(rng: Generator) -> Manifold:
    depth, blades, hub = rng.uniform(0.15, 0.4), int(rng.integers(5, 10)), rng.uniform(0.14, 0.22)
    frame = difference(_plate(1, 1, 0.06, depth), [cylinder(0.46, 2, (0, 0, -0.5), segments=48)])
    holes = [cylinder(0.03, 2, (x, y, -0.5), segments=12) for x in (-0.43, 0.43) for y in (-0.43, 0.43)]
    blade = box(0.42 - hub * 0.5, 0.02, depth * 1.0).rotate((rng.uniform(25, 60), 0, 0))
    blade = blade.translate((0.21 + hub * 0.3, 0, depth * 0.2)) ^ cylinder(0.44, depth * 0.9, (0, 0, 0.05 * depth))
    strut = box(0.5, 0.04, depth * 0.1, (0.25, 0, 0))
    parts = [difference(frame, holes), cylinder(hub, depth * 0.9, segments=32)]
    return union([*parts, *around(blade, blades), *around(strut, 4, 45)])


def engine_rib_cylinder(rng: Generator) -> Manifold:
    fins, core, reach = int(rng.integers(5, 12)), rng.uniform(0.3, 0.5), rng.uniform(0.1, 0.3)
    pitch = 1.0 / fins
    outline = [(core * 0.7, 0.0), (core, 0.0)]
    for place in range(fins):
        start = place * pitch
        outline += [(core, start + 0.3 * pitch), (core + reach, start + 0.35 * pitch)]
        outline += [(core + reach, start + 0.6 * pitch), (core, start + 0.7 * pitch)]
    body = turned([*outline, (core, 1.0), (core * 0.7, 1.0)])
    flange = _plate(2.2 * core + 0.3, 2.2 * core + 0.3, 0.08, 0.1)
    return body + (flange - cylinder(core * 0.7, 2, (0, 0, -0.5), segments=32))


def stepped_stand(rng: Generator) -> Manifold:
    levels, size, z = int(rng.integers(2, 5)), np.array([1.0, rng.uniform(0.5, 1.0)]), 0.0
    solids = []
    for _ in range(levels):
        high = rng.uniform(0.08, 0.25)
        shift = rng.uniform(-0.1, 0.1, 2) * size
        if rng.random() < 0.3:
            solids.append(cylinder(size.min() / 2, high + 0.01, (*shift, z - 0.01), size.min() / 2.4))
        else:
            solids.append(_plate(*size, 0.1 * size.min(), high + 0.01).translate((*shift, z - 0.01)))
        z, size = z + high, size * rng.uniform(0.55, 0.9, 2)
    return union(solids) - cylinder(0.3 * size.min(), 2, (0, 0, rng.uniform(0, z * 0.8)))


BUILDERS = (
    ribbed_housing, pillow_block, lever_arm, port_block, pump_volute, pipe_tee, milled_pocket, fan_housing,
    engine_rib_cylinder, stepped_stand,
)  # fmt: skip
