"""Floating-point operations of an optimisation step, counted and derived, and the rate of matrix products here.

A multiplication and its addition are two operations. Only matrix products and the patch embedding count; norms,
activations, Sinkhorn and softmax are what utilisation is lost on. Counting runs the step on tensors without content, so
it takes seconds for any batch. Attention's backward pass counts five products where the derivation has four: the
kernels compute the scores a second time, which by convention is no useful work.
"""

import time
from dataclasses import fields

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dino_depth.config import PretrainConfig
from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.masks import draw_masks
from dino_depth.pretrain.student_teacher import Networks, student_losses, teacher_targets

__all__ = ["counted", "derived", "make_masks", "matrix_rate"]

# The counter knows the kernels of GPUs; attention on CPUs is another operator.
aten = torch.ops.aten
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


def make_masks(config: PretrainConfig, maps: int, step: int = 0) -> torch.Tensor:
    """(maps, 2, patches) bool, as the data loader would draw them."""
    grid = config.crops.global_size // config.model.patch_size
    masks = [draw_masks(grid, config.loss, config.train.seed, step * maps + place) for place in range(maps)]
    return torch.stack([torch.from_numpy(mask) for mask in masks])


def make_crops(config: PretrainConfig, maps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Crops of noise, shaped as a data loader's batch."""
    side, small, crops = config.crops.global_size, config.crops.local_size, config.crops.local_crops
    return torch.randn(maps, 2, 1, side, side), torch.randn(maps, crops, 1, small, small)


def counted(config: PretrainConfig, maps: int) -> float:
    """Operations per map of forward and backward passes of student and teacher, by torch's counter."""
    batch = Batch.make(make_crops(config, maps), make_masks(config, maps), config)
    student, teacher = Networks(config), Networks(config).requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        parts = {part.name: getattr(batch, part.name) for part in fields(batch)}
        batch = Batch(**tree_map_only(torch.Tensor, mode.from_tensor, parts))
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            targets = teacher_targets(teacher, batch, 0.05, config.loss.sinkhorn_iterations)
            loss = student_losses(student, batch, targets, config)["loss"]
            torch.autograd.grad(loss, list(student.parameters()))
    return counter.get_total_flops() / maps


def derived(config: PretrainConfig, maps: int) -> float:
    """The same by formula, for the hidden patches that ``maps`` maps have on average.

    A block's matrices hold 12 dim^2 weights: four of attention, eight of the MLP. Backward passes cost twice their
    forward passes, but the patch embedding's, which has no input gradient.
    """
    model, crops, loss = config.model, config.crops, config.loss
    hidden, dim = make_masks(config, maps).sum().item() / maps, model.dim
    patches = [(size // model.patch_size) ** 2 for size in (crops.global_size, crops.local_size)]
    lengths = [1 + model.registers + count for count in patches]

    def backbone(counts: list[int], rows: float, share: float) -> tuple[float, float]:
        """(patch embedding, blocks) of crops, of which the losses read ``rows``."""
        tokens = sum(count * length for count, length in zip(counts, lengths, strict=False))
        scores = sum(count * length**2 for count, length in zip(counts, lengths, strict=False))
        attention = share * (8 * dim**2 * tokens + 4 * dim * scores)
        mlps = 16 * dim**2 * (share * tokens * (model.depth - 1) + rows)  # the last one sees those rows alone
        embedding = (
            2 * model.patch_size**2 * dim * sum(count * size for count, size in zip(counts, patches, strict=False))
        )
        return embedding, model.depth * attention + mlps

    taught, learning = 2 + hidden, 2 + hidden + crops.local_crops
    teacher = sum(backbone([2], taught, 1))
    embedding, blocks = backbone([2, crops.local_crops], learning, 1 - model.drop_path)
    head = 2 * (dim * loss.hidden + loss.hidden**2 + loss.hidden * loss.bottleneck)
    prototypes = 2 * loss.bottleneck * loss.prototypes
    return teacher + 2 * embedding + 3 * blocks + (head + prototypes) * (taught + 3 * learning)


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Operations per second of the best of many large square products."""
    side = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline or best == float("inf"):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
