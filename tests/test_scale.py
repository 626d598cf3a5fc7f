"""The benchmark of many maps: its synthetic folders are what prep would write, and its figures mean what they say."""

import pytest

from benchmarks import scale
from dino_depth.shards import DepthShards


def test_synthetic_folders_open_and_are_ordered(tmp_path):
    folder = scale.synthetic(tmp_path / "many", 3000)
    shards = DepthShards(str(folder))
    assert len(shards) == 3000 and shards.key(2999) == "synthetic/category/train-good-000002999"
    assert len(shards.paths) == 6 and shards.column("shard")[[511, 512]].tolist() == [0, 1]
    assert shards.count_datasets() == {(folder, "lit"): 1500, (folder, "plain"): 1500}
    assert len(set(shards.column("scene").tolist())) == 251  # scenes of six, and none
    for settings in ({}, {"mixing": {"lit": 1.0, "plain": 1.0}}, {"one_per_group": True}, {"window": 2}):
        assert scale.ordering(folder, settings)["us a map"] > 0
    assert scale.opening(folder, 1).keys() == {"s", "MiB"}
    assert 0 < scale.fresh(scale.joining, folder)["MiB"] < 3000 * 1000 / 2**20


def test_a_plan_holds_little_more_than_the_names_of_its_files(tmp_path):
    """An object for each took 1200 bytes a map. Two sizes, as some memory is taken once."""
    few, many = (scale.fresh(scale.planning, tmp_path / f"{maps}", maps)["MiB"] for maps in (5000, 40_000))
    assert (many - few) * 2**20 < 35_000 * 400


def test_windows_fetch_every_shard_once_and_any_order_nearly_always(tmp_path, monkeypatch):
    monkeypatch.setattr(scale, "SHARD", 10)
    monkeypatch.setattr(scale, "READ", 3000)
    folder = scale.synthetic(tmp_path / "many", 3000)
    assert scale.fetching(folder, 15) == {"shards a map": 0.1}
    assert scale.fetching(folder, 0)["shards a map"] == pytest.approx(0.9, abs=0.03)


def test_folders_without_an_index_are_walked(tmp_path):
    assert len(DepthShards(str(scale.walked(tmp_path / "old", 600)))) == 600


def test_figures_are_extended_along_their_line():
    assert scale.extrapolate([10, 20], [3.0, 5.0], 100) == 21
    assert scale.extrapolate([20], [5.0], 100) == 25
    assert scale.extrapolate([10, 20], [3.0, 2.9], 100) == 2.9
    found = {"x": [{"s": 1.0, "us a map": 7.0}, {"s": 2.0, "us a map": 8.0}]}
    lines = scale.table([10, 20], 40, found).splitlines()
    assert lines[2:] == ["| x, s | 1 | 2 | 4 |", "| x, us a map | 7 | 8 | 8 |"]
