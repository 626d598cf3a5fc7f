"""The format of a folder of shards, for whoever writes or reads one: its names, its manifest, the samples in its tars.

    manifest.json         what the folder holds, from what, made how; written last
    depth-000000.tar      samples as WebDataset has them: KEY.depth.png and KEY.json, one beside the other
    index.safetensors     where each sample lies and what it is, see ``shard_index.py``

Where there are many shards, they lie in sub-folders of three digits.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dino_depth.errors import DataError
from dino_depth.storage import RemotePath

__all__ = ["FORMAT", "INVERSE_VERSION", "JSON", "MANIFEST", "PNG", "VERSION", "StoredSample", "parse_description",
           "read_manifest", "read_samples", "shard_file"]  # fmt: skip

MANIFEST = "manifest.json"
FORMAT = "dino-depth shards"
VERSION = 2
# Of shards whose codes are linear in inverse depth: a program that does not know them must not take them for depth.
INVERSE_VERSION = 3
PNG, JSON = "depth.png", "json"
FILES_IN_A_FOLDER = 5000  # the Hub takes 10,000, and refuses more
KEYS = {
    "format": str, "version": int, "sources": dict, "config": dict, "config_hash": str, "versions": dict,
    "total": int, "counts": dict, "shards": list,
}  # fmt: skip
SOURCE_KEYS = {"reader": str, "licence": str, "synthetic": bool, "files_listed": dict, "maps": int, "dropped": list}
FILE_KEYS = {"file": str, "sha256": str, "bytes": int}
# What a manifest names is opened: nothing that leads elsewhere, to another drive, or is hidden.
PLAIN_NAME = re.compile(r"(?:\d{3}/)?[A-Za-z0-9_-][A-Za-z0-9_.-]*", re.ASCII)


def shard_file(number: int, shards: int) -> str:
    """Name of a shard in its folder, which is to hold so many ``shards``."""
    name = f"depth-{number:06d}.tar"
    return name if shards <= FILES_IN_A_FOLDER else f"{number // FILES_IN_A_FOLDER:03d}/{name}"


def read_manifest(folder: Path | RemotePath) -> dict:
    """The manifest of a shard folder, every part of which has the type that readers count on.

    Raises:
        DataError: there is none, or it is not a manifest of a version that this program reads.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{folder} has no {MANIFEST}: it is no shard folder, or `prep` did not finish") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of {FORMAT}")
    if manifest.get("version") not in (VERSION, INVERSE_VERSION):
        known = f"{VERSION} and {INVERSE_VERSION}"
        raise DataError(f"{path} has version {manifest.get('version')!r}, this program reads {known}")
    _check_types(manifest, KEYS, f"{path}: ")
    for name, source in manifest["sources"].items():
        _check_types(source, SOURCE_KEYS, f"{path}: sources.{name}.")
    for place, row in enumerate(manifest["shards"]):
        _check_file(row, FILE_KEYS | {"samples": int}, f"{path}: shards[{place}].")
    if manifest.get("index") is not None:  # shards of before there was an index have none
        _check_file(manifest["index"], FILE_KEYS, f"{path}: index.")
    return manifest


def _check_types(value: Any, keys: dict[str, type], where: str):
    if not isinstance(value, dict):
        raise DataError(f"{where.rstrip('.')} is no object")
    for key, kind in keys.items():
        if type(value.get(key)) is not kind:  # true is no number here
            raise DataError(f"{where}{key} must be of type {kind.__name__}, got {value.get(key)!r}")


def _check_file(row: Any, keys: dict[str, type], where: str):
    _check_types(row, keys, where)
    if not PLAIN_NAME.fullmatch(row["file"]):
        raise DataError(f"{where}file must be a plain name in this folder, got {row['file']!r}")
    if not re.fullmatch("[0-9a-f]{64}", row["sha256"]):
        raise DataError(f"{where}sha256 must be 64 hexadecimal digits, got {row['sha256']!r}")
    for key, kind in keys.items():
        if kind is int and row[key] < 0:
            raise DataError(f"{where}{key} must not be negative, got {row[key]}")


@dataclass(frozen=True)
class StoredSample:
    """Where a sample lies in its tar.

    Attributes:
        key: its name.
        png: offset and size of its depth PNG, bytes.
        json: of its description.
    """

    key: str
    png: tuple[int, int]
    json: tuple[int, int]


def read_samples(file: BinaryIO, expected: int) -> Iterator[StoredSample]:
    """The samples of a shard in their order, of which only the headers are read; ``file`` is at its beginning.

    Raises:
        DataError: the tar is broken or cut short, holds anything but pairs of a depth PNG and its description, or not
            the ``expected`` number of them. The reason does not name the file.
    """
    key, members, count = "", {}, 0

    def last() -> str:
        return f"sample {key or '(none)'}"

    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")  # as WebDataset parts them
                this = f"{folder}/{stem}" if folder else stem
                if not (member.isreg() and stem and dot):
                    raise DataError(f"unexpected member {member.name} after {last()}")
                if members and this != key:
                    raise DataError(f"{last()}: {_alone(members)}")
                if suffix not in (PNG, JSON) or suffix in members:
                    fault = "two members" if suffix in members else "unexpected member"
                    raise DataError(f"sample {this}: {fault} {suffix}")
                key, members[suffix] = this, (member.offset_data, member.size)
                if len(members) == 2:
                    yield StoredSample(key, members[PNG], members[JSON])
                    members, count = {}, count + 1
                tar.members = []  # it remembers every header; nobody asks for them again
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise DataError(f"broken tar after {last()}: {error}") from error
    if members:
        raise DataError(f"{last()}: {_alone(members)}")
    if count != expected:
        raise DataError(f"{count} samples, the manifest says {expected}; the last is {key or '(none)'}")


def _alone(members: dict[str, Any]) -> str:
    return f"{JSON} is missing" if PNG in members else f"{PNG} is missing"


def parse_description(content: bytes) -> dict[str, Any]:
    """The description of a sample.

    Raises:
        DataError: it is no JSON object.
    """
    try:
        description = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{JSON} cannot be read: {error}") from None
    if not isinstance(description, dict):
        raise DataError(f"{JSON} is no object")
    return description
