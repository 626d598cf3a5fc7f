"""M3DM's unsupervised feature fusion: one network brings image and depth features of a place together (section 3.3)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_depth.anomaly.heads import Context
from dino_depth.anomaly.resume import Keeper
from dino_depth.errors import ReportedError

__all__ = ["Fusion", "contrastive_loss", "train_fusion"]

SHARED = 256  # channels in which both are compared
RATE, BETAS, DECAY = 0.003, (0.9, 0.95), 0.01


class Fusion(nn.Module):
    """Of features (cells, image channels) and (cells, depth channels).

    Args:
        dims: channels of image and of depth.
    """

    def __init__(self, dims: tuple[int, int]):
        super().__init__()
        self.image, self.depth = (
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            for dim in dims
        )
        self.image_head, self.depth_head = (nn.Linear(dim, SHARED) for dim in dims)

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        """The fused features (cells, depth + image channels)."""
        return torch.cat([self.depth(depth), self.image(image)], -1)


def contrastive_loss(fusion: Fusion, image: Tensor, depth: Tensor) -> Tensor:
    """Each cell's image has to tell its depth from that of all other cells (section 3.3).

    As published code has it, from image to depth only, counted twice, without a temperature.
    """
    parts = (fusion.image_head(fusion.image(image)), fusion.depth_head(fusion.depth(depth)))
    one, other = (F.normalize(part, dim=1) for part in parts)
    return 2 * F.cross_entropy(one @ other.T, torch.arange(len(one), device=one.device))


def train_fusion(image: Tensor, depth: Tensor, steps: int, patches: int, context: Context) -> Fusion:
    """Trains on the cells that show the object, in float32; on the CPU with the same bits, also after a kill.

    Args:
        image, depth: (cells, channels), scaled as the banks are.
        steps: of training, a third of them to warm up and cosine after it.
        patches: cells drawn for a step; the logits are their square.

    Raises:
        ReportedError: the loss became NaN or infinite.
    """
    dims = image.shape[1], depth.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        fusion = Fusion(dims).to(context.device)
    generator, first = torch.Generator().manual_seed(context.seed), 0
    optimizer = torch.optim.AdamW(fusion.parameters(), RATE, BETAS, weight_decay=DECAY)
    keeper = Keeper(context.checkpoint)
    if (state := keeper.restore()) is not None:
        fusion.load_state_dict(state["fusion"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
    warm = max(1, steps // 3)
    for step in range(first, steps):
        rate = min((step + 1) / warm, (1 + math.cos(math.pi * max(0, step - warm) / max(1, steps - warm))) / 2)
        optimizer.param_groups[0]["lr"] = RATE * rate
        drawn = torch.randperm(len(image), generator=generator)[:patches].to(image.device)
        loss = contrastive_loss(fusion, image[drawn], depth[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not loss.isfinite():
            raise ReportedError(f"m3dm: the fusion's loss became {loss} at step {step}; use prepare.standardize true")
        keeper.keep(
            lambda done=step + 1: {
                "fusion": fusion.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "step": done,
            }
        )
    return fusion.eval().requires_grad_(False)
