"""2D anomaly maps to an anomaly volume: upsampled, masked, projected with depth and camera, reduced by maximum.

A volume is sparse: only voxels that some foreground pixel falls into are kept, all others are empty. Memory grows with
the number of occupied voxels and with one view, not with the grid or the number of views. A voxel's score is the
maximum over all its pixels in all views (ModMap, section 3.2.4); modalities are combined in 2D before that, which for
the maximum is the same (table 10). The score of the instance is the maximum of its volume.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from dino_depth.anomaly.dataset import Sample, Truth, Voxels, named
from dino_depth.anomaly.geometry import SquareFit, lift_mask, resize_camera
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError

__all__ = [
    "Aggregation", "Maps", "ScoredVolume", "VoxelConfig", "accumulate", "accumulate_each", "check_size", "class_grid",
    "combine", "scored_points", "truth_voxels",
]  # fmt: skip

Aggregation = Literal["max", "min", "prod", "mean"]
Maps = dict[str, torch.Tensor]  # of each modality, (views, n, n) over the padded square
COMBINE = {"max": torch.amax, "min": torch.amin, "prod": torch.prod, "mean": torch.mean}
SIZE_MM = 2.0  # of a voxel, as SiM3D has it
LARGEST_GRID = 2**32  # voxels: a place in the grid and a score share 64 bits


@dataclass
class VoxelConfig:
    """The grid of the volume, and how modalities meet.

    Attributes:
        size_mm: edge of a voxel, millimetres; empty: that of the ground truth's grid, where that is used, else 2, as
            SiM3D has it.
        extent: ``truth`` is the grid of the class's ground truth where that has one, else ``union``; ``union`` is the
            bounding box of the training instances' points and ``margin_mm`` around it; ``cube`` is one cube of
            ``cube_mm`` around the origin of the world. All instances of a class share the grid, see ``class_grid``.
            The published grid is unknown, and V-AUPRO with empty voxels as normals depends on it.
        margin_mm: of ``union``, millimetres.
        cube_mm: edge of ``cube``, millimetres.
        aggregation: of the modalities' maps before they are projected (ModMap, table 10).
        points: also write each view as a cloud of scored points, ``<instance>.<view>.ply``, as SGANet projects.
    """

    size_mm: float | None = None
    extent: Literal["truth", "union", "cube"] = "truth"
    margin_mm: float = 20.0
    cube_mm: float = 1000.0
    aggregation: Aggregation = "max"
    points: bool = False

    def __post_init__(self):
        for key in ("size_mm", "cube_mm"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"{key}: must be positive, got {value}")
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


def combine(
    maps: Maps,
    view: int,
    foreground: np.ndarray,
    aggregation: Aggregation,
    down: slice = slice(None),
    across: slice = slice(None),
) -> np.ndarray:
    """One view's map at native resolution, (height, width) float32, 0 off the foreground.

    Args:
        maps: of each modality, (views, n, n) over the padded square.
        foreground: (height, width) bool.
        down, across: rows and columns that are asked for; all.

    Raises:
        DataError: there is no map, or a score on the foreground is not finite.
    """
    if not maps:
        raise DataError("no anomaly map to combine")
    native = torch.stack(
        [
            SquareFit(*foreground.shape, part.shape[-1]).unfit(part[view].detach().cpu().float(), down, across)
            for _, part in sorted(maps.items())
        ]
    )
    scores, shown = COMBINE[aggregation](native, dim=0).numpy(), foreground[down, across]
    if not np.isfinite(scores[shown]).all():
        raise DataError(f"anomaly maps {', '.join(sorted(maps))} hold scores that are not finite in view {view}")
    return np.where(shown, scores, np.float32(0))


def accumulate(
    maps: Maps,
    sample: Sample,
    depths: Sequence[DepthMap],
    foregrounds: Sequence[np.ndarray],
    config: VoxelConfig,
    truth: Truth | None = None,
    grid: Voxels | None = None,
) -> ScoredVolume:
    """The anomaly volume of a sample.

    Args:
        maps: of each modality, (views, n, n) over the padded square, larger is more anomalous.
        depths: one map of each view.
        foregrounds: (height, width) bool of each view; pixels without valid depth are left out in any case.
        truth: of the sample.
        grid: of the class; empty: one for this sample alone, which holds its ground truth.

    Raises:
        DataError: numbers of views differ, a view has no camera, scores are not finite, the grid would be too large,
            or no pixel falls into it.
    """
    return accumulate_each([maps], sample, depths, foregrounds, config, truth, grid)[0]


def accumulate_each(
    scorers: Sequence[Maps],
    sample: Sample,
    depths: Sequence[DepthMap],
    foregrounds: Sequence[np.ndarray],
    config: VoxelConfig,
    truth: Truth | None = None,
    grid: Voxels | None = None,
) -> list[ScoredVolume]:
    """The volumes of several scorers, whose pixels are lifted and placed once; as ``accumulate`` of each."""
    counts = {
        len(sample.views),
        len(depths),
        len(foregrounds),
        *(len(part) for maps in scorers for part in maps.values()),
    }
    if len(counts) > 1:
        raise DataError(f"{sample.name}: {len(sample.views)} views, but parts for {sorted(counts)} of them")
    if any(view.camera is None for view in sample.views):
        raise DataError(f"{sample.name}: a view without a camera cannot be projected")
    seen = [depth.valid & mask for depth, mask in zip(depths, foregrounds, strict=True)]
    grid = _grid(sample, depths, seen, config, truth) if grid is None else _own_grid(grid, sample, config, truth)
    keys, views = np.empty(0, np.int64), np.empty(0, np.int32)
    scores = [np.empty(0, np.float32) for _ in scorers]
    pixels = inside = 0
    for view, mask in enumerate(seen):
        runs, tops = [np.empty(0, np.int64)], [[np.empty(0, np.float32)] for _ in scorers]
        for down, across, points in _lifted(sample, view, depths[view], mask):
            places, within = _place(points.T, grid)
            pixels, inside = pixels + points.shape[1], inside + len(places)
            # Neighbouring pixels mostly share a voxel: their maximum is taken before anything is sorted.
            start = np.flatnonzero(np.diff(places, prepend=-1))
            if len(start):
                runs.append(places[start])
            shown = mask[down, across]
            for maps, found in zip(scorers, tops, strict=True):
                flat = combine(maps, view, mask, config.aggregation, down, across)[shown]
                if len(start):
                    found.append(np.maximum.reduceat(flat[within], start))
        run = np.concatenate(runs)
        bests = [_highest(run, np.concatenate(found)) for found in tops]
        here = bests[0][0]
        counted = np.concatenate([keys, here])
        order = np.argsort(counted, kind="stable")
        counted = counted[order]
        start = np.flatnonzero(np.append(np.ones(min(len(counted), 1), bool), counted[1:] != counted[:-1]))
        if len(start):
            keys = counted[start]
            views = np.add.reduceat(np.concatenate([views, np.ones(len(here), np.int32)])[order], start)
            joined = (np.concatenate([score, best])[order] for score, (_, best) in zip(scores, bests, strict=True))
            scores = [np.maximum.reduceat(both, start) for both in joined]
    if not len(keys):
        raise DataError(
            f"{sample.name}: none of {pixels} foreground pixels falls into the grid {grid.shape} of {grid.size} m at "
            f"{grid.origin.tolist()}: extent {config.extent} or the calibration does not fit"
        )
    occupied = Voxels(grid.origin, grid.size, grid.shape, _unravel(keys, grid))
    return [ScoredVolume(occupied, score, views.astype(np.int32), 1 - inside / pixels) for score in scores]


def scored_points(
    maps: Maps, sample: Sample, depths: Sequence[DepthMap], foregrounds: Sequence[np.ndarray], aggregation: Aggregation
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each view's pixels in the world, (n, 3) metres, and their scores (n,) float32; arguments as of ``accumulate``."""
    for view, (depth, foreground) in enumerate(zip(depths, foregrounds, strict=True)):
        mask = depth.valid & foreground
        points, scores = [np.empty((3, 0))], [np.empty(0, np.float32)]
        for down, across, lifted in _lifted(sample, view, depth, mask):
            points.append(lifted)
            scores.append(combine(maps, view, mask, aggregation, down, across)[mask[down, across]])
        yield np.concatenate(points, 1).T, np.concatenate(scores)


def _points(sample: Sample, view: int, depth: DepthMap, mask: np.ndarray) -> np.ndarray:
    """World points (n, 3) of the pixels of a mask."""
    return np.concatenate([np.empty((3, 0)), *(part for *_, part in _lifted(sample, view, depth, mask))], 1).T


def _lifted(sample: Sample, view: int, depth: DepthMap, mask: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """As ``geometry.lift_mask``, of a view."""
    seen = sample.views[view]
    camera = named(f"{sample.name} view {seen.name}", resize_camera, seen.camera, *mask.shape)
    return lift_mask(camera, depth.depth, mask)


def check_size(config: VoxelConfig, truth: Truth | None, place: str):
    """Refuses a size of voxels beside that of the ground truth's grid, which would not be applied.

    Raises:
        ConfigError: both are there and differ.
    """
    if config.extent != "truth" or config.size_mm is None or truth is None or truth.voxels is None:
        return
    size = 1000 * truth.voxels.size
    if abs(size - config.size_mm) > 1e-6 * size:
        raise ConfigError(
            f"volume.size_mm {config.size_mm:g}: the ground truth of {place} has voxels of {size:g} mm, whose grid "
            "volume.extent truth takes: leave size_mm out, or set volume.extent union"
        )


def class_grid(
    config: VoxelConfig, train: Iterable[tuple[Sample, int, DepthMap, np.ndarray]], truths: Iterable[Truth | None]
) -> Voxels:
    """The grid of all instances of a class, without any voxel: good and anomalous ones count the same empty voxels.

    Args:
        train: sample, view, depth map and foreground (height, width) bool of every view of the training instances; read
            only where the extent follows from them.
        truths: of the anomalous instances, in order; read up to the first that is there where that decides.

    Raises:
        DataError: no view shows anything, or the grid would be too large.
    """
    size = _size(config)
    if config.extent == "cube":
        return _cube(config)
    known = []
    for truth in truths:
        if truth is None or truth.kind == "masks":
            continue
        if config.extent == "truth" and truth.voxels is not None:
            return Voxels(truth.voxels.origin, truth.voxels.size, truth.voxels.shape, np.empty((0, 3), np.int32))
        known.append(truth.points if truth.voxels is None else truth.voxels.centers)
    name, boxes = "", [(points.min(0), points.max(0)) for points in known if len(points)]
    for sample, view, depth, mask in train:
        name, seen = sample.name, depth.valid & mask
        if seen.any():
            points = _points(sample, view, depth, seen)
            boxes.append((points.min(0), points.max(0)))
    return _union(boxes, size, config.margin_mm / 1000, name)


def _size(config: VoxelConfig) -> float:
    """Edge of a voxel, metres, where no ground truth gives it."""
    return (SIZE_MM if config.size_mm is None else config.size_mm) / 1000


def _own_grid(grid: Voxels, sample: Sample, config: VoxelConfig, truth: Truth | None) -> Voxels:
    """The class's grid where a sample's own ground truth has it; it may lie elsewhere, but not be another one."""
    if config.extent != "truth" or truth is None or truth.voxels is None:
        return grid
    own = truth.voxels
    if own.shape != grid.shape or abs(own.size - grid.size) > 1e-9 * grid.size:
        mine, others = ("x".join(map(str, part.shape)) + f" of {1000 * part.size:g} mm" for part in (own, grid))
        raise DataError(
            f"{sample.name}: its ground truth has a grid of {mine}, that of its class {others}: V-AUPRO depends on the "
            "grid, so a class has one: set volume.extent union or cube"
        )
    return Voxels(own.origin, grid.size, grid.shape, grid.index)


def _grid(
    sample: Sample, depths: Sequence[DepthMap], seen: list[np.ndarray], config: VoxelConfig, truth: Truth | None
) -> Voxels:
    """The grid of a sample by itself."""
    check_size(config, truth, sample.name)
    if config.extent == "truth" and truth is not None and truth.voxels is not None:
        return Voxels(truth.voxels.origin, truth.voxels.size, truth.voxels.shape, np.empty((0, 3), np.int32))
    if config.extent == "cube":
        return _cube(config)
    boxes = []
    for view, mask in enumerate(seen):
        if mask.any():
            points = _points(sample, view, depths[view], mask)
            boxes.append((points.min(0), points.max(0)))
    if truth is not None and boxes:
        points = _truth_points(truth, sample, depths)
        boxes += [(points.min(0), points.max(0))] if len(points) else []
    return _union(boxes, _size(config), config.margin_mm / 1000, sample.name)


def _cube(config: VoxelConfig) -> Voxels:
    edge, size = config.cube_mm / 1000, _size(config)
    return _checked(np.full(3, -edge / 2), size, (int(np.ceil(edge / size - 1e-9)),) * 3, "volume.extent cube")


def _union(boxes: list[tuple[np.ndarray, np.ndarray]], size: float, margin: float, name: str) -> Voxels:
    """The grid around boxes, on multiples of the voxel, so that a few stray points do not move every voxel."""
    if not boxes:
        raise DataError(f"{name}: no view shows any foreground")
    low, high = np.min([box[0] for box in boxes], 0), np.max([box[1] for box in boxes], 0)
    first = np.floor((low - margin) / size)
    shape = tuple(int(count) for count in np.floor((high + margin) / size) - first + 1)
    return _checked(first * size, size, shape, name)


def _checked(origin: np.ndarray, size: float, shape: tuple[int, int, int], name: str) -> Voxels:
    # Python's integers do not overflow.
    if int(shape[0]) * int(shape[1]) * int(shape[2]) > LARGEST_GRID:
        raise DataError(
            f"{name}: a grid of {'x'.join(map(str, shape))} voxels of {size * 1000:g} mm is too large: the points of "
            f"its views spread over {size * max(shape):.3g} m; check the calibration, or size_mm"
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
            f"grid {grid.shape} of {grid.size} m: extent, margin_mm, cube_mm or the ground truth's unit does not fit"
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
