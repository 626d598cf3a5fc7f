"""Photographs of a shot: a coloured, uneven part on a coloured, uneven ground, under lights that can be changed."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.random import Generator
from PIL import Image

from data_prep.synthetic.defects import DEFECTS
from data_prep.synthetic.render import dot, shade
from data_prep.synthetic.shots import Shot

__all__ = ["KINDS", "PAINT", "Light", "Surface", "draw_light", "draw_surface", "photograph", "save"]

PAINT = "paint"  # the defect that only a photograph shows
KINDS = (*sorted(DEFECTS), PAINT)
OCTAVES = (4, 12, 36)  # cells across a photograph, of spots from coarse to fine


@dataclass(frozen=True)
class Surface:
    """What the scene is made of: albedo (size, size, 3) float32 within 0..1, and the strength of highlights."""

    albedo: np.ndarray
    gloss: float


@dataclass(frozen=True)
class Light:
    """What a scene is lit by, and how it is recorded.

    Attributes:
        position: of the lamp (3,), as a multiple of the distance of the part; the camera is at 0, looking along z.
        lamp: strength of the lamp.
        ambient: strength of the light from everywhere.
        exposure: factor on the recorded values; what exceeds 1 is white.
        tint: (3,) colour of all light.
    """

    position: np.ndarray
    lamp: float
    ambient: float
    exposure: float = 1.0
    tint: np.ndarray = field(default_factory=lambda: np.ones(3))


def draw_surface(shot: Shot, defect: str | None, rng: Generator) -> Surface:
    """Random colours of part and ground, each with spots of several sizes.

    Args:
        defect: "paint" gives the pixels of the shot's mask another colour.
    """
    size, part = shot.camera.size, shot.seen.part[..., None]
    colours = rng.uniform(0.35, 0.9, 3), rng.uniform(0.05, 0.95) * rng.uniform(0.6, 1, 3)
    albedo = np.where(part, *colours).astype(np.float32)
    albedo *= 1 + np.where(part, *(rng.uniform(0.05, 0.2) * _spots(size, rng)[..., None] for _ in range(2)))
    if defect == PAINT:
        albedo[shot.mask] = (albedo[shot.mask] + rng.uniform(0.3, 0.7)) % 1
    return Surface(np.clip(albedo, 0.02, 1), float(rng.uniform(0, 0.3)))


def _spots(size: int, rng: Generator) -> np.ndarray:
    """(size, size) float32 noise about -1..1, of bilinear cells of several sizes."""
    noise = np.zeros((size, size), np.float32)
    for cells in OCTAVES:
        corners = rng.uniform(-1, 1, (cells + 1, cells + 1)).astype(np.float32)
        place = np.arange(size) * (cells / size)
        low = place.astype(int)
        share = (place - low).astype(np.float32)
        rows = corners[low] * (1 - share[:, None]) + corners[low + 1] * share[:, None]
        noise += (rows[:, low] * (1 - share) + rows[:, low + 1] * share) / len(OCTAVES)
    return noise


def draw_light(rng: Generator) -> Light:
    """An ordinary light: a lamp beside the camera, its shadow softened by the light of the room."""
    direction, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.8)
    position = height * np.array([np.cos(direction), np.sin(direction), 0.0])
    return Light(position, rng.uniform(0.45, 0.7), rng.uniform(0.2, 0.4), tint=rng.uniform(0.92, 1, 3))


def photograph(shot: Shot, surface: Surface, light: Light, rng: Generator) -> np.ndarray:
    """A photograph (size, size, 3) uint8 with shadows, highlights and the noise of a camera."""
    seen, camera = shot.seen, shot.camera
    position = light.position * float(np.median(seen.depth[seen.part]))
    lit = shot.scene.lit(seen, camera, position)
    [image] = shade(seen, camera, np.ones_like(seen.depth), surface.gloss, [(position, light.lamp * lit)])
    facing = -dot(camera.rays(), seen.normal) / camera.ray_lengths()
    image += np.float32(light.ambient) * (np.float32(0.4) + np.float32(0.6) * facing)
    image = image[..., None] * surface.albedo
    # Where there is no surface there is a dark, distant room.
    image[seen.depth == 0] = 0.04
    image *= light.exposure * light.tint.astype(np.float32)
    image += rng.normal(0, 0.008, image.shape).astype(np.float32) * np.sqrt(np.maximum(image, 0.02))
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def save(image: np.ndarray, path: Path) -> None:
    """Writes a PNG: (size, size) or (size, size, 3) uint8 as they are, (size, size) bool as 0 and 255."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = image.astype(np.uint8) * 255 if image.dtype == bool else image
    Image.fromarray(pixels).save(path, compress_level=1)
