"""The networks of AST: a normalising flow that is exactly invertible, and a student that is not (section 3).

Both see feature maps (batch, channels, rows, columns) and, beside them, a sinusoidal code of every cell's position. The
flow is four blocks, each a fixed permutation of the channels and an affine coupling of both halves. Its Jacobian's
logarithm is kept for every cell, since cells without the object do not count in the loss: libraries of flows sum it
over the picture.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CODE", "Flow", "Student", "position_code"]

CODE = 32  # channels of the position
BLOCKS = 4
KERNEL, LAST_KERNEL = 3, 5
CLAMP = 1.9  # the largest logarithm of a scale


def position_code(rows: int, columns: int, like: Tensor) -> Tensor:
    """(1, 32, rows, columns): half the channels sines and cosines of the column, half of the row."""
    half = CODE // 2
    rates = torch.exp(torch.arange(0, half, 2, dtype=torch.float64) * (-math.log(10_000) / half))
    parts = []
    for count in (columns, rows):
        angle = torch.arange(count, dtype=torch.float64)[:, None] * rates
        parts.append(torch.stack([angle.sin(), angle.cos()], 2).flatten(1).T)  # (half, count)
    across = parts[0][:, None, :].expand(-1, rows, -1)
    down = parts[1][:, :, None].expand(-1, -1, columns)
    return torch.cat([across, down])[None].to(like)


class _Subnet(nn.Module):
    """What scale and shift of one half are computed by, from the other half: zeros before training."""

    def __init__(self, inside: int, hidden: int, outside: int, kernel: int):
        super().__init__()
        options = {"padding": kernel // 2, "padding_mode": "replicate"}
        self.first = nn.Conv2d(inside, hidden, kernel, **options)
        self.second = nn.Conv2d(hidden, outside, kernel, **options)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, half: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the scale, within -1.9 and 1.9, and shift."""
        given = torch.cat([half, code.expand(len(half), -1, -1, -1)], 1)
        scale, shift = (self.second(F.relu(self.first(given))) * self.gamma).chunk(2, 1)
        return CLAMP * 0.636 * torch.atan(scale / CLAMP), shift


class _Coupling(nn.Module):
    """Both halves in turn: y1 = exp(s(x2)) x1 + t(x2), then y2 = exp(s(y1)) x2 + t(y1)."""

    def __init__(self, channels: int, hidden: int, kernel: int):
        super().__init__()
        self.half = channels // 2
        rest = channels - self.half
        self.of_first = _Subnet(rest + CODE, hidden, 2 * self.half, kernel)
        self.of_second = _Subnet(self.half + CODE, hidden, 2 * rest, kernel)

    def forward(self, x: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
        """The outcome and the logarithm of the Jacobian's determinant, (batch, rows, columns)."""
        first, second = x[:, : self.half], x[:, self.half :]
        scale, shift = self.of_first(second, code)
        first, total = scale.exp() * first + shift, scale.sum(1)
        scale, shift = self.of_second(first, code)
        return torch.cat([first, scale.exp() * second + shift], 1), total + scale.sum(1)

    def inverse(self, y: Tensor, code: Tensor) -> Tensor:
        first, second = y[:, : self.half], y[:, self.half :]
        scale, shift = self.of_second(first, code)
        second = (second - shift) * (-scale).exp()
        scale, shift = self.of_first(second, code)
        return torch.cat([(first - shift) * (-scale).exp(), second], 1)


class Flow(nn.Module):
    """The teacher.

    Args:
        channels: of the features, at least 2.
        hidden: channels inside the couplings.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        kernels = [KERNEL] * (BLOCKS - 1) + [LAST_KERNEL]
        self.couplings = nn.ModuleList(_Coupling(channels, hidden, kernel) for kernel in kernels)
        # Drawn once for all flows of so many channels, so no part of the state.
        self.orders = [torch.from_numpy(np.random.default_rng(block).permutation(channels)) for block in range(BLOCKS)]

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, channels, rows, columns), normally distributed after training, and log det (batch, rows, columns)."""
        code, total = position_code(*features.shape[2:], features), 0
        for order, coupling in zip(self.orders, self.couplings, strict=True):
            features, log_det = coupling(features[:, order.to(features.device)], code)
            total = total + log_det
        return features, total

    def inverse(self, z: Tensor) -> Tensor:
        """The features that ``forward`` takes to ``z``."""
        code = position_code(*z.shape[2:], z)
        for order, coupling in zip(reversed(self.orders), reversed(self.couplings), strict=True):
            z = coupling.inverse(z, code)[:, order.argsort().to(z.device)]
        return z


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(2):
            parts += [nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.LeakyReLU(0.01)]
        self.layers = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Student(nn.Module):
    """Convolutions that learn what the flow makes of the same features.

    Args:
        channels: of the features.
        hidden: channels inside.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        first, last = nn.Conv2d(channels + CODE, hidden, 3, padding=1), nn.Conv2d(hidden, channels, 3, padding=1)
        self.layers = nn.Sequential(first, *(_Residual(hidden) for _ in range(4)), last)

    def forward(self, features: Tensor) -> Tensor:
        code = position_code(*features.shape[2:], features).expand(len(features), -1, -1, -1)
        return self.layers(torch.cat([features, code], 1))
