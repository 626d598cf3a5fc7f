"""The optimisations of a training step, each replaced by what one would write without it, to measure what it is worth.

``OPTIMISATIONS[name]`` changes the configuration and, until :func:`put_back`, the modules of this process.
"""

from contextlib import ExitStack
from unittest.mock import patch

import torch
import torch.nn.functional as F

from dino_depth import device, vit
from dino_depth.config import PretrainConfig
from dino_depth.pretrain import optim, student_teacher
from dino_depth.pretrain.heads import PrototypeHead
from dino_depth.vit import DepthTransformer

__all__ = ["OPTIMISATIONS", "put_back"]

_replaced = ExitStack()


def _replace(owner, name: str, value):
    _replaced.enter_context(patch.object(owner, name, value))


def put_back():
    """Undoes every replacement; configurations stay changed."""
    _replaced.close()


def _compile(config: PretrainConfig):
    config.train.compile = False


def _stochastic_depth(config: PretrainConfig):
    """Every crop takes, and pays for, every branch."""
    config.model.drop_path = 0.0


def _bf16(config: PretrainConfig):
    config.train.precision = "fp32"


def _packing(config: PretrainConfig):
    """Global and local crops go through the network one after the other."""
    packed = DepthTransformer.forward_packed

    def separately(self, crops, masks, needed=None, kept=None, scale=1.0):
        grids = [(images.shape[-1] // self.config.patch_size) ** 2 for images in crops]
        sizes = [len(images) * (self.num_prefix_tokens + grid) for images, grid in zip(crops, grids, strict=True)]
        results, start = [], 0
        for place, (images, mask, size) in enumerate(zip(crops, masks, sizes, strict=True)):
            inside = None if needed is None else needed[(needed >= start) & (needed < start + size)] - start
            chosen = kept and [[sets[place]] for sets in kept]
            results.append(packed(self, [images], [mask], inside, chosen, scale))
            start += size
        return torch.cat(results) if needed is not None else [part for (part,) in results]

    _replace(DepthTransformer, "forward_packed", separately)


def _last_rows(config: PretrainConfig):
    """The last block computes every token, also those that no loss reads."""
    packed = DepthTransformer.forward_packed

    def everything(self, crops, masks, needed=None, kept=None, scale=1.0):
        tokens = packed(self, crops, masks, None, kept, scale)
        return tokens if needed is None else torch.cat([part.flatten(0, 1) for part in tokens]).index_select(0, needed)

    _replace(DepthTransformer, "forward_packed", everything)


def _in_place(config: PretrainConfig):
    """Residuals, and the gradients of the rows that take a branch, are new tensors."""
    residual = vit._residual

    def anew(branch, tokens, groups, kept, in_place=False):
        return residual(branch, tokens, groups, kept)

    _replace(vit, "_residual", anew)


def _scaled_weights(config: PretrainConfig):
    """LayerScale multiplies tokens."""

    def scaled_tokens(tokens, layer, gain):
        return layer(tokens) * gain

    _replace(vit, "_scaled_linear", scaled_tokens)


def _attention_by_products(config: PretrainConfig):
    """Attention in bfloat16 by torch's fused float32 kernel (CPU only)."""
    _replace(vit, "LENGTH_OF_PRODUCTS", 0)


def _onednn(config: PretrainConfig):
    """float32 products as torch makes them (only where MKL is slow)."""
    _replace(device, "wants_onednn", lambda: False)


def _sinkhorn(config: PretrainConfig):
    """SwAV's algorithm as published: the whole float32 matrix is read and written for every normalisation."""

    @torch.no_grad()
    def by_the_book(logits, temperature, iterations):
        table = torch.exp((logits.float() - logits.max().float()) / temperature).T
        table /= table.sum()
        prototypes, samples = table.shape
        for _ in range(iterations):
            table /= table.sum(1, keepdim=True)
            table /= prototypes
            table /= table.sum(0, keepdim=True)
            table /= samples
        return (table * samples).T.contiguous()

    _replace(student_teacher, "sinkhorn", by_the_book)


def _cross_entropy(config: PretrainConfig):
    """Logits of all rows in float32, and autograd through their log-softmax."""

    def whole(features, prototypes, targets, index, weights, temperature):
        logits = (features @ prototypes.T).float() / temperature
        index = slice(None) if index is None else index
        return -(weights * (targets[index] * F.log_softmax(logits, -1)).sum(-1)).sum()

    _replace(student_teacher, "prototype_cross_entropy", whole)


def _weight_norm(config: PretrainConfig):
    def prototypes(self):
        return self.gain * self.direction / self.direction.norm(dim=1, keepdim=True)

    _replace(PrototypeHead, "prototypes", prototypes)


def _fused_adamw(config: PretrainConfig):
    fused = torch.optim.AdamW

    def unfused(*arguments, **options):
        return fused(*arguments, **(options | {"fused": False, "foreach": False}))

    _replace(optim.torch.optim, "AdamW", unfused)


def _foreach_ema(config: PretrainConfig):
    @torch.no_grad()
    def one_by_one(teacher, student, momentum):
        for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
            slow.mul_(momentum).add_(fast, alpha=1 - momentum)

    _replace(student_teacher, "update_teacher", one_by_one)


def _allocator(config: PretrainConfig):
    """Memory goes back to the kernel (CPU only)."""
    _replace(device, "reuse_memory", lambda: None)


OPTIMISATIONS = {
    "compile": _compile, "bf16": _bf16, "onednn": _onednn, "attention_by_products": _attention_by_products,
    "stochastic_depth": _stochastic_depth, "packing": _packing, "last_rows": _last_rows, "in_place": _in_place,
    "scaled_weights": _scaled_weights, "sinkhorn": _sinkhorn, "cross_entropy": _cross_entropy,
    "weight_norm": _weight_norm, "fused_adamw": _fused_adamw, "foreach_ema": _foreach_ema, "allocator": _allocator,
}  # fmt: skip
