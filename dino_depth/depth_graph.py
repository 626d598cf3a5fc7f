"""``depth.normalize`` as a graph of tensors, for forms of an encoder that run without this package.

The same equations in the same precision on batches: no shape depends on how many pixels are valid, and only operators
that ONNX has are used, so that ``torch.export`` and ONNX take it whole. ``depth.py`` says what the steps are for.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from dino_depth.depth import HORIZON, KNEE, PLANE_TOLERANCE, PLANE_TRIALS, Normalization, grid_stride

__all__ = ["GraphNormalization"]

VOTERS = 4  # every fourth pixel tells the trials apart
FLAT = 1e-12  # of a normal matrix: determinant over the cube of the trace, below which its points lie on a line


class GraphNormalization(nn.Module):
    """Metric depth (batch, 1, side, side) to the network's input, both float32; 0, NaN and infinity are missing.

    Args:
        side: of the square maps, pixels.
    """

    def __init__(self, normalization: Normalization, side: int):
        super().__init__()
        self.normalization, self.stride = normalization, grid_stride(side * side)
        # The words that numpy's bounded integers are made of: the upper half of word * count.
        words = np.random.default_rng(0).integers(0, 2**32, PLANE_TRIALS * 3, dtype=np.uint32).astype(np.int64)
        self.register_buffer("words", torch.from_numpy(words), persistent=False)
        places = torch.arange(0, side, self.stride, dtype=torch.float64) / side
        ones = torch.ones(len(places), len(places), dtype=torch.float64)
        points = torch.stack([places[None, :] * ones, places[:, None] * ones, ones], -1).flatten(0, 1)
        self.register_buffer("points", points, persistent=False)  # (pixels, 3): column, row, 1
        self.register_buffer("along", torch.arange(side, dtype=torch.float32) / side, persistent=False)

    def forward(self, depth: Tensor) -> Tensor:
        valid = (depth > 0) & (depth < math.inf)  # NaN is neither
        depth = torch.where(valid, depth, 0.0)
        method = self.normalization.method
        if method == "plane":
            value = self._height(depth, valid)
        elif method == "log":
            value = torch.log1p(depth) / math.log(101.0)
        else:
            far = depth.amax((2, 3), keepdim=True)
            value = depth / torch.where(far > 0, far, 1.0)
            if method == "minmax":
                near = torch.where(valid, depth, math.inf).amin((2, 3), keepdim=True)
                span = far - near
                value = 0.1 + 0.9 * (depth - near) / torch.where(span > 0, span, 1.0)
        return torch.where(valid, value, 0.0)

    def _height(self, depth: Tensor, valid: Tensor) -> Tensor:
        """``depth._height`` of metric maps."""
        bounded, start = self.normalization.formula == 2, self.normalization.plane_support
        median = _median(depth.flatten(1), valid.flatten(1))[:, :, None, None]  # (batch, 1, 1, 1)
        plane, support = self._fit(depth, valid)
        plane, support = plane.float()[:, :, None, None, None], support[:, None, None, None]
        if bounded:
            nearest, farthest = median / HORIZON, median * HORIZON
            weight = (support / max(start, 1e-6) - 1).clamp(0, 1).float()
        else:
            nearest, farthest = torch.zeros_like(median), 10 * depth.amax((2, 3), keepdim=True)
            weight = (support >= start).float()
        on_plane = plane[:, 0] * self.along + plane[:, 1] * self.along[:, None] + plane[:, 2]
        farthest = torch.where(farthest > 0, farthest, 1.0)
        on_plane = 1 / torch.maximum(on_plane, 1 / farthest)
        on_plane = torch.minimum(torch.maximum(on_plane, nearest), farthest)
        reference = torch.where(weight > 0, weight * on_plane + (1 - weight) * median, median)
        value = (reference - depth) / self.normalization.scale
        return KNEE * torch.asinh(value / KNEE) if bounded else value

    def _fit(self, depth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """``depth.fit_plane`` of metric maps: (batch, 3) and (batch,) float64."""
        thin = slice(None, None, self.stride)
        valid = valid[:, 0, thin, thin].flatten(1)  # (batch, pixels)
        z = torch.where(valid, depth[:, 0, thin, thin].flatten(1), 1.0).double()
        target, count, points = 1 / z, valid.sum(1), self.points
        limit = PLANE_TOLERANCE / _median(z, valid)  # (batch, 1)
        rank = valid.long().cumsum(1)  # of a valid pixel among the valid ones, from 1
        drawn = torch.div(
            self.words * count[:, None], 2**32, rounding_mode="floor"
        )  # which valid ones, (batch, 3 trials)
        index = (rank[:, None, :] <= drawn[:, :, None]).sum(2).clamp(max=len(points) - 1)
        corners = points[index].unflatten(1, (-1, 3))  # (batch, trials, 3 points, 3)
        planes, volume = _solve(corners, target.gather(1, index).unflatten(1, (-1, 3)))
        usable = volume.abs() > 1e-4
        far = (points @ planes.transpose(1, 2) - target[:, :, None]).abs()  # (batch, pixels, trials)
        voter = (valid & ((rank - 1) % VOTERS == 0))[:, :, None]
        votes = ((far < limit[:, :, None]) & voter).sum(1)
        best = torch.where(usable, votes, -1).argmax(1)  # the first of equals, as numpy's
        plane = planes.gather(1, best[:, None, None].expand(-1, 1, 3))[:, 0]
        good = usable.any(1) & (count >= 3)
        chosen = valid & (self._distance(plane, target) < limit)
        for _ in range(3):
            weight = chosen.double()[:, :, None] * points  # (batch, pixels, 3)
            matrix = weight.transpose(1, 2) @ points
            plane, volume = _solve(matrix, (weight.transpose(1, 2) @ target[:, :, None])[..., 0])
            trace = matrix[:, 0, 0] + matrix[:, 1, 1] + matrix[:, 2, 2]
            good = good & (chosen.sum(1) >= 3) & (volume > FLAT * trace**3)
            refined = valid & (self._distance(plane, target) < limit)
            enough = (refined.sum(1) >= 3)[:, None]
            chosen = (refined & enough) | (chosen & ~enough)  # ONNX Runtime has no where() of booleans
        support = chosen.sum(1).double() / count.clamp(min=1)
        return torch.where(good[:, None], plane, 0.0), torch.where(good, support, 0.0)

    def _distance(self, plane: Tensor, target: Tensor) -> Tensor:
        return ((self.points @ plane[:, :, None])[..., 0] - target).abs()


def _median(values: Tensor, valid: Tensor) -> Tensor:
    """(batch, 1) of the valid ones of values (batch, pixels); infinity where there are none."""
    ordered = torch.where(valid, values, math.inf).sort(1).values
    count = valid.sum(1, keepdim=True)
    low, high = ((count - 1) // 2).clamp(min=0), (count // 2).clamp(max=values.shape[1] - 1)
    low, high = ordered.gather(1, low), ordered.gather(1, high)
    return (low + high) / 2


def _solve(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., 3) of matrix (..., 3, 3) x = right (..., 3), 0 where singular, and the determinants (...).

    By the adjugate: ONNX has no operator for the inverse.
    """
    rows = matrix.unbind(-2)
    columns = [_cross(rows[1], rows[2]), _cross(rows[2], rows[0]), _cross(rows[0], rows[1])]  # of the adjugate
    volume = (rows[0] * columns[0]).sum(-1)
    found = sum(column * right[..., place, None] for place, column in enumerate(columns))
    singular = volume == 0
    return torch.where(singular[..., None], 0.0, found / torch.where(singular, 1.0, volume)[..., None]), volume


def _cross(left: Tensor, right: Tensor) -> Tensor:
    a, b, c = left.unbind(-1)
    d, e, f = right.unbind(-1)
    return torch.stack([b * f - c * e, c * d - a * f, a * e - b * d], -1)
