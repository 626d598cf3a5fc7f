"""PatchCore: distance to the nearest of a memory bank of nominal features (Roth et al. 2022).

The bank holds the training cells that show any of the object, thinned by the greedy k-centre coreset of the paper
(section 3.2) on a random projection. Left out: the pooling of 3 x 3 neighbours, which gives convolutional features the
reach that a transformer's have, and the reweighting of the image score, since an instance is scored by its volume.
One bank serves all views, and all classes where there are several: nothing tells the head which it looks at.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dino_depth.anomaly.features import SampleFeatures
from dino_depth.anomaly.heads import check_features
from dino_depth.errors import ConfigError, DataError

__all__ = [
    "INFERENCE", "PatchCore", "PatchCoreConfig", "fit", "from_state", "greedy_coreset", "nearest_distance", "score",
]  # fmt: skip

INFERENCE = frozenset()
# Entries of one block of distances: 64 MiB.
BLOCK = 2**24


@dataclass
class PatchCoreConfig:
    """The memory bank.

    Attributes:
        modality: whose features are compared; ``both`` joins them, each divided by its spread, into one map.
        share: share of the training cells that the bank keeps.
        limit: largest number of them, whatever the share.
        projection: dimension of the random projection the coreset is chosen in; 0 chooses in the features themselves.
    """

    modality: Literal["image", "depth", "both"] = "both"
    share: float = 0.1
    limit: int = 10_000
    projection: int = 128


@dataclass(frozen=True)
class PatchCore:
    """A fitted head.

    Attributes:
        dims: channels of image and depth features.
        bank: (kept cells, channels) float32, on the device of the head.
        scales: what image and depth features are divided by.
    """

    config: PatchCoreConfig
    dims: tuple[int, int]
    bank: Tensor
    scales: tuple[float, float]

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        config = asdict(self.config)
        return {"config": config, "dims": list(self.dims), "bank": self.bank.cpu(), "scales": list(self.scales)}


def from_state(state: dict[str, Any], device: torch.device) -> PatchCore:
    """The head that gave ``state``.

    Raises:
        DataError: a key is missing or unknown.
    """
    try:
        config, bank = PatchCoreConfig(**state["config"]), state["bank"].to(device)
        return PatchCore(config, tuple(state["dims"]), bank, tuple(state["scales"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not the state of a patchcore head: {error}") from error


@torch.inference_mode()
def fit(
    features: list[SampleFeatures],
    config: PatchCoreConfig,
    seed: int,
    device: torch.device,
    *,
    classes: list[int] | None = None,
) -> PatchCore:
    """Fills the bank from nominal samples.

    Args:
        features: of the training samples, with any numbers of views.
        classes: accepted as by every head; the bank is one.

    Raises:
        ConfigError: a setting that cannot work, or a modality that was not encoded.
        DataError: features that cannot be used, or no cell that shows an object.
    """
    if not 0 < config.share <= 1:
        raise ConfigError(f"patchcore.share must lie in (0, 1], got {config.share}")
    if config.limit < 1 or config.projection < 0:
        found = f"{config.limit} and {config.projection}"
        raise ConfigError(f"patchcore: need limit >= 1 and projection >= 0, got {found}")
    if not features:
        raise DataError("patchcore: no training sample")
    dims = features[0].image.shape[-1], features[0].depth.shape[-1]
    for place, sample in enumerate(features):
        check_features(sample, f"patchcore: training sample {place}", dims)
    if not {"image": dims[0], "depth": dims[1], "both": min(dims)}[config.modality]:
        raise ConfigError(f"patchcore.modality {config.modality}: got {dims[0]} image and {dims[1]} depth channels")
    image, depth = (
        torch.cat([getattr(sample, name)[sample.share > 0] for sample in features]).to(device)
        for name in ("image", "depth")
    )  # (cells, channels)
    if not len(image):
        raise DataError(f"patchcore: none of {len(features)} training samples shows an object")
    scales = (_spread(image), _spread(depth)) if config.modality == "both" else (1.0, 1.0)
    bank = _join(image, depth, scales, config.modality)
    count = min(math.ceil(config.share * len(bank)), config.limit)
    chosen = greedy_coreset(bank, count, seed, config.projection)
    return PatchCore(config, dims, bank[chosen], scales)


def _spread(features: Tensor) -> float:
    """Root mean squared distance from the mean: two cells are then equally far apart in either modality."""
    spread = float(features.var(0, correction=0).sum().sqrt())
    return spread if spread > 0 else 1.0


def _join(image: Tensor, depth: Tensor, scales: tuple[float, float], modality: str) -> Tensor:
    parts = {"image": image, "depth": depth}
    if modality != "both":
        return parts[modality]
    return torch.cat([image / scales[0], depth / scales[1]], -1)


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
    points = features - features.mean(0)  # squares of small numbers, for the sake of their differences
    if 0 < projection < features.shape[1]:
        directions = torch.randn(features.shape[1], projection, generator=generator) / math.sqrt(projection)
        points = points @ directions.to(points)
    squares = points.square().sum(1)
    nearest = torch.full_like(squares, torch.inf)
    chosen = torch.empty(count, dtype=torch.long, device=features.device)
    chosen[0] = first
    for place in range(count):
        if place:
            chosen[place] = nearest.argmax()
        row = chosen[place]
        nearest = torch.minimum(nearest, squares - 2 * (points @ points[row]) + squares[row])
        nearest[row] = -torch.inf  # rounding must not choose it twice
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


@torch.inference_mode()
def score(head: PatchCore, features: SampleFeatures, *, class_index: int = 0) -> dict[str, Tensor]:
    """Distance of every cell from the bank.

    Args:
        class_index: accepted as by every head; the bank is one.

    Returns:
        One map under the name of the modality ("image", "depth" or "both"), (views, rows, columns) float32, CPU.

    Raises:
        DataError: features that cannot be used.
    """
    check_features(features, "patchcore", head.dims)
    maps = []
    for image, depth in zip(features.image, features.depth, strict=True):  # a view at a time bounds the memory
        parts = (part.flatten(0, 1).to(head.bank.device) for part in (image, depth))
        cells = _join(*parts, head.scales, head.config.modality)
        maps.append(nearest_distance(cells, head.bank).cpu().view(image.shape[:2]))
    return {head.config.modality: torch.stack(maps)}
