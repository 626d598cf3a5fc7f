"""A new run that begins with weights from elsewhere."""

from pathlib import Path

from torch import Tensor

from dino_depth import checkpoint
from dino_depth.config import ModelConfig, PretrainConfig, load_config
from dino_depth.encoder import read_backbone
from dino_depth.errors import ConfigError, ReportedError
from dino_depth.pretrain.pictures import is_network_of_pictures, read_pictures
from dino_depth.pretrain.student_teacher import Networks
from dino_depth.vit import resize_position_embedding

__all__ = ["initialize"]

# What decides a network's function beside its weights' shapes, or more legibly than they do.
SIZES = ("patch_size", "dim", "depth", "heads", "registers", "positions")

HEADS = ("dino_head.", "ibot_head.")


def initialize(student: Networks, source: str):
    """Gives the student the weights of a run's or a checkpoint's teacher, or those that ``read_backbone`` or
    ``read_pictures`` reads.

    Learned positions are resized to the student's grid. The heads come along where a teacher has them and all of them
    fit: a trained MLP before new prototypes would be neither.

    Raises:
        ConfigError: the source is not there, or its network has other sizes.
        DataError: its weights are unreadable.
        ReportedError: it is on the Hub and cannot be read.
    """
    sizes, weights = _read(source)
    ours = student.backbone.config
    for key in SIZES:
        if sizes and getattr(sizes, key) != getattr(ours, key):
            theirs = getattr(sizes, key)
            raise ConfigError(f"--init_from {source}: its model.{key} is {theirs}, this run's is {getattr(ours, key)}")
    backbone = {key.removeprefix("backbone."): value for key, value in weights.items() if key.startswith("backbone.")}
    backbone.setdefault("mask_token", student.backbone.mask_token.detach())  # timm has none
    if "pos_embed" in backbone:
        backbone["pos_embed"] = resize_position_embedding(backbone["pos_embed"], student.backbone.patch_embed.grid_size)
    try:
        student.backbone.load_state_dict(backbone)
    except RuntimeError as error:
        raise ConfigError(f"--init_from {source}: {' '.join(str(error).split())[:300]}") from None
    heads = {key: value for key, value in weights.items() if key.startswith(HEADS)}
    shapes = {key: value.shape for key, value in student.state_dict().items() if key.startswith(HEADS)}
    if {key: value.shape for key, value in heads.items()} == shapes:
        student.load_state_dict(heads, strict=False)


def _read(source: str) -> tuple[ModelConfig | None, dict[str, Tensor]]:
    """Sizes, unless a lone checkpoint leaves them open, and weights under the names of a ``Networks``."""
    path = Path(source)
    if not path.exists() and is_network_of_pictures(source):
        try:
            sizes, weights = read_pictures(source)
        except ReportedError as error:
            raise type(error)(f"--init_from {error}") from None
        return sizes, {f"backbone.{key}": value for key, value in weights.items()}
    if source.endswith(".pt"):
        state, run = checkpoint.load(path), path.resolve().parent.parent
    elif (path / "config.yaml").is_file():
        if (found := checkpoint.newest(path)) is None:
            raise ConfigError(f"--init_from {source}: no checkpoint yet")
        state, run = found[1], path
    else:
        backbone, _ = read_backbone(source)
        return backbone.config, {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    known = (run / "config.yaml").is_file()
    sizes = load_config(PretrainConfig, run / "config.yaml").model if known else None
    return sizes, state["teacher"]
