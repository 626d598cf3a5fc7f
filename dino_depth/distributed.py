"""Rank, world size and reductions; each is the identity in a single process."""

import datetime
import os

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "all_max", "all_sum", "average_gradients", "barrier", "rank", "start", "stop", "world_size"]


def start(device: torch.device, timeout_minutes: float = 30.0):
    """Joins the process group that torchrun or Slurm describes in the environment; does nothing without one."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))


def stop():
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Returns when every rank is here."""
    if dist.is_initialized():
        dist.barrier()


def all_sum(tensor: Tensor) -> Tensor:
    """The sum over ranks, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """The maximum over ranks, in place; no gradient."""
    if world_size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        # Gradients are averaged over ranks afterwards, and every rank computed the same function of the gathered
        # rows: the sum over ranks is what one process would have found, times the world size.
        gradient = all_sum(gradient.contiguous())
        return gradient.chunk(world_size())[rank()]


def all_gather(tensor: Tensor) -> Tensor:
    """Rows of all ranks, (world * rows, ...), with gradient; every rank must hold as many rows."""
    return _AllGather.apply(tensor) if world_size() > 1 else tensor


def average_gradients(parameters: list[Tensor]):
    """Replaces each gradient by its mean over ranks, in one reduction."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    all_sum(flat).div_(world_size())
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
