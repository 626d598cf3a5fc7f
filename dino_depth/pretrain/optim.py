"""AdamW's parameter groups, schedules and clipping."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dino_depth.config import PretrainConfig
from dino_depth.distributed import broadcast
from dino_depth.pretrain.student_teacher import Networks

__all__ = ["Schedule", "build_optimizer", "clip", "schedule", "set_rates"]


@dataclass(frozen=True)
class Schedule:
    """The scheduled values of one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float
    last_layer: bool


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2


def schedule(config: PretrainConfig, step: int) -> Schedule:
    """Values at ``step`` (0-based) of a run of ``train.steps``: a pure function, so a resumed run cannot drift.

    Learning rate: linear warm-up to lr * sqrt(batch / 1024), then cosine; weight decay and momentum: cosine over the
    whole run; teacher temperature: linear, then constant (Oquab et al. 2023, appendix B).
    """
    optim, loss, steps = config.optim, config.loss, config.train.steps
    peak = optim.lr * math.sqrt(config.train.batch / 1024)
    if step < optim.warmup:
        lr = peak * step / optim.warmup
    else:
        lr = _cosine(peak, optim.lr_end, (step - optim.warmup) / max(1, steps - optim.warmup))
    warm = min(1.0, step / max(1, loss.teacher_temperature_warmup))
    start = loss.teacher_temperature_start
    return Schedule(
        lr=lr,
        weight_decay=_cosine(optim.weight_decay, optim.weight_decay_end, step / steps),
        momentum=_cosine(optim.momentum, optim.momentum_end, step / steps),
        teacher_temperature=start + (loss.teacher_temperature - start) * warm,
        last_layer=step >= optim.freeze_last_layer,
    )


def build_optimizer(student: Networks, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW with one group per (layer decay, weight decay, last layer).

    Learning rates fall by ``layer_decay`` per block towards the input, the patch embedding's by a further
    ``patch_embed_lr``; biases, norms and layer scales are not decayed.
    """
    optim = config.optim
    groups: dict[tuple, list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        part, _, inner = name.partition(".")
        rate = 1.0
        if part == "backbone":
            rate = optim.layer_decay ** (config.model.depth + 1 - _depth_of(inner, config.model.depth))
            if inner.startswith("patch_embed."):
                rate *= optim.patch_embed_lr
        decayed = not (name.endswith((".bias", ".gamma")) or ".norm" in name)
        last = name.endswith((".direction", ".gain"))
        groups.setdefault((rate, decayed, last), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "rate": rate, "decayed": decayed, "last_layer": last}
            for (rate, decayed, last), parameters in groups.items()
        ],
        lr=0.0,
        betas=optim.betas,
        fused=True,
    )


def _depth_of(name: str, depth: int) -> int:
    """Layers below: 0 for the embeddings, i + 1 for block i, depth + 1 for the final norm."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("patch_embed", "pos_embed", "cls_token", "mask_token", "reg_token")) else depth + 1


def set_rates(optimizer: torch.optim.Optimizer, now: Schedule):
    """Puts the scheduled values into the optimizer's groups."""
    for group in optimizer.param_groups:
        group["lr"] = now.lr * group["rate"] * (now.last_layer or not group["last_layer"])
        group["weight_decay"] = now.weight_decay * group["decayed"]


def clip(student: Networks, largest: float) -> Tensor:
    """Clips the gradient norm of backbone and of each head on its own; returns the three norms.

    All ranks use the norms of the first: summed in another order by another GPU they would differ in the last bits, and
    so would the weights.
    """
    parts = [[weight for weight in part.parameters() if weight.grad is not None] for part in student.children()]
    norms = torch.stack([torch.nn.utils.get_total_norm([weight.grad for weight in part]) for part in parts])
    norms = broadcast(norms)
    for part, norm in zip(parts, norms, strict=True):
        torch.nn.utils.clip_grads_with_norm_(part, largest, norm)
    return norms
