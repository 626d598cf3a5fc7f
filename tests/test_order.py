"""The order of training: exact shares, one map per scene, and a pure function of the position."""

import pickle
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from dino_depth.config import DataConfig, PretrainConfig, load_config, parse, save_config
from dino_depth.errors import ConfigError
from dino_depth.pretrain import loading, train
from dino_depth.pretrain import order as orders
from dino_depth.pretrain.order import DATASET, SCENE, WINDOW, EndlessOrder, epoch_shares
from dino_depth.pretrain.train import pretrain


def samples(**sizes) -> list[dict]:
    """Descriptions of maps without scenes, of several datasets, interleaved."""
    described = [
        {"dataset": name, "category": "c", "group": None, "place": place}
        for name, size in sizes.items()
        for place in range(size)
    ]
    random.Random(0).shuffle(described)
    return described


def scenes() -> list[dict]:
    """30 maps: scenes of 1 to 5 maps, two of which share an id in different categories, and maps without a scene."""
    described = []
    for dataset, category, group, size in (
        *(("lit", "can", f"{number}", number) for number in range(1, 6)),
        *(("lit", "vial", f"{number}", 2) for number in range(1, 4)),
        ("dark", "can", "1", 3),
        *(("dark", "can", None, 1) for _ in range(6)),
    ):
        described += [{"dataset": dataset, "category": category, "group": group}] * size
    random.Random(1).shuffle(described)
    return described


class Described(list):
    """Descriptions with the columns that an order looks at; three maps a shard."""

    def names(self, name):
        return sorted({meta[name] for meta in self})

    def column(self, name):
        if name == "scene":
            keys = [meta["group"] and (meta["dataset"], meta["category"], meta["group"]) for meta in self]
            known = [None, *dict.fromkeys(key for key in keys if key)]
            return np.array([known.index(key) for key in keys], np.uint64) << np.uint64(59)
        if name == "shard":
            return np.arange(len(self), dtype=np.int32) // 3
        return np.array([self.names(name).index(meta[name]) for meta in self], np.int32)


def permutation(*key, count: int) -> list[int]:
    return np.random.default_rng(list(key)).permutation(count).tolist()


def permutation_of_pool(seed: int, cycle: int, number: int, members: list[int]) -> list[int]:
    return [members[place] for place in permutation(seed, cycle, number, DATASET, count=len(members))]


def slow_sequence(described: list[dict], data: DataConfig, seed: int, epochs: int) -> list[int]:
    """The definition in plain lists, played from position 0 with counters instead of computed from a position."""
    units: list[list[int]] = []
    known: dict[tuple, int] = {}
    for index, meta in enumerate(described):
        key = (meta["dataset"], meta["category"], meta["group"])
        if data.one_per_group and meta["group"] is not None and key in known:
            units[known[key]].append(index)
        else:
            known[key] = len(units)
            units.append([index])
    visits = [0] * len(units)

    def visit(unit: int) -> int:
        members, cycle = units[unit], visits[unit] // len(units[unit])
        turn = permutation(seed, cycle, unit, SCENE, count=len(members))[visits[unit] % len(members)]
        visits[unit] += 1
        return members[turn]

    if not data.mixing:
        return [visit(unit) for e in range(epochs) for unit in permutation(seed, e, count=len(units))]

    names = sorted(name for name, weight in data.mixing.items() if weight > 0)
    of = {name: [u for u, members in enumerate(units) if described[members[0]]["dataset"] == name] for name in names}
    length, total = sum(map(len, of.values())), sum(data.mixing[name] for name in names)
    quotas = {name: length * data.mixing[name] / total for name in names}
    counts = {name: int(quotas[name]) for name in names}
    while sum(counts.values()) < length:
        counts[max(names, key=lambda name: quotas[name] - counts[name])] += 1
    labels = [name for name in names for _ in range(counts[name])]

    def endless(number: int, members: list[int]):
        cycle = 0
        while True:
            yield from permutation_of_pool(seed, cycle, number, members)
            cycle += 1

    following = {name: endless(number, of[name]) for number, name in enumerate(names)}
    dealt = [labels[place] for e in range(epochs) for place in permutation(seed, e, count=length)]
    return [visit(next(following[name])) for name in dealt]


class OrderBefore:
    """The order before datasets had weights: one permutation of all samples an epoch."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        return int(np.random.default_rng([self.seed, epoch]).permutation(self.count)[place])


SETTINGS = {
    "plain": (samples(a=7, b=12, c=3), DataConfig()),
    "weights": (samples(a=7, b=12, c=3), DataConfig(mixing={"a": 0.5, "b": 0.25, "c": 0.25})),
    "zero": (samples(a=7, b=12, c=3), DataConfig(mixing={"a": 0.0, "b": 3.0, "c": 1.0})),
    "single": (samples(a=7), DataConfig(mixing={"a": 0.1})),
    "tiny": (samples(a=1, b=1), DataConfig(mixing={"a": 1.0, "b": 1.0})),
    "scenes": (scenes(), DataConfig(one_per_group=True)),
    "weighted scenes": (scenes(), DataConfig(mixing={"lit": 1.0, "dark": 2.0}, one_per_group=True)),
    "scenes counted as maps": (scenes(), DataConfig(mixing={"lit": 1.0, "dark": 2.0})),
}


def sorted_by_windows(order: list[int], shards: list[int], window: int, key: list[int]) -> list[int]:
    """The definition in plain lists: shards in a random order, cut into windows, whose units keep their order."""
    known = sorted(set(shards))
    drawn = [known[permutation(*key, count=len(known)).index(place)] for place in range(len(known))]
    windows = [drawn[start : start + window] for start in range(0, len(drawn), window)]
    return [unit for shown in windows for unit in order if shards[unit] in shown]


@pytest.mark.parametrize("window", [1, 2, 5, 100])
@pytest.mark.parametrize("mixing", [{}, {"a": 0.5, "b": 0.25, "c": 0.25}])
def test_windows_are_the_definition(monkeypatch, window, mixing):
    described = Described(samples(a=7, b=12, c=3))
    shards = described.column("shard").tolist()
    order = EndlessOrder(described, DataConfig(window=window, mixing=mixing), 6)
    if not mixing:
        expected = [
            unit
            for epoch in range(5)
            for unit in sorted_by_windows(permutation(6, epoch, count=22), shards, window, [6, epoch, 0, WINDOW])
        ]
    else:
        plain = permutation_of_pool

        def windowed(seed, cycle, number, members):
            drawn = plain(seed, cycle, number, members)
            own = [shards[unit] for unit in members]
            places = sorted_by_windows([members.index(u) for u in drawn], own, window, [seed, cycle, number, WINDOW])
            return [members[place] for place in places]

        monkeypatch.setattr(f"{__name__}.permutation_of_pool", windowed)
        expected = slow_sequence(described, DataConfig(mixing=mixing), 6, 5)
    assert [order[position] for position in range(5 * 22)] == expected


def test_windows_read_every_map_once_and_few_shards_at_a_time():
    described = Described(samples(a=300))
    shards = described.column("shard")
    for scenes_too in (False, True):
        order = EndlessOrder(described, DataConfig(window=4, one_per_group=scenes_too), 0)
        epochs = [[order[300 * epoch + place] for place in range(300)] for epoch in range(3)]
        assert all(sorted(epoch) == list(range(300)) for epoch in epochs)
        # 12 maps a window, of 4 shards, in an order that is another one in every window and epoch.
        windows = [tuple(epoch[start : start + 12]) for epoch in epochs for start in range(0, 300, 12)]
        assert all(len(set(shards[list(shown)])) == 4 for shown in windows)
        assert len(set(windows)) == len(windows) and len({frozenset(shown) for shown in windows}) > 70
        assert sum(list(shown) == sorted(shown) for shown in windows) == 0
    with pytest.raises(ConfigError, match="data.window must be 0 or a number of shards, got -1"):
        EndlessOrder(described, DataConfig(window=-1), 0)


def test_half_the_memory_is_the_same_permutation():
    for count in (1, 2, 7, 1000, 70_001):
        assert np.array_equal(orders.epoch_order(count, 3, 5), np.random.default_rng([3, 5]).permutation(count))
    assert orders.epoch_order(10, 0, 0).dtype == np.int32


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("seed", [0, 3])
def test_the_order_is_the_definition_played_from_the_start(name, seed):
    described, data = SETTINGS[name]
    order = EndlessOrder(Described(described), data, seed)
    assert [order[p] for p in range(40 * order.count)] == slow_sequence(described, data, seed, 40)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_position_holds_the_same_map_whoever_asks_and_whenever(name):
    described, data = SETTINGS[name]
    order = EndlessOrder(Described(described), data, 5)
    expected = [order[p] for p in range(12 * order.count)]
    positions = list(range(len(expected)))
    random.Random(2).shuffle(positions)
    moved = pickle.loads(pickle.dumps(order))
    assert [moved[p] for p in positions] == [expected[p] for p in positions]
    for start in (1, order.count - 1, 7 * order.count + 1):
        resumed = EndlessOrder(Described(described), data, 5)
        assert [resumed[p] for p in range(start, len(expected))] == expected[start:]


def test_the_last_two_epochs_are_kept_and_no_more(monkeypatch):
    built, build = [], orders.epoch_order
    monkeypatch.setattr(orders, "epoch_order", lambda *key: built.append(key[-1]) or build(*key))
    order = EndlessOrder(Described(samples(a=7, b=12)), DataConfig(), 0)
    for place in range(19):
        order[3 * 19 + place], order[4 * 19 + place]
    assert built == [3, 4]
    order[5 * 19], order[4 * 19], order[3 * 19]
    assert built == [3, 4, 5, 3]


@pytest.mark.parametrize("one_per_group", [False, True])
def test_without_weights_and_scenes_the_order_is_what_it_was(one_per_group):
    described = samples(a=7, b=12)
    order, before = EndlessOrder(Described(described), DataConfig(one_per_group=one_per_group), 4), OrderBefore(19, 4)
    assert [order[p] for p in range(100)] == [before[p] for p in range(100)]
    unused = EndlessOrder(Described(scenes()), DataConfig(), 4)
    assert [unused[p] for p in range(100)] == [OrderBefore(30, 4)[p] for p in range(100)]


def test_no_map_repeats_before_its_dataset_is_through():
    described, data = SETTINGS["weights"]
    order = EndlessOrder(Described(described), data, 0)
    drawn = [order[p] for p in range(30 * order.count)]
    for name, size in (("a", 7), ("b", 12), ("c", 3)):
        own = [index for index in drawn if described[index]["dataset"] == name]
        cycles = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert all(len(set(cycle)) == size for cycle in cycles)
        assert len({tuple(cycle) for cycle in cycles}) > 5  # of the 6 orders that 3 maps have, and of many more


def test_an_epoch_holds_exactly_the_shares_and_mixes_them():
    described, data = SETTINGS["weights"]
    order = EndlessOrder(Described(described), data, 0)
    epochs = [[described[order[22 * e + p]]["dataset"] for p in range(22)] for e in range(50)]
    # 22 visits: 11, 5.5 and 5.5, of which the tie's one goes to the first name.
    assert all(Counter(epoch) == {"a": 11, "b": 6, "c": 5} for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 50


@pytest.mark.parametrize(
    "mixing, units, expected",
    [
        ({"a": 1, "b": 1, "c": 1}, {"a": 5, "b": 3, "c": 2}, {"a": 4, "b": 3, "c": 3}),
        ({"c": 1, "b": 1, "a": 1}, {"a": 5, "b": 4, "c": 2}, {"a": 4, "b": 4, "c": 3}),
        ({"a": 5.0, "b": 3.0, "c": 2.0}, {"a": 50, "b": 30, "c": 20}, {"a": 50, "b": 30, "c": 20}),
        ({"a": 0.1, "b": 0.2, "c": 0.7}, {"a": 50, "b": 30, "c": 20}, {"a": 10, "b": 20, "c": 70}),
        ({"a": 0, "b": 1e300, "c": 1e300}, {"a": 50, "b": 1, "c": 3}, {"b": 2, "c": 2}),
    ],
)
def test_shares_are_largest_remainders(mixing, units, expected):
    assert epoch_shares(mixing, units) == expected


def test_weights_by_size_are_the_default_shares():
    units = {"a": 15_500, "b": 4_147, "c": 8_450, "d": 5_354}
    assert epoch_shares({name: size / 7 for name, size in units.items()}, units) == units


def test_over_epochs_every_map_of_a_scene_is_seen_equally_often():
    described = scenes()
    order = EndlessOrder(Described(described), DataConfig(one_per_group=True), 0)
    assert order.count == 15
    counts = Counter(order[p] for p in range(60 * order.count))  # 60 divides by every scene's size
    keys = [(meta["dataset"], meta["category"], meta["group"]) for meta in described]
    for index, key in enumerate(keys):
        assert counts[index] == 60 // (1 if key[2] is None else keys.count(key))
    for epoch in range(60):
        seen = [keys[order[15 * epoch + place]] for place in range(15)]
        assert max(Counter(key for key in seen if key[2] is not None).values()) == 1


@pytest.mark.parametrize(
    "mixing, expected",
    [
        ({"viza": 1.0, "lit": 1.0}, r"no sample of dataset 'viza' \(found: lit, visa\); did you mean 'visa'\?"),
        ({"lit": 1.0}, "no weight to visa"),
        ({"lit": 1.0, "visa": -0.5}, "data.mixing.visa is -0.5"),
        ({"lit": 1.0, "visa": float("nan")}, "data.mixing.visa is nan"),
        ({"lit": float("inf"), "visa": 1.0}, "data.mixing.lit is inf"),
        ({"lit": 0.0, "visa": 0.0}, "0 for every dataset"),
        ({"lit": 1.0, "visa": 0.01}, "data.mixing.visa is 0.01: less than one of an epoch's 10 visits"),
        ({2: 1.0, "lit": 1.0, "visa": 1.0}, "no sample of dataset 2"),
    ],
)
def test_weights_that_cannot_be_followed_are_one_line(mixing, expected):
    with pytest.raises(ConfigError, match=expected) as error:
        EndlessOrder(Described(samples(lit=4, visa=6)), DataConfig(mixing=mixing), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--data.mixing.visa", "0.5", "--data.mixing.mvtec_ad=1"],
        ["--data.mixing", "{visa: 0.5, mvtec_ad: 1}"],
        ["--config", "FILE"],
        ["--config", "FILE", "--data.mixing.visa", "0.5"],
        ["--config", "pretrain", "--config", "FILE"],
    ],
)
def test_weights_come_from_files_and_from_the_command_line(tmp_path, arguments):
    file = tmp_path / "mine.yaml"
    file.write_text("data:\n  mixing:\n    visa: 0.5\n    mvtec_ad: 1\n")
    config = parse(PretrainConfig, [str(file) if word == "FILE" else word for word in arguments], "test")
    assert config.data.mixing == {"visa": 0.5, "mvtec_ad": 1.0}
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(PretrainConfig, tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    "data, expected",
    [
        ({"mixng": {"visa": 1}}, "data.mixing"),
        ({"workers": {"visa": 1}}, "data.workers"),
        ({"mixing": {"visa": "much"}}, "data.mixing"),
        ({"mixing": {"visa": {"pcb1": 1}}}, "data.mixing"),
        ({"normalization": {"mixing": 1}}, "data.normalization.mixing"),
    ],
)
def test_only_a_table_takes_keys_of_the_users_own(tmp_path: Path, data, expected):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"data": data}))
    with pytest.raises(ConfigError, match=expected):
        parse(PretrainConfig, ["--config", str(file)], "test")


def test_two_ranks_share_out_exactly_what_one_reads(tiny, monkeypatch):
    tiny.train.batch, tiny.train.accumulate, tiny.train.steps = 8, 2, 20
    described, data = SETTINGS["weighted scenes"]
    order = EndlessOrder(Described(described), data, 0)
    monkeypatch.setattr(loading.distributed, "world_size", lambda: 2)
    read = [[] for _ in range(tiny.train.steps)]
    for rank in range(2):
        monkeypatch.setattr(loading.distributed, "rank", lambda rank=rank: rank)
        for turn, positions in enumerate(loading.positions(tiny, 0)):
            read[turn // 2] += [order[position] for position in positions]
    alone = slow_sequence(described, data, 0, 20)
    assert [sorted(step) for step in read] == [sorted(alone[8 * s : 8 * s + 8]) for s in range(20)]


def test_training_follows_the_weights_and_refuses_before_it_makes_a_folder(tiny, monkeypatch):
    tiny.data.mixing = {"elsewhere": 1.0}
    with pytest.raises(ConfigError, match="elsewhere"):
        pretrain(tiny)
    assert not Path(tiny.out).exists()
    shards = train.DepthShards(tiny.data.shards, tiny.data.splits)
    (name,) = shards.names("dataset")
    tiny.data.mixing, tiny.train.steps, drawn = {name: 2.0}, 2, []
    read = train.DepthShards.sample
    monkeypatch.setattr(train.DepthShards, "sample", lambda self, index: drawn.append(index) or read(self, index))
    pretrain(tiny)
    order = EndlessOrder(shards, tiny.data, tiny.train.seed)
    assert drawn == [order[position] for position in range(16)]


@pytest.mark.parametrize("before, now", [(True, False), (False, True)])
def test_a_resumed_run_refuses_weights_that_came_or_went(tiny, before, now):
    tiny.train.steps = 2
    (name,) = train.DepthShards(tiny.data.shards).names("dataset")
    tiny.data.mixing = {name: 1.0} if before else {}
    pretrain(tiny)
    tiny.data.mixing, tiny.resume = {name: 1.0} if now else {}, True
    with pytest.raises(ConfigError, match=f"data.mixing.{name} was"):
        pretrain(tiny)
