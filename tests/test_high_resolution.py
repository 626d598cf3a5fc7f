"""The last phase at a higher resolution: the shipped settings, and what a run takes over from the one before it."""

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from test_pretrain import assert_same, copy, final_state

from dino_depth.config import PretrainConfig, config_keys, parse
from dino_depth.errors import Interrupted
from dino_depth.pretrain import student_teacher, train
from dino_depth.pretrain.train import pretrain
from dino_depth.vit import resize_position_embedding

CHANGED = {
    "crops.global_size", "model.checkpoint_activations", "loss.teacher_temperature_warmup", "optim.lr", "optim.warmup",
    "optim.freeze_last_layer", "train.steps", "train.checkpoint_every",
}  # fmt: skip


def flat(config) -> dict:
    values = {}
    for key in config_keys(PretrainConfig):
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        if not dataclasses.is_dataclass(value):
            values[key] = value
    return values


def test_the_phase_keeps_the_settings_of_its_run():
    """Schedules are those of the recipe, compressed from 125,000 to 10,000 steps."""
    small, high = (
        parse(PretrainConfig, [*words, "--config", "pretrain_highres"], "test") if high else
        parse(PretrainConfig, words, "test")
        for words, high in ((["--config", "pretrain_small_data"], False), (["--config", "pretrain_small_data"], True))
    )  # fmt: skip
    before, after = flat(small), flat(high)
    assert {key for key in before if before[key] != after[key]} <= CHANGED
    recipe, phase = PretrainConfig(), parse(PretrainConfig, ["--config", "pretrain_highres"], "test")
    assert {key for key, value in flat(recipe).items() if flat(phase)[key] != value} == CHANGED
    share = phase.train.steps / recipe.train.steps
    assert phase.optim.warmup == share * recipe.optim.warmup
    assert phase.optim.freeze_last_layer == share * recipe.optim.freeze_last_layer
    assert phase.loss.teacher_temperature_warmup == share * recipe.loss.teacher_temperature_warmup
    assert phase.crops.global_size % phase.model.patch_size == 0 and phase.optim.lr < recipe.optim.lr


@pytest.fixture
def first(tiny):
    pretrain(tiny)
    return tiny


def phase(first: PretrainConfig, out: Path, source: str, **groups) -> dict:
    """The student of a phase before its first update, which has learning rate 0."""
    groups = {"train": {"steps": 1}, "optim": {"warmup": 5}, "crops": {"global_size": 84}} | groups
    pretrain(dataclasses.replace(copy(first, out, **groups), init_from=source))
    return final_state(out)["student"]


@pytest.mark.parametrize("kind", ["run", "checkpoint"])
def test_a_phase_at_another_size_takes_over_heads_and_resized_positions(first, tmp_path, kind):
    source = first.out if kind == "run" else f"{first.out}/checkpoints/step-00000008.pt"
    teacher, student = final_state(first.out)["teacher"], phase(first, tmp_path / "high", source)
    assert student.keys() == teacher.keys()
    for name, value in teacher.items():
        if name == "backbone.pos_embed":
            assert value.shape == (1, 1 + 9, 32)
            value = resize_position_embedding(value, (6, 6))
        assert torch.equal(student[name], value), name


def test_heads_of_another_size_start_anew(first, tmp_path):
    student = phase(first, tmp_path / "high", first.out, loss={"prototypes": 48})
    teacher = final_state(first.out)["teacher"]
    assert torch.equal(student["backbone.norm.weight"], teacher["backbone.norm.weight"])
    assert student["dino_head.direction"].shape == (48, 16)
    # All or nothing: a trained MLP before new prototypes would be neither.
    assert not torch.equal(student["dino_head.mlp.0.weight"], teacher["dino_head.mlp.0.weight"])


def test_steps_of_several_sizes_resume_exactly(tiny, tmp_path, monkeypatch):
    """Every crop and mask of a step has the step's size, and positions are stored at ``global_size``."""
    seen, read = [], train.next_batch

    def noting(*arguments):
        batch = read(*arguments)
        seen.append((batch.global_crops.shape[-1], batch.local_crops.shape[-1], batch.masks.shape[1]))
        return batch

    monkeypatch.setattr(train, "next_batch", noting)
    config = copy(tiny, tmp_path / "whole", crops={"sizes": [(56, 28), (84, 14)]}, data={"workers": 2})
    pretrain(config)
    assert set(seen) == {(42, 14, 9), (56, 28, 16), (84, 14, 36)} and len(seen) == config.train.steps
    whole = final_state(tmp_path / "whole")
    assert whole["teacher"]["backbone.pos_embed"].shape == (1, 1 + 9, 32)
    losses = student_teacher.student_losses

    def interrupt(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return losses(*arguments)

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr(student_teacher, "student_losses", interrupt)
        pretrain(config := copy(config, tmp_path / "parts", data={"workers": 0}))
    first, seen[:] = list(seen), []
    pretrain(dataclasses.replace(config, resume=True))
    assert first[: config.train.steps] == first[config.train.steps :] + seen
    assert_same(final_state(tmp_path / "parts"), whole)
