"""Masks, schedules, parameter groups and clipping of the recipe."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dino_depth.config import LossConfig, ModelConfig, PretrainConfig
from dino_depth.errors import ConfigError
from dino_depth.pretrain.masks import block_mask, draw_masks
from dino_depth.pretrain.optim import build_optimizer, clip, schedule, set_rates
from dino_depth.pretrain.student_teacher import Networks, update_teacher
from dino_depth.pretrain.train import check_settings


@pytest.mark.parametrize("grid, count", [(16, 1), (16, 25), (16, 128), (7, 24), (3, 9), (1, 1)])
def test_block_masks_hide_exactly_what_was_asked(grid, count):
    masks = [block_mask(np.random.default_rng(seed), grid, count) for seed in range(20)]
    assert {int(mask.sum()) for mask in masks} == {count}


def test_block_masks_are_blocks():
    """A hidden patch's right neighbour is hidden far more often than among independently hidden patches."""
    masks = np.stack([block_mask(np.random.default_rng(seed), 16, 64) for seed in range(200)])
    assert masks[:, :, 1:][masks[:, :, :-1]].mean() > 0.6


def test_masks_have_the_published_shares():
    config = LossConfig()
    masks = np.stack([draw_masks(16, config, 0, position) for position in range(600)])
    assert masks.shape == (600, 2, 256)
    hidden = masks.sum(2)
    assert ((hidden > 0).sum(1) == 1).all()
    assert (hidden[:, 0] > 0).mean() == pytest.approx(0.5, abs=0.07)
    ratios = hidden[hidden > 0] / 256
    assert ratios.min() >= 0.09 and ratios.max() <= 0.51 and ratios.mean() == pytest.approx(0.3, abs=0.02)
    # 77 hidden patches a map on average, as in the published recipe.
    assert hidden.sum(1).mean() == pytest.approx(77, abs=4)
    assert np.array_equal(draw_masks(16, config, 0, 5), masks[5])
    assert not np.array_equal(draw_masks(16, config, 1, 5), masks[5])
    assert not draw_masks(16, LossConfig(mask_share=0.0), 0, 0).any()


def test_schedules_equal_the_published_formulas():
    config = PretrainConfig()
    config.train.batch = 2048
    peak = 4e-3 * math.sqrt(2048 / 1024)
    assert schedule(config, 0).lr == 0
    assert schedule(config, 6250).lr == pytest.approx(peak / 2)
    assert schedule(config, 12500).lr == pytest.approx(peak)
    middle = 12500 + (125000 - 12500) // 2
    assert schedule(config, middle).lr == pytest.approx((peak + 1e-6) / 2)
    assert schedule(config, 125000).lr == pytest.approx(1e-6)
    assert schedule(config, 62500).weight_decay == pytest.approx((0.04 + 0.4) / 2)
    assert schedule(config, 62500).momentum == pytest.approx((0.992 + 1) / 2)
    assert schedule(config, 18750).teacher_temperature == pytest.approx(0.055)
    assert schedule(config, 60000).teacher_temperature == 0.07
    assert not schedule(config, 1249).last_layer and schedule(config, 1250).last_layer


def small() -> PretrainConfig:
    config = PretrainConfig()
    config.crops.global_size, config.crops.local_size = 28, 14
    config.model.dim, config.model.depth, config.model.heads = 16, 3, 2
    config.loss.prototypes, config.loss.hidden, config.loss.bottleneck = 8, 8, 4
    return config


def test_layer_decay_weight_decay_and_the_frozen_last_layer():
    config = small()
    student = Networks(config)
    optimizer = build_optimizer(student, config)
    now = schedule(config, 1000)
    set_rates(optimizer, now)
    place = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(place) == len(list(student.parameters()))
    groups = {name: place[id(parameter)] for name, parameter in student.named_parameters()}

    def lr(name):
        return groups[name]["lr"] / now.lr

    assert lr("backbone.norm.weight") == 1
    assert [lr(f"backbone.blocks.{i}.mlp.fc1.weight") for i in range(3)] == pytest.approx([0.9**3, 0.9**2, 0.9])
    assert lr("backbone.cls_token") == lr("backbone.pos_embed") == lr("backbone.mask_token") == pytest.approx(0.9**4)
    assert lr("backbone.patch_embed.proj.weight") == pytest.approx(0.2 * 0.9**4)
    assert lr("dino_head.mlp.0.weight") == 1 and lr("dino_head.direction") == lr("ibot_head.gain") == 0
    for name, group in groups.items():
        plain = name.endswith(("bias", "gamma")) or ".norm" in name
        assert group["weight_decay"] == (0 if plain else now.weight_decay), name
    set_rates(optimizer, schedule(config, 1250))
    assert groups["dino_head.direction"]["lr"] > 0


def test_each_part_is_clipped_on_its_own():
    student = Networks(small())
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    student.ibot_head.zero_grad()
    for parameter in student.ibot_head.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    norms = clip(student, 3.0)
    counts = [sum(p.numel() for p in part.parameters()) for part in student.children()]
    assert norms.tolist() == pytest.approx([counts[0] ** 0.5, counts[1] ** 0.5, 1e-3 * counts[2] ** 0.5], rel=1e-4)
    after = [torch.cat([p.grad.flatten() for p in part.parameters()]).norm().item() for part in student.children()]
    assert after == pytest.approx([3, 3, norms[2].item()], rel=1e-3)


def test_the_teacher_is_a_moving_average():
    student, teacher = Networks(small()), Networks(small())
    before = {name: value.clone() for name, value in teacher.named_parameters()}
    update_teacher(teacher, student, 0.9)
    for (name, value), new in zip(teacher.named_parameters(), student.parameters(), strict=True):
        assert torch.allclose(value, 0.9 * before[name] + 0.1 * new, atol=1e-6), name


def test_a_mask_larger_than_its_grid_is_refused():
    with pytest.raises(ValueError, match="10 of 9 patches"):
        block_mask(np.random.default_rng(0), 3, 10)


def test_clipping_is_torchs():
    ours, theirs = (
        Networks(
            PretrainConfig(
                model=ModelConfig(dim=24, depth=1, heads=2), loss=LossConfig(prototypes=8, hidden=16, bottleneck=8)
            )
        )
        for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    for network in (ours, theirs):
        generator = torch.Generator().manual_seed(0)
        for weight in network.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
    norms = clip(ours, 0.7)
    expected = [torch.nn.utils.clip_grad_norm_(part.parameters(), 0.7) for part in theirs.children()]
    torch.testing.assert_close(norms, torch.stack(expected))
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("loss", {"mask_ratio": [0.1, 1.5]}, "mask_ratio"),
        ("loss", {"mask_ratio": [0.0, 0.5]}, "mask_ratio"),
        ("loss", {"mask_share": 1.5}, "mask_share"),
        ("loss", {"student_temperature": 0.0}, "student_temperature"),
        ("optim", {"lr": -1.0}, "optim.lr"),
        ("optim", {"clip": 0.0}, "optim.clip"),
    ],
)
def test_settings_that_cannot_work_are_refused(section, change, message):
    config = PretrainConfig()
    config = replace(config, **{section: replace(getattr(config, section), **change)})
    with pytest.raises(ConfigError, match=message):
        check_settings(config, 1)
