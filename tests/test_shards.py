"""Shards: bytes that depend on the input alone, kills at every moment, and a checker that finds every fault."""

import dataclasses
import hashlib
import importlib
import io
import json
import multiprocessing
import os
import pickle
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data_prep
from data_prep import manifest as manifests
from data_prep import mvtec3d, shards, workers
from data_prep.archives import RawFile
from data_prep.check import CheckConfig, _check_plane, check
from data_prep.folder import FolderOptions
from data_prep.item import FolderItems, Item, repeated, sample_keys
from data_prep.listing import READERS, list_source
from data_prep.manifest import digest_file, digest_json
from data_prep.plausibility import PlausibilityConfig
from data_prep.shards import PrepareConfig, plan, prepare
from data_prep.shrink import shrink
from dino_depth.depth import DepthMap, decode_png, fit_plane
from dino_depth.errors import ConfigError, DataError, Interrupted, ReportedError
from dino_depth.shards import DepthShards

REPOSITORY = Path(__file__).resolve().parents[1]


def depth_values(seed, height=18, width=24):
    generator = np.random.default_rng(seed)
    points = generator.uniform(0.5, 0.7, (height, width, 3)).astype(np.float32)
    points[generator.random((height, width)) < 0.1] = 0
    return points


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Seven clouds of two categories."""
    root = tmp_path_factory.mktemp("raw") / "mvtec"
    names = ["bagel/train/good/xyz/000", "bagel/train/good/xyz/001", "bagel/validation/good/xyz/000"]
    names += ["bagel/test/good/xyz/000", "bagel/test/crack/xyz/000", "rope/train/good/xyz/000", "rope/test/cut/xyz/3"]
    for seed, name in enumerate(names):
        path = root / f"{name}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, depth_values(seed), photometric="rgb")
    return root


def settings_for(root, out, **values):
    return PrepareConfig("mvtec3d", str(root), str(out), **{"workers": 1, "samples_per_shard": 3} | values)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(raw, tmp_path_factory):
    """A folder prepared without any incident, and its bytes."""
    out = tmp_path_factory.mktemp("finished") / "out"
    prepare(settings_for(raw, out))
    return out, contents(out)


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished[0], tmp_path / "copy"))


# What is written


def test_stock_webdataset_reads_the_shards(raw, finished):
    out, _ = finished
    urls = [str(path) for path in sorted(out.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [
        "mvtec3d/bagel/test-crack-000", "mvtec3d/bagel/test-good-000", "mvtec3d/bagel/train-good-000",
        "mvtec3d/bagel/train-good-001", "mvtec3d/bagel/validation-good-000", "mvtec3d/rope/test-cut-3",
        "mvtec3d/rope/train-good-000",
    ]  # fmt: skip
    for sample in samples:
        description = json.loads(sample["json"])
        points = tifffile.imread(raw / description["source"])
        depth_map = decode_png(sample["depth.png"], description["near"], description["far"], description["kind"])
        half_a_code = (description["far"] - description["near"]) / 65534 / 2
        assert np.array_equal(depth_map.valid, points[..., 2] > 0)
        assert np.abs(depth_map.depth - points[..., 2])[depth_map.valid].max() <= half_a_code + 1e-7
        assert (description["height"], description["width"]) == depth_map.depth.shape == (18, 24)
        assert description["valid_fraction"] == depth_map.valid.mean()
        plane, share = fit_plane(depth_map)
        assert description["plane"] == [*map(float, plane), share]
        assert (description["unit"], description["kind"], description["group"]) == ("m", "metric", None)
        place = "-".join(description[key] for key in ("split", "label"))
        assert sample["__key__"].startswith(f"mvtec3d/{description['category']}/{place}-")


def test_tars_equal_those_of_webdatasets_own_writer(finished):
    for path in finished[0].glob("*.tar"):
        stream = io.BytesIO()
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        with webdataset.TarWriter(stream, user="", group="", mtime=0, mode=0o444, encoder=False) as writer:
            for sample in samples:
                writer.write({"__key__": sample["__key__"], "depth.png": sample["depth.png"], "json": sample["json"]})
        assert stream.getvalue() == path.read_bytes()


def test_manifest_counts_and_describes(raw, finished, tmp_path):
    out, files = finished
    manifest = json.loads(files["manifest.json"])
    shards = ["depth-000000.tar", "depth-000001.tar", "depth-000002.tar"]
    assert sorted(files) == [*shards, "index.safetensors", "manifest.json"]
    assert manifest["counts"] == {
        "mvtec3d": {
            "bagel": {"test": {"crack": 1, "good": 1}, "train": {"good": 2}, "validation": {"good": 1}},
            "rope": {"test": {"cut": 1}, "train": {"good": 1}},
        }
    }
    assert manifest["total"] == 7 and [shard["samples"] for shard in manifest["shards"]] == [3, 3, 1]
    for shard in manifest["shards"]:
        content = files[shard["file"]]
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    source = manifest["sources"]["mvtec3d"]
    assert source["licence"].startswith("MVTec 3D-AD, CC BY-NC-SA 4.0") and source["preprocessed"] is False
    assert (source["reader"], source["synthetic"], source["maps"]) == ("mvtec3d", False, 7)
    limits = json.loads(json.dumps(dataclasses.asdict(PlausibilityConfig())))
    settings = {"samples_per_shard": 3, "max_side": 0, "coding": "linear", "plausible": limits}
    assert manifest["config"] == {"sources": {"mvtec3d": {}}, **settings}
    assert set(manifest["versions"]) == {"numpy", "pillow", "libjpeg", "imagecodecs", "libdeflate"}
    for folder in (raw, out):
        assert str(folder).encode() not in b"".join(files.values())


def test_bytes_depend_on_the_input_alone(raw, finished, tmp_path, monkeypatch):
    """Neither on the number of workers, nor where root lies, nor the order of a listing, nor unused options."""
    moved = shutil.copytree(raw, tmp_path / "elsewhere" / "data")
    listed = mvtec3d.items
    variants = {"two": {"workers": 2}, "many": {"workers": 5}, "loose": {"max_drop_fraction": 0.5}}
    for name, values in variants.items():
        prepare(settings_for(raw, tmp_path / name, **values))
    monkeypatch.setattr(mvtec3d, "items", lambda tree: random.Random(1).sample(found := listed(tree), len(found)))
    prepare(settings_for(moved, tmp_path / "shuffled", folder=FolderOptions(unit="mm")))
    for name in (*variants, "shuffled"):
        assert contents(tmp_path / name) == finished[1], name


def test_summary_fits_a_terminal(raw, tmp_path, capsys):
    prepare(settings_for(raw, tmp_path / "o"))
    found, *table = capsys.readouterr().out.splitlines()
    assert found.startswith("mvtec3d: 40 of 40 published counts differ: bagel/train/good 2 of 244 (-242); ")
    assert table[0].split() == ["category", "test", "train", "validation"]
    assert table[1].split() == ["bagel", "2", "2", "1"] and table[2].split() == ["rope", "1", "1", "0"]
    assert max(map(len, table[:-1])) <= 80 and table[-1].startswith("7 maps in 3 shards")


def test_data_prep_does_not_need_torch():
    modules = "data_prep.shards, data_prep.check, data_prep.mvtec3d, data_prep.eyecandies, data_prep.folder"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(REPOSITORY)}).returncode == 0


def test_max_side_is_stored_and_part_of_the_configuration(raw, tmp_path):
    manifest = prepare(settings_for(raw, tmp_path / "o", max_side=14))
    assert manifest["config"]["max_side"] == 14 and manifest["sources"]["mvtec3d"]["dropped"] == []
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "o" / "depth-000000.tar"), shardshuffle=False)))
    assert [json.loads(sample["json"])[side] for side in ("height", "width")] == [9, 12]
    check(CheckConfig(str(tmp_path / "o")))


# Keys


def item(stem, label="good", category="bagel", split="train", source=""):
    return Item("d", category, split, label, stem, RawFile("", stem), source or f"{category}/{split}/{label}/{stem}")


def test_keys_survive_dots_case_and_length():
    items = [item("0.5"), item("0_5"), item("A"), item("a"), item("x" * 300), item("x" * 299 + "y"), item("ü/..")]
    items += [item("7", category="c" * 200), item("7", label="")]
    keys = sample_keys(items)
    assert len({key.lower() for key in keys}) == len(items)
    assert "d/bagel/train--7" in keys
    for key in keys:
        assert key.isascii() and "." not in key and ".." not in key and len(key.split("/")) == 3
        # Raises where a plain tar header cannot hold the name.
        tarfile.TarInfo(f"{key}.depth.png").tobuf(tarfile.USTAR_FORMAT)
    shuffled = random.Random(0).sample(list(zip(items, keys, strict=True)), len(items))
    assert sample_keys([entry for entry, _ in shuffled]) == [key for _, key in shuffled]


@given(st.lists(st.text(st.sampled_from("aA0._-é/ "), max_size=4), unique=True, max_size=30))
@settings(max_examples=100, deadline=None)
def test_keys_are_unique_without_regard_to_case(stems):
    keys = sample_keys([item(stem) for stem in stems])
    assert len({key.lower() for key in keys}) == len(stems)


def test_files_of_a_folder_are_made_when_asked_for_and_travel_as_their_names(tmp_path):
    """Held in memory, or sent with every shard, the items of ten million files would be 12 GB."""
    for place in ("a/0.5.npy", "a/0_5.npy", "b/1.npy"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).touch()
    listing = list_source("folder", str(tmp_path), FolderOptions())
    sources = ["a/0.5.npy", "a/0_5.npy", "b/1.npy"]
    assert isinstance(listing.items, FolderItems) and [item.source for item in listing.items] == sources
    assert listing.listed == {"count": 3, "sha256": hashlib.sha256(json.dumps(sources).encode()).hexdigest()}
    many = FolderItems(listing.items.make, [f"a/{number:06d}.npy" for number in range(1000)])
    assert len(pickle.dumps(many[:500])) < 500 * 40
    assert pickle.loads(pickle.dumps(many[3:5]))[1] == many[4]
    planned = plan(PrepareConfig("folder", str(tmp_path), str(tmp_path / "out"), samples_per_shard=1))
    assert [len(task.shared) for task in planned.tasks] == [1, 1, 0]
    assert [key for task in planned.tasks for key in task.keys] == sample_keys(list(listing.items))


@given(st.lists(st.text("abAB", max_size=2), max_size=20))
def test_what_occurs_twice_is_found_by_checksums(texts):
    assert repeated(lambda: iter(texts)) == {text: texts.count(text) for text in texts if texts.count(text) > 1}


def test_one_file_listed_twice_is_refused():
    with pytest.raises(DataError, match="2 files share the sample key d/bagel/train-good-a"):
        sample_keys([item("a", source="s"), item("a", source="s")])


def test_dotted_names_do_not_merge_in_webdataset(tmp_path):
    for name in ("img_0.5_1", "img_0.5_2", "IMG_0_5_2"):
        (tmp_path / "raw").mkdir(exist_ok=True)
        np.save(tmp_path / "raw" / f"{name}.npy", depth_values(0)[..., 2])
    prepare(PrepareConfig("folder", str(tmp_path / "raw"), str(tmp_path / "o"), workers=1))
    samples = list(webdataset.WebDataset(str(tmp_path / "o" / "depth-000000.tar"), shardshuffle=False))
    assert len(samples) == 3
    check(CheckConfig(str(tmp_path / "o")))


# Shrinking


@pytest.mark.parametrize(("height", "width", "side"), [(18, 24, 12), (17, 23, 9), (20, 14, 7), (30, 30, 30)])
def test_shrink_equals_its_definition(height, width, side):
    generator = np.random.default_rng(height)
    values = np.where(generator.random((height, width)) < 0.4, 0, generator.uniform(1, 2, (height, width)))
    depth_map = DepthMap.from_values(values)
    small = shrink(depth_map, side)
    factor = next(factor for factor in range(1, 99) if -(-max(height, width) // factor) <= side)
    for row in range(-(-height // factor)):
        for column in range(-(-width // factor)):
            block = depth_map.depth[row * factor :, column * factor :][:factor, :factor]
            held = sorted(value for value in block.ravel() if value > 0)
            expected = held[(len(held) - 1) // 2] if held and 2 * len(held) >= block.size else 0
            assert small.depth[row, column] == np.float32(expected)
    assert max(small.depth.shape) <= side and set(small.depth[small.valid]) <= set(depth_map.depth[depth_map.valid])


# Kills, signals, full disks


def run_python(code: str, *arguments) -> subprocess.Popen:
    """A fresh, single-threaded interpreter, which may fork, be killed and change its limits."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


EVERY_MOMENT = """
import os, signal, sys
from data_prep.plausibility import PlausibilityConfig
from data_prep.shards import PrepareConfig, prepare

def prepare_until(moment, out):
    calls = 0

    def counted(original):
        def call(*arguments, **options):
            nonlocal calls
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            calls += 1
            return original(*arguments, **options)
        return call

    for name in ("fsync", "replace", "unlink", "rmdir", "mkdir"):
        setattr(os, name, counted(getattr(os, name)))
    prepare(PrepareConfig("mvtec3d", sys.argv[1], out, workers=1, samples_per_shard=3))

moment = status = -1
while status != 0:
    moment += 1
    out = f"{sys.argv[2]}/{moment:03d}"
    child = os.fork()
    if child == 0:
        prepare_until(moment, out)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    prepare(PrepareConfig("mvtec3d", sys.argv[1], out, workers=1, samples_per_shard=3))
"""


def test_killed_before_every_change_of_the_disk(raw, finished, tmp_path):
    """kill -9 before each durable step in turn; what follows ends in the bytes of a run without incident."""
    process = run_python(EVERY_MOMENT, raw, tmp_path)
    assert "7 maps" in process.communicate()[0] and process.returncode == 0
    outs = sorted(tmp_path.iterdir())
    # Three shards and three rows, each with its three steps, the plan, the manifest, and the clearing up.
    assert len(outs) > 30
    for out in outs:
        assert contents(out) == finished[1], out.name


def test_killed_with_workers(raw, finished, tmp_path):
    """The parent of two workers is killed: they end too, nobody holds the lock, and the rest is continued."""
    root, out = tmp_path / "raw", tmp_path / "out"
    for index in range(40):
        path = root / "bagel" / "train" / "good" / "xyz" / f"{index:03d}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, depth_values(index, 150, 150), photometric="rgb")
    whole = tmp_path / "whole"
    prepare(settings_for(root, whole, samples_per_shard=5))
    code = "import sys; from data_prep.shards import *; "
    code += "prepare(PrepareConfig('mvtec3d', *sys.argv[1:], workers=2, samples_per_shard=5))"
    process = run_python(code, root, out)
    while process.poll() is None and len(list(out.glob(".progress/*.tar.json"))) < 2:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    prepare(settings_for(root, out, samples_per_shard=5))
    assert contents(out) == contents(whole)
    # The workers held the other end of this pipe: it closes when the last of them has ended.
    assert process.communicate(timeout=10)[0] is not None


def test_rows_spare_the_work_done(raw, finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    original, read = mvtec3d.read, []

    def failing(item):
        if len(read) == 5:
            raise KeyboardInterrupt
        read.append(item.source)
        return original(item)

    monkeypatch.setattr(mvtec3d, "read", failing)
    with pytest.raises(KeyboardInterrupt):
        prepare(settings_for(raw, out))
    monkeypatch.setattr(mvtec3d, "read", lambda item: read.append(item.source) or original(item))
    prepare(settings_for(raw, out))
    # Three maps were in a finished shard; the other two are read again.
    assert len(read) == 5 + 4 and contents(out) == finished[1]


def test_a_damaged_or_repaired_file_is_written_again(raw, finished, tmp_path, monkeypatch):
    root, out = Path(shutil.copytree(raw, tmp_path / "raw")), tmp_path / "out"
    broken = root / "rope/train/good/xyz/000.tiff"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    with pytest.raises(DataError, match=r"1 of 7 files are unusable, .*: rope/train/good/xyz/000.tiff: not a readable"):
        prepare(settings_for(root, out))
    broken.write_bytes(whole)
    with open(out / "depth-000001.tar", "r+b") as file:
        file.seek(700)
        file.write(b"\xff\xff")
    prepare(settings_for(root, out))
    assert contents(out) == finished[1]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_cleanly_and_resumably(raw, finished, tmp_path, monkeypatch, number, name):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    advance = shards.Progress.advance
    monkeypatch.setattr(shards.Progress, "advance", lambda self, *done: (os.kill(os.getpid(), name), advance(self)))
    with pytest.raises(Interrupted, match="run the same command again"):
        prepare(settings_for(raw, tmp_path / "out", workers=number, samples_per_shard=1))
    monkeypatch.undo()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not list(tmp_path.glob("out/.progress/*.tmp")) and not (tmp_path / "out" / "manifest.json").exists()
    prepare(settings_for(raw, tmp_path / "out", samples_per_shard=1))
    prepare(settings_for(raw, tmp_path / "whole", samples_per_shard=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_worker_is_one_line(raw, tmp_path, monkeypatch):
    def kill_one(*_):
        for process in multiprocessing.active_children()[:1]:
            process.kill()

    monkeypatch.setattr(shards.Progress, "advance", kill_one)
    with pytest.raises(ReportedError, match="a worker process was killed"):
        prepare(settings_for(raw, tmp_path / "out", workers=2, samples_per_shard=1))
    assert not multiprocessing.active_children()


FULL_DISK = """
import resource, signal, sys
from data_prep.plausibility import PlausibilityConfig
from data_prep.shards import PrepareConfig, prepare
from dino_depth.errors import ReportedError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    prepare(PrepareConfig("mvtec3d", *sys.argv[1:3], workers=int(sys.argv[4]), samples_per_shard=3))
except ReportedError as error:
    print(error)
"""


@pytest.mark.parametrize(("limit", "number"), [(100, 1), (2000, 1), (9000, 1), (9000, 2)])
def test_full_disk(raw, finished, tmp_path, limit, number):
    """Writing fails in the middle of a file: one line, nothing half written under a final name."""
    out = tmp_path / "out"
    _, message = run_python(FULL_DISK, raw, out, limit, number).communicate()[0].split("\n", 1)
    assert message.startswith("cannot write ") and message.count("\n") == 1
    assert str(out) in message and "File too large" in message
    assert not list(out.glob("*.tar")) and not (out / "manifest.json").exists()
    prepare(settings_for(raw, out))
    assert contents(out) == finished[1]


# The output folder


def test_a_finished_folder_is_verified_and_left_alone(raw, copy, finished, capsys):
    times = {path: path.stat().st_mtime_ns for path in copy.iterdir()}
    manifest = prepare(settings_for(raw, copy, workers=2))
    assert manifest["total"] == 7 and "finished before and is intact: 7 maps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in copy.iterdir()} == times
    (copy / "depth-000001.tar").write_bytes(b"x" * (copy / "depth-000001.tar").stat().st_size)
    with pytest.raises(DataError, match="depth-000001.tar: its sha256 differs"):
        prepare(settings_for(raw, copy))


def test_another_configuration_is_refused(raw, copy, tmp_path):
    with pytest.raises(ConfigError, match="samples_per_shard was 3, now 4"):
        prepare(settings_for(raw, copy, samples_per_shard=4))
    with pytest.raises(ConfigError, match="max_side was 0, now 14"):
        prepare(settings_for(raw, copy, max_side=14))
    np.save(tmp_path / "a.npy", depth_values(0)[..., 2])
    out = str(tmp_path / "o")
    prepare(PrepareConfig("folder", str(tmp_path), out, workers=1, folder=FolderOptions(glob="*.npy")))
    with pytest.raises(ConfigError, match="sources.folder.unit was 'auto', now 'mm'"):
        prepare(PrepareConfig("folder", str(tmp_path), out, folder=FolderOptions(glob="*.npy", unit="mm")))


def test_a_begun_folder_refuses_another_plan(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(ReportedError, match="cannot write .*: No space left"):
        prepare(settings_for(raw, tmp_path / "o"))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="config.samples_per_shard was 3, now 4"):
        prepare(settings_for(raw, tmp_path / "o", samples_per_shard=4))
    monkeypatch.setattr(manifests.np, "__version__", "9.9.9")
    with pytest.raises(ConfigError, match=r"versions.numpy was '.*', now '9.9.9'"):
        prepare(settings_for(raw, tmp_path / "o"))


def test_other_files_in_root_are_refused(raw, copy, tmp_path):
    root = Path(shutil.copytree(raw, tmp_path / "raw"))
    shutil.copy(root / "rope/test/cut/xyz/3.tiff", root / "rope/test/cut/xyz/4.tiff")
    with pytest.raises(ConfigError, match="was prepared from 7 files of mvtec3d, root now holds 8"):
        prepare(settings_for(root, copy))


def test_foreign_and_unwritable_outputs_are_refused(raw, tmp_path):
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty and holds no shards"):
        prepare(settings_for(raw, tmp_path / "o"))
    with pytest.raises(ConfigError, match="is not a folder"):
        prepare(settings_for(raw, tmp_path / "o" / "thesis.tex"))
    with pytest.raises(ReportedError, match="cannot write .*thesis.tex.*: Not a directory"):
        prepare(settings_for(raw, tmp_path / "o" / "thesis.tex" / "deeper"))
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["thesis.tex"]


HOLD = """
import sys, time
from data_prep import shards

shards.write_shard = lambda *_: (print("writing", flush=True), time.sleep(60))
shards.prepare(shards.PrepareConfig("mvtec3d", *sys.argv[1:], workers=1, samples_per_shard=3))
"""


def test_two_runs_on_one_folder(raw, finished, tmp_path):
    out = tmp_path / "out"
    holder = run_python(HOLD, raw, out)
    assert [holder.stdout.readline() for _ in range(2)][1] == "writing\n"
    with pytest.raises(ConfigError, match="is being written by another process"):
        prepare(settings_for(raw, out))
    holder.kill()
    holder.communicate()
    prepare(settings_for(raw, out))
    assert contents(out) == finished[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset": "mvtec3"}, "unknown dataset 'mvtec3'; did you mean 'mvtec3d'?"),
        ({"dataset": "shards"}, "unknown dataset 'shards'"),
        ({"dataset": "../x"}, "unknown dataset"),
        ({"samples_per_shard": 0}, "samples_per_shard must be at least 1"),
        ({"max_side": 5}, "max_side must be 0 or at least 14"),
        ({"max_drop_fraction": 1.5}, "max_drop_fraction must be between 0 and 1"),
        ({"workers": -1}, "workers must be 0 or more"),
    ],
)
def test_impossible_configurations(raw, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message):
        prepare(PrepareConfig(**{"dataset": "mvtec3d", "root": str(raw), "out": str(tmp_path / "o")} | values))
    assert not (tmp_path / "o").exists()


def test_missing_root(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        prepare(settings_for(tmp_path / "nowhere", tmp_path / "o"))


def test_the_table_names_every_reader():
    names = [module.name for module in pkgutil.iter_modules(data_prep.__path__)]
    found = [name for name in names if hasattr(importlib.import_module(f"data_prep.{name}"), "items")]
    assert sorted(found) == READERS
    for name in READERS:
        module = importlib.import_module(f"data_prep.{name}")
        assert hasattr(module, "read") != hasattr(module, "read_image"), name
        assert hasattr(module, "describe") or module.LICENCE, name


# Unusable files


def test_unusable_files_are_dropped_with_their_reason(raw, tmp_path):
    root = Path(shutil.copytree(raw, tmp_path / "raw"))
    good = root / "bagel/train/good/xyz"
    for index in range(2, 60):
        tifffile.imwrite(good / f"{index:03d}.tiff", depth_values(index), photometric="rgb")
    faults = {
        "010": np.zeros((20, 20, 3), np.float32),
        "011": np.full((20, 20, 3), np.nan, np.float32),
        "012": depth_values(0, 13, 40),
    }
    for stem, points in faults.items():
        tifffile.imwrite(good / f"{stem}.tiff", points, photometric="rgb")
    (good / "013.tiff").write_bytes((good / "014.tiff").read_bytes()[:-100])
    (good / "015.tiff").write_bytes(b"")
    with pytest.raises(DataError, match=r"of 65 files are unusable, more than max_drop_fraction 0.01 allows: bagel/"):
        prepare(settings_for(root, tmp_path / "strict"))
    manifest = prepare(settings_for(root, tmp_path / "loose", max_drop_fraction=0.1))
    reasons = {drop["path"].split("/")[-1][:3]: drop["reason"] for drop in manifest["sources"]["mvtec3d"]["dropped"]}
    assert reasons["010"] == "all pixels are missing" and reasons["011"] == "not one of 1200 values is finite"
    assert reasons["012"] == "13x40 is below 14 pixels a side" and reasons["015"] == "the file is empty"
    assert reasons["013"].startswith("not a readable TIFF file") and len(reasons) == 5
    assert manifest["total"] == 60 == sum(shard["samples"] for shard in manifest["shards"])
    prepare(settings_for(root, tmp_path / "again", max_drop_fraction=0.1, workers=2))
    assert contents(tmp_path / "again") == contents(tmp_path / "loose")
    check(CheckConfig(str(tmp_path / "loose")))


def test_nothing_usable_is_an_error(tmp_path):
    path = tmp_path / "raw" / "bagel/train/good/xyz/0.tiff"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no tiff")
    with pytest.raises(
        DataError, match="none of 1 files of mvtec3d is usable: bagel/train/good/xyz/0.tiff: not a readable TIFF"
    ):
        prepare(settings_for(tmp_path / "raw", tmp_path / "o", max_drop_fraction=1.0))


# Check


def edit_manifest(folder: Path, edit):
    manifest = json.loads((folder / "manifest.json").read_bytes())
    edit(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def edit_shard(folder: Path, edit, name="depth-000001.tar", trust=True):
    """Rewrites a shard's members; with ``trust`` the manifest is made to agree, so that only the content is wrong."""
    with tarfile.open(folder / name) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for member, content in edit(members):
            header = tarfile.TarInfo(member)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    if trust:
        entry = {"sha256": digest_file(folder / name), "bytes": (folder / name).stat().st_size}
        edit_manifest(folder, lambda manifest: manifest["shards"][1].update(entry))


def edit_json(**values):
    def edit(members):
        name, content = members[1]
        description = {key: value for key, value in (json.loads(content) | values).items() if value != "absent"}
        return [members[0], (name, json.dumps(description).encode()), *members[2:]]

    return edit


def recode(change):
    """The first map's codes passed through ``change``."""

    def edit(members):
        codes = np.array(Image.open(io.BytesIO(members[0][1])))
        stream = io.BytesIO()
        Image.fromarray(change(codes)).save(stream, "png")
        return [(members[0][0], stream.getvalue()), *members[1:]]

    return edit


def test_check_accepts_what_prepare_writes(finished, capsys):
    check(CheckConfig(str(finished[0])))
    assert "is intact: 7 maps in 3 shards" in capsys.readouterr().out


FIRST = "depth-000001.tar: sample mvtec3d/bagel/train-good-001: "


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_json(near=0.9), FIRST + "near and far must satisfy"),
        (edit_json(near=0), FIRST + "near and far must satisfy"),
        (edit_json(far=float("nan")), FIRST + "near and far must satisfy"),
        (edit_json(near="0.5"), FIRST + "json: near is '0.5'"),
        (edit_json(height=19), FIRST + r"the map is \(18, 24\), json says 19, 24"),
        (edit_json(width=True), FIRST + "json: width is True"),
        (edit_json(valid_fraction=0.5), FIRST + "valid_fraction is"),
        (edit_json(label="absent"), FIRST + "json lacks label"),
        (edit_json(plane=[0.0, 0.0, 1.0, 1.0]), FIRST + r"its plane holds 0.\d+ of the map, json says 1.000"),
        (edit_json(plane=[0.0, 0.0, 0.0, 0.0]), FIRST + "its plane holds 0.000 of the map, json says 0.000; the best"),
        (edit_json(plane=[0.0, 0.0, 1.0]), FIRST + r"plane must be three coefficients and a share, got \[0.0"),
        (edit_json(plane=[0.0, 0.0, float("nan"), 1.0]), FIRST + "plane must be three coefficients and a share"),
        (edit_json(plane=[0.0, 0.0, True, 1.0]), FIRST + "plane must be three coefficients and a share"),
        (edit_json(plane=[0.0, 0.0, 1.0, 1.5]), FIRST + "plane must have a share from 0 to 1, got 1.5"),
        (edit_json(plane="level"), FIRST + "plane must be three coefficients and a share, got 'level'"),
        (edit_json(group="absent"), FIRST + "json lacks group"),
        (edit_json(kind="inches"), FIRST + "json: unit 'm' does not fit kind 'inches'"),
        (edit_json(label="crack"), "manifest.json disagrees with the samples: counts.mvtec3d.bagel.train.crack"),
        (recode(lambda codes: np.where(codes > 0, codes // 2 + 1, 0).astype(np.uint16)), FIRST + "codes run over"),
        (recode(lambda codes: np.maximum(codes, 1)), FIRST + "valid_fraction is"),
        (recode(lambda codes: codes * 0), FIRST + "all pixels are missing"),
        (recode(lambda codes: (codes >> 8).astype(np.uint8)), FIRST + "not depth but a PNG of 8-bit grey"),
        (recode(lambda codes: codes[:9]), FIRST + "the map is"),
        (lambda m: [(m[0][0], m[0][1][:-40]), *m[1:]], FIRST + "unreadable depth PNG"),
        (lambda m: [m[0], (m[1][0], b"{"), *m[2:]], FIRST + "json cannot be read"),
        (lambda m: [m[0], (m[1][0], b"[]"), *m[2:]], FIRST + "json is no object"),
        (lambda m: m[1:], FIRST + "depth.png is missing"),
        (lambda m: [m[0], m[0], *m[1:]], FIRST[:-2] + ": two members depth.png"),
        (lambda m: m[:4], "depth-000001.tar: 2 samples, the manifest says 3; the last is mvtec3d/bagel/validation"),
        (lambda m: [*m[:2], *m], FIRST[:-2] + ": two members depth.png|4 samples|key"),
        (lambda m: [*m, ("stray", b"")], "unexpected member stray after sample mvtec3d/rope/test-cut-3"),
        (lambda m: [(name.replace("train-good-001", "TEST-crack-000"), c) for name, c in m],
         "depth-000001.tar: mvtec3d/bagel/TEST-crack-000: its key is also in depth-000000.tar"),
    ],
)  # fmt: skip
def test_check_finds_wrong_content(copy, edit, message):
    edit_shard(copy, edit)
    with pytest.raises(DataError, match=message):
        check(CheckConfig(str(copy)))


def test_a_plane_rounded_on_another_machine_is_believed(finished):
    depth_map, _ = DepthShards(str(finished[0])).sample(0)
    plane, share = depth_map.plane
    _check_plane(dataclasses.replace(depth_map, plane=(plane * np.float32(1 + 1e-6), share + 1e-4)))
    with pytest.raises(DataError, match="its plane holds"):
        _check_plane(dataclasses.replace(depth_map, plane=(plane * np.float32(1.1), share)))


def test_check_finds_a_shard_cut_at_a_member(copy):
    """Such a tar reads short without an error."""
    path = copy / "depth-000001.tar"
    with tarfile.open(path) as tar:
        end = tar.getmembers()[2].offset
    path.write_bytes(path.read_bytes()[:end])
    assert len(list(webdataset.WebDataset(str(path), shardshuffle=False))) == 1
    with pytest.raises(DataError, match=r"depth-000001.tar: \d+ bytes, the manifest says \d+; 1 samples, .*001"):
        check(CheckConfig(str(copy)))


def test_check_finds_every_cut_and_every_flipped_byte(copy):
    path = copy / "depth-000001.tar"
    whole = path.read_bytes()
    generator = random.Random(0)
    for _ in range(12):
        path.write_bytes(whole[: generator.randrange(len(whole))])
        with pytest.raises(DataError, match="depth-000001.tar: "):
            check(CheckConfig(str(copy)))
        flipped = bytearray(whole)
        flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        with pytest.raises(DataError, match="depth-000001.tar: its sha256 differs"):
            check(CheckConfig(str(copy)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(total=8), "total is 8, its shards hold 7"),
        (lambda m: m["counts"]["mvtec3d"]["rope"]["train"].update(good=2), "rope.train.good was 2, now 1"),
        (lambda m: m["config"].update(max_side=7), "config_hash does not belong to config"),
        (lambda m: m.update(version=1), "has version 1, this program reads 2"),
        (lambda m: m.update(format="other"), "is not a manifest of"),
        (lambda m: m["sources"]["mvtec3d"].pop("dropped"), "sources.mvtec3d.dropped must be of type list"),
        (lambda m: m["sources"].update(x=[]), "sources.x is no object"),
        (lambda m: m.pop("sources"), "sources must be of type dict"),
        (lambda m: m["shards"][0].update(file="../depth-000000.tar"), "must be a plain name"),
        (lambda m: m["shards"].append(m["shards"][0]), "lists a shard twice"),
        (lambda m: m["shards"][0].update(bytes="1"), r"shards\[0\].bytes must be of type int"),
        (lambda m: m["shards"].__setitem__(0, 3), r"shards\[0\] is no object"),
    ],
)  # fmt: skip
def test_check_finds_a_wrong_manifest(copy, edit, message):
    edit_manifest(copy, edit)
    with pytest.raises(DataError, match=message):
        check(CheckConfig(str(copy)))


def test_check_finds_missing_and_extra_files(copy, tmp_path):
    shutil.copy(copy / "depth-000000.tar", copy / "depth-000009.tar")
    with pytest.raises(DataError, match="depth-000009.tar is not in manifest.json"):
        check(CheckConfig(str(copy)))
    (copy / "depth-000009.tar").unlink()
    (copy / "depth-000002.tar").unlink()
    with pytest.raises(DataError, match="depth-000002.tar: the shard is missing"):
        check(CheckConfig(str(copy)))
    (copy / ".progress").mkdir()
    with pytest.raises(DataError, match="is unfinished"):
        check(CheckConfig(str(copy)))
    with pytest.raises(DataError, match="is not a folder"):
        check(CheckConfig(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match="has no manifest.json"):
        check(CheckConfig(str(tmp_path)))
    for text in (b"", b"{", b"[]", b"\xff", b"[" * 100_000):
        (tmp_path / "manifest.json").write_bytes(text)
        with pytest.raises(DataError, match="manifest.json is not"):
            check(CheckConfig(str(tmp_path)))


def test_digest_json_ignores_the_order_of_keys():
    assert digest_json({"a": 1, "b": [2]}) == digest_json({"b": [2], "a": 1}) != digest_json({"a": 1, "b": [3]})


def test_tasks_run_in_the_caller_for_one_worker_and_keep_the_count():
    done = []
    results = list(workers.run_tasks(lambda task, tick: (tick(task), task * 2)[1], [1, 2, 3], 1, done.append))
    assert results == [2, 4, 6] and done == [1, 2, 3]
