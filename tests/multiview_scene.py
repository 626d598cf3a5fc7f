"""A scene whose depth is known in closed form: an ellipsoid seen by a ring of cameras, for tests of anything in 3D."""

import numpy as np

from dino_depth.anomaly.geometry import Camera, rays

RADII = np.array([0.04, 0.09, 0.12])  # no two alike, so that mixed-up axes and views show
CENTRE = np.array([0.03, -0.02, 0.02])


def ring(count: int, height: int = 60, width: int = 80, distance: float = 0.7, **options) -> list[Camera]:
    """Cameras around the z axis of the world that look down at its origin."""
    matrix = np.array([[1.6 * width, 0, 0.48 * width], [0, 1.62 * width, 0.53 * height], [0, 0, 1]])
    cameras = []
    for angle in 2 * np.pi * np.arange(count) / count + 0.3:
        place = distance * np.array([np.cos(angle) * 0.85, np.sin(angle) * 0.85, np.sqrt(1 - 0.85**2)])
        forward = -place / distance
        right = np.cross(forward, [0, 0, 1])
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
        pose[:3, 3] = place
        cameras.append(Camera(height, width, matrix, pose, **options))
    return cameras


def ellipsoid_depth(camera: Camera) -> np.ndarray:
    """(height, width) float64 metres, 0 where a ray meets nothing."""
    direction = rays(camera) @ camera.camera_to_world[:3, :3].T / RADII
    start = (camera.camera_to_world[:3, 3] - CENTRE) / RADII
    a, b, c = (direction**2).sum(-1), direction @ start, start @ start - 1
    inside = b * b - a * c
    return np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, 0)


def off_ellipsoid(points: np.ndarray) -> np.ndarray:
    """How far points (n, 3) are from the surface, as a share of its radius there."""
    return abs(np.linalg.norm((points - CENTRE) / RADII, axis=-1) - 1)
