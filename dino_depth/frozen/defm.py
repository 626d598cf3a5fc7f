"""DeFM (Patel et al. 2026, arXiv 2601.18923), a DINO-style encoder of metric depth in three channels.

The architecture is DINO-v2's Vision Transformer with patches of 14 pixels and SwiGLU blocks; positions are resized
bicubically by the factor (new + 0.1) / old, not to the new size. Its files are PyTorch checkpoints with the blocks in
chunks (``blocks.CHUNK.INDEX.``); they are read without unpickling anything but tensors, and every key must fit.

Input channels, of depth d in metres: log(1 + d) / log(101); log(1 + d) / log(10), at most 1; and log(1 + d) from the
map's smallest to its largest value. All are then normalised by the training data's mean and standard deviation.

Trap: DeFM writes missing pixels as 0 and lets them take part in that smallest and largest value, so that in a map with
holes the relief spans a small part of the third channel. ``holes=raw`` does as DeFM does; ``holes=filled``, the
default, gives missing pixels and the padding the depth of the nearest valid one first. A comparison should report both.
"""

import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.ndimage import distance_transform_edt
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options
from dino_depth.resample import fit_square

__all__ = ["DefmTransformer", "defm_channels", "defm_input", "load"]

# name -> dimension, blocks
SIZES = {"vit_s14": (384, 12), "vit_l14": (1024, 24)}
HUB = "leggedrobotics/defm"
PATCH = 14
HEAD_DIM = 64
SUFFIXES = (".pth", ".safetensors")
MEAN = torch.tensor([0.248880, 0.495620, 0.492858])[:, None, None]
STD = torch.tensor([0.139357, 0.271314, 0.297177])[:, None, None]
FARTHEST = 100.0  # metres
MIDDLE = 9.0  # metres, where the second channel ends


class DefmTransformer(VisionTransformer):
    """DeFM's network for (batch, 3, height, width).

    Args:
        dim: token dimension, a multiple of 64.
        depth: blocks.
        grid: patches along a side that positions are stored for.
    """

    def __init__(self, dim: int, depth: int, grid: int = 16):
        hidden = -(-(dim * 4 * 2 // 3) // 8) * 8
        super().__init__(
            img_size=grid * PATCH,
            patch_size=PATCH,
            num_classes=0,
            embed_dim=dim,
            depth=depth,
            num_heads=dim // HEAD_DIM,
            mlp_ratio=2 * hidden / dim,
            mlp_layer=SwiGLUPacked,
            act_layer=nn.SiLU,
            init_values=1e-5,
            dynamic_img_size=True,
        )
        self.mask_token = nn.Parameter(torch.zeros(1, dim))

    def _pos_embed(self, patches: Tensor) -> Tensor:
        """Tokens (batch, 1 + patches, dim) of embedded patches (batch, rows, columns, dim)."""
        stored = self.patch_embed.grid_size
        position = self.pos_embed[:, 1:]
        if patches.shape[1:3] != stored:
            factors = tuple((new + 0.1) / old for new, old in zip(patches.shape[1:3], stored, strict=True))
            position = position.unflatten(1, stored).permute(0, 3, 1, 2)
            position = F.interpolate(position, scale_factor=factors, mode="bicubic").flatten(2).transpose(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([first, patches.flatten(1, 2) + position], 1)


def load(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``defm:vit_s14`` or ``defm:vit_l14`` from the Hub, ``defm:FILE_OR_FOLDER``; ``random:defm:vit_s14[?seed=]``.

    The option ``holes`` is ``filled`` or ``raw``.

    Raises:
        ConfigError: the name is unknown, or images are to be encoded.
        DataError: the weights do not fit the architecture.
        ReportedError: the file cannot be read.
    """
    if modality != "depth":
        raise ConfigError(f"encoder {spec.text}: DeFM encodes depth, not images")
    options = read_options(spec, {"holes": ("filled", "raw")} | ({"seed": (0,)} if spec.random else {}))
    if spec.random:
        if spec.name not in SIZES:
            raise ConfigError(f"encoder {spec.text}: random weights of {' or '.join(SIZES)}, not of {spec.name}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options["seed"])
            model = DefmTransformer(*SIZES[spec.name])
    else:
        model = _load_weights(_find(spec))
    model = model.eval().requires_grad_(False).to(device)

    def to_input(view: DepthMap, size: int, _matrix: np.ndarray | None) -> Tensor:
        return defm_input(view, size, filled=options["holes"] == "filled")

    def to_features(batch: Tensor) -> Tensor:
        rows, columns = (side // PATCH for side in batch.shape[-2:])
        return model.forward_features(batch)[:, 1:].unflatten(1, (rows, columns))

    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=PATCH,
        dim=model.embed_dim,
        fingerprint=fingerprint({"family": "defm", "holes": options["holes"]}, model.state_dict()),
        device=device,
        to_input=to_input,
        to_features=to_features,
    )


def defm_channels(depth: Tensor) -> Tensor:
    """(3, height, width) of depth (height, width) in metres, 0 where missing, before mean and standard deviation."""
    logarithm = torch.log1p(depth.clamp(max=FARTHEST))
    near, far = logarithm.min(), logarithm.max()
    relative = (logarithm - near) / (far - near) if far > near else torch.zeros_like(logarithm)
    middle = (logarithm / math.log1p(MIDDLE)).clamp(max=1)
    return torch.stack([logarithm / math.log1p(FARTHEST), middle, relative])


def defm_input(depth_map: DepthMap, size: int, filled: bool) -> Tensor:
    """(3, size, size) of a metric depth map.

    Raises:
        DataError: the map is not metric, or nothing of it is valid at this size.
    """
    if depth_map.kind != "metric":
        raise DataError(f"DeFM needs depth in metres, this map is {depth_map.kind}")
    depth, valid = torch.from_numpy(depth_map.depth), torch.from_numpy(depth_map.valid)
    if filled:
        fitted = fit_square(depth, valid, size)[0]
        missing = (fitted == 0).numpy()
        if missing.all():
            raise DataError(f"no valid depth is left at {size} pixels")
        nearest = distance_transform_edt(missing, return_distances=False, return_indices=True)
        channels = defm_channels(fitted[tuple(torch.from_numpy(nearest).long())])
    else:
        everywhere = torch.ones_like(valid)
        channels = torch.cat([fit_square(channel, everywhere, size) for channel in defm_channels(depth)])
    return (channels - MEAN) / STD


def _find(spec: Spec) -> Path:
    """The file of weights that a name stands for."""
    path = Path(spec.name)
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if entry.suffix in SUFFIXES)
        if len(found) != 1:
            raise ConfigError(
                f"encoder {spec.text}: {len(found)} files of {' or '.join(SUFFIXES)} there: name the file"
            )
        return found[0]
    if path.is_file():
        return path
    if spec.name not in SIZES:
        raise ConfigError(f"encoder {spec.text}: neither a file nor a folder, nor one of {', '.join(SIZES)}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB, f"defm_{spec.name}.pth"))
    except Exception as error:  # noqa: BLE001 - besides its own errors the Hub client lets its HTTP library's through
        reason = " ".join(str(error).split())[:200]
        raise ReportedError(f"encoder {spec.text}: defm_{spec.name}.pth of {HUB} cannot be read: {reason}") from None


def _load_weights(path: Path) -> DefmTransformer:
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises what the broken content makes its parts raise
        raise DataError(f"{path}: unreadable weights: {' '.join(str(error).split())[:200]}") from None
    if isinstance(tensors, dict) and isinstance(tensors.get("model"), dict):
        tensors = tensors["model"]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise DataError(f"{path}: not a file of named weights")
    weights = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)
        weights[name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")] = tensor.float()
    if len(weights) != len(tensors):
        raise DataError(f"{path}: {len(tensors) - len(weights)} weights are there twice")
    position = weights.get("pos_embed")
    indices = [int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))]
    if position is None or position.dim() != 3 or not indices:
        raise DataError(f"{path}: no pos_embed or no blocks: not a Vision Transformer of DeFM")
    grid, dim = math.isqrt(position.shape[1] - 1), position.shape[2]
    if grid**2 != position.shape[1] - 1 or dim % HEAD_DIM:
        raise DataError(
            f"{path}: pos_embed {tuple(position.shape)} is none of a square of patches and heads of {HEAD_DIM}"
        )
    with torch.device("meta"):  # every weight comes from the file, so none is drawn
        model = DefmTransformer(dim, max(indices) + 1, grid)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise DataError(f"{path}: {' '.join(str(error).split())[:300]}") from None
    return model
