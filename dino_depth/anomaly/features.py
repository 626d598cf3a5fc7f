"""Features of samples: every view is encoded once per modality, and kept under what it was computed from.

A key of the cache is a sha256 over the encoder's fingerprint (weights, input settings, library version), the size of
the square, and the pixels: of the image, or of depth, validity and kind, with the intrinsics where the encoder reads
them. The device is not part of it: GPUs and CPUs differ in the last bits.

Features are rounded to float16, at most 0.05 % of a value from 6e-5 on and 3e-8 below, whether they come from the
cache or were just computed, so that both give the same bits.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dino_depth.anomaly.dataset import Sample, View, named
from dino_depth.anomaly.feature_cache import DIGEST, FeatureCache
from dino_depth.anomaly.foreground import ForegroundConfig, cell_share, foreground
from dino_depth.anomaly.geometry import resize_camera
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError
from dino_depth.frozen import FrozenEncoder, common_grid

__all__ = ["FeatureStore", "SampleFeatures", "camera_matrix"]


@dataclass(frozen=True, eq=False)
class SampleFeatures:
    """Features of one sample on one grid of cells over the padded square, views in the sample's order.

    Attributes:
        image: (views, rows, columns, dim) float32; dim is 0 where images were not encoded.
        depth: (views, rows, columns, dim) float32; dim is 0 where depth was not encoded.
        share: (views, rows, columns) float32, share of each cell's area that is foreground with valid depth.
        class_index: place of the sample's class among those of the head.
    """

    image: Tensor
    depth: Tensor
    share: Tensor
    class_index: int = 0


CELLS = 32  # along a side of the grid, where no encoder has one


class FeatureStore:
    """Gives samples as features.

    Args:
        image_encoder: of the images; None leaves them out.
        depth_encoder: of the depth maps; None leaves them out.
        size: side of the padded square, pixels, for both, or (image's, depth's) for encoders of different patch sizes.
        cache_dir: folder of the cache; None for no cache.
        limit_gib: what the cache never exceeds, GiB.
        object_pixels: which pixels count as foreground in ``share``.
        batch: views that are encoded at once.

    Attributes:
        encodes: views encoded so far, {"image": number, "depth": number}.
        cells: rows and columns of the grid.

    Raises:
        ConfigError: the encoders' grids differ (the message names sizes that fit), or an encoder is for the other
            modality.
    """

    def __init__(
        self,
        image_encoder: FrozenEncoder | None,
        depth_encoder: FrozenEncoder | None,
        size: int | tuple[int, int] = 896,
        cache_dir: str | Path | None = None,
        limit_gib: float = 20.0,
        *,
        object_pixels: ForegroundConfig | None = None,
        batch: int = 8,
    ):
        given = {"image": image_encoder, "depth": depth_encoder}
        self.encoders = {modality: encoder for modality, encoder in given.items() if encoder is not None}
        for modality, encoder in self.encoders.items():
            if encoder.modality != modality:
                raise ConfigError(f"{encoder.name} was loaded for {encoder.modality}, not for {modality}")
        if batch < 1:
            raise ConfigError(f"batch must be at least 1 view, got {batch}")
        self.sizes = dict(zip(("image", "depth"), (size, size) if isinstance(size, int) else size, strict=True))
        if len(self.encoders) == 2:
            self.cells = common_grid(image_encoder, depth_encoder, self.sizes["image"], self.sizes["depth"])
        elif self.encoders:
            ((modality, encoder),) = self.encoders.items()
            self.cells = encoder.grid(self.sizes[modality])
        else:
            self.cells = CELLS
        self.cache = None if cache_dir is None else FeatureCache(cache_dir, limit_gib)
        self.object_pixels = object_pixels or ForegroundConfig()
        self.batch = batch
        self.encodes = {"image": 0, "depth": 0}

    def get(self, sample: Sample, foregrounds: Callable[[int], np.ndarray] | None = None) -> SampleFeatures:
        """The features of a sample, from the cache where it has them.

        Args:
            foregrounds: (height, width) bool of a view, by its place; where they are wanted elsewhere, too.

        Raises:
            DataError: a view cannot be read, image and depth differ in size, depth shows no object, or features are
                not finite; the message names the view.
        """
        features = {
            modality: torch.zeros(len(sample.views), self.cells, self.cells, self._dim(modality))
            for modality in ("image", "depth")
        }
        share = np.zeros((len(sample.views), self.cells, self.cells), np.float32)
        waiting = {modality: [] for modality in self.encoders}
        for index, view in enumerate(sample.views):
            place = f"{sample.category}/{sample.name}, view {view.name}"
            try:
                inputs, share[index] = self._read(view, None if foregrounds is None else foregrounds(index))
                for modality, pixels in inputs.items():
                    found, key = self._find(modality, pixels, view)
                    if found is not None:
                        features[modality][index] = torch.from_numpy(found.astype(np.float32))
                        continue
                    matrix = camera_matrix(view, _shape(pixels))
                    prepared = self.encoders[modality].prepare(pixels, self.sizes[modality], matrix)
                    waiting[modality].append((index, place, key, prepared))
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
            for modality, pending in waiting.items():
                if len(pending) == self.batch:
                    self._encode(modality, pending, features[modality])
        for modality, pending in waiting.items():
            if pending:
                self._encode(modality, pending, features[modality])
        return SampleFeatures(features["image"], features["depth"], torch.from_numpy(share))

    def bytes_per_view(self) -> int:
        """What the cache keeps of a view."""
        return sum(2 * self.cells**2 * encoder.dim + DIGEST for encoder in self.encoders.values())

    def layers(self, sample: Sample, modality: str) -> tuple[Tensor, ...]:
        """Feature maps (V, r, r, dim) float32 of each layer of an encoder, finest first; never cached.

        Raises:
            ConfigError: the encoder gives one map only.
            DataError: as ``get``.
        """
        encoder = self.encoders[modality]
        found: list[list[Tensor]] = []
        for first in range(0, len(sample.views), self.batch):
            prepared = []
            for view in sample.views[first : first + self.batch]:
                place = f"{sample.category}/{sample.name}, view {view.name}"
                pixels = named(place, view.read_image if modality == "image" else view.read_depth)
                matrix = camera_matrix(view, _shape(pixels))
                prepared.append(named(place, encoder.prepare, pixels, self.sizes[modality], matrix))
            found.append([part.cpu() for part in encoder.layers(torch.stack(prepared))])
            self.encodes[modality] += len(prepared)
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _dim(self, modality: str) -> int:
        return self.encoders[modality].dim if modality in self.encoders else 0

    def _read(self, view: View, mask: np.ndarray | None) -> tuple[dict[str, np.ndarray | DepthMap], np.ndarray]:
        """What each encoder looks at, and the share (cells, cells) of the object."""
        depth_map = view.read_depth()
        inputs = {}
        if "image" in self.encoders:
            image = view.read_image()
            if image.shape[:2] != depth_map.depth.shape:
                sizes = ["x".join(map(str, part)) for part in (image.shape[:2], depth_map.depth.shape)]
                raise DataError(f"the image is {sizes[0]}, the depth map {sizes[1]}: they must be of one size")
            inputs["image"] = image
        if "depth" in self.encoders:
            inputs["depth"] = depth_map
        mask = foreground(depth_map, self.object_pixels) if mask is None else mask
        return inputs, cell_share(mask, self.cells)

    def _find(self, modality: str, pixels: np.ndarray | DepthMap, view: View) -> tuple[np.ndarray | None, str]:
        """The cached features, if any, and their key."""
        if self.cache is None:
            return None, ""
        encoder = self.encoders[modality]
        digest = hashlib.sha256(f"{encoder.fingerprint} {self.sizes[modality]} ".encode())
        if isinstance(pixels, DepthMap):
            digest.update(f"{pixels.kind} {pixels.depth.shape} ".encode())
            parts = [pixels.depth, pixels.valid]
        else:
            digest.update(f"{pixels.shape} {pixels.dtype} ".encode())
            parts = [pixels]
        matrix = camera_matrix(view, _shape(pixels))
        if encoder.uses_camera and matrix is not None:
            parts.append(matrix)
        for part in parts:
            digest.update(np.ascontiguousarray(part))
        key = digest.hexdigest()
        return self.cache.read(key, (self.cells, self.cells, encoder.dim)), key

    def _encode(self, modality: str, pending: list[tuple[int, str, str, Tensor]], features: Tensor):
        """Encodes views, empties ``pending`` and fills ``features`` and the cache."""
        encoder = self.encoders[modality]
        rounded = encoder.encode(torch.stack([prepared for *_, prepared in pending])).half().cpu()
        self.encodes[modality] += len(pending)
        for (_, place, *_), part in zip(pending, rounded, strict=True):
            if not part.isfinite().all():
                raise DataError(f"{place}: features of {encoder.name} are NaN, or beyond the 65504 of float16")
        features[[index for index, *_ in pending]] = rounded.float()
        if self.cache is not None:
            self.cache.write({key: part.numpy() for (*_, key, _), part in zip(pending, rounded, strict=True)})
        pending.clear()


def camera_matrix(view: View, shape: tuple[int, int]) -> np.ndarray | None:
    """(3, 3) intrinsics of a view at a size (height, width); None where it has no camera."""
    return None if view.camera is None else resize_camera(view.camera, *shape).matrix


def _shape(pixels: np.ndarray | DepthMap) -> tuple[int, int]:
    return pixels.depth.shape if isinstance(pixels, DepthMap) else pixels.shape[:2]
