"""The weights of a :class:`~dino_depth.vit.DepthTransformer` in the files of transformers, timm and DINO-v3.

| positions | registers | transformers | timm |
|---|---|---|---|
| learned | 0 | ``Dinov2Model`` | ``VisionTransformer`` |
| learned | some | ``Dinov2WithRegistersModel`` | ``VisionTransformer`` |
| rotary | any | ``DINOv3ViTModel`` | ``Eva`` |

Traps: transformers keeps query, key and value apart where timm and DINO-v3 have one fused matrix. With registers,
Dinov2WithRegisters has a position for the class token and this project has none, which is the same sum. DINO-v3's
own files carry the periods of its rotary positions, in bfloat16 where it was trained so.
"""

import re

import torch
from torch import Tensor

from dino_depth.config import ModelConfig
from dino_depth.rotary import BASE

__all__ = ["from_dinov3", "from_timm", "from_transformers", "model_type", "to_timm", "to_transformers"]

Weights = dict[str, Tensor]
QKV = ("query", "key", "value")


def model_type(sizes: ModelConfig) -> str:
    """What transformers calls this architecture in its configurations."""
    if sizes.positions == "rotary":
        return "dinov3_vit"
    return "dinov2_with_registers" if sizes.registers else "dinov2"


def to_transformers(weights: Weights, sizes: ModelConfig) -> Weights:
    """The weights under the names, and in the pieces, of a file of transformers.

    Raises:
        ValueError: a weight is missing or unknown.
    """
    names = _transformers_names(sizes)
    _require_same(weights.keys(), names.keys())
    pieces = {}
    for name, targets in names.items():
        for target, piece in zip(targets, weights[name].chunk(len(targets)), strict=True):
            pieces[target] = piece.contiguous()
    if sizes.positions == "rotary":
        pieces["embeddings.mask_token"] = pieces["embeddings.mask_token"][None]
        pieces.setdefault("embeddings.register_tokens", weights["cls_token"].new_zeros(1, 0, sizes.dim))
    elif sizes.registers:
        position = pieces["embeddings.position_embeddings"]
        pieces["embeddings.position_embeddings"] = torch.cat([torch.zeros_like(position[:, :1]), position], 1)
    return pieces


def from_transformers(tensors: Weights, sizes: ModelConfig) -> Weights:
    """The inverse of :func:`to_transformers`.

    Raises:
        ValueError: a tensor is missing or unknown.
    """
    names = _transformers_names(sizes)
    if sizes.positions == "rotary":
        # Versions of transformers differ in the place of the blocks.
        tensors = {re.sub(r"^model\.layer\.", "layer.", name): tensor for name, tensor in tensors.items()}
        registers = tensors.get("embeddings.register_tokens")
        if not sizes.registers and registers is not None and not registers.numel():
            del tensors["embeddings.register_tokens"]
    _require_same(tensors.keys(), {target for targets in names.values() for target in targets})
    weights = {name: torch.cat([tensors[target] for target in targets]) for name, targets in names.items()}
    if sizes.positions == "rotary":
        weights["mask_token"] = weights["mask_token"].flatten(0, -2)
    elif sizes.registers:
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    return weights


def to_timm(weights: Weights, sizes: ModelConfig) -> Weights:
    """The weights under timm's names. It has no mask token, and takes a file that holds one for Meta's."""
    weights = {name: tensor.contiguous() for name, tensor in weights.items() if name != "mask_token"}
    if sizes.positions == "rotary":
        weights = {re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name): tensor for name, tensor in weights.items()}
    return weights


def from_timm(tensors: Weights, heads: int) -> tuple[ModelConfig, Weights]:
    """Sizes and weights of a model of timm: the inverse of :func:`to_timm`, for any number of input channels.

    Also what that does not write: blocks without layer scale or without biases of query, key and value; a position for
    the class token beside registers.

    Args:
        heads: attention heads, which no weight's shape tells.

    Raises:
        ValueError: a tensor is missing, unknown or of another architecture; the message names it.
    """
    weights = {re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", name): tensor for name, tensor in tensors.items()}
    for name in ("cls_token", "patch_embed.proj.weight"):
        if name not in weights:
            raise ValueError(f"no {name}: not a Vision Transformer with a class token")
    kernel, tokens, position = (weights.get(name) for name in ("patch_embed.proj.weight", "reg_token", "pos_embed"))
    sizes = ModelConfig(
        patch_size=kernel.shape[-1],
        dim=len(kernel),
        depth=max((int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1) + 1,
        heads=heads,
        registers=0 if tokens is None else tokens.shape[1],
        positions="rotary" if position is None else "learned",
    )
    for index in range(sizes.depth):
        block = f"blocks.{index}"
        query, value = (weights.pop(f"{block}.attn.{part}_bias", kernel.new_zeros(sizes.dim)) for part in "qv")
        weights.setdefault(f"{block}.attn.qkv.bias", torch.cat([query, torch.zeros_like(query), value]))
        for scale in ("ls1", "ls2"):
            weights.setdefault(f"{block}.{scale}.gamma", kernel.new_ones(sizes.dim))
    if sizes.registers and position is not None and round(position.shape[1] ** 0.5) ** 2 != position.shape[1]:
        weights["cls_token"] = weights["cls_token"] + position[:, :1]
        weights["pos_embed"] = position[:, 1:]
    _require_same(weights.keys(), _transformers_names(sizes).keys() - {"mask_token"})
    return sizes, weights


def from_dinov3(tensors: Weights) -> tuple[ModelConfig, Weights]:
    """Sizes and weights of a Vision Transformer as DINO-v3's training code, and the ModMap release's, names them.

    Args:
        tensors: of the backbone alone, or of a teacher, whose heads are left out, or of student and teacher.

    Raises:
        ValueError: a tensor is missing, unknown or of another architecture; the message names it.
    """
    tensors = _backbone(tensors)
    for name in ("cls_token", "patch_embed.proj.weight", "rope_embed.periods"):
        if name not in tensors:
            raise ValueError(f"no {name}: not a Vision Transformer of DINO-v3")
    blocks = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
    kernel, periods = tensors["patch_embed.proj.weight"], tensors.pop("rope_embed.periods").float()
    if kernel.dim() != 4 or kernel.shape[1] != 1 or kernel.shape[2] != kernel.shape[3]:
        raise ValueError(f"patch_embed.proj.weight is {tuple(kernel.shape)}, not (dim, 1, side, side) for one channel")
    head_dim = 4 * len(periods)
    expected = BASE ** (torch.arange(len(periods)) / len(periods))
    if not torch.allclose(periods, expected, rtol=2**-8):  # bfloat16 keeps eight bits
        raise ValueError(f"rope_embed.periods are not the powers of {BASE:g} up to {expected[-1]:.3f}")
    tokens = tensors.pop("storage_tokens", None)
    sizes = ModelConfig(
        patch_size=kernel.shape[-1],
        dim=len(kernel),
        depth=max(blocks, default=-1) + 1,
        heads=len(kernel) // head_dim,
        registers=0 if tokens is None else tokens.shape[1],
        positions="rotary",
    )
    if sizes.registers:
        tensors["reg_token"] = tokens
    _require_same(tensors.keys(), _transformers_names(sizes).keys())
    return sizes, {name: tensor.float() for name, tensor in tensors.items()}


def _backbone(tensors: Weights) -> Weights:
    """What lies under ``teacher.backbone.`` or ``backbone.``, if anything does, without the names' beginning."""
    for prefix in ("teacher.backbone.", "backbone."):
        if any(name.startswith(prefix) for name in tensors):
            others = ("student.", *(prefix.replace("backbone", head) for head in ("dino_head", "ibot_head")))
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(others)}
            strange = [name for name in tensors if not name.startswith(prefix)]
            if strange:
                raise ValueError(f"beside {prefix.rstrip('.')} unknown: {strange[:3]} ({len(strange)})")
            return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return dict(tensors)


def _require_same(found, expected):
    if found != expected:
        missing, unknown = sorted(expected - found), sorted(found - expected)
        raise ValueError(f"weights missing: {missing[:3]}, unknown: {unknown[:3]} ({len(missing)}, {len(unknown)})")


def _transformers_names(sizes: ModelConfig) -> dict[str, tuple[str, ...]]:
    """DepthTransformer's name of each weight -> the names of its pieces, along rows, in a file of transformers."""
    rotary = sizes.positions == "rotary"
    embeddings = ["cls_token", "mask_token"] if rotary else ["cls_token", "pos_embed", "mask_token"]
    if sizes.registers:
        embeddings.append("reg_token")
    theirs = {"pos_embed": "position_embeddings", "reg_token": "register_tokens"}
    names = {name: (f"embeddings.{theirs.get(name, name)}",) for name in embeddings}
    for part in ("weight", "bias"):
        projection = "patch_embeddings" if rotary else "patch_embeddings.projection"
        names[f"patch_embed.proj.{part}"] = (f"embeddings.{projection}.{part}",)
        names[f"norm.{part}"] = (f"norm.{part}" if rotary else f"layernorm.{part}",)
    if rotary:
        layers, query, output = "layer", "attention.{0[0]}_proj", "attention.o_proj"
        modules = {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    else:
        layers, query, output = "encoder.layer", "attention.attention.{0}", "attention.output.dense"
        modules = {name: name for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2")}
    for index in range(sizes.depth):
        block, layer = f"blocks.{index}", f"{layers}.{index}"
        for scale in ("1", "2"):
            names[f"{block}.ls{scale}.gamma"] = (f"{layer}.layer_scale{scale}.lambda1",)
        for part in ("weight", "bias"):
            names[f"{block}.attn.qkv.{part}"] = tuple(f"{layer}.{query.format(name)}.{part}" for name in QKV)
            names[f"{block}.attn.proj.{part}"] = (f"{layer}.{output}.{part}",)
            for module, target in modules.items():
                names[f"{block}.{module}.{part}"] = (f"{layer}.{target}.{part}",)
    return names
