"""Disparity to relative depth.

Disparity d, as Depth Anything V2 estimates it, is larger where things are nearer and known up to a scale and a shift
only: ``1 / d`` is not depth and explodes at 0. Each image's disparity is clipped to two percentiles ``low`` and
``high``, n = (d - low) / (high - low), and n becomes depth with the farthest point at 1 and the nearest at ``nearest``:

    linear      z = 1 - n (1 - nearest)
    inverse     z = 1 / (1 + n (1 / nearest - 1))

Spread over the whole range of depth, the disparity of a flat image would be amplified noise: it is refused.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError

__all__ = ["FlatDepth", "PseudoDepthConfig", "check_conversion", "convert"]

ROUNDING = 1e-5  # relative; what float32 and the last resizing make of a constant
HOLE_BLOCK = 8  # pixels


@dataclass
class PseudoDepthConfig:
    """Depth of images, by Depth Anything V2.

    Attributes:
        model: Hub id (owner/name) or local folder with config.json, preprocessor_config.json and model.safetensors.
            Small is Apache-2.0; Base and Large are CC-BY-NC-4.0.
        revision: branch, tag or commit of a Hub id; empty: the commit this version knows (Small), else ``main``.
        device: auto takes a GPU where torch sees one.
        precision: bf16 multiplies the backbone's matrices in bfloat16; the head and its output stay float32.
        batch: images of one size that the network sees at once; 0: 1 on the CPU, where more gain nothing, 16 on a GPU.
            Another number may change the last bits.
        threads: torch threads of a process on the CPU. Another number may change the last bits.
        conversion: of disparity to depth: ``linear`` keeps a tilted plane a ramp, which is what the input normalisation
            fits to relative maps; ``inverse`` keeps it a plane in space.
        nearest: depth of the nearest point; the farthest is at 1. The default is that of MVTec 3D-AD's cable gland.
        clip: percentiles of an image's disparity that become the farthest and the nearest depth.
        minimum_relief: an image is flat, and unusable, where the disparity that a tilted plane does not explain spans
            a smaller share of the nearest point's disparity; 0 keeps all but constant ones. The default is a guess.
        holes: share of the pixels that a synthetic sensor misses, along depth edges and in patches.
    """

    model: str = "depth-anything/Depth-Anything-V2-Small-hf"
    revision: str = ""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: int = 0
    threads: int = 1
    conversion: Literal["linear", "inverse"] = "linear"
    nearest: float = 0.9
    clip: tuple[float, float] = (0.5, 99.5)
    minimum_relief: float = 0.02
    holes: float = 0.0


class FlatDepth(DataError):
    """An image without relief."""


def check_conversion(config: PseudoDepthConfig):
    """Refuses values out of range.

    Raises:
        ConfigError: names the first such value.
    """
    low, high = config.clip
    for key, fine, rule in (
        ("batch", config.batch >= 0, "0 or more"),
        ("threads", config.threads >= 1, "at least 1"),
        ("nearest", 0 < config.nearest < 1, "within 0..1, both excluded"),
        ("clip", 0 <= low < high <= 100, "two percentiles in rising order"),
        ("minimum_relief", 0 <= config.minimum_relief < 1, "0 or more and below 1"),
        ("holes", 0 <= config.holes <= 0.5, "within 0..0.5"),
    ):
        if not fine:
            raise ConfigError(f"pseudo_depth.{key} must be {rule}, got {getattr(config, key)}")


def convert(disparity: np.ndarray, config: PseudoDepthConfig, name: str = "") -> tuple[DepthMap, dict]:
    """The relative depth of a disparity map, and the record of how it came about.

    The record's ``disparity`` holds ``minimum``, ``maximum`` and the two percentiles ``low`` and ``high``; with
    ``conversion``, ``nearest`` and the depth z, disparity inside the percentiles is low + n (high - low), where
    n = (1 - z) / (1 - nearest) for linear and n = (1 / z - 1) / (1 / nearest - 1) for inverse. ``relief`` is what
    :attr:`PseudoDepthConfig.minimum_relief` limits.

    Args:
        disparity: (height, width) floats, larger is nearer.
        name: from which holes are drawn.

    Raises:
        FlatDepth: disparity is constant or has too little relief.
        DataError: a value is not finite.
    """
    disparity = disparity.astype(np.float64)
    bad = np.count_nonzero(~np.isfinite(disparity))
    if bad:
        raise DataError(f"disparity of {bad} pixels is NaN or infinite")
    low, high = (float(value) for value in np.percentile(disparity, config.clip))
    clipped = np.clip(disparity, low, high)
    relief = _relief(clipped, config.clip)
    constant = high - low <= ROUNDING * max(abs(low), abs(high))
    if constant or relief < config.minimum_relief:
        raise FlatDepth(
            f"flat: disparity {low:.6g}..{high:.6g} has relief {relief:.4f} off its plane, "
            f"pseudo_depth.minimum_relief is {config.minimum_relief}"
        )
    n, nearest = (clipped - low) / (high - low), config.nearest
    # Written so that n = 0 and n = 1 give exactly 1 and nearest.
    depth = n * nearest + (1 - n) if config.conversion == "linear" else nearest / (n + nearest * (1 - n))
    valid = _seen(depth, config.holes, name) if config.holes else np.ones(depth.shape, bool)
    record = {
        "disparity": {"minimum": float(disparity.min()), "maximum": float(disparity.max()), "low": low, "high": high},
        "relief": relief, "conversion": config.conversion, "nearest": nearest, "clip": list(config.clip),
        "holes": config.holes,
    }  # fmt: skip
    return DepthMap(depth, valid, "relative"), record


def _relief(disparity: np.ndarray, clip: tuple[float, float]) -> float:
    """Range between the percentiles ``clip`` of what the least-squares plane leaves, over the largest disparity.

    Under a pinhole camera a plane is affine in disparity whatever its scale and shift, so a ramp has no relief. Were
    the shift 0, the quotient would be the relief as a share of the farthest depth. It is 0 without positive disparity.
    """
    largest = disparity.max()
    if largest <= 0:
        return 0.0
    left = disparity - disparity.mean()
    for axis in (0, 1):
        places = np.arange(disparity.shape[axis]) - (disparity.shape[axis] - 1) / 2
        places = np.expand_dims(places, 1 - axis)
        # Rows, columns and the mean are orthogonal on a full grid: each slope is a fit of its own.
        left -= places * ((places * left).sum() / ((places**2).sum() * disparity.shape[1 - axis]))
    low, high = np.percentile(left, clip)
    return float((high - low) / largest)


def _seen(depth: np.ndarray, holes: float, name: str) -> np.ndarray:
    """(height, width) bool: all but the share ``holes`` that a sensor misses first, at depth edges and by bad luck."""
    rng = np.random.default_rng(list(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()))
    height, width = depth.shape
    coarse = rng.random((height // HOLE_BLOCK + 1, width // HOLE_BLOCK + 1))
    coarse = coarse.repeat(HOLE_BLOCK, 0).repeat(HOLE_BLOCK, 1)[:height, :width]
    jump = np.hypot(*np.gradient(depth))
    steep = np.minimum(jump / (np.percentile(jump, 99) or 1.0), 1)
    score = steep + 0.6 * coarse + 0.4 * rng.random(depth.shape)
    return score <= np.quantile(score, 1 - holes)
