"""Fitted heads in a folder by what they were fitted from, so that none is fitted twice.

    <sha256 of the identity>.pt     {"identity": see below, "state": what the head's state() gave}, by ``torch.save``

The identity is the head, those of its settings that ``fit`` reads, the seed, the training samples with their classes
and a sha256 of what the head reads of them, the kind of device, and the versions of this package and of torch. Settings
in the head's ``INFERENCE`` are no part of it, so runs that differ in those only share a fit.

    <the same>.lock                 locked while a process fits the head

Any number of processes may use a folder; one of them fits a head, and the others wait for it. A file is whole or
absent; one that was damaged later is fitted again.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from logging import getLogger
from pathlib import Path
from typing import Any

import torch

from dino_depth import __version__
from dino_depth.anomaly.heads import Context
from dino_depth.anomaly.resume import write_state
from dino_depth.anomaly.views import Views
from dino_depth.errors import ReportedError
from dino_depth.lock import EXCLUSIVE, locked

__all__ = ["fitted_head"]

log = getLogger("dino_depth")


def fitted_head(
    method: Any, folder: str | Path, settings: Any, context: Context, train: Sequence[Views], *, wait: bool = True
) -> tuple[Any, int]:
    """A fitted head, from the folder where it is there, and the number of fits that took: 0 or 1.

    Both ways give the same bits; so does a fit that goes on from the checkpoint of a killed one.

    Args:
        method: module of the head, see ``heads/__init__.py``.
        settings: its configuration.
        context: whose ``checkpoint`` is chosen here.
        wait: for a process that fits the same head.

    Raises:
        Busy: there is such a process, and ``wait`` is False.
        ConfigError, DataError: as ``fit`` and ``from_state``.
        ReportedError: the folder cannot be read or written.
    """
    read = {key: value for key, value in asdict(settings).items() if key not in method.INFERENCE}
    needs = method.needs(settings)
    identity = {
        "head": method.__name__.rpartition(".")[2],
        "settings": read,
        "seed": context.seed,
        "samples": [views.place for views in train],
        "classes": [views.class_index for views in train],
        "content": [views.digest(needs) for views in train],
        "device": context.device.type,
        "versions": [__version__, torch.__version__],
    }
    text = json.dumps(identity, sort_keys=True)
    path = Path(folder) / f"{hashlib.sha256(text.encode()).hexdigest()}.pt"
    try:
        state, fits = _load(path, text), 0
        if state is None:
            patience = math.inf if wait else 0
            with locked(
                path.with_suffix(".lock"), EXCLUSIVE, f"{path}: another process fits this head", False, patience
            ):
                state = _load(path, text)  # another process may have been quicker
                if state is None:
                    checkpoint = path.with_suffix(".checkpoint")
                    head, fits = method.fit(train, settings, replace(context, checkpoint=checkpoint)), 1
                    write_state(path, {"identity": text, "state": head.state()})
                    for left in path.parent.glob(f"{path.stem}.*"):
                        if left != path and not left.name.endswith(".part"):
                            left.unlink(missing_ok=True)
    except OSError as error:
        raise ReportedError(f"{path}: {error.strerror or error}; head.cache names another folder") from error
    if not fits:
        head = method.from_state(state | {"config": asdict(settings)}, context.device)
    return head, fits


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
