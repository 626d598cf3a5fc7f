"""Parts of sheet metal and flat stock: bent, punched, drawn and corrugated."""

import math

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.engines import CrossSection, Manifold
from data_prep.synthetic.families.sweeps import rounded, strip
from data_prep.synthetic.parts import box, cylinder, difference, polar, union


def _bent(corners: list[tuple[float, float]], thickness: float, width: float) -> Manifold:
    """Sheet along a polyline of (x, z), bent with a radius, ``width`` in y."""
    line = rounded(np.array(corners, float), 3)
    return strip(line, thickness).extrude(width).rotate((90, 0, 0)).translate((0, width / 2, 0))


def _drilled(solid: Manifold, places: list[tuple[float, float]], radius: float) -> Manifold:
    return difference(solid, [cylinder(radius, 6, (x, y, -3), segments=20) for x, y in places])


def hat_channel(rng: Generator) -> Manifold:
    top, rise, brim = rng.uniform(0.2, 0.5), rng.uniform(0.15, 0.5), rng.uniform(0.15, 0.3)
    lean, width, thickness = rng.uniform(0, 0.12), rng.uniform(0.4, 1.6), rng.uniform(0.02, 0.05)
    side = top + lean
    corners = [(-side - brim, 0), (-side, 0), (-top, rise), (top, rise), (side, 0), (side + brim, 0)]
    count = int(rng.integers(0, 4))
    places = [(x, y) for y in np.linspace(-0.35, 0.35, count) * width for x in (-side - brim / 2, 0, side + brim / 2)]
    return _drilled(_bent(corners, thickness, width), places, rng.uniform(0.03, 0.08))


def z_bracket(rng: Generator) -> Manifold:
    first, second, rise = rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.8), rng.uniform(0.2, 0.7)
    lean, width, thickness = rng.uniform(-0.1, 0.3), rng.uniform(0.3, 0.9), rng.uniform(0.02, 0.06)
    corners = [(-first, 0), (0, 0), (lean, rise), (lean + second, rise)]
    hole = rng.uniform(0.05, 0.09)
    places = [(-first * 0.55, y * width) for y in (-0.25, 0.25)] + [(lean + second * 0.6, 0)]
    return _drilled(_bent(corners, thickness, width), places, hole)


def perforated_plate(rng: Generator) -> Manifold:
    length, width, thickness = 1.0, rng.uniform(0.5, 1.0), rng.uniform(0.02, 0.08)
    columns = int(rng.integers(4, 9))
    pitch = length / (columns + 0.5)
    rows, radius = max(2, int(width / pitch)), pitch * rng.uniform(0.2, 0.38)
    sides = int(rng.choice([4, 6, 18]))
    plate = CrossSection.square((length, width), True)
    for row in range(rows):
        shift = pitch / 4 * (-1) ** row if rng.random() < 0.9 else 0
        y = (row - (rows - 1) / 2) * pitch
        for column in range(columns):
            hole = CrossSection.circle(radius, sides).translate(((column - (columns - 1) / 2) * pitch + shift, y))
            plate = plate - hole
    return plate.extrude(thickness)


def drawn_tray(rng: Generator) -> Manifold:
    length, width, depth = 1.0, rng.uniform(0.5, 1.0), rng.uniform(0.12, 0.45)
    corner, wall, brim = rng.uniform(0.05, 0.2), rng.uniform(0.02, 0.05), rng.uniform(0.03, 0.1)
    inner = CrossSection.square((length - 2 * corner, width - 2 * corner), True)
    taper = rng.uniform(0.75, 0.98)

    def cup(grow: float, height: float) -> Manifold:
        outline = inner.offset(corner + grow)
        return outline.scale((taper, taper)).extrude(height, 0, 0, (1 / taper, 1 / taper))

    rim = inner.offset(corner + wall + brim).extrude(wall).translate((0, 0, depth - wall))
    tray = difference(union([cup(wall, depth), rim]), [cup(0, depth).translate((0, 0, wall))])
    if rng.random() < 0.6:
        ribs = int(rng.integers(2, 6))
        rib = [box(0.04, width * 0.6, wall * 2, (x, 0, 0)) for x in np.linspace(-0.3, 0.3, ribs)]
        tray = tray + union(rib)
    return tray


def corrugated_sheet(rng: Generator) -> Manifold:
    waves, height, width = int(rng.integers(3, 9)), rng.uniform(0.04, 0.12), rng.uniform(0.5, 1.2)
    x = np.linspace(-0.5, 0.5, 16 * waves)
    sharp = rng.uniform(0.8, 3)
    wave = np.tanh(sharp * np.sin(2 * math.pi * waves * x)) / math.tanh(sharp)
    line = np.stack([x, height * (1 + wave) + rng.uniform(-0.3, 0.3) * x**2], 1)
    return strip(line, rng.uniform(0.015, 0.03)).extrude(width).rotate((90, 0, 0))


def clamp_strap(rng: Generator) -> Manifold:
    radius, foot, width = rng.uniform(0.25, 0.45), rng.uniform(0.25, 0.5), rng.uniform(0.2, 0.5)
    turn = np.linspace(math.pi, 0, 12)
    arch = [(radius * math.cos(angle), 0.15 + radius * math.sin(angle)) for angle in turn]
    corners = [(-radius - foot, 0), (-radius, 0), *arch, (radius, 0), (radius + foot, 0)]
    hole = min(0.4 * foot, 0.3 * width) * rng.uniform(0.6, 0.9)
    places = [(-radius - foot * 0.6, 0), (radius + foot * 0.6, 0)]
    return _drilled(_bent(corners, rng.uniform(0.03, 0.06), width), places, hole)


def slotted_angle(rng: Generator) -> Manifold:
    leg, length, thickness = rng.uniform(0.2, 0.5), rng.uniform(1.0, 2.0), rng.uniform(0.02, 0.05)
    solid = _bent([(0, leg), (0, 0), (leg * rng.uniform(0.7, 1), 0)], thickness, length)
    count = int(rng.integers(3, 8))
    slot = box(leg * 0.2, length / count * 0.55, 1, (leg * 0.55, 0, -0.5))
    across = slot.rotate((0, -90, 0))
    places = (np.arange(count) - (count - 1) / 2) * (length / count)
    tools = [tool.translate((0, y, 0)) for y in places for tool in (slot, across)]
    return difference(solid, tools)


def gasket(rng: Generator) -> Manifold:
    lobes, angles = int(rng.integers(3, 7)), np.linspace(0, 2 * math.pi, 96, endpoint=False)
    swing = rng.uniform(0.05, 0.2)
    outline = polar(1 + swing * np.cos(lobes * angles), angles)
    window = polar(rng.uniform(0.45, 0.65) + 0.4 * swing * np.cos(lobes * angles + rng.uniform(0, 3)), angles)
    hole = CrossSection.circle(rng.uniform(0.05, 0.09), 16).translate((0.85 + swing * 0.6, 0))
    sheet = outline - window
    for turn in range(lobes):
        sheet = sheet - hole.rotate(360 * turn / lobes)
    return sheet.extrude(rng.uniform(0.03, 0.12))


def spring_clip(rng: Generator) -> Manifold:
    turns = np.linspace(0, rng.uniform(1.1, 1.6) * math.pi, 26)
    radius = rng.uniform(0.25, 0.4) * (1 + rng.uniform(-0.05, 0.15) * turns)
    curl = np.stack([radius * np.cos(turns), radius * np.sin(turns)], 1)
    out = curl[-1] + rng.uniform(0.3, 0.6) * np.array([1, rng.uniform(-0.4, 0.4)])
    line = rounded(np.concatenate([[curl[0] - (0, 0.5)], curl, [out]]), 2)
    return strip(line, rng.uniform(0.02, 0.05)).extrude(rng.uniform(0.15, 0.6)).rotate((90, 0, 0))


BUILDERS = (
    hat_channel, z_bracket, perforated_plate, drawn_tray, corrugated_sheet, clamp_strap, slotted_angle, gasket,
    spring_clip,
)  # fmt: skip
