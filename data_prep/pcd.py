"""Organised point clouds in the PCD 0.7 format of the Point Cloud Library: ascii, binary and LZF-compressed."""

import io
import re

import numpy as np

from data_prep.formats import LARGEST_MAP, check_shape, depth_decoder
from dino_depth.errors import DataError

__all__ = ["decode_pcd", "decompress_lzf"]

LONGEST_HEADER = 65536
LARGEST_POINT = 1024
TYPES = {(kind, size): f"<{kind.lower()}{size}" for kind in "FIU" for size in (1, 2, 4, 8) if (kind, size) != ("F", 1)}


def decode_pcd(content: bytes, axis: int = 2) -> np.ndarray:
    """The (height, width) coordinate of an organised cloud along ``axis``: 0 is x, 1 is y, 2 is z.

    Raises:
        DataError: not a complete PCD file, the cloud is not organised, or it has no such coordinate.
    """
    if not 0 <= axis <= 2:
        raise DataError(f"a point has the coordinates 0, 1 and 2, not {axis}")
    return depth_decoder("PCD")(_decode)(content, "xyz"[axis])


def _decode(content: bytes, coordinate: str) -> np.ndarray:
    header, encoding, start = _header(content)
    names, kinds = header["FIELDS"], header["TYPE"]
    sizes, counts = _integers(header, "SIZE"), _integers(header, "COUNT", "1 " * len(names))
    if not len(names) == len(kinds) == len(sizes) == len(counts):
        raise DataError("FIELDS, SIZE, TYPE and COUNT differ in length")
    (width,), (height,) = _integers(header, "WIDTH"), _integers(header, "HEIGHT")
    if height < 2:
        raise DataError(f"the cloud is not organised: {width}x{height} points have no pixel grid")
    check_shape((height, width))
    points = width * height
    if points > LARGEST_MAP or _integers(header, "POINTS", str(points)) != [points]:
        raise DataError(f"POINTS {header['POINTS']} differs from {width}x{height} or is too many")
    widths = [size * count for size, count in zip(sizes, counts, strict=True)]
    if not 0 < min(widths) <= sum(widths) <= LARGEST_POINT:
        raise DataError(f"impossible SIZE {sizes} or COUNT {counts}")
    if coordinate not in names:
        raise DataError(f"no field {coordinate} among {' '.join(names)}")
    column = names.index(coordinate)
    dtype = TYPES.get((kinds[column], sizes[column]))
    if dtype is None or counts[column] != 1:
        raise DataError(f"field {coordinate} has an unknown type {kinds[column]}{sizes[column]}")
    body = content[start:]
    if encoding == "ascii":
        if not body.strip():
            raise DataError("cut short: no points")
        text = io.StringIO(body.decode("ascii"))
        values = np.loadtxt(text, np.float64, usecols=sum(counts[:column]), ndmin=1)
        if len(values) != points:
            raise DataError(f"{len(values)} points, the header says {points}")
        return values.reshape(height, width)
    before = sum(widths[:column])
    if encoding == "binary":
        if len(body) < points * sum(widths):
            raise DataError(f"cut short: {len(body)} of {points * sum(widths)} bytes of points")
        records = np.frombuffer(body, np.uint8, points * sum(widths)).reshape(points, sum(widths))
        column_bytes = np.ascontiguousarray(records[:, before : before + widths[column]])
        return column_bytes.view(dtype).reshape(height, width)
    # Compressed clouds store one field after the other, so the fields behind this one need not be decompressed.
    compressed, total = (int(value) for value in np.frombuffer(body, "<u4", 2))
    if total != points * sum(widths):
        raise DataError(f"{total} bytes decompressed, expected {points * sum(widths)}")
    if len(body) - 8 < compressed:
        raise DataError(f"cut short: {len(body) - 8} of {compressed} compressed bytes")
    needed = points * (before + widths[column])
    plain = decompress_lzf(body[8 : 8 + compressed], needed)
    return np.frombuffer(plain, dtype, points, points * before).reshape(height, width)


def _header(content: bytes) -> tuple[dict[str, list[str]], str, int]:
    """The header's lines by keyword, the encoding, and where the points start."""
    end = re.search(rb"^DATA[ \t]+(ascii|binary_compressed|binary)[ \t]*\r?\n", content[:LONGEST_HEADER], re.M)
    if end is None:
        raise DataError("not a PCD file: no DATA line")
    lines = [line.split() for line in content[: end.start()].decode("ascii").splitlines()]
    header = {line[0]: line[1:] for line in lines if line and not line[0].startswith("#")}
    absent = [key for key in ("FIELDS", "SIZE", "TYPE", "WIDTH", "HEIGHT") if not header.get(key)]
    if absent:
        raise DataError(f"the PCD header lacks {', '.join(absent)}")
    return header, end.group(1).decode(), end.end()


def _integers(header: dict[str, list[str]], key: str, default: str = "") -> list[int]:
    words = header.setdefault(key, default.split())
    if not all(re.fullmatch(r"\d{1,9}", word) for word in words):
        raise DataError(f"{key} {' '.join(words)} must be whole numbers")
    return [int(word) for word in words]


def decompress_lzf(compressed: bytes, length: int) -> bytearray:
    """The first ``length`` bytes of LZF data.

    A control byte below 32 announces that many plus one literal bytes. Any other holds a match's length in its high
    three bits (7: one more byte is added) and, with the byte after it, how far back the match starts.

    Raises:
        DataError: the data end early or a match starts before the beginning.
    """
    plain = bytearray()
    position, end = 0, len(compressed)
    while len(plain) < length:
        if position >= end:
            raise DataError(f"LZF data end after {len(plain)} of {length} bytes")
        control = compressed[position]
        position += 1
        if control < 32:
            literal = compressed[position : position + control + 1]
            if len(literal) != control + 1:
                raise DataError("LZF data end within a literal")
            plain += literal
            position += control + 1
            continue
        count = control >> 5
        if position + (count == 7) >= end:
            raise DataError("LZF data end within a match")
        if count == 7:
            count += compressed[position]
            position += 1
        count += 2
        start = len(plain) - ((control & 31) << 8 | compressed[position]) - 1
        position += 1
        if start < 0:
            raise DataError("an LZF match starts before the data")
        match = plain[start : start + count]
        # A match may run into what it writes: then it repeats.
        plain += match if len(match) == count else (match * (count // len(match) + 1))[:count]
    del plain[length:]
    return plain
