"""DINO, iBOT and KoLeo losses and Sinkhorn-Knopp centering, without float32 logits of all rows at once."""

import torch
from torch import Tensor

from dino_depth.distributed import all_gather, all_max, all_sum

__all__ = ["koleo", "matmul_dtype", "prototype_cross_entropy", "sinkhorn"]

CACHE_ROWS = 16  # rows of 65,536 float32 values that stay in a core's cache between passes
MATMUL_ROWS = 1024  # rows per matrix product with the prototypes: bounds the memory of a large batch


def matmul_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which autocast multiplies matrices here."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Teacher targets: softmax of ``logits / temperature`` balanced over prototypes (SwAV, Caron et al. 2020, eq. 3-4).

    Alternately scales prototypes and samples of exp(logits / temperature) to equal mass. The result is
    diag(v) E diag(u), so the iterations only update the vectors u and v, reading E once each. Sums run over all ranks.

    Args:
        logits: (samples, K) of this rank.
        iterations: 0 gives the plain softmax.

    Returns:
        (samples, K) float32, rows sum to 1.
    """
    if iterations == 0:
        return (logits.float() / temperature).softmax(-1)
    count = all_sum(torch.tensor(float(len(logits)), device=logits.device))
    largest = all_max(logits.max().float() if len(logits) else torch.tensor(-torch.inf, device=logits.device))
    kernel = torch.empty(logits.shape, device=logits.device)
    chunks = range(0, len(logits), CACHE_ROWS if logits.device.type == "cpu" else max(1, len(logits)))
    prototypes = logits.shape[1]
    mass = torch.zeros(prototypes, device=logits.device)
    tiny = torch.finfo(mass.dtype).tiny
    for start in chunks:
        rows = slice(start, start + chunks.step)
        part = torch.sub(logits[rows], largest, out=kernel[rows]).mul_(1 / temperature).exp_()
        mass += part.sum(0)
    for iteration in range(iterations):
        per_prototype = 1 / (prototypes * all_sum(mass).clamp_min(tiny))  # u
        mass = torch.zeros_like(mass)
        for start in chunks:
            part = kernel[start : start + chunks.step]
            per_sample = 1 / (part @ per_prototype).clamp_min(tiny)  # v, times the number of samples
            if iteration < iterations - 1:
                mass += (per_sample / count) @ part
            else:
                part.mul_(per_prototype).mul_(per_sample[:, None])
    return kernel


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Computes the gradient together with the loss, a few rows at a time, while the logits are in cache."""

    @staticmethod
    def forward(ctx, features, prototypes, targets, index, weights, temperature):
        dtype = matmul_dtype(features.device)
        with torch.autocast(features.device.type, enabled=False):
            narrow_features, narrow_prototypes = features.to(dtype), prototypes.to(dtype)
            total = torch.zeros((), device=features.device)
            feature_gradient = torch.empty_like(narrow_features)
            prototype_gradient = torch.zeros_like(prototypes)
            for start in range(0, len(features), MATMUL_ROWS):
                rows = slice(start, start + MATMUL_ROWS)
                logits = narrow_features[rows] @ narrow_prototypes.T  # (rows, K)
                step = CACHE_ROWS if features.device.type == "cpu" else MATMUL_ROWS
                for first in range(0, len(logits), step):
                    part = logits[first : first + step]
                    at = slice(start + first, start + first + len(part))
                    wanted = targets[index[at]]
                    mass = wanted.sum(1)
                    values = part.float().mul_(1 / temperature)
                    normalizer = values.logsumexp(1)
                    total += weights[at] @ (mass * normalizer - torch.linalg.vecdot(wanted, values))
                    gradient = values.sub_(normalizer[:, None]).exp_().mul_(mass[:, None]).sub_(wanted)
                    part.copy_(gradient.mul_(weights[at, None] / temperature))
                feature_gradient[rows] = logits @ narrow_prototypes
                prototype_gradient += logits.T @ narrow_features[rows]
        ctx.save_for_backward(feature_gradient, prototype_gradient)
        ctx.dtype = features.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        feature_gradient, prototype_gradient = ctx.saved_tensors
        # In place: the gradient of 65,536 prototypes is large, and backward runs once.
        return feature_gradient.to(ctx.dtype).mul_(upstream), prototype_gradient.mul_(upstream), None, None, None, None


def prototype_cross_entropy(
    features: Tensor, prototypes: Tensor, targets: Tensor, index: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    """sum_i w_i * CE(targets[index_i], softmax(features_i @ prototypes.T / temperature)).

    DINO (Caron et al. 2021, eq. 1) and iBOT (Zhou et al. 2022, eq. 2) are both of this form. A target may be a sum of
    distributions: the cross entropy is linear in it, so a student crop that faces several teacher crops costs one row.

    Args:
        features: (rows, bottleneck) student features; gradient flows.
        prototypes: (K, bottleneck); gradient flows.
        targets: (targets, K) float32.
        index: (rows,) which target each row faces.
        weights: (rows,).

    Returns:
        scalar.
    """
    return _PrototypeCrossEntropy.apply(features, prototypes, targets, index, weights, temperature)


def koleo(features: Tensor) -> Tensor:
    """-mean log distance to the nearest other sample, on the unit sphere (Sablayrolles et al. 2019, eq. 2).

    Args:
        features: (samples, dim), gathered over ranks.

    Returns:
        scalar; 0 for a single sample, which has no neighbour.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = torch.nn.functional.normalize(all_gather(features.float()), dim=-1)
        if len(features) < 2:
            return features.sum() * 0
        with torch.no_grad():
            nearest = (features @ features.T).fill_diagonal_(-1).argmax(1)
        # The small constants keep the gradient finite for two equal samples.
        distance = torch.nn.functional.pairwise_distance(features, features[nearest], eps=1e-8)
        return -(distance + 1e-8).log().mean()
