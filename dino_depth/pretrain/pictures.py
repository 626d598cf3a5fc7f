"""Weights of Vision Transformers of pictures as those of an encoder of depth: three input channels become one.

The new channel is a grey picture, the same in all three: 0 is its mean grey and one unit is one standard deviation,
both averaged over the channels of the source, so that a missing pixel of depth, 0, begins as the grey that tells the
network least. With mean m_c and standard deviation s_c of the source and averages m and s, the source's channel c is
((m + s v) - m_c) / s_c of the new channel's value v. The patch embedding is linear and has no padding, so this goes
into its weights and bias exactly.

Whatever else the source computes in its own way (activation, gated blocks, positions) shows in its features: they are
compared once, and a source that differs is refused.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dino_depth.config import ModelConfig
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.frozen import FAMILIES, load_frozen, timm_vit, transformers_vit
from dino_depth.frozen.specs import Spec, parse_spec, read_options
from dino_depth.vit import DepthTransformer
from dino_depth.weight_names import from_timm, from_transformers

__all__ = ["fold", "is_network_of_pictures", "read_pictures"]

MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
LEAST_COSINE = 0.999  # of a token: norms that divide by another small constant stay above it
SIDE = 4  # patches along a side of the picture whose features are compared


def is_network_of_pictures(source: str) -> bool:
    """Whether ``source`` is spelled ``FAMILY:...`` and thus read by :func:`read_pictures`."""
    return parse_spec(source, tuple(FAMILIES)).family != ""


def read_pictures(source: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and weights of ``transformers:DIR_OR_ID[?mean_std=]`` or ``timm:NAME`` with one input channel.

    The weights bear the names of a :class:`DepthTransformer`. A source of timm has no ``mask_token``.

    Raises:
        ConfigError: the name or an option is impossible, or the network is of another architecture.
        DataError: the weights do not fit their description.
        ReportedError: files cannot be read.
    """
    spec = parse_spec(source, tuple(FAMILIES))
    if spec.random:
        raise ConfigError(f"{source}: a new run begins at random weights by itself")
    if spec.family not in ("transformers", "timm") or "layers" in spec.options:
        raise ConfigError(f"{source}: no Vision Transformer of transformers or timm with plain blocks")
    sizes, weights, mean, std = (_transformers if spec.family == "transformers" else _timm)(spec)
    kernel = weights["patch_embed.proj.weight"]
    weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"] = fold(
        kernel, weights["patch_embed.proj.bias"], mean, std
    )
    _compare(spec, sizes, weights, kernel.shape[1], mean, std)
    return sizes, weights


def fold(kernel: Tensor, bias: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Weights (dim, 1, side, side) and bias (dim,) for one grey channel, of those (dim, channels, side, side) for all.

    Args:
        mean, std: of the source's input, a number for each channel or one for all.
    """
    mean, std = (torch.tensor(part, dtype=torch.float64).expand(kernel.shape[1]) for part in (mean, std))
    scale, shift = std.mean() / std, (mean.mean() - mean) / std
    one = torch.einsum("dcij,c->dij", kernel.double(), scale)[:, None]
    return one.float(), (bias.double() + torch.einsum("dcij,c->d", kernel.double(), shift)).float()


def _transformers(spec: Spec) -> tuple[ModelConfig, dict[str, Tensor], Sequence[float], Sequence[float]]:
    from transformers.utils import cached_file

    options = read_options(spec, {"mean_std": ("file", *transformers_vit.MEAN_STD)})
    config = transformers_vit.read_config(spec)
    if config.model_type not in MODEL_TYPES:
        raise ConfigError(f"{spec.text}: model type {config.model_type!r} is none of {', '.join(MODEL_TYPES)}")
    if getattr(config, "use_swiglu_ffn", False) or getattr(config, "use_gated_mlp", False):
        raise ConfigError(f"{spec.text}: its blocks are gated (SwiGLU), those of an encoder of depth are not")
    sizes = ModelConfig(
        patch_size=config.patch_size,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        registers=getattr(config, "num_register_tokens", 0),
        positions="rotary" if config.model_type == "dinov3_vit" else "learned",
    )
    try:
        tensors = {
            name: tensor.float() for name, tensor in load_file(cached_file(spec.name, "model.safetensors")).items()
        }
    except (OSError, SafetensorError) as error:
        kind = DataError if Path(spec.name).exists() else ReportedError
        raise kind(f"{spec.text}: model.safetensors cannot be read: {' '.join(str(error).split())[:200]}") from None
    if not getattr(config, "key_bias", True):
        # The same number in all scores of a query: attention does not see it.
        for name in [name for name in tensors if name.endswith("q_proj.bias")]:
            tensors[name.replace("q_proj", "k_proj")] = torch.zeros_like(tensors[name])
    try:
        weights = from_transformers(tensors, sizes)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{spec.text}: {' '.join(str(error).split())[:300]}") from None
    return sizes, weights, *transformers_vit.mean_std(spec, options["mean_std"])


def _timm(spec: Spec) -> tuple[ModelConfig, dict[str, Tensor], Sequence[float], Sequence[float]]:
    import timm

    read_options(spec, {})
    model = timm_vit.create(spec)
    data_config = timm.data.resolve_model_data_config(model)
    try:
        sizes, weights = from_timm(model.float().state_dict(), model.blocks[0].attn.num_heads)
    except ValueError as error:
        raise ConfigError(f"{spec.text}: {error}") from None
    return sizes, weights, data_config["mean"], data_config["std"]


def _compare(
    spec: Spec,
    sizes: ModelConfig,
    weights: dict[str, Tensor],
    channels: int,
    mean: Sequence[float],
    std: Sequence[float],
):
    """Refuses a source whose patch features differ from those of its weights in a network of depth.

    Raises:
        ConfigError: they do, or the weights do not fit such a network.
    """
    size = SIDE * sizes.patch_size
    with torch.device("meta"):
        network = DepthTransformer(sizes, _stored_side(weights, sizes))
    try:
        network.load_state_dict({"mask_token": torch.zeros(1, sizes.dim)} | weights, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{spec.text}: {' '.join(str(error).split())[:300]}") from None
    values = torch.randn(1, 1, size, size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(part, dtype=torch.float32).expand(channels)[:, None, None] for part in (mean, std))
    picture = (mean.mean() + std.mean() * values - mean) / std  # (1, channels, size, size)
    theirs = load_frozen(spec.text, modality="image").encode(picture).flatten(1, 2)
    with torch.inference_mode():
        ours = network.eval().forward_features(values)[:, 1 + sizes.registers :]
    cosine = torch.nn.functional.cosine_similarity(ours, theirs, dim=-1).min().item()
    if not cosine > LEAST_COSINE:
        raise ConfigError(
            f"{spec.text}: its network is another: with its weights an encoder of depth computes other features "
            f"(smallest cosine {cosine:.3f})"
        )


def _stored_side(weights: dict[str, Tensor], sizes: ModelConfig) -> int:
    """Pixels along a side of the grid that positions are stored for."""
    if "pos_embed" not in weights:
        return SIDE * sizes.patch_size
    patches = weights["pos_embed"].shape[1] - (not sizes.registers)
    return round(patches**0.5) * sizes.patch_size
