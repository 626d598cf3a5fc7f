"""Scores separated into normals and the components of the ground truth: what the metrics of `metrics` are counted from.

A sample is separated once, its components labelled once; limits, pools and bootstrap resamples then reuse it. Dense
arrays go through `regions`, sparse volumes, whose empty voxels are only counted, through `voxel_regions`.

Traps: what ground truth means is never guessed. A boolean array is a mask, whose connected parts are the components;
integers are labels of components, and are refused where they look like a mask (a label in several parts, 0 and 255).
Three dimensions may be one volume or many images, which only ``connectivity`` or ``truth`` can say. A flat list of
elements has no neighbours and takes labels only. An empty element has score 0, which is the lowest one only where no
score is negative.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dino_depth.errors import ConfigError, DataError

__all__ = ["Meaning", "Regions", "coverage", "is_mask", "label_components", "matches", "regions", "voxel_regions"]

Meaning = Literal["auto", "mask", "labels"]
MOST_DIMENSIONS = 6
BLOCK = 2**16  # coordinates flattened at a time, so that they stay in the cache


@dataclass(frozen=True)
class Regions:
    """One sample's scores, separated into normals and components, as `regions` and `voxel_regions` return them.

    Attributes:
        normal: (n,) scores of the listed normals, in no order.
        normal_weight: (n,) of each, or None where all are 1.
        defect: (m,) scores of defect elements; the last ones stand for unlisted ones of score 0.
        component: (m,) component of each, 0 to components - 1.
        defect_weight: (m,) of each, float64.
        size: (components,) total weight of each, unlisted elements included.
        empty_normal: weight of normals of score 0 that are only counted.
        unlisted: weight of defect elements that are only counted.
    """

    normal: np.ndarray
    normal_weight: np.ndarray | None
    defect: np.ndarray
    component: np.ndarray
    defect_weight: np.ndarray
    size: np.ndarray
    empty_normal: float
    unlisted: float


def regions(
    scores: np.ndarray,
    ground_truth: np.ndarray,
    *,
    connectivity: int | None = None,
    normal: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    empty_normal: float = 0,
    empty_defect: np.ndarray | None = None,
    truth: Meaning = "auto",
) -> Regions:
    """Separates a sample's scores into normals and components. Arguments as of `metrics.aupro`; for sparse volumes:

    Args:
        scores: (n,) of the listed elements only.
        ground_truth: (n,) integer labels of them; a flat list has no neighbours, so no mask.
        empty_normal: number (or weight) of further normals. They and the following have score 0, wherever that lies
            among the scores: below all of them only where no score is negative.
        empty_defect: (C,) number (or weight) of further elements of component 1 to C.

    Raises:
        DataError, ConfigError: as `metrics.aupro`; a sample without normals or without components is none.
    """
    scores, given = _scores(scores), np.asarray(ground_truth)
    weight = None if weights is None else np.asarray(weights, np.float64)
    allowed = None if normal is None else np.asarray(normal)
    for name, array in (("ground_truth", given), ("normal", allowed), ("weights", weight)):
        if array is not None and array.shape != scores.shape:
            raise DataError(f"{name} has shape {array.shape}, the scores have {scores.shape}")
    if allowed is not None and allowed.dtype != bool:
        raise DataError(f"normal must be boolean, got {allowed.dtype}")
    if weight is not None and not (np.isfinite(weight) & (weight >= 0)).all():
        raise DataError("weights must be finite and not negative")
    is_normal = given == 0
    place = np.flatnonzero(~is_normal)
    if is_mask(given, connectivity, truth):
        if given.ndim < 2:
            raise DataError("a flat array has no neighbours: give integer labels of components, not a mask")
        label = label_components(np.stack(np.unravel_index(place, given.shape), 1), connectivity)
    else:
        if connectivity is not None:
            raise ConfigError(f"connectivity {connectivity} needs a boolean mask, got labels ({given.dtype})")
        label = given.reshape(-1)[place]
        if truth == "auto" and given.ndim > 1:
            _refuse_parts(given.shape, place, label)
    if allowed is not None:
        is_normal = is_normal & allowed
    counted = np.zeros(0) if empty_defect is None else np.asarray(empty_defect, np.float64)
    if empty_normal < 0 or (counted < 0).any():
        raise DataError(f"counts of empty elements must not be negative, got {min(empty_normal, *counted)}")
    normal_weight, mass = None, np.ones(len(place))
    if weight is not None:
        normal_weight, mass = weight[is_normal], weight.reshape(-1)[place]
    return _separated(
        (scores[is_normal], normal_weight, empty_normal), (scores.reshape(-1)[place], label, mass), counted
    )


def is_mask(ground_truth: np.ndarray, connectivity: int | None, truth: Meaning) -> bool:
    """Whether ground truth is a mask, whose components are to be found; else it labels them.

    Raises:
        DataError: it may be either, or of three dimensions and more, which nothing says to be a volume or images.
        ConfigError: no such ``truth``.
    """
    kind, shape = ground_truth.dtype.kind, ground_truth.shape
    if truth not in get_args(Meaning):
        raise ConfigError(f"truth must be one of {', '.join(get_args(Meaning))}, got {truth!r}")
    if kind not in "biu":
        raise DataError(f"ground_truth must be a boolean mask or integer labels, got {ground_truth.dtype}")
    mask = truth == "mask" or (truth == "auto" and kind == "b")
    if len(shape) > 2 and mask and connectivity is None:
        raise DataError(
            f"ground_truth {shape} may be one volume or many images: connectivity 26 (18, 6) says a volume, "
            "8 (4) images"
        )
    if len(shape) > 2 and truth == "auto" and kind != "b":
        raise DataError(f"integers of shape {shape}: say truth='labels' of components, or 'mask' and connectivity")
    return mask


def _refuse_parts(shape: tuple[int, ...], place: np.ndarray, label: np.ndarray):
    """Refuses labels of which one is in several parts, as integers of a mask are."""
    # Even steps along a further axis keep different labels apart, though they touch.
    index = np.stack((2 * label.astype(np.int64), *np.unravel_index(place, shape)), 1)
    part = label_components(index)
    labels, parts = np.unique(np.unique(np.stack((label, part)), axis=1)[0], return_counts=True)
    if len(parts) and parts.max() > 1:
        raise DataError(
            f"label {labels[parts.argmax()]} is in {parts.max()} parts: a mask must be boolean, or say truth='mask'; "
            "truth='labels' makes one component of them"
        )


def _separated(normal: tuple, defect: tuple[np.ndarray, np.ndarray, np.ndarray], counted: np.ndarray) -> Regions:
    """Regions of normals (scores, weights, weight of the empty ones), of defect elements (scores, labels, weights), and
    the weight of each component's unlisted elements."""
    score, label, mass = defect
    component = np.concatenate((label.astype(np.int64), np.arange(1, 1 + len(counted)))) - 1
    mass = np.concatenate((mass, counted))
    size = _sizes(component, mass)
    score = np.concatenate((score, np.zeros(len(counted), score.dtype)))
    listed, weight, empty = normal
    return Regions(listed, weight, score, component, mass, size, empty, float(counted.sum()))


def voxel_regions(
    index: np.ndarray,
    scores: np.ndarray,
    defects: np.ndarray,
    shape: Sequence[int],
    *,
    labels: np.ndarray | None = None,
    connectivity: int | None = None,
    empty_normal: int | None = None,
) -> Regions:
    """Separates a sparse volume, whose empty voxels have score 0 and are only counted.

    With empty voxels as normals (SiM3D's published floors imply it) scores of no information give about 1 - f / 2L,
    f <= L being the occupied share of the grid, if all defects are occupied; over occupied voxels only, L / 2.

    Args:
        index: (n, N) integer coordinates of the occupied voxels, each once; fastest in lexicographic order.
        scores: (n,) of them.
        defects: (m, N) integer coordinates of the ground truth, each once, on the same grid.
        shape: (N,) of the grid.
        labels: (m,) component of each defect voxel, 1 to C; by default connected ones are one component.
        connectivity: as of `metrics.aupro`, where labels are not given.
        empty_normal: how many empty voxels are normals: None all that are no defect ("all"), 0 none ("occupied"), or
            those that the caller counted, such as the observed ones.

    Raises:
        DataError: a coordinate lies outside the grid or occurs twice, shapes differ, or as `regions`.
        ConfigError: connectivity is impossible.
    """
    scores = _scores(scores)
    keys, order = _sorted_keys(index, shape, "index")
    if scores.shape != keys.shape:
        raise DataError(f"{len(keys)} occupied voxels, scores of shape {scores.shape}")
    if order is not None:
        scores = scores[order]
    if labels is None:
        labels = label_components(defects, connectivity)
    elif connectivity is not None:
        raise ConfigError(f"connectivity {connectivity} and labels were both given")
    labels = np.asarray(labels)
    defect_keys, order = _sorted_keys(defects, shape, "defects")
    count = len(defect_keys)
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be {count} integers, got {labels.dtype} of shape {labels.shape}")
    if count and not 1 <= labels.min() <= labels.max() <= count:
        raise DataError(f"labels must be 1 to C, got {labels.min()} to {labels.max()} of {count} voxels")
    if order is not None:
        labels = labels[order]
    place = np.searchsorted(keys, defect_keys)
    seen = matches(keys, place, defect_keys)
    place, unseen = place[seen], np.bincount(labels[~seen], minlength=labels.max(initial=0) + 1)[1:]
    is_normal = np.ones(len(keys), bool)
    is_normal[place] = False
    if empty_normal is None:
        empty_normal = math.prod(shape) - len(keys) - int(unseen.sum())
    if empty_normal < 0:
        raise DataError(f"counts of empty elements must not be negative, got {empty_normal}")
    defect = scores[place], labels[seen], np.ones(len(place))
    return _separated((scores[is_normal], None, empty_normal), defect, unseen)


def label_components(index: np.ndarray, connectivity: int | None = None) -> np.ndarray:
    """The connected component of each of m elements: (m,) int32, numbered from 1 in lexicographic order.

    Elements that follow each other along the last axis are one run, and only runs are compared: two of them meet where
    one, widened by what the connectivity allows and moved to the row of the other, overlaps it.

    Args:
        index: (m, N) integer coordinates, each once.
        connectivity: number of neighbours, as of `metrics.aupro`.

    Raises:
        DataError: an element occurs twice.
        ConfigError: no such connectivity exists in N dimensions.
    """
    index = np.asarray(index)
    if index.ndim != 2 or not np.issubdtype(index.dtype, np.integer):
        raise DataError(f"coordinates must be integers of shape (elements, N), got {index.dtype} {index.shape}")
    if index.shape[1] > MOST_DIMENSIONS:
        # Neighbours are 3^N: the rows of a mask, taken for coordinates, would fill the memory.
        raise DataError(f"coordinates in {index.shape[1]} dimensions: give np.argwhere of a mask, not the mask")
    index = index.astype(np.int64)
    steps, reach = _forward_steps(index.shape[1], connectivity)
    if not len(index):
        return np.zeros(0, np.int32)
    low = index.min(0)
    extent = index.max(0) - low + 2  # one more than it spans, so that no neighbour wraps round to another row
    keys, order = _sorted_keys(index - low, extent, "defects")
    starts = np.append(True, keys[1:] > keys[:-1] + 1)
    first, last = keys[starts], keys[np.append(starts[1:], True)]
    ones, others = [], []
    for step, wide in zip(steps @ np.cumprod(extent[:0:-1])[::-1], reach, strict=True):
        begin = np.searchsorted(last, first + (step - wide))
        count = np.searchsorted(first, last + (step + wide), "right") - begin
        ones.append(np.repeat(np.arange(len(first)), count))
        others.append(np.arange(count.sum()) + np.repeat(begin - (np.cumsum(count) - count), count))
    ones, others = (np.concatenate([np.empty(0, int), *parts]) for parts in (ones, others))
    graph = coo_array((np.ones(len(ones), bool), (ones, others)), (len(first), len(first)))
    run = connected_components(graph, directed=False)[1].astype(np.int32) + 1
    label = run[np.cumsum(starts) - 1]
    if order is None:
        return label
    unordered = np.empty_like(label)
    unordered[order] = label
    return unordered


def coverage(samples: Sequence[Regions]) -> float:
    """Share of the ground truth's elements that were observed: a score of 1 needs all of them.

    Raises:
        DataError: there is no ground truth.
    """
    total = sum(sample.size.sum() for sample in samples)
    if not total:
        raise DataError("no sample has a defect, so their coverage is undefined")
    return float(1 - sum(sample.unlisted for sample in samples) / total)


def _scores(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.dtype.kind not in "biuf":
        raise DataError(f"scores must be real numbers, got {scores.dtype}")
    if scores.dtype != np.float32:
        scores = scores.astype(np.float64, copy=False)
    if np.isnan(scores).any():
        raise DataError(f"scores hold {np.isnan(scores).sum()} NaN of {scores.size}")
    return scores


def _sizes(component: np.ndarray, mass: np.ndarray) -> np.ndarray:
    labels = np.unique(component) + 1
    if len(labels) and (labels[0] < 1 or labels[-1] > len(labels)):
        raise DataError(
            f"labels must be 0 and 1 to C, got {len(labels)} from {labels[0]} to {labels[-1]} (a mask is bool)"
        )
    size = np.bincount(component, mass)
    if not size.all():
        raise DataError(f"component {np.flatnonzero(size == 0)[0] + 1} has no element, or weight 0")
    return size


def _forward_steps(dimensions: int, connectivity: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Steps (rows, dimensions - 1) to the neighbouring rows along the last axis that follow in lexicographic order, and
    how far neighbours there may lie off along that axis, (rows,) 0 or 1."""
    steps = np.array(list(product((-1, 0, 1), repeat=dimensions - 1)), int)
    sizes = np.cumsum([math.comb(dimensions, moved) << moved for moved in range(1, dimensions + 1)])
    ranks = {int(size): rank for rank, size in enumerate(sizes, 1)}
    if connectivity is not None and connectivity not in ranks:
        raise ConfigError(f"connectivity must be one of {', '.join(map(str, ranks))}, got {connectivity}")
    rank = dimensions if connectivity is None else ranks[connectivity]
    steps = steps[len(steps) // 2 + 1 :]
    moved = np.abs(steps).sum(1)
    return steps[moved <= rank], (moved < rank)[moved <= rank].astype(int)


def _sorted_keys(index: np.ndarray, shape: Sequence[int], name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Ascending places in the flattened grid, and the order that sorts them if they were not sorted."""
    index = np.asarray(index)
    if index.ndim != 2 or index.shape[1] != len(shape) or not np.issubdtype(index.dtype, np.integer):
        raise DataError(f"{name} must be integers of shape (voxels, {len(shape)}), got {index.dtype} {index.shape}")
    keys, order = _flattened(index, tuple(map(int, shape)), name), None
    if not (keys[1:] > keys[:-1]).all():
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        if (keys[1:] == keys[:-1]).any():
            raise DataError(f"{name} hold an element twice")
    return keys, order


def _flattened(index: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Places in the flattened grid: ``np.ravel_multi_index`` in less than half the time, int32 on small grids."""
    if math.prod(shape) > 2**62:
        raise DataError(f"{name}: a grid of shape {shape} is too large")
    keys = np.zeros(len(index), np.int32 if math.prod(shape) < 2**31 else np.int64)
    for start in range(0, len(index), BLOCK):
        places = keys[start : start + BLOCK]
        for column, length in zip(np.ascontiguousarray(index[start : start + BLOCK].T), shape, strict=True):
            if column.view(f"u{column.itemsize}").max() >= length:  # negative ones become larger than any
                raise DataError(f"{name} leave the grid of shape {shape}")
            places *= length
            np.add(places, column, out=places, dtype=places.dtype, casting="unsafe")
    return keys


def matches(keys: np.ndarray, place: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether ``keys[place]`` is what is wanted, where a place may be past the end."""
    if not len(keys):
        return np.zeros(len(wanted), bool)
    return keys[np.minimum(place, len(keys) - 1)] == wanted
