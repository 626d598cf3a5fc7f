"""Means of surface normals and curvature over the quarters of each patch: what depth says of a shape without learning.

They are those of :func:`dino_depth.surface.part_means`, under a nominal camera, so no intrinsics are needed.
"""

import numpy as np
import torch
from torch import Tensor

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options
from dino_depth.resample import fit_square
from dino_depth.surface import NUMBERS, PARTS, part_means, surface

__all__ = ["load"]


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

    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=patch,
        dim=NUMBERS,
        fingerprint=fingerprint({"family": "surface", **options}, {}),
        device=device,
        to_input=to_input,
        to_features=lambda batch: part_means(*surface(batch), patch),
    )
