"""MVAD: reverse distillation of a frozen network whose views look at each other first (He et al. 2024).

A student reproduces three maps of a frozen convolutional network from a bottleneck; where it cannot, something is not
normal. Before the bottleneck every view attends to the windows of the other views that are most like its own, in
``network.py``; without that (``cross_view false``) it is RD4AD, the control that belongs beside it.

Traps. All suppression happens in the bottleneck: the view's own, anomalous feature is always part of what it sees. It
is trained by squared differences and scored by the cosine, as published. The public code, given one training instance,
makes no step at all and says nothing; here a step is one instance, whatever their number.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_depth.anomaly.heads import Context, Facts, check_features, check_train, require
from dino_depth.anomaly.heads.mvad.network import Network
from dino_depth.anomaly.resume import Keeper
from dino_depth.anomaly.views import Views
from dino_depth.errors import ConfigError, DataError, ReportedError

__all__ = ["INFERENCE", "MVAD", "Config", "check", "fit", "from_state", "needs", "score", "title"]

INFERENCE = frozenset()
SCALES = 3
IMAGES = 16  # that the learning rate is given for


@dataclass
class Config:
    """The public code's settings, where a sample is as many views as there are.

    Attributes:
        modality: whose views are distilled; the encoder must have three layers, ``timm:resnet34?layers=1-2-3``.
        cross_view: views attend to each other; off is RD4AD.
        blocks: of each scale, finest first.
        windows: along a side, of each scale.
        chosen: windows of other views that a window attends to.
        heads: of the attention.
        masked: zeros that fill up windows take no part in it.
        steps: of the optimiser, each on all views of one training instance.
        learning_rate: of AdamW for 16 views; it grows with their number.
        weight_decay: of AdamW.
    """

    modality: Literal["image", "depth"] = "image"
    cross_view: bool = True
    blocks: tuple[int, ...] = (1, 2, 4)
    windows: tuple[int, ...] = (14, 9, 6)
    chosen: int = 4
    heads: int = 8
    masked: bool = False
    steps: int = 100
    learning_rate: float = 0.005
    weight_decay: float = 1e-4


@dataclass(frozen=True, eq=False)
class MVAD:
    """A fitted head.

    Attributes:
        dims: channels of the teacher's maps, finest first.
        network: what was learned.
        losses: (steps,).
    """

    config: Config
    dims: tuple[int, ...]
    network: Network
    losses: Tensor

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        weights = {key: value.cpu() for key, value in self.network.state_dict().items()}
        return {"config": asdict(self.config), "dims": list(self.dims), "network": weights, "losses": self.losses}


def from_state(state: dict[str, Any], device: torch.device) -> MVAD:
    """The head that gave ``state``.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a key is missing or weights do not fit the configuration.
    """
    try:
        given = state["config"]
        config = Config(**given | {key: tuple(given[key]) for key in ("blocks", "windows")})
        _check_config(config)
        network = _network(config, tuple(state["dims"]))
        network.load_state_dict(state["network"])
        return MVAD(config, tuple(state["dims"]), _frozen(network.to(device)), state["losses"])
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise DataError(f"not the state of a mvad head: {' '.join(str(error).split())}") from error


def _network(config: Config, dims: tuple[int, ...]) -> Network:
    blocks = config.blocks if config.cross_view else (0,) * SCALES
    return Network(dims, blocks, config.windows, config.chosen, config.heads, config.masked)


def _frozen(network: Network) -> Network:
    return network.eval().requires_grad_(False)


def needs(config: Config) -> frozenset[str]:
    """The layers of one encoder."""
    return frozenset({config.modality, "layers"})


def title(config: Config) -> str:
    plain = {field.name: field.default for field in fields(Config)}
    changed = [f"{key} {value}" for key, value in asdict(config).items()
               if key not in ("modality", "cross_view") and value != plain[key]]  # fmt: skip
    return ", ".join(["mvad", config.modality, *([] if config.cross_view else ["no other views (RD4AD)"]), *changed])


def check(config: Config, facts: Facts):
    """Refuses what cannot work.

    Raises:
        ConfigError: a setting that cannot work, an encoder that is missing or has no layers, or a single view.
    """
    _check_config(config)
    require("mvad", needs(config), facts)
    _check_views(config, facts.views, "this benchmark")


def _check_views(config: Config, views: int, place: str):
    if config.cross_view and views < 2:
        raise ConfigError(f"mvad attends to other views: {place} has a single one; mvad.cross_view false goes without")


def _check_config(config: Config):
    for name in ("blocks", "windows"):
        value = getattr(config, name)
        if len(value) != SCALES or min(value) < (name == "windows"):
            raise ConfigError(f"mvad.{name} must be {SCALES} numbers, one for each scale, got {list(value)}")
    for name in ("chosen", "heads", "steps"):
        if getattr(config, name) < 1:
            raise ConfigError(f"mvad.{name} must be at least 1, got {getattr(config, name)}")
    if not config.learning_rate > 0:
        raise ConfigError(f"mvad.learning_rate must be above 0, got {config.learning_rate}")
    if not config.weight_decay >= 0:
        raise ConfigError(f"mvad.weight_decay must not be negative, got {config.weight_decay}")


def _teacher(views: Views, config: Config, device: torch.device, dims: tuple[int, ...] | None = None) -> list[Tensor]:
    """The frozen maps (V, dim, n, n), finest first.

    Raises:
        ConfigError: the layers are not three, each half of the one before.
        DataError: other channels than the head was fitted on.
    """
    given = views.layers(config.modality)
    rows = [part.shape[1] for part in given]
    found = ", ".join(f"{part.shape[1]}x{part.shape[1]}x{part.shape[3]}" for part in given)
    if (
        len(given) != SCALES
        or any(fine != 2 * coarse for fine, coarse in zip(rows, rows[1:], strict=False))
        or rows[-1] % 2
    ):
        raise ConfigError(
            f"mvad needs three layers, each half of the one before, the last of an even side: got {found}"
        )
    channels = tuple(part.shape[3] for part in given)
    if any(dim % config.heads or dim % 4 for dim in channels):
        raise ConfigError(
            f"mvad.heads {config.heads}: the layers' channels must be multiples of it and of 4, got {found}"
        )
    if dims is not None and channels != dims:
        raise DataError(f"mvad: layers of {channels} channels, the head was fitted on {dims}")
    # What was computed without gradients cannot take part in a graph; a copy can.
    return [part.to(device).clone().permute(0, 3, 1, 2).contiguous() for part in given]


def fit(train: Sequence[Views], config: Config, context: Context) -> MVAD:
    """Distils nominal instances; in float32, and on the CPU with the same bits for the same seed.

    Raises:
        ConfigError: a setting or layers that cannot work, or a single view.
        DataError: there is no training instance, or features that cannot be used.
        ReportedError: the loss became NaN or infinite.
    """
    _check_config(config)
    check_train(train, "mvad")
    for place, views in enumerate(train):
        _check_views(config, len(views.share), f"training sample {place}")
    teachers = [_teacher(views, config, context.device) for views in train]
    dims = tuple(part.shape[1] for part in teachers[0])
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        network = _network(config, dims).to(context.device).train()
        losses = _train(network, teachers, config, context)
    return MVAD(config, dims, _frozen(network), losses)


def _train(network: Network, teachers: list[list[Tensor]], config: Config, context: Context) -> Tensor:
    """The loop; its loss curve (steps,)."""
    rate = config.learning_rate * len(teachers[0][0]) / IMAGES
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=config.weight_decay)
    losses: list[Tensor] = []
    keeper = Keeper(context.checkpoint)
    if (state := keeper.restore()) is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        losses = list(state["losses"])
    for step in range(len(losses), config.steps):
        torch.manual_seed(context.seed + 1000003 * (step + 1))  # of dropout, so that a step does not depend on the past
        optimizer.param_groups[0]["lr"] = rate * (1 if step < 0.8 * config.steps else 0.1)
        teacher = teachers[step % len(teachers)]
        loss = 5 * sum(F.mse_loss(part, kept) for part, kept in zip(network(teacher), teacher, strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.detach().cpu())
        if not losses[-1].isfinite():
            raise ReportedError(f"mvad: the loss became {float(loss)} at step {step}; lower mvad.learning_rate")
        keeper.keep(
            lambda: {
                "network": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": torch.stack(losses),
            }
        )
    return torch.stack(losses)


@torch.inference_mode()
def score(head: MVAD, views: Views) -> dict[str, Tensor]:
    """One minus the cosine of student and teacher, the mean over the scales at the resolution of the finest.

    Returns:
        One map under the name of the modality, (V, n, n) float32, CPU.

    Raises:
        ConfigError: a single view, or layers that cannot work.
        DataError: features that cannot be used.
    """
    check_features(views, "mvad")
    _check_views(head.config, len(views.share), "an instance")
    teacher = _teacher(views, head.config, next(head.network.parameters()).device, head.dims)
    maps = []
    for part, kept in zip(head.network(teacher), teacher, strict=True):
        apart = (1 - F.cosine_similarity(part, kept, dim=1))[:, None]
        maps.append(F.interpolate(apart, teacher[0].shape[-2:], mode="bilinear", align_corners=True))
    return {head.config.modality: torch.stack(maps).mean(0)[:, 0].float().cpu()}
