"""PatchCore: distance to the nearest of a memory bank of nominal features (Roth et al. 2022).

The bank holds the training cells that show any of the object, thinned by the greedy k-centre coreset of the paper
(section 3.2) on a random projection. The averages over 3 x 3 cells that convolutional features need belong to their
encoder (``timm:NAME?layers=2-3``), the blur of the maps to ``prepare.smoothing``, 4 in the paper's code. One bank
serves all views, and all classes where there are several: nothing tells the head which it looks at.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dino_depth.anomaly.bank import (
    JoinedBank,
    Modality,
    joined,
    kept_cells,
    object_cells,
    read_bank,
    reweighted,
    spread,
)
from dino_depth.anomaly.heads import Context, Facts, check_features, require
from dino_depth.anomaly.views import Views
from dino_depth.errors import ConfigError

__all__ = [
    "INFERENCE", "Config", "check", "fit", "from_state", "graph", "instance", "itself", "needs", "score", "title",
]  # fmt: skip

INFERENCE = frozenset({"reweight"})


@dataclass
class Config:
    """The memory bank.

    Attributes:
        modality: whose features are compared; ``both`` joins them, each divided by its spread, into one map.
        share: share of the training cells that the bank keeps.
        limit: largest number of them, whatever the share.
        projection: dimension of the random projection the coreset is chosen in; 0 chooses in the features themselves.
        reweight: neighbours in the bank that equation 7 weighs the score of an instance by, 3 in the paper and 9 in
            common code; 0 leaves it out, and an instance is scored by the maximum of its volume or map.
    """

    modality: Modality = "both"
    share: float = 0.1
    limit: int = 10_000
    projection: int = 128
    reweight: int = 0


def from_state(state: dict[str, Any], device: torch.device) -> JoinedBank:
    """The head that gave ``state``.

    Raises:
        DataError: a key is missing or unknown.
    """
    return read_bank("patchcore", Config, state, device)


def needs(config: Config) -> frozenset[str]:
    """The features that are compared."""
    return frozenset({"image", "depth"} if config.modality == "both" else {config.modality})


def title(config: Config) -> str:
    parts = ["patchcore", config.modality]
    return ", ".join(parts + [f"reweighted by {config.reweight}"] * bool(config.reweight))


def check(config: Config, facts: Facts):
    """Refuses what cannot work.

    Raises:
        ConfigError: a setting that cannot work, or an encoder that is missing.
    """
    _check_config(config)
    require("patchcore", needs(config), facts)


def _check_config(config: Config):
    if not 0 < config.share <= 1:
        raise ConfigError(f"patchcore.share must lie in (0, 1], got {config.share}")
    if config.limit < 1 or config.projection < 0:
        found = f"{config.limit} and {config.projection}"
        raise ConfigError(f"patchcore: need limit >= 1 and projection >= 0, got {found}")
    if config.reweight < 0 or config.reweight == 1:
        raise ConfigError(f"patchcore.reweight must be 0 or at least 2 neighbours, got {config.reweight}")


@torch.inference_mode()
def fit(train: Sequence[Views], config: Config, context: Context) -> JoinedBank:
    """Fills the bank from nominal samples, which may have any numbers of views; all classes share one.

    Raises:
        ConfigError: a setting that cannot work, or a modality that was not encoded.
        DataError: features that cannot be used, or no cell that shows an object.
    """
    _check_config(config)
    dims, image, depth = object_cells(train, "patchcore", config.modality, context.device)
    scales = (spread(image), spread(depth)) if config.modality == "both" else (1.0, 1.0)
    cells = joined(image, depth, scales, config.modality)
    bank = kept_cells(cells, config.share, config.limit, context.seed, config.projection)
    return JoinedBank(config, dims, bank, scales)


@torch.inference_mode()
def score(head: JoinedBank, views: Views) -> dict[str, Tensor]:
    """Distance of every cell from the bank.

    Returns:
        One map under the name of the modality ("image", "depth" or "both"), (views, rows, columns) float32, CPU.

    Raises:
        DataError: features that cannot be used.
    """
    check_features(views, "patchcore", head.dims)
    return head.maps(views.image, views.depth)


def graph(head: JoinedBank) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """``score`` of features; can be traced."""
    return head.maps


@torch.inference_mode()
def itself(head: JoinedBank, views: Views) -> dict[str, Tensor]:
    """The map of a training instance, each view compared with the bank less its own cells; as ``score``.

    Raises:
        DataError: as ``score``.
    """
    check_features(views, "patchcore", head.dims)
    return head.left_out(views)


@torch.inference_mode()
def instance(head: JoinedBank, views: Views, maps: dict[str, Tensor]) -> float | None:
    """The maximum over cells that show the object, reweighted by equation 7; None where ``reweight`` is 0."""
    if not head.config.reweight:
        return None
    return reweighted(head.highest(views, maps), head.bank, head.config.reweight)
