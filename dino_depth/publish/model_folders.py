"""The encoder's weights as folders for transformers, timm and ONNX Runtime, each loaded back as its users load it."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dino_depth.config import ModelConfig
from dino_depth.depth import Normalization
from dino_depth.depth_graph import GraphNormalization
from dino_depth.errors import GateError
from dino_depth.onnx_file import OnnxFile, save_onnx
from dino_depth.publish.parity import Model
from dino_depth.rotary import BASE
from dino_depth.transformers_hooks import processor_config
from dino_depth.weight_names import model_type, to_timm, to_transformers

__all__ = ["write_onnx", "write_timm", "write_torch_export", "write_transformers"]

Weights = dict[str, Tensor]

ARCHITECTURES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}


def write_transformers(
    folder: Path, weights: Weights, sizes: ModelConfig, image_size: int, description: dict
) -> nn.Module:
    """Writes a model of transformers with one channel and returns what ``AutoModel`` loads from it.

    Args:
        weights: of a ``DepthTransformer``, the position embedding at the grid of ``image_size``.
        description: goes into config.json under ``dino_depth``.

    Raises:
        GateError: a tensor is missing, left over or of another shape when the folder is loaded.
    """
    from transformers import AutoConfig, AutoModel
    from transformers.utils import logging

    folder.mkdir()
    save_file(to_transformers(weights, sizes), folder / "model.safetensors", metadata={"format": "pt"})
    kind = model_type(sizes)
    AutoConfig.for_model(
        kind,
        architectures=[ARCHITECTURES[kind]],
        hidden_size=sizes.dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        patch_size=sizes.patch_size,
        image_size=image_size,
        num_channels=1,
        layerscale_value=float(sizes.layer_scale),
        layer_norm_eps=1e-6,
        dtype="float32",
        dino_depth=description,
        **({} if kind == "dinov2" else {"num_register_tokens": sizes.registers}),
        **({"intermediate_size": 4 * sizes.dim, "key_bias": True} if kind == "dinov3_vit" else {}),
    ).save_pretrained(folder)
    processor = processor_config(description["normalization"], image_size)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    logging.disable_progress_bar()
    # The training model's attention; their "eager" adds up in another order.
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True, attn_implementation="sdpa")
    faults = {kind: sorted(map(str, keys)) for kind, keys in report.items() if keys}
    if faults:
        raise GateError(f"transformers does not load the export as written: {str(faults)[:300]}; nothing exported")
    return model.eval()


def write_timm(folder: Path, weights: Weights, sizes: ModelConfig, image_size: int, license: str) -> nn.Module:
    """Writes a timm Vision Transformer and returns what ``timm.create_model`` loads from it.

    Raises:
        GateError: timm does not load the folder.
    """
    import timm

    folder.mkdir()
    save_file(to_timm(weights, sizes), folder / "model.safetensors", metadata={"format": "pt"})
    if sizes.positions == "rotary":
        # Of timm's models with rotary positions, this one leaves the norms' epsilon at this project's 1e-6.
        architecture, registers = "vit_base_patch16_rope_reg1_gap_256", "num_reg_tokens"
        special = {"class_token": True, "global_pool": "token", "use_fc_norm": False, "attn_type": "rope"}
        special |= {"rope_type": "dinov3", "rope_temperature": BASE, "rope_rotate_half": True}
    else:
        architecture, registers = "vit_small_patch14_dinov2", "reg_tokens"
        special = {"no_embed_class": sizes.registers > 0}
    description = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": sizes.dim,
        "global_pool": "token",
        "model_args": {
            "in_chans": 1,
            "img_size": image_size,
            "patch_size": sizes.patch_size,
            "embed_dim": sizes.dim,
            "depth": sizes.depth,
            "num_heads": sizes.heads,
            "init_values": sizes.layer_scale,
            "dynamic_img_size": True,
            registers: sizes.registers,
            **special,
        },
        "pretrained_cfg": {
            "tag": "dino_depth",
            "custom_load": False,
            "input_size": [1, image_size, image_size],
            "fixed_input_size": False,
            "interpolation": "nearest",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": [0.0],
            "std": [1.0],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": license,
        },
    }
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise GateError(f"timm does not load the export as written: {reason}; nothing exported") from error


class _FromDepth(nn.Module):
    """Depth (batch, 1, side, side) in metres, 0, NaN and infinity missing, to tokens and class features."""

    def __init__(self, model: nn.Module, normalization: Normalization):
        super().__init__()
        self.normalize, self.model = GraphNormalization(normalization, model.config.image_size), model

    def forward(self, depth: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values=self.normalize(depth))
        return output.last_hidden_state, output.pooler_output


def write_onnx(folder: Path, model: nn.Module, normalization: Normalization) -> Model:
    """Writes ``model.onnx`` for a model of transformers at its size and any batch; returns ONNX Runtime's version.

    Its input is depth, see :class:`_FromDepth`.
    """
    folder.mkdir()
    path = folder / "model.onnx"
    side = model.config.image_size
    save_onnx(
        path,
        _FromDepth(model, normalization),
        {"depth": torch.zeros(2, 1, side, side)},  # two, because a batch of one would become a constant
        ["last_hidden_state", "pooler_output"],
        dynamic_shapes={"depth": {0: torch.export.Dim("batch")}},
    )
    session = OnnxFile(path)
    return lambda depth: session(depth=depth)["last_hidden_state"]


def write_torch_export(folder: Path, model: nn.Module, normalization: Normalization) -> Model:
    """Writes ``model.pt2``, likewise; returns the loaded program."""
    folder.mkdir()
    path = folder / "model.pt2"
    side = model.config.image_size
    program = torch.export.export(
        _FromDepth(model, normalization).eval(),
        (torch.zeros(2, 1, side, side),),
        dynamic_shapes={"depth": {0: torch.export.Dim("batch")}},
    )
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    return lambda depth: loaded(depth)[0]
