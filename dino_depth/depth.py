"""What a depth value means. No other module knows about units, missing pixels or normalisation.

A depth map is float32, larger is farther, strictly positive where it is valid, and carries its validity as a mask.
``kind`` says whether values are metres (``"metric"``) or known up to scale only (``"relative"``).

On disk a map is a 16-bit PNG: code 0 is a missing pixel, codes 1..65535 are linear between ``near`` and ``far``, or
linear in inverse depth, where the sample says so.
The network sees one channel in which 0 is a missing pixel; how valid pixels are mapped is a :class:`Normalization`.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from dino_depth.errors import DataError

__all__ = [
    "CODINGS", "DepthMap", "Normalization", "code_depth", "codes_png", "coding_step", "decode", "decode_png", "encode",
    "encode_png", "fit_plane", "fit_plane_of_codes", "grey", "grey_map", "grid_stride", "normalize", "plane_share",
    "read_codes",
]  # fmt: skip

Kind = Literal["metric", "relative"]
Coding = Literal["linear", "inverse"]
Plane = tuple[np.ndarray, float]  # (3,) float32 coefficients, and the share of valid pixels on it
CODINGS = get_args(Coding)
LAST_CODE = 65535
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
UNIT = {"metric": "m", "relative": "relative"}
HORIZON = 4.0  # times the median depth, and its inverse: bounds of the plane that ``plane`` measures from
PLANE_TOLERANCE = 0.005  # of the median depth that a pixel of the plane may be off it
PLANE_TRIALS = 128  # of its RANSAC
KNEE = 2.0  # of ``plane``: proportional well below it, logarithmic above


@dataclass(frozen=True)
class DepthMap:
    """One depth map.

    Attributes:
        depth: (height, width) float32, metres or relative, larger is farther; 0 where not valid.
        valid: (height, width) bool.
        kind: "metric" (metres) or "relative" (unknown scale).
        plane: what :func:`fit_plane` says of it, where that is known beforehand.

    Raises:
        DataError: shapes differ, a valid value is not finite or not positive, or no pixel is valid.
    """

    depth: np.ndarray
    valid: np.ndarray
    kind: Kind = "metric"
    plane: "Plane | None" = None

    def __post_init__(self):
        depth, valid = np.asarray(self.depth), np.asarray(self.valid)
        if depth.ndim != 2 or depth.shape != valid.shape:
            raise DataError(f"depth {depth.shape} and validity {valid.shape} must be the same (height, width)")
        if valid.dtype != np.bool_:
            raise DataError(f"validity must be bool, got {valid.dtype}")
        if self.kind not in UNIT:
            raise DataError(f"kind must be one of {sorted(UNIT)}, got {self.kind!r}")
        # A float32 cast may underflow or overflow what was a fine float64 value.
        with np.errstate(all="ignore"):
            clean = depth.astype(np.float32, copy=False)
        # Bits instead of values: 0 times a missing NaN is NaN, and np.where branches at every pixel.
        clean = np.multiply(clean.view(np.uint32), valid, order="C").view(np.float32)
        # NaN is not above 0 either, so one comparison finds every fault but infinity.
        if not (valid.any() and np.array_equal(clean > 0, valid) and clean.max() < np.inf):
            raise _fault(depth[valid])
        object.__setattr__(self, "depth", clean)
        object.__setattr__(self, "valid", valid)

    @classmethod
    def from_values(cls, values: np.ndarray, kind: Kind = "metric") -> "DepthMap":
        """A map in which every non-finite or non-positive value of ``values`` (height, width) is missing."""
        values = np.asarray(values)
        with np.errstate(invalid="ignore"):
            valid = np.isfinite(values) & (values > 0)
        return cls(values, valid, kind)


def _fault(values: np.ndarray) -> DataError:
    """What is wrong with the valid values (pixels,) of a map that may not be."""
    if not values.size:
        return DataError("all pixels are missing")
    if not np.isfinite(values).all():
        return DataError(f"{np.count_nonzero(~np.isfinite(values))} valid pixels are NaN or infinite")
    if values.min() <= 0:
        return DataError(f"valid depth must be positive, smallest is {values.min()}")
    return DataError(f"depth {values.min()}..{values.max()} does not fit float32")


def grey(image: np.ndarray) -> np.ndarray:
    """The luminance (height, width) float32, 0..255, of a grey (height, width) or colour image, 8 bits a channel."""
    return image.astype(np.float32) if image.ndim == 2 else image.astype(np.float32) @ LUMA


def grey_map(image: np.ndarray) -> DepthMap:
    """A grey or colour image as a relative map without missing pixels, values 1/256..1.

    So a network with one channel sees images: in pretraining and afterwards.
    """
    values = (grey(image) + 1) / 256
    return DepthMap(values, np.ones(values.shape, bool), "relative")


def encode(depth_map: DepthMap, coding: Coding = "linear") -> tuple[np.ndarray, float, float]:
    """Codes (height, width) uint16 and the depths ``near`` and ``far`` of codes 1 and 65535.

    Codes are linear in depth or, for scenes with a part near and a wall far away, in inverse depth: decoding is within
    half a :func:`coding_step` of the input.
    """
    depth, valid = depth_map.depth, depth_map.valid
    # Positive floats order like their bits, and the 0 of a missing pixel less 1 wraps round to the largest.
    near = float(((depth.view(np.uint32) - np.uint32(1)).min() + np.uint32(1)).view(np.float32))
    far = float(depth.max())
    if coding == "inverse":
        codes = np.divide(np.float64(1), depth, out=np.full(depth.shape, 1 / near), where=valid)  # float64
        np.subtract(1 / near, codes, out=codes)
        codes /= (1 / near - 1 / far) / (LAST_CODE - 1) or 1.0
    else:
        codes = depth - np.float64(near)  # float64
        codes /= (far - near) / (LAST_CODE - 1) or 1.0
    np.rint(codes, out=codes)
    codes += 1
    codes *= valid
    return codes.astype(np.uint16), near, far


def decode(
    codes: np.ndarray,
    near: float,
    far: float,
    kind: Kind = "metric",
    coding: Coding = "linear",
    plane: Plane | None = None,
) -> DepthMap:
    """The inverse of :func:`encode`.

    Args:
        plane: of the map, where it is known.

    Raises:
        DataError: the codes are not uint16, ``near`` and ``far`` are not 0 < near <= far, the coding is unknown, or
            every code is 0.
    """
    if codes.dtype != np.uint16 or codes.ndim != 2:
        raise DataError(f"depth codes must be (height, width) uint16, got {codes.shape} {codes.dtype}")
    return DepthMap(code_depth(codes, near, far, coding), codes > 0, kind, plane)


def code_depth(codes: np.ndarray | int, near: float, far: float, coding: Coding = "linear") -> np.ndarray:
    """The depth of codes 1..65535, float64 of their shape.

    Raises:
        DataError: ``near`` and ``far`` are not 0 < near <= far, or the coding is unknown.
    """
    if not (math.isfinite(near) and math.isfinite(far) and 0 < near <= far):
        raise DataError(f"near and far must satisfy 0 < near <= far < inf, got {near} and {far}")
    if coding not in CODINGS:
        raise DataError(f"coding must be one of {', '.join(CODINGS)}, got {coding!r}")
    place = np.asarray(codes, np.float64) - 1
    if coding == "inverse":
        # From the far end, where inverse depth is smallest, so that no digits cancel there.
        return 1 / (1 / far + (LAST_CODE - 1 - place) * ((1 / near - 1 / far) / (LAST_CODE - 1)))
    return near + place * ((far - near) / (LAST_CODE - 1))


def coding_step(depth: float, near: float, far: float, coding: Coding = "linear") -> float:
    """How far apart two neighbouring codes are at a depth, in its unit."""
    if coding == "inverse":
        return depth**2 * (1 / near - 1 / far) / (LAST_CODE - 1)
    return (far - near) / (LAST_CODE - 1)


def encode_png(depth_map: DepthMap, coding: Coding = "linear") -> tuple[bytes, float, float]:
    """The 16-bit PNG of a map and its ``near`` and ``far``."""
    codes, near, far = encode(depth_map, coding)
    return codes_png(codes), near, far


def codes_png(codes: np.ndarray) -> bytes:
    """The 16-bit PNG of codes (height, width) uint16.

    PNG libraries come with zlib, which takes twice to four times as long for a larger file (docs/performance.md), so
    the three chunks are put together here around what libdeflate compressed.
    """
    # Here, because training reads maps only.
    from imagecodecs import deflate_encode

    height, width = codes.shape
    pixels = codes.astype(">u2").view(np.uint8)  # (height, bytes)
    rows = np.empty((height, 1 + 2 * width), np.uint8)
    rows[:, 0] = 1  # the filter "Sub": each byte less the one a pixel to its left
    rows[:, 1:3] = pixels[:, :2]
    np.subtract(pixels[:, 2:], pixels[:, :-2], out=rows[:, 3:])
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)  # 16-bit grey, not interlaced
    chunks = _chunk(b"IHDR", header) + _chunk(b"IDAT", deflate_encode(rows, level=1)) + _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def _chunk(kind: bytes, content: bytes) -> bytes:
    content = kind + content
    return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))


def read_codes(png: bytes) -> np.ndarray:
    """The (height, width) uint16 codes of a depth PNG.

    Raises:
        DataError: the bytes are not a complete 16-bit single-channel PNG.
    """
    try:
        with Image.open(io.BytesIO(png), formats=["png"]) as image:
            if not image.mode.startswith("I;16"):
                raise DataError(f"depth PNG must be 16-bit single-channel, got mode {image.mode}")
            return np.array(image, dtype=np.uint16)
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"unreadable depth PNG: {error}") from error


def decode_png(png: bytes, near: float, far: float, kind: Kind = "metric", coding: Coding = "linear") -> DepthMap:
    """The depth map of a PNG written by :func:`encode_png`."""
    return decode(read_codes(png), near, far, kind, coding)


@dataclass
class Normalization:
    """How valid depth becomes the network's input; missing pixels are always 0.

    Attributes:
        method: ``max`` divides by the map's largest depth (the official ModMap release);
            ``minmax`` maps the map's nearest..farthest to 0.1..1 (0 stays "missing");
            ``log`` is log(1 + depth) / log(101), DeFM's first channel, which keeps absolute distance;
            ``plane`` is the signed distance in depth from the supporting plane, towards the camera, over a fixed scale,
            compressed where it is large. As a plane loses its support, the fronto-parallel plane at median depth takes
            its place by degrees. docs/depth.md has the formula.
        scale: metres that ``plane`` maps to 1 in metric maps.
        scale_relative: relative depth, as a fraction of the map's median depth, that ``plane`` maps to 1.
        plane_support: share of valid pixels up to which a plane counts for nothing; from twice that share on it alone
            is the reference. 0: always the plane, 1: never.
        formula: of ``plane``; 2 as above. 1, for encoders trained with it: unbounded, and a plane below
            ``plane_support`` gives way at once.
    """

    method: Literal["max", "minmax", "log", "plane"] = "plane"
    scale: float = 0.05
    scale_relative: float = 0.1
    plane_support: float = 0.2
    formula: Literal[1, 2] = 2


def normalize(depth_map: DepthMap, normalization: Normalization) -> np.ndarray:
    """The network input (height, width) float32 of a map; missing pixels are 0."""
    depth, valid = depth_map.depth, depth_map.valid
    if normalization.method == "max":
        value = depth / depth.max()
    elif normalization.method == "minmax":
        near, far = float(depth[valid].min()), float(depth.max())
        value = 0.1 + 0.9 * (depth - near) / ((far - near) or 1.0)
    elif normalization.method == "log":
        value = np.log1p(depth) / math.log(101.0)
    elif normalization.method == "plane":
        value = _height(depth_map, normalization)
    else:
        raise DataError(f"unknown normalisation method {normalization.method!r}")
    return np.where(valid, value, 0).astype(np.float32)


def _height(depth_map: DepthMap, normalization: Normalization) -> np.ndarray:
    """The formula of docs/depth.md."""
    bounded = normalization.formula == 2
    depth, start = depth_map.depth, normalization.plane_support
    median = float(np.median(depth[depth_map.valid]))
    metric = depth_map.kind == "metric"
    scale = normalization.scale if metric else normalization.scale_relative * median
    plane, support = depth_map.plane or fit_plane(depth_map)
    if bounded:
        nearest, farthest = median / HORIZON, median * HORIZON
        weight = np.float32(np.clip(support / max(start, 1e-6) - 1, 0, 1))
    else:
        nearest, farthest = (0.0, 10 * depth.max()) if metric else (-np.inf, np.inf)
        weight = np.float32(support >= start)
    reference = np.float32(median)
    if weight:
        height, width = depth.shape
        rows = (np.arange(height, dtype=np.float32) / max(height, width))[:, None]
        columns = (np.arange(width, dtype=np.float32) / max(height, width))[None, :]
        on_plane = plane[0] * columns + plane[1] * rows + plane[2]
        if metric:
            # Towards the horizon a pinhole plane's inverse depth reaches 0: keep the reference finite there.
            on_plane = 1 / np.maximum(on_plane, np.float32(1 / farthest))
        on_plane = np.clip(on_plane, np.float32(nearest), np.float32(farthest))
        reference = weight * on_plane + (1 - weight) * reference
    value = (reference - depth) / np.float32(scale)
    return np.float32(KNEE) * np.arcsinh(value / np.float32(KNEE)) if bounded else value


def grid_stride(pixels: int) -> int:
    """Every how many rows and columns of a map of so many pixels ``fit_plane`` looks."""
    return max(1, int(math.sqrt(pixels / 4096)))


def fit_plane(depth_map: DepthMap, tolerance: float = PLANE_TOLERANCE, trials: int = PLANE_TRIALS) -> Plane:
    """The plane that holds most pixels, by seeded RANSAC on a thinned grid and least squares on its inliers.

    Under a pinhole camera a plane is affine in the *inverse* depth of its pixels, so metric maps are fitted as
    1/depth = a*column + b*row + c (columns and rows over the longer side); relative maps, which have no camera, as
    depth = a*column + b*row + c.

    Args:
        tolerance: largest distance of an inlier, as a fraction of the map's median depth.

    Returns:
        (3,) float32 coefficients and the share of valid pixels on the plane.
    """
    return _fit(*_thinned(depth_map.depth), depth_map.kind, tolerance, trials)


def fit_plane_of_codes(
    codes: np.ndarray, near: float, far: float, kind: Kind = "metric", coding: Coding = "linear"
) -> Plane:
    """:func:`fit_plane` of what :func:`decode` makes of codes, bit for bit; only the thinned grid is decoded."""

    def depth(thin: np.ndarray) -> np.ndarray:
        return np.where(thin > 0, code_depth(thin, near, far, coding), 0).astype(np.float32)

    return _fit(*_thinned(codes, depth), kind, PLANE_TOLERANCE, PLANE_TRIALS)


def plane_share(depth_map: DepthMap, plane: np.ndarray, tolerance: float = PLANE_TOLERANCE) -> float:
    """The share of those pixels that :func:`fit_plane` looks at which lie on a plane (3,)."""
    points, depth = _thinned(depth_map.depth)
    if not len(depth):
        return 0.0
    target, limit = _target(depth, depth_map.kind, tolerance)
    return float((np.abs(points @ plane - target) < limit).mean())


def _thinned(
    values: np.ndarray, depth: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, 3) column, row and 1 of the valid ones of every few pixels of a map, and (pixels,) float64 depth."""
    stride = grid_stride(values.size)
    thin = depth(values[::stride, ::stride])
    rows, columns = np.nonzero(thin)
    points = np.stack([columns, rows], 1) * (stride / max(values.shape))
    return np.concatenate([points, np.ones((len(rows), 1))], 1), thin[rows, columns].astype(np.float64)


def _target(depth: np.ndarray, kind: Kind, tolerance: float) -> tuple[np.ndarray, float]:
    """What is affine on a plane, (pixels,), and how far a pixel on it may be off."""
    median = float(np.median(depth))
    # An error in inverse depth is worth depth^2 in depth; the median depth is close enough for a tolerance.
    return (1 / depth, tolerance / median) if kind == "metric" else (depth, tolerance * median)


def _fit(points: np.ndarray, depth: np.ndarray, kind: Kind, tolerance: float, trials: int) -> Plane:
    if len(depth) < 3:
        return np.zeros(3, np.float32), 0.0
    target, limit = _target(depth, kind, tolerance)
    triples = np.random.default_rng(0).integers(0, len(depth), (trials, 3))
    corners = points[triples]  # (trials, 3 points, 3)
    usable = np.abs(np.linalg.det(corners)) > 1e-4
    if not usable.any():
        return np.zeros(3, np.float32), 0.0
    planes = np.linalg.solve(corners[usable], target[triples[usable]][..., None])[..., 0]  # (trials, 3)
    # A quarter of the pixels is enough to tell the trials apart; all of them are for the refinement.
    distance = points[::4] @ planes.T
    distance -= target[::4, None]
    votes = np.count_nonzero(np.abs(distance, out=distance) < limit, axis=0)
    chosen = np.abs(points @ planes[votes.argmax()] - target) < limit
    for _ in range(3):
        normal_matrix = points[chosen].T @ points[chosen]
        if chosen.sum() < 3 or np.linalg.cond(normal_matrix) > 1e12:
            return np.zeros(3, np.float32), 0.0
        plane = np.linalg.solve(normal_matrix, points[chosen].T @ target[chosen])
        refined = np.abs(points @ plane - target) < limit
        if refined.sum() < 3:
            break
        chosen = refined
    return plane.astype(np.float32), float(chosen.mean())
