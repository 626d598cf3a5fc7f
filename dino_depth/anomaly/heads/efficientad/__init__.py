"""EfficientAD: a student that imitates a teacher, and an autoencoder, on pictures of 256 pixels (Batzner et al. 2024).

The teacher is a small convolutional network that was distilled from a large one; its weights come from a file that the
user names, they are never downloaded. The student's first half learns the teacher's features of nominal pictures from
the hardest thousandth of them, its second half what the autoencoder makes of them. Where either pair disagrees, the
picture is anomalous: the student locally, the autoencoder in what it cannot see whole.

The penalty that keeps the student from imitating the teacher on other pictures needs pictures of anything (ImageNet in
the paper): a folder the user names. Without one it is off, and the title says so.

The head reads pixels and no encoder. Each view is one picture, so one instance of many views trains it; a part of the
views is held out to bring both maps to one scale. With few views of one object 70,000 steps are thousands of epochs.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as pictures

from dino_depth.anomaly.heads import Context, Facts, require
from dino_depth.anomaly.heads.efficientad.networks import SIZE, Autoencoder, pdn, read_teacher
from dino_depth.anomaly.resume import Keeper
from dino_depth.anomaly.views import Views
from dino_depth.errors import ConfigError, DataError, ReportedError

__all__ = ["INFERENCE", "Config", "EfficientAd", "check", "fit", "from_state", "needs", "score", "title"]

INFERENCE = frozenset()
MEAN, STD = (torch.tensor(part)[:, None, None] for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
HARD = 0.999  # quantile of the squared differences that the student learns from
LOW, HIGH = 0.9, 0.995  # quantiles of the held-out maps that become 0 and 0.1
BORDER = 4  # cells around the map that no receptive field is centred in
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


@dataclass
class Config:
    """Training of student and autoencoder.

    Attributes:
        teacher: file with the weights of a patch description network, small or medium.
        penalty: folder of pictures of anything, searched with its folders; empty: the penalty is off.
        steps: of training, one picture each.
        held_out: every how many-th view is held out for the quantiles of the maps.
        learning_rate: of Adam; a tenth of it in the last twentieth of the steps.
        weight_decay: of Adam.
    """

    teacher: str = ""
    penalty: str = ""
    steps: int = 70_000
    held_out: int = 10
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5


@dataclass(frozen=True)
class EfficientAd:
    """A fitted head.

    Attributes:
        digest: sha256 of the teacher's file.
        teacher, student, autoencoder: the networks; the student has twice the teacher's channels.
        mean, std: (channels, 1, 1), of the teacher's features over the training pictures.
        quantiles: (2, 2) float32, low and high of the student's and of the autoencoder's map.
        losses: (steps,), the sum that was minimised.
    """

    config: Config
    digest: str
    teacher: nn.Sequential
    student: nn.Sequential
    autoencoder: Autoencoder
    mean: Tensor
    std: Tensor
    quantiles: Tensor
    losses: Tensor

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        networks = {name: getattr(self, name) for name in ("teacher", "student", "autoencoder")}
        tensors = {name: getattr(self, name).cpu() for name in ("mean", "std", "quantiles", "losses")}
        weights = {name: {key: part.cpu() for key, part in net.state_dict().items()} for name, net in networks.items()}
        return {"config": asdict(self.config), "digest": self.digest, **weights, **tensors}


def from_state(state: dict[str, Any], device: torch.device) -> EfficientAd:
    """The head that gave ``state``; the teacher's file may be gone, but not hold another teacher.

    Raises:
        DataError: a key is missing or unknown, weights do not fit, or the file holds another teacher now.
    """
    try:
        config = Config(**state["config"])
        kernels = [part.shape[2] for key, part in state["teacher"].items() if key.endswith("weight")]
        widths = [3] + [part.shape[0] for key, part in state["teacher"].items() if key.endswith("weight")]
        teacher = pdn(kernels, widths)
        student = _student(teacher)
        networks = {"teacher": teacher, "student": student, "autoencoder": Autoencoder(widths[-1])}
        for name, network in networks.items():
            network.load_state_dict(state[name])
            network.to(device).eval().requires_grad_(False)
        mean, std = (state[name].to(device) for name in ("mean", "std"))
        head = EfficientAd(config, state["digest"], **networks, mean=mean, std=std,
                           quantiles=state["quantiles"], losses=state["losses"])  # fmt: skip
    except (KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise DataError(f"not the state of a efficientad head: {' '.join(str(error).split())[:200]}") from error
    if Path(config.teacher).is_file() and _digest(config.teacher) != head.digest:
        raise DataError(f"efficientad.teacher {config.teacher} is not the file of the fit: name another --head.cache")
    return head


def needs(config: Config) -> frozenset[str]:
    """Pictures only."""
    return frozenset({"pixels"})


def title(config: Config) -> str:
    return "efficientad" + (", penalty off" if not config.penalty else "")


def check(config: Config, facts: Facts):
    """Refuses what cannot work.

    Raises:
        ConfigError: a setting that cannot work, no teacher, or a single training view, of which none can be held out.
        DataError: the teacher's file is none.
    """
    _check_config(config)
    require("efficientad", needs(config), facts)
    if facts.views * facts.train * facts.classes < 2:
        raise ConfigError("efficientad needs two training views: one of them is held out for the scale of its maps")
    read_teacher(config.teacher)
    if config.penalty:
        _penalty_files(config.penalty)


def _check_config(config: Config):
    if not config.teacher:
        raise ConfigError(
            "efficientad.teacher is missing: name a file with the weights of a patch description network "
            "(teacher_small.pth or teacher_medium.pth), they are never downloaded"
        )
    for name, least in (("steps", 1), ("held_out", 2)):
        if getattr(config, name) < least:
            raise ConfigError(f"efficientad.{name} must be at least {least}, got {getattr(config, name)}")
    if not config.learning_rate > 0 or not config.weight_decay >= 0:
        found = f"{config.learning_rate} and {config.weight_decay}"
        raise ConfigError(f"efficientad: need learning_rate > 0 and weight_decay >= 0, got {found}")


def _penalty_files(folder: str) -> list[Path]:
    """The pictures in a folder and its folders, by name."""
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    if not found:
        raise ConfigError(f"efficientad.penalty {folder!r}: no picture ({', '.join(SUFFIXES)}) in this folder")
    return found


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _student(teacher: nn.Sequential) -> nn.Sequential:
    """Untrained, like the teacher but for twice its channels at the end."""
    layers = [layer for layer in teacher if isinstance(layer, nn.Conv2d)]
    kernels, channels = [layer.kernel_size[0] for layer in layers], [3, *(layer.out_channels for layer in layers)]
    # What stands behind the last spatial convolution is part of the end.
    wide = len(layers) - 1 if kernels[-1] > 1 else len(layers) - 2
    return pdn(kernels, [count * (2 if place > wide else 1) for place, count in enumerate(channels)])


def fit(train: Sequence[Views], config: Config, context: Context) -> EfficientAd:
    """Trains student and autoencoder; on the CPU with the same bits for the same seed, also after a kill.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: no training sample, a single view, or files that cannot be read.
        ReportedError: the loss became NaN or infinite.
    """
    if not train:
        raise DataError("efficientad: no training sample")
    _check_config(config)
    teacher = read_teacher(config.teacher).to(context.device).eval().requires_grad_(False)
    rows = torch.cat([_pixels(views) for views in train])  # (views, 3, 256, 256) uint8
    if len(rows) < 2:
        raise DataError("efficientad: a single training view, of which none can be held out")
    held = torch.arange(len(rows)) % config.held_out == config.held_out - 1
    held[-1] |= not held.any()
    mean, std = _statistics(teacher, rows[~held])
    student, autoencoder, losses = _train(config, context, teacher, rows[~held], mean, std)
    quantiles = torch.zeros(2, 2)
    head = EfficientAd(config, _digest(config.teacher), teacher, student, autoencoder, mean, std, quantiles, losses)
    found = torch.stack([_raw_maps(head, row) for row in rows[held]])  # (held out, 2, r, r)
    for place in range(2):
        values = found[:, place].flatten().double().numpy()
        quantiles[place] = torch.from_numpy(np.quantile(values, [LOW, HIGH])).float()
    quantiles[:, 1] = torch.maximum(quantiles[:, 1], quantiles[:, 0] + 1e-12)  # pictures without any difference
    return head


def _pixels(views: Views) -> Tensor:
    """(views, 3, 256, 256) uint8 of an instance; grey pictures have three equal channels."""
    found = views.pixels(SIZE)
    return (found * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def _normal(picture: Tensor, device: torch.device) -> Tensor:
    """(1, 3, 256, 256) of a picture (3, 256, 256) uint8, less ImageNet's mean over its standard deviation."""
    return ((picture.float() / 255 - MEAN) / STD)[None].to(device)


@torch.inference_mode()
def _statistics(teacher: nn.Sequential, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (channels, 1, 1) of the teacher's features, a picture at a time."""
    device = next(teacher.parameters()).device
    sums, squares, count = 0.0, 0.0, 0
    for row in rows:
        features = teacher(_normal(row, device))[0].double().flatten(1)
        sums, squares, count = sums + features.sum(1), squares + features.square().sum(1), count + features.shape[1]
    mean = sums / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    std = torch.where(std > 1e-6 * std.amax().clamp_min(1e-12), std, torch.inf)  # a channel that never changes
    return mean.float()[:, None, None], std.float()[:, None, None]


def _train(
    config: Config, context: Context, teacher: nn.Sequential, rows: Tensor, mean: Tensor, std: Tensor
) -> tuple[nn.Sequential, Autoencoder, Tensor]:
    """Student, autoencoder and the loss of every step; goes on from the checkpoint with the same bits.

    Everything random of a step comes from the seed and its number, so a state needs no generator.
    """
    device, channels = context.device, len(mean)
    devices = [device] if device.type == "cuda" else []
    files = _penalty_files(config.penalty) if config.penalty else []
    losses, keeper = torch.zeros(config.steps), Keeper(context.checkpoint)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(context.seed)
        student, autoencoder = _student(teacher).to(device), Autoencoder(channels).to(device)
        parameters = [*student.parameters(), *autoencoder.parameters()]
        optimizer = torch.optim.Adam(parameters, config.learning_rate, weight_decay=config.weight_decay)
        first = 0
        if (state := keeper.restore()) is not None:
            student.load_state_dict(state["student"])
            autoencoder.load_state_dict(state["autoencoder"])
            optimizer.load_state_dict(state["optimizer"])
            first = state["step"]
            losses[:first] = state["losses"][:first]
        for step in range(first, config.steps):
            random = np.random.default_rng([context.seed, step])
            torch.manual_seed(int(random.integers(2**31)))  # of the dropout
            optimizer.param_groups[0]["lr"] = config.learning_rate * (0.1 if step >= 0.95 * config.steps else 1)
            picture = rows[random.integers(len(rows))]
            penalty = _normal(_penalty_picture(files, random), device) if files else None
            changed = _normal(augmented(picture, random), device)
            parts = (_normal(picture, device), changed, penalty)
            loss = training_loss(teacher, student, autoencoder, mean, std, *parts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[step] = loss.detach()
            if not losses[step].isfinite():
                raise ReportedError(f"efficientad: the loss became {losses[step]} at step {step}; lower learning_rate")
            keeper.keep(
                lambda done=step + 1: {
                    "student": student.state_dict(),
                    "autoencoder": autoencoder.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "losses": losses,
                    "step": done,
                }
            )
    for network in (student, autoencoder):
        network.eval().requires_grad_(False)
    return student, autoencoder, losses


def training_loss(
    teacher: nn.Module,
    student: nn.Module,
    autoencoder: nn.Module,
    mean: Tensor,
    std: Tensor,
    picture: Tensor,
    changed: Tensor,
    penalty: Tensor | None,
) -> Tensor:
    """The sum of the three losses of a step (algorithm 1), of pictures (1, 3, 256, 256).

    Args:
        picture: of the student; ``changed`` is the same in other colours or another, of the autoencoder.
        penalty: a picture of anything; None leaves the penalty out.
    """
    channels = len(mean)
    with torch.no_grad():
        target, target_changed = ((teacher(part) - mean) / std for part in (picture, changed))
    distance = (target - student(picture)[:, :channels]).square()
    loss = hardest(distance).mean()
    if penalty is not None:
        loss = loss + student(penalty)[:, :channels].square().mean()
    rebuilt = autoencoder(changed)
    imitated = student(changed)[:, channels:]
    return loss + (target_changed - rebuilt).square().mean() + (rebuilt - imitated).square().mean()


def hardest(distance: Tensor) -> Tensor:
    """Those values that reach the quantile ``HARD`` of all of them."""
    values = distance.flatten()
    place = -(-int(round(HARD * 1000)) * (len(values) - 1) // 1000)  # of the quantile, rounded up to a value
    return values.topk(len(values) - place).values


def augmented(picture: Tensor, random: np.random.Generator) -> Tensor:
    """A picture (3, ...) uint8 with its brightness, contrast or saturation changed by at most a fifth."""
    change = (pictures.adjust_brightness, pictures.adjust_contrast, pictures.adjust_saturation)[random.integers(3)]
    return change(picture, float(random.uniform(0.8, 1.2)))


def _penalty_picture(files: list[Path], random: np.random.Generator) -> Tensor:
    """(3, 256, 256) uint8: the middle of a picture of 512 pixels, grey in three of ten cases.

    Raises:
        DataError: a file cannot be read.
    """
    path = files[random.integers(len(files))]
    try:
        with Image.open(path) as file:
            image = file.convert("RGB").resize((2 * SIZE, 2 * SIZE), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"efficientad.penalty {path}: unreadable picture: {error}") from None
    if random.random() < 0.3:
        image = image.convert("L").convert("RGB")
    half = SIZE // 2
    cut = np.asarray(image)[half : half + SIZE, half : half + SIZE]
    return torch.from_numpy(cut.copy()).permute(2, 0, 1)


@torch.inference_mode()
def _raw_maps(head: EfficientAd, picture: Tensor) -> Tensor:
    """(2, r, r): mean squared differences over channels, of student and teacher, and of student and autoencoder."""
    given, channels = _normal(picture, head.mean.device), len(head.mean)
    student = head.student(given)[0]
    local = (student[:channels] - (head.teacher(given)[0] - head.mean) / head.std).square().mean(0)
    whole = (student[channels:] - head.autoencoder(given)[0]).square().mean(0)
    return torch.stack([local, whole]).cpu()


@torch.inference_mode()
def score(head: EfficientAd, views: Views) -> dict[str, Tensor]:
    """Half the sum of both maps, each divided so that its quantiles on held-out pictures lie 0.1 apart.

    The paper also moves the low quantile to 0. That constant is left out: it changes no order, and scores stay at least
    0, the score of the background. The border, where there is none, has the score that the paper's 0 becomes.

    Returns:
        {"image": (views, 64, 64)} float32 on the CPU.

    Raises:
        DataError: a view cannot be read.
    """
    low, high = head.quantiles.unbind(1)
    scale = 0.1 / (high - low) / 2  # (2,)
    maps = torch.stack([(_raw_maps(head, picture) * scale[:, None, None]).sum(0) for picture in _pixels(views)])
    return {"image": F.pad(maps, (BORDER,) * 4, value=float((low * scale).sum()))}
