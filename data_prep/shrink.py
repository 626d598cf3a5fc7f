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
    padding = ((0, rows * factor - height), (0, columns * factor - width))

    def blocks(values: np.ndarray, fill: float | bool) -> np.ndarray:  # (rows, columns, pixels of a block)
        padded = np.pad(values, padding, constant_values=fill)
        return padded.reshape(rows, factor, columns, factor).swapaxes(1, 2).reshape(rows, columns, factor**2)

    inside = blocks(np.ones((height, width), bool), False).sum(-1)
    held = blocks(depth_map.valid, False).sum(-1)
    valid = (2 * held >= inside) & (held > 0)
    # Missing pixels sort behind every depth.
    ordered = np.sort(blocks(np.where(depth_map.valid, depth_map.depth, np.inf), np.inf), axis=-1)
    middle = np.maximum((held - 1) // 2, 0)[..., None]
    depth = np.take_along_axis(ordered, middle, -1)[..., 0]
    return DepthMap(np.where(valid, depth, 0), valid, depth_map.kind)
