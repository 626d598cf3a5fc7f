"""What torch.compile fuses computes what the plain functions do, and is compiled once for all steps."""

import dataclasses
import json

import pytest
import torch
from torch._dynamo.utils import counters

from dino_depth import compiled
from dino_depth.compiled import compiling, probe_compiler
from dino_depth.config import PretrainConfig
from dino_depth.errors import ConfigError
from dino_depth.pretrain import losses, train
from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.masks import draw_masks
from dino_depth.pretrain.student_teacher import Networks, student_losses, teacher_targets


def tiny_networks(**model) -> tuple[PretrainConfig, Networks, Networks]:
    config = PretrainConfig()
    config.crops.global_size, config.crops.local_size, config.crops.local_crops = 42, 14, 3
    config.model.dim, config.model.depth, config.model.heads, config.model.layer_scale = 32, 2, 2, 0.5
    for name, value in model.items():
        setattr(config.model, name, value)
    config.loss.prototypes, config.loss.hidden, config.loss.bottleneck = 70, 32, 16
    torch.manual_seed(0)
    return config, Networks(config), Networks(config).requires_grad_(False)


def run(config, student, teacher, steps: int, maps: int = 7) -> list[torch.Tensor]:
    """Losses and gradients of each step."""
    results = []
    for step in range(steps):
        torch.manual_seed(step)
        masks = [torch.from_numpy(draw_masks(3, config.loss, 0, step * maps + place)) for place in range(maps)]
        crops = torch.randn(maps, 2, 1, 42, 42), torch.randn(maps, 3, 1, 14, 14)
        batch = Batch.make(crops, masks, config, step)
        targets = teacher_targets(teacher, batch, 0.04 + 0.001 * step, 3)
        found = student_losses(student, batch, targets, config)
        gradients = torch.autograd.grad(found["loss"], list(student.parameters()))
        results.append([*found.values(), targets.classes, targets.patches, *gradients])
    return results


@pytest.fixture(autouse=True)
def _nothing_compiled_yet():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def everything_fused(monkeypatch):
    """The passes that only a GPU takes, on the CPU."""
    monkeypatch.setattr(losses, "_fuses", lambda logits: compiled.is_compiling())
    monkeypatch.setattr(losses, "MATMUL_ROWS", 16)


@pytest.mark.parametrize(
    "model", [{}, {"drop_path": 0.0}, {"positions": "rotary", "registers": 2, "checkpoint_activations": True}]
)
def test_compiled_steps_equal_plain_ones_and_later_steps_compile_nothing(everything_fused, model):
    networks = tiny_networks(**model)
    plain = run(*networks, steps=12)
    assert not counters["stats"]
    with compiling(True, "aot_eager"):
        fused = run(*networks, steps=2)
        made = counters["stats"]["unique_graphs"]
        fused += run(*networks, steps=12)[2:]
    # Two residual branches, the last block's rows and a projection, with and without gradients; three passes of
    # Sinkhorn; the cross entropy.
    assert 12 <= made <= 14 and counters["stats"]["unique_graphs"] <= made + 1
    assert not counters["graph_break"]
    for step, (ours, wanted) in enumerate(zip(fused, plain, strict=True)):
        for one, other in zip(ours, wanted, strict=True):
            # KoLeo's gradient divides by the distance of neighbours: of an untrained network, rounding errors grow.
            assert (one - other).norm() <= 1e-3 * other.norm() + 1e-5, step


def test_further_crop_sizes_compile_once_more_in_all():
    config, student, teacher = tiny_networks()
    made = []
    with compiling(True, "aot_eager"):
        for step, (large, small) in enumerate([(42, 14), (56, 28), (84, 14), (70, 28), (42, 14), (98, 28)]):
            config.crops = dataclasses.replace(config.crops, global_size=large, local_size=small)
            masks = [torch.from_numpy(draw_masks(large // 14, config.loss, 0, 7 * step + place)) for place in range(7)]
            crops = torch.randn(7, 2, 1, large, large), torch.randn(7, 3, 1, small, small)
            batch = Batch.make(crops, masks, config, step)
            student_losses(student, batch, teacher_targets(teacher, batch, 0.05, 3), config)["loss"].backward()
            made.append(counters["stats"]["unique_graphs"])
    assert made[0] < made[1] == made[-1] and not counters["graph_break"]


def masked_attention(query, key, value, ends, same, longest, also):
    """What varlen_attn, which runs on GPUs alone, computes."""
    owner = torch.bucketize(torch.arange(len(query)), ends[1:], right=True)
    heads = [part.transpose(0, 1) for part in (query, key, value)]
    mask = owner[:, None] == owner
    return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(0, 1)


def test_varlen_attention_gets_the_borders_of_sequences_and_compiles_once(everything_fused, monkeypatch):
    config, student, teacher = tiny_networks()
    wanted = run(config, student, teacher, 6)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", masked_attention)
    config.model.attention = "varlen"
    found = run(config, student, teacher, 6)
    with compiling(True, "aot_eager"):
        found += run(config, student, teacher, 6)
    assert counters["stats"]["unique_graphs"] <= 14 and not counters["graph_break"]
    for ours, expected in zip(found, wanted + wanted, strict=True):
        assert all(
            (one - other).norm() <= 1e-3 * other.norm() + 1e-5 for one, other in zip(ours, expected, strict=True)
        )


def test_outside_nothing_is_compiled(everything_fused):
    config, student, teacher = tiny_networks()
    with compiling(True, "aot_eager"), compiling(False):
        run(config, student, teacher, 1)
    with pytest.raises(ZeroDivisionError), compiling(True, "aot_eager"):
        raise ZeroDivisionError
    run(config, student, teacher, 1)
    assert not counters["stats"]


@pytest.mark.parametrize("samples, prototypes", [(7, 33), (64, 16), (1, 5), (40, 1000)])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_sinkhorn_in_passes_equals_the_one_that_keeps_its_kernel(everything_fused, samples, prototypes, iterations):
    logits = torch.rand(samples, prototypes) * 2 - 1
    count, largest = torch.tensor(float(samples)), logits.max()
    found = losses._sinkhorn_in_passes(logits, 0.05, iterations, count, largest)
    torch.testing.assert_close(found, losses.sinkhorn(logits, 0.05, iterations), atol=1e-6, rtol=1e-4)
    narrow = logits.bfloat16()
    found = losses._sinkhorn_in_passes(narrow, 0.05, iterations, count, narrow.max().float())
    torch.testing.assert_close(found, losses.sinkhorn(narrow, 0.05, iterations), atol=1e-6, rtol=1e-4)


def test_sinkhorn_in_passes_survives_extreme_logits():
    logits = torch.tensor([[9.0, -9.0, 0.0], [9.0, -9.0, 0.0]])
    found = losses._sinkhorn_in_passes(logits, 0.04, 3, torch.tensor(2.0), logits.max())
    torch.testing.assert_close(found, losses.sinkhorn(logits, 0.04, 3))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_cross_entropies_are_equal(dtype):
    targets, index, weights = torch.rand(5, 50), torch.randint(5, (37,)), torch.rand(37)
    logits = torch.randn(37, 50).to(dtype)
    loss, gradient = losses._cross_entropy(logits, targets, index, weights, 0.1)
    expected, expected_gradient = losses._cross_entropy_in_cache(logits.clone(), targets, index, weights, 0.1)
    torch.testing.assert_close(loss, expected)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(gradient, expected_gradient, **tolerance)


def test_a_compiled_run_learns_as_a_plain_one(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "compiling", lambda enabled: compiling(enabled, "aot_eager"))
    monkeypatch.setattr(train, "probe_compiler", lambda device: None)
    losses = {}
    for compile_ in (False, True):
        config = dataclasses.replace(tiny, out=str(tmp_path / str(compile_)))
        config.train = dataclasses.replace(tiny.train, compile=compile_, steps=5, accumulate=2)
        train.pretrain(config)
        lines = (tmp_path / str(compile_) / "metrics.jsonl").read_text().splitlines()
        losses[compile_] = [json.loads(line)["loss"] for line in lines]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert counters["stats"]["unique_graphs"]


def test_a_machine_that_cannot_compile_is_refused_in_one_line(tiny, monkeypatch):
    def without_compiler(function):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand many more lines")

    monkeypatch.setattr(torch, "compile", without_compiler)
    assert probe_compiler(torch.device("cpu")) == "RuntimeError: InvalidCxxCompiler: No working C++ compiler found"
    tiny.train.compile = True
    with pytest.raises(ConfigError, match="train.compile does not work here: RuntimeError: Invalid.*found$"):
        train.pretrain(tiny)
    tiny.model.attention = "xformers"
    monkeypatch.setattr(train, "probe_attention", lambda *arguments: None)
    with pytest.raises(ConfigError, match="train.compile needs model.attention grouped or varlen"):
        train.pretrain(tiny)
