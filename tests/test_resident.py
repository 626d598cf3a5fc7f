"""Maps in memory and on the device give the crops that the loader makes of each map alone, however workers start."""

import dataclasses
import gc
import json
import multiprocessing
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from dino_depth import distributed
from dino_depth.config import CropConfig, DataConfig
from dino_depth.depth import DepthMap, encode, fit_plane_of_codes, normalize
from dino_depth.errors import ConfigError, DataError
from dino_depth.pretrain import maps as maps_module
from dino_depth.pretrain import resident
from dino_depth.pretrain.crops import draw_crops, multi_crop
from dino_depth.pretrain.loading import make_loader, next_batch, on_device, open_maps
from dino_depth.pretrain.maps import MapsInMemory
from dino_depth.pretrain.resident import ResidentMaps, Validity
from dino_depth.pretrain.shared_arrays import SharedArrays
from dino_depth.pretrain.train import pretrain
from dino_depth.sample import sample_map
from dino_depth.shards import DepthShards
from tests.test_distributed import run_ranks

CROPS = CropConfig(global_size=42, local_size=14, local_crops=4)
CPU = torch.device("cpu")


class Maps(list):
    """Depth maps of several sizes in place of shards."""

    def sample(self, index):
        return self[index], {}

    def shape(self, index):
        return self[index].depth.shape

    def codes(self, index):
        coding = ("linear", "inverse")[index // 2 % 2]
        codes, near, far = encode(self[index], coding)
        description = {"near": near, "far": far, "kind": self[index].kind, "coding": coding}
        if index % 3:  # shards of before planes were stored have none
            plane, share = fit_plane_of_codes(codes, near, far, self[index].kind, coding)
            description["plane"] = [*map(float, plane), share]
        return codes, description


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


def test_maps_in_memory_are_those_that_are_stored():
    maps = random_maps()
    ours = MapsInMemory(maps, workers=2).reader
    kept = pickle.loads(content := pickle.dumps(ours))
    assert content.count(b"codes") == 1 and len(content) < sum(m.valid.size for m in maps), "the maps went along"
    for index in range(len(maps)):
        wanted = sample_map(*maps.codes(index))
        valid, found = kept.load(index)
        assert np.array_equal(found.depth, wanted.depth) and np.array_equal(valid, wanted.valid)
        assert found.kind == wanted.kind and (found.plane is None) == (wanted.plane is None) == (index % 3 == 0)
        if found.plane:
            assert np.array_equal(found.plane[0], wanted.plane[0]) and found.plane[1] == wanted.plane[1]


def test_a_bad_map_is_named_before_training_begins(shards):
    reader = DepthShards(str(shards), ["test"])
    reader.png = lambda index: b"no PNG"
    with pytest.raises(DataError, match="depth-.*tar: sample .*unreadable depth PNG"):
        MapsInMemory(reader, workers=0)
    path = reader.path(3)
    assert reader.shape(3) == (48, 48)
    reader._read = lambda index, *_: b"short"
    with pytest.raises(DataError, match=f"{path.name}: sample .*unreadable depth PNG"):
        MapsInMemory(reader, workers=0)


@pytest.mark.parametrize("nameless", [True, False])
def test_shared_arrays_are_one_memory_and_leave_nothing(monkeypatch, tmp_path, nameless):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if not nameless:
        monkeypatch.delattr(os, "memfd_create")
    ours = SharedArrays({"a": (3, "<u2"), "none": (0, "<f8"), "b": (2, "<f8")})
    theirs = pickle.loads(pickle.dumps(ours))
    again = pickle.loads(pickle.dumps(theirs))
    ours["a"][:], again["b"][1] = [1, 2, 65535], 0.1
    assert theirs["a"].tolist() == [1, 2, 65535] and ours["b"].tolist() == [0, 0.1] and len(ours["none"]) == 0
    place = Path(ours.place)
    assert place.exists() and len(list(tmp_path.iterdir())) == (not nameless)
    del ours
    gc.collect()
    assert not place.exists() and not list(tmp_path.iterdir())
    assert theirs["a"].tolist() == [1, 2, 65535], "freed while somebody reads it"


def _keep(config, folder: str):
    """A rank that keeps the maps in memory, and notes what it decoded and what it sees."""
    shards = DepthShards.configured(config.data)
    decoded, codes = [], shards.codes
    shards.codes = lambda index: decoded.append(index) or codes(index)
    distributed.start(CPU)
    maps = MapsInMemory(shards, 1)
    assert all(np.array_equal(maps.reader.load(i)[1].depth, shards.sample(i)[0].depth) for i in range(len(shards)))
    noted = {"place": maps.reader.arrays.place, "decoded": sorted(decoded)}
    Path(folder, f"{distributed.rank()}.json").write_text(json.dumps(noted))
    distributed.barrier()
    distributed.stop()


@pytest.mark.parametrize("alike", [True, False])
def test_the_ranks_of_a_machine_decode_every_map_once_into_one_memory(tiny, tmp_path, alike):
    ended = run_ranks(2, tmp_path / "ranks", _keep if alike else _keep_apart, tiny, str(tmp_path))
    assert ended == [(0, None)] * 2
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    everything = list(range(len(DepthShards.configured(tiny.data))))
    if alike:
        assert first["place"] == second["place"]
        assert (first["decoded"], second["decoded"]) == (everything[::2], everything[1::2])
    else:
        assert first["place"] != second["place"] and first["decoded"] == second["decoded"] == everything


def _keep_apart(config, folder: str):
    """Ranks that do not find each other's memory: on two machines, or in two containers."""
    maps_module._machine = lambda: os.environ["RANK"]
    _keep(config, folder)


def batches(config, count: int) -> list:
    shards = DepthShards.configured(config.data)
    maps = open_maps(shards, config.data, CPU)
    loader = make_loader(maps, config, 0, CPU)
    return [vars(on_device(next_batch(loader), maps, CPU)) for _ in range(count)]


@pytest.mark.parametrize(
    "start, kept",
    [("fork", "shards"), ("forkserver", "memory"), ("spawn", "shards"), ("spawn", "memory"), ("spawn", "device")],
)
def test_batches_do_not_depend_on_how_workers_start(tiny, monkeypatch, start, kept):
    tiny.data.resident, tiny.data.on_device, tiny.loss.dense_weight = kept == "memory", kept == "device", 1.0
    tiny.data.splits, tiny.train.steps = ["test"], 2
    wanted = batches(tiny, 2)
    context = multiprocessing.get_context(start)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)
    tiny.data.workers, tiny.data.resident = 1, kept == "memory"
    for found, expected in zip(batches(tiny, 2), wanted, strict=True):
        assert found["depth"] is found["metric"] is found["seen"] is None and found["kept_counts"]
        tensors = {name: part for name, part in found.items() if isinstance(part, torch.Tensor)}
        assert len(tensors) == 8 and all(torch.equal(part, expected[name]) for name, part in tensors.items())


def test_validity_comes_back():
    maps = random_maps()
    kept = Validity(depth_map.valid for depth_map in maps)
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
