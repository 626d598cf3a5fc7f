"""Rotary positions of patches (Su et al. 2021) in two dimensions, as DINO-v3 has them (Siméoni et al. 2025).

A patch lies at the row and column of its centre, from -1 to 1 over the image whatever its size. A quarter of a head's
dimensions are frequencies, 100^(-4i / head_dim); one half of the head's pairs (d, d + head_dim / 2) turns by the row,
the other by the column: angle 2 pi * coordinate * frequency. Queries and keys turn, values do not; class token and
registers, which lie nowhere, stay. The formula is that of transformers' ``DINOv3ViTModel``.
"""

import math

import torch
from torch import Tensor

__all__ = ["BASE", "rotate", "rotation"]

BASE = 100.0

Groups = list[tuple[int, int]]


def rotation(grid: tuple[int, int], prefix: int, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines (2, prefix + patches, 1, head_dim / 2) float32 of one sequence.

    Args:
        grid: rows and columns of patches.
        prefix: tokens before the patches.
        head_dim: a multiple of 4.
    """
    frequencies = 1 / BASE ** (torch.arange(head_dim // 4, device=device) * (4 / head_dim))  # (head_dim / 4,)
    rows, columns = (2 * (torch.arange(0.5, side, device=device) / side) - 1 for side in grid)
    places = torch.cartesian_prod(rows, columns)  # (patches, 2)
    angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1)  # (patches, head_dim / 2)
    angles = torch.cat([angles.new_zeros(prefix, head_dim // 2), angles])[:, None]
    return torch.stack([angles.cos(), angles.sin()])


def rotate(tokens: Tensor, groups: Groups, rotations: list[Tensor]) -> Tensor:
    """Turns queries or keys of a pack.

    Args:
        tokens: (tokens, heads, head_dim).
        groups: (sequences, length) in the order in which they lie in the pack.
        rotations: of each group, :func:`rotation`.

    Returns:
        (tokens, heads, head_dim) in the type of ``tokens``, computed in float32.
    """
    parts = []
    for part, group, (cosine, sine) in zip(
        tokens.split([count * length for count, length in groups]), groups, rotations, strict=True
    ):
        first, second = part.unflatten(0, group).chunk(2, -1)  # (sequences, length, heads, head_dim / 2)
        turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)
        parts.append(turned.flatten(0, 1).to(tokens.dtype))
    return torch.cat(parts)
