"""Where a scan stands out, in millimetres: connected regions of the volume, or of the map of a single view.

A region is where scores exceed the threshold, grown to neighbours that exceed a lower one (hysteresis, Canny 1986): the
tip alone would be too small, the lower threshold alone would join everything.

A head that measures distances, as the residual does, offers ``deviations(head, views)``: for each view the signed
distance from the training surface and where it is known. Positive is material that the training part has not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from dino_depth.anomaly.geometry import lift
from dino_depth.anomaly.model import Model, Prepared
from dino_depth.anomaly.regions import label_components
from dino_depth.anomaly.registration import surface_normals
from dino_depth.anomaly.views import Views
from dino_depth.anomaly.volume import ScoredVolume
from dino_depth.errors import ConfigError

__all__ = ["Defect", "DefectConfig", "Found", "find_defects", "pixel_pitch"]

STEEPEST = 0.2  # cosine between ray and normal: what a steeper pixel covers is not to be told
NEAR = 1.5  # times the distance of neighbouring pixels: closer voxels belong together
PEAK = 3  # pixels along a side of the square whose mean is a view's largest deviation
LEVEL = 1.96  # standard deviations of a normal interval of 95 %
USUAL = 0.999  # quantile of deviations off the defects: one that is not larger is none
MAD = 1.4826  # times the median absolute value is the standard deviation of a normal distribution


@dataclass
class DefectConfig:
    """What counts as a defect.

    Attributes:
        grow: a region reaches as far as scores exceed this share of the threshold.
        least_mm2: regions of a smaller area are not listed (without a camera: pixels). The decision is not affected.
        limit: how many are listed, those of the highest scores.
    """

    grow: float = 0.5
    least_mm2: float = 0.0
    limit: int = 20

    def __post_init__(self):
        if not 0 < self.grow <= 1:
            raise ConfigError(f"defects.grow: must lie within (0, 1], got {self.grow}")
        if self.least_mm2 < 0 or self.limit < 0:
            raise ConfigError(f"defects: least_mm2 and limit must not be negative, got {self.least_mm2}, {self.limit}")


@dataclass(frozen=True)
class Defect:
    """A region that stands out. Lengths are in the part's frame; for a view without a camera in pixels, in ``unit``.

    Attributes:
        score: its highest.
        unit: mm or pixels.
        position: of its middle; (x, y, z), or (column, row).
        extent: of its bounding box along the same axes.
        area: of the surface in it, as the view that shows most of it has it; unit squared.
        volume: of the material that is there and should not be, negative for what is missing, mm³; None unless the
            head measures distances.
        deviation: largest signed distance from the training surface, mm, as the mean of 3 x 3 pixels; likewise, and
            None where it is no larger than elsewhere on the part.
        interval: of 95 % around it, from how such means vary elsewhere on the part.
        views: that show it, the one that shows most of it first.
    """

    score: float
    unit: str
    position: tuple[float, ...]
    extent: tuple[float, ...]
    area: float
    views: tuple[str, ...]
    volume: float | None = None
    deviation: float | None = None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """The defects of a scan and where they lie.

    Attributes:
        defects: the highest score first.
        voxels: (n,) int32 of each voxel of the volume the place of its defect in ``defects`` from 1, 0 for none; None
            without a volume.
        pixels: the same (height, width) of each view.
    """

    defects: tuple[Defect, ...]
    voxels: np.ndarray | None
    pixels: tuple[np.ndarray, ...]


def find_defects(
    model: Model,
    prepared: Prepared,
    maps: Sequence[np.ndarray],
    volume: ScoredVolume | None,
    threshold: float | None,
    config: DefectConfig,
) -> Found:
    """The regions of an instance whose highest score exceeds a threshold; none where that is None.

    Args:
        prepared: the instance.
        maps: (height, width) of each view, 0 off the part.
        volume: in the part's frame; None for a view without a camera.
    """
    if threshold is None:
        nowhere = tuple(np.zeros(part.shape, np.int32) for part in maps)
        return Found((), None if volume is None else np.zeros(len(volume.score), np.int32), nowhere)
    low = threshold - (1 - config.grow) * abs(threshold)
    if volume is None:
        labels = ndimage.label((maps[0] > low) & prepared.views.foregrounds[0], np.ones((3, 3)))[0]
        named = {number: _flat(labels == number, maps[0], prepared.views.sample.views[0].name)
                 for number in range(1, labels.max() + 1)}  # fmt: skip
        return _listed(named, None, [labels], threshold, config)
    chosen = volume.score > low
    labels = np.zeros(len(volume.score), np.int32)
    labels[chosen] = _components(volume.voxels.index[chosen], _reach(prepared, volume))
    highest = np.full(labels.max(initial=0) + 1, -np.inf)
    np.maximum.at(highest, labels, volume.score)
    labels[highest[labels] <= threshold] = 0
    kept = [int(number) for number in np.unique(labels[labels > 0])]
    pictures = _Pictures(model, prepared, volume, labels) if kept else None
    named = {number: pictures.defect(number, float(highest[number])) for number in kept}
    pixels = pictures.labels if kept else [np.zeros(part.shape, np.int32) for part in maps]
    return _listed(named, labels, pixels, threshold, config)


def _listed(
    named: dict[int, Defect], voxels: np.ndarray | None, pixels: Sequence[np.ndarray], threshold: float,
    config: DefectConfig,
) -> Found:  # fmt: skip
    """The largest scores first, and the labels numbered like them."""
    large = [(number, one) for number, one in named.items() if one.score > threshold and one.area >= config.least_mm2]
    large = sorted(large, key=lambda pair: -pair[1].score)[: config.limit]
    renumbered = np.zeros(max(named, default=0) + 1, np.int32)
    for place, (number, _) in enumerate(large, 1):
        renumbered[number] = place
    return Found(
        tuple(one for _, one in large),
        None if voxels is None else renumbered[voxels],
        tuple(renumbered[part] for part in pixels),
    )


def pixel_pitch(views: Views) -> float:
    """Median distance of neighbouring pixels on an instance, metres, over its views."""
    found = [
        np.median(depth.depth[mask]) / min(camera.matrix[0, 0], camera.matrix[1, 1])
        for camera, depth, mask in zip(views.cameras, views.depths, views.foregrounds, strict=True)
    ]
    return float(np.median(found))


def _reach(prepared: Prepared, volume: ScoredVolume) -> int:
    """Voxels along an edge of a cube in which neighbouring pixels meet."""
    return max(1, int(np.ceil(NEAR * pixel_pitch(prepared.views) / volume.voxels.size)))


def _components(index: np.ndarray, reach: int) -> np.ndarray:
    """Component (n,) from 1 of each voxel (n, 3): those whose cubes of ``reach`` voxels touch belong together."""
    if not len(index):
        return np.zeros(0, np.int32)
    cubes, owner = np.unique(index // reach, axis=0, return_inverse=True)
    return label_components(cubes)[owner.ravel()]


def _flat(here: np.ndarray, scores: np.ndarray, view: str) -> Defect:
    """A region (height, width) bool of a view without a camera."""
    rows, columns = np.nonzero(here)
    places = np.stack([columns, rows], 1)
    return Defect(
        float(scores[here].max()), "pixels", _told(places.mean(0)), _told(np.ptp(places, axis=0) + 1),
        float(len(places)), (view,),
    )  # fmt: skip


class _Pictures:
    """Which region each pixel of each view belongs to, and what pixels measure."""

    def __init__(self, model: Model, prepared: Prepared, volume: ScoredVolume, label: np.ndarray):
        views, grid = prepared.views, volume.voxels
        motion = np.eye(4) if prepared.motion is None else prepared.motion.matrix
        keys = np.ravel_multi_index(grid.index.T.astype(np.int64), grid.shape)
        self.names = [view.name for view in views.sample.views]
        self.labels, self.points, self.areas = [], [], []
        for camera, depth, mask in zip(views.cameras, views.depths, views.foregrounds, strict=True):
            rows, columns = np.nonzero(mask)
            measured = lift(camera, np.stack([columns, rows], 1), depth.depth[mask])
            points = measured @ motion[:3, :3].T + motion[:3, 3]
            places = np.floor((points - grid.origin) / grid.size).astype(np.int64)
            inside = ((places >= 0) & (places < grid.shape)).all(1)
            flat = np.ravel_multi_index(np.where(inside[:, None], places, 0).T, grid.shape)
            at = np.minimum(np.searchsorted(keys, flat), len(keys) - 1)
            found = np.where(inside & (keys[at] == flat), label[at], 0)
            picture = np.zeros(mask.shape, np.int32)
            picture[mask] = found
            self.labels.append(picture)
            self.points.append(points[found > 0])
            self.areas.append(_areas(camera, depth, picture > 0))
        self.deviations = _deviations(model, prepared)

    def defect(self, number: int, score: float) -> Defect:
        points, areas = [], []
        for picture, seen, area in zip(self.labels, self.points, self.areas, strict=True):
            here = picture[picture > 0] == number
            points.append(seen[here])
            areas.append(float(area[here].sum()))
        order = [view for view in np.argsort(areas)[::-1] if len(points[view])]
        together = 1000 * np.concatenate(points)
        low, high = together.min(0), together.max(0)
        measured: dict[str, Any] = {} if self.deviations is None else _measured(self, number, order)
        return Defect(
            score, "mm", _told((low + high) / 2), _told(high - low), round(1e6 * areas[order[0]], 4),
            tuple(self.names[view] for view in order), **measured,
        )  # fmt: skip


def _told(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


def _areas(camera: Any, depth: Any, chosen: np.ndarray) -> np.ndarray:
    """Surface (n,) that each of the chosen pixels covers, square metres, in row-major order."""
    rows, columns = np.nonzero(chosen)
    if not len(rows):
        return np.zeros(0)
    normals, known = surface_normals(camera, depth)
    rays = lift(camera, np.stack([columns, rows], 1), np.ones(len(rows))) - camera.camera_to_world[:3, 3]
    cosine = np.abs((rays * normals[chosen]).sum(1)) / np.linalg.norm(rays, axis=1)
    cosine = np.where(known[chosen], np.maximum(cosine, STEEPEST), 1.0)
    # A pixel sees z² / (fx fy) of a plane that faces the camera's axis; rays have z = 1.
    facing = np.square(depth.depth[chosen].astype(np.float64)) / (camera.matrix[0, 0] * camera.matrix[1, 1])
    return facing / (np.linalg.norm(rays, axis=1) * cosine)


def _deviations(model: Model, prepared: Prepared) -> tuple[list[np.ndarray], list[np.ndarray], list[int]] | None:
    """Signed distances, where they are known, and the step between their pixels, of each view."""
    if not hasattr(model.method, "deviations"):
        return None
    signed, known = model.method.deviations(model.head, prepared.views)
    steps = [-(-mask.shape[0] // part.shape[0]) for mask, part in zip(prepared.views.foregrounds, signed, strict=True)]
    return signed, known, steps


def _measured(pictures: _Pictures, number: int, order: list[int]) -> dict[str, Any]:
    """Deviation with its interval and volume of a region, from the views that show it."""
    found = []  # volume, highest and lowest mean of a square of pixels, their noise and usual size elsewhere
    for view in order:
        signed, known = pictures.deviations[0][view], pictures.deviations[1][view]
        step = pictures.deviations[2][view]
        picture = pictures.labels[view][::step, ::step]
        here = (picture == number) & known
        if np.count_nonzero(here) < PEAK**2:
            continue
        whole = ndimage.uniform_filter(here.astype(np.float64), PEAK, mode="constant") > 1 - 1e-9
        mean = ndimage.uniform_filter(np.where(known, signed, 0), PEAK, mode="constant")
        inner = mean[whole if whole.any() else here]
        elsewhere = mean[ndimage.uniform_filter((known & (picture == 0)).astype(np.float64), PEAK) > 1 - 1e-9]
        noise, usual = 0.0, 0.0
        if len(elsewhere):
            noise = MAD * float(np.median(np.abs(elsewhere - np.median(elsewhere))))
            usual = float(np.quantile(np.abs(elsewhere), USUAL))
        area = np.zeros(pictures.labels[view].shape)
        area[pictures.labels[view] > 0] = pictures.areas[view]
        volume = step * step * float((signed * area[::step, ::step])[here].sum())
        found.append((volume, inner.max(), inner.min(), noise, usual))
    if not found:
        return {}
    # Views that see a dent from the side miss its bottom: the one that shows most of it counts.
    volume = max((row[0] for row in found), key=abs)
    peaks = [row[1] if volume > 0 else row[2] for row in found]
    best = int(np.argmax(np.abs(peaks)))
    if abs(peaks[best]) <= found[best][4]:
        return {}  # what stands out is the image: the surface is as it is elsewhere
    deviation, error = 1000 * float(peaks[best]), 1000 * LEVEL * found[best][3]
    interval = _told(np.array([deviation - error, deviation + error]))
    return {"deviation": round(deviation, 4), "interval": interval, "volume": round(1e9 * volume, 4)}
