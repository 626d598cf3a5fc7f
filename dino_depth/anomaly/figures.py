"""Pictures of a test instance that ``evaluate`` keeps for the report: small, and in the square that encoders see.

One npz per instance, beside the predictions, so that a page can be made of a run folder alone, without the benchmark's
files, encoders or heads. Everything lies on the padded square, as the anomaly maps do, and s is a multiple of n, so
that maps and pictures overlay. Keys, V views of s x s pixels or n x n cells:

    views             (V,) text, names
    image             (V, s, s) or (V, s, s, 3) uint8
    depth             (V, s, s) uint8, near is bright, 0 is missing
    share             (V, n, n) uint8, share of the cell that is the object, of 255
    truth             (V, s, s) bool, pixels that show an anomaly; absent without ground truth
    image_components  (V, n, n, 3) uint8, PCA colours of the features; only in detail, as is depth_components
    image_pairs       (V, V, m, m) float16, psi of equation 11 as [target, source]; only in detail, as is depth_pairs
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.spatial import KDTree

from dino_depth.anomaly.dataset import Sample, Voxels
from dino_depth.anomaly.geometry import SquareFit, lift, resize_camera
from dino_depth.anomaly.results import write_arrays
from dino_depth.anomaly.views import Views
from dino_depth.depth import DepthMap

__all__ = ["components", "view_pictures", "write_figures"]

SIDE = 160  # pixels of a view's picture, at least
SINGLE_SIDE = 320  # where a sample has one view
PAIR_CELLS = 32  # of a map in the grid of all pairs of views, at most
MANY_VIEWS = 16  # with more of them half as many
NEAR = 1.5  # voxels: a pixel this close to the centre of an anomalous one shows it
OBJECT = 0.5  # smallest share of a cell that PCA is fitted on


def write_figures(
    path: str | Path,
    views: Views,
    *,
    truth: Voxels | Sequence[np.ndarray] | None = None,
    detail: bool = False,
    pair_maps: Callable[[int], dict[str, torch.Tensor] | None] | None = None,
):
    """Writes the pictures of an instance, atomically.

    Args:
        path: npz file; its folder is made.
        truth: anomalous voxels, or one (height, width) bool mask of each view.
        detail: with the principal components of both modalities' features.
        pair_maps: of a target view, the maps (V, n, n) from every source view by modality; None where there are none.

    Raises:
        DataError: a view cannot be read.
    """
    sample, share = views.sample, views.share.numpy()
    arrays = view_pictures(sample, truth, share.shape[1])
    arrays["share"] = np.rint(255 * share).astype(np.uint8)
    for modality in ("image", "depth") if detail else ():
        part = getattr(views, modality).numpy()
        if part.shape[-1] and np.count_nonzero(share >= OBJECT) > 3:
            arrays[f"{modality}_components"] = components(part, share >= OBJECT)
    first = None if pair_maps is None else pair_maps(0)
    if first is not None:
        rows = [first, *(pair_maps(target) for target in range(1, len(sample.views)))]
        for modality in first:
            maps = torch.stack([row[modality] for row in rows]).float()
            cells = min(PAIR_CELLS if len(maps) <= MANY_VIEWS else PAIR_CELLS // 2, maps.shape[-1])
            small = torch.nn.functional.adaptive_avg_pool2d(maps, cells)
            arrays[f"{modality}_pairs"] = small.cpu().numpy().astype(np.float16)
    write_arrays(Path(path), arrays)


def view_pictures(sample: Sample, truth: Voxels | Sequence[np.ndarray] | None, cells: int) -> dict[str, np.ndarray]:
    """The names, images, depths and ground truth of all views, see above; ``cells`` is n."""
    side = SIDE if len(sample.views) > 1 else SINGLE_SIDE
    side = cells * math.ceil(side / cells)
    images, depths, truths = [], [], []
    anomalous = KDTree(truth.centers) if isinstance(truth, Voxels) and len(truth.index) else None
    for place, view in enumerate(sample.views):
        image, depth_map = view.read_image(), view.read_depth()
        images.append(_image(image, side))
        # Nearest pixels rather than means, which would mix depths across an edge and fill holes.
        rows, columns, inside = _pixels(depth_map.depth.shape, side)
        seen = inside & depth_map.valid[rows, columns]  # (side, side)
        depths.append(_brightness(depth_map, seen, rows, columns))
        shown = np.zeros((side, side), bool)
        if anomalous is not None:
            camera = resize_camera(view.camera, *depth_map.depth.shape)
            pixels = np.stack([columns[seen], rows[seen]], 1)
            points = lift(camera, pixels, depth_map.depth[rows[seen], columns[seen]])
            shown[seen] = np.isfinite(anomalous.query(points, distance_upper_bound=NEAR * truth.size)[0])
        elif truth is not None and not isinstance(truth, Voxels):
            shown = inside & truth[place][rows, columns]
        truths.append(shown)
    if len({image.shape for image in images}) > 1:
        images = [image if image.ndim == 3 else np.repeat(image[..., None], 3, 2) for image in images]
    arrays = {"image": np.stack(images), "depth": np.stack(depths)}
    if truth is not None:
        arrays["truth"] = np.stack(truths)
    return {"views": np.array([view.name for view in sample.views]), **arrays}


def _pixels(shape: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column of the pixel at each place of the square, (side, side), and whether there is one."""
    fit = SquareFit(*shape, side)
    across, down = np.meshgrid(np.arange(side), np.arange(side))
    found = np.rint(fit.from_square(np.stack([across.ravel(), down.ravel()], 1))).astype(int)
    columns, rows = found.T.reshape(2, side, side)
    inside = (rows >= 0) & (rows < shape[0]) & (columns >= 0) & (columns < shape[1])
    return rows.clip(0, shape[0] - 1), columns.clip(0, shape[1] - 1), inside


def _image(image: np.ndarray, side: int) -> np.ndarray:
    """The image on the square, black beside it."""
    height, width = image.shape[:2]
    longer = max(height, width)
    # In the square's resolution the image has whole pixels only by rounding; half a pixel does not show here.
    small = Image.fromarray(image).resize((max(1, side * width // longer), max(1, side * height // longer)), Image.BOX)
    square = np.zeros((side, side, *image.shape[2:]), np.uint8)
    top, left = (side - small.height) // 2, (side - small.width) // 2
    square[top : top + small.height, left : left + small.width] = np.asarray(small)
    return square


def _brightness(depth_map: DepthMap, seen: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Depth as brightness from 1 to 255, between the 1st and the 99th percentile, and 0 where none is seen."""
    level = np.zeros(seen.shape, np.uint8)
    if seen.any():
        values = -depth_map.depth[rows[seen], columns[seen]].astype(np.float64)
        low, high = np.percentile(values, [1, 99])
        level[seen] = np.rint(1 + 254 * np.clip((values - low) / ((high - low) or 1.0), 0, 1))
    return level


def components(features: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """The three leading principal components as red, green and blue, fitted over all views at once.

    Each spans 0..255 between its 2nd and 98th percentile, and is turned so that its largest loading is positive.

    Args:
        features: (views, rows, columns, dim).
        usable: (views, rows, columns) bool, the cells to fit on and to colour; the others are black.

    Returns:
        (views, rows, columns, 3) uint8.
    """
    rows = features[usable].astype(np.float64)
    rows -= rows.mean(0)
    # By the covariance: 36 views of 64 x 64 cells would make a decomposition of the rows themselves slow.
    axes = np.linalg.eigh(rows.T @ rows)[1][:, ::-1][:, :3]  # (dim, 3)
    axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(0)[None], 0))
    scores = rows @ axes
    low, high = np.percentile(scores, [2, 98], axis=0)
    colours = np.zeros((*features.shape[:3], 3), np.uint8)
    shown = np.rint(255 * np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1))
    colours[usable] = np.pad(shown, ((0, 0), (0, 3 - shown.shape[1])))
    return colours
