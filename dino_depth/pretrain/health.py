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
    values = torch.linalg.svdvals(features.cpu().double())  # a GPU takes longer for so small a matrix
    share = values / values.sum().clamp_min(1e-30) + 1e-7
    return float(torch.exp(-(share * share.log()).sum()))


def _entropy(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(-1)


@torch.no_grad()
def measure(targets: Targets, spectra: bool = True, rank_rows: int = 512) -> dict[str, float]:
    """Figures of one step over all ranks; entropies relative to log K, usage relative to what is reachable.

    Args:
        spectra: whether to compute the effective ranks as well, which take as long as a step.
        rank_rows: most feature rows of this rank used for them.
    """
    found = {}
    for name, table in (("class", targets.classes), ("patch", targets.patches)):
        rows, prototypes = table.shape
        count = all_sum(torch.full((), float(rows), device=table.device))
        single = all_sum(sum(_entropy(part).sum() for part in table.split(64))) / count.clamp_min(1)
        mean = all_sum(table.sum(0)) / count.clamp_min(1)
        favourites = all_sum(torch.zeros(prototypes, device=table.device).index_fill_(0, table.argmax(1), 1))
        found[f"{name}_target_entropy"] = single / math.log(prototypes)
        found[f"{name}_mean_entropy"] = _entropy(mean) / math.log(prototypes)
        found[f"{name}_used"] = (favourites > 0).sum() / count.clamp(1, prototypes)
    classes, patches = targets.class_features.float(), targets.patch_features.float()
    unit = torch.nn.functional.normalize(classes, dim=-1)
    found["class_cosine"] = (unit.sum(0).square().sum() - len(unit)) / max(1, len(unit) * (len(unit) - 1))
    # Read at once: a GPU is waited for a single time.
    figures = dict(zip(found, torch.stack([*found.values()]).tolist(), strict=True))
    if spectra:
        figures["class_rankme"] = rankme(classes[:rank_rows])
        figures["patch_rankme"] = rankme(patches[:: max(1, len(patches) // rank_rows)][:rank_rows])
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
