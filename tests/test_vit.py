"""The packed forward pass against timm's own, attention against a masked softmax, stochastic depth against its law."""

import pytest
import torch

from dino_depth.config import ModelConfig
from dino_depth.errors import ConfigError
from dino_depth.vit import DepthTransformer, _residual, packed_attention, probe_attention, resize_position_embedding


def small(**settings) -> DepthTransformer:
    return DepthTransformer(ModelConfig(dim=32, depth=3, heads=2, layer_scale=1.0, **settings), 56)


def test_packed_crops_equal_separate_ones():
    model = small().eval()
    large, little = torch.randn(3, 1, 56, 56), torch.randn(5, 1, 28, 28)
    packed = model.forward_packed([large, little], [None, None])
    assert torch.allclose(packed[0], model.forward_features(large), atol=1e-5)
    assert torch.allclose(packed[1], model.forward_features(little), atol=1e-5)


def test_needed_rows_are_those_of_the_whole_pass():
    model, crops = small(), [torch.randn(3, 1, 56, 56), torch.randn(5, 1, 28, 28)]
    whole = torch.cat([part.flatten(0, 1) for part in model.forward_packed(crops, [None, None])])
    needed = torch.tensor([0, 17, 18, 50, 51, 75])
    assert torch.allclose(model.forward_packed(crops, [None, None], needed=needed), whole[needed], atol=1e-5)
    dropped = torch.stack([model.forward_packed(crops, [None, None], 0.5, needed) for _ in range(2)])
    assert torch.isfinite(dropped).all() and not torch.allclose(dropped[0], dropped[1])


def test_gradients_of_packed_crops_equal_separate_ones():
    model = small()
    crops = [torch.randn(2, 1, 56, 56), torch.randn(3, 1, 28, 28)]
    weights = [torch.randn(2, 17, 32), torch.randn(3, 5, 32)]
    sum((out * w).sum() for out, w in zip(model.forward_packed(crops, [None, None]), weights, strict=True)).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum((model.forward_features(crop) * w).sum() for crop, w in zip(crops, weights, strict=True)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(packed[name], parameter.grad, rtol=1e-3, atol=1e-4), name


def test_masked_patches_are_hidden():
    model = small().eval()
    torch.nn.init.normal_(model.mask_token)
    images, masks = torch.randn(2, 1, 56, 56), torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 5] = True
    changed = images.clone()
    changed[0, :, 14:28, 14:28] += 1  # patch 5 of a 4 x 4 grid
    (before,), (after,) = (model.forward_packed([x], [masks]) for x in (images, changed))
    assert torch.equal(before, after)
    (unmasked,) = model.forward_packed([images], [None])
    assert not torch.allclose(before[0], unmasked[0]) and torch.allclose(before[1], unmasked[1], atol=1e-5)


def test_grouped_attention_equals_block_diagonal_softmax():
    groups = [(2, 7), (1, 4), (3, 2)]
    lengths = [length for count, length in groups for _ in range(count)]
    query, key, value = torch.randn(3, sum(lengths), 2, 8).unbind(0)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key.double()) / 8**0.5
    scores = scores.masked_fill(owner[:, None] != owner, -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value.double())
    assert torch.allclose(packed_attention(query, key, value, groups).double(), expected, atol=1e-5)


@pytest.mark.parametrize("backend", ["varlen", "xformers"])
def test_cuda_attention_backends(backend):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if reason := probe_attention(backend, "cuda", torch.bfloat16):
        pytest.skip(f"{backend} does not work here: {reason}")


def test_the_probe_calls_the_backend():
    assert probe_attention("grouped") is None
    if not torch.cuda.is_available():
        assert "Error" in probe_attention("varlen")


def test_stochastic_depth_drops_whole_sequences_and_keeps_the_expectation():
    groups, drop = [(8, 3), (6, 2)], 0.5
    tokens, seen = torch.zeros(36, 1), []

    def branch(rows, kept):
        seen.append((len(rows), kept))
        return torch.ones_like(rows)

    results = torch.stack([_residual(tokens, groups, drop, branch) for _ in range(400)])
    assert all(call == (4 * 3 + 3 * 2, [(4, 3), (3, 2)]) for call in seen)
    assert set(results.unique().tolist()) == {0.0, 2.0}
    sequences = results[:, :24].view(400, 8, 3)
    assert (sequences == sequences[..., :1]).all()
    assert torch.allclose(results.mean(0), torch.ones(36, 1), atol=0.25)


def test_resizing_positions_to_their_own_grid_changes_nothing():
    position = torch.randn(1, 17, 8)
    assert torch.equal(resize_position_embedding(position, (4, 4)), position)
    assert resize_position_embedding(position, (8, 6)).shape == (1, 49, 8)


@pytest.mark.parametrize(
    "model, size, key",
    [
        (ModelConfig(), 100, "patch_size"),
        (ModelConfig(heads=5), 56, "heads"),
        (ModelConfig(drop_path=1.0), 56, "drop_path"),
        (ModelConfig(layer_scale=0), 56, "layer_scale"),
    ],
)
def test_sizes_that_cannot_work_are_refused(model, size, key):
    with pytest.raises(ConfigError, match=key):
        DepthTransformer(model, size)
