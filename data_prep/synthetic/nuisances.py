"""What differs between two recordings of the same object: a gray image and a depth map of one view, disturbed.

``mild`` is the regime in which methods differ: its numbers were set on three objects so that neither a comparison with
the training instance cell by cell nor a head finds most defects or none (tests/test_benchmark_gates.py). ``clean`` is a
check of the ceiling, where that comparison already finds about half; under ``hard`` it finds less than a tenth.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.ndimage import map_coordinates
from scipy.spatial.transform import Rotation

from data_prep.synthetic.multiview import DISTANCE, Pinhole
from data_prep.synthetic.render import Render, dot, shade

__all__ = ["PRESETS", "Difficulty", "Disturbance", "Material", "disturb", "draw_material", "measure", "photograph"]

LAMP = np.array([-0.25, -0.4, 0.0])  # beside each camera and carried along with it, metres
LAMP_STRENGTH, AMBIENT = 0.7, 0.25
CELLS = (6, 20)  # of the object's spots, across its longest side
BACKGROUND_CELLS = 5
SPOTS = (0.01, 0.025)  # half axes of a spot, shares of the image's shorter side
GLARE = (0.1, 0.3)  # brightness of a bright spot


@dataclass(frozen=True)
class Difficulty:
    """How much recordings differ, and how large defects are.

    Attributes:
        light: standard deviation of the lamp's direction about each axis, degrees.
        glare: mean number of bright spots in a view; depth is lost where they are.
        blobs: mean number of further spots without depth.
        dropout: share of the depth that is lost where the surface is seen at a grazing angle or reflects the lamp.
        rotation: standard deviation of the object's rotation about each axis, degrees.
        translation: standard deviation of its place along each axis, as a share of its longest side.
        gain: standard deviation of the image's brightness, relative.
        image_noise: standard deviation of a pixel, white being 1.
        depth_noise: standard deviation of a depth, as a share of the object's longest side.
        background: share of the background that is another one in each recording.
        amplitude: height of a dent or bump, as a share of the longest side.
        radius: its radius, as a share of the longest side.
        albedo: relative change of the albedo by a scratch or stain.
    """

    light: float = 0.0
    glare: float = 0.0
    blobs: float = 0.0
    dropout: float = 0.0
    rotation: float = 0.0
    translation: float = 0.0
    gain: float = 0.0
    image_noise: float = 0.0
    depth_noise: float = 0.0
    background: float = 0.0
    amplitude: float = 0.05
    radius: float = 0.11
    albedo: float = 0.5


RECORDING = {"gain": 0.01, "image_noise": 0.015, "depth_noise": 0.0015}
PRESETS = {
    "clean": Difficulty(),
    "mild": Difficulty(
        light=1.0, glare=0.3, blobs=0.3, dropout=0.3, rotation=0.3, translation=0.001, background=0.1, **RECORDING
    ),
    "hard": Difficulty(
        light=8.0, glare=1.0, blobs=2.0, dropout=0.7, rotation=1.0, translation=0.004, background=0.3, amplitude=0.035,
        **RECORDING,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Material:
    """Albedo of a solid with spots in space, so that all views agree; ``lattices`` are (cells, cells, cells)."""

    albedo: float
    spots: float
    gloss: float
    lattices: tuple[np.ndarray, ...]

    def albedos(self, points: np.ndarray) -> np.ndarray:
        """(points,) float32 at points (points, 3) of the object, its longest side 1 about the origin."""
        noise = np.zeros(len(points), np.float32)
        for lattice, cells in zip(self.lattices, CELLS, strict=True):
            places = (points.T + 1) * cells
            noise += map_coordinates(lattice, places, np.float32, order=1, mode="grid-wrap", prefilter=False)
        return np.clip(self.albedo * (1 + self.spots * noise), 0.05, 0.95)


def draw_material(rng: Generator) -> Material:
    lattices = tuple(rng.uniform(-0.5, 0.5, (2 * cells,) * 3).astype(np.float32) for cells in CELLS)
    return Material(float(rng.uniform(0.4, 0.7)), float(rng.uniform(0.2, 0.5)), float(rng.uniform(0.1, 0.3)), lattices)


@dataclass(frozen=True)
class Disturbance:
    """The spots of one view, (height, width): how bright glare is, and where depth is lost; and the lamp's place."""

    glare: np.ndarray
    lost: np.ndarray
    lamp: np.ndarray


def disturb(seen: Render, camera: Pinhole, difficulty: Difficulty, rng: Generator) -> Disturbance:
    """Draws what image and depth of one view have in common."""
    middle = np.array([0, 0, DISTANCE])
    turn = Rotation.from_rotvec(np.radians(difficulty.light) * rng.standard_normal(3))
    glare, lost = np.zeros(seen.part.shape, np.float32), np.zeros(seen.part.shape, bool)
    rows, columns = np.nonzero(seen.part)
    for number, dazzles in ((rng.poisson(difficulty.glare), True), (rng.poisson(difficulty.blobs), False)):
        for _ in range(number):
            centre = rng.integers(len(rows))
            axes = np.maximum(rng.uniform(*SPOTS, 2) * min(camera.height, camera.width), 1)
            down, across = np.arange(camera.height) - rows[centre], np.arange(camera.width) - columns[centre]
            spot = np.exp(-((down / axes[0]) ** 2)[:, None] - ((across / axes[1]) ** 2)[None])
            lost |= spot > 0.5
            if dazzles:
                np.maximum(glare, np.float32(rng.uniform(*GLARE)) * spot, out=glare)
    return Disturbance(glare, lost, middle + turn.apply(LAMP - middle))


def photograph(
    seen: Render,
    camera: Pinhole,
    albedo: np.ndarray,
    gloss: float,
    background: tuple[Generator, Generator],
    disturbance: Disturbance,
    difficulty: Difficulty,
    rng: Generator,
) -> np.ndarray:
    """A gray image (height, width) uint8.

    Args:
        albedo: (height, width) float32.
        background: generators of the view's own background and of this recording's.
    """
    [image] = shade(seen, camera, albedo, gloss, [(disturbance.lamp, LAMP_STRENGTH)])
    facing = -dot(camera.rays(), seen.normal) / camera.ray_lengths()
    image += np.float32(AMBIENT) * albedo * (np.float32(0.5) + np.float32(0.5) * facing)
    own, other = (_backdrop(camera, generator) for generator in background)
    image = np.where(seen.part, image, own + np.float32(difficulty.background) * (other - own))
    image *= np.float32(1 + difficulty.gain * rng.standard_normal())
    image += disturbance.glare
    image += np.float32(difficulty.image_noise) * rng.standard_normal(image.shape, np.float32)
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def _backdrop(camera: Pinhole, rng: Generator) -> np.ndarray:
    """(height, width) float32, a smooth dark background."""
    corners = rng.uniform(0.02, 0.2, (BACKGROUND_CELLS + 1,) * 2).astype(np.float32)
    rows, columns = (np.linspace(0, BACKGROUND_CELLS, size) for size in (camera.height, camera.width))
    return map_coordinates(corners, np.meshgrid(rows, columns, indexing="ij"), np.float32, order=1, prefilter=False)


def measure(
    seen: Render,
    camera: Pinhole,
    scale: float,
    disturbance: Disturbance,
    difficulty: Difficulty,
    rng: Generator,
) -> np.ndarray:
    """What a sensor measures: depth (height, width) float32 metres, 0 where it measures nothing.

    Args:
        scale: the object's longest side, metres.
    """
    shape = seen.depth.shape
    facing = -dot(camera.rays(), seen.normal) / camera.ray_lengths()
    [highlight] = shade(seen, camera, np.zeros(shape, np.float32), 1.0, [(disturbance.lamp, 1.0)])
    # Lost pixels come in small clusters.
    coarse = rng.random((shape[0] // 3 + 1, shape[1] // 3 + 1), np.float32).repeat(3, 0).repeat(3, 1)
    luck = 0.6 * coarse[: shape[0], : shape[1]] + 0.4 * rng.random(shape, np.float32)
    risk = np.maximum((0.35 - facing) / 0.25, (highlight - 0.6) / 0.3)
    lost = disturbance.lost | (luck < difficulty.dropout * np.clip(risk, 0, 1))
    depth = seen.depth + np.float32(difficulty.depth_noise * scale) * rng.standard_normal(shape, np.float32)
    return np.where(lost | ~seen.part, np.float32(0), depth).astype(np.float32)
