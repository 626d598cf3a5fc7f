"""Which maps a rank reads for which backward pass, and the batches that worker processes make of them.

Everything is a function of the position in the run, see ``order.py``: neither the number of workers nor that of ranks
changes what a step sees.
"""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dino_depth import distributed
from dino_depth.config import CropConfig, DataConfig, PretrainConfig
from dino_depth.depth import DepthMap, normalize
from dino_depth.errors import ReportedError
from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.crops import GLOBAL_CROPS, crops_of_step, cut, draw_crops, partners
from dino_depth.pretrain.maps import Maps, MapsInMemory, MapsInShards, Reader
from dino_depth.pretrain.masks import draw_masks
from dino_depth.pretrain.order import EndlessOrder
from dino_depth.pretrain.resident import ResidentMaps
from dino_depth.resample import resample
from dino_depth.shards import DepthShards

__all__ = ["SIGNALS", "Passes", "make_loader", "next_batch", "on_device", "open_maps", "order_of", "positions"]

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


class Passes(Dataset):
    """(position, index of the map there) of every map of a pass -> its batch: the same one, whoever asks."""

    def __init__(self, reader: Reader, config: PretrainConfig):
        self.reader, self.config = reader, config

    def __getitem__(self, places: list[tuple[int, int]]) -> Batch | ReportedError:
        config, seed = self.config, self.config.train.seed
        step, first = divmod(places[0][0], config.train.batch)
        crops = crops_of_step(config.crops, seed, step)
        grid = crops.global_size // config.model.patch_size
        affines, made, masks, shown = [], [], [], []
        for position, index in places:
            try:
                valid, depth_map = self.reader.load(index)
            except ReportedError as error:
                return error  # raised in the training process, without the worker's trace around it
            affines.append(draw_crops(valid, crops, seed, position))
            masks.append(draw_masks(grid, config.loss, seed, position))
            if depth_map:
                made.append(cut(normalize(depth_map, config.data.normalization), valid, affines[-1], crops))
            if config.distill.teacher:
                shown.append(_shown(depth_map, affines[-1], crops))
        cuts = torch.tensor([index for _, index in places]), torch.from_numpy(np.stack(affines)), crops
        return Batch.make(
            tuple(zip(*made, strict=True)) or None,
            masks,
            config,
            step,
            first,
            [partners(part, grid) for part in affines] if config.loss.dense_weight else None,
            shown or None,
            None if made else cuts,
        )


def _shown(depth_map: DepthMap, affines: np.ndarray, crops: CropConfig) -> tuple[Tensor, bool]:
    """What a second teacher sees of a map: the depth of its global crops, and whether it is in metres."""
    depth, valid = (torch.from_numpy(part)[None] for part in (depth_map.depth, depth_map.valid))
    depth = resample(depth, valid, affines[None, :GLOBAL_CROPS], crops.global_size)[0]
    return depth, depth_map.kind == "metric"


def positions(config: PretrainConfig, first_step: int) -> Iterator[list[int]]:
    """This rank's positions of every backward pass from ``first_step`` to the end.

    A step takes the next ``batch`` positions, dealt in blocks to (pass, rank): the number of ranks and passes does not
    change which maps a step sees.
    """
    ranks, passes = distributed.world_size(), config.train.accumulate
    block = config.train.batch // (ranks * passes)
    for turn in range(first_step * passes, config.train.steps * passes):
        start = (turn * ranks + distributed.rank()) * block
        yield list(range(start, start + block))


def make_loader(maps: Maps, config: PretrainConfig, first_step: int, device: torch.device):
    """Iterates over what :func:`next_batch` takes, a backward pass each."""
    order = order_of(maps.shards, config)
    return iter(
        DataLoader(
            Passes(maps.reader, config),
            # Looked up here: workers need no order.
            sampler=([(place, order[place]) for place in block] for block in positions(config, first_step)),
            batch_size=None,
            num_workers=config.data.workers,
            worker_init_fn=_quiet_worker,
            pin_memory=device.type == "cuda",
        )
    )


def _quiet_worker(_):
    # Ctrl-C and Slurm's signals reach every process; the training process decides when its workers end.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def next_batch(loader) -> Batch:
    """The batch of the next pass, on the host.

    Raises:
        DataError: a map does not decode.
        ReportedError: a worker was killed.
    """
    try:
        batch = next(loader)
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            text = " ".join(str(error).split())
            raise ReportedError(f"{text} Try fewer data.workers, or 0; dino-depth doctor shows memory.") from None
        raise
    if isinstance(batch, Exception):
        raise batch
    return batch


def on_device(batch: Batch, maps: Maps, device: torch.device) -> Batch:
    """``batch`` on its way to ``device``; the crops of maps that lie there are cut there."""
    batch = batch.to(device)
    if isinstance(maps, ResidentMaps):
        crops = maps.crop(*batch.cuts)
        batch.global_crops, batch.local_crops = (part.transpose(0, 1).flatten(0, 1) for part in crops)
    return batch
