"""Defects by depth alone: Euclidean distance of a cell's feature to the nearest one of sound views of the same part.

Distances of cells become pixels bilinearly. AUPRO up to a false positive rate of 30 %, of the pixels of the object
alone: a background would add normals that any method gets right.
"""

import torch
from torch import Tensor

from dino_depth.anomaly.geometry import SquareFit
from dino_depth.anomaly.metrics import aupro
from dino_depth.bench.columns import Figure
from dino_depth.bench.data import CELL, Inspection, Source, View, covered

__all__ = ["ASKED", "FIGURES", "PLACE", "figures", "measure", "missing"]

PLACE, ASKED = 3, "inspections"
LIMIT = 0.3
FIGURES = {"anomaly": Figure("defect", "AUPRO@30% of defects among the object's pixels, by depth alone")}


def missing(source: Source, size: int) -> str:
    return "" if source.inspections else "no parts with defects"


def measure(source: Source, size: int, known: Tensor, asked: Tensor) -> Tensor:
    """(parts, 2): AUPRO and 1. Features are of the parts one after the other, each its bank and what is tested."""
    rows, start = [], 0
    for inspection in source.inspections:
        bank, tested = len(inspection.bank), len(inspection.tested)
        features = known[start : start + bank], asked[start + bank : start + bank + tested]
        rows.append([_aupro(inspection, size, *features), 1.0])
        start += bank + tested
    return torch.tensor(rows, dtype=torch.float64)


def _aupro(inspection: Inspection, size: int, bank: Tensor, tested: Tensor) -> float:
    sound = torch.stack([torch.from_numpy(covered(view, size)) for view in inspection.bank])
    memory = bank[sound]
    scores, masks, normals = [], [], []
    for view, features in zip(inspection.tested, tested, strict=True):
        distance = torch.cdist(features, memory).amin(1)  # (cells,)
        side = size // CELL
        square = SquareFit(*view.depth.depth.shape, size)
        scores.append(square.unfit(distance.view(side, side)).numpy())
        defect, inside = _masks(view)
        masks.append(defect)
        normals.append(inside & ~defect)
    return aupro(scores, masks, limit=LIMIT, normal=normals)


def _masks(view: View):
    inside = view.depth.valid if view.part is None else view.part
    return (inside & False if view.defect is None else view.defect), inside


def figures(sums: Tensor) -> dict[str, Tensor]:
    return {"anomaly": sums[..., 0] / sums[..., 1]}
