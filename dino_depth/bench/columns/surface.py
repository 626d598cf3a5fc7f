"""Normals and curvature by a linear readout: ridge regression of a cell's feature, fitted on one half of the data and
asked about the other, then the other way round (:func:`dino_depth.bench.data.folds`)."""

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_depth.bench.columns import Figure
from dino_depth.bench.data import CELL, Source, covered, folds, units
from dino_depth.errors import DataError
from dino_depth.frozen.fpfh import points
from dino_depth.readout import Moments, fit_ridge
from dino_depth.surface import seen_geometry

__all__ = ["ASKED", "FIGURES", "PLACE", "figures", "measure", "missing"]

PLACE, ASKED = 1, "views"
FIGURES = {
    "normal": Figure("normal", "median error of a cell's normal by linear readout", "lower", 1, "degrees"),
    "normal_11": Figure("<11.25", "share of cells whose normal errs by less than 11.25 degrees"),
    "curvature": Figure("curv.", "R2 of a cell's mean curvature by linear readout"),
}
CLOSE = 11.25  # degrees
STEP = 0.1  # degrees: of the histogram that medians are read from, linear within a step
BINS = round(180 / STEP)
CHOOSING = 4  # one view in so many chooses the ridge penalty


@lru_cache(maxsize=4)
def targets(source: Source, size: int) -> tuple[Tensor, Tensor]:
    """(views, cells, 4) unit normal and curvature of each cell, and the cells that have both, (views, cells) bool."""
    found, usable = [], []
    for view in source.views:
        cloud = points(view.depth, size, view.camera.matrix)[None].double()
        value, has = seen_geometry(cloud, view.camera.matrix[0, 0] * size / max(view.depth.depth.shape), CELL)
        found.append(value.flatten(1, 2)[0])
        usable.append(has.flatten() & torch.from_numpy(covered(view, size)))
    values = torch.stack(found)
    values[..., :3] = F.normalize(values[..., :3], dim=-1)
    return values, torch.stack(usable)


def missing(source: Source, size: int) -> str:
    _, usable = targets(source, size)
    fold = torch.from_numpy(folds(source))
    for half in (0, 1):
        if (fold == half).sum() < 2 or not usable[fold == half].any():
            return "a half of the views has no two views with a measurable surface"
    return ""


def measure(source: Source, size: int, known: Tensor, asked: Tensor) -> Tensor:
    """(units, BINS + 5): histogram of angles; cells, close ones; of curvature its sum, squares and squared errors."""
    values, usable = targets(source, size)
    unit, fold = torch.from_numpy(units(source)), torch.from_numpy(folds(source))
    total = torch.zeros(int(unit.max()) + 1, BINS + 5, dtype=torch.float64)
    for half in (0, 1):
        fitted = torch.from_numpy(np.flatnonzero(fold == 1 - half))
        moments = [Moments(known.shape[-1], 4) for _ in range(2)]
        for place, view in enumerate(fitted):
            mask = usable[view]
            moments[place % CHOOSING == 1].add(known[view, mask], values[view, mask])
        try:
            weights = fit_ridge(*moments)
        except DataError:
            raise DataError(f"{source.name}: too few cells with a measurable surface for a readout") from None
        for view in np.flatnonzero(fold == half):
            mask = usable[view]
            predicted = asked[view, mask].double() @ weights[:-1] + weights[-1]
            total[unit[view]] += _sums(predicted, values[view, mask])
    return total


def _sums(predicted: Tensor, true: Tensor) -> Tensor:
    cosine = F.cosine_similarity(predicted[:, :3], true[:, :3], dim=1).clamp(-1, 1)
    angle = torch.rad2deg(cosine.acos())
    histogram = torch.bincount((angle / STEP).long().clamp(max=BINS - 1), minlength=BINS).double()
    curve, error = true[:, 3], predicted[:, 3] - true[:, 3]
    rest = torch.stack([
        torch.tensor(float(len(angle))), (angle < CLOSE).sum(), curve.sum(), curve.square().sum(), error.square().sum()
    ])  # fmt: skip
    return torch.cat([histogram, rest.double()])


def figures(sums: Tensor) -> dict[str, Tensor]:
    histogram, (count, close, total, squares, errors) = sums[..., :BINS], sums[..., BINS:].unbind(-1)
    below = histogram.cumsum(-1)
    half = count[..., None] / 2
    place = torch.searchsorted(below.contiguous(), half.contiguous()).clamp(max=BINS - 1)
    inside = histogram.gather(-1, place)
    before = below.gather(-1, place) - inside
    median = STEP * (place + (half - before) / inside.clamp_min(1e-12))[..., 0]
    return {
        "normal": torch.where(count > 0, median, math.nan),
        "normal_11": close / count,
        "curvature": 1 - errors / (squares - total.square() / count),
    }
