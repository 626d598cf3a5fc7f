"""Pictures of numbers for the pages this project writes: a perceptual colour map, and images inside a page's text."""

import base64
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["MISSING", "TABLE", "VIRIDIS", "colour", "data_uri", "write_page"]

MISSING = (226, 114, 91)  # no colour of viridis is near it
# Ten equidistant colours of matplotlib's viridis (CC0), dark to bright.
VIRIDIS = np.array([
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
], np.float64)  # fmt: skip
# With the colour of missing pixels they fit the palette of an 8-bit PNG, which takes half the bytes of RGB.
LEVELS = 28 * (len(VIRIDIS) - 1) + 1
PALETTE = 256


def _table() -> np.ndarray:
    """(LEVELS, 3) colours from the first of viridis to the last."""
    places = np.linspace(0, len(VIRIDIS) - 1, LEVELS)
    return np.stack([np.interp(places, range(len(VIRIDIS)), channel) for channel in VIRIDIS.T], axis=1)


TABLE = np.rint(_table())


def colour(values: np.ndarray, valid: np.ndarray, low: float, high: float) -> np.ndarray:
    """(height, width, 3) uint8 viridis colours of values between ``low`` and ``high``; missing pixels in their own."""
    place = np.clip((values - low) / ((high - low) or 1.0), 0, 1)
    levels = np.rint(place * (LEVELS - 1)).astype(int)
    return np.where(valid[..., None], TABLE[levels], MISSING).astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    """A PNG of (height, width, 3) uint8 pixels as the address of an image; lossless, with a palette where one fits."""
    codes = pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)  # (height, width)
    colours, places = np.unique(codes, return_inverse=True)
    if len(colours) <= PALETTE:
        image = Image.fromarray(places.reshape(codes.shape).astype(np.uint8))
        image.putpalette(np.stack([colours >> 16, colours >> 8, colours], 1).astype(np.uint8).tobytes())
    else:
        image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_page(path: Path, page: str):
    """Writes a page that exists either whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
