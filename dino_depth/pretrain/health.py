"""Is the run learning, stalled or collapsed? Measured on the teacher's targets, where losses cannot tell.

- Healthy: single targets are sharper than uniform, the mean target is spread over the prototypes.
- Hard collapse: the mean target's entropy falls to 0, one prototype takes everything, and the loss looks *better*.
- Soft stall: every target stays near uniform (entropy about log K), the losses sit at log K.

RankMe (Garrido et al. 2023) is reported and never gated on: collapsed runs can have a healthy rank.
"""

import math
from collections import deque

import torch
from torch import Tensor

from dino_depth.config import HealthConfig
from dino_depth.distributed import all_sum
from dino_depth.errors import GateError
from dino_depth.pretrain.student_teacher import Targets

__all__ = ["CollapseGate", "measure", "rankme"]


def rankme(features: Tensor) -> float:
    """Effective rank, exp(entropy of the normalised singular values), of (samples, dim) features (RankMe, eq. 1-2)."""
    values = torch.linalg.svdvals(features.double())
    share = values / values.sum().clamp_min(1e-30) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(-1)


@torch.no_grad()
def measure(targets: Targets, rank_rows: int = 512) -> dict[str, float]:
    """Figures of one step over all ranks; entropies relative to log K, usage relative to what is reachable.

    Args:
        rank_rows: most feature rows of this rank used for RankMe.
    """
    figures = {}
    for name, table in (("class", targets.classes), ("patch", targets.patches)):
        rows, prototypes = table.shape
        scale = math.log(prototypes)
        count = all_sum(torch.tensor(float(rows), device=table.device)).clamp_min(1)
        single = all_sum(sum(_entropy(part).sum() for part in table.split(64)) / count)
        mean = all_sum(table.sum(0) / count)
        favourites = all_sum(torch.bincount(table.argmax(1), minlength=prototypes))
        figures[f"{name}_target_entropy"] = float(single) / scale
        figures[f"{name}_mean_entropy"] = float(_entropy(mean)) / scale
        figures[f"{name}_used"] = int((favourites > 0).sum()) / min(prototypes, int(count))
    classes = targets.class_features.float()
    patches = targets.patch_features.float()
    figures["class_rankme"] = rankme(classes[:rank_rows])
    figures["patch_rankme"] = rankme(patches[:: max(1, len(patches) // rank_rows)][:rank_rows])
    unit = torch.nn.functional.normalize(classes, dim=-1)
    pairs = max(1, len(unit) * (len(unit) - 1))
    figures["class_cosine"] = float((unit.sum(0).square().sum() - len(unit)) / pairs)
    return figures


class CollapseGate:
    """Ends a run whose targets carry no information, once the mean of ``window`` measurements says so.

    Args:
        config: thresholds.
        steps: length of the run, for the grace period in which targets are still forming.
    """

    WATCHED = ("class_mean_entropy", "class_target_entropy", "class_used")

    def __init__(self, config: HealthConfig, steps: int):
        self.config = config
        self.armed_from = config.grace * steps
        self.recent: deque[list[float]] = deque(maxlen=config.window)

    def state(self) -> list[list[float]]:
        return list(self.recent)

    def restore(self, state: list[list[float]]):
        self.recent.extend(state)

    def check(self, figures: dict[str, float], step: int):
        """Adds a measurement.

        Raises:
            GateError: the run has collapsed or stalled; the message says which and what to change.
        """
        self.recent.append([figures[name] for name in self.WATCHED])
        if len(self.recent) < self.config.window:
            return
        mean, target, used = (sum(column) / len(self.recent) for column in zip(*self.recent, strict=True))
        if mean < self.config.mean_entropy:
            raise GateError(
                f"step {step}: collapsed: the mean class target's entropy is {mean:.3f} log K (gate: at least "
                f"{self.config.mean_entropy}) with {used:.1%} of the reachable prototypes used. Raise "
                "loss.sinkhorn_iterations to 3, loss.koleo_weight or optim.warmup, or halve optim.lr."
            )
        if step < self.armed_from:
            return
        if target > self.config.target_entropy:
            raise GateError(
                f"step {step}: stalled: class targets are near uniform, entropy {target:.3f} log K (gate: at most "
                f"{self.config.target_entropy}). Lower loss.teacher_temperature (0.02 to 0.04) or loss.koleo_weight, "
                "or use fewer loss.prototypes or a larger train.batch."
            )
        if used < self.config.used:
            raise GateError(
                f"step {step}: collapsed: {used:.1%} of the reachable class prototypes are used (gate: at least "
                f"{self.config.used:.0%}). Use fewer loss.prototypes, a larger train.batch or a higher "
                "loss.koleo_weight."
            )
