"""Vision Transformers of timm by its names: pretrained, ``local-dir:FOLDER`` or ``hf-hub:OWNER/NAME``. See ``timm_cnn``
for other networks.

timm knows the mean and standard deviation of each model's input. Trap: models that average their patches, such as
MAE's, have their final norm behind that average; here it is applied to every patch.
"""

import numpy as np
import torch
from torch import Tensor, nn

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, ReportedError
from dino_depth.frozen import timm_cnn
from dino_depth.frozen.inputs import DEPTH_AS, square_depth, square_image
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options

__all__ = ["create", "load"]


def load(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``timm:NAME[?depth_as=]`` with pretrained weights, or ``random:timm:NAME[?seed=]``.

    Raises:
        ConfigError: timm has no such model, or it is no plain Vision Transformer, or an export of this project.
        ReportedError: the weights cannot be read.
    """
    import timm

    if spec.options.keys() & {"layers", "blocks"}:
        return timm_cnn.load(spec, modality, device)
    known = {"depth_as": DEPTH_AS} if modality == "depth" else {}
    options = read_options(spec, known | ({"seed": (0,)} if spec.random else {}))
    model = create(spec, options.get("seed", 0))
    if model.pretrained_cfg.get("tag") == "dino_depth":
        raise ConfigError(
            f"encoder {spec.text} is an export of dino-depth, with its own normalisation: name the exported folder"
        )
    model = model.float().eval().requires_grad_(False).to(device)
    (patch_size, width), channels = model.patch_embed.patch_size, model.patch_embed.proj.in_channels
    if patch_size != width:
        raise ConfigError(f"encoder {spec.text}: patches of {patch_size}x{width} pixels are not square")
    data_config = timm.data.resolve_model_data_config(model)
    # timm means the average of three channels where it gives three numbers for one.
    mean, std = (list(data_config[key]) for key in ("mean", "std"))
    if channels == 1:
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]

    def to_input(view: np.ndarray | DepthMap, size: int, _matrix: np.ndarray | None) -> Tensor:
        if modality == "image":
            return square_image(view, channels, mean, std, size)
        return square_depth(view, options["depth_as"], channels, mean, std, size)

    def to_tokens(batch: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model.forward_features(batch)
        if isinstance(model.norm, nn.Identity):
            tokens = model.fc_norm(tokens)
        rows, columns = (side // patch_size for side in batch.shape[-2:])
        return tokens[:, 0], tokens[:, model.num_prefix_tokens :].unflatten(1, (rows, columns))

    settings = {"family": "timm", "version": timm.__version__, "name": spec.name, "modality": modality}
    settings |= {"depth_as": options.get("depth_as"), "mean": mean, "std": std}
    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=patch_size,
        dim=model.num_features,
        fingerprint=fingerprint(settings, model.state_dict()),
        device=device,
        to_input=to_input,
        to_features=lambda batch: to_tokens(batch)[1],
        to_tokens=to_tokens if getattr(model, "cls_token", None) is not None else None,
    )


def create(spec: Spec, seed: int = 0) -> nn.Module:
    """The Vision Transformer of timm that a name stands for, without its classifier.

    Raises:
        ConfigError: timm has no such model, or it is no plain Vision Transformer.
        ReportedError: the weights cannot be read.
    """
    import timm

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(spec.name, pretrained=not spec.random, num_classes=0, dynamic_img_size=True)
    except TypeError:
        model = None
    except Exception as error:  # noqa: BLE001 - besides its own errors the Hub client lets its HTTP library's through
        reason = " ".join(str(error).split())[:200]
        kind = ConfigError if reason.startswith(("Unknown model", "Invalid pretrained tag")) else ReportedError
        raise kind(f"encoder {spec.text}: timm cannot make it: {reason}") from None
    parts = ("patch_embed", "num_prefix_tokens", "norm", "fc_norm", "forward_features")
    if model is None or not all(hasattr(model, part) for part in parts):
        raise ConfigError(
            f"encoder {spec.text}: not a Vision Transformer with square patches that takes any input size; of a "
            "convolutional network name the layers, ?layers=2-3"
        )
    return model
