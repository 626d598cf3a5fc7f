"""The loss by which patches tell the surface of their own input, against a transcription pixel by pixel in float64."""

import copy as copies
import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_distill import ALONE, first_batch
from test_pretrain import assert_same, copy, final_state, stopped_and_resumed

from dino_depth.config import PretrainConfig
from dino_depth.errors import ConfigError
from dino_depth.pretrain.batch import seen_patches
from dino_depth.pretrain.student_teacher import Networks, student_losses, teacher_targets
from dino_depth.pretrain.surface_loss import DEVIATIONS, MEANS, UNITS, surface_loss, surface_targets
from dino_depth.pretrain.train import pretrain

SIDE = 42


@pytest.fixture
def telling(tiny) -> PretrainConfig:
    tiny.loss.surface_weight = 0.5
    return tiny


def crops() -> torch.Tensor:
    """Waves over a slope, a hole, and a corner that is missing; one crop of nothing."""
    v, u = np.mgrid[:SIDE, :SIDE] / SIDE
    values = np.stack([0.3 * np.sin(7 * u + 2 * v) + v, np.cos(5 * u * v) - 0.5 * u, np.zeros_like(u)])
    values[0, 11:14, 20:23] = 0
    values[1, :15, :15] = 0
    return torch.from_numpy(values[:, None].astype(np.float32))


def by_the_book(crop: np.ndarray, patch: int) -> np.ndarray:
    """(patches, 24) of a crop (side, side) float64: at every pixel the least-squares quadratic of 5 x 5."""
    side = len(crop)
    offsets = np.arange(-2, 3)
    v, u = (part.ravel() for part in np.meshgrid(offsets, offsets, indexing="ij"))
    design = np.stack([np.ones(25), u, v, u * u / 2, u * v, v * v / 2], 1)
    numbers, known = np.zeros((side, side, 5)), np.zeros((side, side), bool)
    for row, column in itertools.product(range(2, side - 2), repeat=2):
        window = crop[row - 2 : row + 3, column - 2 : column + 3]
        if (window == 0).any():
            continue
        _, p, q, r, s, t = np.linalg.lstsq(design, -window.ravel() * side / UNITS, rcond=None)[0]
        length = math.sqrt(1 + p * p + q * q)
        curvature = ((1 + q * q) * r - 2 * p * q * s + (1 + p * p) * t) / (2 * length**3)
        curvature = 10 * min(max(curvature, -0.2), 0.2)
        numbers[row, column] = [p / length, q / length, 1 / length, curvature, abs(curvature)]
        known[row, column] = True
    rows, half = [], patch // 2
    for top, left in itertools.product(range(0, side, patch), repeat=2):
        parts = []
        for down, right in itertools.product((0, half), repeat=2):
            here = np.s_[top + down : top + down + half, left + right : left + right + half]
            count = known[here].sum()
            parts.append([*(numbers[here].sum((0, 1)) / max(count, 1)), count / half**2])
        rows.append(((np.array(parts) - MEANS) / DEVIATIONS).T.ravel())
    return np.array(rows)


def test_targets_equal_the_quadratics_of_every_pixel():
    found = surface_targets(crops(), 14)
    assert found.shape == (3, 9, 24) and found.dtype == torch.float32
    for crop, targets in zip(crops()[:, 0].double().numpy(), found, strict=True):
        np.testing.assert_allclose(targets, by_the_book(crop, 14), atol=2e-4)


def test_targets_are_mirrored_and_enlarged_with_the_crop():
    whole = crops()[1:2]
    found = surface_targets(whole, 14).view(1, 3, 3, 6, 2, 2)
    mirrored = surface_targets(whole.flip(3), 14).view(1, 3, 3, 6, 2, 2).flip(2).flip(5)
    sign = torch.tensor([-1.0, 1, 1, 1, 1, 1])[:, None, None]  # only the slope to the right turns
    torch.testing.assert_close(mirrored * sign, found, atol=1e-4, rtol=1e-4)
    ramp = torch.linspace(0.1, 0.9, 42).expand(1, 1, 42, 42)
    fine = torch.nn.functional.interpolate(ramp, (84, 84), mode="bilinear", align_corners=True)
    inside = surface_targets(ramp, 14)[0, 4].view(6, 4)[:3], surface_targets(fine, 14)[0, 14].view(6, 4)[:3]
    torch.testing.assert_close(*inside, atol=0.02, rtol=0.02)  # the same slope at twice the resolution


def test_targets_ignore_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(surface_targets(crops(), 14), surface_targets(crops(), 14).float())
    assert torch.equal(surface_targets(crops().bfloat16().float(), 14), surface_targets(crops().bfloat16(), 14))


def test_loss_and_its_gradient_equal_the_equation_patch_by_patch(telling):
    telling.model.drop_path = 0.0
    student, teacher = Networks(telling), Networks(telling)
    torch.nn.init.normal_(student.backbone.mask_token)
    batch = first_batch(telling)
    batch.global_crops[3] = 0  # a crop without a valid pixel
    targets = teacher_targets(teacher, batch, 0.05, 3)
    found = student_losses(student, batch, targets, telling)
    found["surface"].backward()
    gradient = student.surface_head.weight.grad.clone()
    student.zero_grad()
    student = student.double()
    tokens = student.backbone.embed(batch.global_crops.double(), batch.masks)
    told = student.surface_head(student.backbone.norm(student.backbone.blocks(tokens))[:, 1:])
    seen, expected = seen_patches(batch.global_crops, 14), 0.0
    assert batch.masks.any() and not seen.all()
    for crop, values in enumerate(batch.global_crops[:, 0].double().numpy()):
        wanted = torch.from_numpy(by_the_book(values, 14))
        for patch in seen[crop].nonzero()[:, 0].tolist():
            error = (told[crop, patch] - wanted[patch]).square().mean()
            expected = expected + error / int(seen[crop].sum()) / len(seen)
    expected.backward()
    assert found["surface"].item() == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(gradient.double(), student.surface_head.weight.grad, atol=1e-6, rtol=1e-3)
    whole = found["dino"] + found["ibot"] + 0.02 * found["koleo"] + 0.5 * found["surface"]
    assert found["loss"].item() == pytest.approx(whole.item(), rel=1e-6)


def test_perfect_answers_cost_nothing_and_unseen_patches_are_not_asked():
    targets, seen = surface_targets(crops(), 14), seen_patches(crops(), 14)
    told = targets.clone()
    assert not seen.all()
    told[~seen] = 1e3
    assert surface_loss(told.flatten(0, 1), targets, seen) == 0
    assert surface_loss(torch.zeros(27, 24), torch.ones(3, 9, 24), seen).item() == pytest.approx(2 / 3)


def test_it_changes_no_other_loss(telling):
    plain = copies.deepcopy(telling)
    plain.loss.surface_weight = 0.0
    torch.manual_seed(1)
    networks, batch = Networks(telling), first_batch(telling)
    targets = teacher_targets(networks, batch, 0.05, 3)
    with_it, without = (student_losses(networks, batch, targets, config) for config in (telling, plain))
    assert with_it.keys() - without.keys() == {"surface"}
    for name in ("dino", "ibot", "koleo"):
        assert with_it[name].item() == pytest.approx(without[name].item(), rel=1e-5)


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_learns_and_resumes_bit_for_bit(telling, tmp_path, monkeypatch, alone):
    telling = copy(telling, telling.out, loss=ALONE if alone else {}, train={"steps": 24}, optim={"lr": 0.06})
    pretrain(copy(telling, tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    told = [line["loss/surface"] for line in lines]
    assert np.mean(told[-4:]) < np.mean(told[:4]) - 0.05
    stopped_and_resumed(telling, monkeypatch)
    assert_same(final_state(telling.out), final_state(tmp_path / "whole"))
    parts = {key.split(".")[0] for key in final_state(telling.out)["student"]}
    assert parts == {"backbone", "surface_head"} | (set() if alone else {"dino_head", "ibot_head"})
    assert ("loss/dino" in lines[0]) != alone and "gradient/surface_head" in lines[0]


def test_nothing_to_learn_is_still_refused(tiny):
    for name, weight in ALONE.items():
        setattr(tiny.loss, name, weight)
    with pytest.raises(ConfigError, match="nothing to learn"):
        pretrain(tiny)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"loss": {"surface_weight": -1.0}}, "loss.surface_weight must be at least 0 and finite, got -1.0"),
        ({"loss": {"dino_weight": math.nan}}, "loss.dino_weight must be at least 0 and finite, got nan"),
        ({"model": {"patch_size": 7}}, "loss.surface_weight: model.patch_size must be a multiple of 2, got 7"),
    ],
)
def test_what_it_cannot_work_with_is_refused(telling, groups, message):
    with pytest.raises(ConfigError, match=message):
        pretrain(copy(telling, telling.out, **groups))
