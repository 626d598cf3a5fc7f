"""The manifest of a shard folder: what it holds, from what, made how. Its bytes depend on nothing else."""

import hashlib
import json
import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL
from PIL import features

from dino_depth.errors import DataError

__all__ = [
    "FORMAT", "MANIFEST", "VERSION", "config_differences", "count", "digest_file", "digest_json", "file_fault",
    "library_versions", "read_manifest", "sync_folder", "temporary_name", "verify_files", "write_json",
]  # fmt: skip

MANIFEST = "manifest.json"
FORMAT = "dino-depth shards"
VERSION = 2
KEYS = {
    "format": str, "version": int, "sources": dict, "config": dict, "config_hash": str, "versions": dict,
    "total": int, "counts": dict, "shards": list,
}  # fmt: skip
SOURCE_KEYS = {"reader": str, "licence": str, "synthetic": bool, "files_listed": dict, "maps": int, "scenes": int,
               "dropped": list}  # fmt: skip
SHARD_KEYS = {"file": str, "sha256": str, "bytes": int, "samples": int}

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
    """Nested sample counts of (dataset, category, split, label), in sorted order."""
    counts: Counts = {}
    for dataset, category, split, label in sorted(samples):
        labels = counts.setdefault(dataset, {}).setdefault(category, {}).setdefault(split, {})
        labels[label] = labels.get(label, 0) + 1
    return counts


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
    """Writes a JSON file that exists either whole or not at all; ``scratch`` is a folder on the same file system."""
    temporary = scratch / temporary_name(path.name)
    with open(temporary, "wb") as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def read_manifest(folder: Path) -> dict:
    """The manifest of a shard folder.

    Raises:
        DataError: there is none, or it is not a manifest of this version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{folder} has no {MANIFEST}: it is no shard folder, or `prep` did not finish") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of {FORMAT}")
    if manifest.get("version") != VERSION:
        raise DataError(f"{path} has version {manifest.get('version')!r}, this program reads {VERSION}")
    _check_types(manifest, KEYS, str(path))
    for name, source in manifest["sources"].items():
        if not isinstance(source, dict):
            raise DataError(f"{path}: sources.{name} is no object")
        _check_types(source, SOURCE_KEYS, f"{path}: sources.{name}")
    for index, shard in enumerate(manifest["shards"]):
        if not isinstance(shard, dict):
            raise DataError(f"{path}: shards[{index}] is no object")
        _check_types(shard, SHARD_KEYS, f"{path}: shards[{index}]")
        if shard["file"] != os.path.basename(shard["file"]):
            raise DataError(f"{path}: shards[{index}].file must be a plain name, got {shard['file']!r}")
    return manifest


def _check_types(value: dict, keys: dict[str, type], where: str):
    for key, kind in keys.items():
        if not isinstance(value.get(key), kind):
            raise DataError(f"{where}: {key} must be of type {kind.__name__}, got {value.get(key)!r}")


def verify_files(folder: Path, manifest: dict):
    """Compares the shard files with the manifest.

    Raises:
        DataError: a shard is missing, extra, of another size or of other content.
    """
    listed = {shard["file"]: shard for shard in manifest["shards"]}
    for name in sorted({path.name for path in folder.glob("*.tar")} - listed.keys()):
        raise DataError(f"{folder / name} is not in {MANIFEST}")
    for name, shard in listed.items():
        fault = file_fault(folder / name, shard)
        if fault:
            raise DataError(f"{folder / name}: {fault}")


def file_fault(path: Path, shard: dict) -> str:
    """What is wrong with a shard's file compared with its manifest entry; empty where nothing is."""
    try:
        size = path.stat().st_size
        if size != shard["bytes"]:
            return f"{size} bytes, the manifest says {shard['bytes']}"
        return "" if digest_file(path) == shard["sha256"] else "its sha256 differs from the manifest's"
    except FileNotFoundError:
        return "the shard is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
