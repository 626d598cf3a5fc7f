"""What every frozen encoder offers: an input of one square geometry, and one feature for each patch of it."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError

__all__ = ["FrozenEncoder", "Modality", "common_grid", "fingerprint"]

Modality = Literal["image", "depth"]


@dataclass(frozen=True, eq=False)
class FrozenEncoder:
    """An encoder that is not trained, with everything between a view and its patch features.

    Attributes:
        name: what it is, for tables.
        modality: "image" or "depth", what :meth:`prepare` takes.
        patch_size: side of a patch, pixels of the square input.
        dim: feature dimension.
        fingerprint: sha256, hexadecimal, over weights, input settings and the version of the library that runs it.
        device: where it computes.
        to_input: see :meth:`prepare`.
        to_features: (batch, channels, ...) on ``device`` to (batch, rows, columns, dim) float32.
        uses_camera: whether ``prepare`` reads its argument ``matrix``.
        to_tokens: as ``to_features``, class features (batch, dim) before them; None for encoders without a class token.
        to_layers: (batch, channels, ...) on ``device`` to maps (batch, rows, columns, dim) float32 of several
            resolutions, finest first; None for encoders of one map.
    """

    name: str
    modality: Modality
    patch_size: int
    dim: int
    fingerprint: str
    device: torch.device
    to_input: Callable[[np.ndarray | DepthMap, int, np.ndarray | None], Tensor]
    to_features: Callable[[Tensor], Tensor]
    uses_camera: bool = False
    to_tokens: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    to_layers: Callable[[Tensor], tuple[Tensor, ...]] | None = None

    def grid(self, size: int) -> int:
        """Patches along a side of a square of ``size`` pixels.

        Raises:
            ConfigError: the patches do not fill the square.
        """
        if size < self.patch_size or size % self.patch_size:
            near = max(round(size / self.patch_size), 1) * self.patch_size
            raise ConfigError(f"input size {size} is no multiple of the patch size {self.patch_size}; use {near}")
        return size // self.patch_size

    def prepare(self, view: np.ndarray | DepthMap, size: int, matrix: np.ndarray | None = None) -> Tensor:
        """The input of one view: normalised as this encoder needs it, padded to a centred square, resized.

        Args:
            view: an image, (height, width) grey or (height, width, 3) colour, uint8; or a depth map.
            size: side of the square, pixels.
            matrix: (3, 3) intrinsics of the view in pixels, centres of pixels at whole numbers; None if unknown.

        Returns:
            float32 on the CPU, (channels, size, size) for all encoders but ``fpfh``.

        Raises:
            ConfigError: the patches do not fill the square.
            DataError: the view is not what the encoder takes.
        """
        self.grid(size)
        if self.modality == "depth":
            if not isinstance(view, DepthMap):
                raise DataError(f"{self.name} encodes depth maps, got {type(view).__name__}")
        elif not (
            isinstance(view, np.ndarray)
            and view.dtype == np.uint8
            and (view.ndim == 2 or (view.ndim == 3 and view.shape[2] == 3))
            and view.size
        ):
            found = f"{view.shape} {view.dtype}" if isinstance(view, np.ndarray) else type(view).__name__
            raise DataError(f"an image must be (height, width) or (height, width, 3) uint8, got {found}")
        return self.to_input(view, size, matrix)

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """Patch features (batch, rows, columns, dim) float32, after the final norm, of stacked :meth:`prepare`."""
        return self.to_features(batch.to(self.device)).float()

    @torch.inference_mode()
    def class_and_patches(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Class features (batch, dim) and those of :meth:`encode`, float32, of stacked :meth:`prepare`.

        Where the encoder has no class token, its mean patch stands for it.
        """
        if self.to_tokens is None:
            patches = self.encode(batch)
            return patches.mean((1, 2)), patches
        classes, patches = self.to_tokens(batch.to(self.device))
        return classes.float(), patches.float()

    @torch.inference_mode()
    def layers(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Feature maps (batch, rows, columns, dim) float32 of every layer, finest first, of stacked :meth:`prepare`.

        Raises:
            ConfigError: the encoder has one map only.
        """
        if self.to_layers is None:
            raise ConfigError(f"encoder {self.name} has no layers: use a convolutional network, see docs/encoders.md")
        return tuple(part.float() for part in self.to_layers(batch.to(self.device)))


def common_grid(image: FrozenEncoder, depth: FrozenEncoder, image_size: int, depth_size: int) -> int:
    """Patches along a side, the same for both modalities: features of one cell must be of one place.

    Raises:
        ConfigError: the grids differ or do not fill their squares; the message names sizes that fit.
    """
    if image_size % image.patch_size == 0 == depth_size % depth.patch_size:
        rows = image.grid(image_size)
        if rows == depth.grid(depth_size):
            return rows
    near = {max(round(image_size / image.patch_size), 1), max(round(depth_size / depth.patch_size), 1)}
    fitting = [
        f"image {rows * image.patch_size} and depth {rows * depth.patch_size} ({rows}x{rows})" for rows in sorted(near)
    ]
    raise ConfigError(
        f"image size {image_size} with patches of {image.patch_size} and depth size {depth_size} with patches of "
        f"{depth.patch_size} have no common grid; sizes that have one: {', or '.join(fitting)}"
    )


def fingerprint(settings: Mapping, weights: Mapping[str, Tensor]) -> str:
    """sha256 over settings, which JSON can hold, and named weights."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(weights):
        weight = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
