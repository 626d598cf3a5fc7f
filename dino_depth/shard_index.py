"""The index of a shard folder: a row for every sample, in columns that any number of processes map into memory.

A file of the safetensors format, whose columns can be used where they lie: opening one of ten million samples reads a
few hundred bytes, and processes on one machine share its pages. Its columns, each of one value a sample::

    shard                             number of its row in the manifest
    png, png_size, json, json_size    where its two members lie in that tar, bytes
    dataset, category, split, label   places in the lists of names that the file's metadata hold
    scene                             64-bit checksum of (dataset, category, group), one for each scene; 0: none
    key_ends, keys                    where its key ends in the text of all keys

Everything else stands in a sample's own description, in the tar.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dino_depth.errors import DataError
from dino_depth.shard_format import StoredSample, parse_description, read_samples

__all__ = ["INDEX", "NAMES", "SampleIndex", "index_shard"]

INDEX = "index.safetensors"
NAMES = ("dataset", "category", "split", "label")
COLUMNS = {  # in the order in which safetensors writes them
    "scene": "U64", "json": "I64", "key_ends": "I64", "png": "I64", "category": "I32", "dataset": "I32",
    "json_size": "I32", "label": "I32", "png_size": "I32", "shard": "I32", "split": "I32", "keys": "U8",
}  # fmt: skip
TYPES = {"I64": np.int64, "U64": np.uint64, "I32": np.int32, "U8": np.uint8}
LONGEST_HEADER = 2**28


class SampleIndex:
    """The rows of an index.

    Attributes:
        columns: see above.
        names: of each of ``NAMES`` what its column counts.
    """

    def __init__(self, columns: dict[str, np.ndarray], names: dict[str, list[str]]):
        self.columns, self.names = columns, names

    def __len__(self) -> int:
        return len(self.columns["shard"])

    def key(self, row: int) -> str:
        ends = self.columns["key_ends"]
        return self.columns["keys"][int(ends[row - 1]) if row else 0 : int(ends[row])].tobytes().decode()

    @classmethod
    def of(cls, samples: Iterable[tuple[StoredSample, dict[str, Any]]], shard: int = 0) -> "SampleIndex":
        """Of samples of one shard and their descriptions.

        Raises:
            DataError: a description lacks one of ``NAMES``, or a key is not UTF-8.
        """
        names: dict[str, dict[str, int]] = {name: {} for name in NAMES}
        rows: dict[str, list[int]] = {column: [] for column in COLUMNS if column not in ("keys", "shard")}
        keys = bytearray()
        for sample, description in samples:
            for name, known in names.items():
                if not isinstance(value := description.get(name), str):
                    raise DataError(f"sample {sample.key}: json: {name} is {value!r}, expected text")
                rows[name].append(known.setdefault(value, len(known)))
            rows["scene"].append(_scene(description))
            for member, place in (("png", sample.png), ("json", sample.json)):
                rows[member].append(place[0])
                rows[f"{member}_size"].append(place[1])
            try:
                keys += sample.key.encode()
            except UnicodeEncodeError:
                raise DataError(f"sample {sample.key!r}: its key is not UTF-8") from None
            rows["key_ends"].append(len(keys))
        columns = {column: np.array(values, TYPES[COLUMNS[column]]) for column, values in rows.items()}
        columns["shard"] = np.full(len(columns["png"]), shard, np.int32)
        columns["keys"] = np.frombuffer(bytes(keys), np.uint8)
        return cls(columns, {name: [*known] for name, known in names.items()})

    @classmethod
    def join(cls, parts: Iterable["SampleIndex"]) -> "SampleIndex":
        """The rows of all parts, one after the other, whose shards are numbered by their place among the parts.

        Parts are copied one by one: each that is mapped holds a file open, and a process may have a thousand.
        """
        known: dict[str, dict[str, int]] = {name: {} for name in NAMES}
        columns = {column: bytearray() for column in COLUMNS}
        length = 0
        for number, part in enumerate(parts):
            for column, values in part.columns.items():
                if column in NAMES:
                    words = [known[column].setdefault(word, len(known[column])) for word in part.names[column]]
                    values = np.array(words, np.int32)[values] if words else values
                elif column == "key_ends":
                    values = values + length
                elif column == "shard":
                    values = np.full(len(values), number, np.int32)
                columns[column] += np.ascontiguousarray(values, TYPES[COLUMNS[column]]).data
            length += len(part.columns["keys"])
        joined = {column: np.frombuffer(columns[column], TYPES[kind]) for column, kind in COLUMNS.items()}
        names = {name: sorted(words) for name, words in known.items()}
        for name, words in known.items():
            places = {word: place for place, word in enumerate(names[name])}
            if words:
                joined[name] = np.array([places[word] for word in words], np.int32)[joined[name]]
        return cls(joined, names)

    def pieces(self) -> list[bytes | memoryview]:
        """The file's content in pieces, which is the same for the same rows.

        As safetensors writes it, which would copy all columns twice: ten million rows are a gigabyte.
        """
        header: dict[str, Any] = {"__metadata__": {"names": json.dumps(self.names)}}
        end, written = 0, []
        for column, kind in COLUMNS.items():
            values = np.ascontiguousarray(self.columns[column], TYPES[kind])
            start, end = end, end + values.nbytes
            header[column] = {"dtype": kind, "shape": [len(values)], "data_offsets": [start, end]}
            written.append(values.data)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return [len(text).to_bytes(8, "little"), text, *written]

    @classmethod
    def open(cls, file: BinaryIO) -> "SampleIndex":
        """Maps an index into memory; ``file`` may be closed afterwards.

        Raises:
            DataError: the file is no index, or cut short. The reason does not name the file.
        """
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise DataError(f"no index: {size} bytes")
        content = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(content[:8], "little")
        try:
            if start > min(size, LONGEST_HEADER):
                raise ValueError(f"a header of {start - 8} bytes")
            header = json.loads(content[8:start])
            names = json.loads(header.pop("__metadata__")["names"])
            columns = {
                column: _column(content, start, header[column], kind, column) for column, kind in COLUMNS.items()
            }
            _check_lengths(columns)
            for name in NAMES:
                if not (isinstance(names[name], list) and all(isinstance(word, str) for word in names[name])):
                    raise ValueError(f"its names of {name} are no list of text")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"no index: {type(error).__name__}: {error}") from None
        return cls(columns, names)


def _column(content: mmap.mmap, start: int, entry: dict, kind: str, name: str) -> np.ndarray:
    begin, end = entry["data_offsets"]
    (length,) = entry["shape"]
    if entry["dtype"] != kind or not 0 <= begin <= end <= len(content) - start:
        raise ValueError(f"its column {name} is {entry}")
    if end - begin != length * np.dtype(TYPES[kind]).itemsize:
        raise ValueError(f"its column {name} is {entry}")
    return np.frombuffer(content, TYPES[kind], length, start + begin)


def _check_lengths(columns: dict[str, np.ndarray]):
    lengths = {name: len(values) for name, values in columns.items() if name != "keys"}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"its columns are of several lengths: {lengths}")
    total = int(columns["key_ends"][-1]) if lengths["key_ends"] else 0
    if total != len(columns["keys"]):
        raise ValueError(f"its keys take {len(columns['keys'])} bytes, the last ends at {total}")


def _scene(description: dict[str, Any]) -> int:
    group = description.get("group")
    if group is None:
        return 0
    place = json.dumps([description["dataset"], description["category"], group]).encode()
    return int.from_bytes(hashlib.blake2b(place, digest_size=8).digest(), "little") or 1


def index_shard(file: BinaryIO, expected: int, shard: int = 0) -> SampleIndex:
    """Index of one tar of so many ``expected`` samples, from its headers and descriptions.

    Raises:
        DataError: as :func:`read_samples` and :func:`parse_description` do. The reason does not name the file.
    """

    def described() -> Iterable[tuple[StoredSample, dict[str, Any]]]:
        for sample in read_samples(file, expected):
            try:
                # At an offset: the walk over the headers has the file's position.
                yield sample, parse_description(os.pread(file.fileno(), sample.json[1], sample.json[0]))
            except DataError as error:
                raise DataError(f"sample {sample.key}: {error}") from None

    return SampleIndex.of(described(), shard)


def read_index(path: Path) -> SampleIndex:
    """The index in a file."""
    with open(path, "rb") as file:
        return SampleIndex.open(file)
