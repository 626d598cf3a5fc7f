"""Objects for a rig of cameras: procedural or read from a mesh file, sound or with one defect of known extent.

An object's own coordinates have its longest side 1 and the middle of its bounding box at the origin.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.random import Generator
from scipy.ndimage import binary_erosion

from data_prep.synthetic.engines import Error, Manifold, Mesh
from data_prep.synthetic.meshes import read_mesh
from data_prep.synthetic.multiview import Pinhole, Solid, fit, jitter, pinhole, ring
from data_prep.synthetic.nuisances import Difficulty, Material, draw_material
from data_prep.synthetic.parts import build, triangles
from data_prep.synthetic.plan import generator
from data_prep.synthetic.render import Render, dot
from data_prep.synthetic.surface_defects import Damaged, changed_points, damage_surface
from dino_depth.errors import DataError

__all__ = ["Instance", "Specimen", "View", "damaged_instance", "sound_instance", "specimen"]

FILL = 0.9  # of the way from the principal point to the nearer edge of an image
ATTEMPTS = 40


@dataclass(frozen=True)
class Specimen:
    """A sound object before its rig.

    Attributes:
        vertices: (vertices, 3) float64, its own coordinates.
        faces: (triangles, 3) int32.
        solid: the same as a solid, or None where the mesh is not watertight.
        scale: its longest side, metres, so that it fills the images.
        scene: the mesh, metres.
        camera: intrinsics of all views.
        poses: (views, 4, 4) camera to world.
    """

    vertices: np.ndarray
    faces: np.ndarray
    solid: Manifold | None
    scale: float
    scene: Solid
    material: Material
    camera: Pinhole
    poses: np.ndarray


@lru_cache(maxsize=2)
def specimen(key: tuple, category: str, mesh: str | None, height: int, width: int, views: int, rings: int) -> Specimen:
    """The object of a category; it is kept, because all instances of the category share it.

    Args:
        key: what its shape and material depend on besides the category.
        mesh: a mesh file in place of a procedural part.
    """
    rng = generator(*key, category)
    vertices, faces = read_mesh(mesh) if mesh else triangles(build(category, rng))
    low, high = vertices.min(0), vertices.max(0)
    vertices = ((vertices - (low + high) / 2) / (high - low).max()).astype(np.float32)
    solid = Manifold(Mesh(vertices, faces.astype(np.uint32)))
    if solid.status() != Error.NoError or solid.volume() <= 0:
        solid = None
    else:
        vertices, faces = triangles(solid)
    vertices, camera, poses = vertices.astype(np.float64), pinhole(height, width), ring(views, rings)
    scale = fit(vertices, camera, poses, FILL)
    return Specimen(vertices, faces, solid, scale, Solid(scale * vertices, faces), draw_material(rng), camera, poses)


@dataclass(frozen=True)
class View:
    """One noise-free view of an instance; all of (height, width).

    Attributes:
        seen: what a perfect sensor sees.
        albedo: float32, 0 where there is no object.
        changed: bool, pixels whose surface a defect moved, made or painted.
    """

    seen: Render
    albedo: np.ndarray
    changed: np.ndarray


@dataclass(frozen=True)
class Instance:
    """A specimen somewhere near the middle of the rig, sound or damaged.

    Attributes:
        placement: (4, 4), world from object, both metres.
    """

    specimen: Specimen
    placement: np.ndarray
    scene: Solid
    damaged: Damaged | None = None

    def view(self, number: int) -> View:
        specimen = self.specimen
        pose = np.linalg.inv(self.placement) @ specimen.poses[number]
        seen, triangle = self.scene.render(specimen.camera, pose)
        turn, part = pose[:3, :3].astype(np.float32), seen.part
        points = specimen.camera.rays()[part] * seen.depth[part][:, None] @ turn.T + pose[:3, 3].astype(np.float32)
        points /= np.float32(specimen.scale)
        albedo, changed = np.zeros(part.shape, np.float32), np.zeros(part.shape, bool)
        albedo[part] = specimen.material.albedos(points)
        if self.damaged:
            changed[part] = self.damaged.changed[triangle[part]]
        if self.damaged and (paint := self.damaged.paint):
            painted = paint.covers(points, seen.normal[part] @ turn.T)
            changed[part] |= painted
            albedo[part] *= np.where(painted, np.float32(paint.factor), np.float32(1))
        return View(seen, np.minimum(albedo, 1), changed)

    def voxels(self, origin: np.ndarray, voxel: float) -> np.ndarray:
        """The sorted voxels (voxels, 3) int32 through which the surface passes that a defect changed.

        Args:
            origin: (3,) corner of the voxel (0, 0, 0), metres, world coordinates.
            voxel: edge of a voxel, metres.
        """
        if self.damaged is None:
            return np.zeros((0, 3), np.int32)
        points = changed_points(self.damaged, voxel / 2 / self.specimen.scale) * self.specimen.scale
        points = points @ self.placement[:3, :3].T + self.placement[:3, 3]
        return np.unique(np.floor((points - origin) / voxel).astype(np.int32), axis=0)


def sound_instance(specimen: Specimen, difficulty: Difficulty, rng: Generator) -> Instance:
    """The sound object, moved a little."""
    placement = jitter(rng, difficulty.rotation, difficulty.translation * specimen.scale)
    return Instance(specimen, placement, specimen.scene)


def damaged_instance(specimen: Specimen, kind: str, difficulty: Difficulty, spacing: float, rng: Generator) -> Instance:
    """The object with a defect that at least one view shows, moved a little.

    Args:
        kind: see :func:`~data_prep.synthetic.surface_defects.damage_surface`.
        spacing: the longest edge of a bent surface, metres.

    Raises:
        DataError: no place was found where a view shows the defect.
    """
    sound = sound_instance(specimen, difficulty, rng)
    size = difficulty.amplitude, difficulty.radius, difficulty.albedo
    height, width = specimen.camera.height, specimen.camera.width
    for _ in range(ATTEMPTS):
        number = int(rng.integers(len(specimen.poses)))
        place = _place(specimen, number, rng)
        damaged = damage_surface(
            kind, specimen.vertices, specimen.faces, specimen.solid, place, size, spacing / specimen.scale, rng
        )
        if not len(damaged.faces):
            continue
        # Paint moves nothing: the search tree of the sound object serves.
        same = damaged.faces is specimen.faces
        scene = specimen.scene if same else Solid(specimen.scale * damaged.vertices, damaged.faces)
        instance = Instance(specimen, sound.placement, scene, damaged)
        if instance.view(number).changed.sum() >= max(8, 0.0008 * height * width):
            return instance
    raise DataError(f"no visible {kind} found in {ATTEMPTS} draws at {width} x {height} pixels")


def _place(specimen: Specimen, number: int, rng: Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random surface point that a view shows well, and its outward normal, (3,) each, the object's coordinates."""
    camera, pose = specimen.camera, specimen.poses[number]
    seen, _ = specimen.scene.render(camera, pose)
    facing = seen.part & (-dot(camera.rays(), seen.normal) > 0.5 * camera.ray_lengths())
    inside = binary_erosion(facing, iterations=max(1, camera.width // 40))
    rows, columns = np.nonzero(next(mask for mask in (inside, facing, seen.part) if mask.any()))
    choice = rng.integers(len(rows))
    row, column = rows[choice], columns[choice]
    point = camera.rays()[row, column].astype(np.float64) * seen.depth[row, column]
    normal = pose[:3, :3] @ seen.normal[row, column].astype(np.float64)
    return (pose[:3, :3] @ point + pose[:3, 3]) / specimen.scale, normal / np.linalg.norm(normal)
