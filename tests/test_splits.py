"""Several sources in one folder of shards: what is planned, counted, written and refused."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
from PIL import Image

from data_prep import listing, mvtec3d, pseudo_depth, shards
from data_prep.check import CheckConfig, check
from data_prep.listing import READERS, compare, list_source, table
from data_prep.pseudo_depth import FlatDepth, Model
from data_prep.shards import PrepareConfig, begin, finish, plan, prepare, write_share
from dino_depth.cli import main
from dino_depth.config import parse
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]


def write_clouds(root: Path, count: int = 7):
    random = np.random.default_rng(0)
    for index in range(count):
        path = root / "bagel" / "train" / "good" / "xyz" / f"{index:03d}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(path, random.uniform(0.5, 0.7, (20, 24, 3)).astype(np.float32), photometric="rgb")
    return root


def write_images(root: Path, count: int = 5):
    random = np.random.default_rng(1)
    for label in ("good", "crack"):
        for index in range(count):
            path = root / "bottle" / ("train" if label == "good" else "test") / label / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (20 + 4 * (index % 2), 24, 3), np.uint8)).save(path)
    return root


@pytest.fixture
def roots(tmp_path):
    return {"mvtec3d": str(write_clouds(tmp_path / "3d")), "mvtec_ad": str(write_images(tmp_path / "2d"))}


@pytest.fixture
def bright_is_near(monkeypatch):
    """A stand-in for the network: brightness is disparity; an image named 004 is flat."""
    asked = []

    def estimate(model, config, images, names):
        asked.append(len(images))
        results = []
        for image, name in zip(images, names, strict=True):
            depth = 1 - image.mean(-1) / 512
            results.append(
                FlatDepth("too flat") if "004" in name else (DepthMap.from_values(depth, "relative"), {"n": 1})
            )
        return results

    model = Model(Path("m"), "owner/net", "c0ffee", "CC-BY-NC-4.0", "cpu", {"torch": "9"})
    monkeypatch.setattr(pseudo_depth, "resolve", lambda config, device: model)
    monkeypatch.setattr(pseudo_depth, "estimate", estimate)
    return asked


def configured(roots, out, **values) -> PrepareConfig:
    return PrepareConfig(
        out=str(out), sources=list(roots), roots=roots, **{"workers": 1, "samples_per_shard": 4} | values
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_folder_and_one_manifest_of_two_sources(roots, tmp_path, bright_is_near, capsys):
    manifest = prepare(configured(roots, tmp_path / "o"))
    check(CheckConfig(str(tmp_path / "o")))
    assert [shard["samples"] for shard in manifest["shards"]] == [4, 3, 4, 3, 1]
    assert manifest["total"] == 15 and list(manifest["sources"]) == ["mvtec3d", "mvtec_ad"]
    images = manifest["sources"]["mvtec_ad"]
    assert images["pseudo_depth"] == {"model": "owner/net", "revision": "c0ffee", "licence": "CC-BY-NC-4.0"}
    assert [drop["path"] for drop in images["dropped"]] == ["bottle/test/crack/004.png", "bottle/train/good/004.png"]
    assert all(drop["flat"] for drop in images["dropped"]) and images["maps"] == images["scenes"] == 8
    assert "pseudo_depth" not in manifest["sources"]["mvtec3d"] and manifest["versions"]["torch"] == "9"
    assert manifest["config"]["pseudo_depth"]["revision"] == "c0ffee"
    out = capsys.readouterr().out
    assert "15 maps in 5 shards" in out and "0 files dropped, 2 flat images left out" in out


def test_samples_of_images_say_how_their_depth_was_made(roots, tmp_path, bright_is_near):
    import webdataset

    prepare(configured(roots, tmp_path / "o"))
    samples = list(webdataset.WebDataset(str(tmp_path / "o" / "depth-000003.tar"), shardshuffle=False))
    description = json.loads(samples[0]["json"])
    assert (description["kind"], description["unit"], description["pseudo_depth"]) == ("relative", "relative", {"n": 1})
    assert samples[0]["__key__"] == "mvtec_ad/bottle/train-good-000"


def test_a_source_alone_and_among_others_gives_the_same_shards(roots, tmp_path, bright_is_near):
    prepare(configured(roots, tmp_path / "both"))
    prepare(PrepareConfig("mvtec3d", roots["mvtec3d"], str(tmp_path / "one"), samples_per_shard=4, workers=1))
    for name in ("depth-000000.tar", "depth-000001.tar"):
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_shares_in_any_order_and_number_end_in_the_bytes_of_one_process(roots, tmp_path, bright_is_near):
    prepare(configured(roots, tmp_path / "whole"))
    planned = plan(configured(roots, tmp_path / "o"))
    with shards.exclusive(planned.out):
        begin(planned)
    for share in (planned.tasks[3:], planned.tasks[:1]):
        write_share(planned, share)
    with pytest.raises(
        DataError, match=r"2 of 5 shards are not written \(depth-000001.tar, depth-000002.tar\): run the"
    ):
        finish(planned)
    write_share(planned, planned.tasks[1:3])
    finish(planned)
    assert contents(tmp_path / "o") == contents(tmp_path / "whole")
    with pytest.raises(ConfigError, match="was not begun, or is finished"):
        write_share(planned, planned.tasks)


def test_a_damaged_shard_of_a_share_is_found_at_the_end(roots, tmp_path, bright_is_near):
    planned = plan(configured(roots, tmp_path / "o"))
    with shards.exclusive(planned.out):
        begin(planned)
    write_share(planned, planned.tasks)
    (tmp_path / "o" / "depth-000002.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"1 of 5 shards are not written \(depth-000002.tar\)"):
        finish(planned)


def test_another_revision_is_refused(roots, tmp_path, bright_is_near, monkeypatch):
    prepare(configured(roots, tmp_path / "o"))
    other = Model(Path("m"), "owner/net", "decaf", "CC-BY-NC-4.0", "cpu", {"torch": "9"})
    monkeypatch.setattr(pseudo_depth, "resolve", lambda config, device: other)
    with pytest.raises(ConfigError, match="pseudo_depth.revision was 'c0ffee', now 'decaf'"):
        prepare(configured(roots, tmp_path / "o"))


def test_unreadable_images_count_as_faults_and_flat_ones_do_not(roots, tmp_path, bright_is_near):
    (Path(roots["mvtec_ad"]) / "bottle/train/good/001.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    with pytest.raises(
        DataError, match=r"mvtec_ad: 1 of 10 files are unusable, more than .*: bottle/train/good/001.png"
    ):
        prepare(configured(roots, tmp_path / "o"))
    manifest = prepare(configured(roots, tmp_path / "loose", max_drop_fraction=0.1))
    assert [drop["flat"] for drop in manifest["sources"]["mvtec_ad"]["dropped"]] == [True, False, True]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sources": ["mvtec3d", "mvtec3d"]}, "names a dataset twice"),
        ({"sources": ["mvtec4d"]}, "sources: unknown dataset 'mvtec4d'; did you mean 'mvtec3d'?"),
        ({"sources": ["visa"]}, "roots.visa is empty: name the folder or archive of visa, or leave it out"),
        ({"roots": {"vsia": "x"}}, "roots: unknown dataset 'vsia'; did you mean 'visa'?"),
        ({"dataset": "mvtec3d"}, "contradict: give one"),
        ({"sources": [], "dataset": "mvtec3d", "root": "x"}, "is read from root; roots belongs to sources"),
        ({"sources": [], "roots": {}}, "no dataset is named"),
        ({"root": "x"}, "root x belongs to dataset"),
        ({"out": ""}, "out is empty"),
    ],
)
def test_contradicting_sources_are_refused(roots, tmp_path, values, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?").replace("(", r"\(")):
        prepare(PrepareConfig(**{"out": str(tmp_path / "o"), "sources": list(roots), "roots": roots} | values))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_shipped_splits_name_readers_and_need_their_roots(name, capsys):
    path = ROOT / "configs" / "prep" / f"split_{name}.yaml"
    config = parse(PrepareConfig, ["--config", f"prep/split_{name}"], "prep")
    assert config.sources == yaml.safe_load(path.read_text())["sources"]
    assert set(config.sources) <= set(READERS) and len(config.sources) == {"a": 2, "b": 3, "c": 7}[name]
    assert main(["prep", "--config", f"prep/split_{name}", "--out", "nowhere"]) == 2
    assert "roots.mvtec3d is empty" in capsys.readouterr().err


def test_roots_come_from_the_command_line_and_from_files(tmp_path):
    words = ["--config", "prep/split_a", "--roots.mvtec3d", "/a", "--roots.eyecandies=/b"]
    assert parse(PrepareConfig, words, "prep").roots == {"mvtec3d": "/a", "eyecandies": "/b"}
    (tmp_path / "mine.yaml").write_text("sources: [visa]\nroots:\n  visa: /c\n")
    assert parse(PrepareConfig, ["--config", str(tmp_path / "mine.yaml")], "prep").roots == {"visa": "/c"}


# Counting


def test_dry_run_counts_and_writes_nothing(roots, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pseudo_depth, "resolve", lambda config, device: pytest.fail("a dry run needs no model"))
    assert prepare(configured(roots, tmp_path / "o", dry_run=True)) == {}
    assert not (tmp_path / "o").exists()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 or not any(len(line) > 80 and str(tmp_path) not in line for line in lines)
    assert ["bagel", "train", "good", "7", "244"] in [line.split() for line in lines]
    assert ["bottle", "train", "good", "5", "209"] in [line.split() for line in lines]
    assert ["bottle", "test", "crack", "5"] in [line.split() for line in lines]
    assert ["bottle", "test", "anomalous", "5", "63"] in [line.split() for line in lines]
    text = " ".join(lines)
    assert "bagel/train/good 7 of 244 (-237)" in text and "bottle/train/good 5 of 209 (-204)" in text


def test_compare_equals_its_definition():
    from collections import Counter

    counts = Counter({("a", "train", "good"): 3, ("a", "test", "cut"): 2, ("a", "test", "hole"): 1})
    counts |= Counter({("b", "test", "unknown"): 4, ("b", "test", "good"): 5})
    published = [
        ("a", "test", "anomalous", 9), (None, "test", "good", 9), (None, None, None, 15), ("b", None, "unknown", 9),
        ("b", "test", "anomalous", 9), ("c", "train", "good", 9), ("a", "test", "cut", 9),
    ]  # fmt: skip
    assert [found for _, found in compare(counts, published)] == [3, 5, 15, 4, 0, 0, 2]


def test_met_counts_are_said_to_be_met(roots, monkeypatch):
    monkeypatch.setattr(mvtec3d, "PUBLISHED", [("bagel", "train", "good", 7)])
    assert table(list_source("mvtec3d", roots["mvtec3d"], None)).endswith("mvtec3d: all 1 published counts are met")
    monkeypatch.delattr(mvtec3d, "PUBLISHED")
    assert listing.verdict(list_source("mvtec3d", roots["mvtec3d"], None)).endswith("no published counts are known")


def test_rendered_trees_are_not_compared_with_the_published(roots, tmp_path, capsys):
    (Path(roots["mvtec3d"]) / "SYNTHETIC.json").write_text('{"licence": "Apache-2.0"}')
    prepare(PrepareConfig("mvtec3d", roots["mvtec3d"], str(tmp_path / "o"), 1))
    assert "published" not in capsys.readouterr().out


# Faults


def test_skewed_clocks_change_nothing(roots, tmp_path, monkeypatch):
    """Files from the future and a clock that runs backwards: times are compared for equality only."""
    prepare(PrepareConfig("mvtec3d", roots["mvtec3d"], str(tmp_path / "plain"), 1, 3))
    for path in Path(roots["mvtec3d"]).rglob("*.tiff"):
        os.utime(path, (4e9, 4e9))
    clock = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    out = tmp_path / "skewed"
    planned = plan(PrepareConfig("mvtec3d", roots["mvtec3d"], str(out), 1, 3))
    with shards.exclusive(out):
        begin(planned)
    write_share(planned, planned.tasks[:2])
    os.utime(out / ".progress" / "config.json", (1, 1))
    prepare(PrepareConfig("mvtec3d", roots["mvtec3d"], str(out), 1, 3))
    assert contents(out) == contents(tmp_path / "plain")


def test_a_file_that_vanishes_after_listing_is_a_drop_with_its_reason(roots, tmp_path):
    planned = plan(PrepareConfig("mvtec3d", roots["mvtec3d"], str(tmp_path / "o"), 1, 3, max_drop_fraction=0.5))
    with shards.exclusive(planned.out):
        begin(planned)
    (Path(roots["mvtec3d"]) / "bagel/train/good/xyz/003.tiff").unlink()
    write_share(planned, planned.tasks)
    (drop,) = finish(planned)["sources"]["mvtec3d"]["dropped"]
    assert drop == {
        "path": "bagel/train/good/xyz/003.tiff",
        "reason": "cannot be read: No such file or directory",
        "flat": False,
    }


def test_a_file_system_without_locks_is_used_with_a_warning(roots, tmp_path, monkeypatch, capsys):
    import errno
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    prepare(PrepareConfig("mvtec3d", roots["mvtec3d"], str(tmp_path / "o"), 1))
    assert "has no locks" in capsys.readouterr().err


def test_an_unreadable_folder_is_one_line(roots, tmp_path):
    """Root may read anything, so the reader runs as somebody else."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    open_to_all = Path(shutil.copytree(roots["mvtec3d"], f"/tmp/dino-depth-test-{os.getpid()}"))
    try:
        os.chmod(open_to_all / "bagel" / "train", 0o700)
        code = (
            "import os, sys; from data_prep.tree import RawTree; from dino_depth.errors import DataError\n"
            "os.setgid(65534); os.setuid(65534)\n"
            "try: RawTree(sys.argv[1])\n"
            "except DataError as error: print(error)"
        )
        done = subprocess.run([sys.executable, "-c", code, open_to_all], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout == f"{open_to_all}/bagel/train: cannot be listed: Permission denied\n", done.stderr
    finally:
        shutil.rmtree(open_to_all)
