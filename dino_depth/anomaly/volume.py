"""2D anomaly maps to an anomaly volume: upsampled, masked, projected with depth and camera, reduced by maximum.

A volume is sparse: only voxels that some foreground pixel falls into are kept, all others are empty. Memory grows with
the number of occupied voxels and with one view, not with the grid or the number of views. A voxel's score is the
maximum over all its pixels in all views (ModMap, section 3.2.4); modalities are combined in 2D before that, which for
the maximum is the same (table 10). The score of the instance is the maximum of its volume.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dino_depth.anomaly.dataset import Sample, Truth, Voxels, named
from dino_depth.anomaly.geometry import SquareFit, lift, resize_camera
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError

__all__ = ["Aggregation", "ScoredVolume", "VoxelConfig", "accumulate", "combine", "truth_voxels"]

Aggregation = Literal["max", "min", "prod", "mean"]
COMBINE = {"max": torch.amax, "min": torch.amin, "prod": torch.prod, "mean": torch.mean}
LARGEST_GRID = 2**32  # voxels: a place in the grid and a score share 64 bits


@dataclass
class VoxelConfig:
    """The grid of the volume, and how modalities meet.

    Attributes:
        size_mm: edge of a voxel, millimetres; SiM3D's is 2.
        extent: ``truth`` is the grid of the ground truth where there is one, else ``union``; ``union`` is the bounding
            box of all points and of the ground truth, and ``margin_mm`` around it; ``cube`` is one cube of ``cube_mm``
            around the origin of the world. The published grid is unknown, and V-AUPRO with empty voxels as normals
            depends on it.
        margin_mm: of ``union``, millimetres.
        cube_mm: edge of ``cube``, millimetres.
        aggregation: of the modalities' maps before they are projected (ModMap, table 10).
    """

    size_mm: float = 2.0
    extent: Literal["truth", "union", "cube"] = "truth"
    margin_mm: float = 20.0
    cube_mm: float = 1000.0
    aggregation: Aggregation = "max"

    def __post_init__(self):
        for key in ("size_mm", "cube_mm"):
            if not getattr(self, key) > 0:
                raise ConfigError(f"{key}: must be positive, got {getattr(self, key)}")
        if self.margin_mm < 0:
            raise ConfigError(f"margin_mm: must not be negative, got {self.margin_mm}")


@dataclass(frozen=True, eq=False)
class ScoredVolume:
    """An anomaly volume.

    Attributes:
        voxels: the occupied ones (n of them).
        score: (n,) float32.
        views: (n,) int32, in how many views each was seen.
        outside: share of the foreground pixels that fell outside the grid.
    """

    voxels: Voxels
    score: np.ndarray
    views: np.ndarray
    outside: float

    @property
    def instance_score(self) -> float:
        return float(self.score.max())


def combine(maps: dict[str, torch.Tensor], view: int, foreground: np.ndarray, aggregation: Aggregation) -> np.ndarray:
    """One view's map at native resolution, (height, width) float32, 0 off the foreground.

    Args:
        maps: of each modality, (views, n, n) over the padded square.
        foreground: (height, width) bool.

    Raises:
        DataError: there is no map, or a score on the foreground is not finite.
    """
    if not maps:
        raise DataError("no anomaly map to combine")
    native = torch.stack(
        [
            SquareFit(*foreground.shape, part.shape[-1]).unfit(part[view].detach().cpu().float())
            for _, part in sorted(maps.items())
        ]
    )
    scores = COMBINE[aggregation](native, dim=0).numpy()
    if not np.isfinite(scores[foreground]).all():
        raise DataError(f"anomaly maps {', '.join(sorted(maps))} hold scores that are not finite in view {view}")
    return np.where(foreground, scores, np.float32(0))


def accumulate(
    maps: dict[str, torch.Tensor],
    sample: Sample,
    depths: Sequence[DepthMap],
    foregrounds: Sequence[np.ndarray],
    config: VoxelConfig,
    truth: Truth | None = None,
) -> ScoredVolume:
    """The anomaly volume of a sample.

    Args:
        maps: of each modality, (views, n, n) over the padded square, larger is more anomalous.
        depths: one map of each view.
        foregrounds: (height, width) bool of each view; pixels without valid depth are left out in any case.
        truth: what the grid must hold.

    Raises:
        DataError: numbers of views differ, a view has no camera, scores are not finite, the grid would be too large,
            or no pixel falls into it.
    """
    counts = {len(sample.views), len(depths), len(foregrounds), *(len(part) for part in maps.values())}
    if len(counts) > 1:
        raise DataError(f"{sample.name}: {len(sample.views)} views, but parts for {sorted(counts)} of them")
    if any(view.camera is None for view in sample.views):
        raise DataError(f"{sample.name}: a view without a camera cannot be projected")
    seen = [depth.valid & mask for depth, mask in zip(depths, foregrounds, strict=True)]
    grid = _grid(sample, depths, seen, config, truth)
    keys, score, views = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int32)
    pixels = inside = 0
    for view, mask in enumerate(seen):
        flat = combine(maps, view, mask, config.aggregation)[mask]
        places, within = _place(_points(sample, view, depths[view], mask), grid)
        here, best = _highest(places, flat[within])
        pixels, inside = pixels + len(flat), inside + len(places)
        counted = np.concatenate([keys, here])
        keys, score, views = _merge(counted, np.concatenate([score, best]), np.concatenate([views, np.ones_like(here)]))
    if not len(keys):
        raise DataError(
            f"{sample.name}: none of {pixels} foreground pixels falls into the grid {grid.shape} of {grid.size} m at "
            f"{grid.origin.tolist()}: extent {config.extent} or the calibration does not fit"
        )
    occupied = Voxels(grid.origin, grid.size, grid.shape, _unravel(keys, grid))
    return ScoredVolume(occupied, score, views.astype(np.int32), 1 - inside / pixels)


def _points(sample: Sample, view: int, depth: DepthMap, mask: np.ndarray) -> np.ndarray:
    """World points (n, 3) of the pixels of a mask."""
    seen = sample.views[view]
    camera = named(f"{sample.name} view {seen.name}", resize_camera, seen.camera, *mask.shape)
    rows, columns = np.nonzero(mask)
    return lift(camera, np.stack([columns, rows]).T, depth.depth[mask])


def _grid(
    sample: Sample, depths: Sequence[DepthMap], seen: list[np.ndarray], config: VoxelConfig, truth: Truth | None
) -> Voxels:
    """The grid, without any voxel."""
    size = config.size_mm / 1000
    if config.extent == "truth" and truth is not None and truth.voxels is not None:
        origin, size, shape = truth.voxels.origin, truth.voxels.size, truth.voxels.shape
    elif config.extent == "cube":
        edge = config.cube_mm / 1000
        origin, shape = np.full(3, -edge / 2), (int(np.ceil(edge / size - 1e-9)),) * 3
    else:
        boxes = []
        for view, mask in enumerate(seen):
            if mask.any():
                points = _points(sample, view, depths[view], mask)
                boxes.append((points.min(0), points.max(0)))
        if not boxes:
            raise DataError(f"{sample.name}: no view shows any foreground")
        if truth is not None:
            points = _truth_points(truth, sample, depths)
            boxes += [(points.min(0), points.max(0))] if len(points) else []
        low, high = np.min([box[0] for box in boxes], 0), np.max([box[1] for box in boxes], 0)
        # On multiples of the voxel, so that a few stray points do not move every voxel.
        first = np.floor((low - config.margin_mm / 1000) / size)
        shape = tuple(int(count) for count in np.floor((high + config.margin_mm / 1000) / size) - first + 1)
        origin = first * size
    # Python's integers do not overflow.
    if int(shape[0]) * int(shape[1]) * int(shape[2]) > LARGEST_GRID:
        raise DataError(
            f"{sample.name}: a grid of {'x'.join(map(str, shape))} voxels of {size * 1000:g} mm is too large: the "
            f"points of its views spread over {size * max(shape):.3g} m; check the calibration, or size_mm"
        )
    return Voxels(origin, size, shape, np.empty((0, 3), np.int32))


def _place(points: np.ndarray, grid: Voxels) -> tuple[np.ndarray, np.ndarray]:
    """Places in the flattened grid (k,) int64 of those points (n, 3) that lie in it, and which do, (n,) bool."""
    index = np.floor((points.T - grid.origin[:, None]) / grid.size)
    within = ((index >= 0) & (index < np.array(grid.shape)[:, None])).all(0)
    x, y, z = index[:, within].astype(np.int64)
    return (x * grid.shape[1] + y) * grid.shape[2] + z, within


def _highest(places: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct places, ascending, and the maximum score at each.

    Sorting one integer, made of the place and of the score's bits, is several times faster than an argsort.
    """
    # Adding 0 turns -0 into 0. Positive floats order like their bits, negative ones the other way round.
    bits = (scores.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    packed = np.sort(places.astype(np.uint64) << np.uint64(32) | ordered)
    found = packed >> np.uint64(32)
    packed = packed[np.append(found[1:] != found[:-1], np.ones(min(len(found), 1), bool))]
    ordered = (packed & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    bits = np.where(ordered >> 31, ordered & np.uint32(0x7FFFFFFF), ~ordered)
    return (packed >> np.uint64(32)).astype(np.int64), bits.view(np.float32)


def _merge(keys: np.ndarray, score: np.ndarray, views: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Maximum of the scores and sum of the views of equal keys, ascending."""
    order = np.argsort(keys, kind="stable")
    keys, score, views = keys[order], score[order], views[order]
    start = np.flatnonzero(np.append(np.ones(min(len(keys), 1), bool), keys[1:] != keys[:-1]))
    if not len(start):
        return keys, score, views
    return keys[start], np.maximum.reduceat(score, start), np.add.reduceat(views, start)


def truth_voxels(
    truth: Truth, sample: Sample, depths: Sequence[DepthMap], grid: Voxels
) -> tuple[Voxels, np.ndarray | None]:
    """The anomalous voxels of a sample in a volume's grid, for ``dino_depth.anomaly.regions.voxel_regions``.

    Voxels of another grid go where their centres lie, points into their voxel, and masks are projected through the
    depth of their view, so that what a sensor missed there is no ground truth.

    Returns:
        The voxels, n of them, and the component of each, (n,) int32 from 1; None where the ground truth names none.

    Raises:
        DataError: some of it lies outside the grid.
    """
    points = _truth_points(truth, sample, depths)
    places, within = _place(points, grid)
    if not within.all():
        raise DataError(
            f"{sample.name}: {np.count_nonzero(~within)} of {len(within)} places of the ground truth lie outside the "
            f"grid {grid.shape} of {grid.size} m: extent, cube_mm or the ground truth's unit does not fit"
        )
    keys, first = np.unique(places, return_index=True)
    voxels = Voxels(grid.origin, grid.size, grid.shape, _unravel(keys, grid))
    return voxels, None if truth.component is None else truth.component[first].astype(np.int32)


def _truth_points(truth: Truth, sample: Sample, depths: Sequence[DepthMap]) -> np.ndarray:
    """World points (n, 3) of what is anomalous."""
    if truth.kind == "voxels":
        return truth.voxels.centers
    if truth.kind == "points":
        return truth.points
    masks = [depth.valid & mask for depth, mask in zip(depths, truth.masks, strict=True)]
    return np.concatenate([_points(sample, view, depths[view], mask) for view, mask in enumerate(masks)])


def _unravel(keys: np.ndarray, grid: Voxels) -> np.ndarray:
    return np.stack(np.unravel_index(keys, grid.shape), 1).astype(np.int32).reshape(-1, 3)
