"""The method: what the teacher wants, and what the student pays. The loop only schedules these functions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dino_depth.compiled import compiled, vary
from dino_depth.config import PretrainConfig
from dino_depth.pretrain.heads import PrototypeHead
from dino_depth.pretrain.losses import koleo, matmul_dtype, prototype_cross_entropy, sinkhorn
from dino_depth.pretrain.stochastic_depth import kept_sequences
from dino_depth.vit import DepthTransformer

__all__ = ["Batch", "Networks", "Student", "Targets", "student_losses", "teacher_targets", "update_teacher"]


class Networks(nn.Module):
    """Backbone and the two heads, of the student or of the teacher."""

    def __init__(self, config: PretrainConfig):
        super().__init__()
        self.backbone = DepthTransformer(config.model, config.crops.global_size)
        self.dino_head = PrototypeHead(config.model.dim, config.loss)
        self.ibot_head = PrototypeHead(config.model.dim, config.loss)


@dataclass
class Batch:
    """One backward pass's worth of crops.

    Attributes:
        global_crops: (2 * maps, 1, side, side), the first crop of every map before the second of every map.
        local_crops: (crops * maps, 1, side, side), likewise.
        masks: (2 * maps, patches) bool, hidden from the student.
        mask_weights: (hidden,) 1 / (hidden patches of its crop * number of global crops).
        needed: (2 * maps + hidden + crops * maps,) rows the losses read of all tokens of the global, then of the local
            crops: global class tokens, hidden patches, local class tokens.
        kept: which global and which local crops take each residual branch, see ``stochastic_depth.py``; None: all.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    mask_weights: Tensor
    needed: Tensor
    kept: list[list[Tensor]] | None

    @classmethod
    def make(
        cls,
        global_crops: Tensor,
        local_crops: Tensor,
        masks: Tensor,
        device: torch.device,
        config: PretrainConfig,
        step: int = 0,
        first: int = 0,
    ) -> "Batch":
        """From (maps, 2, 1, side, side) and (maps, crops, 1, side, side) crops and (maps, 2, patches) masks.

        Args:
            step, first: the step, and the place of the first map in its batch.
        """
        model, counts = config.model, [global_crops.shape[1], local_crops.shape[1]]
        kept = kept_sequences(
            model.drop_path, 2 * model.depth, counts, config.train.seed, step, first, len(global_crops)
        )
        masks = masks.transpose(0, 1).flatten(0, 1)
        weights = (1 / masks.sum(1).clamp_min(1))[:, None].expand_as(masks)[masks] / len(masks)
        crop, patch = masks.nonzero(as_tuple=True)
        prefix = 1 + model.registers  # tokens before the patches
        length, small = prefix + masks.shape[1], prefix + (local_crops.shape[-1] // model.patch_size) ** 2
        classes = torch.arange(len(masks)) * length
        locals_ = len(masks) * length + torch.arange(local_crops.shape[0] * local_crops.shape[1]) * small
        needed = torch.cat([classes, crop * length + prefix + patch, locals_])
        parts = [part.to(device, non_blocking=True) for part in (global_crops, local_crops, masks, weights, needed)]
        # Rearranged there: the loader's memory is pinned, a rearranged copy of it would not be.
        parts[:2] = (crops.transpose(0, 1).flatten(0, 1) for crops in parts[:2])
        return cls(*parts, _to_device(kept, device))


def _to_device(kept: list[list[np.ndarray]] | None, device: torch.device) -> list[list[Tensor]] | None:
    """The arrays as tensors, in one transfer."""
    if kept is None:
        return None
    parts = [part for sets in kept for part in sets]
    sizes = [len(part) for part in parts]
    moved = torch.from_numpy(np.concatenate(parts)).to(device, non_blocking=True).split(sizes)
    vary(*moved)
    moved = iter(moved)
    return [[next(moved) for _ in sets] for sets in kept]


@dataclass
class Targets:
    """What the teacher assigns.

    Attributes:
        classes: (2 * maps, K) per global crop.
        patches: (hidden, K) per hidden patch.
        class_features: (2 * maps, dim), the teacher's, for the health figures.
        patch_features: (hidden, dim), likewise.
    """

    classes: Tensor
    patches: Tensor
    class_features: Tensor
    patch_features: Tensor


@compiled
def _project(head: PrototypeHead, tokens: Tensor) -> Tensor:
    return head(tokens)


@torch.no_grad()
def teacher_targets(teacher: Networks, batch: Batch, temperature: float, iterations: int) -> Targets:
    """The teacher sees whole global crops; its assignments are balanced by Sinkhorn-Knopp."""
    crops = len(batch.global_crops)
    needed = batch.needed[: crops + len(batch.mask_weights)]
    tokens = teacher.backbone.forward_packed([batch.global_crops], [None], needed=needed)
    classes, hidden = tokens[:crops], tokens[crops:]  # (2 maps, dim), (hidden, dim)
    vary(classes, hidden)
    targets = []
    for head, rows in ((teacher.dino_head, classes), (teacher.ibot_head, hidden)):
        dtype = matmul_dtype(rows.device)
        logits = _project(head, rows).to(dtype) @ head.prototypes().to(dtype).T  # (rows, K)
        targets.append(sinkhorn(logits, temperature, iterations))
    return Targets(*targets, classes, hidden)


def student_losses(student: Networks, batch: Batch, targets: Targets, config: PretrainConfig) -> dict[str, Tensor]:
    """DINO, iBOT and KoLeo losses of the student, unweighted, and their weighted sum ``loss``.

    - dino: mean cross entropy over all pairs (student crop, teacher global crop) of a map but a crop with itself:
      2 + 2 * local crops pairs (Oquab et al. 2023, section 4).
    - ibot: mean over the global crops of the mean over their hidden patches.
    - koleo: sum over the two sets of global crops, on class tokens before the head.
    """
    loss = config.loss
    maps = len(batch.global_crops) // 2
    locals_ = len(batch.local_crops) // maps
    crops, scale = [batch.global_crops, batch.local_crops], 1 / (1 - config.model.drop_path)
    tokens = student.backbone.forward_packed(crops, [batch.masks, None], batch.needed, batch.kept, scale)
    whole, hidden, local = tokens.split([2 * maps, len(batch.mask_weights), locals_ * maps])
    classes = torch.cat([whole, local])  # ((2 + local crops) * maps, dim)
    first, second = targets.classes.chunk(2)
    wanted = torch.cat([second, first, first + second])  # (3 * maps, K): for crop 1, for crop 2, for a local crop
    index = torch.arange(2 * maps, device=classes.device)
    index = torch.cat([index, (2 * maps + torch.arange(maps, device=classes.device)).repeat(locals_)])
    weights = torch.full((len(classes),), 1 / (maps * (2 + 2 * locals_)), device=classes.device)
    vary(classes, hidden)
    head, features = student.dino_head, _project(student.dino_head, classes)
    dino = prototype_cross_entropy(features, head.prototypes(), wanted, index, weights, loss.student_temperature)
    head = student.ibot_head
    ibot = prototype_cross_entropy(
        _project(head, hidden),
        head.prototypes(),
        targets.patches,
        None,
        batch.mask_weights,
        loss.student_temperature,
    )
    spread = sum(koleo(part) for part in whole.chunk(2))
    total = loss.dino_weight * dino + loss.ibot_weight * ibot + loss.koleo_weight * spread
    return {"loss": total, "dino": dino, "ibot": ibot, "koleo": spread}


class Student(nn.Module):
    """The student and what it pays, as one module: its gradients are averaged over ranks while they are computed.

    Args:
        networks: the student's; in a process group they become equal to rank 0's.
    """

    def __init__(self, networks: Networks, config: PretrainConfig):
        super().__init__()
        self.networks, self.config = networks, config

    def forward(self, batch: Batch, targets: Targets) -> dict[str, Tensor]:
        return student_losses(self.networks, batch, targets, self.config)


@torch.no_grad()
def update_teacher(teacher: Networks, student: Networks, momentum: float):
    """teacher = momentum * teacher + (1 - momentum) * student."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
