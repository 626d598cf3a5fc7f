"""Hole-safe, antialiased resampling of depth maps by affine maps: one resampling, on CPU or GPU.

Pixel-centre convention, here and nowhere else restated: the pixel in row i and column j covers [j, j+1) x [i, i+1), so
its centre is (x, y) = (j + 0.5, i + 0.5), x to the right and y down. An affine (2, 3) takes (u, v, 1), the position in
the crop's unit square (u to the right, v down), to (x, y) in the map. It holds no size, so one crop can be sampled at
any.

What a crop's pixel is. The map is extended by missing pixels, and depth times validity and validity are both averaged
over the pixel's footprint with the same non-negative weights; their ratio is the pixel's depth where the footprint is
more than half valid, else the pixel is missing (0). A hole therefore never enters a value, and depth never fills one.

The footprint. The ideal one is the pixel's parallelogram in the map, over the bilinear interpolation of the map. Here
it is three bilinear samples at the corners of a triangle, read from the level of a half-octave pyramid that gives the
weights the variance of the ideal ones. Along an axis where a crop's pixel spans s pixels of the map that is

    ideal       s^2 / 12 + 1 / 6       a box of width s, and bilinear interpolation (a tent) between pixels
    samples     s^2 / 16               the triangle's
    level l     2^l / 4 - 1 / 12       its boxes, and the tent between its pixels

which agree for 2^l = 1 + s^2 / 12. Even levels halve the map l / 2 times by boxes of 2 x 2, odd levels are the mean of
every 2 x 2 neighbours of the level below, not thinned out. A crop that shrinks neither axis is sampled once per pixel,
so that a map cropped whole at its own size comes back unchanged.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["Pyramid", "fit_square", "resample"]

# Where a pixel is sampled, from its centre in pixels: (uv, 3 samples), with a covariance of 1 / 16 times the identity.
TRIANGLE = np.array([[0, -math.sqrt(6), math.sqrt(6)], [math.sqrt(8), -math.sqrt(2), -math.sqrt(2)]]) / 8
# An even level serves this far, in levels, around the place where the variances agree, an odd one the rest: it
# interpolates finely for its blur, so its error is the smaller one.
EVEN_REACH = 0.4
UNSHRUNK = -1  # instead of a level: level 0, sampled once
LARGEST_TILE = 49  # side, in pixels of the crop, of what is sampled together


class Pyramid:
    """Maps of one size, ready to be cropped; levels are built when a crop first needs them.

    Args:
        values: (maps, height, width) float32, finite; what it holds where not valid is ignored.
        valid: (maps, height, width) bool, on the same device.
    """

    def __init__(self, values: torch.Tensor, valid: torch.Tensor):
        if values.dim() != 3 or values.shape != valid.shape:
            raise ValueError(
                f"values {tuple(values.shape)} and valid {tuple(valid.shape)} must be (maps, height, width)"
            )
        if values.dtype != torch.float32 or valid.dtype != torch.bool:
            raise ValueError(f"values must be float32 and valid bool, got {values.dtype} and {valid.dtype}")
        # Building levels is bound by memory, and the sums of validity fit bytes up to level 6.
        count = valid.contiguous().view(torch.uint8)
        weight = count.float()
        self.counts = [count]
        self.levels = [(values * weight, weight)]

    def level(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of values and of validity (maps, height, width); a pixel covers 4^ceil(index / 2) pixels of the map."""
        while len(self.levels) <= index:
            total, count = self.levels[-1][0], self.counts[-1]
            if len(self.levels) % 2:
                total = _neighbour_sums(total)
                count = _neighbour_sums(count.int() if len(self.levels) > 6 else count)
            else:
                total, count = (part[:, 1::2, 1::2].contiguous() for part in (total, count))
            self.counts.append(count)
            self.levels.append((total, count.float()))
        return self.levels[index]

    def sample(self, affines: np.ndarray, size: int) -> torch.Tensor:
        """Crops (maps, crops, 1, size, size) float32 of every map, missing pixels 0.

        Args:
            affines: (maps, crops, 2, 3) float64, from the crop's unit square to the map, see the module's docstring.
            size: side of the crops, pixels.
        """
        maps, crops = affines.shape[:2]
        # The area of a crop's pixel, in pixels of the map: (maps, crops).
        area = abs(affines[..., 0, 0] * affines[..., 1, 1] - affines[..., 0, 1] * affines[..., 1, 0]) / size**2
        shrunk = (affines[..., :2] ** 2).sum(-2).max(-1) > size**2
        place = np.log2(1 + area / 12) + EVEN_REACH
        levels = np.where(shrunk, 2 * (place // 2) + (place % 2 > 2 * EVEN_REACH), UNSHRUNK).astype(int)
        present = sorted(set(levels.flat))
        if len(present) == 1:
            return self._sample_level(present[0], affines, size).reshape(maps, crops, 1, size, size)
        every = np.arange(maps)[:, None]
        # Maps need not have equally many crops at a level: the same number is sampled of each, some for a spare slot.
        output = torch.empty(maps, crops + 1, size, size, device=self.counts[0].device)
        for index in present:
            at_level = levels == index
            picked = np.argsort(~at_level, axis=1, kind="stable")[:, : at_level.sum(1).max()]  # (maps, picked)
            sampled = self._sample_level(index, affines[every, picked], size)
            slots = np.where(at_level[every, picked], picked, crops)
            output.view(maps, crops + 1, *sampled.shape[2:])[every, slots] = sampled
        return output[:, :crops, None]

    def _sample_level(self, index: int, affines: np.ndarray, size: int) -> torch.Tensor:
        """Crops (maps, crops, tiles, tile, tiles, tile) from one level, size = tiles * tile."""
        samples = TRIANGLE / size
        if index == UNSHRUNK:
            index, samples = 0, np.zeros((2, 1))
        level = self.level(index)
        maps, crops = affines.shape[:2]
        tile = _tile(size)
        tiles = size // tile
        # From pixels of the map to grid_sample's -1 .. 1 over the level. A pixel of an odd level is centred on a corner
        # of the level below, its first one on that level's own corner.
        extent = np.array([level[0].shape[2], level[0].shape[1]])  # width, height
        affines = (affines * (2 / (2.0 ** (index // 2) * extent))[:, None]).swapaxes(1, 2)  # (maps, xy, crops, 3)
        affines[..., 2] += ((index % 2) / extent - 1)[:, None]
        places = ((np.arange(size) + 0.5) / size).reshape(tiles, 1, tile)
        places = places + samples[:, None, :, None]  # (uv, tiles, samples, tile)
        along = affines[..., :2, None, None, None] * places  # (maps, xy, crops, uv, tiles, samples, tile)
        along[:, :, :, 1] += affines[..., 2, None, None, None]
        along = torch.from_numpy(along.astype(np.float32)).to(self.counts[0].device)
        along_u, along_v = along[:, :, :, 0], along[:, :, :, 1]
        grid = torch.empty(maps, 2, crops, tiles, tiles, samples.shape[1], tile, tile, device=along.device)
        torch.add(along_v[:, :, :, :, None, :, :, None], along_u[:, :, :, None, :, :, None, :], out=grid)
        grid = grid.view(maps, 2, -1, tile).permute(0, 2, 3, 1)
        shape = maps, crops, tiles, tiles, -1, tile, tile
        # One channel after the other is faster: half as much of the map competes for the cache.
        total, weight = (F.grid_sample(part[:, None], grid, align_corners=False).view(shape).sum(4) for part in level)
        half = samples.shape[1] * 4 ** ((index + 1) // 2) / 2
        return (total / F.threshold(weight, half, math.inf)).transpose(3, 4)


def resample(values: torch.Tensor, valid: torch.Tensor, affines: np.ndarray, size: int) -> torch.Tensor:
    """Crops (maps, crops, 1, size, size) of maps (maps, height, width); see :class:`Pyramid` for the arguments."""
    return Pyramid(values, valid).sample(affines, size)


def fit_square(values: torch.Tensor, valid: torch.Tensor, size: int) -> torch.Tensor:
    """A map (height, width), centred in a square of missing pixels, at (1, size, size); see :class:`Pyramid`."""
    height, width = values.shape
    side = max(height, width)
    affine = np.array([[side, 0, (width - side) / 2], [0, side, (height - side) / 2]], np.float64)
    return resample(values[None], valid[None], affine[None, None], size)[0, 0]


@functools.cache
def _tile(size: int) -> int:
    """The side of the tiles a crop is sampled in: what lies close together in a turned crop does so in the map too.

    That keeps the part of the map at work in the processor's cache. Sizes without a fitting divisor are one tile.
    """
    return max((side for side in range(8, LARGEST_TILE + 1) if size % side == 0), default=size)


def _neighbour_sums(part: torch.Tensor) -> torch.Tensor:
    """Sums (maps, height + 1, width + 1) over every 2 x 2 neighbours of (maps, height, width) in zeros."""
    maps, height, width = part.shape
    rows, sums = part.new_empty(maps, height + 1, width), part.new_empty(maps, height + 1, width + 1)
    torch.add(part[:, 1:], part[:, :-1], out=rows[:, 1:-1])
    rows[:, 0], rows[:, -1] = part[:, 0], part[:, -1]
    torch.add(rows[:, :, 1:], rows[:, :, :-1], out=sums[:, :, 1:-1])
    sums[:, :, 0], sums[:, :, -1] = rows[:, :, 0], rows[:, :, -1]
    return sums
