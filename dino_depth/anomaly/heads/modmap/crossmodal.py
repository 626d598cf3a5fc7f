"""Crossmodal mapping and modulation: networks, equations 3 to 9 and schedule of ModMap (Costanzino et al. 2026).

Two networks predict the depth features of a target view from the image features of a source view at the same cell,
and the other way round; two modulators scale and shift the source features by what the pair of views is.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "Mapper", "cosine_distance", "crossmodal_distances", "draw_cells", "modulate", "one_cycle", "training_pairs",
    "view_codes",
]  # fmt: skip


class Mapper(nn.Module):
    """Mapping networks and modulators of one model.

    Args:
        dims: channels of image and depth features.
        image_to_depth: hidden widths of the image-to-depth network.
        depth_to_image: the same for depth to image.
        codes: length of a pair's code (``view_codes``); 0 leaves out the modulators.
        modulator: hidden width of the modulators.
    """

    def __init__(
        self,
        dims: tuple[int, int],
        image_to_depth: Sequence[int],
        depth_to_image: Sequence[int],
        codes: int = 0,
        modulator: int = 128,
    ):
        super().__init__()
        image, depth = dims
        # First, so that models with and without modulators start from the same mapping networks.
        self.image_to_depth = _mlp(image, *image_to_depth, depth)
        self.depth_to_image = _mlp(depth, *depth_to_image, image)
        self.image_modulator = _modulator(codes, modulator, image) if codes else None
        self.depth_modulator = _modulator(codes, modulator, depth) if codes else None


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def _modulator(codes: int, hidden: int, dim: int) -> nn.Sequential:
    """An MLP to [gamma, beta] that gives 1 and 0 for every code until it is trained."""
    network = _mlp(codes, hidden, 2 * dim)
    with torch.no_grad():
        network[-1].weight.zero_()
        network[-1].bias.copy_(torch.cat([torch.ones(dim), torch.zeros(dim)]))
    return network


def view_codes(source: Tensor, target: Tensor, class_index: Tensor, views: int, classes: int) -> Tensor:
    """The modulators' input [v_s; v_t], and the one-hot class where there are several (section 4.3).

    Args:
        source, target, class_index: (pairs,) integers.
        views: largest number of views of any class.

    Returns:
        (pairs, 2 * views [+ classes]) float32.
    """
    parts = [F.one_hot(source, views), F.one_hot(target, views)]
    if classes > 1:
        parts.append(F.one_hot(class_index, classes))
    return torch.cat(parts, 1).float()


def modulate(features: Tensor, modulator: nn.Module | None, codes: Tensor) -> Tensor:
    """Equations 3 to 5: gamma * F + beta, of features (pairs, cells, dim) and codes (pairs, code)."""
    if modulator is None:
        return features
    gamma, beta = modulator(codes)[:, None].chunk(2, -1)  # (pairs, 1, dim) each
    return torch.addcmul(beta, gamma, features)


def cosine_distance(predicted: Tensor, observed: Tensor) -> Tensor:
    """Equations 8 and 9: 1 - cosine over the last axis, never below 0 by rounding."""
    return (1 - F.cosine_similarity(predicted, observed, dim=-1)).clamp_min(0)


def crossmodal_distances(
    mapper: Mapper, source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], codes: Tensor
) -> tuple[Tensor, Tensor]:
    """Equations 6 to 9 for a batch of pairs.

    Args:
        source, target: image and depth features (pairs, cells, dim); the target's may lack the axis of pairs.
        codes: (pairs, code).

    Returns:
        Distances (pairs, cells) of the predicted image features from the target's, and of the depth features.
    """
    depth = mapper.image_to_depth(modulate(source[0], mapper.image_modulator, codes))
    image = mapper.depth_to_image(modulate(source[1], mapper.depth_modulator, codes))
    return cosine_distance(image, target[0]), cosine_distance(depth, target[1])


def training_pairs(views: list[int], classes: list[int], conditioning: str) -> Tensor:
    """The pairs of views to train on, as samples of so many views lie row after row: each its own source, or all.

    Returns:
        (pairs, 5) integers: source row, target row, source view, target view, class.
    """
    found, start = [], 0
    for count, index in zip(views, classes, strict=True):
        for target in range(count):
            sources = range(count) if conditioning == "cross-view" else [target]
            found += [(start + source, start + target, source, target, index) for source in sources]
        start += count
    return torch.tensor(found)


def draw_cells(shown: Tensor, tokens: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Cells of each pair to train on, drawn without replacement, so that as many as there are is the same as all.

    Args:
        shown: (pairs, cells) bool, the cells to draw from.
        tokens: how many; none means all.

    Returns:
        Indices (pairs, k) and their weights (pairs, k): 1, or 0 where a pair has fewer than k.
    """
    largest = int(shown.sum(1).max())
    if tokens is None or tokens >= largest:
        keys, count = shown.float(), largest
    else:
        keys, count = (torch.rand(shown.shape, generator=generator) + 1).to(shown.device) * shown, tokens
    top = keys.topk(count, 1)
    return top.indices, (top.values > 0).float()


def one_cycle(step: int, steps: int, initial: float, peak: float, warmup: float) -> tuple[float, float]:
    """Learning rate and first momentum of a 0-based step of a one-cycle schedule with cosines (Smith and Topin 2019).

    Equal to torch's OneCycleLR with its other defaults (the rate ends at 1e-4 of ``initial``, momentum .95, .85, .95),
    which divides by zero where the warm-up is one step.

    Args:
        warmup: share of the steps that the rate rises.
    """
    top = warmup * steps - 1
    if step <= top:
        done = step / top if top > 0 else 1.0
        ends = (initial, peak), (0.95, 0.85)
    else:
        done = (step - top) / (steps - 1 - top)
        ends = (peak, initial * 1e-4), (0.85, 0.95)
    weight = (1 + math.cos(math.pi * done)) / 2
    return tuple(end + (start - end) * weight for start, end in ends)
