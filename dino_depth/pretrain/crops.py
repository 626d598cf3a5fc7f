"""Spatial-only multi-crop of depth maps: rotation, flips and random resized crop in one affine and one resampling.

A crop is an affine (2, 3) from its unit square to the map; ``dino_depth/resample.py`` has the convention and says what
a crop's pixel is. No photometric operation exists.
"""

import dataclasses
import math

import numpy as np
import torch

from dino_depth.config import CropConfig
from dino_depth.errors import ConfigError
from dino_depth.resample import Pyramid

__all__ = ["check_crops", "crops_of_step", "cut", "draw_crops", "multi_crop", "partners"]

SIZES = 5  # last word of the generator's key, see ``order.py``
GLOBAL_CROPS = 2  # the teacher sees two; the losses pair each with the other
ATTEMPTS = 10  # draws of one crop, as many as torchvision's RandomResizedCrop makes
# Where in its unit square a crop's share of valid pixels is estimated: (u, v, 1) of 8 x 8 positions.
PROBES = np.stack([*(np.indices((8, 8)).reshape(2, -1)[::-1] + 0.5) / 8, np.ones(64)])


def check_crops(config: CropConfig, patch_size: int = 1):
    """Refuses a recipe that no map could be cropped by.

    Args:
        patch_size: pixels that every side must be a multiple of.

    Raises:
        ConfigError: a value is outside its range.
    """
    if config.local_crops < 1:
        raise ConfigError(f"crops.local_crops must be at least 1, got {config.local_crops}")
    sides = [("global_size", config.global_size), ("local_size", config.local_size)]
    for name, side in [*sides, *(("sizes", side) for pair in config.sizes for side in pair)]:
        if side < 1 or side % patch_size:
            raise ConfigError(f"crops.{name} must be a multiple of model.patch_size {patch_size}, got {side}")
    for name, largest in (("global_scale", 1), ("local_scale", 1), ("aspect", math.inf)):
        low, high = getattr(config, name)
        if not 0 < low <= high <= largest:
            raise ConfigError(f"crops.{name} must satisfy 0 < smallest <= largest <= {largest}, got {low}, {high}")
    for name, largest in (("rotation", 180), ("horizontal_flip", 1), ("vertical_flip", 1), ("minimum_valid", 1)):
        if not 0 <= getattr(config, name) <= largest:
            raise ConfigError(f"crops.{name} must be between 0 and {largest}, got {getattr(config, name)}")


def crops_of_step(config: CropConfig, seed: int, step: int) -> CropConfig:
    """``config`` with the sizes that all crops of a step have, drawn from those it lists: a batch has one shape."""
    if not config.sizes:
        return config
    sizes = [(config.global_size, config.local_size), *config.sizes]
    large, small = sizes[np.random.default_rng([seed, step, SIZES]).integers(len(sizes))]
    return dataclasses.replace(config, global_size=large, local_size=small)


def draw_crops(valid: np.ndarray, config: CropConfig, seed: int, position: int) -> np.ndarray:
    """The affines (2 + local_crops, 2, 3) float64 of one map's crops, the global ones first.

    A box of random area and aspect is placed uniformly inside the map, then turned about its own centre; only its
    corners can leave the map. The draw is a function of the arguments alone, whatever the batch, worker or rank.

    Args:
        valid: (height, width) bool.
        seed: of the run, 0 .. 2^64 - 1.
        position: of the sample in the run, 0 .. 2^64 - 1.
    """
    height, width = valid.shape
    crops = GLOBAL_CROPS + config.local_crops
    random = np.random.Generator(np.random.Philox(key=np.array([seed, position], np.uint64)))
    area, aspect, angle, horizontal, vertical, x, y = random.random((7, ATTEMPTS, crops))

    low, high = np.array([config.global_scale] * GLOBAL_CROPS + [config.local_scale] * config.local_crops).T
    area = (low + area * (high - low)) * height * width
    smallest, largest = config.aspect
    aspect = smallest * (largest / smallest) ** aspect
    box_width, box_height = np.sqrt(area * aspect), np.sqrt(area / aspect)
    fits = (box_width <= width) & (box_height <= height)
    # Where no draw fits, as in a very elongated map: the largest box inside the map with an allowed aspect.
    box_width, box_height = np.minimum(box_width, width), np.minimum(box_height, height)
    box_width = np.where(fits, box_width, np.minimum(box_width, box_height * largest))
    box_height = np.where(fits, box_height, np.minimum(box_height, box_width / smallest))

    angle = np.radians((2 * angle - 1) * config.rotation)
    cosine, sine = np.cos(angle), np.sin(angle)
    along_u = np.where(horizontal < config.horizontal_flip, -box_width, box_width)
    along_v = np.where(vertical < config.vertical_flip, -box_height, box_height)
    affines = np.empty((ATTEMPTS, crops, 2, 3))
    affines[..., 0, 0], affines[..., 0, 1] = cosine * along_u, -sine * along_v
    affines[..., 1, 0], affines[..., 1, 1] = sine * along_u, cosine * along_v
    # The middle of the unit square goes to the box's centre.
    affines[..., 0, 2] = box_width / 2 + x * (width - box_width) - affines[..., 0, :2].sum(-1) / 2
    affines[..., 1, 2] = box_height / 2 + y * (height - box_height) - affines[..., 1, :2].sum(-1) / 2

    chosen, best, open_crops = affines[0], np.full(crops, -2.0), np.arange(crops)
    for candidates, fit in zip(affines, fits, strict=True):
        share = np.where(fit[open_crops], _valid_share(valid, candidates[open_crops]), -1)
        better = open_crops[share > best[open_crops]]
        chosen[better] = candidates[better]
        best[open_crops] = np.maximum(best[open_crops], share)
        open_crops = open_crops[share < config.minimum_valid]
        if not len(open_crops):
            break
    return chosen


def _valid_share(valid: np.ndarray, affines: np.ndarray) -> np.ndarray:
    """The share (crops,) of valid pixels in each crop (crops, 2, 3), estimated at 8 x 8 positions."""
    height, width = valid.shape
    x, y = (affines.reshape(-1, 3) @ PROBES).reshape(-1, 2, PROBES.shape[1]).swapaxes(0, 1)  # each (crops, 64)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    place = np.where(inside, y.astype(np.int64) * width + x.astype(np.int64), 0)
    return (valid.reshape(-1)[place] & inside).mean(1)


def multi_crop(
    values: np.ndarray, valid: np.ndarray, config: CropConfig, seed: int, position: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One map's global (2, 1, S, S) and local (local_crops, 1, s, s) crops, float32, missing pixels 0.

    Args:
        values: (height, width) float32 network input, finite.
        valid: (height, width) bool.
        config: the recipe.
        seed: of the run.
        position: of the sample in the run.
    """
    return cut(values, valid, draw_crops(valid, config, seed, position), config)


def cut(
    values: np.ndarray, valid: np.ndarray, affines: np.ndarray, config: CropConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The crops of :func:`multi_crop` at ``affines`` (2 + local_crops, 2, 3)."""
    affines = affines[None]
    pyramid = Pyramid(torch.from_numpy(values)[None], torch.from_numpy(valid)[None])
    return (
        pyramid.sample(affines[:, :GLOBAL_CROPS], config.global_size)[0],
        pyramid.sample(affines[:, GLOBAL_CROPS:], config.local_size)[0],
    )


def partners(affines: np.ndarray, grid: int) -> np.ndarray:
    """Which patch of the other global crop covers the place where each patch has its centre, (2, grid * grid) int64.

    Args:
        affines: (2 or more, 2, 3) of :func:`draw_crops`, the global crops first.
        grid: patches along a side of a global crop.

    Returns:
        row-major numbers; -1 where the place lies outside the other crop.
    """
    rows, columns = np.indices((grid, grid)).reshape(2, -1)
    centres = np.stack([columns + 0.5, rows + 0.5]) / grid  # (2, patches)
    found = []
    for own, other in (affines[:GLOBAL_CROPS], affines[GLOBAL_CROPS - 1 :: -1]):
        there = own[:, :2] @ centres + own[:, 2:] - other[:, 2:]
        column, row = np.floor(np.linalg.solve(other[:, :2], there) * grid).astype(np.int64)
        inside = (column >= 0) & (column < grid) & (row >= 0) & (row < grid)
        found.append(np.where(inside, row * grid + column, -1))
    return np.stack(found)
