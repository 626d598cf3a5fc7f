"""What a GPU would be asked to do, on one that computes nothing (``rehearsal.py``); run by ``test_rehearsal.py``."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from rehearsal import GPU, Rehearsal, rehearsing

from dino_depth.config import PretrainConfig, load_config, parse
from dino_depth.device import autocast, pick_device
from dino_depth.pretrain import train
from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.optim import build_optimizer, clip, schedule, set_rates
from dino_depth.pretrain.student_teacher import Networks, student_losses, teacher_targets, update_teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from flops import make_crops, make_masks  # noqa: E402

SMALL = "--model.depth 2 --loss.prototypes 512 --loss.hidden 64".split()
VARIANTS = {
    "default": [],
    "rotary, registers": "--model.positions rotary --model.registers 4".split(),
    "varlen": "--model.attention varlen".split(),
    "recomputed": "--model.checkpoint_activations true".split(),
    "float32": "--train.precision fp32".split(),
    "ViT-L": "--model.dim 1024 --model.heads 16".split(),
    "dense": "--loss.dense_weight 1".split(),
    "surface": "--loss.surface_weight 1".split(),
}
# Of a step: operations, bytes they read and write, bytes kept for gradients. May fall, and rise only for a reason.
MOST = {
    "pretrain": {"calls": 2600, "GB": 260, "GB kept": 17.6},
    "pretrain_vit_l": {"calls": 4900, "GB": 380, "GB kept": 6.2},
}


@pytest.fixture
def gpu():
    with rehearsing() as rehearsal:
        yield rehearsal


def networks(config: PretrainConfig) -> Networks:
    with torch.device("meta"):
        made = Networks(config)
    return made.to_empty(device=GPU)


def step(config: PretrainConfig, maps: int, gpu: Rehearsal, partners=None) -> tuple[Networks, torch.optim.Optimizer]:
    """One optimisation step; what was done before it is forgotten."""
    student, teacher = networks(config), networks(config).requires_grad_(False)
    optimizer = build_optimizer(student, config)
    for weights in student.parameters():
        weights.grad = torch.zeros_like(weights)
    optimizer.step()  # the first one makes its state
    optimizer.zero_grad()
    batch = Batch.make(make_crops(config, maps), make_masks(config, maps), config, partners=partners).pin_memory()
    gpu.forget()
    batch = batch.to(GPU)
    now = schedule(config, 1)
    set_rates(optimizer, now)
    with autocast(GPU, config.train.precision):
        targets = teacher_targets(teacher, batch, now.teacher_temperature, config.loss.sinkhorn_iterations)
        losses = student_losses(student, batch, targets, config)
    for value in [*losses.values(), targets.classes, targets.patches]:
        assert value.dtype == torch.float32 and value.device == GPU
    losses["loss"].backward()
    clip(student, config.optim.clip)
    optimizer.step()
    update_teacher(teacher, student, now.momentum)
    return student, optimizer


def test_the_stand_in_is_taken_for_a_gpu(gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")  # of four on a node, each of which is shown its own GPU only
    assert pick_device("auto") == GPU
    assert torch.cuda.memory._snapshot()["allocator_settings"]["expandable_segments"]
    assert torch.cuda.is_bf16_supported() and torch.zeros(3).pin_memory().is_pinned()
    with pytest.raises(RuntimeError, match="devices"):
        torch.zeros(3, device=GPU) + torch.zeros(3)
    assert float(torch.ones(3, device=GPU).sum()) == 0 and sum(gpu.waits.values()) >= 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_lies_on_the_gpu_in_the_types_it_should(gpu, variant):
    config = parse(PretrainConfig, ["--config", "pretrain", *SMALL, *VARIANTS[variant]], "rehearsal")
    patches = (config.crops.global_size // config.model.patch_size) ** 2
    partners = torch.arange(patches).expand(4, 2, -1) if config.loss.dense_weight else None
    student, optimizer = step(config, 4, gpu, partners)
    for name, weights in student.named_parameters():
        assert weights.device == GPU and weights.grad is not None and weights.grad.dtype == torch.float32, name
        state = optimizer.state[weights]
        assert {key: value.dtype for key, value in state.items()} == dict.fromkeys(state, torch.float32), name
    assert not gpu.waits
    narrow = config.train.precision == "bf16"
    for (where, types), _ in gpu.calls.items():
        operation = where.split(": ")[-1]
        assert "float64" not in types, where
        if operation in ("convolution", "convolution_backward", "exp", "exp_", "log", "_fused_adamw_", "_foreach_lerp_",
                         "_weight_norm_interface", "native_layer_norm", "linalg_vector_norm"):  # fmt: skip
            assert types == "float32", where
        # Products of Sinkhorn and KoLeo would lose what they are for.
        if operation in ("mm", "addmm", "bmm", "mv"):
            exact = not narrow or "_sinkhorn" in where or "koleo" in where or operation == "mv"
            assert types == ("float32" if exact else "bfloat16"), where


@pytest.mark.parametrize("config, maps", [("pretrain", 128), ("pretrain_vit_l", 32)])
def test_what_the_shipped_steps_ask_for(gpu, config, maps):
    """The figures of docs/performance.md."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(parse(PretrainConfig, ["--config", config], "rehearsal"), maps, gpu)
    found = {"calls": sum(gpu.calls.values()), "GB": gpu.bytes / 1e9, "GB kept": sum(kept.values()) / 1e9}
    print(config, found)
    for name, value in found.items():
        assert 0.9 * MOST[config][name] < value <= MOST[config][name], (name, value)


# Where the host waits for the GPU in 8 steps, of which 4 and 8 are logged and 8 is measured and saved.
WAITS = {
    "pretrain/train.py:_figures: _to_copy": (2, "losses and norms of a logged step are read, together"),
    "pretrain/health.py:measure: _to_copy": (1, "the health figures are read, together"),
    "pretrain/health.py:rankme: _to_copy": (
        2,
        "singular values are computed on the CPU, in the first of ten measurements",
    ),
}


CROPPING = ("pretrain/resident.py", "resample.py")


@pytest.mark.parametrize("on_device", [False, True])
def test_a_run_waits_for_the_gpu_only_where_something_is_read(gpu, monkeypatch, on_device):
    config = load_config(PretrainConfig, Path(os.environ["REHEARSED"]) / "tiny.yaml")
    config.train.device, config.out = "cuda", f"{config.out}-{on_device}"
    config.data.on_device = on_device
    config.train.log_every, config.train.checkpoint_every, config.health.every = 4, 100, 8
    saved, read, waits = [], [], {}
    monkeypatch.setattr(train.checkpoint, "save", lambda state, path: saved.append(state))
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: read.append(event))
    run_loop = train._loop

    def loop(*arguments):
        gpu.forget()
        run_loop(*arguments)
        waits.update({where: count for where, count in gpu.waits.items() if count})

    monkeypatch.setattr(train, "_loop", loop)
    train.pretrain(config)
    # The crops of resident maps wait for the stream they are made on, which is not the one that computes the step.
    waits = {where: count for where, count in waits.items() if not where.startswith(CROPPING)}
    assert waits == {where: count for where, (count, _) in WAITS.items()}
    assert len(read) == 8  # each step is looked at once, plain ones when the next is queued
    assert saved[0]["step"] == 8 and saved[0]["bad"] == 0
    assert all(weights.device == GPU for weights in saved[0]["teacher"].values())
    lines = [json.loads(line) for line in Path(config.out, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8]
    assert {"speed/gpu_memory_gib", "speed/gpu_reserved_gib", "speed/data_wait"} <= lines[0].keys()
