"""Point-MAE: sampling, groups and interpolation against brute force, blocks against a transcription, strict weights.

No pretrained weights are reachable: the files here have random ones in the authors' format.
"""

import math

import numpy as np
import pytest
import torch

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError
from dino_depth.frozen import load_frozen, point_mae
from dino_depth.frozen.point_mae import PointTransformer, farthest_points, interpolation


def cloud(count=200, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = PointTransformer()
        for layer in made.modules():
            if isinstance(layer, torch.nn.BatchNorm1d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2)
    return made.eval().requires_grad_(False)


def weights_file(path, change=None):
    """Like the authors' pretrain.pth: encoder and decoder, each key behind ``module.``, in a dictionary with more."""
    weights = {
        "module.MAE_encoder."
        + (name.replace("blocks.", "blocks.blocks.", 1) if name.startswith("blocks.") else name): part
        for name, part in model().state_dict().items()
    }
    weights["module.MAE_decoder.norm.weight"] = torch.zeros(384)
    weights["module.mask_token"] = torch.zeros(1, 1, 384)
    if change:
        change(weights)
    torch.save({"base_model": weights, "epoch": 300}, path)
    return path


def relief(side=48):
    rows, columns = np.indices((side, side)) / side
    depth = 0.6 + 0.05 * np.sin(9 * rows) * np.cos(7 * columns)
    depth[(rows - 0.5) ** 2 + (columns - 0.5) ** 2 > 0.2] = 0
    return DepthMap(np.where(depth > 0, depth, 1).astype(np.float32), depth > 0)


def test_the_network_is_the_published_one():
    with torch.device("meta"):
        made = PointTransformer()
    assert len(made.state_dict()) == 156
    assert round(sum(part.numel() for part in made.parameters()) / 1e6, 2) == 21.83


def test_sampling_equals_a_slow_loop():
    for seed, count in ((0, 1), (1, 15), (2, 60), (3, 100)):
        points = cloud(60, seed)
        points[50] = points[7]  # twins
        chosen = [0]
        while len(chosen) < min(count, 60):
            apart = [
                -1 if at in chosen else min(math.dist(point, points[k]) for k in chosen)
                for at, point in enumerate(points)
            ]
            chosen.append(int(np.argmax(apart)))
        found = farthest_points(points, count)
        assert len(set(found)) == len(found) == len(chosen)
        if count < 60:  # the twins come last
            assert found.tolist() == chosen
        reach = [min(np.linalg.norm(points[at] - points[found[:k]], axis=1)) for k, at in enumerate(found) if k]
        assert all(after <= before + 1e-6 for before, after in zip(reach, reach[1:], strict=False))


def test_interpolation_is_the_mean_of_the_three_nearest_centres():
    points = cloud(60)
    centres = points[farthest_points(points, 12)]
    weights = interpolation(points, centres).toarray()
    np.testing.assert_allclose(weights.sum(1), 1)
    for row, point in zip(weights, points, strict=True):
        apart = np.square(centres.astype(np.float64) - point).sum(1)
        nearest = np.argsort(apart, kind="stable")[:3]
        expected = np.zeros(12)
        expected[nearest] = 1 / (apart[nearest] + 1e-8)
        np.testing.assert_allclose(row, expected / expected.sum(), atol=1e-6)
    at_centres = interpolation(centres, centres).toarray()
    np.testing.assert_allclose(at_centres, np.eye(12), atol=1e-4)


def transcribed(made, groups, centres):
    """The network in float64, a group and a head at a time."""
    weights = {name: part.double() for name, part in made.state_dict().items()}

    def linear(x, name):
        out = x @ weights[f"{name}.weight"].squeeze(-1).T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def batch_norm(x, name):
        mean, var = weights[f"{name}.running_mean"], weights[f"{name}.running_var"]
        return (x - mean) / (var + 1e-5).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def layer_norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    tokens = []
    for group in groups.double():
        x = linear(
            batch_norm(linear(group, "encoder.first_conv.0"), "encoder.first_conv.1").clamp_min(0),
            "encoder.first_conv.3",
        )
        x = torch.cat([x.max(0).values.expand_as(x), x], 1)
        x = linear(
            batch_norm(linear(x, "encoder.second_conv.0"), "encoder.second_conv.1").clamp_min(0),
            "encoder.second_conv.3",
        )
        tokens.append(x.max(0).values)
    x = torch.stack(tokens)
    position = linear(gelu(linear(centres.double(), "pos_embed.0")), "pos_embed.2")
    taken = []
    for number in range(12):
        x, name = x + position, f"blocks.{number}"
        q, k, v = linear(layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv").split(384, 1)
        heads = []
        for head in range(6):
            part = slice(64 * head, 64 * (head + 1))
            heads.append(torch.softmax(q[:, part] @ k[:, part].T / 8, 1) @ v[:, part])
        x = x + linear(torch.cat(heads, 1), f"{name}.attn.proj")
        hidden = gelu(linear(layer_norm(x, f"{name}.norm2"), f"{name}.mlp.fc1"))
        x = x + linear(hidden, f"{name}.mlp.fc2")
        if number in (3, 7, 11):
            taken.append(layer_norm(x, "norm"))
    return torch.cat(taken, 1)


def test_the_network_equals_its_transcription_and_knows_no_order_of_points():
    made, generator = model(), torch.Generator().manual_seed(1)
    groups, centres = torch.randn(18, 7, 3, generator=generator), torch.randn(18, 3, generator=generator)
    found = made(groups, centres)
    torch.testing.assert_close(found.double(), transcribed(made, groups, centres), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(made(groups[:, torch.randperm(7, generator=generator)], centres), found)
    moved = made(groups, centres + 0.5)
    assert not torch.allclose(moved, found, atol=1e-3)
    for part in (made.encoder(groups), made.encoder(groups + 0)):
        assert torch.equal(part, made.encoder(groups))  # evaluation: no batch enters


def test_features_are_means_of_interpolated_groups(tmp_path):
    spec = f"point-mae:{weights_file(tmp_path / 'pretrain.pth')}?patch=8&samples=3&groups=20&neighbours=10"
    encoder = load_frozen(spec, modality="depth")
    view = relief()
    batch = encoder.prepare(view, 48)[None]
    features = encoder.encode(batch)
    assert features.shape == (1, 6, 6, 1152) and torch.equal(features, encoder.encode(batch))
    # By brute force, one cell at a time.
    valid = batch[0, 2] > 0
    points = batch[0][:, valid].T.numpy()
    centres = points[farthest_points(points, 20)]
    near = np.argsort(np.linalg.norm(points[None] - centres[:, None], axis=2), 1)[:, :10]
    made = model()(torch.from_numpy(points[near] - centres[:, None]), torch.from_numpy(centres)).numpy()
    each = interpolation(points, centres).toarray() @ made
    whole = np.zeros((18, 18, 1152))
    whole[valid.numpy()] = each
    for row in range(6):
        for column in range(6):
            inside = np.s_[3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
            seen = valid[inside].numpy()
            expected = whole[inside][seen].mean(0) if seen.any() else np.zeros(1152)
            np.testing.assert_allclose(features[0, row, column], expected, atol=2e-3)


def test_the_unit_sphere_knows_no_unit_and_metres_need_one():
    encoder = load_frozen(
        "random:point-mae?patch=8&samples=2&groups=9&neighbours=5&scale=unit_sphere", modality="depth"
    )
    view = relief()
    larger = DepthMap(view.depth * 2, view.valid)
    one, two = (encoder.encode(encoder.prepare(part, 48)[None]) for part in (view, larger))
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)
    metric = load_frozen("random:point-mae?patch=8&samples=2&groups=9&neighbours=5", modality="depth")
    assert metric.fingerprint != encoder.fingerprint
    with pytest.raises(DataError, match="needs depth in metres, this map is relative; use scale=unit_sphere"):
        metric.prepare(DepthMap(view.depth, view.valid, "relative"), 48)
    empty = metric.encode(torch.zeros(1, 3, 12, 12))
    assert empty.shape == (1, 6, 6, 1152) and (empty == 0).all()


def rename(weights):
    weights["module.MAE_encoder.else"] = weights.pop("module.MAE_encoder.norm.bias")


@pytest.mark.parametrize(
    "change",
    [
        lambda weights: weights.pop("module.MAE_encoder.pos_embed.0.weight"),
        lambda weights: weights.update({"module.MAE_encoder.more": torch.zeros(1)}),
        lambda weights: weights.update({"module.MAE_encoder.norm.weight": torch.zeros(3)}),
        rename,
    ],
)
def test_weights_that_do_not_fit_are_one_line(tmp_path, change):
    path = weights_file(tmp_path / "pretrain.pth", change)
    with pytest.raises(DataError, match=f"{path}: not the encoder of Point-MAE") as error:
        load_frozen(f"point-mae:{path}", modality="depth")
    assert "\n" not in str(error.value)


def test_what_cannot_be_is_one_line(tmp_path):
    (tmp_path / "text").write_text("no weights")
    for spec, kind, message in (
        ("point-mae:absent.pth", ConfigError, "never downloaded"),
        ("point-mae", ConfigError, "never downloaded"),
        (f"point-mae:{tmp_path / 'text'}", DataError, "unreadable weights"),
        ("random:point-mae:file.pth", ConfigError, "random weights need no file"),
    ):
        with pytest.raises(kind, match=message) as error:
            load_frozen(spec, modality="depth")
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="describes depth, not images"):
        load_frozen("random:point-mae", modality="image")
    assert point_mae.TAKEN == (4, 8, 12)
