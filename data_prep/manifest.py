"""Writing and verifying a shard folder's files, see ``dino_depth/shard_format.py``. Bytes depend on content alone."""

import hashlib
import json
import os
import re
import socket
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL
from PIL import features

from data_prep.workers import available_cores
from dino_depth.errors import DataError
from dino_depth.shard_format import MANIFEST
from dino_depth.storage import RemotePath

__all__ = [
    "config_differences", "count", "digest_file", "digest_json", "digest_list", "digest_pieces", "file_fault",
    "library_versions", "stored_shards", "sync_folder", "temporary_name", "verify_files", "write_file", "write_json",
]  # fmt: skip

Counts = dict[str, dict[str, dict[str, dict[str, int]]]]


def library_versions() -> dict[str, str]:
    """The libraries whose version may change a shard's bytes."""
    return {
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "libjpeg": features.version_feature("libjpeg_turbo") or str(features.version("jpg")),
        "imagecodecs": imagecodecs.__version__,
        "libdeflate": imagecodecs.deflate_version().removeprefix("libdeflate "),
    }


def count(samples: Iterable[tuple[str, str, str, str]]) -> Counts:
    """Nested sample counts of (dataset, category, split, label), or of their counter, in sorted order."""
    counts: Counts = {}
    for (dataset, category, split, label), number in sorted(Counter(samples).items()):
        counts.setdefault(dataset, {}).setdefault(category, {}).setdefault(split, {})[label] = number
    return counts


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_pieces(pieces: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of a content in pieces."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def digest_list(values: Iterable[Any]) -> str:
    """:func:`digest_json` of a list that need not be in memory."""
    texts = (json.dumps(value, sort_keys=True).encode() for value in values)
    return digest_pieces(chain([b"["], (b", " * (place > 0) + text for place, text in enumerate(texts)), [b"]"]))


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_differences(ours: dict, theirs: dict, prefix: str = "") -> list[str]:
    """One "key was X, now Y" for every value in which a folder's configuration ``theirs`` differs from ``ours``."""
    differences = []
    for key in sorted(ours.keys() | theirs.keys()):
        old, new = theirs.get(key), ours.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += config_differences(new, old, f"{prefix}{key}.")
        elif old != new:
            differences.append(f"{prefix}{key} was {old!r}, now {new!r}")
    return differences


def sync_folder(folder: Path):
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_name(name: str) -> str:
    """A name for an unfinished file that no other process uses, here or elsewhere, not even one that is dying."""
    return f"{name}.{socket.gethostname()}.{os.getpid()}.tmp"


def write_json(path: Path, value: Any, scratch: Path):
    """Writes a JSON file as :func:`write_file` does."""
    write_file(path, [json.dumps(value, indent=1).encode() + b"\n"], scratch)


def write_file(path: Path, pieces: Iterable[bytes | memoryview], scratch: Path):
    """Writes a file that exists either whole or not at all; ``scratch`` is a folder on the same file system."""
    temporary = scratch / temporary_name(path.name)
    with open(temporary, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def stored_shards(folder: Path | RemotePath) -> dict[str, int]:
    """Bytes of every tar in a shard folder and its sub-folders, by its name there."""
    found = _sizes(folder)
    for name in [name for name, size in found.items() if size is None and re.fullmatch(r"\d{3}", name)]:
        found |= {f"{name}/{inner}": size for inner, size in _sizes(folder / name).items()}
    return {name: size for name, size in found.items() if name.endswith(".tar") and size is not None}


def _sizes(folder: Path | RemotePath) -> dict[str, int | None]:
    if isinstance(folder, RemotePath):
        return folder.sizes()
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size if entry.is_file() else None for entry in entries}


def verify_files(folder: Path, manifest: dict):
    """Compares the shard files and their index with the manifest.

    Raises:
        DataError: a file is missing, extra, of another size or of other content.
    """
    listed = {row["file"]: row for row in [*manifest["shards"], *filter(None, [manifest.get("index")])]}
    for name in sorted(stored_shards(folder).keys() - listed.keys()):
        raise DataError(f"{folder / name} is not in {MANIFEST}")
    with ThreadPoolExecutor(available_cores()) as pool:
        faults = pool.map(lambda row: file_fault(folder / row["file"], row), listed.values())
        for name, fault in zip(listed, faults, strict=True):
            if fault:
                pool.shutdown(cancel_futures=True)
                raise DataError(f"{folder / name}: {fault}")


def file_fault(path: Path, shard: dict) -> str:
    """What is wrong with a shard's file compared with its manifest entry; empty where nothing is."""
    try:
        size = path.stat().st_size
        if size != shard["bytes"]:
            return f"{size} bytes, the manifest says {shard['bytes']}"
        return "" if digest_file(path) == shard["sha256"] else "its sha256 differs from the manifest's"
    except FileNotFoundError:
        return f"the {'shard' if path.suffix == '.tar' else 'index'} is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
