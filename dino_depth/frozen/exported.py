"""Exports of this project: a folder of ``dino-depth export`` or a Hub repository, each with its own normalisation.

Networks of the same architectures from elsewhere, whose files do not say how depth becomes their input, take the option
``depth_as``: transformers' folders with one channel, and ``.pth`` files of DINO-v3's training code.

An encoder pretrained on images instead of depth sees them as :func:`dino_depth.depth.grey_map` says.
"""

from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor

from dino_depth.depth import DepthMap, Normalization, grey_map
from dino_depth.encoder import load_encoder, random_encoder
from dino_depth.errors import ConfigError
from dino_depth.frozen.inputs import DEPTH_AS
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options

__all__ = ["DEFAULT", "load"]

DEFAULT = "dino-depth"  # random:dino-depth is the default architecture, without an export to take it from


def load(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``DIR_OR_HUB_ID_OR_FILE[?depth_as=]``, ``random:DIR_OR_HUB_ID[?seed=]`` or ``random:dino-depth[?seed=]``.

    Raises:
        ConfigError, DataError, ReportedError: see :func:`dino_depth.encoder.load_encoder`.
    """
    options = read_options(spec, {"seed": (0,)} if spec.random else {"depth_as": ("own", *DEPTH_AS)})
    if spec.random:
        encoder = random_encoder(None if spec.name == DEFAULT else spec.name, options["seed"], str(device))
    elif spec.name == DEFAULT:
        raise ConfigError(f"encoder {spec.text}: name an exported folder, or random:{DEFAULT} for random weights")
    else:
        method = options["depth_as"]
        normalization = None if method == "own" else Normalization(method=method)
        encoder = load_encoder(spec.name, str(device), normalization=normalization)

    def to_input(view: np.ndarray | DepthMap, size: int, _matrix: np.ndarray | None) -> Tensor:
        return encoder.prepare(view if modality == "depth" else grey_map(view), size)

    settings = {"family": "dino_depth", "modality": modality, "normalization": asdict(encoder.normalization)}
    return FrozenEncoder(
        name=encoder.name,
        modality=modality,
        patch_size=encoder.patch_size,
        dim=encoder.dim,
        fingerprint=fingerprint(settings, encoder.backbone.state_dict()),
        device=device,
        to_input=to_input,
        to_features=lambda batch: encoder(batch)[1],
        to_tokens=encoder,
    )
