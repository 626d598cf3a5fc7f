"""Means of surface normals and curvature over the parts of each patch: what depth says of a shape without learning.

The surface is that of :func:`dino_depth.surface.surface`: quadratics fitted to 5 x 5 pixels under a nominal camera, so
no intrinsics are needed. A patch is divided into ``PARTS`` x ``PARTS``; of each part come the mean normal (right, down,
towards the camera), the mean curvature and the mean of its absolute value, times ``SCALE`` pixels, over the pixels
where they are known, and the share of those.

In the bench it is a row that every encoder stands beside. As ``distill.teacher`` it asks patches, hidden ones too, for
the geometry of their place, as MaskFeat (Wei et al. 2022) asks for histograms of gradients and MaskSurf (Zhang et al.
2022) for surfels.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options
from dino_depth.resample import fit_square
from dino_depth.surface import surface

__all__ = ["load"]

PARTS = 2
SCALE = 10.0  # pixels: curvature of a radius of 10 pixels counts as much as a normal


def load(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``surface[?patch=14]``: side of a cell in pixels, an even number.

    Raises:
        ConfigError: images are to be encoded, a name or ``random:`` was given, or the patch has no halves.
    """
    if modality != "depth":
        raise ConfigError(f"encoder {spec.text}: surface describes depth, not images")
    if spec.random or spec.name:
        raise ConfigError(f"encoder {spec.text}: surface has options only, such as surface?patch=16")
    options = read_options(spec, {"patch": (14,)})
    patch = options["patch"]
    if patch % PARTS:
        raise ConfigError(f"encoder {spec.text}: patch must be a multiple of {PARTS}, got {patch}")

    def to_input(view: DepthMap, size: int, _matrix: np.ndarray | None) -> Tensor:
        return fit_square(torch.from_numpy(view.depth), torch.from_numpy(view.valid), size)

    def to_features(batch: Tensor) -> Tensor:
        normals, curvature, known = surface(batch)
        numbers = torch.cat([normals, SCALE * curvature[:, None], SCALE * curvature[:, None].abs()], 1)
        share = F.avg_pool2d(known[:, None].float(), patch // PARTS)
        means = F.avg_pool2d(numbers, patch // PARTS) / share.clamp_min(1e-6)
        return F.pixel_unshuffle(torch.cat([means, share], 1), PARTS).permute(0, 2, 3, 1)

    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=patch,
        dim=6 * PARTS**2,
        fingerprint=fingerprint({"family": "surface", **options}, {}),
        device=device,
        to_input=to_input,
        to_features=to_features,
    )
