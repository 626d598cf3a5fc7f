"""One view of SiM3D: its depth map in metres and its grey image.

In .npy files +inf and 0 are missing. In .exr files the channel that means depth counts, or the first of R, G and B;
the largest value is the background where a plateau of it reaches the border of the map, and what is not positive is
missing. The unit is not written anywhere, but an object before a camera is neither 20 m nor 50 mm away, so metres and
millimetres cannot be mistaken.
"""

import numpy as np
from PIL import Image

from data_prep.archives import RawFile
from data_prep.exr import decode_exr
from data_prep.formats import decode_image, decode_npy
from dino_depth.anomaly.dataset import named
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = ["read_depth", "read_image"]

SCALES = {"m": 1.0, "mm": 0.001}
PLAUSIBLE = (0.05, 20.0)  # metres: median depths of an object before a camera
PLATEAU = 0.001  # smallest share of an image that is a background


def read_image(file: RawFile) -> np.ndarray:
    """(height, width) uint8; colours become grey by luminance, as OpenCV's grey mode has it."""
    return named(str(file), _grey, file)


def _grey(file: RawFile) -> np.ndarray:
    return np.asarray(Image.fromarray(decode_image(file.read())).convert("L"))


def read_depth(file: RawFile, unit: str, key: str) -> DepthMap:
    """The metric depth of a view.

    Args:
        unit: m, mm, or auto for the one that is plausible.
        key: the setting that says so, for messages.

    Raises:
        DataError: not a depth file, NaN, negative depth in a .npy file, or an implausible median depth.
    """
    return named(str(file), _exr_depth if file.suffix == ".exr" else _npy_depth, file, unit, key)


def _npy_depth(file: RawFile, unit: str, key: str) -> DepthMap:
    values = decode_npy(file.read())
    if values.ndim != 2:
        raise DataError(f"depth must be (height, width), got {values.shape}")
    missing = np.isposinf(values) | (values == 0)
    wrong = ~missing & ~(values > 0)
    if wrong.any():
        nan = np.count_nonzero(np.isnan(values))
        raise DataError(f"{nan} values are NaN and {np.count_nonzero(wrong) - nan} negative; missing depth is +inf")
    return _metric(values, ~missing, unit, key)


def _exr_depth(file: RawFile, unit: str, key: str) -> DepthMap:
    values = decode_exr(file.read(), channel=0)
    if np.isnan(values).any():
        raise DataError(f"{np.count_nonzero(np.isnan(values))} values are NaN")
    far = values == values.max()
    border = far[0].any() or far[-1].any() or far[:, 0].any() or far[:, -1].any()
    background = far if border and far.mean() >= PLATEAU else np.isposinf(values)
    return _metric(values, ~background & (values > 0), unit, key)


def _metric(values: np.ndarray, valid: np.ndarray, unit: str, key: str) -> DepthMap:
    if not valid.any():
        raise DataError("all pixels are missing")
    median = float(np.median(values[valid]))
    fitting = next((name for name, scale in SCALES.items() if PLAUSIBLE[0] <= median * scale <= PLAUSIBLE[1]), None)
    if fitting is None:
        raise DataError(f"a median depth of {median:g} is no object before a camera, in m nor in mm ({key} {unit})")
    if unit not in ("auto", fitting):
        raise DataError(f"a median depth of {median:g} {unit} is implausible: {key} {fitting} fits, or auto")
    # In double precision, whatever the file has, and only what was measured: maps have twelve million pixels.
    depth = np.zeros(values.shape, np.float32)
    depth[valid] = values[valid].astype(np.float64) * SCALES[fitting]
    return DepthMap(depth, valid)
