"""Anomaly volumes for the page's viewer: small enough for a file that opens from disk, and a still of each.

A packed volume is what ``viewer.js`` draws. Its voxels are merged by a whole factor until they fit, the score of a
merged voxel being the largest and its truth any of its parts', so that no defect vanishes. Bytes, little-endian, of n
voxels, first the observed ones by falling score, then those of the ground truth that no view observed:

    position  (n, 3) int16   voxel indices from the corner of the bounding box
    level     (n,) uint8     the score between the scale's ends
    truth     (n,) uint8     1 where anomalous

The picture is orthographic: of the screen's axes, right, up and towards the viewer, ``turn`` holds the directions.
"""

import base64
from dataclasses import dataclass

import numpy as np

from dino_depth.picture import TABLE

__all__ = ["CONTEXT", "PANE", "TRUTH", "PackedVolume", "pack", "still", "turn"]

YAW, PITCH = 0.6, 0.45  # radians, of the still and of the viewer's first picture
LEVELS = 255
PANE = (27, 30, 34)  # behind the voxels, in light and dark pages: viridis needs one background
CONTEXT = (150, 156, 162)  # voxels below the threshold
TRUTH = (255, 138, 101)
SHADES = 12  # of the still, far to near


@dataclass(frozen=True)
class PackedVolume:
    """A volume for the viewer.

    Attributes:
        data: see above, base64.
        voxels: n.
        observed: how many of them some view observed.
        shape: extent of the bounding box, voxels.
        edge: of a merged voxel, metres.
        merged: voxels of the volume along an edge of one of these.
        still: (height, 2 * height, 3) uint8, the scores above the threshold on the left, ground truth on the right.
    """

    data: str
    voxels: int
    observed: int
    shape: tuple[int, int, int]
    edge: float
    merged: int
    still: np.ndarray


def pack(
    index: np.ndarray,
    score: np.ndarray,
    truth: np.ndarray,
    size: float,
    scale: tuple[float, float],
    threshold: int,
    limit: int,
) -> PackedVolume:
    """Packs a volume.

    Args:
        index: (n, 3) integers, observed voxels.
        score: (n,) of them, finite.
        truth: (m, 3) integers, anomalous voxels of the same grid; need not be observed.
        size: edge of a voxel, metres.
        scale: scores of level 0 and of level 255.
        threshold: level from which voxels are shown in the still.
        limit: most voxels of the result.
    """
    places = np.concatenate([index, truth]).astype(np.int64)
    corner = places.min(0)
    known = np.concatenate([score.astype(np.float64), np.full(len(truth), -np.inf)])
    factor = 1
    while True:
        merged = (places - corner) // factor
        shape = merged.max(0) + 1
        keys, owner = np.unique(np.ravel_multi_index(merged.T, shape), return_inverse=True)
        if len(keys) <= limit:
            break
        # Their number falls at most with the cube of the factor, so this is never past the first that fits.
        factor = max(factor + 1, int(factor * (len(keys) / limit) ** (1 / 3)))
    best = np.full(len(keys), -np.inf)
    np.maximum.at(best, owner, known)
    anomalous = np.zeros(len(keys), bool)
    anomalous[owner[len(index) :]] = True
    low, high = scale
    level = np.rint(LEVELS * np.clip((best - low) / ((high - low) or 1.0), 0, 1)).astype(np.uint8)
    order = np.lexsort((keys, -best))
    level, anomalous = level[order], anomalous[order]
    position = np.stack(np.unravel_index(keys[order], shape), 1).astype("<i2")
    observed = int(np.isfinite(best).sum())
    content = position.tobytes() + level.tobytes() + anomalous.astype(np.uint8).tobytes()
    panes = [
        still(position[:observed], level[:observed], level[:observed] >= threshold, TABLE[_ramp(level[:observed])]),
        still(position, level, anomalous, np.broadcast_to(TRUTH, (len(position), 3))),
    ]
    return PackedVolume(
        base64.b64encode(content).decode(),
        len(position),
        observed,
        tuple(int(length) for length in shape),
        size * factor,
        factor,
        np.concatenate(panes, 1),
    )


def _ramp(level: np.ndarray) -> np.ndarray:
    return np.rint(level / LEVELS * (len(TABLE) - 1)).astype(int)


def turn(yaw: float, pitch: float) -> np.ndarray:
    """(3, 3): right, up and towards the viewer, as rows in the volume's axes, z being up when both angles are 0."""
    sy, cy, sp, cp = np.sin(yaw), np.cos(yaw), np.sin(pitch), np.cos(pitch)
    return np.array([[cy, sy, 0], [-sy * sp, cy * sp, cp], [sy * cp, -cy * cp, sp]])


def still(position: np.ndarray, level: np.ndarray, marked: np.ndarray, colours: np.ndarray, side: int = 200):
    """One picture (side, side, 3) uint8 of voxels, those that are marked in their colours.

    Args:
        position: (n, 3) voxels.
        level: (n,), of which the highest is drawn where several marked voxels share a place.
        marked: (n,) bool; they are drawn over the others, as if those were transparent.
        colours: (n, 3).
    """
    picture = np.full((side, side, 3), PANE, np.uint8)
    middle = (position.max(0) + position.min(0)) / 2
    radius = max(np.linalg.norm(position.max(0) - position.min(0) + 1) / 2, 1)
    seen = (position - middle) @ turn(YAW, PITCH).T  # right, up, near
    step = side / (2 * radius)
    width = int(np.ceil(1.5 * step))
    corner = np.stack([side / 2 - seen[:, 1] * step, side / 2 + seen[:, 0] * step], 1).astype(int) - width // 2
    nearness = (seen[:, 2] / radius + 1) / 2
    shade = 0.45 + 0.55 * np.rint(SHADES * nearness) / SHADES
    painted = np.where(marked[:, None], colours, shade[:, None] * CONTEXT).astype(np.uint8)
    order = np.lexsort((nearness, level * marked, marked))
    offsets = np.stack(np.meshgrid(range(width), range(width), indexing="ij"), -1).reshape(-1, 2)
    places = (corner[order, None] + offsets).clip(0, side - 1)  # (n, width * width, 2), far to near
    keys = np.ravel_multi_index(places.reshape(-1, 2).T, (side, side))
    # Of several voxels at a pixel the last one is seen.
    keys, last = np.unique(keys[::-1], return_index=True)
    picture.reshape(-1, 3)[keys] = painted[order][(places.shape[0] * len(offsets) - 1 - last) // len(offsets)]
    return picture
