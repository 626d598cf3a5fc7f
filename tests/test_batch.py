"""A batch from the loader's workers against one that is written out map by map and patch by patch."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from dino_depth import distributed
from dino_depth.config import PretrainConfig
from dino_depth.depth import normalize
from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.crops import crops_of_step, draw_crops, multi_crop, partners
from dino_depth.pretrain.loading import make_loader, next_batch, on_device, open_maps, order_of
from dino_depth.pretrain.masks import draw_masks
from dino_depth.resample import resample
from dino_depth.shards import DepthShards

CPU = torch.device("cpu")
SETTINGS = {
    "plain": {"model": {"drop_path": 0.0}},
    "registers, dense, passes": {"model": {"registers": 2}, "loss": {"dense_weight": 1.0}, "train": {"accumulate": 2}},
    "in a worker": {"data": {"workers": 1}, "loss": {"dense_weight": 0.5}},
    "sizes, in workers": {"data": {"workers": 2}, "crops": {"sizes": [(56, 28), (84, 14)]}},
    "every crop is masked": {"loss": {"mask_share": 1.0}},
    "no crop is masked": {"loss": {"mask_share": 0.0}},
    "in memory": {"data": {"resident": True}},
    "on the device": {"data": {"on_device": True, "workers": 1}, "crops": {"sizes": [(56, 28)]}},
    "second teacher": {"data": {"workers": 1}, "distill": {"teacher": "random:tiny"}},
}


def by_hand(config: PretrainConfig, maps, step: int, turn: int, rank: int, ranks: int) -> dict:
    """What :class:`Batch` says of its attributes, as Python numbers, and the crops in their order."""
    model, seed = config.model, config.train.seed
    crops, order = crops_of_step(config.crops, seed, step), order_of(maps.shards, config)
    grid, small = crops.global_size // model.patch_size, crops.local_size // model.patch_size
    count = config.train.batch // (config.train.accumulate * ranks)
    first = (turn * ranks + rank) * count
    places = [step * config.train.batch + first + place for place in range(count)]
    whole, parts, masks, faces, depths, kinds = [], [], [], [], [], []
    for position in places:
        index = order[position]
        depth_map, _ = maps.shards.sample(index)
        affines = draw_crops(depth_map.valid, crops, seed, position)
        if config.data.on_device:
            made = maps.crop(torch.tensor([index]), torch.from_numpy(affines)[None], crops)
            made = [part[0] for part in made]
        else:
            values = normalize(depth_map, config.data.normalization)
            made = multi_crop(values, depth_map.valid, crops, seed, position)
        whole.append(made[0])
        parts.append(made[1])
        masks.append(draw_masks(grid, config.loss, seed, position).tolist())
        faces.append(partners(affines, grid).tolist())
        depth, valid = (torch.from_numpy(part)[None] for part in (depth_map.depth, depth_map.valid))
        depths.append(resample(depth, valid, affines[None, :2], crops.global_size)[0])
        kinds.append(depth_map.kind == "metric")

    prefix, maps_of_set = 1 + model.registers, [(crop, place) for crop in range(2) for place in range(count)]
    length, hidden, weights, classes, pairs, pair_weights = prefix + grid**2, [], [], [], [[], []], []
    start = {pair: number * length for number, pair in enumerate(maps_of_set)}
    for crop, place in maps_of_set:
        mask, face = masks[place][crop], faces[place][crop]
        classes.append(start[crop, place])
        for patch in range(grid**2):
            if mask[patch]:
                hidden.append(start[crop, place] + prefix + patch)
                weights.append(1 / sum(mask) / (2 * count))
            if face[patch] >= 0:
                pairs[0].append(start[crop, place] + prefix + patch)
                pairs[1].append(start[1 - crop, place] + prefix + face[patch])
                pair_weights.append(1 / (sum(other >= 0 for other in face) * 2 * count))
    local = [2 * count * length + number * (prefix + small**2) for number in range(crops.local_crops * count)]
    side, seen = model.patch_size, []
    for crop, place in maps_of_set:
        corners = [(side * row, side * column) for row in range(grid) for column in range(grid)]
        image = whole[place][crop, 0]
        seen.append([bool(image[top : top + side, left : left + side].any()) for top, left in corners])
    taught, dense = bool(config.distill.teacher), bool(config.loss.dense_weight)
    return {
        "global_crops": torch.stack([whole[place][crop] for crop, place in maps_of_set]),
        "local_crops": torch.stack([part[crop] for crop in range(crops.local_crops) for part in parts]),
        "masks": [masks[place][crop] for crop, place in maps_of_set],
        "mask_weights": weights,
        "needed": classes + hidden + local,
        "branches": _kept(config, crops.local_crops, step, first, count),
        "pairs": pairs if dense else None,
        "pair_weights": pair_weights if dense else None,
        "depth": torch.stack([depths[place][crop] for crop, place in maps_of_set]) if taught else None,
        "metric": [kinds[place] for _, place in maps_of_set] if taught else None,
        "seen": seen if taught else None,
    }


def _kept(config: PretrainConfig, local_crops: int, step: int, first: int, count: int) -> list | None:
    """Of each branch the global and the local crops that take it, by the rule of ``stochastic_depth.py``."""
    if not config.model.drop_path:
        return None
    share, branches, crops = 1 - config.model.drop_path, 2 * config.model.depth, 2 + local_crops
    starts = np.random.default_rng([config.train.seed, step, 4]).uniform(0, 1 / share, (branches, crops, 1))[..., 0]
    found = []
    for branch in range(branches):
        sets = [[], []]
        for crop in range(crops):
            for place in range(count):
                begin = first + place + starts[branch][crop]
                if math.floor((first + place + 1 + starts[branch][crop]) * share) > math.floor(begin * share):
                    sets[crop >= 2].append((crop if crop < 2 else crop - 2) * count + place)
        found.append(sets)
    return found


def assert_equal(found, wanted, name: str):
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
    elif isinstance(found, torch.Tensor) and found.is_floating_point():
        assert found.dtype == torch.float32 and found.tolist() == pytest.approx(wanted, rel=1e-6), name
    else:
        assert (found.tolist() if isinstance(found, torch.Tensor) else found) == wanted, name


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_workers_batch_is_the_one_written_out(tiny, monkeypatch, name, ranks):
    for group, values in SETTINGS[name].items():
        setattr(tiny, group, dataclasses.replace(getattr(tiny, group), **values))
    tiny.train.steps, tiny.train.batch = 5, 12
    maps = open_maps(DepthShards.configured(tiny.data), tiny.data, CPU)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        loader = make_loader(maps, tiny, 2, CPU)
        for step in range(2, 5):  # as a run does that is resumed at step 2
            for turn in range(tiny.train.accumulate):
                batch = on_device(next_batch(loader), maps, CPU)
                wanted = by_hand(tiny, maps, step, turn, rank, ranks)
                kept = batch.branches()
                found = vars(batch) | {"branches": kept and [[part.tolist() for part in sets] for sets in kept]}
                for entry, value in wanted.items():
                    assert_equal(found[entry], value, f"{entry} of step {step}, pass {turn}")
                assert {*found} - {*wanted} == {"kept", "kept_counts", "cuts"}
        assert next(loader, None) is None


def test_no_local_crops():
    config = PretrainConfig()
    config.crops.local_crops = 0
    grid = config.crops.global_size // config.model.patch_size
    crops = torch.randn(3, 2, 1, 224, 224), torch.randn(3, 0, 1, 98, 98)
    batch = Batch.make(crops, torch.zeros(3, 2, grid**2, dtype=torch.bool), config)
    assert len(batch.local_crops) == 0 and len(batch.needed) == len(batch.global_crops) == 6
    assert all(len(local) == 0 for _, local in batch.branches())
