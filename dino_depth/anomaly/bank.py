"""Memory banks of nominal features: thinned by a greedy coreset, and asked for what lies nearest (Roth et al. 2022)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dino_depth.anomaly.heads import check_train
from dino_depth.errors import ConfigError, DataError

__all__ = [
    "JoinedBank", "Modality", "greedy_coreset", "highest_cell", "joined", "kept_cells", "kept_count",
    "nearest_distance", "object_cells", "projected", "read_bank", "reweighted", "spread",
]  # fmt: skip

Modality = Literal["image", "depth", "both"]

# Entries of one block of distances: 64 MiB.
BLOCK = 2**24
DISTORTION = 0.9  # epsilon of BTF's and M3DM's projections


@dataclass(frozen=True)
class JoinedBank:
    """A fitted head of one bank of image features, depth features or both joined, each over its scale.

    Attributes:
        config: of the head; its ``modality`` says what is in the bank.
        dims: channels of image and depth features.
        bank: (kept cells, channels) float32, on the device of the head.
        scales: what image and depth features are divided by.
    """

    config: Any
    dims: tuple[int, int]
    bank: Tensor
    scales: tuple[float, float]

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        config = asdict(self.config)
        return {"config": config, "dims": list(self.dims), "bank": self.bank.cpu(), "scales": list(self.scales)}

    def maps(self, images: Tensor, depths: Tensor) -> dict[str, Tensor]:
        """Distance of every cell from the bank, under the name of the modality; can be traced.

        Args:
            images, depths: (views, rows, columns, channels).

        Returns:
            (views, rows, columns) float32, CPU.
        """
        found = []
        for image, depth in zip(images, depths, strict=True):  # a view at a time bounds the memory
            parts = (part.flatten(0, 1).to(self.bank.device) for part in (image, depth))
            cells = joined(*parts, self.scales, self.config.modality)
            found.append(nearest_distance(cells, self.bank).cpu().view(image.shape[:2]))
        return {self.config.modality: torch.stack(found)}

    def left_out(self, views: Any) -> dict[str, Tensor]:
        """As ``maps`` of a training instance, each view compared with the bank less that view's own cells.

        0 off the object, and where nothing of the bank is left.
        """
        shown = views.share > 0
        cells = joined(views.image, views.depth, self.scales, self.config.modality).to(self.bank.device)
        found = torch.zeros(shown.shape)
        for view, mask in enumerate(shown):
            own = cells[view][mask]
            others = self.bank[nearest_distance(self.bank, own) > 0] if len(own) else self.bank
            if len(own) and len(others):
                found[view, mask] = nearest_distance(own, others).cpu()
        return {self.config.modality: found}

    def highest(self, views: Any, maps: dict[str, Tensor]) -> Tensor:
        """The most anomalous cell of ``maps`` that shows the object, (channels,) as the bank has them."""
        place = highest_cell(maps[self.config.modality], views.share)
        return joined(views.image[place], views.depth[place], self.scales, self.config.modality).to(self.bank.device)


def read_bank(name: str, kind: type, state: dict[str, Any], device: torch.device) -> JoinedBank:
    """The head ``name``, whose configuration is a ``kind``, that gave ``state``.

    Raises:
        DataError: a key is missing or unknown.
    """
    try:
        config, bank = kind(**state["config"]), state["bank"].to(device)
        return JoinedBank(config, tuple(state["dims"]), bank, tuple(state["scales"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not the state of a {name} head: {error}") from error


def object_cells(
    train: Sequence[Any], name: str, modality: Modality, device: torch.device
) -> tuple[tuple[int, int], Tensor, Tensor]:
    """Channels of image and depth features, and both of all training cells that show an object, (cells, channels).

    Raises:
        ConfigError: ``modality`` was not encoded.
        DataError: features that cannot be used, or no cell that shows an object.
    """
    dims = check_train(train, name)
    if not {"image": dims[0], "depth": dims[1], "both": min(dims)}[modality]:
        raise ConfigError(f"{name}.modality {modality}: got {dims[0]} image and {dims[1]} depth channels")
    image, depth = (
        torch.cat([getattr(sample, part)[sample.share > 0] for sample in train]).to(device)
        for part in ("image", "depth")
    )
    if not len(image):
        raise DataError(f"{name}: none of {len(train)} training samples shows an object")
    return dims, image, depth


def joined(image: Tensor, depth: Tensor, scales: tuple[float, float], modality: Modality) -> Tensor:
    """Features (..., channels) as a bank has them."""
    parts = {"image": image / scales[0], "depth": depth / scales[1]}
    return torch.cat([parts["image"], parts["depth"]], -1) if modality == "both" else parts[modality]


def spread(features: Tensor) -> float:
    """Root mean squared distance from the mean: two cells are then equally far apart in either modality."""
    found = float(features.var(0, correction=0).sum().sqrt())
    return found if found > 0 else 1.0


def kept_cells(features: Tensor, share: float, limit: int, seed: int, projection: int) -> Tensor:
    """The rows (kept, channels) of training cells (cells, channels) that a bank keeps: a share, at most ``limit``."""
    return features[greedy_coreset(features, kept_count(len(features), share, limit), seed, projection)]


def kept_count(cells: int, share: float, limit: int) -> int:
    """How many of the training cells a bank keeps."""
    return min(math.ceil(share * cells), limit)


def projected(cells: int) -> int:
    """Dimension that keeps distances between so many cells within ``DISTORTION`` (Johnson and Lindenstrauss)."""
    return int(4 * math.log(max(cells, 2)) / (DISTORTION**2 / 2 - DISTORTION**3 / 3))


def greedy_coreset(features: Tensor, count: int, seed: int, projection: int = 0) -> Tensor:
    """k-centre by greed: again and again the feature farthest from all that were chosen (Sener and Savarese 2018).

    Args:
        features: (cells, channels).
        count: how many to choose; all of them, in their order, if there are no more.
        seed: of the first choice and of the projection.
        projection: dimension of a Gaussian random projection in which distances are taken; 0 takes them as they are.

    Returns:
        (count,) rows in the order of choice, all different. The time is count x cells x dimension.
    """
    if count >= len(features):
        return torch.arange(len(features), device=features.device)
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(features), (), generator=generator))
    points = features
    if 0 < projection < features.shape[1]:
        directions = torch.randn(features.shape[1], projection, generator=generator) / math.sqrt(projection)
        points = features @ directions.to(features)
    points = points - points.mean(0)  # squares of small numbers, for the sake of their differences
    squares = points.square().sum(1)
    nearest = torch.full_like(squares, torch.inf)
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    chosen[0] = first
    for place in range(count):
        if place:
            chosen[place] = nearest.argmax()
        row = chosen[place : place + 1]  # looked up where it lies: as a number a GPU would be waited for
        distances = squares - 2 * (points @ points.index_select(0, row)[0]) + squares.index_select(0, row)
        nearest = torch.minimum(nearest, distances).index_fill_(0, row, -torch.inf)  # rounding: never chosen twice
    return chosen


def nearest_distance(features: Tensor, bank: Tensor) -> Tensor:
    """Euclidean distance (cells,) of each feature (cells, channels) from the nearest row of the bank.

    Which row is nearest comes from a matrix product, the distance from the difference: exactly 0 for a row itself.
    """
    found = [
        bank[torch.cdist(part, bank, compute_mode="use_mm_for_euclid_dist").argmin(1)]
        for part in features.split(max(1, BLOCK // len(bank)))
    ]
    return torch.linalg.vector_norm(features - torch.cat(found), dim=1)


def highest_cell(scores: Tensor, share: Tensor) -> tuple[int, int, int]:
    """View, row and column of the highest of the scores (views, rows, columns) of cells that show the object."""
    seen = scores if not (share > 0).any() else scores.masked_fill(share <= 0, -torch.inf)
    return tuple(int(part) for part in torch.unravel_index(seen.argmax(), seen.shape))


def reweighted(cell: Tensor, bank: Tensor, neighbours: int, scale: float = 1.0, own: bool = True) -> float:
    """The score of the most anomalous cell, less where the bank is thin (Roth et al. 2022, equation 7).

    With s the distance of the cell from the bank's nearest row m, and d those from rows near m, it is
    s (1 - exp(s / scale) / sum exp(d / scale)).

    Args:
        cell: (channels,) of the cell.
        bank: (rows, channels).
        neighbours: rows near m that the sum has, m being the first of them.
        scale: of the distances in the exponentials.
        own: whether m itself stays in the sum.
    """
    distance = torch.linalg.vector_norm(bank - cell, dim=1)
    nearest = distance.argmin()
    apart = torch.linalg.vector_norm(bank - bank[nearest], dim=1)
    apart[nearest] = -1  # before its twins
    around = apart.topk(min(neighbours, len(bank)), largest=False).indices[0 if own else 1 :]
    if not len(around):  # a bank of one row
        return float(distance[nearest])
    weight = 1 - torch.exp((distance[nearest] / scale) - torch.logsumexp(distance[around] / scale, 0))
    return float(distance[nearest] * weight)
