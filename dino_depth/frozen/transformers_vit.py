"""Vision Transformers of the transformers library, from a folder or the Hub, never with code from there.

The mean and standard deviation of the input come from the repository's ``preprocessor_config.json``; where there is
none the option ``mean_std`` must say. Traps: most of these models resize their position embedding only if they are
asked to; each family has its own number of prefix tokens; ``vit_mae`` shuffles and drops patches even in evaluation, so
it is not among the known types; weights that a file lacks would be drawn silently.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.frozen.inputs import DEPTH_AS, IMAGENET, square_depth, square_image
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options

__all__ = ["MEAN_STD", "load", "mean_std", "read_config"]

# model_type -> tokens before the patches.
PREFIX: dict[str, Callable] = {
    "deit": lambda config: 2,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "dinov3_vit": lambda config: 1 + config.num_register_tokens,
    "ijepa": lambda config: 0,
    "vit": lambda config: 1,
    "vit_msn": lambda config: 1,
}
RESIZE_ON_REQUEST = ("deit", "ijepa", "vit", "vit_msn")
# Parts of checkpoints that features do not need.
HEADS = ("classifier.", "cls_classifier.", "distillation_classifier.", "decoder.", "pooler.")
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
MEAN_STD = {
    "imagenet": IMAGENET,
    "half": HALF,
    "sim3d": ((0.445,), (0.269,)),  # the released code of ModMap, for grey images
    "none": ((0.0,), (1.0,)),
}


def load(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``transformers:ID_OR_FOLDER[?mean_std=][&depth_as=]``, or ``random:`` before it and ``seed=`` after it.

    Raises:
        ConfigError: the model is not a known Vision Transformer, is an export of this project, or has no known mean.
        DataError: the weights do not fit the model.
        ReportedError: the files cannot be read.
    """
    import transformers

    known = {"mean_std": ("file", *MEAN_STD)}
    if modality == "depth":
        known["depth_as"] = DEPTH_AS
    options = read_options(spec, known | ({"seed": (0,)} if spec.random else {}))
    config = read_config(spec)
    kind = config.model_type
    if kind not in PREFIX:
        raise ConfigError(f"encoder {spec.text}: model type {kind!r} is none of {', '.join(sorted(PREFIX))}")
    if hasattr(config, "dino_depth"):
        raise ConfigError(
            f"encoder {spec.text} is an export of dino-depth, with its own normalisation: leave out transformers:"
        )
    mean, std = mean_std(spec, options["mean_std"])
    if spec.random:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options["seed"])
            model = transformers.AutoModel.from_config(config)
    else:
        model = _load_weights(spec)
    model = model.float().eval().requires_grad_(False).to(device)
    prefix, channels, patch_size = PREFIX[kind](config), config.num_channels, config.patch_size
    arguments = {"interpolate_pos_encoding": True} if kind in RESIZE_ON_REQUEST else {}

    def to_input(view: np.ndarray | DepthMap, size: int, _matrix: np.ndarray | None) -> Tensor:
        if modality == "image":
            return square_image(view, channels, mean, std, size)
        return square_depth(view, options["depth_as"], channels, mean, std, size)

    def to_tokens(batch: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model(pixel_values=batch, **arguments).last_hidden_state
        rows, columns = (side // patch_size for side in batch.shape[-2:])
        return tokens[:, 0], tokens[:, prefix:].unflatten(1, (rows, columns))

    settings = {"family": "transformers", "version": transformers.__version__, "config": config.to_diff_dict()}
    settings |= {"modality": modality, "depth_as": options.get("depth_as"), "mean": list(mean), "std": list(std)}
    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=patch_size,
        dim=config.hidden_size,
        fingerprint=fingerprint(settings, model.state_dict()),
        device=device,
        to_input=to_input,
        to_features=lambda batch: to_tokens(batch)[1],
        to_tokens=to_tokens if prefix else None,
    )


def read_config(spec: Spec) -> Any:
    """The configuration of transformers that a name stands for.

    Raises:
        DataError, ReportedError: it cannot be read.
    """
    import transformers

    return _read(spec, lambda: transformers.AutoConfig.from_pretrained(spec.name))


def _load_weights(spec: Spec) -> torch.nn.Module:
    import transformers

    def read() -> tuple[torch.nn.Module, dict]:
        return transformers.AutoModel.from_pretrained(spec.name, output_loading_info=True, use_safetensors=True)

    transformers.utils.logging.disable_progress_bar()
    model, report = _read(spec, read)
    for fault, keys in report.items():
        # Entries are names, or tuples that begin with one.
        names = sorted(key if isinstance(key, str) else str(key[0]) for key in keys)
        names = [name for name in names if not name.startswith(HEADS)]
        if names:
            raise DataError(f"encoder {spec.text}: {fault}: {names[:3]} ({len(names)}): weights and config do not fit")
    return model


def mean_std(spec: Spec, choice: str) -> tuple[tuple, tuple]:
    """Mean and standard deviation of a network's input, of its file or as the option ``mean_std`` says.

    Raises:
        ConfigError: neither says them.
    """
    if choice != "file":
        return MEAN_STD[choice]
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(spec.name)
        if processor.get("do_normalize", True) is False:
            return MEAN_STD["none"]
        return tuple(processor["image_mean"]), tuple(processor["image_std"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            f"encoder {spec.text}: no mean and standard deviation in a preprocessor_config.json: "
            f"say ?mean_std= {' or '.join(MEAN_STD)}"
        ) from None


def _read(spec: Spec, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # noqa: BLE001 - besides its own errors the Hub client lets its HTTP library's through
        reason = " ".join(str(error).split())[:200]
        kind = DataError if Path(spec.name).exists() else ReportedError
        raise kind(f"encoder {spec.text}: cannot be read: {reason}") from None
