"""Paired bootstrap: every encoder is scored on the same resampled scenes, views or parts, never on resampled cells."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["Draws", "Estimate", "estimate", "resample"]


@dataclass(frozen=True)
class Estimate:
    """A value and the bounds of its 95 % percentile interval."""

    value: float
    low: float
    high: float


Draws = Tensor  # (1 + resamples,) float64: the figure itself, then the figure of each resample


def resample(units: int, resamples: int, seed: int) -> Tensor:
    """(1 + resamples, units) float64: how often each unit counts; first each once."""
    counts = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), resamples)
    return torch.from_numpy(np.concatenate([np.ones((1, units)), counts])).double()


def estimate(draws: Draws) -> Estimate | None:
    """The value with its interval; resamples in which the figure is undefined are left out. None if it is itself."""
    if not torch.isfinite(draws[0]):
        return None
    defined = draws[1:][torch.isfinite(draws[1:])]
    if not len(defined):
        return None
    low, high = torch.quantile(defined, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(float(draws[0]), low, high)
