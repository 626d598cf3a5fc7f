"""DINO, iBOT and KoLeo losses and Sinkhorn-Knopp centering, without float32 logits of all rows at once.

Logits of thousands of rows over 65,536 prototypes are read and written many times for a few operations each. On a CPU
they are worked on a few rows at a time, while they lie in cache. On a GPU in a run that compiles, each pass over them
is one kernel that reads them as they are, computes exponentials on the way and writes only what the pass is for.
"""

import torch
from torch import Tensor

from dino_depth.compiled import compiled, is_compiling, vary
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
    # Under autocast the products with u and v would be rounded to bfloat16: rows summed to 1 within 5e-3 only.
    with torch.autocast(logits.device.type, enabled=False):
        return _sinkhorn(logits, temperature, iterations)


def _sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    if iterations == 0:
        return (logits.float() / temperature).softmax(-1)
    # Filled on the device: a copy from the host would wait for everything before it.
    count = all_sum(torch.full((), float(len(logits)), device=logits.device))
    largest = all_max(logits.max().float() if len(logits) else torch.tensor(-torch.inf, device=logits.device))
    if _fuses(logits):
        return _sinkhorn_in_passes(logits, temperature, iterations, count, largest)
    kernel = torch.empty(logits.shape, device=logits.device)
    chunks = range(0, len(logits), CACHE_ROWS if logits.device.type == "cpu" else max(1, len(logits)))
    prototypes = logits.shape[1]
    mass = torch.zeros(prototypes, device=logits.device)
    tiny = torch.finfo(mass.dtype).tiny
    for start in chunks:
        rows = slice(start, start + chunks.step)
        part = kernel[rows]
        _scale_and_shift(logits[rows], 1 / temperature, largest, part).exp_()
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


def _fuses(logits: Tensor) -> bool:
    return is_compiling() and logits.is_cuda


def _sinkhorn_in_passes(logits: Tensor, temperature: float, iterations: int, count: Tensor, largest: Tensor) -> Tensor:
    """:func:`sinkhorn` in 2 * iterations passes over ``logits``, which keep no kernel.

    Args:
        count: () samples of all ranks.
        largest: () logit of all ranks.
    """
    prototypes, tiny = logits.shape[1], torch.finfo(torch.float32).tiny
    # A tensor, because the temperature is scheduled and a number would be compiled in.
    sharpness = torch.full((), 1 / temperature, device=logits.device)
    per_sample = torch.ones(len(logits), device=logits.device)
    for iteration in range(iterations):
        vary(logits, per_sample)
        mass = all_sum(_prototype_masses(logits, largest, sharpness, per_sample))
        per_prototype = 1 / (prototypes * mass.clamp_min(tiny))
        if iteration < iterations - 1:
            per_sample = 1 / _sample_masses(logits, largest, sharpness, per_prototype).clamp_min(tiny) / count
    return _balanced(logits, largest, sharpness, per_prototype)


@compiled
def _prototype_masses(logits: Tensor, largest: Tensor, sharpness: Tensor, per_sample: Tensor) -> Tensor:
    """(K,) E^T v."""
    return (((logits.float() - largest) * sharpness).exp() * per_sample[:, None]).sum(0)


@compiled
def _sample_masses(logits: Tensor, largest: Tensor, sharpness: Tensor, per_prototype: Tensor) -> Tensor:
    """(samples,) E u."""
    return (((logits.float() - largest) * sharpness).exp() * per_prototype).sum(1)


@compiled
def _balanced(logits: Tensor, largest: Tensor, sharpness: Tensor, per_prototype: Tensor) -> Tensor:
    """(samples, K) rows of E diag(u), normalised."""
    rows = ((logits.float() - largest) * sharpness).exp() * per_prototype
    return rows / rows.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _scale_and_shift(logits: Tensor, sharpness: float, largest: Tensor, out: Tensor) -> Tensor:
    """sharpness * (logits - largest), into float32 ``out``.

    Widened first: a difference of bfloat16 logits would be rounded to bfloat16 before it is scaled.
    """
    return torch.add(largest * -sharpness, out.copy_(logits), alpha=sharpness, out=out)


@compiled
def _cross_entropy(
    logits: Tensor, targets: Tensor, index: Tensor | None, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The loss () of a few rows, and its gradient (rows, K) with respect to their ``logits``, in the same type."""
    values, wanted = logits.float() * (1 / temperature), targets if index is None else targets[index]
    mass, normalizer = wanted.sum(1), values.logsumexp(1)
    loss = (weights * (mass * normalizer - (wanted * values).sum(1))).sum()
    gradient = (values - normalizer[:, None]).exp() * mass[:, None] - wanted
    return loss, (gradient * (weights[:, None] / temperature)).to(logits.dtype)


def _cross_entropy_in_cache(
    logits: Tensor, targets: Tensor, index: Tensor | None, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """As :func:`_cross_entropy`; the gradient takes the place of ``logits``."""
    total = torch.zeros((), device=logits.device)
    step = CACHE_ROWS if logits.device.type == "cpu" else MATMUL_ROWS
    buffer = torch.empty(min(step, len(logits)), logits.shape[1], device=logits.device)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        part, wanted = logits[rows], targets[rows] if index is None else targets[index[rows]]
        # Relative to the largest logit of the row.
        largest = part.amax(1, keepdim=True).float()
        values = _scale_and_shift(part, 1 / temperature, largest, buffer[: len(part)])
        mass, product = wanted.sum(1), torch.linalg.vecdot(wanted, values)
        normalizer = values.exp_().sum(1)
        total += weights[rows] @ (mass * normalizer.log() - product)
        scale = weights[rows] / temperature
        values.mul_((scale * mass / normalizer)[:, None])
        part.copy_(torch.addcmul(values, wanted, scale[:, None], value=-1, out=values))
    return total, logits


class _PrototypeCrossEntropy(torch.autograd.Function):
    """Computes the gradient together with the loss, a few rows at a time, while the logits are in cache."""

    @staticmethod
    def forward(ctx, features, prototypes, targets, index, weights, temperature):
        dtype = matmul_dtype(features.device)
        with torch.autocast(features.device.type, enabled=False):
            narrow_features, narrow_prototypes = features.to(dtype), prototypes.to(dtype)
            total = torch.zeros((), device=features.device)
            feature_gradient, prototype_gradient = torch.empty_like(narrow_features), None
            for start in range(0, len(features), MATMUL_ROWS):
                rows = slice(start, start + MATMUL_ROWS)
                wanted, chosen = (targets[rows], None) if index is None else (targets, index[rows])
                logits = narrow_features[rows] @ narrow_prototypes.T  # (rows, K)
                cross_entropy = _cross_entropy if _fuses(logits) else _cross_entropy_in_cache
                vary(logits, wanted, weight := weights[rows], *([] if chosen is None else [chosen]))
                loss, gradient = cross_entropy(logits, wanted, chosen, weight, temperature)
                total += loss
                feature_gradient[rows] = gradient @ narrow_prototypes
                added = gradient.T @ narrow_features[rows]
                # Summed in float32; a single part stays as it is until it is scaled.
                prototype_gradient = added if prototype_gradient is None else prototype_gradient.float().add_(added)
            if prototype_gradient is None:  # no rows
                prototype_gradient = torch.zeros_like(prototypes)
        ctx.save_for_backward(feature_gradient, prototype_gradient)
        ctx.dtypes = features.dtype, prototypes.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        # In place: the gradient of 65,536 prototypes is large, and backward runs once.
        found = (
            gradient.to(dtype).mul_(upstream) for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *found, None, None, None, None


def prototype_cross_entropy(
    features: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    index: Tensor | None,
    weights: Tensor,
    temperature: float,
) -> Tensor:
    """sum_i w_i * CE(targets[index_i], softmax(features_i @ prototypes.T / temperature)).

    DINO (Caron et al. 2021, eq. 1) and iBOT (Zhou et al. 2022, eq. 2) are both of this form. A target may be a sum of
    distributions: the cross entropy is linear in it, so a student crop that faces several teacher crops costs one row.

    Args:
        features: (rows, bottleneck) student features; gradient flows.
        prototypes: (K, bottleneck); gradient flows.
        targets: (targets, K) float32.
        index: (rows,) which target each row faces; None: row i faces target i.
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
