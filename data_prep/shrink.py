"""Smaller depth maps without invented depths."""

import numpy as np

from dino_depth.depth import DepthMap

__all__ = ["shrink"]


def shrink(depth_map: DepthMap, max_side: int) -> DepthMap:
    """A map whose longer side is at most ``max_side``, smaller by the least whole factor that does it.

    A pixel of the result stands for a square block. It is valid where at least half of the block's pixels are, and is
    then the lower median of the valid ones: a depth that was measured, never an average across an edge or a hole.

    Args:
        max_side: largest height and width, pixels.
    """
    height, width = depth_map.depth.shape
    factor = -(-max(height, width) // max_side)
    if factor == 1:
        return depth_map
    rows, columns = -(-height // factor), -(-width // factor)
    inside = np.outer(*(np.minimum(factor, side - np.arange(0, side, factor)) for side in (height, width)))
    padded = np.zeros((rows * factor, columns * factor), np.float32)
    padded[:height, :width] = depth_map.depth
    blocks = padded.reshape(rows, factor, columns, factor).transpose(1, 3, 0, 2).reshape(-1, rows, columns)
    held = np.count_nonzero(blocks, axis=0)
    valid = (2 * held >= inside) & (held > 0)
    # Missing pixels are 0 and sort before every depth.
    ordered = np.sort(blocks, axis=0)
    middle = len(blocks) - held + (held - 1) // 2
    return DepthMap(np.take_along_axis(ordered, middle[None], 0)[0], valid, depth_map.kind)
