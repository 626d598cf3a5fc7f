"""Which maps a rank reads for which backward pass, and the crops and masks made of them, by worker processes.

Everything is a function of the position in the run, see ``order.py``: neither the number of workers nor that of ranks
changes what a step sees.
"""

import signal
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dino_depth import distributed
from dino_depth.config import CropConfig, DataConfig, PretrainConfig
from dino_depth.depth import DepthMap, normalize
from dino_depth.errors import ReportedError
from dino_depth.pretrain.crops import GLOBAL_CROPS, crops_of_step, cut, draw_crops, partners
from dino_depth.pretrain.maps import Drawn, Maps, MapsInMemory, MapsInShards, Reader
from dino_depth.pretrain.masks import draw_masks
from dino_depth.pretrain.order import EndlessOrder
from dino_depth.pretrain.resident import ResidentMaps
from dino_depth.pretrain.shards import DepthShards
from dino_depth.resample import resample

__all__ = ["SIGNALS", "Crops", "make_loader", "next_crops", "open_maps", "order_of", "place", "positions"]

# Ctrl-C, the end of an allocation or a preemption, and what Slurm and submitit send before a time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def order_of(shards: DepthShards, config: PretrainConfig) -> EndlessOrder:
    return EndlessOrder(shards, config.data, config.train.seed)


def open_maps(shards: DepthShards, data: DataConfig, device: torch.device) -> Maps:
    """The maps of a run where its settings want them.

    Raises:
        ConfigError: the device has not enough memory.
        DataError: a map does not decode.
    """
    if data.on_device:
        return ResidentMaps(shards, data, device)
    return MapsInMemory(shards, data.workers) if data.resident else MapsInShards(shards)


class Crops(Dataset):
    """(position, index of the map there) -> its crops and masks: the same ones, whoever asks."""

    def __init__(self, reader: Reader, config: PretrainConfig):
        self.reader, self.config = reader, config

    def __getitem__(self, place: tuple[int, int]) -> Drawn | ReportedError:
        (position, index), config, seed = place, self.config, self.config.train.seed
        crops = crops_of_step(config.crops, seed, position // config.train.batch)
        grid = crops.global_size // config.model.patch_size
        try:
            valid, depth_map = self.reader.load(index)
        except ReportedError as error:
            return error  # raised in the training process, without the worker's trace around it
        affines = draw_crops(valid, crops, seed, position)
        return Drawn(
            index,
            torch.from_numpy(affines),
            torch.from_numpy(draw_masks(grid, config.loss, seed, position)),
            torch.from_numpy(partners(affines, grid)) if config.loss.dense_weight else (),
            cut(normalize(depth_map, config.data.normalization), valid, affines, crops) if depth_map else (),
            self._shown(depth_map, affines, crops) if config.distill.teacher else (),
        )

    @staticmethod
    def _shown(depth_map: DepthMap, affines: np.ndarray, crops: CropConfig) -> tuple[Tensor, bool]:
        depth, valid = (torch.from_numpy(part)[None] for part in (depth_map.depth, depth_map.valid))
        depth = resample(depth, valid, affines[None, :GLOBAL_CROPS], crops.global_size)[0]
        return depth, depth_map.kind == "metric"


def positions(config: PretrainConfig, first_step: int) -> Iterator[list[int]]:
    """This rank's positions of every backward pass from ``first_step`` to the end.

    A step takes the next ``batch`` positions, dealt in blocks to (pass, rank): the number of ranks and passes does not
    change which maps a step sees.
    """
    block = config.train.batch // (distributed.world_size() * config.train.accumulate)
    for step in range(first_step, config.train.steps):
        for turn in range(config.train.accumulate):
            start = step * config.train.batch + place(config, turn)
            yield list(range(start, start + block))


def place(config: PretrainConfig, turn: int) -> int:
    """Where in a step's batch this rank's maps of a pass begin."""
    ranks = distributed.world_size()
    return (turn * ranks + distributed.rank()) * (config.train.batch // (ranks * config.train.accumulate))


def make_loader(maps: Maps, config: PretrainConfig, first_step: int, device: torch.device):
    """Iterates over what :func:`next_crops` takes, a backward pass each."""
    order = order_of(maps.shards, config)
    return iter(
        DataLoader(
            Crops(maps.reader, config),
            # Looked up here: workers need no order.
            batch_sampler=([(place, order[place]) for place in batch] for batch in positions(config, first_step)),
            num_workers=config.data.workers,
            collate_fn=_collate,
            worker_init_fn=_quiet_worker,
            pin_memory=device.type == "cuda",
        )
    )


def _collate(samples: list):
    return next((sample for sample in samples if isinstance(sample, Exception)), None) or default_collate(samples)


def _quiet_worker(_):
    # Ctrl-C and Slurm's signals reach every process; the training process decides when its workers end.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def next_crops(
    loader, config: PretrainConfig, step: int, maps: Maps
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Sequence[Tensor] | None]:
    """Global (maps, 2, 1, S, S) and local (maps, local_crops, 1, s, s) crops, masks and partners (maps, 2, patches).

    And what a second teacher sees: the depth of the global crops, and whether it is metric, (maps,) bool. There are no
    partners, see ``crops.py``, where the dense loss is off, and no depth without a second teacher.

    Args:
        step: that the loader has come to.
        maps: that the loader was made with.

    Raises:
        DataError: a map does not decode.
        ReportedError: a worker was killed.
    """
    try:
        drawn = next(loader)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            text = " ".join(str(error).split())
            raise ReportedError(f"{text} Try fewer data.workers, or 0; dino-depth doctor shows memory.") from None
        raise
    if isinstance(drawn, Exception):
        raise drawn
    first, second = maps.crops(drawn, crops_of_step(config.crops, config.train.seed, step))
    return first, second, drawn.masks, *(part if len(part) else None for part in (drawn.partners, drawn.shown))
