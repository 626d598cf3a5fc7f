"""Heads: from nominal instances to anomaly maps of any instance. A file here is a head, its name is the head's name.

A head module offers

    Config                                  a dataclass, the settings under ``head.<name>``
    INFERENCE                               the names of its fields that only ``score`` reads
    needs(config) -> frozenset              what it reads of an instance: see ``dino_depth.anomaly.views.NEEDS``
    title(config) -> str                    what tables call it
    check(config, facts)                    refuses everything that can be refused before anything is computed
    fit(train, config, context) -> head     from the training instances, a sequence of ``Views``
    score(head, views) -> maps              {name: (views, n, n)} of any n, float32, CPU, over the padded square
    from_state(state, device) -> head       from what ``head.state()`` gave: values and tensors, its ``config`` too

and may offer

    instance(head, views, maps) -> float    a score of the instance, or None where it is the maximum of the volume
    pairs(head, views, target) -> maps      {name: (sources, n, n)} for the report: a view's maps from each source
    health(head, views, maps) -> figures    {name: number} of a sound instance that the head was not fitted on
    verdict(config, figures) -> str         why results must not be believed, by the medians of ``health``; or empty;
                                            ``config.gates`` says whether the run is refused then, or goes on
    itself(head, views) -> maps             of a training instance, each view compared with the others as if it were new
    deviations(head, views) -> two lists    of each view the signed distance (height, width) from the training surface,
                                            metres, positive towards the camera, and where it is known, bool
    graph(head) -> maps(image, depth)       ``score`` of features (views, n, n, dim) of class 0 alone, in operations
                                            that ONNX has and with nothing drawn: for ``dino-depth export MODEL --onnx``

Larger means more anomalous. A head never masks, upsamples, thresholds, registers or projects, and never loads an
encoder: what all heads share happens before and after them. ``share`` tells a head which cells show the object at all,
so that the background does not become part of what it learns.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dino_depth.errors import ConfigError, DataError

__all__ = ["Context", "Facts", "check_features", "names", "open_head", "require"]


@dataclass(frozen=True)
class Context:
    """What a fit is given beside data and settings.

    Attributes:
        seed: of everything random.
        device: where to compute.
        checkpoint: a file that a fit of many minutes keeps its state in, to go on from after a kill; see
            ``dino_depth.anomaly.resume``. None keeps none.
    """

    seed: int
    device: torch.device
    checkpoint: Path | None = None


@dataclass(frozen=True)
class Facts:
    """What is known before anything is read.

    Attributes:
        encoders: modalities that an encoder is named for.
        layers: those of them whose encoder has layers; None while encoders are not loaded.
        views: of an instance.
        cameras: whether views have cameras.
        train: training instances of a class.
        classes: that one model serves.
    """

    encoders: frozenset[str]
    views: int
    cameras: bool
    train: int
    classes: int = 1
    layers: frozenset[str] | None = None


def names() -> list[str]:
    """The names of all heads."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def open_head(name: str) -> ModuleType:
    """The module of a head."""
    return importlib.import_module(f"{__name__}.{name}")


def require(name: str, needs: frozenset[str], facts: Facts):
    """Refuses a head whose needs cannot be met.

    Raises:
        ConfigError: an encoder, layers or cameras are missing.
    """
    for modality in ("image", "depth"):
        if modality in needs and modality not in facts.encoders:
            raise ConfigError(f"--encoder.{modality} is missing: {name} reads {modality} features")
    if "layers" in needs and facts.layers is not None and not needs & {"image", "depth"} <= facts.layers:
        missing = ", ".join(sorted((needs & {"image", "depth"}) - facts.layers))
        raise ConfigError(f"{name} reads layers of a convolutional network: --encoder.{missing} has none")
    if "geometry" in needs and not facts.cameras:
        raise ConfigError(f"{name} needs calibrated views: this benchmark has none")


def check_features(features: Any, place: str, dims: tuple[int, int] | None = None):
    """Refuses features that no head can use.

    Args:
        features: ``Views`` or ``SampleFeatures``.
        place: what the message says they are.
        dims: numbers of image and depth channels the head was fitted on.

    Raises:
        DataError: shapes that disagree, other channels than ``dims``, no view at all, NaN or infinity.
    """
    image, depth, share = features.image, features.depth, features.share
    shapes = ", ".join(str(tuple(part.shape)) for part in (image, depth, share))
    if image.ndim != 4 or depth.ndim != 4 or not image.shape[:3] == depth.shape[:3] == share.shape:
        raise DataError(f"{place}: image, depth and share must agree in views, rows and columns, got {shapes}")
    if share.numel() == 0:
        raise DataError(f"{place}: no view or no cell, shapes {shapes}")
    if dims is not None and (image.shape[3], depth.shape[3]) != tuple(dims):
        found = f"{image.shape[3]} image and {depth.shape[3]} depth channels"
        raise DataError(f"{place}: {found}, the head was fitted on {dims[0]} and {dims[1]}")
    for name, part in (("image features", image), ("depth features", depth), ("share", share)):
        if not part.sum().isfinite():  # one pass and no mask as large as the features
            view = next((at for at, values in enumerate(part) if not _finite(values)), None)
            if view is not None:
                raise DataError(f"{place}: {name} of view {view} hold NaN or infinity")


def check_train(train: Sequence[Any], name: str) -> tuple[int, int]:
    """Refuses training instances whose features no head can use; the channels of image and depth.

    Raises:
        DataError: there is none, or as ``check_features``.
    """
    if not train:
        raise DataError(f"{name}: no training sample")
    dims = train[0].image.shape[-1], train[0].depth.shape[-1]
    for place, sample in enumerate(train):
        check_features(sample, f"{name}: training sample {place}", dims)
    return dims


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
