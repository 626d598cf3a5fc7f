"""What depth sensors of several kinds measure of a perfect rendering: noise, quantisation, flying pixels and holes.

Each takes the rendering, its camera, the pixels that the sensor's second eye or projector reaches too, and a generator
from which it draws its own quality; it returns depth (size, size) float32 metres, 0 where it measures nothing.
"""

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from scipy.ndimage import maximum_filter, minimum_filter, uniform_filter, zoom

from data_prep.synthetic.render import Camera, Render, dot, sense

__all__ = ["SENSORS", "Sensor"]

Sensor = Callable[[Render, Camera, np.ndarray, Generator], np.ndarray]


def _facing(seen: Render, camera: Camera) -> np.ndarray:
    """Cosine between ray and surface normal, (size, size)."""
    return -dot(camera.rays(), seen.normal) / camera.ray_lengths()


def _noise(size: int, window: int, rng: Generator) -> np.ndarray:
    """Unit normal noise (size, size) float32 that neighbours within ``window`` share."""
    noise = uniform_filter(rng.standard_normal((size, size), np.float32), window, mode="wrap")
    return noise * np.float32(window)


def _patches(size: int, share: float, rng: Generator) -> np.ndarray:
    """(size, size) bool: a ``share`` of the pixels in smooth patches, as dark or shiny surfaces are lost."""
    if not share:
        return np.zeros((size, size), bool)
    cells = int(rng.integers(3, 9))
    field = zoom(rng.standard_normal((cells, cells)).astype(np.float32), (size + cells) / cells, order=1)[:size, :size]
    field = field + np.float32(0.3) * rng.standard_normal((size, size), np.float32)
    return field < np.quantile(field, share)


def _edges(depth: np.ndarray, jump: float) -> np.ndarray:
    """(size, size) bool: pixels whose neighbourhood of 3 x 3 spans more than ``jump`` of its depth."""
    return maximum_filter(depth, 3) - minimum_filter(depth, 3) > jump * depth


def _lost(facing: np.ndarray, rng: Generator) -> np.ndarray:
    """Pixels seen at a grazing angle, the more of them the flatter."""
    return facing < rng.uniform(0.1, 0.35) * rng.random(facing.shape, np.float32) ** 0.5 + 0.04


def perfect(seen: Render, camera: Camera, lit: np.ndarray, rng: Generator) -> np.ndarray:
    return seen.depth


def structured_light(seen: Render, camera: Camera, lit: np.ndarray, rng: Generator) -> np.ndarray:
    return sense(seen, camera, lit, rng)


def stereo(seen: Render, camera: Camera, lit: np.ndarray, rng: Generator) -> np.ndarray:
    """Disparity with the noise and the steps of matching, edges that grow, and patches without texture."""
    depth, size = seen.depth, camera.size
    if rng.random() < 0.5:
        # The window of a match that touches what is in front is matched with that.
        near = minimum_filter(np.where(depth > 0, depth, np.inf), 3)
        depth = np.where((rng.random((size, size), np.float32) < 0.6) & np.isfinite(near), near, depth)
    product = camera.focal * rng.uniform(2, 6) * rng.uniform(0.03, 0.12)  # native focal length times baseline
    with np.errstate(divide="ignore"):
        disparity = np.float32(product) / depth
    deviation = np.float32(rng.uniform(0.02, 0.12)) / np.maximum(_facing(seen, camera), np.float32(0.25))
    disparity = disparity + deviation * _noise(size, int(rng.choice([1, 3, 5])), rng)
    steps = np.float32(rng.choice([4, 8, 16, 32, 64]))
    disparity = np.rint(disparity * steps) / steps
    missing = ~lit | _patches(size, max(rng.uniform(-0.15, 0.25), 0), rng) | _lost(_facing(seen, camera), rng)
    with np.errstate(divide="ignore"):
        measured = np.float32(product) / disparity
    return np.where(missing | (seen.depth == 0) | ~(disparity > 0), 0, measured).astype(np.float32)


def time_of_flight(seen: Render, camera: Camera, lit: np.ndarray, rng: Generator) -> np.ndarray:
    """Noise that grows with distance and slope, a periodic bias, and edges that fly between front and back."""
    depth, size = seen.depth, camera.size
    facing = np.maximum(_facing(seen, camera), np.float32(0.15))
    deviation = np.float32(rng.uniform(0.4e-3, 2e-3)) * (0.3 + depth**2) / facing
    bias = np.float32(rng.uniform(0, 2e-3)) * np.sin(depth * np.float32(2 * np.pi / rng.uniform(0.1, 0.5)))
    measured = depth + bias + deviation * _noise(size, int(rng.choice([1, 3])), rng)
    edge = _edges(depth, rng.uniform(0.01, 0.03)) & (rng.random((size, size), np.float32) < rng.uniform(0.2, 0.9))
    mix = rng.random((size, size), np.float32)
    flying = mix * minimum_filter(depth, 3) + (1 - mix) * maximum_filter(depth, 3)
    measured = np.where(edge, flying, measured)
    # A lens mixes what its neighbours return, and some cameras discard where that differs.
    discarded = _edges(depth, 0.05) if rng.random() < 0.3 else np.zeros((size, size), bool)
    missing = discarded | _patches(size, max(rng.uniform(-0.15, 0.2), 0), rng) | _lost(_facing(seen, camera), rng)
    return np.where(missing | (depth == 0) | ~(measured > 0), 0, measured).astype(np.float32)


# How often each is drawn.
SENSORS: list[tuple[Sensor, float]] = [
    (perfect, 0.15),
    (structured_light, 0.35),
    (stereo, 0.25),
    (time_of_flight, 0.25),
]
