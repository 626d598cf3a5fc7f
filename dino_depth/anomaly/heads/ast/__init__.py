"""AST, an asymmetric student and teacher: a normalising flow and what a convolutional student makes of it.

The flow (teacher) brings the features of nominal cells to a normal distribution and is invertible, so no anomaly can
leave it unchanged; the student learns its outcome by convolutions, which do not extrapolate as a flow does. Their
squared difference is the anomaly score (Rudolph et al. 2023).

The features are those of the encoders: of images alone or joined with those of depth, in the paper the first six stages
of an EfficientNet-B5 at 768 pixels (``timm:tf_efficientnet_b5.aa_in1k?blocks=6``, 304 channels) and blocks of 8 x 8
depth values at 192 (``raw-patches?patch=8``, 64 channels). Depth is normalised as this project's encoders see it.

Steps are counted, not epochs: 72 epochs of 12 views in batches of 8 would be 72 steps, where MVTec 3D-AD has 2,000.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dino_depth.anomaly.heads import Context, Facts, check_features, check_train, require
from dino_depth.anomaly.heads.ast.networks import Flow, Student
from dino_depth.anomaly.resume import Keeper
from dino_depth.anomaly.views import Views
from dino_depth.errors import ConfigError, DataError, ReportedError

__all__ = ["INFERENCE", "Ast", "Config", "check", "fit", "from_state", "needs", "score", "title"]

INFERENCE = frozenset()


@dataclass
class Config:
    """Training of teacher and student.

    Attributes:
        modality: whose features are learned; ``both`` joins them.
        steps: of the teacher, and as many of the student after it.
        batch: views in a step, or all where there are fewer.
        learning_rate: of Adam.
        weight_decay: of Adam.
        teacher: channels inside the flow's couplings.
        student: channels inside the student.
    """

    modality: Literal["image", "depth", "both"] = "both"
    steps: int = 2000
    batch: int = 8
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    teacher: int = 64
    student: int = 1024


@dataclass(frozen=True)
class Ast:
    """A fitted head.

    Attributes:
        dims: channels of image and depth features.
        losses: (2, steps), of the teacher and of the student.
    """

    config: Config
    dims: tuple[int, int]
    teacher: Flow
    student: Student
    losses: Tensor

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        networks = {"teacher": self.teacher, "student": self.student}
        weights = {name: {key: part.cpu() for key, part in net.state_dict().items()} for name, net in networks.items()}
        return {"config": asdict(self.config), "dims": list(self.dims), "losses": self.losses, **weights}


def from_state(state: dict[str, Any], device: torch.device) -> Ast:
    """The head that gave ``state``.

    Raises:
        DataError: a key is missing or unknown, or weights do not fit.
    """
    try:
        config, dims = Config(**state["config"]), tuple(state["dims"])
        teacher, student = _networks(config, dims)
        teacher.load_state_dict(state["teacher"])
        student.load_state_dict(state["student"])
        head = Ast(config, dims, _frozen(teacher.to(device)), _frozen(student.to(device)), state["losses"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DataError(f"not the state of a ast head: {' '.join(str(error).split())[:200]}") from error
    return head


def needs(config: Config) -> frozenset[str]:
    """The features that are learned."""
    return frozenset({"image", "depth"} if config.modality == "both" else {config.modality})


def title(config: Config) -> str:
    return f"ast, {config.modality}"


def check(config: Config, facts: Facts):
    """Refuses what cannot work. One instance of many views is enough; of a single view it would learn that view.

    Raises:
        ConfigError: a setting that cannot work, an encoder that is missing, or a single training view.
    """
    _check_config(config)
    require("ast", needs(config), facts)
    if facts.views * facts.train * facts.classes < 2:
        raise ConfigError("ast needs two training views: of a single one it learns that view and nothing of others")


def _check_config(config: Config):
    for name in ("steps", "batch", "teacher", "student"):
        if getattr(config, name) < 1:
            raise ConfigError(f"ast.{name} must be at least 1, got {getattr(config, name)}")
    if not config.learning_rate > 0 or not config.weight_decay >= 0:
        found = f"{config.learning_rate} and {config.weight_decay}"
        raise ConfigError(f"ast: need learning_rate > 0 and weight_decay >= 0, got {found}")


def _channels(config: Config, dims: tuple[int, int]) -> int:
    """Channels that are learned.

    Raises:
        ConfigError: a modality was not encoded, or there is one channel, which a flow cannot halve.
    """
    image, depth = dims
    chosen = {"image": image, "depth": depth, "both": image + depth}[config.modality]
    if chosen < 2 or (config.modality == "both" and not image * depth):
        raise ConfigError(f"ast.modality {config.modality}: got {image} image and {depth} depth channels")
    return chosen


def _networks(config: Config, dims: tuple[int, int]) -> tuple[Flow, Student]:
    channels = _channels(config, dims)
    return Flow(channels, config.teacher), Student(channels, config.student)


def _frozen(network: nn.Module) -> Any:
    return network.eval().requires_grad_(False)


def _maps(views: Views, modality: str) -> Tensor:
    """(views, channels, rows, columns) of an instance."""
    parts = {"image": views.image, "depth": views.depth}
    joined = torch.cat(list(parts.values()), -1) if modality == "both" else parts[modality]
    return joined.permute(0, 3, 1, 2)


def fit(train: Sequence[Views], config: Config, context: Context) -> Ast:
    """Trains the teacher, then the student; on the CPU with the same bits for the same seed, also after a kill.

    Raises:
        ConfigError: a setting that cannot work, or a modality that was not encoded.
        DataError: features that cannot be used, grids that differ, or no cell that shows an object.
        ReportedError: a loss became NaN or infinite.
    """
    _check_config(config)
    dims = check_train(train, "ast")
    _channels(config, dims)
    grids = sorted({tuple(views.share.shape[1:]) for views in train})
    if len(grids) > 1:
        raise DataError(f"ast: training samples differ in their grids: {grids}")
    features = torch.cat([_maps(views, config.modality) for views in train])
    shown = torch.cat([views.share for views in train]) > 0
    seen = shown.flatten(1).any(1)  # a view without the object teaches nothing
    if not seen.any():
        raise DataError(f"ast: none of {len(train)} training samples shows an object")
    return _train(config, context, dims, features[seen], shown[seen])


def _train(config: Config, context: Context, dims: tuple[int, int], features: Tensor, shown: Tensor) -> Ast:
    """Both networks from features (rows, channels, n, n) and which cells show the object (rows, n, n).

    Everything random of a step comes from the seed and its number, so a state needs no generator.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        teacher, student = (network.to(context.device) for network in _networks(config, dims))
    losses, keeper = torch.zeros(2, config.steps), Keeper(context.checkpoint)
    state = keeper.restore()
    for phase, network in enumerate((teacher, student)):
        if state is not None and state["phase"] > phase:
            network.load_state_dict(state["before"])
            losses[phase] = state["losses"][phase]
            _frozen(network)
            continue
        optimizer = torch.optim.Adam(
            network.parameters(), config.learning_rate, eps=1e-8, weight_decay=config.weight_decay
        )
        first = 0
        if state is not None:
            network.load_state_dict(state["network"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
            losses[phase] = state["losses"][phase]
            state = None
        network.train()
        for step in range(first, config.steps):
            chosen = batch_rows(len(features), config.batch, step, (context.seed, phase))
            given, mask = features[chosen].to(context.device), shown[chosen].to(context.device)
            loss = teacher_loss(*teacher(given), mask) if phase == 0 else student_loss(teacher, student, given, mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[phase, step] = loss.detach()
            if not losses[phase, step].isfinite():
                name = ("teacher", "student")[phase]
                raise ReportedError(f"ast: the {name}'s loss became {loss} at step {step}; lower ast.learning_rate")
            keeper.keep(
                lambda phase=phase, network=network, optimizer=optimizer, done=step + 1: {
                    "phase": phase,
                    "before": teacher.state_dict() if phase else {},
                    "network": network.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "losses": losses,
                    "step": done,
                }
            )
        _frozen(network)
    return Ast(config, dims, teacher, student, losses)


def batch_rows(rows: int, batch: int, step: int, seed: tuple[int, ...]) -> Tensor:
    """The rows of a step: those of an epoch in a new order, what does not fill a batch left out."""
    batch = min(batch, rows)
    epoch, place = divmod(step, rows // batch)
    order = np.random.default_rng([*seed, epoch]).permutation(rows)
    return torch.from_numpy(order[place * batch : (place + 1) * batch])


def teacher_loss(z: Tensor, log_det: Tensor, shown: Tensor) -> Tensor:
    """Mean negative log-likelihood, without its constant, of the cells that show the object."""
    return ((0.5 * z.square().sum(1) - log_det) * shown).sum() / shown.sum()


def student_loss(teacher: Flow, student: Student, features: Tensor, shown: Tensor) -> Tensor:
    """Mean squared difference of both, over the cells that show the object."""
    with torch.no_grad():
        target, _ = teacher(features)
    return ((target - student(features)).square().mean(1) * shown).sum() / shown.sum()


@torch.inference_mode()
def score(head: Ast, views: Views) -> dict[str, Tensor]:
    """Squared difference of teacher and student, averaged over channels, for every cell.

    Returns:
        One map under the name of the modality, (views, rows, columns) float32, CPU.

    Raises:
        DataError: features that cannot be used.
    """
    check_features(views, "ast", head.dims)
    device, maps = next(head.teacher.parameters()).device, []
    for view in _maps(views, head.config.modality):  # a view at a time bounds the memory
        given = view[None].to(device)
        maps.append((head.teacher(given)[0] - head.student(given)).square().mean(1)[0].cpu())
    return {head.config.modality: torch.stack(maps)}
