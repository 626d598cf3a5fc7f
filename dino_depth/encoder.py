"""Frozen depth encoders: depth maps in, class and patch features out; exported folders are read here."""

import json
from dataclasses import fields
from pathlib import Path
from typing import get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dino_depth.config import ModelConfig
from dino_depth.depth import DepthMap, Normalization, normalize
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.resample import fit_square
from dino_depth.vit import DepthTransformer

__all__ = ["Encoder", "from_transformers", "load_encoder", "random_encoder", "to_transformers"]

# What DepthTransformer computes, in the words of transformers' Dinov2Config.
ARCHITECTURE = {
    "model_type": "dinov2", "num_channels": 1, "mlp_ratio": 4, "hidden_act": "gelu", "qkv_bias": True,
    "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "use_mask_token": True,
}  # fmt: skip


class Encoder(nn.Module):
    """A frozen encoder together with the input normalisation it was trained with.

    Attributes:
        normalization: how depth becomes this encoder's input.
        name: what the weights are, for tables.
        size: default side of the square input, pixels.
        patch_size: side of a patch, pixels.
        dim: feature dimension.
    """

    def __init__(self, backbone: DepthTransformer, normalization: Normalization, name: str, size: int):
        super().__init__()
        self.backbone = backbone.eval().requires_grad_(False)
        self.normalization = normalization
        self.name = name
        self.size = size
        self.patch_size = backbone.config.patch_size
        self.dim = backbone.embed_dim

    def prepare(self, depth_map: DepthMap, size: int | None = None) -> Tensor:
        """The input (1, size, size): normalised, padded to a square with missing pixels, resized hole-safely."""
        size = size or self.size
        if size % self.patch_size:
            near = round(size / self.patch_size) * self.patch_size
            raise ConfigError(f"input size {size} is no multiple of the patch size {self.patch_size}; use {near}")
        values = torch.from_numpy(normalize(depth_map, self.normalization))
        return fit_square(values, torch.from_numpy(depth_map.valid), size)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features after the final norm.

        Args:
            images: (batch, 1, height, width) of :meth:`prepare`.

        Returns:
            class features (batch, dim) and patch features (batch, rows, columns, dim), float32.
        """
        tokens = self.backbone.forward_features(images).float()
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        return tokens[:, 0], tokens[:, 1:].unflatten(1, (rows, columns))


def load_encoder(path: str | Path, device: str = "cpu", revision: str | None = None) -> Encoder:
    """The frozen encoder of an exported folder; its default input size is the one it was exported for.

    Away from that size the exported position embedding is resized (bicubic, antialiased), which is close to, but not
    the same as, resizing the one of the training model: export at the size you use.

    Args:
        path: folder written by ``dino-depth export``, its ``transformers`` subfolder, or a Hub repository (owner/name).
        device: where the weights go; inputs must be moved there too.
        revision: branch, tag or commit of a Hub repository.

    Raises:
        ConfigError: there is no such folder, or it holds no DINO-Depth export.
        DataError: the weights are unreadable or do not fit the configuration.
        ReportedError: the Hub repository cannot be read.
    """
    folder = _export_folder(path, revision)
    config = _read_config(folder / "config.json")
    model = _model_config(config)
    weights = folder / "model.safetensors"
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{weights}: unreadable weights: {error}") from None
    with torch.device("meta"):  # every weight comes from the file, so none is drawn
        backbone = DepthTransformer(model, config["image_size"])
    try:
        backbone.load_state_dict(from_transformers(tensors, model.depth), assign=True)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{weights}: {' '.join(str(error).split())[:300]}") from None
    ours = config["dino_depth"]
    name = f"{path}, step {ours['step']}"
    return Encoder(backbone.float(), Normalization(**ours["normalization"]), name, config["image_size"]).to(device)


def random_encoder(path: str | Path | None = None, seed: int = 0, device: str = "cpu") -> Encoder:
    """The architecture and input normalisation of an export with new weights, drawn as DINO-v2 draws them.

    Args:
        path: as for :func:`load_encoder`; without one, the default ViT-S/14 and normalisation.
        seed: of the weights; the global random state is left as it was.

    Raises:
        ConfigError, DataError, ReportedError: as for :func:`load_encoder`.
    """
    model, normalization, size = ModelConfig(), Normalization(), 896
    if path is not None:
        config = _read_config(_export_folder(path, None) / "config.json")
        model, size = _model_config(config), config["image_size"]
        normalization = Normalization(**config["dino_depth"]["normalization"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = DepthTransformer(model, 16 * model.patch_size)  # the grid of a global crop of 224 and patches of 14
    name = f"random {path or 'dino-depth'}, seed {seed}"
    return Encoder(backbone, normalization, name, size).to(device)


def _model_config(config: dict) -> ModelConfig:
    return ModelConfig(
        patch_size=config["patch_size"],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        layer_scale=config["layerscale_value"],
    )


def _export_folder(path: str | Path, revision: str | None) -> Path:
    folder = Path(path)
    for candidate in (folder, folder / "transformers"):
        if (candidate / "config.json").is_file():
            return candidate
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        state = "no config.json in it or in its transformers subfolder" if folder.exists() else "no such folder"
        raise ConfigError(f"{path}: {state}; name a folder written by dino-depth export, or a Hub repository")
    from huggingface_hub import snapshot_download

    try:
        files = ["config.json", "model.safetensors"]
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=files))
    except Exception as error:  # noqa: BLE001 - besides its own errors the Hub client lets its HTTP library's through
        reason = " ".join(str(error).split())[:200]
        raise ReportedError(f"{path}: neither a folder nor a readable Hub repository: {reason}") from None


def _read_config(path: Path) -> dict:
    """config.json of an export, checked for everything that :func:`load_encoder` reads."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; the repository holds no encoder") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable: {error}") from None
    ours = config.get("dino_depth") if isinstance(config, dict) else None
    if not isinstance(ours, dict) or not isinstance(ours.get("normalization"), dict) or "step" not in ours:
        raise ConfigError(f"{path}: no key 'dino_depth' with the input normalisation; not an export of dino-depth")
    for key, value in ARCHITECTURE.items():
        if config.get(key) != value:
            raise ConfigError(f"{path}: {key} is {config.get(key)!r}, an export of dino-depth has {value!r}")
    for key in ("patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "image_size"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise ConfigError(f"{path}: {key} must be a positive integer, got {config.get(key)!r}")
    if not isinstance(config.get("layerscale_value"), float):
        raise ConfigError(f"{path}: layerscale_value must be a number, got {config.get('layerscale_value')!r}")
    known = {entry.name: entry.type for entry in fields(Normalization)}
    if ours["normalization"].keys() != known.keys():
        raise ConfigError(
            f"{path}: dino_depth.normalization has keys {sorted(ours['normalization'])}, "
            f"this version of dino-depth needs {sorted(known)}"
        )
    for key, value in ours["normalization"].items():
        choices = get_args(known[key])
        if value not in choices if choices else type(value) not in (int, float):
            raise ConfigError(f"{path}: dino_depth.normalization.{key} cannot be {value!r}")
    return config


def to_transformers(weights: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The weights of a :class:`DepthTransformer` under the names, and in the pieces, of a ``Dinov2Model`` file.

    Raises:
        ValueError: a weight is missing or unknown.
    """
    names = _transformers_names(depth)
    _require_same(weights.keys(), names.keys())
    pieces = {}
    for name, targets in names.items():
        for target, piece in zip(targets, weights[name].chunk(len(targets)), strict=True):
            pieces[target] = piece.contiguous()
    return pieces


def from_transformers(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The inverse of :func:`to_transformers`.

    Raises:
        ValueError: a tensor is missing or unknown.
    """
    names = _transformers_names(depth)
    _require_same(tensors.keys(), {target for targets in names.values() for target in targets})
    return {name: torch.cat([tensors[target] for target in targets]) for name, targets in names.items()}


def _require_same(found, expected):
    if found != expected:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise ValueError(f"weights missing: {missing[:3]}, unknown: {unknown[:3]} ({len(missing)}, {len(unknown)})")


def _transformers_names(depth: int) -> dict[str, tuple[str, ...]]:
    """DepthTransformer's name of each weight -> the names of its pieces, along rows, in a ``Dinov2Model`` file.

    The file keeps separate query, key and value projections where timm has one fused matrix.
    """
    names = {
        "cls_token": ("embeddings.cls_token",),
        "pos_embed": ("embeddings.position_embeddings",),
        "mask_token": ("embeddings.mask_token",),
    }
    for part in ("weight", "bias"):
        names[f"patch_embed.proj.{part}"] = (f"embeddings.patch_embeddings.projection.{part}",)
        names[f"norm.{part}"] = (f"layernorm.{part}",)
    for index in range(depth):
        block, layer = f"blocks.{index}", f"encoder.layer.{index}"
        for scale in ("1", "2"):
            names[f"{block}.ls{scale}.gamma"] = (f"{layer}.layer_scale{scale}.lambda1",)
        for part in ("weight", "bias"):
            projections = [f"{layer}.attention.attention.{name}.{part}" for name in ("query", "key", "value")]
            names[f"{block}.attn.qkv.{part}"] = tuple(projections)
            names[f"{block}.attn.proj.{part}"] = (f"{layer}.attention.output.dense.{part}",)
            for module in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                names[f"{block}.{module}.{part}"] = (f"{layer}.{module}.{part}",)
    return names
