"""Depth file formats to plain arrays. Files are untrusted: sizes are checked before memory is taken.

Every ``decode_*`` takes the bytes of a file and raises DataError, with a reason that names neither the file nor this
machine, on anything that is not a complete file of its format.
"""

import io
import logging
import re
import struct
import tempfile
from collections.abc import Callable
from functools import wraps
from math import prod

import numpy as np
import tifffile
from PIL import Image

from data_prep.archives import RawFile
from dino_depth.depth import read_codes
from dino_depth.errors import ConfigError, DataError

__all__ = [
    "check_shape",
    "decode_exr",
    "decode_image",
    "decode_npy",
    "decode_pgm",
    "decode_png",
    "decode_tiff",
    "decoder",
    "image_size",
]

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_MAP = 100_000_000
LARGEST_CHANNELS = 4

# What tifffile has to say about a broken file becomes the reason of the DataError.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def check_shape(shape: tuple[int, ...]):
    """Refuses what is no (height, width) or (height, width, few) or (few, height, width) array of a sane size."""
    if len(shape) not in (2, 3) or (len(shape) == 3 and min(shape[0], shape[2]) > LARGEST_CHANNELS):
        raise DataError(f"shape {tuple(shape)} is not (height, width) with or without channels")
    if min(shape) < 1 or prod(shape) > LARGEST_MAP * (LARGEST_CHANNELS if len(shape) == 3 else 1):
        raise DataError(f"shape {tuple(shape)} is empty or above {LARGEST_MAP // 10**6} megapixels")


def decoder(name: str):
    """Turns whatever a decoding library throws at broken bytes into one DataError."""

    def decorate(decode: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        @wraps(decode)
        def safe(*arguments) -> np.ndarray:
            try:
                return decode(*arguments)
            except DataError as error:
                raise DataError(_timeless(error)) from error
            except Exception as error:
                raise DataError(f"not a readable {name} file ({type(error).__name__}: {_timeless(error)})") from error

        return safe

    return decorate


def _timeless(error: Exception) -> str:
    """The first line of a message without memory addresses and absolute paths, which differ from run to run."""
    return re.sub(r" ?<[^<>]* at 0x[^<>]*>|(?<![^\s'])'?/\S*", "", (str(error).splitlines() or [""])[0])[:200].strip()


@decoder("PNG")
def decode_png(content: bytes) -> np.ndarray:
    """The (height, width) uint16 codes of a single-channel 16-bit PNG."""
    if content[:8] != PNG_SIGNATURE or content[12:16] != b"IHDR" or len(content) < 26:
        raise DataError("not a PNG file")
    width, height, bits, colour = struct.unpack(">IIBB", content[16:26])
    if bits != 16 or colour != 0:
        kind = {0: "grey", 2: "RGB", 3: "palette", 4: "grey with alpha", 6: "RGBA"}.get(colour, "unknown")
        raise DataError(f"not depth but a PNG of {bits}-bit {kind}: depth is 16-bit grey")
    check_shape((height, width))
    return read_codes(content)


@decoder("PGM")
def decode_pgm(content: bytes) -> np.ndarray:
    """The (height, width) uint16 values of a binary 16-bit PGM, most significant byte first."""
    header = re.match(rb"P5\s+(?:#[^\n]*\n\s*)*(\d{1,6})\s+(\d{1,6})\s+(\d{1,5})\s", content)
    if header is None:
        raise DataError("not a binary PGM file")
    width, height, largest = (int(value) for value in header.groups())
    if not 255 < largest < 65536:
        raise DataError(f"a PGM with maximum {largest} is not 16-bit depth")
    check_shape((height, width))
    pixels = content[header.end() :][: 2 * height * width]
    if len(pixels) < 2 * height * width:
        raise DataError(f"cut short: {len(pixels)} of {2 * height * width} bytes of pixels")
    return np.frombuffer(pixels, ">u2").reshape(height, width).astype(np.uint16)


@decoder("TIFF")
def decode_tiff(content: bytes) -> np.ndarray:
    """The first image of a TIFF: (height, width) or (height, width, channels), or channels first, as it is stored."""
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        if not tiff.series:
            raise DataError("the TIFF holds no image")
        image = tiff.series[0]
        check_shape(image.shape)
        check_type(image.dtype)
        values = image.asarray(maxworkers=1)
        if values.shape != image.shape or values.dtype != image.dtype:
            raise DataError(f"promises {image.shape} {image.dtype} and holds {values.shape} {values.dtype}")
        return values


@decoder("NPY")
def decode_npy(content: bytes) -> np.ndarray:
    """The array of a .npy file of numbers; objects are never unpickled."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, column_major, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, column_major, dtype = np.lib.format.read_array_header_2_0(stream)
    check_shape(shape)
    check_type(dtype)
    expected = prod(shape) * dtype.itemsize
    if len(content) - stream.tell() < expected:
        raise DataError(f"cut short: {len(content) - stream.tell()} of {expected} bytes of values")
    values = np.frombuffer(content, dtype, prod(shape), stream.tell())
    return values.reshape(shape, order="F" if column_major else "C")


def decode_exr(content: bytes) -> np.ndarray:
    """The depth of an OpenEXR file: channel Z, or the only channel, or R, G and B as (height, width, 3).

    Raises:
        ConfigError: the package OpenEXR is not installed.
        DataError: no such channel, or not a complete file.
    """

    try:
        import OpenEXR
    except ImportError as error:
        raise ConfigError("reading .exr files needs the package OpenEXR") from error

    @decoder("OpenEXR")
    def decode(path: str) -> np.ndarray:
        with OpenEXR.File(path, header_only=True) as file:
            low, high = file.header()["dataWindow"]
        check_shape(tuple(int(value) for value in (high - low + 1)[::-1]))
        with OpenEXR.File(path, separate_channels=True) as file:
            channels = {name: np.array(channel.pixels) for name, channel in file.channels().items()}
        chosen = [name for name in channels if name.rsplit(".", 1)[-1].upper() == "Z"] or list(channels)
        if len(chosen) == 1:
            return channels[chosen[0]]
        if {"R", "G", "B"} <= channels.keys():
            return np.stack([channels[name] for name in "RGB"], -1)
        raise DataError(f"channels {', '.join(sorted(channels))}: none is Z and there is more than one")

    if content[:4] != b"\x76\x2f\x31\x01":
        raise DataError("not an OpenEXR file")
    # The library reads files only.
    with tempfile.NamedTemporaryFile(suffix=".exr") as copy:
        copy.write(content)
        copy.flush()
        return decode(copy.name)


@decoder("image")
def decode_image(content: bytes) -> np.ndarray:
    """The (height, width, 3) uint8 colours of a PNG or JPEG image; grey is repeated.

    Orientation marks of cameras are ignored: masks of these datasets lie on the pixels as they are stored.
    """
    with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
        check_shape((image.height, image.width))
        if image.mode.startswith(("I", "F")):
            raise DataError(f"an image of mode {image.mode}, 8 bits a channel are expected")
        return np.asarray(image.convert("RGB"))


def check_type(dtype: np.dtype):
    """Refuses what cannot hold depth: eight bits, complex numbers, structures, objects."""
    if dtype.kind not in "fiu" or dtype.itemsize < 2:
        raise DataError(f"values of type {dtype} are not depth: floats or integers of 16 bits and more are")


def image_size(file: RawFile) -> tuple[int, int] | None:
    """(height, width) of a PNG from its header; None where it is none or cannot be read."""
    try:
        head = file.read_head()
    except DataError:
        return None
    if head[:8] != PNG_SIGNATURE or head[12:16] != b"IHDR" or len(head) < 24:
        return None
    width, height = struct.unpack(">II", head[16:24])
    return height, width
