"""Reading frozen features out without training anything: a kNN vote and ridge regression from moments."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_depth.errors import DataError

__all__ = ["Moments", "fit_ridge", "knn"]

TEMPERATURE = 0.07  # of the kNN vote, as in DINO's evaluation
PENALTIES = tuple(10.0**exponent for exponent in range(-6, 2))


def knn(gallery: Tensor, labels: Tensor, queries: Tensor, neighbours: int, classes: int) -> Tensor:
    """Classes (queries,) that win a vote of the nearest gallery features, each with weight exp(cosine / 0.07).

    In float64: with LayerScale the class features of an untrained network differ in the fifth digit only.

    Args:
        gallery: (maps, dim) features with ``labels`` (maps,) in 0..classes-1.
        queries: (queries, dim).
    """
    gallery = F.normalize(gallery.double(), dim=1)
    neighbours = min(neighbours, len(gallery))
    answers = []
    for part in queries.double().split(512):
        similarity, nearest = (F.normalize(part, dim=1) @ gallery.T).topk(neighbours)
        votes = torch.zeros(len(part), classes, dtype=torch.float64, device=gallery.device)
        votes.scatter_add_(1, labels[nearest], (similarity / TEMPERATURE).exp())
        answers.append(votes.argmax(1))
    return torch.cat(answers)


class Moments:
    """Sums of outer products of [features, targets, 1]: all that ridge regression needs of any number of patches."""

    def __init__(self, inputs: int, outputs: int):
        self.inputs, self.outputs = inputs, outputs
        self.sums = torch.zeros(inputs + outputs + 1, inputs + outputs + 1, dtype=torch.float64)

    def add(self, features: Tensor, targets: Tensor):
        """Adds patches: (patches, inputs) and (patches, outputs)."""
        rows = torch.cat([features.double(), targets.double(), features.new_ones(len(features), 1).double()], 1)
        self.sums += (rows.T @ rows).cpu()

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments(self.inputs, self.outputs)
        total.sums = self.sums + other.sums
        return total

    @property
    def count(self) -> int:
        return int(self.sums[-1, -1])


def _ridge(moments: Moments, penalties: tuple[float, ...]) -> Tensor:
    """(penalties, inputs + 1, outputs) weights, the intercept last, of ridge regression on standardised features.

    Minimises the mean squared error plus penalty times the squared norm of the weights of unit-variance features.
    """
    inputs, count = moments.inputs, moments.sums[-1, -1]
    mean = moments.sums[-1, :-1] / count
    covariance = moments.sums[:-1, :-1] / count - torch.outer(mean, mean)
    deviation = covariance.diagonal()[:inputs].clamp_min(0).sqrt()
    # A feature that never changes carries nothing; rounding must not turn it into a huge weight.
    scale = torch.where(deviation > 1e-7 * mean[:inputs].abs().clamp_min(1e-7), 1 / deviation.clamp_min(1e-30), 0)
    correlation = covariance[:inputs, :inputs] * scale[:, None] * scale
    values, vectors = torch.linalg.eigh(correlation)
    projected = vectors.T @ (covariance[:inputs, inputs:] * scale[:, None])
    shrunk = [projected / (values.clamp_min(0) + penalty)[:, None] for penalty in penalties]
    weights = torch.stack([scale[:, None] * (vectors @ part) for part in shrunk])
    return torch.cat([weights, (mean[inputs:] - mean[:inputs] @ weights)[:, None]], 1)


def fit_ridge(fit: Moments, choose: Moments) -> Tensor:
    """(inputs + 1, outputs) weights on all patches, each output with the penalty that errs least on ``choose``.

    Raises:
        DataError: one of the two holds no patch.
    """
    if not fit.count or not choose.count:
        raise DataError("no patch of the gallery maps has enough valid depth for a surface fit")
    trials = _ridge(fit, PENALTIES)  # (penalties, inputs + 1, outputs)
    inputs, outputs = fit.inputs, fit.outputs
    order = [*range(inputs), inputs + outputs]
    gram, cross = choose.sums[order][:, order], choose.sums[order][:, inputs:-1]
    # Squared error from moments, up to the constant sum of squared targets.
    errors = torch.einsum("pio,ij,pjo->po", trials, gram, trials) - 2 * torch.einsum("pio,io->po", trials, cross)
    best = errors.argmin(0)
    return _ridge(fit + choose, PENALTIES)[best, :, torch.arange(outputs)].T
