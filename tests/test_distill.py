"""A second teacher: its losses against float64, its input, exact resume, and what is refused."""

import copy as copies
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_pretrain import assert_same, copy, final_state, stopped_and_resumed

from dino_depth.config import PretrainConfig
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError
from dino_depth.frozen import load_frozen
from dino_depth.pretrain.batch import Batch, seen_patches
from dino_depth.pretrain.distill import SecondTeacher
from dino_depth.pretrain.loading import make_loader, next_batch
from dino_depth.pretrain.maps import MapsInShards
from dino_depth.pretrain.student_teacher import Networks, student_losses, teacher_targets
from dino_depth.pretrain.train import pretrain
from dino_depth.shards import DepthShards
from dino_depth.vit import DepthTransformer

# Another architecture, input and grid than the student's 3 x 3 patches of 14 pixels: 5 x 5 cells of 8.
CNN = "random:timm:resnet18?layers=1-2"
ALONE = {"dino_weight": 0.0, "ibot_weight": 0.0, "koleo_weight": 0.0}


@pytest.fixture
def taught(tiny) -> PretrainConfig:
    tiny.distill.teacher = "random:tiny"
    tiny.distill.class_weight, tiny.distill.patch_weight = 0.5, 2.0
    return tiny


def first_batch(config: PretrainConfig) -> Batch:
    maps = MapsInShards(DepthShards.configured(config.data))
    return next_batch(make_loader(maps, config, 0, torch.device("cpu")))


def by_the_book(features: torch.Tensor) -> torch.Tensor:
    """Every channel (rows, dim) less its mean over its standard deviation, float64."""
    features = features.double()
    return (features - features.mean(0)) / (features.var(0, correction=0) + 1e-6).sqrt()


@pytest.mark.parametrize("name", [CNN, "random:tiny"])
def test_losses_equal_the_equation_crop_by_crop(taught, name):
    taught.distill.teacher, taught.model.drop_path = name, 0.0
    second = SecondTeacher(taught, torch.device("cpu"))
    student, teacher = (Networks(taught, second.dim) for _ in range(2))
    batch = first_batch(taught)
    batch.global_crops[3], batch.depth[3] = 0, 0  # a crop without a valid pixel
    batch.seen = seen_patches(batch.global_crops, 14)
    targets = teacher_targets(teacher, batch, 0.05, 3, second)
    found = student_losses(student, batch, targets, taught)

    encoder, side = load_frozen(name, modality="depth"), {CNN: 40, "random:tiny": 42}[name]
    classes, patches, places = [], [], []
    for crop, (depth, values) in enumerate(zip(batch.depth[:, 0].numpy(), batch.global_crops[:, 0], strict=True)):
        if not depth.any():
            continue
        view = encoder.prepare(DepthMap.from_values(depth), side)[None]
        cells = encoder.encode(view).permute(0, 3, 1, 2).clone()
        classes.append(cells.mean((2, 3))[0] if name == CNN else encoder.to_tokens(view)[0][0].clone())
        if cells.shape[-1] != 3:
            cells = F.interpolate(cells, (3, 3), mode="bilinear", antialias=True)
        for patch in range(9):
            row, column = divmod(patch, 3)
            if values[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].any():
                patches.append(cells[0, :, row, column])
                places.append((crop, patch))
    assert len(classes) == len(batch.depth) - 1 and len(patches) < 9 * len(batch.depth)
    student = student.double()
    tokens = student.backbone.embed(batch.global_crops.double(), batch.masks)
    tokens = student.backbone.norm(student.backbone.blocks(tokens))
    whole, seen = student.projector.classes(tokens[:, 0]), student.projector.patches(tokens[:, 1:])
    crops, wanted = [crop for crop in range(len(batch.depth)) if crop != 3], by_the_book(torch.stack(classes))
    distance = (1 - F.cosine_similarity(whole[crops], wanted)).sum() / len(batch.depth)
    assert found["second_class"].item() == pytest.approx(distance.item(), rel=1e-4)
    wanted, expected = by_the_book(torch.stack(patches)), 0.0
    for (crop, patch), target in zip(places, wanted, strict=True):
        count = sum(other == crop for other, _ in places)
        expected += (1 - F.cosine_similarity(seen[crop, patch], target, dim=0)).item() / count / len(batch.depth)
    assert found["second_patch"].item() == pytest.approx(expected, rel=1e-4)
    whole = found["dino"] + found["ibot"] + 0.02 * found["koleo"]
    whole = whole + 0.5 * found["second_class"] + 2.0 * found["second_patch"]
    assert found["loss"].item() == pytest.approx(whole.item(), rel=1e-6)


def test_the_second_teacher_changes_no_other_loss(tiny):
    plain, taught = copies.deepcopy(tiny), copies.deepcopy(tiny)
    taught.distill.teacher = "random:tiny"
    second = SecondTeacher(taught, torch.device("cpu"))
    torch.manual_seed(1)
    networks = Networks(taught, second.dim)
    batch = first_batch(taught)
    with_it = student_losses(networks, batch, teacher_targets(networks, batch, 0.05, 3, second), taught)
    batch = first_batch(plain)
    assert batch.depth is None
    without = student_losses(networks, batch, teacher_targets(networks, batch, 0.05, 3), plain)
    for name in ("dino", "ibot", "koleo"):
        assert with_it[name].item() == pytest.approx(without[name].item(), rel=1e-5)


def test_the_teacher_sees_the_depth_of_the_students_crops(taught):
    """Metres in, in the order of the crops: with no rotation or flip the student's input is made of the same pixels."""
    batch = first_batch(taught)
    assert batch.depth.shape == batch.global_crops.shape and batch.metric.all()
    assert torch.equal(batch.depth > 0, batch.global_crops != 0)
    valid = batch.depth[batch.depth > 0]
    assert 0.3 < valid.min() and valid.max() < 0.8  # the scenes of conftest.py
    for depth, values in zip(batch.depth, batch.global_crops, strict=True):  # nearer is larger
        seen = depth > 0
        assert np.corrcoef(depth[seen].numpy(), values[seen].numpy())[0, 1] < -0.3


def test_resume_is_bit_for_bit_and_the_loss_falls(taught, tmp_path, monkeypatch):
    taught.train.steps, taught.optim.lr = 24, 0.06
    pretrain(copy(taught, tmp_path / "whole"))
    lines = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    patch = [line["loss/second_patch"] for line in lines]
    assert np.mean(patch[-4:]) < np.mean(patch[:4]) - 0.05
    stopped_and_resumed(taught, monkeypatch)
    assert_same(final_state(taught.out), final_state(tmp_path / "whole"))
    assert "projector.patches.weight" in final_state(taught.out)["student"]


def test_another_teacher_of_the_same_name_is_not_resumed(taught, monkeypatch):
    taught.train.steps = 2
    pretrain(taught)
    init = SecondTeacher.__init__

    def other(self, config, device):
        init(self, config, device)
        self.fingerprint = "0" * 64

    monkeypatch.setattr(SecondTeacher, "__init__", other)
    with pytest.raises(ConfigError, match="--resume: distill.teacher .* has other weights"):
        pretrain(dataclasses.replace(taught, resume=True))


def test_alone_it_needs_no_heads_and_no_local_crops(taught, tmp_path):
    taught = copy(taught, taught.out, loss=ALONE, distill={"teacher": CNN})
    seen, packed = [], DepthTransformer.forward_packed

    def noted(self, crops, *arguments, **named):
        seen.append(len(crops))
        return packed(self, crops, *arguments, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(DepthTransformer, "forward_packed", noted)
        pretrain(taught)
    assert set(seen) == {1} and len(seen) == taught.train.steps  # the student's global crops, no teacher of its own
    state = final_state(taught.out)
    assert {key.split(".")[0] for key in state["teacher"]} == {"backbone", "projector"}
    figures = json.loads((Path(taught.out) / "metrics.jsonl").read_text().splitlines()[-1])
    assert figures["loss"] == pytest.approx(0.5 * figures["loss/second_class"] + 2 * figures["loss/second_patch"])
    assert "gradient/projector" in figures and not any(name.startswith("health/") for name in figures)
    # A run with heads may begin there.
    pretrain(dataclasses.replace(copy(taught, tmp_path / "next", loss={"dino_weight": 1.0}), init_from=taught.out))


def test_every_parameter_learns(taught):
    second = SecondTeacher(taught, torch.device("cpu"))
    student, batch = Networks(taught, second.dim), first_batch(taught)
    student_losses(student, batch, teacher_targets(student, batch, 0.05, 3, second), taught)["loss"].backward()
    silent = [name for name, value in student.named_parameters() if value.grad is None or not value.grad.any()]
    assert silent == []


@pytest.mark.parametrize(
    "groups, message",
    [
        ({"distill": {"teacher": "random:timy"}}, "distill.teacher: .*timy"),
        ({"distill": {"teacher": "fpfh"}}, "fpfh.*needs a camera"),
        ({"distill": {"size": 50}}, "distill.teacher: input size 50 is no multiple of the patch size 14"),
        ({"distill": {"patch_weight": -1.0}}, "distill.patch_weight must be at least 0, got -1.0"),
        ({"distill": {"patch_weight": 0.0, "class_weight": 0.0}}, "needs distill.class_weight or distill.patch_weight"),
        ({"distill": {"teacher": ""}, "loss": ALONE}, "nothing to learn"),
        ({"data": {"on_device": True}}, "data.on_device keeps the normalised input only"),
    ],
)
def test_what_cannot_teach_is_refused(taught, groups, message):
    if groups.get("distill", {}).get("teacher") == "fpfh":
        pytest.importorskip("open3d", reason="open3d is not installed", exc_type=ImportError)
    with pytest.raises(ConfigError, match=message) as caught:
        pretrain(copy(taught, taught.out, **groups))
    assert "\n" not in str(caught.value) and not Path(taught.out).exists()
