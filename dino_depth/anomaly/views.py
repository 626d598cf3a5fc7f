"""One instance as heads see it: features, pixels and geometry, each computed when it is first asked for, and once.

Heads read, by what they name in ``needs``:

    image, depth    (views, n, n, dim) float32 features of the image encoder and of the depth encoder
    share           (views, n, n) float32, share of each cell's area that is the object with valid depth
    layers          feature maps of several resolutions of an encoder that has them
    pixels          images, depth maps and foregrounds as they were measured, ``pixels(size)`` as squares
    geometry        cameras, ``cell_points``, ``cloud``
    motion          the motion to where the training instance lay, for heads that bring both together themselves; all
                    other heads are given views that were moved there (``registration.method``)

``SampleFeatures`` has the first two lines alone: a head that needs no more takes it in place of ``Views``.
"""

import copy
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dino_depth.anomaly.dataset import Sample, named
from dino_depth.anomaly.features import FeatureStore, SampleFeatures, camera_matrix
from dino_depth.anomaly.foreground import foreground
from dino_depth.anomaly.geometry import Camera, SquareFit, lift, resize_camera
from dino_depth.anomaly.registration import Cloud, Motion, make_cloud, moved_sample
from dino_depth.depth import DepthMap, grey
from dino_depth.errors import DataError

__all__ = ["NEEDS", "Standard", "Views"]

NEEDS = frozenset({"image", "depth", "layers", "pixels", "geometry", "motion"})


@dataclass(frozen=True, eq=False)
class Standard:
    """Shift and scale of every channel: the object's cells of the training instances then have mean 0 and variance 1.

    Features of small networks have much in common everywhere, which a cosine cannot see past.

    Attributes:
        statistics: by modality, means and standard deviations (classes, dim).
    """

    statistics: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, train: "Sequence[Views]") -> "Standard":
        """From the training instances of every class, whose indices are 0 to C - 1."""
        statistics = {}
        for modality in ("image", "depth"):
            rows: list[list[Tensor]] = [[] for _ in range(1 + max(views.class_index for views in train))]
            for views in train:
                rows[views.class_index].append(getattr(views, modality)[views.share > 0].double())
            cells = [torch.cat(parts) for parts in rows]
            mean = torch.stack([part.mean(0) for part in cells])
            spread = torch.stack([part.std(0, correction=0) for part in cells])
            # A channel that never changes says nothing, and is not blown up.
            floor = 1e-6 * spread.amax(1, keepdim=True).clamp_min(1e-12) if spread.shape[1] else spread
            statistics[modality] = mean.float(), torch.where(spread > floor, spread, torch.inf).float()
        return cls(statistics)

    def __call__(self, features: Tensor, modality: str, class_index: int) -> Tensor:
        mean, spread = self.statistics[modality]
        return (features - mean[class_index]) / spread[class_index]


class Views:
    """The V views of one instance.

    Args:
        sample: whose views are read when something of them is asked for.
        store: what encodes them.
        class_index: place of the instance's class among those of the head.
        resident: whether the sample's pixels lie in memory, so that looking at all of them at once costs nothing.

    Attributes:
        sample, class_index: as given.
        motion: from the world of the instance to that of the training instance; None without registration.
    """

    def __init__(self, sample: Sample, store: FeatureStore, class_index: int = 0, resident: bool = False):
        self.sample, self.class_index = sample, class_index
        self.motion: Motion | None = None
        self._store, self._resident = store, resident
        self._standard: Standard | None = None
        self._masks: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.sample.views)

    @property
    def place(self) -> str:
        """What messages call the instance."""
        return f"{self.sample.category}/{self.sample.name}"

    @cached_property
    def _features(self) -> SampleFeatures:
        # View by view, so that the first are encoded while others are still being read.
        return self._store.get(self.sample, self._foreground if self._resident else None)

    @property
    def image(self) -> Tensor:
        """(V, n, n, dim) float32; dim is 0 where images are not encoded."""
        return self._given("image")

    @property
    def depth(self) -> Tensor:
        """(V, n, n, dim) float32; dim is 0 where depth is not encoded."""
        return self._given("depth")

    @property
    def share(self) -> Tensor:
        """(V, n, n) float32, share of each cell's area that is foreground with valid depth."""
        return self._features.share

    def _given(self, modality: str) -> Tensor:
        features = getattr(self._features, modality)
        return features if self._standard is None else self._standard(features, modality, self.class_index)

    def changed(self, *, standard: "Standard | None" = None, motion: Motion | None = None) -> "Views":
        """The same instance, with features standardised or a motion known; what was computed stays computed."""
        other = copy.copy(self)
        other._standard, other.motion = standard or self._standard, motion or self.motion
        return other

    def encoded(self, store: FeatureStore, class_index: int = 0) -> "Views":
        """The same instance with plain features of a store, of its own or another; what was read stays."""
        other = copy.copy(self)
        other.class_index, other._standard = class_index, None
        if store is not self._store:
            other._store = store
            for name in ("_features", "cell_points"):
                other.__dict__.pop(name, None)
        return other

    def moved(self, motion: Motion) -> "tuple[Views, list[np.ndarray]]":
        """The instance where the training instance lay, and the displacement of its pixels: see ``registration``."""
        sample, moves = moved_sample(self.sample, self.images, self.depths, self.cameras, motion.matrix)
        return Views(sample, self._store, self.class_index, resident=True), moves

    def layers(self, modality: str) -> tuple[Tensor, ...]:
        """Feature maps (V, r, r, dim) float32 of every layer of an encoder, each at its own resolution; not cached.

        Raises:
            ConfigError: the encoder has no layers.
        """
        return self._store.layers(self.sample, modality)

    @cached_property
    def images(self) -> tuple[np.ndarray, ...]:
        """(height, width) or (height, width, 3) uint8 of each view.

        Raises:
            DataError: a view cannot be read; the message names it.
        """
        return tuple(self._named(view.name, view.read_image) for view in self.sample.views)

    @cached_property
    def depths(self) -> tuple[DepthMap, ...]:
        """The depth map of each view; raises as ``images``."""
        return tuple(self._named(view.name, view.read_depth) for view in self.sample.views)

    @cached_property
    def foregrounds(self) -> tuple[np.ndarray, ...]:
        """(height, width) bool, the object's valid pixels of each view; raises DataError where there are none."""
        return tuple(self._foreground(place) for place in range(len(self)))

    def _foreground(self, place: int) -> np.ndarray:
        if place not in self._masks:
            view = self.sample.views[place]
            depth = self._named(view.name, view.read_depth) if self._resident else self.depths[place]
            self._masks[place] = self._named(view.name, foreground, depth, self._store.object_pixels)
        return self._masks[place]

    @cached_property
    def cameras(self) -> tuple[Camera, ...]:
        """The camera of each view at the size of its depth map.

        Raises:
            DataError: a view has none, or one of another shape.
        """
        if any(view.camera is None for view in self.sample.views):
            raise DataError(f"{self.place}: a view has no camera")
        return tuple(
            self._named(view.name, resize_camera, view.camera, *depth.depth.shape)
            for view, depth in zip(self.sample.views, self.depths, strict=True)
        )

    def pixels(self, size: int) -> Tensor:
        """The images as padded squares, (V, channels, size, size) float32, 0 to 1; padding is 0."""
        squares = []
        for image in self.images:
            planes = [image] if image.ndim == 2 else list(np.moveaxis(image, 2, 0))
            fit = SquareFit(*image.shape[:2], size)
            squares.append(torch.stack([fit.fit(torch.from_numpy(plane.astype(np.float32) / 255)) for plane in planes]))
        return torch.stack(squares)

    def grey(self) -> list[np.ndarray]:
        """The luminance (height, width) float32 of each image, 0 to 1."""
        return [grey(image) / 255 for image in self.images]

    @cached_property
    def cell_points(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the cells' centres lie: (V, n, n, 3) float64 world metres, and which show the object, (V, n, n) bool.

        A cell whose centre has no depth is at that of the nearest object pixel within the cell, else it shows none.
        """
        count = self._store.cells
        points, found = np.zeros((len(self), count, count, 3)), np.zeros((len(self), count, count), bool)
        for view, (camera, depth, mask) in enumerate(zip(self.cameras, self.depths, self.foregrounds, strict=True)):
            rows, columns, here = _cell_pixels(mask, count)
            pixels = np.stack([columns[here], rows[here]], 1)
            points[view][here] = lift(camera, pixels, depth.depth[rows[here], columns[here]])
            found[view] = here
        return points, found

    @cached_property
    def cloud(self) -> Cloud:
        """The object's surface, from all views."""
        return make_cloud(self.depths, self.cameras, self.foregrounds)

    def digest(self, needs: Iterable[str]) -> str:
        """sha256, hexadecimal, of what a head with these needs reads."""
        needs, digest = set(needs), hashlib.sha256(f"{self.class_index} ".encode())
        parts: list[Any] = []
        if needs & {"image", "depth"}:
            parts += [self.image.numpy(), self.depth.numpy(), self.share.numpy()]
        if needs & {"pixels", "geometry", "layers"}:
            for image, depth in zip(self.images, self.depths, strict=True):
                parts += [image, depth.depth, depth.valid]
            for view, depth in zip(self.sample.views, self.depths, strict=True):
                if view.camera is not None:
                    parts += [camera_matrix(view, depth.depth.shape), view.camera.camera_to_world]
                    parts += [np.array(view.camera.distortion)]
        for part in parts:
            digest.update(f"{part.shape} {part.dtype} ".encode())
            digest.update(np.ascontiguousarray(part))
        return digest.hexdigest()

    def _named(self, view: str, read: Any, *arguments: Any) -> Any:
        return named(f"{self.place}, view {view}", read, *arguments)


def _cell_pixels(mask: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row and column (count, count) of each cell's object pixel nearest to its centre, and whether it has one."""
    fit = SquareFit(*mask.shape, count)
    rows, columns = np.nonzero(mask)
    places = fit.to_square(np.stack([columns, rows], 1))  # cells' centres are whole numbers
    cell = np.rint(places).astype(np.int64).clip(0, count - 1)
    key = cell[:, 1] * count + cell[:, 0]
    order = np.lexsort((np.square(places - cell).sum(1), key))
    first = order[np.append(True, np.diff(key[order]) > 0)] if len(order) else order
    chosen = np.full(count * count, -1, np.int64)
    chosen[key[first]] = first
    here = (chosen >= 0).reshape(count, count)
    row, column = (np.where(chosen >= 0, part[chosen] if len(part) else 0, 0) for part in (rows, columns))
    return row.reshape(count, count), column.reshape(count, count), here
