"""Checkpoints of a run: one atomic file that holds everything a restart needs, and nothing executable.

A file is ``checkpoints/step-00000300.pt``: tensors and plain numbers written by ``torch.save`` and read with
``weights_only``. Data order, crops, masks and dropped samples are functions of (seed, step), so no generator state is
stored.
"""

import contextlib
import fcntl
import os
import re
import socket
import zipfile
from logging import getLogger
from pathlib import Path

import torch

from dino_depth.config import PretrainConfig, load_config
from dino_depth.encoder import Encoder, load_encoder
from dino_depth.errors import ConfigError, DataError
from dino_depth.vit import DepthTransformer

__all__ = [
    "checkpoint_path",
    "checkpoints",
    "load",
    "load_backbone",
    "load_encoder_or_run",
    "load_run_encoder",
    "newest",
    "prune",
    "save",
]

log = getLogger("dino_depth")


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return Path(run) / "checkpoints" / f"step-{step:08d}.pt"


def checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = (Path(run) / "checkpoints").glob("step-*.pt")
    return sorted(path for path in found if re.fullmatch(r"step-\d{8,}\.pt", path.name))


def save(state: dict, path: Path):
    """Writes a checkpoint so that a crash at any moment leaves either the whole file or none.

    Raises:
        OSError: the file cannot be written; the disk is full, say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)  # says to prune that somebody is at it
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        # When a write fails, torch's zip writer raises an error of its own over the reason.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError):
            raise OSError(reason.errno, reason.strerror, str(path)) from None
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def prune(run: Path, keep: int):
    """Deletes all but the newest ``keep`` checkpoints and what a killed save left, but not what is being written."""
    for path in checkpoints(run)[:-keep]:
        path.unlink(missing_ok=True)
    for path in (Path(run) / "checkpoints").glob("*.tmp"):
        if _is_left(path):
            path.unlink(missing_ok=True)


def _is_left(path: Path) -> bool:
    """Whether nobody writes a file any more; where there are no locks, nobody knows."""
    try:
        with open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def load(path: Path) -> dict:
    """The state of a checkpoint, on the CPU.

    Raises:
        DataError: the file is missing, cut short, differs in a single bit from what was written, or is no checkpoint.
    """
    _check_sums(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever its unpickler meets
        raise DataError(f"{path}: unreadable checkpoint: damaged, or more than tensors and plain values") from error
    if not isinstance(state, dict) or not {"step", "teacher"} <= state.keys():
        raise DataError(f"{path}: not a checkpoint of dino-depth pretrain")
    return state


def _check_sums(path: Path):
    """Compares every part of the file with its checksum, which torch writes and never reads.

    Raises:
        DataError: says what is wrong.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except OSError as error:
        raise DataError(f"{path}: unreadable checkpoint: {error.strerror or error}") from error
    except Exception as error:  # zipfile raises whatever broken headers make its parts raise
        size = path.stat().st_size
        fault = f"{size} bytes that are no zip archive, cut short or damaged" if size else "the file is empty"
        raise DataError(f"{path}: unreadable checkpoint: {fault}") from error
    if damaged:
        raise DataError(f"{path}: unreadable checkpoint: {damaged} in it is damaged, its checksum differs")


def newest(run: Path) -> tuple[Path, dict] | None:
    """The newest checkpoint that can be read and its state; None where a run has none yet.

    A damaged one is warned of, and the one before it taken.

    Raises:
        DataError: there are checkpoints, and none of them can be read.
    """
    faults = []
    for path in reversed(checkpoints(run)):
        try:
            state = load(path)
        except DataError as error:
            faults.append(error)
            continue
        for fault in faults:
            log.warning("%s; an older checkpoint, %s, is taken instead", fault, path.name)
        return path, state
    if faults:
        raise DataError(f"{faults[0]}; none of {len(faults)} checkpoints can be read")
    return None


def load_run_encoder(run: Path, random_initialization: bool = False) -> Encoder:
    """The frozen teacher of a run's newest checkpoint.

    Args:
        random_initialization: instead, the same network as it was at step 0.

    Raises:
        ConfigError: ``run`` is no run folder or has no checkpoint yet.
        DataError: the checkpoint does not fit the run's configuration.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: no run folder (config.yaml is missing)")
    config = load_config(PretrainConfig, run / "config.yaml")
    torch.manual_seed(config.train.seed)
    backbone = DepthTransformer(config.model, config.crops.global_size)
    step = 0
    if not random_initialization:
        found = newest(run)
        if found is None:
            raise ConfigError(f"{run}: no checkpoint yet")
        path, state = found
        step = state["step"]
        load_backbone(backbone, state["teacher"], path)
    name = f"{run.name}, {'random initialisation' if random_initialization else f'step {step}'}"
    return Encoder(backbone, config.data.normalization, name, config.crops.global_size)


def load_encoder_or_run(source: str) -> Encoder:
    """The frozen encoder of a run folder, an exported folder or a Hub id."""
    return load_run_encoder(Path(source)) if (Path(source) / "config.yaml").is_file() else load_encoder(source)


def load_backbone(backbone: DepthTransformer, teacher: dict, source: Path):
    """Copies the ``backbone.`` part of a checkpoint's teacher into ``backbone``; every key must fit."""
    weights = {key.removeprefix("backbone."): value for key, value in teacher.items() if key.startswith("backbone.")}
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise DataError(f"{source}: {' '.join(str(error).split())[:300]}") from error
