"""BTF, Back To The Feature: one memory bank of image features joined with FPFH (Horwitz and Hoshen 2023).

The features are those of the encoders, ``timm:wide_resnet50_2.racm_in1k?layers=2-3`` and ``fpfh`` in the authors' code
(512 + 1024 + 33 channels), or ``fpfh`` alone. They are joined as they come: a histogram of FPFH sums to 600, which
outweighs most image features, so ``scale none`` is part of the published method.

As published: a tenth of the cells by greedy k-centre on a random projection, the distance from the nearest row, and the
maximum reweighted by two further neighbours (``reweight``, for benchmarks of single views). Other than published: the
projection is Gaussian, not sparse; maps are blurred as floats (``prepare.smoothing``), not as 8-bit pictures, which
make ties of most pixels; cells that show no object do not enter the bank; normals point to the camera.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dino_depth.anomaly.bank import (
    JoinedBank,
    Modality,
    joined,
    kept_cells,
    object_cells,
    projected,
    read_bank,
    reweighted,
    spread,
)
from dino_depth.anomaly.heads import Context, Facts, check_features, require
from dino_depth.anomaly.views import Views
from dino_depth.errors import ConfigError

__all__ = ["INFERENCE", "Config", "check", "fit", "from_state", "instance", "itself", "needs", "score", "title"]

INFERENCE = frozenset({"reweight"})


@dataclass
class Config:
    """One bank of joined image and geometric features.

    Attributes:
        modality: ``both``, or ``depth`` for the geometric features alone, or ``image``.
        scale: ``none`` joins features as they come, ``spread`` divides each modality by its spread.
        share: share of the training cells that the bank keeps.
        limit: largest number of them, whatever the share.
        reweight: the nearest row with its neighbours that the score of an instance is reweighted by, 3 as published; 0
            leaves it out, and an instance is scored by the maximum of its volume or map.
    """

    modality: Modality = "both"
    scale: Literal["none", "spread"] = "none"
    share: float = 0.1
    limit: int = 10_000
    reweight: int = 0


def from_state(state: dict[str, Any], device: torch.device) -> JoinedBank:
    """The head that gave ``state``.

    Raises:
        DataError: a key is missing or unknown.
    """
    return read_bank("btf", Config, state, device)


def needs(config: Config) -> frozenset[str]:
    """The features that are joined."""
    return frozenset({"image", "depth"} if config.modality == "both" else {config.modality})


def title(config: Config) -> str:
    parts = ["btf", config.modality] + ["scaled"] * (config.scale == "spread")
    return ", ".join(parts + [f"reweighted by {config.reweight}"] * bool(config.reweight))


def check(config: Config, facts: Facts):
    """Refuses what cannot work.

    Raises:
        ConfigError: a setting that cannot work, or an encoder that is missing.
    """
    _check_config(config)
    require("btf", needs(config), facts)


def _check_config(config: Config):
    if not 0 < config.share <= 1:
        raise ConfigError(f"btf.share must lie in (0, 1], got {config.share}")
    if config.limit < 1:
        raise ConfigError(f"btf.limit must be at least 1, got {config.limit}")
    if config.reweight < 0 or config.reweight == 1:
        raise ConfigError(f"btf.reweight must be 0 or at least 2 rows, got {config.reweight}")


@torch.inference_mode()
def fit(train: Sequence[Views], config: Config, context: Context) -> JoinedBank:
    """Fills the bank from nominal samples; all classes share one. Nothing is trained, so one sample will do.

    Raises:
        ConfigError: a setting that cannot work, or a modality that was not encoded.
        DataError: features that cannot be used, or no cell that shows an object.
    """
    _check_config(config)
    dims, image, depth = object_cells(train, "btf", config.modality, context.device)
    scales = (spread(image), spread(depth)) if config.scale == "spread" else (1.0, 1.0)
    cells = joined(image, depth, scales, config.modality)
    bank = kept_cells(cells, config.share, config.limit, context.seed, projected(len(cells)))
    return JoinedBank(config, dims, bank, scales)


@torch.inference_mode()
def score(head: JoinedBank, views: Views) -> dict[str, Tensor]:
    """Distance of every cell from the bank.

    Returns:
        One map under the name of the modality ("both", "depth" or "image"), (views, rows, columns) float32, CPU.

    Raises:
        DataError: features that cannot be used.
    """
    check_features(views, "btf", head.dims)
    return head.maps(views.image, views.depth)


@torch.inference_mode()
def itself(head: JoinedBank, views: Views) -> dict[str, Tensor]:
    """The map of a training instance, each view compared with the bank less its own cells; as ``score``.

    Raises:
        DataError: as ``score``.
    """
    check_features(views, "btf", head.dims)
    return head.left_out(views)


@torch.inference_mode()
def instance(head: JoinedBank, views: Views, maps: dict[str, Tensor]) -> float | None:
    """The maximum over cells that show the object, reweighted; None where ``reweight`` is 0."""
    if not head.config.reweight:
        return None
    cell = head.highest(views, maps)
    return reweighted(cell, head.bank, head.config.reweight, scale=math.sqrt(len(cell)), own=False)
