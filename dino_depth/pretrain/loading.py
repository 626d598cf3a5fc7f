"""Which maps a rank reads for which backward pass, and the crops and masks made of them, by worker processes.

Everything is a function of the position in the run, see ``order.py``: neither the number of workers nor that of ranks
changes what a step sees.
"""

import signal
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from dino_depth import distributed
from dino_depth.config import PretrainConfig
from dino_depth.depth import normalize
from dino_depth.errors import ReportedError
from dino_depth.pretrain.crops import crops_of_step, draw_crops, multi_crop
from dino_depth.pretrain.masks import draw_masks
from dino_depth.pretrain.order import EndlessOrder
from dino_depth.pretrain.resident import ResidentMaps, Validity
from dino_depth.pretrain.shards import DepthShards

__all__ = ["SIGNALS", "Crops", "make_loader", "next_crops", "order_of", "place", "positions"]

# Ctrl-C, the end of an allocation or a preemption, and what Slurm and submitit send before a time limit.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def order_of(shards: DepthShards, config: PretrainConfig) -> EndlessOrder:
    return EndlessOrder([entry.meta for entry in shards.entries], config.data, config.train.seed)


class Crops(Dataset):
    """Position -> crops of the map there, and masks: the same ones, whoever asks.

    With ``validity``, index and affines for :meth:`ResidentMaps.crop` instead of the crops.
    """

    def __init__(self, shards: DepthShards, config: PretrainConfig, validity: Validity | None = None):
        self.shards, self.config, self.validity = shards, config, validity
        self.order = order_of(shards, config)

    def __getitem__(self, position: int):
        config, index, seed = self.config, self.order[position], self.config.train.seed
        crops = crops_of_step(config.crops, seed, position // config.train.batch)
        grid = crops.global_size // config.model.patch_size
        masks = torch.from_numpy(draw_masks(grid, config.loss, seed, position))
        if self.validity is not None:
            return index, torch.from_numpy(draw_crops(self.validity[index], crops, seed, position)), masks
        try:
            depth_map, _ = self.shards.sample(index)
        except ReportedError as error:
            return error  # raised in the training process, without the worker's trace around it
        values = normalize(depth_map, config.data.normalization)
        return *multi_crop(values, depth_map.valid, crops, seed, position), masks


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


def make_loader(
    shards: DepthShards,
    config: PretrainConfig,
    first_step: int,
    device: torch.device,
    validity: Validity | None = None,
):
    """Iterates over what :func:`next_crops` takes, a backward pass each."""
    return iter(
        DataLoader(
            Crops(shards, config, validity),
            batch_sampler=positions(config, first_step),
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
    loader, config: PretrainConfig, step: int, resident: ResidentMaps | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Global (maps, 2, 1, S, S) and local (maps, local_crops, 1, s, s) crops and masks (maps, 2, patches).

    Args:
        step: that the loader has come to.
        resident: the maps whose validity the loader was made with.

    Raises:
        DataError: a map does not decode.
        ReportedError: a worker was killed.
    """
    try:
        read = next(loader)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            text = " ".join(str(error).split())
            raise ReportedError(f"{text} Try fewer data.workers, or 0; dino-depth doctor shows memory.") from None
        raise
    if isinstance(read, Exception):
        raise read
    first, second, masks = read
    if resident is None:
        return first, second, masks
    return *resident.crop(first, second, crops_of_step(config.crops, config.train.seed, step)), masks
