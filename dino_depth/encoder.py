"""Frozen depth encoders: depth maps in, class and patch features out; their folders and files are read here."""

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
from dino_depth.weight_names import from_dinov3, from_transformers

__all__ = ["Encoder", "load_encoder", "random_encoder", "read_backbone"]

SHIPPED = {"tiny": Path(__file__).resolve().parent / "shipped" / "tiny"}
# What DepthTransformer computes, in the words of transformers' configurations.
EVERYWHERE = {"num_channels": 1, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
LEARNED = {"mlp_ratio": 4, "qkv_bias": True, "use_swiglu_ffn": False}
BIASES = ("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias")
ARCHITECTURES = {
    "dinov2": EVERYWHERE | LEARNED | {"use_mask_token": True},
    "dinov2_with_registers": EVERYWHERE | LEARNED,
    "dinov3_vit": EVERYWHERE | dict.fromkeys(BIASES, True) | {"use_gated_mlp": False, "rope_theta": 100},
}


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
        return tokens[:, 0], tokens[:, self.backbone.num_prefix_tokens :].unflatten(1, (rows, columns))


def load_encoder(
    path: str | Path,
    device: str = "cpu",
    revision: str | None = None,
    normalization: Normalization | None = None,
) -> Encoder:
    """The frozen encoder of an exported folder; its default input size is the one it was exported for.

    Away from that size the exported position embedding is resized (bicubic, antialiased), which is close to, but not
    the same as, resizing the one of the training model: export at the size you use. Rotary positions fit every size.

    Args:
        path: ``tiny``, which comes with the package (a folder of that name is ``./tiny``); a folder written by
            ``dino-depth export``, its ``transformers`` subfolder, or a Hub repository (owner/name); or another source
            of :func:`read_backbone`.
        device: where the weights go; inputs must be moved there too.
        revision: branch, tag or commit of a Hub repository.
        normalization: how depth becomes the input, for sources that do not say it; an export does.

    Raises:
        ConfigError: there is no such folder, it holds another architecture, or nothing or two things say the input.
        DataError: the weights are unreadable or do not fit the configuration.
        ReportedError: the Hub repository cannot be read.
    """
    backbone, own = read_backbone(path, revision)
    if own is None and normalization is None:
        raise ConfigError(
            f"{path}: no key 'dino_depth' with the input normalisation, so not an export: say how depth "
            "becomes its input (normalization= of load_encoder, ?depth_as= in an encoder's name)"
        )
    if own is not None and normalization is not None:
        raise ConfigError(f"{path}: an export of dino-depth, which has its own input normalisation: give no other")
    name = f"{path}, step {own['step']}" if own else str(path)
    normalization = normalization or Normalization(**own["normalization"])
    return Encoder(backbone, normalization, name, backbone.patch_embed.img_size[0]).to(device)


def read_backbone(path: str | Path, revision: str | None = None) -> tuple[DepthTransformer, dict | None]:
    """The network of an export, and what the export says of its input and origin; None where it is no export.

    Also read are folders and repositories of transformers' ``Dinov2Model``, ``Dinov2WithRegistersModel`` and
    ``DINOv3ViTModel`` with one channel, and ``.pth`` files of DINO-v3's training code, such as the ModMap release's,
    without unpickling anything but tensors.

    Raises:
        ConfigError, DataError, ReportedError: as for :func:`load_encoder`.
    """
    if Path(path).suffix == ".pth":
        weights = Path(path)
        model, tensors = _read_dinov3(weights)
        size, own = 16 * model.patch_size, None
    else:
        folder = _export_folder(path, revision)
        config = _read_config(folder / "config.json")
        model, size, own = _model_config(config), config["image_size"], config.get("dino_depth")
        weights = folder / "model.safetensors"
        try:
            tensors = from_transformers(load_file(weights), model)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{weights}: unreadable weights: {error}") from None
        except (RuntimeError, ValueError) as error:
            raise DataError(f"{weights}: {' '.join(str(error).split())[:300]}") from None
    with torch.device("meta"):  # every weight comes from the file, so none is drawn
        backbone = DepthTransformer(model, size)
    try:
        backbone.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise DataError(f"{weights}: {' '.join(str(error).split())[:300]}") from None
    return backbone.float(), own


def _read_dinov3(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises what the broken content makes its parts raise
        raise DataError(f"{path}: unreadable weights: {' '.join(str(error).split())[:200]}") from None
    for key in ("teacher", "model"):
        if isinstance(tensors, dict) and isinstance(tensors.get(key), dict):
            tensors = tensors[key]
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise DataError(f"{path}: not a file of named weights")
    try:
        return from_dinov3(tensors)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


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
        file = _export_folder(path, None) / "config.json"
        config = _read_config(file)
        if "dino_depth" not in config:
            raise ConfigError(f"{file}: no key 'dino_depth' with the input normalisation; not an export of dino-depth")
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
        registers=config.get("num_register_tokens", 0),
        positions="rotary" if config["model_type"] == "dinov3_vit" else "learned",
        layer_scale=config["layerscale_value"],
    )


def _export_folder(path: str | Path, revision: str | None) -> Path:
    if str(path) in SHIPPED:
        return SHIPPED[str(path)]
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
    """config.json of an export or a model of transformers, checked for everything that is read of it."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing; the repository holds no encoder") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ARCHITECTURES:
        raise ConfigError(f"{path}: model_type is {kind!r}, none of {', '.join(ARCHITECTURES)}")
    for key, value in ARCHITECTURES[kind].items():
        if config.get(key) != value:
            raise ConfigError(f"{path}: {key} is {config.get(key)!r}, an encoder of dino-depth has {value!r}")
    sizes = {"patch_size": 1, "hidden_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 1}
    if kind != "dinov2":
        sizes["num_register_tokens"] = 0
    for key, smallest in sizes.items():
        if type(config.get(key)) is not int or config[key] < smallest:
            raise ConfigError(f"{path}: {key} must be an integer from {smallest}, got {config.get(key)!r}")
    if kind == "dinov3_vit" and config.get("intermediate_size") != 4 * config["hidden_size"]:
        raise ConfigError(f"{path}: intermediate_size is {config.get('intermediate_size')!r}, not 4 times hidden_size")
    if not isinstance(config.get("layerscale_value"), float):
        raise ConfigError(f"{path}: layerscale_value must be a number, got {config.get('layerscale_value')!r}")
    if "dino_depth" in config:
        _check_normalization(config["dino_depth"], path)
    return config


def _check_normalization(ours: dict, path: Path):
    if not isinstance(ours, dict) or not isinstance(ours.get("normalization"), dict) or "step" not in ours:
        raise ConfigError(f"{path}: dino_depth lacks the input normalisation or the step; not an export of dino-depth")
    known = {entry.name: entry.type for entry in fields(Normalization)}
    ours["normalization"].setdefault("formula", 1)  # an export from before there was a second one
    if ours["normalization"].keys() != known.keys():
        raise ConfigError(
            f"{path}: dino_depth.normalization has keys {sorted(ours['normalization'])}, "
            f"this version of dino-depth needs {sorted(known)}"
        )
    for key, value in ours["normalization"].items():
        choices = get_args(known[key])
        if value not in choices if choices else type(value) not in (int, float):
            raise ConfigError(f"{path}: dino_depth.normalization.{key} cannot be {value!r}")
