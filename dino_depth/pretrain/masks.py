"""Which patches of the student's global crops iBOT hides."""

import math

import numpy as np

from dino_depth.config import LossConfig

__all__ = ["block_mask", "draw_masks"]


def block_mask(generator: np.random.Generator, grid: int, count: int) -> np.ndarray:
    """(grid, grid) bool with exactly ``count`` patches hidden, in rectangles of aspect 0.3 to 1/0.3 (BEiT, DINOv2)."""
    if count > grid * grid:
        raise ValueError(f"{count} of {grid * grid} patches cannot be hidden")
    mask = np.zeros((grid, grid), bool)
    while (missing := count - int(mask.sum())) > 0:
        area = generator.uniform(min(4, missing), missing)
        aspect = math.exp(generator.uniform(math.log(0.3), -math.log(0.3)))
        height = min(grid, max(1, round(math.sqrt(area * aspect))))
        width = min(grid, max(1, round(math.sqrt(area / aspect))))
        top, left = generator.integers(0, grid - height + 1), generator.integers(0, grid - width + 1)
        block = np.zeros_like(mask)
        block[top : top + height, left : left + width] = True
        new = np.flatnonzero(block & ~mask)
        mask.flat[new[:missing]] = True
    return mask


def draw_masks(grid: int, config: LossConfig, seed: int, position: int) -> np.ndarray:
    """(2, grid * grid) bool: masks of the two global crops of the map at a position.

    On average a share ``mask_share`` of the crops is masked, with ratios uniform over ``mask_ratio``, as in DINOv2
    (Oquab et al. 2023, appendix B); drawn per map, so that the batch, the ranks and the workers do not matter. At the
    published share of a half, exactly one crop of each map is masked.
    """
    generator = np.random.default_rng([seed, position, 1])
    masks = np.zeros((2, grid * grid), bool)
    masked = math.floor(2 * config.mask_share + generator.random())
    for crop in generator.permutation(2)[:masked]:
        count = max(1, round(generator.uniform(*config.mask_ratio) * grid * grid))
        masks[crop] = block_mask(generator, grid, count).reshape(-1)
    return masks
