"""Fitted heads in a folder by what they were fitted from, so that none is fitted twice.

    <sha256 of the identity>.pt     {"identity": see below, "state": what the head's state() gave}, by ``torch.save``

The identity is the head, those of its settings that ``fit`` reads, the seed, the training samples with their classes
and a sha256 of their features, the kind of device, and the versions of this package and of torch. Settings in the
head's ``INFERENCE`` are no part of it, so runs that differ in those only share a fit.

Any number of processes may use a folder. A file is whole or absent; one that was damaged later is fitted again.
"""

import hashlib
import io
import json
import os
import socket
from dataclasses import asdict, dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from dino_depth import __version__
from dino_depth.anomaly.features import SampleFeatures
from dino_depth.errors import ReportedError

__all__ = ["Training", "fitted_head"]

log = getLogger("dino_depth")


@dataclass(frozen=True, eq=False)
class Training:
    """What a head is fitted on: the names, features and class indices of the training samples."""

    names: list[str]
    features: list[SampleFeatures]
    classes: list[int]


def fitted_head(
    method: Any, folder: str | Path, settings: Any, seed: int, device: torch.device, training: Training
) -> tuple[Any, int]:
    """A fitted head, from the folder where it is there, and the number of fits that took: 0 or 1.

    Both ways give the same bits.

    Args:
        method: module of the head, see ``heads/__init__.py``.
        settings: its configuration.

    Raises:
        ConfigError, DataError: as ``fit`` and ``from_state``.
        ReportedError: the folder cannot be read or written.
    """
    read = {key: value for key, value in asdict(settings).items() if key not in method.INFERENCE}
    identity = {
        "head": type(settings).__name__.removesuffix("Config"),
        "settings": read,
        "seed": seed,
        "samples": training.names,
        "classes": training.classes,
        "features": _digest(training.features),
        "device": device.type,
        "versions": [__version__, torch.__version__],
    }
    text = json.dumps(identity, sort_keys=True)
    path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()}.pt"
    try:
        state = _load(path, text)
        if state is not None:
            return method.from_state(state | {"config": asdict(settings)}, device), 0
        head = method.fit(training.features, settings, seed, device, classes=training.classes)
        _save({"identity": text, "state": head.state()}, path)
    except OSError as error:
        raise ReportedError(f"{path}: {error.strerror or error}; head.cache names another folder") from error
    return head, 1


def _digest(features: list[SampleFeatures]) -> str:
    digest = hashlib.sha256()
    for sample in features:
        for part in (sample.image, sample.depth, sample.share):
            digest.update(f"{tuple(part.shape)} {part.dtype} ".encode())
            digest.update(part.contiguous().numpy())
    return digest.hexdigest()


def _load(path: Path, identity: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["identity"] == identity:
            return content["state"]
    except OSError:
        raise
    except Exception as error:  # torch raises whatever its zip reader and unpickler meet
        log.debug("%s: %s", path, error)
    log.warning("%s is damaged: its head is fitted again", path)
    return None


def _save(content: dict[str, Any], path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    # Jobs of an array may fit the same head at the same time.
    partial = path.with_name(f"{path.stem}.{socket.gethostname()}.{os.getpid()}.part")
    buffer = io.BytesIO()  # torch's own writer hides why a file cannot be written
    torch.save(content, buffer)
    try:
        with open(partial, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
