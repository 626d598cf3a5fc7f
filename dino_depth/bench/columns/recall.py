"""Cross-view recall@1: the most similar cell of another view of the scene is where the true pose says it is.

A cell of a view is asked about where its centre has depth. Its point is projected into the other view; it counts if it
lies within the image and not behind what that view measured there (``TOLERANCE`` of its depth), and has moved more than
``MOVED`` cells, so that an encoder cannot score by knowing only where in the image a cell lies. Among all cells of the
other view whose centre has depth, the one whose feature has the largest cosine is a hit if its centre is within
``NEAR`` cells of the projected point.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dino_depth.anomaly.geometry import SquareFit, lift, project
from dino_depth.bench.columns import Figure, centred
from dino_depth.bench.data import CELL, Source, View, cell_centers, covered, units
from dino_depth.errors import DataError

__all__ = ["ASKED", "FIGURES", "PLACE", "Pair", "correspond", "figures", "measure", "missing"]

PLACE, ASKED = 0, "views"
FIGURES = {"recall": Figure("recall", "cross-view recall@1 of cells by true pose")}
TOLERANCE = 0.015
MOVED, NEAR = 1.0, 1.0  # what has moved further than a hit may err is missed by its own place
PLAUSIBLE = 0.5  # share of projected points that agree where poses and intrinsics are right
FEWEST = 8  # queries that make a pair of views one that overlaps


@dataclass(frozen=True, eq=False)
class Pair:
    """Two views of a scene: ``queries`` (n,) are cells of the first, ``places`` (n, 2) where they are in the second, in
    cells, (0.5, 0.5) being the centre of the first; ``candidates`` are the cells of the second that are searched."""

    first: int
    second: int
    queries: np.ndarray
    places: np.ndarray
    candidates: np.ndarray


def correspond(first: View, second: View, size: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Cells of the first view, their places in the second, and how many points were projected into it and agreed."""
    pixels, _ = cell_centers(first, size)
    cells = np.flatnonzero(covered(first, size))
    pixels = pixels[cells]
    points = lift(first.camera, pixels, first.depth.depth[pixels[:, 1], pixels[:, 0]])
    found, depth = project(second.camera, points)
    height, width = second.depth.depth.shape
    with np.errstate(invalid="ignore"):
        nearest = np.rint(found)
        inside = ((nearest >= 0) & (nearest < (width, height))).all(1)
    nearest = np.where(inside[:, None], nearest, 0).astype(int)
    there = second.depth.depth[nearest[:, 1], nearest[:, 0]]
    measured = inside & (there > 0)
    agrees = measured & (np.abs(there - depth) <= TOLERANCE * np.abs(depth))
    places = (SquareFit(height, width, size).to_square(found) + 0.5) / CELL
    side = size // CELL
    from_places = np.stack([cells % side, cells // side], 1) + 0.5
    with np.errstate(invalid="ignore"):
        chosen = agrees & (np.linalg.norm(places - from_places, axis=1) > MOVED)
    return cells[chosen], places[chosen], (int(measured.sum()), int(agrees.sum()))


@lru_cache(maxsize=4)
def pairs(source: Source, size: int) -> tuple[Pair, ...]:
    """Every ordered pair of views of a scene that see enough in common; none where they hardly move.

    Raises:
        DataError: no two views overlap under their poses.
    """
    found, projected, agreed = [], 0, 0
    searched = [np.flatnonzero(cell_centers(view, size)[1]) for view in source.views]
    for first, one in enumerate(source.views):
        for second, other in enumerate(source.views):
            if first == second or one.scene != other.scene:
                continue
            queries, places, (inside, agrees) = correspond(one, other, size)
            projected, agreed = projected + inside, agreed + agrees
            if len(queries) >= FEWEST:
                found.append(Pair(first, second, queries, places, searched[second]))
    if not found and agreed < PLAUSIBLE * projected + FEWEST:
        raise DataError(
            f"{source.name}: no two views of a scene overlap: of {projected} points that fall on a depth of another "
            f"view {agreed} agree with it: check intrinsics, the direction of poses (camera to world) and units"
        )
    return tuple(found)


def missing(source: Source, size: int) -> str:
    return (
        "" if pairs(source, size) else f"nothing moves more than {MOVED:g} cell between views: take views further apart"
    )


def measure(source: Source, size: int, known: Tensor, asked: Tensor) -> Tensor:
    """(units, 2): hits and queries."""
    unit = units(source)
    sums = torch.zeros(int(unit.max()) + 1, 2, dtype=torch.float64)
    mean = known.mean((0, 1))
    first, second = centred(known, mean), centred(asked, mean)
    side = size // CELL
    for pair in pairs(source, size):
        similarity = first[pair.first, pair.queries] @ second[pair.second, pair.candidates].T
        best = pair.candidates[similarity.argmax(1).numpy()]
        centres = np.stack([best % side, best // side], 1) + 0.5
        hits = np.linalg.norm(centres - pair.places, axis=1) <= NEAR
        sums[unit[pair.first], 0] += int(hits.sum())
        sums[unit[pair.first], 1] += len(hits)
    return sums


def figures(sums: Tensor) -> dict[str, Tensor]:
    return {"recall": sums[..., 0] / sums[..., 1]}
