"""A frozen encoder as a second teacher: through a projector, the student's tokens point where the teacher's do.

The teacher may be any of ``dino_depth/frozen``: it sees the depth of the student's own global crops, prepared as it
needs it, and its grid is resampled to the student's. The loss is 1 - cosine, on the patches and on the class token, or
the mean patch of teachers without one.

Features of a network share a large mean, and a few channels outweigh the others: a cosine to them is won by a constant.
Each channel is therefore standardised over the tokens of a pass. That needs nothing to be kept, so a resumed run
computes the same. Projectors are linear, so that what the teacher tells apart by its angles lies in the student's own
features, and they are not exported.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_depth.config import PretrainConfig
from dino_depth.depth import DepthMap
from dino_depth.distributed import all_sum
from dino_depth.errors import ConfigError, ReportedError
from dino_depth.frozen import load_frozen

__all__ = ["Projector", "SecondTeacher", "check_second_teacher", "cosine_distance", "standardize"]


def check_second_teacher(config: PretrainConfig):
    """Refuses weights that teach nothing, and settings that a second teacher cannot work with.

    Raises:
        ConfigError: naming the setting.
    """
    distill, loss = config.distill, config.loss
    for name in ("class_weight", "patch_weight", "size"):
        if not getattr(distill, name) >= 0:
            raise ConfigError(f"distill.{name} must be at least 0, got {getattr(distill, name)}")
    taught = bool(distill.teacher) and any((distill.class_weight, distill.patch_weight))
    if distill.teacher and not taught:
        raise ConfigError("distill.teacher needs distill.class_weight or distill.patch_weight above 0")
    if not (taught or loss.needs_teacher or loss.surface_weight):
        raise ConfigError("nothing to learn: every weight of loss is 0, and there is no distill.teacher")
    if distill.teacher and config.data.on_device:
        raise ConfigError("distill.teacher sees depth, and data.on_device keeps the normalised input only: turn it off")


class Projector(nn.Module):
    """From the student's tokens to the teacher's, one map for class tokens and one for patches."""

    def __init__(self, dim: int, teacher_dim: int):
        super().__init__()
        self.classes, self.patches = (nn.Linear(dim, teacher_dim) for _ in range(2))


class SecondTeacher:
    """The encoder that ``config.distill`` names.

    Attributes:
        dim: of its features.
        fingerprint: see :class:`dino_depth.frozen.FrozenEncoder`.

    Raises:
        ConfigError, DataError, ReportedError: it cannot be loaded, or does not encode crops.
    """

    def __init__(self, config: PretrainConfig, device: torch.device):
        name, self.size = config.distill.teacher, config.distill.size
        try:
            self.encoder = load_frozen(name, modality="depth", device=device)
            if self.size:
                self.encoder.grid(self.size)
        except ReportedError as error:
            raise type(error)(f"distill.teacher: {error}") from None
        if self.encoder.uses_camera:
            raise ConfigError(f"distill.teacher {name}: needs a camera, and a crop has none")
        self.dim, self.fingerprint = self.encoder.dim, self.encoder.fingerprint

    def require(self, fingerprint: str | None):
        """Refuses to go on with another teacher than the one that ``fingerprint`` is of.

        Raises:
            ConfigError: it is.
        """
        if fingerprint != self.fingerprint:
            raise ConfigError(
                f"--resume: distill.teacher {self.encoder.name} has other weights, another input or another version of "
                "its library than when the run began; start a new run (--init_from keeps the weights)"
            )

    @torch.no_grad()
    def targets(self, depth: Tensor, metric: Tensor, seen: Tensor, grid: int) -> tuple[Tensor, Tensor]:
        """What the student's tokens shall point at: (crops, dim) for its class tokens, (seen, dim) for its patches.

        Args:
            depth: (crops, 1, side, side) on the CPU, in the unit of the maps, 0 where missing.
            metric: (crops,) bool, whether that unit is metres.
            seen: (crops, grid * grid) bool of ``batch.seen_patches``, on the teacher's device.
            grid: the student's patches along a side.
        """
        patch = self.encoder.patch_size
        size = self.size or max(round(depth.shape[-1] / patch), 1) * patch
        crops = seen.any(1)
        pictures = [
            self.encoder.prepare(DepthMap.from_values(depth[crop, 0].numpy(), _kind(metric[crop])), size)
            for crop in crops.nonzero()[:, 0].tolist()
        ]
        classes, cells = self.encoder.class_and_patches(torch.stack(pictures))
        cells = cells.permute(0, 3, 1, 2)
        if cells.shape[-1] != grid:
            cells = F.interpolate(cells, (grid, grid), mode="bilinear", align_corners=False, antialias=True)
        rows = standardize(cells.permute(0, 2, 3, 1).flatten(1, 2)[seen[crops]])
        wanted = torch.zeros(len(crops), self.dim, device=classes.device)
        wanted[crops] = standardize(classes)
        return wanted, rows


def _kind(metric: Tensor) -> str:
    return "metric" if metric else "relative"


def standardize(features: Tensor) -> Tensor:
    """Features (rows, dim) of mean 0 and variance 1 over the rows of all ranks, channel by channel."""
    features = features.float()
    count = all_sum(torch.full((), float(len(features)), device=features.device)).clamp_min(1)
    features = features - all_sum(features.sum(0)) / count
    variance = all_sum(features.square().sum(0)) / count
    return features * (variance + 1e-6).rsqrt()


def cosine_distance(projected: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """sum_i w_i (1 - cosine of row i), for rows (rows, dim) and weights (rows,)."""
    return (weights * (1 - F.cosine_similarity(projected.float(), wanted, dim=-1, eps=1e-6))).sum()
