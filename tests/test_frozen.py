import itertools
import json
import math
import os
import sys
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load, load_file, save_file

from dino_depth.config import ModelConfig
from dino_depth.depth import DepthMap, Normalization, grey_map, normalize
from dino_depth.encoder import load_encoder
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.frozen import common_grid, load_frozen
from dino_depth.frozen.defm import DefmTransformer, defm_channels, defm_input
from dino_depth.frozen.fpfh import points
from dino_depth.publish.model_folders import write_timm, write_transformers
from dino_depth.surface import surface
from dino_depth.vit import DepthTransformer

SIDE = 56
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
# Tokens before the patches, counted by hand: class, distillation, registers.
FAMILIES = {
    "dinov2": (transformers.Dinov2Config(**TINY, patch_size=14, image_size=42), 1),
    "registers": (transformers.Dinov2WithRegistersConfig(**TINY, patch_size=14, image_size=42), 5),
    "dinov3": (transformers.DINOv3ViTConfig(**TINY, intermediate_size=128, patch_size=14, num_register_tokens=4), 5),
    "vit": (transformers.ViTConfig(**TINY, intermediate_size=128, patch_size=14, image_size=42), 1),
    "deit": (transformers.DeiTConfig(**TINY, intermediate_size=128, patch_size=14, image_size=42), 2),
    "msn": (transformers.ViTMSNConfig(**TINY, intermediate_size=128, patch_size=14, image_size=42), 1),
    "ijepa": (transformers.IJepaConfig(**TINY, intermediate_size=128, patch_size=14, image_size=42), 0),
}


def scene(height=SIDE, width=SIDE, kind="metric") -> DepthMap:
    """A slope with a step and a hole."""
    rows, columns = np.mgrid[:height, :width]
    depth = 0.6 + 0.001 * columns - 0.05 * (np.hypot(rows - height / 2, columns - width / 2) < height / 4)
    depth[3:9, 5:20] = 0
    return DepthMap.from_values(depth, kind)


def picture(height=SIDE, width=SIDE, colour=True) -> np.ndarray:
    shape = (height, width, 3) if colour else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def shake(model):
    """No two parameters equal, so that a swapped pair changes features."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save_model(folder, config, mean_std=True, seed=0):
    torch.manual_seed(seed)
    model = shake(transformers.AutoModel.from_config(config))
    model.save_pretrained(folder)
    if mean_std:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return model


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    return folder, save_model(folder, FAMILIES["dinov2"][0])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    sizes = ModelConfig(dim=64, depth=2, heads=2, layer_scale=1.0)
    weights = shake(DepthTransformer(sizes, SIDE)).state_dict()
    description = {"normalization": asdict(Normalization("plane", scale=0.07)), "step": 3}
    write_transformers(folder / "transformers", weights, sizes, SIDE, description)
    write_timm(folder / "timm", weights, sizes, SIDE, "apache-2.0")
    return folder


# Networks


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_features_are_the_librarys_patch_tokens(family, tmp_path):
    config, prefix = FAMILIES[family]
    model = save_model(tmp_path, config)
    image = picture()
    encoder = load_frozen(f"transformers:{tmp_path}", modality="image")
    assert (encoder.patch_size, encoder.dim, encoder.grid(SIDE)) == (14, 64, 4)
    pixels = torch.from_numpy((image / 255 - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1).float()
    prepared = encoder.prepare(image, SIDE)
    torch.testing.assert_close(prepared, pixels, atol=5e-5, rtol=0)
    arguments = {} if family in ("dinov2", "registers", "dinov3") else {"interpolate_pos_encoding": True}
    with torch.inference_mode():
        hidden = model(pixel_values=prepared[None], **arguments).last_hidden_state[0]
    expected = hidden[prefix:].view(4, 4, 64)  # rows before columns
    assert torch.equal(encoder.encode(prepared[None])[0], expected)
    norm = getattr(model, "layernorm", None) or model.norm
    with torch.inference_mode():
        before = model(pixel_values=prepared[None], output_hidden_states=True, **arguments).hidden_states[-1][0]
        torch.testing.assert_close(norm(before)[prefix:].view(4, 4, 64), expected)


def test_rows_come_before_columns(dinov2):
    encoder = load_frozen(f"transformers:{dinov2[0]}", modality="image")
    image = np.full((SIDE, SIDE), 100, np.uint8)
    plain = encoder.encode(encoder.prepare(image, SIDE)[None])[0]
    image[14:28, 42:56] = 255
    change = (encoder.encode(encoder.prepare(image, SIDE)[None])[0] - plain).norm(dim=-1)
    assert divmod(int(change.argmax()), 4) == (1, 3)


@pytest.mark.parametrize(
    ("name", "prefix"), [("test_vit", 1), ("test_vit2", 1), ("test_vit3", 1), ("vit_small_patch16_dinov3_qkvb", 5)]
)
def test_timm_features_are_the_librarys_normalised_patch_tokens(name, prefix):
    encoder = load_frozen(f"random:timm:{name}?seed=3", modality="image")
    torch.manual_seed(3)
    model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True).eval()
    prepared = encoder.prepare(picture(64, 64), 64)
    data_config = timm.data.resolve_model_data_config(model)
    pixels = (picture(64, 64) / 255 - np.array(data_config["mean"])) / np.array(data_config["std"])
    torch.testing.assert_close(prepared, torch.from_numpy(pixels).permute(2, 0, 1).float(), atol=1e-5, rtol=0)
    with torch.inference_mode():
        tokens = model.forward_features(prepared[None])[0, prefix:]
        tokens = model.fc_norm(tokens)
    assert torch.equal(encoder.encode(prepared[None])[0], tokens.view(4, 4, -1))
    assert tokens.mean(-1).abs().max() < 1e-5  # a LayerNorm as it is initialised came last


def test_timm_models_that_average_have_their_norm_applied(tmp_path):
    model = shake(timm.create_model("test_vit", num_classes=0, global_pool="avg", dynamic_img_size=True))
    arguments = {"global_pool": "avg", "dynamic_img_size": True}
    timm.models.save_for_hf(model, tmp_path, model_args=arguments, safe_serialization=True)
    encoder = load_frozen(f"timm:local-dir:{tmp_path}", modality="image")
    prepared = encoder.prepare(picture(64, 64), 64)[None]
    with torch.inference_mode():
        expected = model.fc_norm(model.forward_features(prepared)[:, 1:])
    assert torch.equal(encoder.encode(prepared), expected.view(1, 4, 4, -1))
    assert isinstance(model.norm, torch.nn.Identity)


def test_exports_bring_their_own_normalisation(exported):
    encoder, ours = load_frozen(str(exported), modality="depth"), load_encoder(exported)
    assert (encoder.patch_size, encoder.dim, encoder.name) == (14, 64, f"{exported}, step 3")
    prepared = encoder.prepare(scene(40, 70), SIDE)
    assert torch.equal(prepared, ours.prepare(scene(40, 70), SIDE))
    assert torch.equal(encoder.encode(prepared[None]), ours(prepared[None])[1])
    image = load_frozen(str(exported), modality="image")
    grey = picture() @ np.array([0.299, 0.587, 0.114])
    expected = normalize(DepthMap((grey + 1) / 256, np.ones((SIDE, SIDE), bool), "relative"), ours.normalization)
    torch.testing.assert_close(image.prepare(picture(), SIDE)[0], torch.from_numpy(expected), atol=1e-4, rtol=0)
    assert grey_map(np.zeros((2, 2), np.uint8)).valid.all()


@pytest.mark.parametrize("place", ["transformers:{}/transformers", "timm:local-dir:{}/timm"])
def test_no_other_normalisation_is_applied_to_an_export(exported, place):
    with pytest.raises(ConfigError, match="own normalisation"):
        load_frozen(place.format(exported), modality="depth")


def plain_defm(weights, image):
    """Patch tokens of one image (3, side, side) by DeFM's network written out in float64, one head at a time."""
    weights = {name: value.double() for name, value in weights.items()}
    kernel = weights["patch_embed.proj.weight"]
    side = image.shape[1] // 14

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    patches = torch.stack(
        [
            (image[:, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14].double() * kernel).sum((1, 2, 3))
            for row in range(side)
            for column in range(side)
        ]
    )
    stored = math.isqrt(weights["pos_embed"].shape[1] - 1)
    position = cubic((stored, side)) @ weights["pos_embed"][0, 1:].view(stored, -1)
    position = cubic((stored, side)) @ position.view(side, stored, -1).transpose(0, 1).reshape(stored, -1)
    position = position.view(side, side, -1).transpose(0, 1).reshape(side * side, -1)
    x = patches + weights["patch_embed.proj.bias"] + position
    x = torch.cat([weights["cls_token"][0] + weights["pos_embed"][0, :1], x])
    dim = x.shape[1]
    for index in range(sum(name.endswith("ls1.gamma") for name in weights)):
        block = f"blocks.{index // 2}.{index}"
        fused, outputs = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv"), []
        for head in range(dim // 64):
            query, key, value = (
                fused[:, part * dim : (part + 1) * dim][:, 64 * head : 64 * head + 64] for part in range(3)
            )
            outputs.append((query @ key.T / 8).softmax(-1) @ value)
        x = x + weights[f"{block}.ls1.gamma"] * linear(torch.cat(outputs, 1), f"{block}.attn.proj")
        gate, up = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.w12").chunk(2, 1)
        x = x + weights[f"{block}.ls2.gamma"] * linear(gate * gate.sigmoid() * up, f"{block}.mlp.w3")
    return norm(x, "norm")[1:].view(side, side, dim)


def cubic(sizes):
    """(new, old) weights of cubic convolution (a = -0.75, edges repeated) by the factor (new + 0.1) / old."""
    old, new = sizes
    matrix = torch.zeros(new, old, dtype=torch.float64)
    if old == new:
        return matrix.fill_diagonal_(1)
    for row in range(new):
        place = (row + 0.5) * old / (new + 0.1) - 0.5
        for tap in range(math.floor(place) - 1, math.floor(place) + 3):
            x = abs(place - tap)
            weight = 1.25 * x**3 - 2.25 * x**2 + 1 if x <= 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
            matrix[row, min(max(tap, 0), old - 1)] += weight
    return matrix


def defm_file(path, change=None):
    """A DeFM checkpoint as its authors write it, in two chunks, of a tiny network."""
    torch.manual_seed(1)
    model = shake(DefmTransformer(128, 4, grid=4))
    tensors = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "blocks":
            parts.insert(1, str(int(parts[1]) // 2))
        name = ".".join(parts).replace("fc1", "w12").replace("fc2", "w3")
        tensors[name] = value
    change and change(tensors)
    torch.save({"model": tensors}, path) if path.suffix == ".pth" else save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("side", [56, 84])
def test_defm_equals_its_network_written_out(tmp_path, side):
    tensors = defm_file(tmp_path / "defm.pth")
    encoder = load_frozen(f"defm:{tmp_path}", modality="depth")
    prepared = encoder.prepare(scene(70, 60), side)[None]
    found = encoder.encode(prepared)[0]
    torch.testing.assert_close(found.double(), plain_defm(tensors, prepared[0]), atol=2e-5, rtol=0)
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "b.safetensors")
    again = load_frozen(f"defm:{tmp_path / 'b.safetensors'}", modality="depth")
    assert torch.equal(again.encode(prepared)[0], found) and again.fingerprint == encoder.fingerprint


def test_defm_sizes_are_the_published_ones():
    with torch.device("meta"):
        small, large = DefmTransformer(384, 12), DefmTransformer(1024, 24)
    assert sum(value.numel() for value in small.parameters()) == 21_635_328
    assert 303.6e6 < sum(value.numel() for value in large.parameters()) < 303.8e6
    assert large.blocks[0].mlp.fc1.weight.shape == (2 * 2736, 1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.3.ls2.gamma"), "blocks.3.ls2.gamma"),
        (lambda t: t.pop("norm.bias"), "norm.bias"),
        (lambda t: t.update(register_tokens=torch.zeros(1, 4, 128)), "register_tokens"),
        (lambda t: t.update({"blocks.0.1.mlp.w12.weight": torch.zeros(8, 128)}), "mlp.fc1.weight"),
        (lambda t: t.update({"blocks.0.3.norm1.bias": torch.zeros(128)}), "twice"),
        (lambda t: t.pop("pos_embed"), "no pos_embed"),
        (lambda t: t.update(pos_embed=torch.zeros(1, 18, 128)), "pos_embed"),
        (lambda t: t.update(step=3), "named weights"),
    ],
)
def test_defm_keys_are_strict(tmp_path, change, message):
    defm_file(tmp_path / "defm.pth", change)
    with pytest.raises(DataError, match=message) as caught:
        load_frozen(f"defm:{tmp_path}", modality="depth")
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_executes_nothing(tmp_path):
    torch.save({"model": Trap(str(tmp_path / "made"))}, tmp_path / "defm.pth")
    with pytest.raises(DataError, match="unreadable weights"):
        load_frozen(f"defm:{tmp_path / 'defm.pth'}", modality="depth")
    assert not (tmp_path / "made").exists()
    (tmp_path / "defm.pth").write_bytes(b"PK")
    with pytest.raises(DataError, match="unreadable weights"):
        load_frozen(f"defm:{tmp_path / 'defm.pth'}", modality="depth")


# Inputs


def plain_defm_channels(depth):
    log = [[math.log(1 + min(float(d), 100)) for d in row] for row in depth]
    near, far = min(map(min, log)), max(map(max, log))
    return np.array(
        [
            [[value / math.log(101) for value in row] for row in log],
            [[min(value / math.log(10), 1) for value in row] for row in log],
            [[(value - near) / (far - near) for value in row] for row in log],
        ]
    )


def test_defm_channels_equal_their_definition():
    depth = np.random.default_rng(0).uniform(0, 150, (6, 7)).astype(np.float32)
    found = defm_channels(torch.from_numpy(depth))
    np.testing.assert_allclose(found, plain_defm_channels(depth), atol=1e-6)
    assert torch.equal(defm_channels(torch.full((2, 2), 3.0))[2], torch.zeros(2, 2))


def test_defm_raw_takes_holes_for_depth_and_filled_does_not():
    depth_map = scene()
    mean, std = np.array([0.248880, 0.495620, 0.492858]), np.array([0.139357, 0.271314, 0.297177])
    raw, filled = (defm_input(depth_map, SIDE, fill).double().numpy() for fill in (False, True))
    expected = (plain_defm_channels(depth_map.depth) - mean[:, None, None]) / std[:, None, None]
    np.testing.assert_allclose(raw, expected, atol=1e-5)
    valid = depth_map.valid
    third = filled[2] * std[2] + mean[2]
    log = np.log1p(depth_map.depth[valid].astype(np.float64))
    np.testing.assert_allclose(third[valid], (log - log.min()) / np.ptp(log), atol=1e-5)
    assert np.ptp(third[valid]) > 5 * np.ptp((raw[2] * std[2] + mean[2])[valid])
    assert third[4, 12] == third[2, 12]  # the nearest valid pixel of the hole's second row is above it


def test_defm_filled_reaches_the_padding_and_raw_pads_with_missing():
    depth_map = scene(28, 56)
    raw, filled = (defm_input(depth_map, SIDE, fill) for fill in (False, True))
    assert torch.equal(filled[:, 0], filled[:, 14]) and torch.equal(filled[:, -1], filled[:, 41])
    padding = (0 - torch.tensor([0.248880, 0.495620, 0.492858])) / torch.tensor([0.139357, 0.271314, 0.297177])
    torch.testing.assert_close(raw[:, 0, 0], padding)
    with pytest.raises(DataError, match="metres"):
        defm_input(scene(kind="relative"), SIDE, True)


@pytest.mark.parametrize("method", ["minmax", "plane", "log", "max"])
def test_depth_becomes_a_picture_with_its_holes_black(dinov2, method):
    option = "" if method == "minmax" else f"?depth_as={method}"
    encoder = load_frozen(f"transformers:{dinov2[0]}{option}", modality="depth")
    depth_map = scene()
    values = normalize(depth_map, Normalization(method=method))
    if method == "minmax":  # the hole's 0 takes no part in the minimum
        assert values[depth_map.valid].min() == pytest.approx(0.1) and values.max() == pytest.approx(1)
    expected = (values[None] - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    np.testing.assert_allclose(encoder.prepare(depth_map, SIDE), expected, atol=1e-5)


def test_grey_is_replicated_and_the_padding_is_the_mean_colour(dinov2):
    encoder = load_frozen(f"transformers:{dinov2[0]}", modality="image")
    image = picture(28, 56, colour=False)
    prepared = encoder.prepare(image, SIDE)
    assert not prepared[:, :14].any() and not prepared[:, 42:].any()
    expected = (image / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]
    np.testing.assert_allclose(prepared[:, 14:42], expected, atol=1e-5)
    black = encoder.prepare(np.zeros((28, 56), np.uint8), SIDE)
    np.testing.assert_allclose(black[:, 20, 20], -np.array(MEAN) / np.array(STD), atol=1e-5)


def test_images_and_depth_share_one_geometry(dinov2):
    """A bright and near square lies in the same pixels of both inputs, at any size and shape."""
    image, depth = np.full((40, 61), 50, np.uint8), np.full((40, 61), 0.8, np.float32)
    image[10:22, 30:47], depth[10:22, 30:47] = 250, 0.5
    seen = load_frozen(f"transformers:{dinov2[0]}", modality="image").prepare(image, 98)[0]
    felt = load_frozen(f"transformers:{dinov2[0]}", modality="depth").prepare(DepthMap.from_values(depth), 98)[0]
    inside = (seen > (150 / 255 - MEAN[0]) / STD[0]).numpy()
    near = ((felt < (0.55 - MEAN[0]) / STD[0]) & (felt > (0.05 - MEAN[0]) / STD[0])).numpy()
    assert inside.sum() > 300 and np.array_equal(inside, near)


def test_raw_patches_are_the_pixels_of_each_patch():
    for modality, view, channels in (("depth", scene(), 1), ("image", picture(), 3)):
        encoder = load_frozen("raw-patches", modality=modality)
        prepared = encoder.prepare(view, SIDE)
        found = encoder.encode(prepared[None])[0]
        assert found.shape == (4, 4, channels * 196) and encoder.dim == channels * 196
        for row in range(4):
            for column in range(4):
                patch = prepared[:, 14 * row : 14 * row + 14, 14 * column : 14 * column + 14]
                assert torch.equal(found[row, column], patch.reshape(-1))
    expected = normalize(scene(), Normalization())
    np.testing.assert_allclose(
        load_frozen("raw-patches", modality="depth").prepare(scene(), SIDE)[0], expected, atol=1e-5
    )
    assert load_frozen("raw-patches?patch=8", modality="depth").grid(SIDE) == 7


def test_surface_has_the_means_of_each_quarter_of_a_patch():
    depth = scene().depth.astype(np.float32) + 0.002 * np.random.default_rng(0).standard_normal((SIDE, SIDE))
    depth[:9, :9] = 0
    encoder = load_frozen("surface", modality="depth")
    prepared = encoder.prepare(DepthMap.from_values(depth.astype(np.float32)), SIDE)
    found = encoder.encode(prepared[None])[0]
    normals, curvature, known = (part[0] for part in surface(prepared[None].double()))
    assert found.shape == (4, 4, encoder.dim) and 0 < known.float().mean() < 1
    for row, column, down, right in itertools.product(range(4), range(4), range(2), range(2)):
        top, left = 14 * row + 7 * down, 14 * column + 7 * right
        here = (slice(top, top + 7), slice(left, left + 7))
        count = int(known[here].sum())
        expected = [
            *(float(normals[axis][here].sum()) / max(count, 1) for axis in range(3)),
            10 * float(curvature[here].sum()) / max(count, 1),
            10 * float(curvature[here].abs().sum()) / max(count, 1),
            count / 49,
        ]
        torch.testing.assert_close(
            found[row, column].view(6, 2, 2)[:, down, right], torch.tensor(expected), atol=2e-4, rtol=1e-4
        )


# FPFH


@pytest.mark.parametrize(("height", "width"), [(41, 61), (61, 41)])
def test_points_are_back_projected(height, width):
    depth_map = scene(height, width)
    matrix = np.array([[70.0, 0, 29], [0, 75, 18], [0, 0, 1]])
    found = points(depth_map, 61, matrix).numpy()
    expected = np.zeros((3, 61, 61))
    top, left = (61 - height) // 2, (61 - width) // 2
    for row in range(height):
        for column in range(width):
            z = float(depth_map.depth[row, column])
            expected[:, top + row, left + column] = (column - 29) / 70 * z, (row - 18) / 75 * z, z
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_points_of_a_resized_map_and_of_an_unknown_camera():
    half = points(
        DepthMap.from_values(np.ones((40, 40), np.float32)), 20, np.array([[50.0, 0, 19.5], [0, 50, 19.5], [0, 0, 1]])
    )
    np.testing.assert_allclose(half[0, 0], (np.arange(20) * 2 + 0.5 - 19.5) / 50, atol=1e-6)
    unknown = points(DepthMap.from_values(np.ones((40, 40), np.float32)), 40, None)
    width = float(unknown[0, 0, -1] - unknown[0, 0, 0]) * 40 / 39
    assert 2 * math.degrees(math.atan(width / 2)) == pytest.approx(50)


def test_fpfh_without_open3d_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(ConfigError, match=r"pip install 'dino-depth\[fpfh\]'") as caught:
        load_frozen("fpfh", modality="depth")
    assert "\n" not in str(caught.value)


def test_fpfh_tells_a_bump_from_a_plane():
    pytest.importorskip("open3d", reason="open3d is not installed", exc_type=ImportError)
    rows, columns = np.mgrid[:112, :112]
    depth = 0.5 + 0.0005 * columns
    bump = depth - 0.02 * np.clip(1 - np.hypot(rows - 63, columns - 35) / 10, 0, None)
    matrix = np.array([[150.0, 0, 55.5], [0, 150, 55.5], [0, 0, 1]])
    encoder = load_frozen("fpfh", modality="depth")
    assert encoder.uses_camera and (encoder.dim, encoder.patch_size) == (33, 14)
    prepared = torch.stack([encoder.prepare(DepthMap.from_values(part), 112, matrix) for part in (depth, bump)])
    flat, bumpy = encoder.encode(prepared)
    assert flat.shape == (8, 8, 33)
    torch.testing.assert_close(flat.unflatten(2, (3, 11)).sum(-1), torch.full((8, 8, 3), 200.0), atol=0.1, rtol=0)
    assert (flat[2:6, 2:6] - flat[3, 3]).norm(dim=-1).max() < 5
    change = (bumpy - flat).norm(dim=-1)
    assert divmod(int(change.argmax()), 8) == (4, 2) and change[4, 2] > 50 and change[0:2, 5:].max() < 5
    scaled = encoder.encode(encoder.prepare(DepthMap.from_values(100 * bump), 112, matrix)[None])[0]
    torch.testing.assert_close(scaled, bumpy, atol=0.01, rtol=0)  # no unit: nothing but the shape counts
    bump[56:70, 28:42] = 0
    assert not encoder.encode(encoder.prepare(DepthMap.from_values(bump), 112, matrix)[None])[0, 4, 2].any()


# Random weights, fingerprints, names


def random_specs(dinov2, exported):
    return [
        "random:timm:test_vit", f"random:transformers:{dinov2[0]}", f"random:{exported}", "random:defm:vit_s14",
    ]  # fmt: skip


def test_random_weights_are_seeded_and_leave_the_global_state(dinov2, exported):
    before = torch.get_rng_state()
    for spec in random_specs(dinov2, exported):
        first, again, other = (load_frozen(f"{spec}?seed={seed}", modality="depth") for seed in (0, 0, 1))
        assert first.fingerprint == again.fingerprint != other.fingerprint, spec
        assert load_frozen(spec, modality="depth").fingerprint == first.fingerprint
        prepared = first.prepare(scene(64, 64), 16 * 7 if first.patch_size != 14 else 56)
        assert torch.equal(first.encode(prepared[None]), again.encode(prepared[None]))
        assert not torch.equal(first.encode(prepared[None]), other.encode(prepared[None]))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_export_keeps_architecture_and_normalisation(exported):
    trained, random = (load_frozen(f"{prefix}{exported}", modality="depth") for prefix in ("", "random:"))
    assert (random.dim, random.patch_size) == (trained.dim, trained.patch_size)
    assert torch.equal(random.prepare(scene(), SIDE), trained.prepare(scene(), SIDE))
    assert random.fingerprint != trained.fingerprint
    default = load_frozen("random:dino-depth", modality="depth")
    assert (default.dim, default.patch_size, default.name) == (384, 14, "random dino-depth, seed 0")


def test_a_fingerprint_tells_weights_options_and_modality_apart(dinov2, exported, tmp_path):
    folder = dinov2[0]
    specs = [f"transformers:{folder}", f"transformers:{folder}?depth_as=log", f"transformers:{folder}?mean_std=half"]
    specs += [
        "surface",
        "surface?patch=16",
        "raw-patches",
        "raw-patches?patch=7",
        "raw-patches?depth_as=log",
        "random:defm:vit_s14",
    ]
    specs += ["random:defm:vit_s14?holes=raw", "random:timm:test_vit", "random:timm:test_vit?depth_as=max"]
    found = [load_frozen(spec, modality="depth").fingerprint for spec in specs]
    specs.append(str(exported))
    found.append(load_frozen(specs[-1], modality="depth").fingerprint)
    found += [load_frozen(spec, modality="image").fingerprint for spec in (specs[0], "raw-patches", specs[-1])]
    assert len(set(found)) == len(found)
    assert found[0] == load_frozen(specs[0], modality="depth").fingerprint
    (tmp_path / "copy").mkdir()
    for path in folder.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["layernorm.bias"][3] += 1e-3
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    assert load_frozen(f"transformers:{tmp_path / 'copy'}", modality="depth").fingerprint != found[0]


def test_grids_must_match_or_the_message_names_sizes_that_do(exported):
    image, depth = load_frozen("raw-patches?patch=16", modality="image"), load_frozen(str(exported), modality="depth")
    assert common_grid(image, depth, 64, 56) == 4
    with pytest.raises(ConfigError, match=r"image 1024 and depth 896 \(64x64\)") as caught:
        common_grid(image, depth, 896, 896)
    assert "image 896 and depth 784 (56x56)" in str(caught.value)
    with pytest.raises(ConfigError, match=r"image 64 and depth 56 \(4x4\)"):
        common_grid(image, depth, 64, 57)
    with pytest.raises(ConfigError, match="input size 60 is no multiple of the patch size 14; use 56"):
        depth.prepare(scene(), 60)


@pytest.mark.parametrize(
    ("spec", "modality", "message"),
    [
        ("", "depth", "name an exported folder"),
        ("random:", "depth", "name an exported folder"),
        ("defm:", "depth", "nothing after defm:"),
        ("defm:vit_s14", "image", "DeFM encodes depth"),
        ("defm:vit_x", "depth", "vit_s14, vit_l14"),
        ("random:defm:vit_x", "depth", "vit_s14 or vit_l14"),
        ("random:defm:vit_s14?hole=raw", "depth", "did you mean 'holes'"),
        ("random:defm:vit_s14?holes=no", "depth", "holes must be one of filled, raw"),
        ("raw-patches?patch", "depth", "key=value"),
        ("raw-patches?patch=7&patch=8", "depth", "each key once"),
        ("raw-patches?patch=0", "depth", "whole number above 0"),
        ("raw-patches?patch=7.5", "depth", "whole number above 0"),
        ("raw-patches?depth_as=log", "image", "unknown option 'depth_as'"),
        ("raw-patches:14", "depth", "options only"),
        ("random:raw-patches", "depth", "options only"),
        ("surface", "image", "not images"),
        ("surface?patch=7", "depth", "patch must be a multiple of 2, got 7"),
        ("random:surface", "depth", "options only"),
        ("fpfh", "image", "not images"),
        ("fpfh:33", "depth", "options only"),
        ("fpfh?radius=inf", "depth", "a number above 0"),
        ("dino-depth", "depth", "random:dino-depth"),
        ("./nowhere", "depth", "no such folder"),
        ("raw-patches", "colour", "image or depth"),
        ("random:timm:vit_smal_patch14", "image", "Unknown model"),
        ("random:timm:resnet18", "image", "not a Vision Transformer"),
        ("random:timm:test_vit?seed=-1", "image", "seed"),
    ],
)  # fmt: skip
def test_impossible_names_are_one_line(spec, modality, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_frozen(spec, modality=modality)
    assert "\n" not in str(caught.value)


def test_broken_transformers_folders_are_one_line(tmp_path):
    folder = tmp_path / "model"
    save_model(folder, FAMILIES["vit"][0], mean_std=False)
    spec = f"transformers:{folder}"
    with pytest.raises(ConfigError, match=r"mean_std= imagenet or half or sim3d or none"):
        load_frozen(spec, modality="image")
    encoder = load_frozen(f"{spec}?mean_std=none", modality="image")
    np.testing.assert_allclose(encoder.prepare(picture(), SIDE), picture().transpose(2, 0, 1) / 255, atol=1e-5)
    weights = load((folder / "model.safetensors").read_bytes())  # not in the file, which is written next
    for change in ({"layernorm.bias"}, {"layernorm.weight", "layernorm.bias"}):
        save_file({k: v for k, v in weights.items() if k not in change}, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(DataError, match="missing_keys: .*layernorm.bias"):
            load_frozen(f"{spec}?mean_std=half", modality="image")
    extended = weights | {"embeddings.register_tokens": torch.zeros(1, 4, 64)}
    save_file(extended, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="unexpected_keys: .*register_tokens"):
        load_frozen(f"{spec}?mean_std=half", modality="image")
    save_file(weights | {"classifier.bias": torch.zeros(7)}, folder / "model.safetensors", {"format": "pt"})
    load_frozen(f"{spec}?mean_std=half", modality="image")
    (folder / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="cannot be read"):
        load_frozen(f"{spec}?mean_std=half", modality="image")
    transformers.ViTMAEConfig(**TINY).save_pretrained(tmp_path / "mae")
    with pytest.raises(ConfigError, match="'vit_mae' is none of"):
        load_frozen(f"transformers:{tmp_path / 'mae'}?mean_std=half", modality="image")


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unreachable)
    for spec in ("defm:vit_s14", "transformers:owner/name?mean_std=half"):
        with pytest.raises(ReportedError, match="cannot be read: no network"):
            load_frozen(spec, modality="depth")


@pytest.mark.parametrize(
    "view", [np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4), np.float32), np.zeros((0, 4), np.uint8), [1], scene()]
)
def test_only_images_are_encoded_as_images(view):
    encoder = load_frozen("raw-patches", modality="image")
    with pytest.raises(DataError, match="an image must be"):
        encoder.prepare(view, SIDE)
    with pytest.raises(DataError, match="encodes depth maps"):
        load_frozen("raw-patches", modality="depth").prepare(picture(), SIDE)
