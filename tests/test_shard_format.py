"""The format of shard folders: one strict reader of manifests, one walk over tars, and an index that is that walk."""

import gc
import hashlib
import io
import json
import pickle
import random
import shutil
import tarfile
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save

from data_prep import manifest as manifests
from data_prep import shard_writer
from data_prep.check import CheckConfig, check
from data_prep.folder import FolderOptions
from data_prep.inspect import InspectConfig, inspect
from data_prep.output import exclusive
from data_prep.shards import PrepareConfig, begin, finish, plan, prepare, write_share
from dino_depth import shard_format
from dino_depth import shards as reader_shards
from dino_depth.errors import DataError
from dino_depth.pretrain import run_folder
from dino_depth.shard_format import read_samples, shard_file
from dino_depth.shard_index import COLUMNS, INDEX, NAMES, SampleIndex, read_index
from dino_depth.shards import DepthShards
from dino_depth.storage import ShardCache
from tests.conftest import depth_scene


@pytest.fixture
def copied(shards, tmp_path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "copied"))


def edit(folder: Path, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def without_index(folder: Path) -> Path:
    """As folders were before there was an index."""
    edit(folder, lambda manifest: manifest.pop("index"))
    (folder / INDEX).unlink()
    return folder


READERS = {
    "pretrain": lambda folder: DepthShards(str(folder)),
    "check": lambda folder: check(CheckConfig(str(folder))),
    "inspect": lambda folder: inspect(InspectConfig(str(folder), str(folder.parent / "page.html"))),
}
HOSTILE = ["../depth.tar", "..", ".", "", "/etc/passwd", "a/b.tar", "000/../../x.tar", "000/", "\\\\host\\x.tar", "C:x",
           ".hidden.tar", "a\0.tar", "x\n.tar", 3, None, ["a.tar"]]  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("place", ["shards", "index"])
def test_every_reader_refuses_names_that_lead_elsewhere(copied, reader, place):
    for name in HOSTILE:
        row = {"file": name}
        edit(copied, lambda m, row=row: (m["shards"][1] if place == "shards" else m["index"]).update(row))
        with pytest.raises(DataError, match=r"manifest.json: (shards\[1\]|index).file must be ") as error:
            READERS[reader](copied)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: (m.clear(), m.update(version=2)), "is not a manifest of dino-depth shards"),
        (lambda m: m.update(version=4), "has version 4, this program reads 2 and 3"),
        (lambda m: m.pop("shards"), "shards must be of type list, got None"),
        (lambda m: m.update(shards={}), r"shards must be of type list, got \{\}"),
        (lambda m: m["shards"].append("a.tar"), r"shards\[4\] is no object"),
        (lambda m: m["shards"][0].pop("sha256"), r"shards\[0\].sha256 must be of type str, got None"),
        (lambda m: m["shards"][0].update(sha256="../x"), r"shards\[0\].sha256 must be 64 hexadecimal digits, got '"),
        (lambda m: m["shards"][0].update(bytes=-1), r"shards\[0\].bytes must not be negative, got -1"),
        (lambda m: m["shards"][0].update(samples=True), r"shards\[0\].samples must be of type int, got True"),
        (lambda m: m.update(index=[]), "index is no object"),
        (lambda m: m["sources"].update(folder=None), "sources.folder is no object"),
    ],
)  # fmt: skip
def test_every_reader_refuses_what_is_no_manifest(copied, reader, change, message):
    edit(copied, change)
    with pytest.raises(DataError, match=f"manifest.json:? {message}") as error:
        READERS[reader](copied)
    assert "\n" not in str(error.value)


def slow_index(folder: Path) -> list[tuple]:
    """Every sample by tarfile alone: key, shard, the two members' bytes, and its description."""
    rows = []
    for number, row in enumerate(json.loads((folder / "manifest.json").read_text())["shards"]):
        with tarfile.open(folder / row["file"]) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, content in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                rows.append((key, number, members[f"{key}.depth.png"], content))
    return rows


def test_the_index_is_what_the_tars_hold(shards):
    index, rows = read_index(shards / INDEX), slow_index(shards)
    names = [row["file"] for row in json.loads((shards / "manifest.json").read_text())["shards"]]
    assert len(index) == len(rows) == 84
    for number, (key, shard, png, description) in enumerate(rows):
        column = {name: index.columns[name][number] for name in COLUMNS if name != "keys"}
        assert index.key(number) == key and column["shard"] == shard
        content = (shards / names[shard]).read_bytes()
        for member, expected in (("png", png), ("json", description)):
            assert content[column[member] : column[member] + column[f"{member}_size"]] == expected
        stated = json.loads(description)
        assert {name: index.names[name][column[name]] for name in NAMES} == {name: stated[name] for name in NAMES}


@pytest.mark.parametrize("splits", [[], ["test"], ["train"]])
def test_folders_of_before_the_index_are_read_alike(copied, tmp_path, splits):
    new = DepthShards(str(copied), splits)
    old = DepthShards(str(without_index(Path(shutil.copytree(copied, tmp_path / "old")))), splits)
    both = DepthShards([str(copied), str(tmp_path / "old")], splits)
    assert len(new) == len(old) == len(both) // 2 == {"": 84, "train": 60, "test": 24}["".join(splits)]
    for column in ("dataset", "category", "split", "label"):
        assert list(new.values(column)) == list(old.values(column)) == list(both.values(column)[: len(new)])
        assert list(both.values(column)[len(new) :]) == list(new.values(column))
    assert np.array_equal(new.column("scene"), old.column("scene"))
    assert np.array_equal(both.column("shard"), np.concatenate([new.column("shard"), new.column("shard") + 4]))
    for index in (0, 7, len(new) - 1):
        assert new.description(index) == old.description(index) == both.description(len(new) + index)
        assert new.description(index)["split"] == new.values("split")[index]
        assert new.png(index) == old.png(index) == both.png(len(new) + index)
        assert both.folder(len(new) + index) == tmp_path / "old"
    for index in (-1, len(new)):
        with pytest.raises(IndexError):
            new.key(index)


def test_splits_that_alternate_are_found(tmp_path):
    rows = [("a", name) for name in "train test train train val test".split()]
    index = SampleIndex.of(
        (shard_format.StoredSample(f"{number}", (number, 1), (number, 1)),
         {"dataset": dataset, "category": "c", "split": split, "label": "l"})
        for number, (dataset, split) in enumerate(rows)
    )  # fmt: skip
    reader = object.__new__(DepthShards)
    for splits, expected in ((["train"], [0, 2, 3]), (["val", "test"], [1, 4, 5]), ([], [*range(6)])):
        reader.splits, reader._indices, reader.folders = splits, [index], ["x"]
        reader._find_runs()
        assert [reader._locate(place)[1] for place in range(len(reader))] == expected == [
            int(reader.key(place)) for place in range(len(reader))
        ]  # fmt: skip
        assert reader.column("png").tolist() == expected


def test_maps_of_a_scene_have_one_number_and_others_none():
    def described(dataset, category, group):
        return {"dataset": dataset, "category": category, "group": group, "split": "s", "label": "l"}

    rows = [("a", "b", "1"), ("a", "b", "1"), ("a", "c", "1"), ('a", "b', "", "1"), ("a", "b", None), ("a", "b", "2")]
    place = shard_format.StoredSample("k", (0, 1), (1, 1))
    scenes = SampleIndex.of((place, described(*row)) for row in rows).columns["scene"].tolist()
    assert scenes[0] == scenes[1] and scenes[4] == 0 and len(set(scenes)) == 5


def test_the_index_goes_to_other_processes_by_name(shards):
    reader = DepthShards(str(shards), ["test"])
    content = pickle.dumps(reader)
    reader.key(0)
    assert not any(reader.key(index).encode() in content for index in range(len(reader))), "its rows went along"
    moved = pickle.loads(content)
    assert [moved.description(index) for index in (0, 23)] == [reader.description(index) for index in (0, 23)]


def test_an_index_that_is_damaged_or_of_other_shards_is_one_line(copied, shards):
    path, whole = copied / INDEX, (shards / INDEX).read_bytes()
    generator = random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    for turn in range(60):
        damaged = bytearray(whole)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            index = DepthShards(str(copied))
            assert len(index) == 84  # a letter of a name
        except DataError as error:
            assert f"{path}: no index: " in str(error) and "\n" not in str(error)
        if turn == 0:
            with pytest.raises(DataError, match=f"{INDEX}: its sha256 differs"):
                check(CheckConfig(str(copied)))
    path.write_bytes(whole[:-1])
    for reader in ("pretrain", "check"):
        with pytest.raises(DataError, match=rf"{INDEX}: \d+ bytes, the manifest says \d+"):
            READERS[reader](copied)
    path.unlink()
    with pytest.raises(DataError, match=f"{INDEX}: No such file"):
        DepthShards(str(copied))
    # Whole, but of maps in another order.
    other = read_index(shards / INDEX)
    other.columns["png"] = other.columns["png"][::-1].copy()
    content = b"".join(other.pieces())
    path.write_bytes(content)
    edit(copied, lambda m: m["index"].update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)))
    with pytest.raises(DataError, match=f"{INDEX} disagrees with the shards"):
        check(CheckConfig(str(copied)))
    with pytest.raises(DataError, match=r"depth-000000.tar: sample folder/shape0/.*: unreadable depth PNG"):
        DepthShards(str(copied)).sample(0)


@pytest.mark.parametrize("column, value, message", [
    ("shard", 4, "the index names shard 4 of 4"), ("shard", -1, "the index names shard -1 of 4"),
    ("png_size", -5, "the index says -5 bytes at"), ("json", -5, "the index says [0-9]+ bytes at -5"),
    ("png_size", 2**31 - 1, "the index says 2147483647 bytes at"),
])  # fmt: skip
def test_an_index_that_leads_astray_is_one_line(copied, shards, column, value, message):
    index = read_index(shards / INDEX)
    changed = index.columns[column].copy()
    changed[5] = value
    index.columns[column] = changed
    (copied / INDEX).write_bytes(content := b"".join(index.pieces()))
    edit(copied, lambda m: m["index"].update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)))
    reader = DepthShards(str(copied))
    assert reader.sample(4)
    with pytest.raises(DataError, match=message):
        reader.sample(5)


def test_an_index_has_the_bytes_that_safetensors_writes(shards):
    index = read_index(shards / INDEX)
    index.names["label"].append('d\u00e9faut "1"')
    expected = save(index.columns, {"names": json.dumps(index.names)})
    assert b"".join(index.pieces()) == expected


def test_many_parts_are_joined_with_few_files_open(shards, monkeypatch):
    """Each mapped part holds one; a process may have a thousand."""
    opened, most = [], 0

    def part():
        nonlocal most
        gc.collect()
        opened.append(weakref.ref(found := read_index(shards / INDEX)))
        most = max(most, sum(index() is not None for index in opened))
        return found

    joined = SampleIndex.join(part() for _ in range(5))
    assert len(joined) == 5 * len(read_index(shards / INDEX)) and most <= 2


def test_a_few_files_are_open_however_many_shards_are_read(shards, monkeypatch):
    monkeypatch.setattr(reader_shards, "OPEN_FILES", 2)
    reader = DepthShards(str(shards))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for index in [*range(0, 84, 5)] * 2:
        assert reader.sample(index)[1]["key"] == reader.key(index)
        assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


def test_threads_that_read_a_shard_at_once_do_not_close_each_others_file(shards):
    for _ in range(20):
        reader, together = DepthShards(str(shards)), threading.Barrier(4)

        def read(index, reader=reader, together=together):
            together.wait()
            return reader.png(index)

        with ThreadPoolExecutor(4) as pool:
            assert all(content[:4] == b"\x89PNG" for content in pool.map(read, range(4)))


def test_only_the_first_rank_looks_at_every_shard(copied, monkeypatch):
    for path in sorted(copied.glob("*.tar"))[1:]:
        path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(DataError, match="depth-000001.tar: .* bytes, the manifest says"):
        DepthShards(str(copied))
    monkeypatch.setattr(reader_shards.distributed, "rank", lambda: 1)
    reader = DepthShards(str(copied))
    assert reader.sample(0)
    with pytest.raises(DataError, match="depth-000001.tar: sample .* bytes, the manifest says"):
        reader.sample(30)


def test_runs_of_before_the_index_are_resumed_on_the_same_samples(tiny, copied):
    reader = DepthShards(str(copied), ["train"])
    keys = "".join(reader.key(index) for index in range(len(reader)))
    text = "".join(row["sha256"] for row in reader.manifests[0]["shards"]) + keys
    assert run_folder._fingerprint_of_keys(reader) == hashlib.sha256(text.encode()).hexdigest()
    tiny.data.shards, tiny.resume = str(copied), True
    run_folder.RunFolder(tiny, reader).close()
    environment = Path(tiny.out, "env.json")
    stated = json.loads(environment.read_text())
    for known, fine in ((run_folder._fingerprint_of_keys(reader), True), ("0" * 64, False)):
        environment.write_text(json.dumps(stated | {"samples_sha256": known}))
        if fine:
            run_folder.RunFolder(tiny, reader).close()
        else:
            with pytest.raises(DataError, match="samples of .* are not those"):
                run_folder.RunFolder(tiny, reader)


# Many shards


@pytest.fixture
def folders_of_two(monkeypatch):
    monkeypatch.setattr(shard_format, "FILES_IN_A_FOLDER", 2)


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for number in range(7):
        np.save(root / f"{number}.npy", depth_scene(number, 24))
    return root


def settings(raw: Path, out, **changes) -> PrepareConfig:
    options = FolderOptions(unit="m")
    return PrepareConfig(
        "folder", str(raw), str(out), **{"workers": 1, "samples_per_shard": 1, "folder": options} | changes
    )


def hold_and_begin(planned):
    with exclusive(planned.out):
        begin(planned)


TREE = [*(f"{n // 2:03d}/depth-{n:06d}.tar" for n in range(7)), INDEX, "manifest.json"]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_names_of_shards():
    assert [shard_file(4999, 5000), shard_file(5000, 5001)] == ["depth-004999.tar", "001/depth-005000.tar"]
    most = -(-10_000_000 // 512)
    names = [shard_file(number, most) for number in range(most)]
    assert len(set(names)) == most and all(shard_format.PLAIN_NAME.fullmatch(name) for name in names)
    assert max(sum(name.startswith(f"{folder:03d}/") for name in names) for folder in range(5)) == 5000


def test_many_shards_lie_in_subfolders_wherever_they_are_written(raw, tmp_path, folders_of_two, capsys):
    prepare(settings(raw, tmp_path / "o"))
    whole = files(tmp_path / "o")
    assert sorted(whole) == sorted(TREE)
    check(CheckConfig(str(tmp_path / "o")))
    assert "is intact: 7 maps in 7 shards" in capsys.readouterr().out
    assert len({DepthShards(str(tmp_path / "o")).sample(index)[1]["key"] for index in range(7)}) == 7
    prepare(settings(raw, tmp_path / "o"))
    assert "was finished before and is intact" in capsys.readouterr().out
    # In pieces, as a cluster does, the first of which is lost.
    planned = plan(settings(raw, tmp_path / "pieces"))
    hold_and_begin(planned)
    for share in (planned.tasks[3:], planned.tasks[1:5]):
        write_share(planned, share)
    with pytest.raises(DataError, match=r"1 of 7 shards are not written \(000/depth-000000.tar\)"):
        finish(planned)
    write_share(planned, planned.tasks[:1])
    (planned.out / "000" / "depth-000099.tar").write_bytes(b"")
    hold_and_begin(planned)
    finish(planned)
    assert files(tmp_path / "pieces") == whole
    # A URL.
    prepare(settings(raw, "memory://many/o", staging=str(tmp_path / "staging")))
    stored = MemoryFileSystem()
    assert {name.removeprefix("/many/o/"): stored.cat_file(name) for name in stored.find("/many/o")} == whole
    assert not (tmp_path / "staging").exists()
    check(CheckConfig("memory://many/o", str(tmp_path / "cache")))
    remote = DepthShards("memory://many/o", cache=ShardCache(tmp_path / "cache2"))
    assert [remote.key(index) for index in range(7)] == [DepthShards(str(tmp_path / "o")).key(i) for i in range(7)]
    assert remote.sample(6)[1] == DepthShards(str(tmp_path / "o")).sample(6)[1]
    stored.rm("/many/o/002/depth-000005.tar")
    with pytest.raises(DataError, match="memory://many/o/002/depth-000005.tar: the shard is missing"):
        prepare(settings(raw, "memory://many/o", staging=str(tmp_path / "staging")))


def test_the_index_does_not_depend_on_workers_or_on_what_was_there(raw, tmp_path):
    for name, changes in (("a", {"workers": 1}), ("b", {"workers": 2})):
        prepare(settings(raw, tmp_path / name, samples_per_shard=2, **changes))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    # A shard whose part of the index is lost is written again; the others are not.
    planned = plan(settings(raw, tmp_path / "c", samples_per_shard=2))
    hold_and_begin(planned)
    write_share(planned, planned.tasks)
    planned.tasks[2].index_path.unlink()
    assert [shard_writer.finished_row(task) is None for task in planned.tasks] == [False, False, True, False]
    prepare(settings(raw, tmp_path / "c", samples_per_shard=2))
    assert files(tmp_path / "c") == files(tmp_path / "a")


def test_bookkeeping_takes_time_in_proportion_to_the_shards(raw, tmp_path, monkeypatch):
    """Counted, not timed: how often a row's faults are looked at, while rows arrive one by one."""
    looked = []

    class Row(dict):
        def __getitem__(self, key):
            looked.append(key)
            return super().__getitem__(key)

    planned = plan(settings(raw, tmp_path / "o"))
    hold_and_begin(planned)
    monkeypatch.setattr("data_prep.shards.run_tasks", lambda function, tasks, *_: _closing(
        Row(file=task.file, dropped=[], samples=1) for task in tasks))  # fmt: skip
    write_share(planned, planned.tasks)
    assert looked.count("dropped") == len(planned.tasks)


def _closing(rows):
    yield from rows


def test_files_of_a_folder_are_compared_by_several_threads(shards, copied, monkeypatch):
    manifest = json.loads((copied / "manifest.json").read_text())
    manifests.verify_files(copied, manifest)
    (copied / "000").mkdir()
    (copied / "000" / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"000/x.tar is not in manifest.json"):
        manifests.verify_files(copied, manifest)
    (copied / "000" / "x.tar").unlink()
    path = copied / manifest["shards"][2]["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="depth-000002.tar: its sha256 differs"):
        manifests.verify_files(copied, manifest)


# Tars


def packed(*names: str) -> io.BytesIO:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in names:
            header = tarfile.TarInfo(name.removesuffix("@"))
            header.size = 3
            if name.endswith("@"):
                header.type, header.linkname, header.size = tarfile.SYMTYPE, "/etc/passwd", 0
            tar.addfile(header, io.BytesIO(b"abc"))
    stream.seek(0)
    return stream


def test_both_orders_of_a_samples_members_are_read():
    found = list(read_samples(packed("a/0.depth.png", "a/0.json", "a/1.json", "a/1.depth.png"), 2))
    assert [sample.key for sample in found] == ["a/0", "a/1"]
    assert [sample.png[1] for sample in found] == [3, 3] and found[1].json[0] < found[1].png[0]


@pytest.mark.parametrize("names, message", [
    (["0.depth.png", "1.json", "0.json"], "sample 0: json is missing"),
    (["0.depth.png"], "sample 0: json is missing"),
    (["0.json", "0.json"], "sample 0: two members json"),
    (["0.depth.png", "0.json", "0.txt"], "sample 0: unexpected member txt"),
    (["0.depth.png", "0.json@"], r"unexpected member 0.json after sample 0"),
    (["0.depth.png", "0.json", "folder/"], r"unexpected member folder"),
    ([], r"0 samples, the manifest says 1; the last is \(none\)"),
])  # fmt: skip
def test_what_is_no_pair_is_refused(names, message):
    with pytest.raises(DataError, match=message):
        list(read_samples(packed(*names), 1))
