"""The network of MVAD: windows of other views, chosen and attended to, and reverse distillation (He et al. 2024).

Numbers are those of the public code for views of 256 pixels and a ResNet-34; any three maps, each half of the one
before, will do. What differs from that code is listed in ``docs/sganet.md``.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Network", "multi_view_selection", "position_code"]


def position_code(dim: int, rows: int) -> Tensor:
    """The fixed sine code (dim, rows, rows) of a place in a grid, its coordinates counted from 0 to 2 pi."""
    place = torch.arange(1, rows + 1, dtype=torch.float64) / rows * 2 * math.pi
    count = dim // 2
    scale = 10000 ** (2 * torch.div(torch.arange(count, dtype=torch.float64), 2, rounding_mode="floor") / count)
    angles = place[:, None] / scale
    code = torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], 2).flatten(1)  # (rows, dim / 2)
    down, across = code[:, None].expand(-1, rows, -1), code[None].expand(rows, -1, -1)
    return torch.cat([down, across], 2).permute(2, 0, 1).float()


def _windows(maps: Tensor, count: int) -> Tensor:
    """(V, windows, pixels of a window, dim) of maps (V, dim, n, n), padded by zeros on the right and below."""
    side = -(-maps.shape[-1] // count)
    pad = side * count - maps.shape[-1]
    maps = F.pad(maps, (0, pad, 0, pad))
    views, dim = maps.shape[:2]
    parts = maps.view(views, dim, count, side, count, side).permute(0, 2, 4, 3, 5, 1)
    return parts.reshape(views, count * count, side * side, dim)


def _maps(windows: Tensor, rows: int) -> Tensor:
    """The inverse of ``_windows``, of maps with so many rows."""
    views, number, pixels, dim = windows.shape
    count, side = math.isqrt(number), math.isqrt(pixels)
    maps = windows.view(views, count, count, side, side, dim).permute(0, 5, 1, 3, 2, 4)
    return maps.reshape(views, dim, count * side, count * side)[..., :rows, :rows]


def multi_view_selection(
    query: Tensor, maps: Tensor, windows: int, chosen: int, heads: int, masked: bool = False
) -> Tensor:
    """Every window attends to those windows of the other views whose means are most like its own; no learned weights.

    Args:
        query: (V, dim, n, n), and ``maps``: (V, dim, n, n), keys and values as they are.
        windows: along a side; where they do not divide n, zeros are added.
        chosen: windows for each.
        heads: of the attention; logits are divided by the root of the whole width, as the public code has it.
        masked: those zeros take no part. In the public code they do, which lowers what the border windows give.

    Returns:
        (V, dim, n, n).
    """
    views, dim, rows = query.shape[0], query.shape[1], query.shape[-1]
    asked, kept = _windows(query, windows), _windows(maps, windows)
    real = _windows(torch.ones_like(maps[:, :1]), windows)[..., 0] > 0  # (V, windows, pixels)
    weight = real.to(kept) if masked else torch.ones_like(real, dtype=kept.dtype)
    size = weight.sum(2, keepdim=True).clamp_min(1)
    means = [(part.detach() * weight[..., None]).sum(2) / size for part in (asked, kept)]  # (V, windows, dim)
    found = []
    number = kept.shape[1]
    for view in range(views):  # a view at a time bounds what is gathered
        others = [other for other in range(views) if other != view]
        likeness = means[0][view] @ means[1][others].flatten(0, 1).T  # (windows, (V - 1) windows)
        best = likeness.topk(min(chosen, likeness.shape[1]), 1).indices
        place = torch.tensor(others, device=best.device)[best // number], best % number
        near = kept[place].flatten(1, 2)  # (windows, chosen * pixels, dim)
        left, right = (part.unflatten(-1, (heads, dim // heads)) for part in (asked[view], near))
        logits = torch.einsum("wphd,wkhd->whpk", left, right) * dim**-0.5
        if masked:
            logits = logits.masked_fill(~real[place].flatten(1, 2)[:, None, None], -torch.inf)
        found.append(torch.einsum("whpk,wkhd->wphd", logits.softmax(-1), right).flatten(2))
    return _maps(torch.stack(found), rows)


class _Block(nn.Module):
    """x = LN(x + drop(selection(x + code))), x = LN(x + MLP(x))."""

    def __init__(self, dim: int, windows: int, chosen: int, heads: int, masked: bool):
        super().__init__()
        self.selection = {"windows": windows, "chosen": chosen, "heads": heads, "masked": masked}
        self.first, self.second = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
        layers = nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4 * dim, dim), nn.Dropout(0.1)
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor, maps: Tensor) -> Tensor:
        code = position_code(x.shape[1], x.shape[-1]).to(x)
        windows = min(self.selection["windows"], x.shape[-1])
        added = multi_view_selection(x + code, maps, **(self.selection | {"windows": windows}))
        if self.training:  # a view in ten goes without
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= 0.1
            added = added * kept / 0.9
        x = self.first((x + added).movedim(1, -1))
        return self.second(x + self.mlp(x)).movedim(-1, 1)


def _conv(before: int, after: int, size: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())


class _Residual(nn.Module):
    """A residual block; ``grow`` doubles the resolution by a transposed convolution, ``shrink`` halves it.

    Args:
        narrow: width of the middle; a quarter of ``after`` makes it a bottleneck.
    """

    def __init__(self, before: int, after: int, shrink: bool = False, grow: bool = False):
        super().__init__()
        if shrink:
            narrow = after // 4
            body = [*_conv(before, narrow), *_conv(narrow, narrow, 3, 2), nn.Conv2d(narrow, after, 1, bias=False)]
            skip = nn.Conv2d(before, after, 1, 2, bias=False)
        elif grow:
            up = nn.ConvTranspose2d(before, after, 2, 2, bias=False)
            body = [up, nn.BatchNorm2d(after), nn.ReLU(), nn.Conv2d(after, after, 3, 1, 1, bias=False)]
            skip = nn.ConvTranspose2d(before, after, 2, 2, bias=False)
        else:
            body = [*_conv(before, after, 3), nn.Conv2d(after, after, 3, 1, 1, bias=False)]
            skip = None
        self.body = nn.Sequential(*body, nn.BatchNorm2d(after))
        self.skip = nn.Identity() if skip is None else nn.Sequential(skip, nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Network(nn.Module):
    """What is learned: the blocks of each scale, the bottleneck that loses what is not normal, and the student.

    Args:
        dims: channels of the teacher's three maps, finest first.
        blocks: of each scale; none at all is reverse distillation without other views.
    """

    def __init__(
        self, dims: Sequence[int], blocks: Sequence[int], windows: Sequence[int], chosen: int, heads: int, masked: bool
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(_Block(dim, count, chosen, heads, masked) for _ in range(number))
            for dim, number, count in zip(dims, blocks, windows, strict=True)
        )
        fine, middle, coarse = dims
        self.down = nn.ModuleList([_conv(fine, middle, 3, 2), _conv(middle, coarse, 3, 2)])
        self.across = nn.ModuleList([_conv(middle, middle), _conv(coarse, coarse)])
        self.joined = _conv(coarse, coarse)
        wide = 2 * coarse
        self.bottleneck = nn.Sequential(_Residual(coarse, wide, shrink=True), *(_Wide(wide) for _ in range(2)))
        self.student = nn.ModuleList(
            nn.Sequential(_Residual(before, after, grow=True), *(_Residual(after, after) for _ in range(number - 1)))
            for before, after, number in ((wide, coarse, 3), (coarse, middle, 4), (middle, fine, 6))
        )

    def forward(self, teacher: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps (V, dim, n, n), finest first, of the teacher's of all views of one instance."""
        refined = []
        for maps, blocks in zip(teacher, self.blocks, strict=True):
            x = maps
            for block in blocks:
                x = block(x, maps)
            refined.append(x)
        x = self.across[0](refined[1]) + self.down[0](refined[0])
        x = self.down[1](x) + self.across[1](refined[2])
        x = self.bottleneck(self.joined(x))
        found = []
        for stage in self.student:
            x = stage(x)
            found.append(x)
        return found[::-1]


class _Wide(nn.Module):
    """A bottleneck that keeps its resolution."""

    def __init__(self, width: int):
        super().__init__()
        narrow = width // 4
        last = nn.Conv2d(narrow, width, 1, bias=False), nn.BatchNorm2d(width)
        self.body = nn.Sequential(*_conv(width, narrow), *_conv(narrow, narrow, 3), *last)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + x)
