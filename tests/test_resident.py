"""Crops made of resident maps are those that the loader makes of each map alone."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from dino_depth.config import CropConfig, DataConfig
from dino_depth.depth import DepthMap, normalize
from dino_depth.errors import ConfigError, DataError
from dino_depth.pretrain import resident
from dino_depth.pretrain.crops import draw_crops, multi_crop
from dino_depth.pretrain.resident import ResidentMaps, Validity
from dino_depth.pretrain.shards import DepthShards
from dino_depth.pretrain.train import pretrain

CROPS = CropConfig(global_size=42, local_size=14, local_crops=4)
CPU = torch.device("cpu")


class Maps(list):
    """Depth maps of several sizes in place of shards."""

    def sample(self, index):
        return self[index], {}


def random_maps(count=9):
    random = np.random.default_rng(0)
    maps = Maps()
    for index in range(count):
        shape = ((60, 80), (91, 57), (60, 80), (130, 130))[index % 4]
        depth = (0.5 + 0.1 * random.random(shape)).astype(np.float32)
        maps.append(
            DepthMap.from_values(np.where(random.random(shape) < 0.2, 0, depth), ["metric", "relative"][index % 2])
        )
    return maps


@pytest.mark.parametrize("method", ["plane", "max", "minmax", "log"])
def test_batched_crops_equal_one_map_at_a_time(monkeypatch, method):
    monkeypatch.setattr(resident, "TOGETHER", 2)
    maps, data = random_maps(), DataConfig(workers=0)
    data.normalization.method = method
    kept = ResidentMaps(maps, data, CPU)
    order = [4, 8, 0, 3, 3, 7, 2, 1]
    affines = [draw_crops(kept.validity[index], CROPS, 5, place) for place, index in enumerate(order)]
    results = kept.crop(torch.tensor(order), torch.from_numpy(np.stack(affines)), CROPS)
    assert [tuple(part.shape) for part in results] == [(8, 2, 1, 42, 42), (8, 4, 1, 14, 14)]
    for place, index in enumerate(order):
        values = normalize(maps[index], data.normalization)
        half_a_code = np.ptp(values[maps[index].valid]) / 65534 / 2
        alone = multi_crop(values, maps[index].valid, CROPS, 5, place)
        for ours, wanted in zip(results, alone, strict=True):
            assert torch.equal(ours[place] == 0, wanted == 0)
            assert (ours[place] - wanted).abs().max() <= 1.1 * half_a_code + 1e-6 * np.abs(values).max()


def test_validity_comes_back():
    maps, kept = random_maps(), Validity()
    for depth_map in maps:
        kept.append(depth_map.valid)
    assert all(np.array_equal(kept[index], depth_map.valid) for index, depth_map in enumerate(maps))
    assert kept[0].dtype == bool


def test_a_map_of_one_value_comes_back():
    data = DataConfig(workers=0)
    data.normalization.method = "max"
    kept = ResidentMaps(Maps([DepthMap.from_values(np.full((30, 30), 0.7, np.float32))]), data, CPU)
    affines = draw_crops(kept.validity[0], CROPS, 0, 0)[None]
    crops, _ = kept.crop(torch.tensor([0]), torch.from_numpy(affines), CROPS)
    assert set(crops.unique().tolist()) <= {0.0, 1.0} and (crops == 1).float().mean() > 0.5


@pytest.mark.parametrize("workers", [0, 2])
def test_shards_are_read_by_workers_and_a_bad_map_is_named(shards, workers):
    reader = DepthShards(str(shards), ["test"])
    kept = ResidentMaps(reader, DataConfig(workers=workers), CPU)
    for index in (0, 11, 23):
        assert np.array_equal(kept.validity[index], reader.sample(index)[0].valid)
    reader.png = lambda index: b"no PNG"
    with pytest.raises(DataError, match="sample .*unreadable depth PNG"):
        ResidentMaps(reader, DataConfig(workers=workers), CPU)


def test_too_many_maps_are_one_line(monkeypatch):
    def full(self, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.Tensor, "to", full)
    with pytest.raises(ConfigError, match="data.on_device: 9 maps"):
        ResidentMaps(random_maps(), DataConfig(workers=0), CPU)


def test_a_run_on_resident_maps_does_not_depend_on_its_workers(tiny, tmp_path):
    losses, tiny.crops.sizes = [], [(56, 28)]
    for workers in (0, 2):
        config = dataclasses.replace(tiny, out=str(tmp_path / str(workers)))
        config.data = dataclasses.replace(tiny.data, on_device=True, workers=workers)
        config.train = dataclasses.replace(tiny.train, steps=4)
        pretrain(config)
        lines = (tmp_path / str(workers) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    plain = dataclasses.replace(tiny, out=str(tmp_path / "plain"), train=dataclasses.replace(tiny.train, steps=4))
    pretrain(plain)
    lines = (tmp_path / "plain" / "metrics.jsonl").read_text().splitlines()
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx([json.loads(line)["loss"] for line in lines], rel=1e-3)
