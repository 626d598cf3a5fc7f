"""Rows of views with their anomaly maps, and the grid of all pairs of views, as pictures for the report.

Made of what ``figures.py`` keeps; reading needs neither torch nor encoders.
"""

import base64
import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from dino_depth.errors import DataError
from dino_depth.picture import TABLE, colour, data_uri

__all__ = ["VIEWS_SHOWN", "crop", "grid", "read_arrays", "strips"]

VIEWS_SHOWN = 12
OPAQUE = 0.35  # of its scale: from here on an overlay hides what is below it
OUTLINE = (255, 90, 60)
BACKGROUND = (40, 44, 49)  # of a grid
MARGIN = 1  # cells around the object
ON_SQUARE = ("image", "depth", "truth", "share", "image_components", "depth_components", "image_map", "depth_map")
PAIRS = ("image_pairs", "depth_pairs")


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file, such as predictions and figures.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise DataError(f"{path}: the file is missing") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: unreadable: {error}") from None


def crop(arrays: dict[str, np.ndarray], share: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays on the padded square without what shows the object in no view, most of it in many benchmarks.

    Args:
        arrays: figures or predictions; those that do not lie on the square stay as they are.
        share: (V, n, n) of the figures.
    """
    box = []
    for axis in (1, 0):
        shown = np.flatnonzero((share > 0).any((0, axis + 1)))
        ends = (shown[0] - MARGIN, shown[-1] + 1 + MARGIN) if len(shown) else (0, share.shape[1])
        box.append(np.clip(ends, 0, share.shape[1]) / share.shape[1])
    cropped = dict(arrays)
    for name in (*ON_SQUARE, *PAIRS):
        if name in arrays:
            first = 2 if name in PAIRS else 1
            for axis, (low, high) in enumerate(box, first):
                cells = arrays[name].shape[axis]
                # Ends are whole cells for all but pairs, which may be coarser.
                places = np.arange(int(np.floor(low * cells + 1e-9)), int(np.ceil(high * cells - 1e-9)))
                cropped[name] = cropped[name].take(places, axis)
    return cropped


def strips(figures: dict[str, np.ndarray], maps: dict[str, np.ndarray], scales: dict[str, tuple[float, float]]):
    """One row for each modality: up to 12 views side by side, their anomaly maps and outlines of the ground truth.

    Args:
        figures: as ``figures.py`` keeps them.
        maps: predictions; ``image_map`` and ``depth_map`` (V, n, n) where the head gives them, cropped alike.
        scales: of each modality the score where the overlay starts and the one where colours end.

    Returns:
        Rows of modality, places of the views, and pictures of equal aspect, ``under``, ``over`` and ``outline``; the
        latter two may be None.
    """
    places = np.unique(np.linspace(0, len(figures["image"]) - 1, VIEWS_SHOWN).round().astype(int))
    rows = []
    for modality in ("image", "depth"):
        scored = maps.get(f"{modality}_map")
        truth = figures["truth"][places] if "truth" in figures else None
        rows.append(
            {
                "modality": modality,
                "places": places.tolist(),
                "under": _photograph(_side_by_side(figures[modality][places])),
                "over": None if scored is None else _overlay(scored, figures["share"], places, scales[modality]),
                "outline": _outline(truth) if truth is not None and truth.any() else None,
            }
        )
    return rows


def _side_by_side(pictures: np.ndarray) -> np.ndarray:
    """(height, views * width, ...) of (views, height, width, ...)."""
    return np.concatenate(list(pictures), 1)


def _photograph(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _overlay(scored: np.ndarray, share: np.ndarray, places: np.ndarray, scale: tuple[float, float]) -> str:
    """Scores in viridis, from transparent at the low end of the scale; nothing off the object."""
    low, high = scale
    level = np.clip((scored[places].astype(np.float64) - low) / ((high - low) or 1.0), 0, 1)
    level[share[places] == 0] = 0
    level = _side_by_side(level)
    colours = TABLE[np.rint(level * (len(TABLE) - 1)).astype(int)]
    alpha = 255 * np.clip(level / OPAQUE, 0, 1)
    return _png(np.concatenate([colours, alpha[..., None]], 2))


def _outline(truth: np.ndarray) -> str:
    """Pixels beside the ground truth, transparent elsewhere."""
    shown = np.pad(truth, ((0, 0), (1, 1), (1, 1)))
    grown = shown[:, :-2, 1:-1] | shown[:, 2:, 1:-1] | shown[:, 1:-1, :-2] | shown[:, 1:-1, 2:]
    edge = _side_by_side(grown & ~truth)
    return _png(np.concatenate([np.broadcast_to(OUTLINE, (*edge.shape, 3)), 255 * edge[..., None]], 2))


def _png(pixels: np.ndarray) -> str:
    """A PNG of (height, width, 4) values from 0 to 255, with few enough colours for its bytes to stay few."""
    image = Image.fromarray(pixels.astype(np.uint8)).quantize(128, method=Image.Quantize.FASTOCTREE)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def grid(figures: dict[str, np.ndarray], modality: str) -> dict:
    """The maps of every source (row) and target view (column), and below them their minimum over the sources.

    Returns:
        ``picture``, ``minimum`` (pictures of equal width), ``views``, and the ends of their common scale.
    """
    pairs = figures[f"{modality}_pairs"].astype(np.float64)  # (target, source, rows, columns)
    seen = figures["share"] > 0
    for axis in (1, 2):
        # The share is at the maps' own resolution, of which the pairs are means.
        cells = pairs.shape[axis + 1]
        seen = seen.take(((np.arange(cells) + 0.5) * seen.shape[axis] / cells).astype(int), axis)
    usable = np.broadcast_to(seen[:, None], pairs.shape)
    low, high = np.quantile(pairs[usable], [0.01, 0.995]) if usable.any() else (0.0, 1.0)
    minimum = pairs.min(1, keepdims=True)
    pictures = []
    for part, mask in ((pairs, usable), (minimum, seen[:, None])):
        tiled = _tiles(part, 0.0), _tiles(mask, False)
        colours = colour(tiled[0], tiled[1], low, high)
        colours[~tiled[1]] = BACKGROUND
        pictures.append(data_uri(colours))
    names = [str(name) for name in figures["views"]]
    return {"picture": pictures[0], "minimum": pictures[1], "views": names, "low": low, "high": high}


def _tiles(maps: np.ndarray, gap: float | bool) -> np.ndarray:
    """Maps (columns, rows, height, width) side by side in one picture, with a line between any two."""
    padded = np.pad(maps, ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=gap)
    columns, rows, height, width = padded.shape
    return padded.transpose(1, 2, 0, 3).reshape(rows * height, columns * width)[:-1, :-1]
