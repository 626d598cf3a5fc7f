"""Maps that live on the training device, where the crops of a batch are made in one resampling per size of map.

What is kept is the network's input, ``depth.normalize``, as 16-bit codes: 0 where missing, 1..65535 linear between the
map's smallest and largest value. Values are within half a code, (largest - smallest) / 65534 / 2, of what the loader
crops from; validity, and so which crops are drawn for a (seed, position), is the same. The loader's workers then only
draw crops and masks: they keep one bit a pixel and never touch the device.
"""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_depth import distributed
from dino_depth.config import CropConfig, DataConfig
from dino_depth.depth import Normalization, normalize
from dino_depth.errors import ConfigError, ReportedError
from dino_depth.pretrain.crops import GLOBAL_CROPS
from dino_depth.pretrain.shared_arrays import SharedArrays
from dino_depth.progress import Progress
from dino_depth.resample import Pyramid
from dino_depth.shards import DepthShards

__all__ = ["ResidentMaps", "Validity"]

CODES = 65534  # steps between the smallest and the largest code of a valid pixel
TOGETHER = 32  # maps resampled at once: bounds what a batch of large maps needs beside them


class Validity:
    """Which pixels of each map are valid, one bit each: all that workers have of maps on the device.

    Args:
        masks: (height, width) bool of every map.
    """

    def __init__(self, masks: Iterable[np.ndarray]):
        bits, shapes = [], []
        for valid in masks:
            bits.append(np.packbits(valid))
            shapes.append(valid.shape)
        layout = {"bits": (sum(map(len, bits)), "<u1"), "starts": (len(bits) + 1, "<i8")}
        self._arrays = SharedArrays(layout | {"shapes": (2 * len(bits), "<i8")})
        self._arrays["bits"][:] = np.concatenate(bits)
        self._arrays["starts"][1:] = np.cumsum([len(part) for part in bits])
        self._arrays["shapes"][:] = np.array(shapes).reshape(-1)

    def shape(self, index: int) -> tuple[int, int]:
        height, width = self._arrays["shapes"][2 * index : 2 * index + 2].tolist()
        return height, width

    def __getitem__(self, index: int) -> np.ndarray:
        """(height, width) bool."""
        height, width = self.shape(index)
        start, end = self._arrays["starts"][index : index + 2].tolist()
        return np.unpackbits(self._arrays["bits"][start:end], count=height * width).reshape(height, width).view(bool)

    def load(self, index: int) -> tuple[np.ndarray, None]:
        return self[index], None


class _Inputs(Dataset):
    def __init__(self, shards: DepthShards, normalization: Normalization):
        self.shards, self.normalization = shards, normalization

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int):
        try:
            depth_map, _ = self.shards.sample(index)
        except ReportedError as error:
            return error
        return _encode(normalize(depth_map, self.normalization), depth_map.valid)


def _encode(values: np.ndarray, valid: np.ndarray) -> tuple[Tensor, float, float]:
    """The codes' bits (height, width) int16, the smallest value and the step between codes."""
    seen = values[valid].astype(np.float64)
    smallest, step = float(seen.min()), float(np.ptp(seen)) / CODES or 1.0
    codes = np.zeros(values.shape, np.uint16)
    codes[valid] = np.rint((seen - smallest) / step) + 1
    return torch.from_numpy(codes.view(np.int16)), smallest, step  # torch does little with uint16


class ResidentMaps:
    """Every map of ``shards`` on ``device``.

    Args:
        data: its ``normalization``, and its ``workers``, which decode.

    Raises:
        ConfigError: the device has not enough memory.
        DataError: a map does not decode.
    """

    def __init__(self, shards: DepthShards, data: DataConfig, device: torch.device):
        self.shards, self.device = shards, device
        self._codes: list[Tensor] = []
        scales: list[tuple[float, float]] = []
        self.reader = self.validity = Validity(self._valid(shards, data, scales))
        self._scales = torch.tensor(scales, dtype=torch.float32, device=device)  # (maps, 2)

    def _valid(self, shards: DepthShards, data: DataConfig, scales: list[tuple[float, float]]) -> Iterator[np.ndarray]:
        """The validity of every map, whose codes are put on the device meanwhile."""
        shown = Progress("maps to the device", len(shards), "maps") if distributed.rank() == 0 else nullcontext()
        try:
            with shown as progress:
                for codes, smallest, step in self._read(shards, data):
                    self._codes.append(codes.to(self.device))
                    scales.append((smallest, step))
                    yield codes.numpy() != 0
                    if progress:
                        progress.advance()
        except torch.OutOfMemoryError:
            size = sum(codes.nbytes for codes in self._codes) * len(shards) / max(1, len(self._codes)) / 2**30
            raise ConfigError(
                f"data.on_device: {len(shards)} maps of some {size:.0f} GiB do not fit {self.device}"
            ) from None

    @staticmethod
    def _read(shards: DepthShards, data: DataConfig) -> Iterator[tuple[Tensor, float, float]]:
        for item in DataLoader(_Inputs(shards, data.normalization), batch_size=None, num_workers=data.workers):
            if isinstance(item, Exception):
                raise item
            yield item

    def crop(self, indices: Tensor, affines: Tensor, config: CropConfig) -> tuple[Tensor, Tensor]:
        """Global (maps, 2, 1, S, S) and local (maps, local_crops, 1, s, s) crops, as ``crops.multi_crop`` makes them.

        Args:
            indices: (maps,) in the shards.
            affines: (maps, crops, 2, 3) float64 of ``crops.draw_crops``.
        """
        maps, sizes = len(indices), (config.global_size, config.local_size)
        counts = (GLOBAL_CROPS, affines.shape[1] - GLOBAL_CROPS)
        results = [
            torch.empty(maps, count, 1, size, size, device=self.device)
            for count, size in zip(counts, sizes, strict=True)
        ]
        alike: dict[tuple[int, int], list[int]] = {}
        for place, index in enumerate(indices.tolist()):
            alike.setdefault(self.validity.shape(index), []).append(place)
        for places in alike.values():
            for start in range(0, len(places), TOGETHER):
                chosen = places[start : start + TOGETHER]
                pyramid = self._pyramid(indices[chosen])
                for crops, part in zip(results, affines[chosen].split(counts, 1), strict=True):
                    crops[chosen] = pyramid.sample(part.numpy(), crops.shape[-1])
        return results[0], results[1]

    def _pyramid(self, indices: Tensor) -> Pyramid:
        """Of maps of one size."""
        codes = torch.stack([self._codes[index] for index in indices.tolist()]).int() & 0xFFFF
        smallest, step = self._scales[indices.to(self.device)].T[:, :, None, None]
        return Pyramid((codes - 1) * step + smallest, codes > 0)
