"""Sixteen procedural industrial parts as watertight solids, by constructive solid geometry.

A builder draws the proportions of one part from a random generator and returns a solid that rests on the plane z = 0 in
the pose in which such a part lies on a table. Units are free: :func:`build` rescales every part to a longest side of 1,
so that the size of a part says nothing about its category.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
from numpy.random import Generator

from data_prep.synthetic.engines import CrossSection, Manifold, Mesh, OpType

__all__ = ["CATEGORIES", "build", "rest", "triangles"]

SEGMENTS = 44  # facets of a large circle: enough that a cylinder looks round at 400 pixels


def build(category: str, rng: Generator) -> Manifold:
    """A random part of a category: longest side 1, centred over the origin, resting on z = 0."""
    return rest(CATEGORIES[category](rng))


def rest(part: Manifold) -> Manifold:
    """A solid moved and scaled: longest side 1, centred over the origin, resting on z = 0."""
    low_x, low_y, low_z, high_x, high_y, high_z = part.bounding_box()
    scale = 1 / max(high_x - low_x, high_y - low_y, high_z - low_z)
    part = part.translate((-(low_x + high_x) / 2, -(low_y + high_y) / 2, -low_z))
    return part.scale((scale, scale, scale))


def triangles(part: Manifold) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (vertices, 3) float32 and triangle corners (triangles, 3) int32 of a solid."""
    mesh = part.to_mesh()
    return np.ascontiguousarray(mesh.vert_properties[:, :3]), mesh.tri_verts.astype(np.int32)


def box(length: float, width: float, height: float, at: tuple[float, float, float] = (0, 0, 0)) -> Manifold:
    """A box centred in x and y whose bottom centre is ``at``."""
    return Manifold.cube((length, width, height)).translate((at[0] - length / 2, at[1] - width / 2, at[2]))


def cylinder(
    radius: float, height: float, at: tuple[float, float, float] = (0, 0, 0), top: float = -1, segments: int = 28
) -> Manifold:
    """An upright cylinder, or a cone of top radius ``top``, whose bottom centre is ``at``."""
    return Manifold.cylinder(height, radius, top, segments).translate(at)


def union(solids: Iterable[Manifold]) -> Manifold:
    return Manifold.batch_boolean(list(solids), OpType.Add)


def difference(solid: Manifold, tools: Iterable[Manifold]) -> Manifold:
    """``solid`` without any of the ``tools``."""
    return Manifold.batch_boolean([solid, *tools], OpType.Subtract)


def around(solid: Manifold, count: int, start: float = 0.0) -> list[Manifold]:
    """``count`` copies of a solid turned about the z axis, the first by ``start`` degrees."""
    return [solid.rotate((0, 0, start + 360 * turn / count)) for turn in range(count)]


def polar(radii: np.ndarray, angles: np.ndarray) -> CrossSection:
    """The polygon of radii over increasing angles, radians."""
    return CrossSection([np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1)])


def turned(*outlines: list[tuple[float, float]], segments: int = SEGMENTS) -> Manifold:
    """The solid of revolution of counter-clockwise polygons of (radius, height) about the z axis.

    Bores and steps drawn into a profile cost nothing; as boolean operations they would take milliseconds each.
    """
    return CrossSection(outlines).revolve(segments)


def lofted(rings: np.ndarray, ends: np.ndarray) -> Manifold:
    """The closed surface through ``rings`` (steps, facets, 3), closed by fans to the two points ``ends`` (2, 3).

    Seen along the path from ring to ring, the points of a ring run clockwise.
    """
    steps, facets, _ = rings.shape
    vertices = np.concatenate([rings.reshape(-1, 3), ends])
    step, place = np.meshgrid(np.arange(steps - 1), np.arange(facets), indexing="ij")
    beside = (place + 1) % facets
    near, near_beside, far, far_beside = (
        (step + ahead) * facets + index for ahead in (0, 1) for index in (place, beside)
    )
    sides = [np.stack([near, near_beside, far], -1), np.stack([near_beside, far_beside, far], -1)]
    first, last = np.arange(facets), np.arange(facets) + (steps - 1) * facets
    start = np.full(facets, len(vertices) - 2)
    caps = [np.stack([start, np.roll(first, -1), first], -1), np.stack([start + 1, last, np.roll(last, -1)], -1)]
    faces = np.concatenate([*(side.reshape(-1, 3) for side in sides), *caps])
    return Manifold(Mesh(vertices.astype(np.float32), faces.astype(np.uint32)))


def swept(path: np.ndarray, across: np.ndarray, above: np.ndarray, radius: float, facets: int) -> Manifold:
    """A round bar along ``path`` (steps, 3), its section spanned by ``across`` and ``above``, both (steps, 3) unit.

    ``across`` x ``above`` points along the path.
    """
    section = np.arange(facets) * (2 * math.pi / facets)
    offset = np.cos(section)[None, :, None] * across[:, None] + np.sin(section)[None, :, None] * above[:, None]
    return lofted(path[:, None] + radius * offset, path[[0, -1]])


def angle_bracket(rng: Generator) -> Manifold:
    base, wall, width = rng.uniform(0.7, 1.1), rng.uniform(0.5, 0.9), rng.uniform(0.5, 1.0)
    thickness = rng.uniform(0.07, 0.13)
    part = box(base, width, thickness, (base / 2, 0, 0)) + box(thickness, width, wall, (thickness / 2, 0, 0))
    radius = rng.uniform(0.07, 0.1)
    count = int(rng.integers(1, 3))
    sides = [0.0] if count == 1 else [-width / 4, width / 4]
    upright = cylinder(radius, 4 * thickness, (base * 0.72, 0, -thickness))
    across = Manifold.cylinder(4 * thickness, radius, -1, 28).rotate((0, 90, 0)).translate((-thickness, 0, wall * 0.7))
    holes = [hole.translate((0, side, 0)) for side in sides for hole in (upright, across)]
    reach = rng.uniform(0.3, 0.45)
    gusset = CrossSection([[(0, 0), (reach, 0), (0, reach)]]).extrude(thickness).rotate((90, 0, 0))
    edges = [0.5 * thickness] if count == 2 else [width / 2, -width / 2 + thickness]
    return difference(part, holes) + union(gusset.translate((0.9 * thickness, y, 0.9 * thickness)) for y in edges)


def spur_gear(rng: Generator) -> Manifold:
    teeth = int(rng.integers(11, 25))
    root = 1 - rng.uniform(3.6, 4.6) / teeth
    # Over one pitch: foot, flank, head, flank.
    pitch = np.array([0.0, 0.22, 0.36, 0.64, 0.78]) + rng.uniform(0, 1)
    angles = (2 * math.pi / teeth) * (np.arange(teeth)[:, None] + pitch[None]).ravel()
    height, bore, hub = rng.uniform(0.18, 0.45), rng.uniform(0.14, 0.22), rng.uniform(0.3, 0.38)
    shaft = CrossSection.circle(bore, 28) + CrossSection.square((bore * 0.6, bore * 0.8), True).translate((bore, 0))
    part = (polar(np.tile([root, root, 1, 1, root], teeth), angles) - shaft).extrude(height)
    if rng.random() < 0.5:
        floor = height * 0.6
        return part - turned([(hub, floor), (root * 0.84, floor), (root * 0.84, 1), (hub, 1)])
    return part + (CrossSection.circle(hub, 28) - shaft).extrude(height + rng.uniform(0.1, 0.3))


def hex_nut(rng: Generator) -> Manifold:
    height, bore, chamfer = rng.uniform(0.6, 1.1), rng.uniform(0.48, 0.6), rng.uniform(0.1, 0.16)
    outside = [(1 - chamfer, 0), (1.01, chamfer * 0.8), (1.01, height - chamfer * 0.8), (1 - chamfer, height)]
    threads = 3
    top = height - 0.1
    inside = [(bore + 0.1, height)]
    for turn in range(threads):
        inside += [(bore, top * (1 - turn / threads)), (bore + 0.06, top * (1 - (turn + 0.5) / threads))]
    part = CrossSection.circle(1, 6).extrude(height) ^ turned([*outside, *inside, (bore, 0)])
    if rng.random() < 0.5:
        rim = rng.uniform(1.15, 1.3)
        part = part + turned([(bore + 0.07, 0), (rim, 0), (1.0, 0.14), (bore + 0.07, 0.14)])
    return part


def pipe_flange(rng: Generator) -> Manifold:
    plate, neck, rise = rng.uniform(0.12, 0.2), rng.uniform(0.42, 0.52), rng.uniform(0.5, 1.0)
    bore, top = neck * rng.uniform(0.7, 0.8), plate + rise
    pipe = turned(
        [(bore, 0), (neck * 1.25, 0), (neck * 1.25, plate), (neck, plate + rise * 0.35), (neck, top), (bore, top)]
    )
    disc = CrossSection.circle(1, SEGMENTS) - CrossSection.circle(neck * 1.1, SEGMENTS)
    bolts, bolt = int(rng.integers(4, 9)), CrossSection.circle(rng.uniform(0.08, 0.11), 16).translate((0.79, 0))
    for turn in range(bolts):
        disc = disc - bolt.rotate(360 * turn / bolts)
    return pipe + disc.extrude(plate)


def t_slot_profile(rng: Generator) -> Manifold:
    opening, inside, lip = rng.uniform(0.18, 0.26), rng.uniform(0.46, 0.58), rng.uniform(0.09, 0.13)
    depth = rng.uniform(0.26, 0.32)
    slot = CrossSection.square((opening, 1)).translate((-opening / 2, 0.5 - lip - 0.01))
    room = [
        (-inside / 2, 0.5 - lip),
        (-opening * 0.5, 0.5 - depth),
        (opening * 0.5, 0.5 - depth),
        (inside / 2, 0.5 - lip),
    ]
    slot = slot + CrossSection([room])
    outline = CrossSection.square((1, 1), True)
    for quarter in range(4):
        outline = outline - slot.rotate(90 * quarter)
    outline = outline - CrossSection.circle(rng.uniform(0.08, 0.11), 20)
    return outline.extrude(rng.uniform(1.3, 2.4)).rotate((90, 0, 0))


def heat_sink(rng: Generator) -> Manifold:
    length, base, rise = rng.uniform(0.75, 1.3), rng.uniform(0.1, 0.16), rng.uniform(0.3, 0.6)
    fins = int(rng.integers(5, 11))
    thickness = rng.uniform(0.3, 0.42) / fins
    fin = box(thickness, length, rise, (0, 0, base * 0.99))
    places = np.linspace(-0.5 + thickness / 2, 0.5 - thickness / 2, fins)
    part = union([box(1, length, base), *(fin.translate((x, 0, 0)) for x in places)])
    if rng.random() < 0.4:
        part = part - box(3, length * rng.uniform(0.1, 0.16), 3, (0, 0, base))
    return part


def ball_bearing(rng: Generator) -> Manifold:
    bore, inner, outer = rng.uniform(0.3, 0.42), rng.uniform(0.54, 0.6), rng.uniform(0.8, 0.86)
    height = rng.uniform(0.3, 0.5)
    track, radius = (inner + outer) / 2, (outer - inner) * 0.49
    rings = turned(
        [(bore, 0), (inner, 0), (inner, height), (bore, height)], [(outer, 0), (1, 0), (1, height), (outer, height)]
    )
    count = int(math.pi * track / radius * rng.uniform(0.6, 0.85))
    # Balls stand higher than the rings are wide: they are seen. They touch nothing, so no boolean is needed.
    ball = Manifold.sphere(radius, 20).translate((track, 0, height - radius * rng.uniform(0.8, 1.1)))
    return Manifold.compose([rings, *around(ball, count)])


def handwheel(rng: Generator) -> Manifold:
    wire, hub, rise = rng.uniform(0.09, 0.14), rng.uniform(0.2, 0.28), rng.uniform(0.2, 0.45)
    bore, top = hub * 0.5, wire + rise
    circle = [(1 + wire * math.cos(turn), wire + wire * math.sin(turn)) for turn in np.arange(12) * (math.pi / 6)]
    wheel = turned(circle, [(bore, 0), (hub, 0), (hub, top), (bore, top)], segments=48)
    spokes = int(rng.integers(3, 6))
    reach = 1 - bore * 1.2
    spoke = box(reach, wire * rng.uniform(0.9, 1.4), wire * 1.1, (bore * 1.2 + reach / 2, 0, wire * 0.45))
    parts = [wheel, *around(spoke, spokes)]
    if rng.random() < 0.6:
        parts.append(cylinder(wire * 0.7, rng.uniform(0.4, 0.6), (1, 0, wire), wire * 0.95, 16))
    return union(parts)


def circlip(rng: Generator) -> Manifold:
    width, height, gap = rng.uniform(0.16, 0.26), rng.uniform(0.12, 0.2), rng.uniform(0.28, 0.5)
    # The inner circle is off centre: the clip is thickest opposite its opening.
    ring = CrossSection.circle(1, SEGMENTS) - CrossSection.circle(1 - width, SEGMENTS).translate((width * 0.35, 0))
    ring = ring - CrossSection([[(0, 0), (3, -3 * math.tan(gap)), (3, 3 * math.tan(gap))]])
    ear = rng.uniform(0.17, 0.22)
    for side in (-1, 1):
        place = (0.9 * math.cos(gap + 0.12), side * 0.9 * math.sin(gap + 0.12))
        ring = ring + CrossSection.circle(ear, 24).translate(place)
        ring = ring - CrossSection.circle(ear * 0.45, 16).translate(place)
    return ring.extrude(height)


def connector_housing(rng: Generator) -> Manifold:
    columns, rows = int(rng.integers(3, 7)), int(rng.integers(1, 4))
    height, cell = rng.uniform(0.9, 2.0), rng.uniform(0.62, 0.74)
    length, width = columns + 0.35, rows + 0.35
    part = box(length, width, height) + box(length + 0.3, width + 0.3, height * 0.25)
    latch = box(length * rng.uniform(0.25, 0.4), 0.45, height * 0.3, (0, width / 2 + 0.2, height * 0.6))
    ribs = [box(0.22, 0.22, height, (side * (length / 2), -width / 4, 0)) for side in (-1, 1)]
    cavity = box(cell, cell, height, (0, 0, height * 0.3))
    grid = [(i - (columns - 1) / 2, j - (rows - 1) / 2) for i in range(columns) for j in range(rows)]
    return difference(union([part, latch, *ribs]), (cavity.translate((x, y, 0)) for x, y in grid))


def pipe_elbow(rng: Generator) -> Manifold:
    bend, pipe, angle = rng.uniform(0.75, 1.1), rng.uniform(0.28, 0.38), math.radians(rng.uniform(70, 115))
    collar, thick, straight = pipe * rng.uniform(1.35, 1.6), rng.uniform(0.12, 0.2), rng.uniform(0.25, 0.5)
    wall = pipe * rng.uniform(0.68, 0.8)

    def along(turns: np.ndarray, forward: np.ndarray, radius: float, facets: int) -> Manifold:
        """A bar about the bend at ``turns`` radians, moved ``forward`` along its own direction."""
        outward = np.stack([np.cos(turns), np.sin(turns), 0 * turns], 1)
        direction = np.stack([-np.sin(turns), np.cos(turns), 0 * turns], 1)
        above = np.tile([0.0, 0.0, -1.0], (len(turns), 1))
        return swept(bend * outward + forward[:, None] * direction, outward, above, radius, facets)

    turns, forward = np.linspace(0, angle, 12), np.zeros(12)
    forward[[0, -1]] = -straight, straight
    first, last = np.zeros(2), np.full(2, angle)
    collars = [
        along(first, np.array([-straight, thick - straight]), collar, 28),
        along(last, np.array([straight - thick, straight]), collar, 28),
    ]
    # Only the mouths are seen: the pipe is hollow as far as it is straight.
    bores = [
        along(first, np.array([-straight - 0.1, 0]), wall, 20),
        along(last, np.array([0, straight + 0.1]), wall, 20),
    ]
    return difference(union([along(turns, forward, pipe, 22), *collars]), bores)


def coil_spring(rng: Generator) -> Manifold:
    turns, wire, pitch = rng.uniform(3.6, 6.4), rng.uniform(0.11, 0.18), rng.uniform(0.42, 0.62)
    angle = np.linspace(0, 2 * math.pi * turns, int(turns * 22))
    radial = np.stack([np.cos(angle), np.zeros(len(angle)), np.sin(angle)], 1)
    axial = np.tile([0.0, 1.0, 0.0], (len(angle), 1))
    return swept(radial + axial * (pitch / (2 * math.pi) * angle)[:, None], radial, axial, wire, 9)


def star_knob(rng: Generator) -> Manifold:
    lobes, depth, height = int(rng.integers(3, 8)), rng.uniform(0.1, 0.16), rng.uniform(0.45, 0.75)
    stud, dome, flare = rng.uniform(0.2, 0.28), rng.uniform(0.2, 0.4), rng.uniform(0.72, 0.86)
    angles = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    bulge = np.cos(lobes * angles)
    # (radius, height, depth of the lobes) of each ring: up the side, over the dome, up the stud, down its bore.
    inner = np.linspace(flare, stud, 6)
    profile = [(1, 0, depth), (flare, height - dome * 0.5, depth)]
    profile += [(radius, height - dome * radius**2, depth * radius**2) for radius in inner * 0.97]
    profile += [(stud * 0.97, height + 0.12, 0), (0.12, height + 0.12, 0), (0.12, height * 0.6, 0)]
    radius, level, wave = np.array(profile).T[..., None]
    spread = radius * (1 - wave) + radius * wave * bulge
    # Counter-clockwise from above is clockwise along the path once it runs downwards: turn the rings round.
    rings = np.stack([spread * np.cos(-angles), spread * np.sin(-angles), level + 0 * angles], -1)
    return lofted(rings[::-1], np.array([(0, 0, height * 0.6), (0, 0, 0)]))


def butt_hinge(rng: Generator) -> Manifold:
    length, leaf, thickness = rng.uniform(1.1, 1.8), rng.uniform(0.55, 0.9), rng.uniform(0.05, 0.08)
    radius, knuckles = rng.uniform(0.11, 0.16), int(rng.choice([3, 5]))
    stagger, holes = leaf * rng.uniform(0, 0.15), int(rng.integers(2, 4))
    outline, bore = CrossSection.square((leaf, length)).translate((0, -length / 2)), rng.uniform(0.07, 0.1)
    for place, y in enumerate(np.linspace(-0.36, 0.36, holes) * length):
        outline = outline - CrossSection.circle(bore, 20).translate((leaf * 0.6 + stagger * (-1) ** place, y))
    plate = outline.extrude(thickness)
    other = plate.rotate((0, 0, 180)).rotate((0, rng.uniform(0, 40), 0))
    share, pin = length / knuckles, radius * 0.6
    barrel = [(0.0, -0.05), (pin, -0.05)]
    for start in share * np.arange(knuckles):
        low, high = start + 0.035 * share, start + 0.965 * share
        barrel += [(pin, low), (radius, low), (radius, high), (pin, high)]
    barrel += [(pin, length + 0.05), (0.0, length + 0.05)]
    return union([plate, other, turned(barrel, segments=20).rotate((90, 0, 0)).translate((0, length / 2, pin))])


def impeller(rng: Generator) -> Manifold:
    blades, height, sweep = int(rng.integers(5, 10)), rng.uniform(0.25, 0.45), rng.uniform(0.6, 1.3)
    hub, thickness, plate = rng.uniform(0.2, 0.28), rng.uniform(0.06, 0.09), rng.uniform(0.08, 0.12)
    radius = np.linspace(hub * 0.8, rng.uniform(0.9, 0.98), 7)
    angle = sweep * (radius - radius.mean())
    line = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1)
    along = np.gradient(line, axis=0)
    side = np.stack([-along[:, 1], along[:, 0]], 1) * (thickness / 2 / np.linalg.norm(along, axis=1))[:, None]
    blade = CrossSection([np.concatenate([line - side, (line + side)[::-1]])])
    fan = CrossSection.batch_boolean([blade.rotate(360 * turn / blades) for turn in range(blades)], OpType.Add)

    def lower_outside(points: np.ndarray) -> np.ndarray:
        points[:, 2] *= 1 - 0.45 * np.hypot(points[:, 0], points[:, 1])
        return points

    fan = fan.extrude(height).warp_batch(lower_outside).translate((0, 0, plate * 0.6))
    bore, top = hub * 0.45, plate + height * 1.05
    wheel = turned([(bore, 0), (1, 0), (1, plate), (hub, plate), (hub * 0.8, top), (bore, top)])
    return wheel + fan


def stepped_shaft(rng: Generator) -> Manifold:
    steps = int(rng.integers(4, 7))
    lengths = rng.uniform(0.5, 1.3, steps)
    radii = rng.uniform(0.28, 0.55, steps)
    radii[0] = radii[-1] = rng.uniform(0.2, 0.3)
    radii[1 + int(rng.integers(steps - 2))] = 0.75
    ends = np.concatenate([[0], np.cumsum(lengths)])
    outline = [(0.0, 0.0)]
    for radius, start, end in zip(radii, ends, ends[1:], strict=False):
        outline += [(radius - 0.04, start), (radius, start + 0.04), (radius, end - 0.04), (radius - 0.04, end)]
    shaft = CrossSection([[*outline, (0.0, ends[-1])]]).revolve(40).rotate((90, 0, 0))
    wide = int(np.argmax(lengths))
    key = box(radii[wide] * 0.5, lengths[wide] * 0.7, 1, (0, -(ends[wide] + ends[wide + 1]) / 2, radii[wide] * 0.7))
    return (shaft - key).rotate((0, rng.uniform(-60, 60), 0))


CATEGORIES: dict[str, Callable[[Generator], Manifold]] = {
    builder.__name__: builder
    for builder in (
        angle_bracket,
        spur_gear,
        hex_nut,
        pipe_flange,
        t_slot_profile,
        heat_sink,
        ball_bearing,
        handwheel,
        circlip,
        connector_housing,
        pipe_elbow,
        coil_spring,
        star_knob,
        butt_hinge,
        impeller,
        stepped_shaft,
    )
}
