"""Nominal views of a part from its CAD file: what a rig's cameras would record of a perfect part.

Rays are cast at the triangles along the rig's own rays, lens distortion included; depth is noise-free, then measured by
the sensor of ``synth sim3d``. Images are plain: one grey material, a lamp beside each camera, a dark background.

The file's coordinates are those of the rig's world unless ``part_to_world`` says where the part stands in it. Needs the
extra ``render``, and ``step`` for STEP files.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_prep.synthetic.plan import generator
from dino_depth.anomaly.dataset import Sample, View
from dino_depth.anomaly.geometry import Camera, rays, resize_camera
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError
from dino_depth.inspection.rig import Rig

if TYPE_CHECKING:
    from data_prep.synthetic.multiview import Solid
    from data_prep.synthetic.nuisances import Disturbance
    from data_prep.synthetic.render import Render

__all__ = ["CadConfig", "read_part", "render_views"]

METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001, "inch": 0.0254}
IN_METRES = (".glb", ".gltf", ".step", ".stp")  # by the format, or by its conversion; other formats have no unit
ALBEDO, GLOSS = 0.6, 0.2
COARSE = 64  # longest side of the image in which a part is looked for, pixels
LEAST = 0.001  # share of it that a part has to cover
RIGID = 1e-3  # as of a camera's pose


@dataclass
class CadConfig:
    """What neither a CAD file nor a rig says.

    Attributes:
        unit: of the file's numbers; auto: metres for GLB, glTF and STEP, millimetres for STL, PLY, OBJ and OFF.
        part_to_world: where the part stands, 16 numbers of a 4 x 4 matrix row by row, metres; empty: the file's
            coordinates are those of the rig's world.
        instances: recordings of the part, which differ in their noise only.
        depth_noise: standard deviation of a depth, millimetres.
        dropout: share of the depth that is lost where the surface is seen at a grazing angle or mirrors the lamp.
        image_noise: standard deviation of a pixel, white being 1.
        seed: of the noise.
    """

    unit: Literal["auto", "m", "cm", "mm", "inch"] = "auto"
    part_to_world: list[float] = field(default_factory=list)
    instances: int = 1
    depth_noise: float = 0.1
    dropout: float = 0.3
    image_noise: float = 0.015
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Part:
    """Triangles, and where they stand.

    Attributes:
        name: stem of the file.
        own: (vertices, 3) float64, the file's numbers.
        faces: (triangles, 3) int32.
        unit: of the file's numbers.
        pose: (4, 4) from the part's coordinates to the world's, metres.
    """

    name: str
    own: np.ndarray
    faces: np.ndarray
    unit: str
    pose: np.ndarray

    @cached_property
    def vertices(self) -> np.ndarray:
        """(vertices, 3) float64, world metres."""
        return METRES[self.unit] * self.own @ self.pose[:3, :3].T + self.pose[:3, 3]

    @cached_property
    def solid(self) -> "Solid":
        # Not before it is asked for: rendering needs the packages of an extra.
        from data_prep.synthetic.multiview import Solid

        return Solid(self.vertices, self.faces)


@dataclass(frozen=True, eq=False)
class Lens:
    """A camera of the rig as the renderer wants it: size, rays (height, width, 3) float32 with z = 1, their lengths."""

    camera: Camera

    @property
    def height(self) -> int:
        return self.camera.height

    @property
    def width(self) -> int:
        return self.camera.width

    @cached_property
    def _rays(self) -> np.ndarray:
        return rays(self.camera).astype(np.float32)

    def rays(self) -> np.ndarray:
        return self._rays

    def ray_lengths(self) -> np.ndarray:
        return np.linalg.norm(self._rays, axis=-1)

    def window(self, _points: np.ndarray) -> tuple[slice, slice]:
        """All of the image: a lens bends straight edges, so that corners do not bound what it shows."""
        return np.s_[:, :]


def read_part(path: str | Path, config: CadConfig) -> Part:
    """The part of a mesh file (STL, PLY, OBJ, OFF, GLB, glTF, STEP).

    Raises:
        ConfigError: a setting is impossible, or a package that reads the file is not installed.
        DataError: the file is not there, is no mesh or has no triangles.
    """
    from data_prep.synthetic.meshes import read_mesh

    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} is not a file")
    unit = config.unit
    if unit == "auto":
        unit = "m" if path.suffix.lower() in IN_METRES else "mm"
    if unit not in METRES:
        raise ConfigError(f"unit: must be auto, {', '.join(METRES)}, got {unit!r}")
    pose = _pose(config)
    own, faces = read_mesh(str(path))
    return Part(path.stem, own, faces, unit, pose)


def _pose(config: CadConfig) -> np.ndarray:
    """(4, 4) from the part's coordinates to the world's."""
    if not config.part_to_world:
        return np.eye(4)
    given = np.array(config.part_to_world, np.float64)
    if given.size != 16 or not np.isfinite(given).all():
        raise ConfigError(f"part_to_world: must be 16 finite numbers, 4 x 4 row by row, got {config.part_to_world}")
    pose = given.reshape(4, 4)
    turn = pose[:3, :3]
    if abs(turn @ turn.T - np.eye(3)).max() > RIGID or np.linalg.det(turn) < 0 or pose[3].tolist() != [0, 0, 0, 1]:
        raise ConfigError(f"part_to_world: must hold a rotation and end in 0 0 0 1, got {config.part_to_world}")
    return pose


def render_views(part: Part, rig: Rig, config: CadConfig) -> list[Sample]:
    """Good instances of a part as the rig would see it. A view is rendered when it is read, always the same.

    ``convert.write_instance`` writes them as a folder of one's own parts.

    Raises:
        ConfigError: a setting is impossible, or the extra ``render`` is not installed.
        DataError: the rig has no cameras, or the part is not before each of them; names the unit that would fit.
    """
    limits = {"depth_noise": 100.0, "dropout": 1.0, "image_noise": 1.0}
    for key, most in limits.items():
        if not 0 <= getattr(config, key) <= most:
            raise ConfigError(f"{key}: must be within 0..{most:g}, got {getattr(config, key)}")
    if config.instances < 1:
        raise ConfigError(f"instances: must be at least 1, got {config.instances}")
    if not rig.cameras:
        raise DataError("the rig has no cameras: views cannot be rendered without them")
    if reason := _misfit(part, rig.cameras):
        fitting = [unit for unit in METRES if unit != part.unit and not _misfit(replace(part, unit=unit), rig.cameras)]
        hint = f"; every camera would see it with unit {' or '.join(fitting)}" if fitting else ""
        raise DataError(f"{part.name}: {reason}{hint}")
    return [
        Sample(
            "part", f"{part.name}_{number:02d}", "train", "good", None,
            tuple(_view(part, name, camera, config, number) for name, camera in rig.cameras.items()), lambda: None,
        )
        for number in range(config.instances)
    ]  # fmt: skip


def _misfit(part: Part, cameras: dict[str, Camera]) -> str:
    """What tells that the part does not stand before the rig, in words; empty where it does."""
    low, high = part.vertices.min(0), part.vertices.max(0)
    size = f"{' x '.join(f'{1000 * side:.4g}' for side in high - low)} mm in the world's axes"
    for name, camera in cameras.items():
        place = camera.camera_to_world[:3, 3]
        if ((low <= place) & (place <= high)).all():
            return f"the camera of {name} is within its bounding box of {size}"
        scale = min(1, COARSE / max(camera.height, camera.width))
        coarse = resize_camera(camera, *(max(1, round(scale * side)) for side in (camera.height, camera.width)))
        covered = _seen(part, coarse).part.mean()
        if covered < LEAST:
            middle = ((low + high) / 2 - place) @ camera.camera_to_world[:3, :3]
            told = ", ".join(f"{1000 * value:.4g}" for value in middle)
            return (
                f"covers {100 * covered:.2g} % of {name}; it spans {size}, its middle is at ({told}) mm in the "
                "camera's x, y, z: part_to_world, unit or rig do not fit"
            )
    return ""


def _seen(part: Part, camera: Camera) -> "Render":
    return part.solid.render(Lens(camera), camera.camera_to_world)[0]


def _view(part: Part, name: str, camera: Camera, config: CadConfig, number: int) -> View:
    key = (config.seed, "cad", name, number)
    return View(name, partial(_image, part, camera, config, key), partial(_depth, part, camera, config, key), camera)


def _image(part: Part, camera: Camera, config: CadConfig, key: tuple) -> np.ndarray:
    """(height, width) uint8."""
    from data_prep.synthetic.nuisances import Difficulty, photograph

    seen, lens = _seen(part, camera), Lens(camera)
    albedo = np.where(seen.part, np.float32(ALBEDO), np.float32(0))
    background = (generator(*key, "background"), generator(*key, "background"))
    noise = Difficulty(image_noise=config.image_noise)
    return photograph(seen, lens, albedo, GLOSS, background, _lit(seen), noise, generator(*key, "image"))


def _depth(part: Part, camera: Camera, config: CadConfig, key: tuple) -> DepthMap:
    from data_prep.synthetic.nuisances import Difficulty, measure

    seen = _seen(part, camera)
    noise = Difficulty(depth_noise=config.depth_noise / 1000, dropout=config.dropout)  # metres, of a side of 1 m
    return DepthMap.from_values(measure(seen, Lens(camera), 1.0, _lit(seen), noise, generator(*key, "depth")))


def _lit(seen: "Render") -> "Disturbance":
    """A lamp beside the camera, farther where the part is, and no spots."""
    from data_prep.synthetic.multiview import DISTANCE
    from data_prep.synthetic.nuisances import LAMP, Disturbance

    nothing = np.zeros(seen.part.shape, bool)
    away = float(np.median(seen.depth[seen.part])) / DISTANCE
    return Disturbance(nothing.astype(np.float32), nothing, away * LAMP)
