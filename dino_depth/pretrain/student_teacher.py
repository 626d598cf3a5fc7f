"""The method: what the teacher wants, and what the student pays. The loop only schedules these functions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dino_depth.compiled import compiled, vary
from dino_depth.config import LossConfig, PretrainConfig
from dino_depth.pretrain.batch import Batch, seen_patches
from dino_depth.pretrain.distill import Projector, SecondTeacher, cosine_distance
from dino_depth.pretrain.heads import PrototypeHead
from dino_depth.pretrain.losses import koleo, matmul_dtype, prototype_cross_entropy, sinkhorn
from dino_depth.pretrain.surface_loss import surface_loss, surface_targets
from dino_depth.surface import NUMBERS
from dino_depth.vit import DepthTransformer

__all__ = ["Networks", "Student", "Targets", "student_losses", "teacher_targets", "update_teacher"]


class Networks(nn.Module):
    """Backbone and the two heads, of the student or of the teacher.

    Args:
        second_dim: of the features of a second teacher, which come with a projector; 0: there is none.
    """

    def __init__(self, config: PretrainConfig, second_dim: int = 0):
        super().__init__()
        self.backbone = DepthTransformer(config.model, config.crops.global_size)
        if config.loss.needs_teacher:
            self.dino_head = PrototypeHead(config.model.dim, config.loss)
            self.ibot_head = PrototypeHead(config.model.dim, config.loss)
        if second_dim:
            self.projector = Projector(config.model.dim, second_dim)
        if config.loss.surface_weight:
            self.surface_head = nn.Linear(config.model.dim, NUMBERS)


@dataclass
class Targets:
    """What the teacher assigns.

    Attributes:
        classes: (2 * maps, K) per global crop; None, as all but the last two, where no loss needs the teacher.
        patches: (hidden, K) per hidden patch.
        paired: (pairs, K) per pair, of the patch that the student's faces; None where the dense loss is off.
        class_features: (2 * maps, dim), the teacher's, for the health figures.
        patch_features: (hidden, dim), likewise.
        second_classes: (2 * maps, second dim) of the second teacher per global crop; None without one.
        second_patches: (seen, second dim) of the second teacher per patch of ``Batch.seen``; None without one.
    """

    classes: Tensor | None
    patches: Tensor | None
    class_features: Tensor | None
    patch_features: Tensor | None
    paired: Tensor | None = None
    second_classes: Tensor | None = None
    second_patches: Tensor | None = None


@compiled
def _project(head: PrototypeHead, tokens: Tensor) -> Tensor:
    return head(tokens)


@torch.no_grad()
def teacher_targets(
    teacher: Networks, batch: Batch, temperature: float, iterations: int, second: SecondTeacher | None = None
) -> Targets:
    """The teacher sees whole global crops; its assignments are balanced by Sinkhorn-Knopp. So does the second one."""
    targets = Targets(None, None, None, None)
    if hasattr(teacher, "dino_head"):
        targets = _assignments(teacher, batch, temperature, iterations)
    if second is not None:
        grid = math.isqrt(batch.seen.shape[1])
        targets.second_classes, targets.second_patches = second.targets(batch.depth, batch.metric, batch.seen, grid)
    return targets


def _assignments(teacher: Networks, batch: Batch, temperature: float, iterations: int) -> Targets:
    crops = len(batch.global_crops)
    needed = batch.needed[: crops + len(batch.mask_weights)]
    if batch.pairs is not None:
        needed = torch.cat([needed, batch.pairs[1]])
    tokens = teacher.backbone.forward_packed([batch.global_crops], [None], needed=needed)
    count = len(batch.mask_weights)
    classes, hidden, paired = tokens[:crops], tokens[crops : crops + count], tokens[crops + count :]
    vary(classes, hidden)
    targets, read = [], [(teacher.dino_head, classes), (teacher.ibot_head, hidden)]
    if batch.pairs is not None:
        vary(paired)
        read.append((teacher.ibot_head, paired))
    for head, rows in read:
        dtype = matmul_dtype(rows.device)
        logits = _project(head, rows).to(dtype) @ head.prototypes().to(dtype).T  # (rows, K)
        targets.append(sinkhorn(logits, temperature, iterations))
    return Targets(*targets[:2], classes, hidden, *targets[2:])


def student_losses(student: Networks, batch: Batch, targets: Targets, config: PretrainConfig) -> dict[str, Tensor]:
    """The losses of the student that have targets, unweighted, and their weighted sum ``loss``.

    - dino: mean cross entropy over all pairs (student crop, teacher global crop) of a map but a crop with itself:
      2 + 2 * local crops pairs (Oquab et al. 2023, section 4).
    - ibot: mean over the global crops of the mean over their hidden patches.
    - koleo: sum over the two sets of global crops, on class tokens before the head.
    - dense, where it has a weight: mean over the global crops of the mean over their patches that the map's other
      global crop sees too; a patch, hidden or not, faces the teacher's assignment of the patch there.
    - surface, where it has a weight: see ``surface_loss.py``.
    - second_class, second_patch, with a second teacher: mean over the global crops of the cosine distance of the class
      token, and of its mean over the patches that hold a valid pixel, hidden or not, see ``distill.py``.

    Where none of the first four has a weight, the local crops are not computed.
    """
    loss, distill = config.loss, config.distill
    maps, sets = len(batch.global_crops) // 2, slice(None)
    rows = {"whole": batch.needed[: 2 * maps]}
    if alone := not hasattr(student, "dino_head"):
        sets = slice(1)
    else:
        hidden = len(batch.mask_weights)
        rows |= {"hidden": batch.needed[2 * maps : 2 * maps + hidden], "local": batch.needed[2 * maps + hidden :]}
    if batch.pairs is not None:
        rows["paired"] = batch.pairs[0]
    patches = _patch_rows(batch.masks, 1 + config.model.registers)
    if batch.seen is not None:
        rows["seen"] = patches[batch.seen]
    if loss.surface_weight:
        rows["patches"] = patches.flatten()
    crops, masks = [batch.global_crops, batch.local_crops][sets], [batch.masks, None][sets]
    kept, scale = batch.branches(), 1 / (1 - config.model.drop_path)
    kept = kept and [part[sets] for part in kept]
    tokens = student.backbone.forward_packed(crops, masks, torch.cat([*rows.values()]), kept, scale)
    tokens = dict(zip(rows, tokens.split([len(part) for part in rows.values()]), strict=True))
    losses = {} if alone else _assigned_losses(student, tokens, batch, targets, loss)
    if batch.seen is not None:
        losses |= _second_losses(student.projector, tokens, batch, targets)
    if loss.surface_weight:
        size = config.model.patch_size
        told, seen = student.surface_head(tokens["patches"]), seen_patches(batch.global_crops, size)
        losses["surface"] = surface_loss(told, surface_targets(batch.global_crops, size), seen)
    weights = {"dino": loss.dino_weight, "ibot": loss.ibot_weight, "koleo": loss.koleo_weight}
    weights |= {"dense": loss.dense_weight, "surface": loss.surface_weight}
    weights |= {"second_class": distill.class_weight, "second_patch": distill.patch_weight}
    return {"loss": sum(weights[name] * value for name, value in losses.items()), **losses}


def _patch_rows(masks: Tensor, prefix: int) -> Tensor:
    """(crops, patches) rows of all patches among the tokens of the global crops, of their masks of that shape."""
    crops, patches = masks.shape
    first = torch.arange(crops, device=masks.device)[:, None] * (prefix + patches) + prefix
    return first + torch.arange(patches, device=masks.device)


def _assigned_losses(
    student: Networks, tokens: dict[str, Tensor], batch: Batch, targets: Targets, loss: LossConfig
) -> dict[str, Tensor]:
    """The losses that read the teacher's assignments, and KoLeo, of tokens (rows, dim) by their role."""
    whole, local, maps = tokens["whole"], tokens["local"], len(tokens["whole"]) // 2
    locals_ = len(local) // maps
    classes = torch.cat([whole, local])  # ((2 + local crops) * maps, dim)
    first, second = targets.classes.chunk(2)
    wanted = torch.cat([second, first, first + second])  # (3 * maps, K): for crop 1, for crop 2, for a local crop
    index = torch.arange(2 * maps, device=classes.device)
    index = torch.cat([index, (2 * maps + torch.arange(maps, device=classes.device)).repeat(locals_)])
    weights = torch.full((len(classes),), 1 / (maps * (2 + 2 * locals_)), device=classes.device)
    vary(classes, tokens["hidden"])
    head, features = student.dino_head, _project(student.dino_head, classes)
    dino = prototype_cross_entropy(features, head.prototypes(), wanted, index, weights, loss.student_temperature)
    head = student.ibot_head
    losses = {"dino": dino}
    for name, role, assigned, weights in (
        ("ibot", "hidden", targets.patches, batch.mask_weights),
        ("dense", "paired", targets.paired, batch.pair_weights),
    ):
        if role in tokens:
            vary(tokens[role])
            features = _project(head, tokens[role])
            losses[name] = prototype_cross_entropy(
                features, head.prototypes(), assigned, None, weights, loss.student_temperature
            )
    losses["koleo"] = sum(koleo(part) for part in whole.chunk(2))
    return losses


def _second_losses(projector: Projector, tokens: dict[str, Tensor], batch: Batch, targets: Targets) -> dict:
    """The losses that read the second teacher's features; a crop without a valid pixel pays nothing."""
    counts, crops = batch.seen.sum(1), len(batch.seen)
    weights = (1 / counts.clamp_min(1))[:, None].expand_as(batch.seen)[batch.seen] / crops
    vary(tokens["seen"])
    projected = projector.classes(tokens["whole"]), projector.patches(tokens["seen"])
    return {
        "second_class": cosine_distance(projected[0], targets.second_classes, (counts > 0) / crops),
        "second_patch": cosine_distance(projected[1], targets.second_patches, weights),
    }


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
