"""Patches that tell the surface of their own input: slopes and curvature, as a head reads them off their tokens.

MaskFeat (Wei et al. 2022) asks hidden patches for histograms of gradients, MaskSurf (Zhang et al. 2022) for surfels;
here every patch is asked, hidden or not. What the crop shows is the target, so there is nothing to agree on and no
teacher, and because its slopes are those of the input, the network can tell them whatever the normalisation took away.
Crops are rotated, mirrored and enlarged with their surface.
"""

import torch
from torch import Tensor

from dino_depth.config import PretrainConfig
from dino_depth.errors import ConfigError
from dino_depth.surface import PARTS, part_means, relief_surface

__all__ = ["check_surface_loss", "surface_loss", "surface_targets"]

UNITS = 5.0  # of the input, that a crop's side counts as: a quarter of a metre under `plane`
# Of the normal (right, down, towards), the curvature, its absolute value and the share of known pixels, on crops of
# parts of `synth scenes`.
MEANS = (0.0, 0.0, 0.65, 0.0, 0.35, 0.55)
DEVIATIONS = (0.27, 0.27, 0.4, 0.3, 0.45, 0.4)


def check_surface_loss(config: PretrainConfig):
    """Refuses what the loss cannot work with.

    Raises:
        ConfigError: naming the setting.
    """
    size = config.model.patch_size
    if config.loss.surface_weight and size % PARTS:
        raise ConfigError(f"loss.surface_weight: model.patch_size must be a multiple of {PARTS}, got {size}")


@torch.no_grad()
def surface_targets(crops: Tensor, patch_size: int) -> Tensor:
    """(crops, patches, 24) float32, of mean 0 and deviation 1 or so, of crops (crops, 1, side, side), 0 where missing.

    Computed in float32 under autocast too, and without TF32: slopes are differences of nearly equal numbers.
    """
    with torch.autocast(crops.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        crops = crops.float()
        relief = -crops * (crops.shape[-1] / UNITS)
        found = part_means(*relief_surface(relief, crops == 0), patch_size).flatten(1, 2).split(PARTS**2, -1)
        parts = zip(found, MEANS, DEVIATIONS, strict=True)
        return torch.cat([(part - mean) / deviation for part, mean, deviation in parts], -1)


def surface_loss(told: Tensor, targets: Tensor, seen: Tensor) -> Tensor:
    """Mean over the crops of the mean over their seen patches of the mean squared error.

    Args:
        told: (crops * patches, 24) of the head.
        targets: (crops, patches, 24) of :func:`surface_targets`.
        seen: (crops, patches) bool, the patches that hold a valid pixel; a crop without one pays nothing.
    """
    errors = (told.float().view_as(targets) - targets).square().mean(-1)
    return ((errors * seen).sum(1) / seen.sum(1).clamp_min(1)).mean()
