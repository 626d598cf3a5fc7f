"""Kind of object by nearest neighbours: a map's mean feature among those of other scenes."""

from functools import lru_cache

import torch
from torch import Tensor

from dino_depth.bench.columns import Figure, centred
from dino_depth.bench.data import Source, cell_centers, units
from dino_depth.readout import knn

__all__ = ["ASKED", "FIGURES", "PLACE", "figures", "measure", "missing"]

PLACE, ASKED = 2, "views"
FIGURES = {"knn": Figure("kNN", "kind of object by nearest neighbours among other objects")}
NEIGHBOURS = 10


def missing(source: Source, size: int) -> str:
    scenes = {view.scene: view.category for view in source.views}
    kinds = set(scenes.values())
    if len(kinds) < 2:
        return "maps are of one kind, or of none that is known"
    if any(list(scenes.values()).count(kind) < 2 for kind in kinds):
        return "a kind of object has one object only"
    return ""


@lru_cache(maxsize=4)
def _shares(source: Source, size: int) -> Tensor:
    """(views, cells, 1): what each cell counts in the mean of its map."""
    mask = torch.stack([torch.from_numpy(cell_centers(view, size)[1]) for view in source.views]).float()
    return (mask / mask.sum(1, keepdim=True).clamp_min(1))[..., None]


def measure(source: Source, size: int, known: Tensor, asked: Tensor) -> Tensor:
    """(units, 2): hits and maps."""
    shares, unit = _shares(source, size), torch.from_numpy(units(source))
    gallery, queries = (known * shares).sum(1), (asked * shares).sum(1)
    mean = gallery.mean(0)
    gallery, queries = centred(gallery, mean), centred(queries, mean)
    kinds = sorted({view.category for view in source.views})
    labels = torch.tensor([kinds.index(view.category) for view in source.views])
    scenes = sorted({view.scene for view in source.views})
    scene = torch.tensor([scenes.index(view.scene) for view in source.views])
    sums = torch.zeros(int(unit.max()) + 1, 2, dtype=torch.float64)
    for number in range(len(scenes)):
        own = scene == number
        answers = knn(gallery[~own], labels[~own], queries[own], NEIGHBOURS, len(kinds))
        hits = (answers == labels[own]).double()
        sums.index_add_(0, unit[own], torch.stack([hits, torch.ones_like(hits)], 1))
    return sums


def figures(sums: Tensor) -> dict[str, Tensor]:
    return {"knn": sums[..., 0] / sums[..., 1]}
