"""A folder that holds plain values and tensors: JSON and safetensors, nothing that could run code.

    model.json           the values; a tensor or array among them is {"$tensor": its key}, a tuple {"$tuple": [...]}
    state.safetensors    the tensors; its sha256 is in model.json

model.json is written last and in one step: a folder without it is no model.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dino_depth.errors import DataError

__all__ = ["FORMAT", "MODEL", "file_sha256", "read_folder", "replace_values", "write_folder"]

FORMAT = 1
MODEL, STATE = "model.json", "state.safetensors"
TENSOR, ARRAY, TUPLE = "$tensor", "$array", "$tuple"


def write_folder(folder: Path, values: dict[str, Any]):
    """Writes a folder; ``values`` may hold tensors, arrays, tuples, lists and dictionaries of strings anywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    plain = _flattened(values, "", tensors)
    partial = folder / f"{STATE}.tmp"
    save_file(tensors, partial)
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, folder / STATE)
    replace_values(folder, {"format": FORMAT, "state_sha256": file_sha256(folder / STATE), **plain})


def replace_values(folder: Path, plain: dict[str, Any]):
    """Writes model.json anew, in one step."""
    partial = folder / f"{MODEL}.tmp"
    with open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(plain, indent=1, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / MODEL)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``write_folder`` was given, and model.json as it stands.

    Raises:
        DataError: it is no model, of another format, or a file is missing, truncated or was changed.
    """
    path, state = folder / MODEL, folder / STATE
    if not path.is_file():
        raise DataError(f"{folder} is no model: no {MODEL} in it")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            found = plain.get("format") if isinstance(plain, dict) else type(plain).__name__
            raise DataError(f"{path}: format is {found!r}, this version reads {FORMAT}")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not state.is_file():
        raise DataError(f"{state} is missing")
    if (found := file_sha256(state)) != plain.get("state_sha256"):
        raise DataError(
            f"{state}: truncated or changed: its sha256 is {found[:12]}..., that of the model's was another"
        )
    try:
        return _restored(plain, load_file(state)), plain
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder}: cannot be read: {type(error).__name__} {error}") from error


def file_sha256(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flattened(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor | np.ndarray):
        key = place.removeprefix("/")
        array = isinstance(value, np.ndarray)
        # A copy, as safetensors refuses tensors that share their memory.
        tensors[key] = (
            torch.from_numpy(np.ascontiguousarray(value)).clone()
            if array
            else value.detach().cpu().contiguous().clone()
        )
        return {ARRAY if array else TENSOR: key}
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str) or key.startswith("$") or "/" in key]:
            raise TypeError(f"{place}: the key {wrong[0]!r} cannot be kept as JSON")
        return {key: _flattened(part, f"{place}/{key}", tensors) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_flattened(part, f"{place}/{index}", tensors) for index, part in enumerate(value)]
        return {TUPLE: parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise TypeError(f"{place}: {type(value).__name__} cannot be kept as JSON")


def _restored(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {TENSOR}:
        return tensors[value[TENSOR]]
    if value.keys() == {ARRAY}:
        return tensors[value[ARRAY]].numpy()
    if value.keys() == {TUPLE}:
        return tuple(_restored(part, tensors) for part in value[TUPLE])
    return {key: _restored(part, tensors) for key, part in value.items()}
