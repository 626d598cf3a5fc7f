"""The projection head of DINO and iBOT: an MLP to a normalised bottleneck that meets weight-normed prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_depth.config import LossConfig

__all__ = ["PrototypeHead"]


class PrototypeHead(nn.Module):
    """Three-layer MLP, L2 normalisation and K prototypes (DINO, Caron et al. 2021, section 3.1).

    ``forward`` stops at the bottleneck: the product with the prototypes belongs to the losses, which never hold all of
    it in float32.
    """

    def __init__(self, dim: int, config: LossConfig):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.direction = nn.Parameter(nn.Linear(config.bottleneck, config.prototypes, bias=False).weight.detach())
        self.gain = nn.Parameter(torch.ones(config.prototypes, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """(rows, dim) tokens -> (rows, bottleneck) unit vectors."""
        return F.normalize(self.mlp(tokens).float(), dim=-1, eps=1e-6)

    def prototypes(self) -> Tensor:
        """(K, bottleneck): gain times unit direction."""
        return torch._weight_norm(self.direction, self.gain, 0)  # one fused pass where autograd would need five
