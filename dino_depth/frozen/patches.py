"""Raw patches as features: the baseline that knows nothing. Depth is normalised as this project's encoders see it."""

import numpy as np
import torch
from torch import Tensor

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError
from dino_depth.frozen.inputs import square_depth, square_image
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options

__all__ = ["load"]


def load(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``raw-patches[?patch=14]``, for depth also ``depth_as=plane``; images have three channels.

    Raises:
        ConfigError: a name or ``random:`` was given with it.
    """
    if spec.random or spec.name:
        raise ConfigError(f"encoder {spec.text}: raw-patches has options only, such as raw-patches?patch=16")
    known = {"patch": (14,)}
    if modality == "depth":
        known["depth_as"] = ("plane", "minmax", "log", "max")
    options = read_options(spec, known)
    patch, channels = options["patch"], 1 if modality == "depth" else 3

    def to_input(view: np.ndarray | DepthMap, size: int, _matrix: np.ndarray | None) -> Tensor:
        if modality == "image":
            return square_image(view, 3, (0.5,), (0.5,), size)
        return square_depth(view, options["depth_as"], 1, (0.0,), (1.0,), size)

    def to_features(batch: Tensor) -> Tensor:
        cells = batch.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # (batch, channels, rows, y, columns, x)
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3)

    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=patch,
        dim=channels * patch**2,
        fingerprint=fingerprint({"family": "raw-patches", "modality": modality, **options}, {}),
        device=device,
        to_input=to_input,
        to_features=to_features,
    )
