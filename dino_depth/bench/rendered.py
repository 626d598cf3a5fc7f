"""Objects rendered for the bench: views from an orbit of calibrated cameras, and parts with a dent, a bump or a break.

Depth is what a structured-light sensor measures. Every second object stands on a floor, which is not part of it; the
others hang before nothing, as an object does from which the background was taken away.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from scipy.spatial.transform import Rotation

from data_prep.synthetic import render
from data_prep.synthetic.engines import Error, Manifold, Mesh
from data_prep.synthetic.multiview import DISTANCE, Pinhole, Solid, fit
from data_prep.synthetic.nuisances import PRESETS, draw_material
from data_prep.synthetic.parts import triangles
from data_prep.synthetic.plan import generator
from data_prep.synthetic.render import Render
from data_prep.synthetic.specimen import Instance, Specimen, damaged_instance, sound_instance
from dino_depth.anomaly.geometry import Camera
from dino_depth.bench.data import Inspection, View
from dino_depth.depth import DepthMap

__all__ = ["Build", "inspections", "orbits"]

Build = Callable[[Generator], tuple[np.ndarray, np.ndarray]]  # vertices (n, 3) and triangles (m, 3) of an object

PIXELS, FOCAL = 224, 1.1  # side of the images; focal length in sides
FILL = 0.85
STEP = (22.0, 38.0)  # degrees of azimuth between one view and the next
ELEVATION = (20.0, 55.0)
ZOOM = (0.5, 1.4)  # of the whole world: near small objects and far large ones
FLOOR = 1.2  # half side, in longest sides of the object
DEFECTS = ("dent", "bump", "missing")
SPACING = 0.004  # metres: the longest edge within a dent


def _square() -> tuple[Pinhole, render.Camera]:
    middle = (PIXELS - 1) / 2
    focal = FOCAL * PIXELS
    return Pinhole(PIXELS, PIXELS, (focal, focal), (middle, middle)), render.Camera(PIXELS, focal, middle, middle)


def _poses(rng: Generator, views: int) -> np.ndarray:
    """(views, 4, 4) camera to world, all looking at the origin, some way round it."""
    azimuth, poses = rng.uniform(0, 2 * np.pi), []
    for _ in range(views):
        elevation = np.radians(rng.uniform(*ELEVATION))
        outward = np.array(
            [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
        )
        right = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(-outward, right), -outward, DISTANCE * outward], 1)
        pose[:3, :3] = pose[:3, :3] @ Rotation.from_euler("z", rng.normal(0, 8), degrees=True).as_matrix()
        poses.append(pose)
        azimuth += np.radians(rng.uniform(*STEP))
    return np.stack(poses)


def _specimen(build: Build, rng: Generator, views: int) -> Specimen:
    vertices, faces = build(rng)
    low, high = vertices.min(0), vertices.max(0)
    vertices = ((vertices - (low + high) / 2) / (high - low).max()).astype(np.float32)
    solid = Manifold(Mesh(vertices, faces.astype(np.uint32)))
    if solid.status() != Error.NoError or solid.volume() <= 0:
        solid = None
    else:
        vertices, faces = triangles(solid)
    vertices = vertices.astype(np.float64)
    camera, poses = _square()[0], _poses(rng, views)
    scale = fit(vertices, camera, poses, FILL)
    scene = Solid(scale * vertices, faces)
    return Specimen(vertices, faces, solid, scale, scene, draw_material(rng), camera, poses)


def _measured(
    seen: Render, pose: np.ndarray, zoom: float, rng: Generator, scene: str, name: str, category: str,
    defect: np.ndarray | None = None,
) -> View:  # fmt: skip
    """The view of a structured-light sensor, the world enlarged by ``zoom``."""
    _, square = _square()
    scaled = Render(seen.depth * np.float32(zoom), seen.normal, seen.part)
    depth = render.sense(scaled, square, scaled.depth > 0, rng)
    if not (depth > 0).any():
        depth = scaled.depth
    pose = pose.copy()
    pose[:3, 3] *= zoom
    camera = Camera(PIXELS, PIXELS, _square()[0].matrix(), pose)
    return View(scene, name, DepthMap.from_values(depth), camera, category, seen.part, defect)


def orbits(category: str, build: Build, objects: int, views: int, key: tuple) -> list[View]:
    """Views of ``objects`` objects of a category, each object a scene of its own."""
    found = []
    for number in range(objects):
        rng = generator(*key, category, number)
        specimen = _specimen(build, rng, views)
        zoom, scene = rng.uniform(*ZOOM), f"{category}-{number}"
        vertices, faces, first = specimen.scale * specimen.vertices, specimen.faces, len(specimen.faces)
        if number % 2 == 0:
            side, low = FLOOR * specimen.scale, vertices[:, 2].min()
            corners = np.array([(-side, -side, low), (side, -side, low), (side, side, low), (-side, side, low)])
            faces = np.concatenate([faces, len(vertices) + np.array([(0, 1, 2), (0, 2, 3)], np.int32)])
            vertices = np.concatenate([vertices, corners])
        solid = Solid(vertices, faces)
        for view, pose in enumerate(specimen.poses):
            seen, triangle = solid.render(specimen.camera, pose)
            seen = Render(seen.depth, seen.normal, (triangle >= 0) & (triangle < first))
            found.append(_measured(seen, pose, zoom, rng, scene, str(view), category))
    return found


def inspections(category: str, build: Build, sound: int, tested: int, key: tuple) -> Inspection:
    """One object: ``sound`` views of sound specimens to compare with, and ``tested`` sound and as many defective ones.

    Specimens are moved a little, as on a belt; defects are those of ``synth sim3d``, of the difficulty ``mild``.
    """
    rng = generator(*key, category, "inspection")
    specimen = _specimen(build, rng, sound)
    zoom, difficulty = rng.uniform(*ZOOM), PRESETS["mild"]

    def view(instance: Instance, number: int, name: str, defective: bool) -> View:
        seen = instance.view(number)
        defect = seen.changed if defective else None
        return _measured(seen.seen, specimen.poses[number], zoom, rng, category, name, category, defect)

    bank = [view(sound_instance(specimen, difficulty, rng), number, f"bank-{number}", False) for number in range(sound)]
    checked = []
    for number in range(tested):
        place = number % sound
        checked.append(view(sound_instance(specimen, difficulty, rng), place, f"good-{number}", False))
        kind = DEFECTS[number % len(DEFECTS)]
        kind = "bump" if kind == "missing" and specimen.solid is None else kind
        broken = damaged_instance(specimen, kind, difficulty, SPACING, rng)
        shown = max(range(sound), key=lambda place: int(broken.view(place).changed.sum()))
        checked.append(view(broken, shown, f"{kind}-{number}", True))
    return Inspection(category, tuple(bank), tuple(checked))
