"""Depth file formats to plain arrays. Files are untrusted: sizes are checked before memory is taken.

Every ``decode_*`` takes the bytes of a file and raises DataError, with a reason that names neither the file nor this
machine, on anything that is not a complete file of its format, or whose values cannot be depth. Which of several
images or channels of a file is depth is never guessed: see :class:`ManyLayers`. OpenEXR has a module of its own.
"""

import io
import logging
import re
import struct
import warnings
from collections.abc import Callable
from functools import wraps
from math import prod

import numpy as np
import tifffile
from PIL import Image

from data_prep.archives import RawFile
from dino_depth.depth import read_codes
from dino_depth.errors import DataError

__all__ = [
    "ManyLayers", "check_shape", "check_values", "decode_image", "decode_npy", "decode_pfm", "decode_pgm", "decode_png",
    "decode_tiff", "decoder", "depth_decoder", "image_size",
]  # fmt: skip

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
LARGEST_MAP = 100_000_000
LARGEST_CHANNELS = 4

LONGEST_REASON, LONGEST_OTHER_REASON = 1000, 200
GDAL_NODATA = 42113  # the TIFF tag that names the value of a missing pixel

# What a library has to say about a broken or an unusual file becomes the reason of the DataError, or is none.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", module=r"(PIL|tifffile|imagecodecs)\b")


class ManyLayers(DataError):
    """A file holds several images or channels and does not say which is depth; lists them."""


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
        def safe(*arguments, **options) -> np.ndarray:
            try:
                return decode(*arguments, **options)
            except DataError as error:
                raise type(error)(_timeless(error, LONGEST_REASON)) from error
            except Exception as error:
                reason = _timeless(error, LONGEST_OTHER_REASON)
                raise DataError(f"not a readable {name} file ({type(error).__name__}: {reason})") from error

        return safe

    return decorate


def depth_decoder(name: str):
    """As :func:`decoder`; also refuses, in one place, what cannot be depth."""

    def decorate(decode: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        @decoder(name)
        @wraps(decode)
        def checked(*arguments, **options) -> np.ndarray:
            values = decode(*arguments, **options)
            check_values(values)
            return values

        return checked

    return decorate


def check_values(values: np.ndarray):
    """Refuses an array that cannot hold depth: its type, its shape, or not one finite number in it."""
    check_type(values.dtype)
    check_shape(values.shape)
    if values.dtype.kind == "f" and not np.isfinite(values[values.shape[0] // 2]).any():
        if not np.isfinite(values).any():
            raise DataError(f"not one of {values.size} values is finite")


def _timeless(error: Exception, longest: int) -> str:
    """The first line of a message without memory addresses and absolute paths, which differ from run to run."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r" ?<[^<>]* at 0x[^<>]*>|(?<![^\s'])'?/\S*", "", line)[:longest].strip()


@depth_decoder("PNG")
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


@depth_decoder("PGM")
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


@depth_decoder("PFM")
def decode_pfm(content: bytes) -> np.ndarray:
    """The (height, width) float32 values of a grey PFM, from the top row down; the file has them from the bottom up.

    The sign of its scale is the byte order; the rest of the scale is ignored, as all readers do.
    """
    header = re.match(rb"(P[Ff])\s+(\d{1,6})\s+(\d{1,6})\s+(-?[\d.eE+-]{1,20})[ \t]*\r?\n", content)
    if header is None:
        raise DataError("not a PFM file")
    if header[1] == b"PF":
        raise DataError("not depth but a PFM of three colours")
    width, height, scale = int(header[2]), int(header[3]), float(header[4])
    check_shape((height, width))
    pixels = content[header.end() :][: 4 * height * width]
    if len(pixels) < 4 * height * width:
        raise DataError(f"cut short: {len(pixels)} of {4 * height * width} bytes of pixels")
    values = np.frombuffer(pixels, "<f4" if scale < 0 else ">f4").reshape(height, width)
    return values[::-1].astype(np.float32)


@depth_decoder("TIFF")
def decode_tiff(content: bytes, layer: str = "", stack: bool = False, masked: bool = True) -> np.ndarray:
    """The image of a TIFF: (height, width) or (height, width, channels), or channels first, as it is stored.

    Thumbnails do not count. Pixels that a TIFF mask beside the image leaves out, or that have the value of a GDAL
    "nodata" tag, are NaN in floats and masked in integers.

    Args:
        layer: number of the image from 0, where there are several.
        stack: images of one shape are the channels of one: (images, height, width).
        masked: a mask counts; to read it takes as long as the image.

    Raises:
        ManyLayers: there are several images, neither of both arguments fits, or colours by a palette.
    """
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        series = [one for one in tiff.series if not one.keyframe.is_reduced]
        masks = [one for one in series if one.keyframe.photometric == tifffile.PHOTOMETRIC.MASK]
        if not layer and len(masks) == 1:
            series.remove(masks[0])
        if not series:
            raise DataError("the TIFF holds no image")
        single = len(series) == 1 and (stack or prod(series[0].shape) == prod(series[0].keyframe.shape))
        if not layer and not single:
            raise ManyLayers(f"{_pages(series)}: one image is expected")
        image = series[0] if single else _page(series, layer)
        if image.keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE:
            raise DataError("not depth but colours by a palette")
        check_shape(image.shape)
        check_type(image.dtype)
        values = image.asarray(maxworkers=1)
        if values.shape != image.shape or values.dtype != image.dtype:
            raise DataError(f"promises {image.shape} {image.dtype} and holds {values.shape} {values.dtype}")
        missing = _nodata(values, image.keyframe.tags.get(GDAL_NODATA))
        if masked and not layer and len(masks) == 1:
            missing = missing | _left_out(masks[0], values)
        return _without(values, missing)


def _pages(series: list) -> str:
    shapes = [f"{'x'.join(map(str, one.shape))} {one.dtype}" for one in series]
    return f"{len(series)} images ({', '.join(shapes)})" if len(series) > 1 else f"a stack of images, {shapes[0]}"


def _page(series: list, layer: str):
    """The image of that number, over all series."""
    pages = [page for one in series for page in one.pages]
    if not re.fullmatch(r"\d{1,6}", layer) or int(layer) >= len(pages) or pages[int(layer)] is None:
        raise ManyLayers(f"{_pages(series)}: {layer!r} is none of 0 to {len(pages) - 1}")
    return pages[int(layer)].aspage()


def _nodata(values: np.ndarray, tag: tifffile.TiffTag | None) -> np.ndarray:
    """Where the values are the one that a GDAL tag names."""
    if tag is None:
        return np.zeros((), bool)
    try:
        value = float(str(tag.value).strip("\0 "))
    except ValueError:
        raise DataError(f"its GDAL tag for missing pixels holds {tag.value!r}, which is no number") from None
    if values.dtype.kind != "f":
        return values == value
    # The largest float32 is written with more or fewer digits than it has.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.isclose(values, values.dtype.type(value), rtol=1e-6, atol=0)


def _left_out(mask: tifffile.TiffPageSeries, values: np.ndarray) -> np.ndarray:
    """Where a mask of (height, width), 0 outside of the object, leaves out values of (height, width, any)."""
    check_shape(mask.shape)
    if mask.shape != values.shape[:2]:
        raise DataError(f"a mask of {mask.shape} beside an image of {values.shape}")
    outside = mask.asarray(maxworkers=1) == 0
    return outside if values.ndim == 2 else outside[..., None]


def _without(values: np.ndarray, missing: np.ndarray) -> np.ndarray:
    if not missing.any():
        return values
    if values.dtype.kind == "f":
        np.copyto(values, np.nan, where=missing)
        return values
    return np.ma.masked_array(values, np.broadcast_to(missing, values.shape))


@depth_decoder("NPY")
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


@decoder("image")
def decode_image(content: bytes) -> np.ndarray:
    """The (height, width, 3) uint8 colours of a PNG or JPEG image; grey is repeated, and 16-bit grey becomes 8-bit.

    Orientation marks of cameras are ignored: masks of these datasets lie on the pixels as they are stored.
    """
    with Image.open(io.BytesIO(content), formats=["PNG", "JPEG"]) as image:
        check_shape((image.height, image.width))
        if image.mode.startswith("I;16"):
            # 257 is 65535 / 255. Pillow itself would cut all that is above 255.
            grey = ((np.asarray(image, np.uint32) + 128) // 257).astype(np.uint8)
            return np.repeat(grey[..., None], 3, -1)
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
