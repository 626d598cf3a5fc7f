"""Weights of this architecture from elsewhere: read, encoded with and continued from, or refused by name."""

import json
import os

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load, save_file

from dino_depth.config import CropConfig, LossConfig, ModelConfig, PretrainConfig
from dino_depth.depth import DepthMap, Normalization, normalize
from dino_depth.encoder import load_encoder, read_backbone
from dino_depth.errors import ConfigError, DataError
from dino_depth.frozen import load_frozen
from dino_depth.pretrain.initialize import initialize
from dino_depth.pretrain.student_teacher import Networks
from dino_depth.vit import resize_position_embedding

SIDE = 64
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 1}
CONFIGS = {
    "registers": transformers.Dinov2WithRegistersConfig(**TINY, patch_size=16, image_size=64, num_register_tokens=3),
    "release": transformers.DINOv3ViTConfig(**TINY, intermediate_size=256, layer_norm_eps=1e-6, key_bias=True),
    "rotary registers": transformers.DINOv3ViTConfig(
        **TINY, intermediate_size=256, layer_norm_eps=1e-6, key_bias=True, num_register_tokens=2
    ),
}


def network(kind="release"):
    """A network of transformers without two equal parameters, so that a swapped pair changes features."""
    model = transformers.AutoModel.from_config(CONFIGS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tokens_of(model, images):
    with torch.inference_mode():
        return model(pixel_values=images).last_hidden_state


def native(model) -> dict:
    """A network's weights as DINO-v3's training code names them, written down key by key."""
    theirs = model.state_dict()
    tensors = {
        "cls_token": theirs["embeddings.cls_token"],
        "mask_token": theirs["embeddings.mask_token"][0],
        "patch_embed.proj.weight": theirs["embeddings.patch_embeddings.weight"],
        "patch_embed.proj.bias": theirs["embeddings.patch_embeddings.bias"],
        "rope_embed.periods": (100.0 ** (torch.arange(8) / 8)).bfloat16(),
        "norm.weight": theirs["norm.weight"],
        "norm.bias": theirs["norm.bias"],
    }
    if theirs["embeddings.register_tokens"].numel():
        tensors["storage_tokens"] = theirs["embeddings.register_tokens"]
    for index in range(2):
        block, layer = f"blocks.{index}", f"model.layer.{index}"
        for part in ("weight", "bias"):
            fused = [theirs[f"{layer}.attention.{name}_proj.{part}"] for name in "qkv"]
            tensors[f"{block}.attn.qkv.{part}"] = torch.cat(fused)
            tensors[f"{block}.attn.proj.{part}"] = theirs[f"{layer}.attention.o_proj.{part}"]
            tensors[f"{block}.mlp.fc1.{part}"] = theirs[f"{layer}.mlp.up_proj.{part}"]
            tensors[f"{block}.mlp.fc2.{part}"] = theirs[f"{layer}.mlp.down_proj.{part}"]
            for norm in ("norm1", "norm2"):
                tensors[f"{block}.{norm}.{part}"] = theirs[f"{layer}.{norm}.{part}"]
        for scale in "12":
            tensors[f"{block}.ls{scale}.gamma"] = theirs[f"{layer}.layer_scale{scale}.lambda1"]
    return tensors


def under(prefix, tensors, **others):
    return {prefix + name: tensor for name, tensor in tensors.items()} | others


HEADS = {"dino_head.last_layer.weight": torch.ones(3), "ibot_head.mlp.0.bias": torch.ones(2)}
WRAPPED = {
    "backbone": lambda tensors: tensors,
    "teacher": lambda tensors: {"teacher": under("backbone.", tensors, **HEADS)},
    "both": lambda tensors: {
        "model": under("teacher.backbone.", tensors)
        | under("teacher.", HEADS)
        | under("student.backbone.", {name: 0 * tensor for name, tensor in tensors.items()})
    },
}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("kind", ["release", "rotary registers"])
def test_files_of_dino_v3_training_compute_what_transformers_computes(kind, wrapping, tmp_path):
    model, file = network(kind), tmp_path / "teacher_checkpoint.pth"
    torch.save(WRAPPED[wrapping](native(model)), file)
    encoder = load_encoder(file, normalization=Normalization("max"))
    registers = CONFIGS[kind].num_register_tokens
    expected = ModelConfig(16, dim=64, depth=2, heads=2, registers=registers, positions="rotary")
    assert encoder.backbone.config == expected and encoder.size == 256
    images = torch.randn(2, 1, SIDE, 2 * SIDE)
    tokens = tokens_of(model, images)
    class_feature, patch_features = encoder(images)
    torch.testing.assert_close(class_feature, tokens[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(patch_features, tokens[:, 1 + registers :].unflatten(1, (4, 8)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_folders_of_transformers_with_one_channel(kind, tmp_path):
    model = network(kind)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 1, SIDE, SIDE)
    tokens = tokens_of(model, images)
    prefix = 1 + CONFIGS[kind].num_register_tokens
    encoder = load_encoder(tmp_path, normalization=Normalization("max"))
    torch.testing.assert_close(encoder(images)[0], tokens[:, 0], atol=1e-5, rtol=0)
    ours = load_frozen(f"{tmp_path}?depth_as=max", modality="depth")
    theirs = load_frozen(f"transformers:{tmp_path}?depth_as=max&mean_std=none", modality="depth")
    for frozen in (ours, theirs):
        torch.testing.assert_close(frozen.encode(images), tokens[:, prefix:].unflatten(1, (4, 4)), atol=1e-5, rtol=0)
    depth_map = DepthMap.from_values(np.linspace(0.4, 0.6, SIDE * SIDE).reshape(SIDE, SIDE))
    assert torch.equal(ours.prepare(depth_map, SIDE), theirs.prepare(depth_map, SIDE))
    np.testing.assert_array_equal(ours.prepare(depth_map, SIDE)[0], normalize(depth_map, Normalization("max")))
    assert ours.fingerprint != load_frozen(f"{tmp_path}?depth_as=log", modality="depth").fingerprint


def test_who_says_how_depth_becomes_the_input(tmp_path):
    network().save_pretrained(tmp_path)
    for loading in (lambda: load_encoder(tmp_path), lambda: load_frozen(str(tmp_path), modality="depth")):
        with pytest.raises(ConfigError, match=r"no key 'dino_depth'.*normalization=.*\?depth_as=") as caught:
            loading()
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no key 'dino_depth'"):
        load_frozen(f"random:{tmp_path}", modality="depth")
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"step": 3, "normalization": {"method": "log", "scale": 0.05, "scale_relative": 0.1, "plane_support": 0.2}}
    (tmp_path / "config.json").write_text(json.dumps(config | {"dino_depth": own}))
    assert load_encoder(tmp_path).normalization == Normalization("log", formula=1)
    with pytest.raises(ConfigError, match="give no other"):
        load_encoder(tmp_path, normalization=Normalization("max"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_channels", 3), ("key_bias", False), ("layer_norm_eps", 1e-5), ("rope_theta", 10.0),
        ("use_gated_mlp", True), ("intermediate_size", 128), ("num_register_tokens", -1),
    ],
)  # fmt: skip
def test_another_architecture_is_refused_by_name(key, value, tmp_path):
    network().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ConfigError, match=key):
        read_backbone(tmp_path)


def test_registers_must_be_as_many_as_the_configuration_says(tmp_path):
    network("rotary registers").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for registers, message in ((0, "register_tokens"), (3, "reg_token")):
        (tmp_path / "config.json").write_text(json.dumps(config | {"num_register_tokens": registers}))
        with pytest.raises(DataError, match=message):
            read_backbone(tmp_path)
    tensors = load((tmp_path / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    del tensors["embeddings.register_tokens"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="missing: .*register_tokens"):
        read_backbone(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.ls2.gamma"), "missing: .*blocks.1.ls2.gamma"),
        (lambda t: t.update({"blocks.0.attn.qkv.bias_mask": torch.ones(192)}), "unknown: .*qkv.bias_mask"),
        (lambda t: t.update(local_cls_norm=torch.ones(64)), "unknown: .*local_cls_norm"),
        (lambda t: t.pop("rope_embed.periods"), "no rope_embed.periods"),
        (lambda t: t.update({"rope_embed.periods": torch.arange(1.0, 9.0)}), "rope_embed.periods are not"),
        (lambda t: t.update({"patch_embed.proj.weight": torch.ones(64, 3, 16, 16)}), "for one channel"),
        (lambda t: t.update({"norm.bias": torch.ones(65)}), "norm.bias"),
        (lambda t: t.update(step=3), "named weights"),
        (lambda t: t.update({"backbone.norm.bias": torch.ones(64)}), "beside backbone unknown: "),
    ],
)
def test_files_of_dino_v3_training_are_read_strictly(change, message, tmp_path):
    tensors, file = native(network()), tmp_path / "model.pth"
    change(tensors)
    torch.save(tensors, file)
    with pytest.raises(DataError, match=message) as caught:
        read_backbone(file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_file_executes_nothing(tmp_path):
    torch.save({"teacher": Trap(str(tmp_path / "made"))}, tmp_path / "model.pth")
    with pytest.raises(DataError, match="unreadable weights"):
        read_backbone(tmp_path / "model.pth")
    assert not (tmp_path / "made").exists()
    with pytest.raises(ConfigError, match="no such file"):
        read_backbone(tmp_path / "nothing.pth")


def begun(sizes, side):
    loss = LossConfig(prototypes=8, hidden=8, bottleneck=8)
    return Networks(PretrainConfig(model=ModelConfig(**sizes), crops=CropConfig(global_size=side), loss=loss))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_run_begins_with_the_weights_of_such_a_network(kind, tmp_path):
    model = network()
    source = tmp_path / "model.pth" if kind == "file" else tmp_path
    torch.save(native(model), source) if kind == "file" else model.save_pretrained(source)
    sizes = {"patch_size": 16, "dim": 64, "depth": 2, "heads": 2, "positions": "rotary"}
    student = begun(sizes, 32)
    before = student.dino_head.prototypes().clone()
    initialize(student, str(source))
    assert torch.equal(student.dino_head.prototypes(), before)
    images = torch.randn(1, 1, SIDE, SIDE)
    tokens = student.backbone.forward_features(images)
    torch.testing.assert_close(tokens, tokens_of(model, images), atol=1e-5, rtol=0)
    # Heads leave no trace in any weight's shape.
    for key, value in {"heads": 4, "positions": "learned", "registers": 1, "patch_size": 8, "depth": 3}.items():
        other = begun(sizes | {key: value}, 32)
        with pytest.raises(ConfigError, match=f"--init_from {source}: its model.{key} is "):
            initialize(other, str(source))


def test_a_checkpoint_without_its_run_brings_heads_that_fit(tmp_path, monkeypatch):
    sizes = {"patch_size": 16, "dim": 64, "depth": 2, "heads": 2}
    torch.save({"step": 3, "teacher": begun(sizes, 64).state_dict()}, tmp_path / "lone.pt")
    monkeypatch.chdir(tmp_path)
    teacher, student = torch.load("lone.pt", weights_only=True)["teacher"], begun(sizes, 32)
    initialize(student, "lone.pt")
    for name, value in student.state_dict().items():
        resized = resize_position_embedding(teacher[name], (2, 2)) if name == "backbone.pos_embed" else teacher[name]
        assert torch.equal(value, resized), name
    with pytest.raises(ConfigError, match="--init_from lone.pt: .*depth|--init_from lone.pt: .*blocks.2"):
        initialize(begun(sizes | {"depth": 3}, 32), "lone.pt")


def test_learned_positions_are_resized_to_the_new_runs_grid(tmp_path):
    model = network("registers")
    model.save_pretrained(tmp_path)
    sizes = {"patch_size": 16, "dim": 64, "depth": 2, "heads": 2, "registers": 3}
    students = [begun(sizes, side) for side in (32, 64)]
    for student in students:
        initialize(student, str(tmp_path))
    small, same = (student.backbone for student in students)
    images = torch.randn(1, 1, SIDE, SIDE)
    torch.testing.assert_close(same.forward_features(images), tokens_of(model, images), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        small.forward_features(images[..., :32, :32]), tokens_of(model, images[..., :32, :32]), atol=1e-5, rtol=0
    )
