"""Curves and what is drawn along them."""

import math

import numpy as np

from data_prep.synthetic.engines import CrossSection, Manifold
from data_prep.synthetic.parts import lofted, swept


def rounded(line: np.ndarray, times: int) -> np.ndarray:
    """An open polyline (points, dimensions) with its corners cut ``times`` times (Chaikin); the ends stay."""
    for _ in range(times):
        near, far = 0.75 * line[:-1] + 0.25 * line[1:], 0.25 * line[:-1] + 0.75 * line[1:]
        line = np.concatenate([line[:1], np.stack([near, far], 1).reshape(-1, line.shape[1]), line[-1:]])
    return line


def tube(path: np.ndarray, radius: float | np.ndarray, facets: int = 12) -> Manifold:
    """A round bar along a smooth ``path`` (steps, 3); ``radius`` may differ from step to step, (steps,)."""
    along = np.gradient(path, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    across = np.zeros_like(along)
    across[0] = np.cross(along[0], np.eye(3)[np.abs(along[0]).argmin()])
    across[0] /= np.linalg.norm(across[0])
    for step in range(1, len(path)):
        # The section turns no more than the path bends it.
        kept = across[step - 1] - across[step - 1] @ along[step] * along[step]
        across[step] = kept / np.linalg.norm(kept)
    widths = np.broadcast_to(radius, len(path))[:, None, None]
    return swept(path, across, np.cross(along, across), widths, facets)


def strip(line: np.ndarray, thickness: float) -> CrossSection:
    """The band of a smooth plane curve (points, 2)."""
    along = np.gradient(line, axis=0)
    side = np.stack([-along[:, 1], along[:, 0]], 1)
    side *= thickness / 2 / np.linalg.norm(along, axis=1, keepdims=True)
    return CrossSection([np.concatenate([line - side, (line + side)[::-1]])])


def globe(radius: np.ndarray) -> Manifold:
    """A star-shaped solid: ``radius`` (latitudes, longitudes) of its surface, poles left out, south first."""
    latitudes, longitudes = radius.shape
    latitude = np.linspace(-math.pi / 2, math.pi / 2, latitudes + 2)[1:-1, None]
    longitude = np.arange(longitudes) * (2 * math.pi / longitudes)
    flat = radius * np.cos(latitude)
    rings = np.stack([flat * np.cos(longitude), flat * np.sin(longitude), radius * np.sin(latitude)], -1)
    poles = np.array([(0, 0, -radius[0].mean()), (0, 0, radius[-1].mean())])
    return lofted(rings, poles)
