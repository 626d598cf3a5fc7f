"""The packed forward pass against timm's and transformers', attention against a masked softmax, stochastic depth and
rotary positions against their definitions."""

import numpy as np
import pytest
import timm
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from dino_depth import vit
from dino_depth.config import ModelConfig, PretrainConfig, parse
from dino_depth.depth import DepthMap, Normalization, normalize
from dino_depth.errors import ConfigError
from dino_depth.pretrain.stochastic_depth import kept_sequences
from dino_depth.rotary import rotate, rotation
from dino_depth.vit import DepthTransformer, packed_attention, probe_attention, resize_position_embedding
from dino_depth.weight_names import to_transformers


def small(**settings) -> DepthTransformer:
    model = DepthTransformer(ModelConfig(dim=32, depth=3, heads=2, layer_scale=1.0, **settings), 56)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def test_packed_crops_equal_separate_ones():
    model = small().eval()
    large, little = torch.randn(3, 1, 56, 56), torch.randn(5, 1, 28, 28)
    packed = model.forward_packed([large, little], [None, None])
    assert torch.allclose(packed[0], model.forward_features(large), atol=1e-5)
    assert torch.allclose(packed[1], model.forward_features(little), atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("pack", [True, False])
def test_a_dent_of_a_tenth_of_a_millimetre_reaches_the_first_block(positions, pack):
    """At .3 m, on a part a quarter of a metre high, in training's and inference's forward pass, under bfloat16."""
    side = 56
    depth = np.full((side, side), 0.55)
    depth[14:42, 14:42] = 0.3
    dented = depth.copy()
    dented[18:24, 18:24] += 1e-4
    sound, dent = (
        torch.from_numpy(normalize(DepthMap.from_values(values), Normalization()))[None, None]
        for values in (depth, dented)
    )
    model = small(positions=positions).eval()
    seen = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    crops = [sound, dent]
    results = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for crop in crops:
            results.append(model.forward_packed([crop], [None])[0] if pack else model.forward_features(crop))
    kernel = model.patch_embed.proj.weight.detach().double()
    expected = torch.nn.functional.conv2d((dent - sound).double(), kernel, stride=14).flatten(2)[0].T  # (patches, dim)
    before, after = (tokens.double().reshape(-1, 32)[1:] for tokens in seen)
    assert seen[0].dtype == torch.float32 and expected[5].norm() > 0
    assert (after - before - expected).norm() < 0.02 * expected.norm()
    assert not torch.equal(*results)


def test_needed_rows_are_those_of_the_whole_pass():
    model, crops = small(), [torch.randn(3, 1, 56, 56), torch.randn(5, 1, 28, 28)]
    whole = torch.cat([part.flatten(0, 1) for part in model.forward_packed(crops, [None, None])])
    needed = torch.tensor([0, 17, 18, 50, 51, 75])
    assert torch.allclose(model.forward_packed(crops, [None, None], needed=needed), whole[needed], atol=1e-5)
    kept = [[torch.tensor([0, 2]), torch.tensor([1, 2, 4])], [torch.tensor([1]), torch.tensor([0, 3])]] * 3
    whole = model.forward_packed(crops, [None, None], kept=kept, scale=1.5)
    whole = torch.cat([part.flatten(0, 1) for part in whole])
    assert torch.allclose(model.forward_packed(crops, [None, None], needed, kept, 1.5), whole[needed], atol=1e-5)


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


def test_attention_in_bfloat16_by_products_equals_the_fused_one(monkeypatch):
    groups, weights = [(2, 37), (5, 10)], torch.randn(124, 2, 16)
    wide = torch.randn(3, 124, 2, 16)
    results = []
    for dtype, longest in ((torch.float32, 512), (torch.bfloat16, 512), (torch.bfloat16, 36)):
        monkeypatch.setattr(vit, "LENGTH_OF_PRODUCTS", longest)  # 36: the longer group is fused, in float32
        parts = [part.to(dtype).requires_grad_() for part in wide]
        attended = packed_attention(*parts, groups)
        assert attended.dtype == dtype
        results.append([attended.float(), *torch.autograd.grad((attended.float() * weights).sum(), parts)])
    for exact, products, fused in zip(*results, strict=True):
        error = (products.float() - exact).norm() / exact.norm()
        assert error < 2 * (fused.float() - exact).norm() / exact.norm() and error < 1e-2


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


def test_stochastic_depth_equals_one_sequence_at_a_time():
    model, crops = small(), [torch.randn(4, 1, 56, 56), torch.randn(6, 1, 28, 28)]
    kept = kept_sequences(0.4, 6, [1, 2], 0, 0, 0, 4)[:6]
    kept = [[torch.from_numpy(part) for part in (first, second[second < 6])] for first, second in kept]
    kept[3] = [torch.tensor([], dtype=torch.int64), torch.tensor([5])]  # a set of which nobody takes a branch
    packed = model.forward_packed(crops, [None, None], kept=kept, scale=1.7)
    for place, (images, result) in enumerate(zip(crops, packed, strict=True)):
        for sequence in range(len(images)):
            tokens = model.embed(images[sequence : sequence + 1])
            for number, block in enumerate(model.blocks):
                if sequence in kept[2 * number][place]:
                    tokens = tokens + 1.7 * block.ls1(block.attn(block.norm1(tokens)))
                if sequence in kept[2 * number + 1][place]:
                    tokens = tokens + 1.7 * block.ls2(block.mlp(block.norm2(tokens)))
            assert torch.allclose(model.norm(tokens)[0], result[sequence], atol=1e-5), (place, sequence)


def test_a_branch_that_nobody_takes_has_gradients_of_zero():
    model = small()
    kept = [[torch.tensor([], dtype=torch.int64)]] * 6
    (tokens,) = model.forward_packed([torch.randn(2, 1, 28, 28)], [None], kept=kept)
    tokens.sum().backward()
    assert model.blocks[1].attn.qkv.weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_who_skips_does_not_depend_on_the_ranks(ranks):
    whole = kept_sequences(0.3, 4, [2, 5], 7, 11, 0, 12)
    share = 12 // ranks
    for branch in range(4):
        for place, count in enumerate((2, 5)):
            seen = []
            for rank in range(ranks):
                part = kept_sequences(0.3, 4, [2, 5], 7, 11, rank * share, share)[branch][place]
                seen += [(index // share) * 12 + rank * share + index % share for index in part.tolist()]
                assert all(abs(np.sum(part // share == crop) - 0.7 * share) < 1 for crop in range(count))
            assert sorted(seen) == whole[branch][place].tolist()


def test_every_sequence_skips_its_share():
    steps, seen = 4000, np.zeros((2, 3, 8))
    for step in range(steps):
        for branch, (sets,) in enumerate(kept_sequences(0.3, 2, [3], 0, step, 5, 8)):
            seen[branch].reshape(-1)[sets] += 1
    # Four standard deviations of a binomial share.
    assert np.abs(seen / steps - 0.7).max() < 4 * (0.7 * 0.3 / steps) ** 0.5
    assert kept_sequences(0.0, 2, [3], 0, 0, 0, 8) is None


def huggingface(model: DepthTransformer):
    """The same network as transformers has it."""
    sizes = model.config
    config = DINOv3ViTConfig(
        hidden_size=sizes.dim, intermediate_size=4 * sizes.dim, num_hidden_layers=sizes.depth, num_channels=1,
        num_attention_heads=sizes.heads, patch_size=sizes.patch_size, num_register_tokens=sizes.registers,
        key_bias=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    other = DINOv3ViTModel(config).eval()
    theirs = {
        name.replace("layer.", "model.layer."): v for name, v in to_transformers(model.state_dict(), sizes).items()
    }
    other.load_state_dict(theirs)
    return other


@pytest.mark.parametrize("registers", [0, 3])
def test_packed_rotary_crops_equal_transformers_one_at_a_time(registers):
    model = small(positions="rotary", registers=registers)
    other = huggingface(model)
    crops = [torch.randn(3, 1, 56, 56), torch.randn(5, 1, 28, 28), torch.randn(1, 1, 28, 70)]
    masks = [torch.rand(3, 16) < 0.3, None, None]
    torch.nn.init.normal_(model.mask_token)
    other.embeddings.mask_token.data.copy_(model.mask_token[None])
    for images, mask, result in zip(crops, masks, model.forward_packed(crops, masks), strict=True):
        for place in range(len(images)):
            hidden = None if mask is None else mask[place : place + 1]
            single = other(pixel_values=images[place : place + 1], bool_masked_pos=hidden).last_hidden_state
            assert torch.allclose(result[place], single[0], atol=1e-5)
    assert torch.equal(model.forward_features(crops[2]), model.forward_packed(crops, masks)[2])
    assert torch.equal(model(crops[1]), model.forward_features(crops[1])[:, 0])


def test_packed_crops_with_registers_equal_separate_ones():
    model = small(registers=3).eval()
    torch.nn.init.normal_(model.reg_token)
    large, little = torch.randn(3, 1, 56, 56), torch.randn(5, 1, 28, 28)
    packed = model.forward_packed([large, little], [None, None])
    assert packed[0].shape == (3, 1 + 3 + 16, 32) and model.num_prefix_tokens == 4
    assert torch.allclose(packed[0], model.forward_features(large), atol=1e-5)
    assert torch.allclose(packed[1], model.forward_features(little), atol=1e-5)
    needed = torch.tensor([0, 4, 19, 20, 64, 68])
    whole = torch.cat([part.flatten(0, 1) for part in packed])
    assert torch.allclose(model.forward_packed([large, little], [None, None], needed), whole[needed], atol=1e-5)


def test_rotation_equals_its_definition():
    """Pairs (d, d + head_dim / 2) are complex numbers; a patch's place turns them."""
    groups, grids, prefix = [(2, 8), (3, 5)], [(2, 3), (1, 3)], 2
    tokens = torch.randn(31, 2, 16, dtype=torch.float64)
    rotations = [rotation(grid, prefix, 16, torch.device("cpu")) for grid in grids]
    found, start = rotate(tokens, groups, rotations), 0
    for (count, length), (rows, columns) in zip(groups, grids, strict=True):
        for place in range(count * length):
            vector = tokens[start + place]  # (heads, head_dim)
            patch = place % length - prefix
            if patch >= 0:
                row, column = divmod(patch, columns)
                centre = [(2 * row + 1) / rows - 1] * 4 + [(2 * column + 1) / columns - 1] * 4
                angles = torch.tensor([2 * np.pi * c / 100 ** (i % 4 / 4) for i, c in enumerate(centre)]).double()
                turned = torch.complex(vector[:, :8], vector[:, 8:]) * torch.polar(torch.ones_like(angles), angles)
                vector = torch.cat([turned.real, turned.imag], 1)
            assert torch.allclose(found[start + place], vector, atol=1e-5)
        start += count * length
    assert rotate(tokens.bfloat16(), groups, rotations).dtype == torch.bfloat16


@pytest.mark.parametrize("settings", [{}, {"positions": "rotary", "registers": 2}])
@pytest.mark.parametrize("dropping", [False, True])
def test_recomputed_activations_change_neither_loss_nor_gradients(settings, dropping):
    kept = [[torch.tensor([0, 2]), torch.tensor([1, 2, 4])], [torch.tensor([1]), torch.tensor([0, 3])]] * 3
    kept[2] = [torch.tensor([], dtype=torch.int64), torch.tensor([3])]
    arguments = {"kept": kept, "scale": 1.5} if dropping else {}
    crops, results, bytes_kept = [torch.randn(3, 1, 56, 56), torch.randn(5, 1, 28, 28)], [], []
    for recompute in (False, True):
        torch.manual_seed(1)
        model, seen = small(checkpoint_activations=recompute, **settings), {}

        def pack(tensor, seen=seen):
            seen[tensor.data_ptr()] = tensor.nbytes
            return tensor

        for needed in (None, torch.tensor([0, 17, 50])):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                tokens = model.forward_packed(crops, [torch.rand(3, 16) < 0.3, None], needed, **arguments)
            loss = sum((part**3).sum() for part in tokens)
            loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
        bytes_kept.append(sum(seen.values()))
    assert len(results[0]) == len(results[1]) > 30
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert bytes_kept[1] < bytes_kept[0] / 2


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        ("pretrain", "vit_small_patch14_dinov2"),
        ("pretrain_vit_b", "vit_base_patch14_dinov2"),
        ("pretrain_vit_l", "vit_large_patch14_dinov2"),
    ],
)
def test_shipped_sizes_are_those_of_dino_v2(config, theirs):
    sizes = parse(PretrainConfig, ["--config", config], "test").model
    with torch.device("meta"):
        ours = DepthTransformer(sizes, 224).state_dict()
        theirs = timm.create_model(theirs, pretrained=False, in_chans=1, img_size=224, num_classes=0).state_dict()
    assert {name: value.shape for name, value in theirs.items()} == {
        name: value.shape for name, value in ours.items() if name != "mask_token"
    }


def test_resizing_positions_to_their_own_grid_changes_nothing():
    position = torch.randn(1, 17, 8)
    assert torch.equal(resize_position_embedding(position, (4, 4)), position)
    assert resize_position_embedding(position, (8, 6)).shape == (1, 49, 8)
    # With registers the class token has none.
    resized = resize_position_embedding(position[:, 1:], (8, 6))
    assert torch.equal(resized, resize_position_embedding(position, (8, 6))[:, 1:])


@pytest.mark.parametrize(
    "model, size, key",
    [
        (ModelConfig(), 100, "patch_size"),
        (ModelConfig(heads=5), 56, "heads"),
        (ModelConfig(drop_path=1.0), 56, "drop_path"),
        (ModelConfig(layer_scale=0), 56, "layer_scale"),
        (ModelConfig(registers=-1), 56, "registers"),
        (ModelConfig(dim=60, positions="rotary"), 56, "multiple of 4"),
    ],
)
def test_sizes_that_cannot_work_are_refused(model, size, key):
    with pytest.raises(ConfigError, match=key):
        DepthTransformer(model, size)
