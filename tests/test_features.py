import functools
import logging
import math
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from dino_depth.anomaly.dataset import Sample, View
from dino_depth.anomaly.feature_cache import FeatureCache
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.foreground import ForegroundConfig, foreground
from dino_depth.anomaly.geometry import Camera
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.frozen import load_frozen

SIDE = 64
VALID = ForegroundConfig("valid")


def get(value):
    return value


def fail():
    raise DataError("a.npy: cut short")


def no_truth():
    return None


def image_of(index, shape=(40, 61)):
    return np.random.default_rng(index).integers(0, 256, shape, np.uint8)


def depth_of(index, shape=(40, 61)):
    random = np.random.default_rng(100 + index)
    depth = random.uniform(0.5, 0.9, shape).astype(np.float32)
    depth[random.uniform(size=shape) < 0.2] = 0
    depth[:, :7] = 0
    return DepthMap.from_values(depth)


def view(index, camera=None, **changes):
    readers = {"image": image_of(index), "depth": depth_of(index)} | changes
    return View(f"v{index}", *(functools.partial(get, readers[name]) for name in ("image", "depth")), camera)


def sample(*views):
    return Sample("cup", "one", "test", "good", None, views, no_truth)


@pytest.fixture(scope="module")
def encoders():
    return tuple(load_frozen("random:timm:test_vit", modality=modality) for modality in ("image", "depth"))


def store(encoders, cache=None, **arguments):
    return FeatureStore(*encoders, SIDE, cache, object_pixels=VALID, **arguments)


def same(one, other):
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("image", "depth", "share"))


def test_features_are_the_encoders_rounded_to_half_precision(encoders):
    features = store(encoders).get(sample(*map(view, range(3))))
    assert features.image.shape == features.depth.shape == (3, 4, 4, 64) and features.share.shape == (3, 4, 4)
    for index in range(3):
        for name, encoder, pixels in zip(("image", "depth"), encoders, (image_of(index), depth_of(index)), strict=True):
            expected = encoder.encode(encoder.prepare(pixels, SIDE)[None])[0]
            found = getattr(features, name)[index]
            assert found.dtype == torch.float32 and torch.equal(found, found.half().float())
            torch.testing.assert_close(found, expected, rtol=2**-11, atol=1e-6)


def test_a_view_is_encoded_once_whoever_asks(encoders, tmp_path):
    one, two = sample(*map(view, range(5))), sample(view(2), view(7))
    first = store(encoders, tmp_path / "cache", batch=2)
    features = first.get(one)
    assert first.encodes == {"image": 5, "depth": 5}
    assert same(first.get(one), features) and first.encodes == {"image": 5, "depth": 5}
    first.get(two)
    assert first.encodes == {"image": 6, "depth": 6}
    second = store(encoders, tmp_path / "cache")
    assert same(second.get(one), features) and second.encodes == {"image": 0, "depth": 0}
    without = store(encoders, batch=2)
    assert same(without.get(one), features) and without.encodes == {"image": 5, "depth": 5}


def test_views_keep_their_order_however_they_are_batched(encoders, tmp_path):
    views = list(map(view, range(7)))
    store(encoders, tmp_path / "cache").get(sample(views[3], views[0]))
    mixed = store(encoders, tmp_path / "cache", batch=3).get(sample(*views))
    for index, part in enumerate(views):
        alone = store(encoders).get(sample(part))
        torch.testing.assert_close(mixed.image[index], alone.image[0], atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(mixed.depth[index], alone.depth[0], atol=2e-3, rtol=1e-3)
        assert torch.equal(mixed.share[index], alone.share[0])


def test_a_change_of_anything_that_counts_is_encoded_again(encoders, tmp_path):
    cache = tmp_path / "cache"
    store(encoders, cache).get(sample(view(0)))

    def encodes(changed, used=encoders, size=SIDE):
        fresh = FeatureStore(*used, size, cache, object_pixels=VALID)
        fresh.get(sample(changed))
        return fresh.encodes["image"], fresh.encodes["depth"]

    assert encodes(view(0)) == (0, 0)
    assert encodes(replace(view(0), name="renamed")) == (0, 0)
    image, depth_map = image_of(0), depth_of(0)
    image[3, 4] ^= 1
    assert encodes(view(0, image=image)) == (1, 0)
    assert encodes(view(0, image=np.repeat(image_of(0)[..., None], 3, 2))) == (1, 0)
    depth, (row, column) = depth_map.depth.copy(), np.argwhere(depth_map.valid)[500]
    depth[row, column] = np.nextafter(depth[row, column], np.float32(1))
    assert encodes(view(0, depth=DepthMap.from_values(depth))) == (0, 1)
    depth[row, column] = 0
    assert encodes(view(0, depth=DepthMap.from_values(depth))) == (0, 1)
    assert encodes(view(0, depth=replace(depth_map, kind="relative"))) == (0, 1)
    assert encodes(view(0), size=80) == (1, 1)
    other = load_frozen("random:timm:test_vit?seed=1", modality="image")
    assert encodes(view(0), (other, encoders[1])) == (1, 0)
    assert encodes(view(0), (encoders[0], load_frozen("random:timm:test_vit?depth_as=log", modality="depth"))) == (0, 1)


def test_one_modality_is_enough(encoders):
    features = FeatureStore(None, encoders[1], SIDE, object_pixels=VALID).get(sample(view(0), view(1)))
    assert features.image.shape == (2, 4, 4, 0) and features.depth.shape == (2, 4, 4, 64)
    features = FeatureStore(encoders[0], None, SIDE).get(sample(view(0)))
    assert features.depth.shape == (1, 4, 4, 0) and features.share.max() > 0


def test_share_is_the_part_of_a_cell_with_valid_depth(encoders):
    share = store(encoders).get(sample(view(0))).share[0].double().numpy()
    valid = depth_of(0).valid
    square = np.zeros((61 * 4, 61 * 4))  # quarters of pixels, so that the padding of 10.5 pixels is whole
    fine = valid.repeat(4, 0).repeat(4, 1)
    square[42 : 42 + 160] = fine
    expected = square.reshape(4, 61, 4, 61).mean((1, 3))
    np.testing.assert_allclose(share, expected, atol=1e-6)
    largest = FeatureStore(*encoders, SIDE).get(sample(view(0))).share[0]
    assert 0 < largest.sum() < share.sum()
    count = np.count_nonzero(foreground(depth_of(0), ForegroundConfig()))
    assert float(largest.sum()) * 61**2 / 16 == pytest.approx(count, rel=1e-5)


def test_intrinsics_reach_the_encoders_that_read_them(encoders, tmp_path):
    seen = []

    def to_input(pixels, size, matrix):
        seen.append(matrix)
        return encoders[1].to_input(pixels, size, matrix)

    matrix = np.array([[100.0, 0, 60.5], [0, 100, 39.5], [0, 0, 1]])
    camera = Camera(80, 122, matrix, np.eye(4))
    reading = replace(encoders[1], uses_camera=True, to_input=to_input, fingerprint="reads the camera")
    local = FeatureStore(None, reading, SIDE, tmp_path / "cache", object_pixels=VALID)
    local.get(sample(view(0, camera), view(0)))
    # Half the calibrated size: the principal point stays in the middle, (61 - 1) / 2 and (40 - 1) / 2.
    np.testing.assert_allclose(seen[0], [[50, 0, 30], [0, 50, 19.5], [0, 0, 1]])
    assert seen[1] is None and local.encodes["depth"] == 2
    local.get(sample(view(0, replace(camera, matrix=matrix + np.diag([1, 0, 0])))))
    assert local.encodes["depth"] == 3
    plain = store(encoders, tmp_path / "plain")
    plain.get(sample(view(0, camera)))
    plain.get(sample(view(0)))
    assert plain.encodes == {"image": 1, "depth": 1}


def entries(folder):
    return sorted(folder.glob("*.features"))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "longer"])
def test_a_damaged_entry_is_computed_again_and_logged(encoders, tmp_path, damage, caplog, monkeypatch):
    cache = tmp_path / "cache"
    features = store(encoders, cache).get(sample(view(0)))
    for path in entries(cache):
        content = bytearray(path.read_bytes())
        content[40] ^= 1 if damage == "flip" else 0
        changed = {"cut": content[:-2], "flip": content, "empty": b"", "longer": content + b"xx"}[damage]
        path.write_bytes(changed)
    monkeypatch.setattr(logging.getLogger("dino_depth"), "propagate", True)  # a training run turns it off
    with caplog.at_level(logging.WARNING, "dino_depth"):
        again = store(encoders, cache)
        assert same(again.get(sample(view(0))), features)
    assert again.encodes == {"image": 1, "depth": 1}
    messages = {record.getMessage() for record in caplog.records}
    assert sum(message.endswith("is damaged: its features are computed again") for message in messages) == 2
    final = store(encoders, cache)
    assert same(final.get(sample(view(0))), features) and final.encodes == {"image": 0, "depth": 0}


def taken(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "lock")


def test_what_fits_together_is_stored_after_one_look_at_the_folder(tmp_path, monkeypatch):
    arrays = {name * 64: np.arange(8, dtype="<f2") for name in "abcdef"}
    looks, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: looks.append(folder) or scandir(folder))
    roomy = FeatureCache(tmp_path / "roomy", 1.0)
    roomy.write(arrays)
    assert looks == [tmp_path / "roomy"] and len(entries(tmp_path / "roomy")) == 6
    looks.clear()  # of this test's own
    for name in "ghi":
        roomy.write({name * 64: arrays["a" * 64]})
    assert not looks and len(entries(tmp_path / "roomy")) == 9
    assert int((tmp_path / "roomy" / "lock").read_text()) == taken(tmp_path / "roomy") == 9 * (16 + 32)
    # A number that is lost, or says more than there is, is counted again.
    for text in ("", "x", str(2**40)):
        (tmp_path / "roomy" / "lock").write_text(text)
        looks.clear()
        roomy.write({"j" * 64: arrays["a" * 64]})
        assert len(looks) == 1 and int((tmp_path / "roomy" / "lock").read_text()) >= taken(tmp_path / "roomy")
    looks.clear()
    # Where they do not fit, each makes room by itself, and the last ones stay.
    small = FeatureCache(tmp_path / "small", 2 * (16 + 32) / 2**30)
    small.write(arrays)
    assert len(looks) == 5 and [path.stem[0] for path in entries(tmp_path / "small")] == ["e", "f"]


def test_the_cache_stays_within_its_limit_and_drops_what_was_used_longest_ago(tmp_path):
    array = np.arange(500, dtype="<f2")
    size = array.nbytes + 32
    cache = FeatureCache(tmp_path, 3.5 * size / 2**30)
    for key in "abc":
        cache.write({key: array})
    assert np.array_equal(cache.read("a", (500,)), array)
    cache.write({"d": array})
    assert [path.stem for path in entries(tmp_path)] == ["a", "c", "d"]
    cache.write({key: array for key in "efghijkl"})
    assert [path.stem for path in entries(tmp_path)] == ["j", "k", "l"] and taken(tmp_path) <= cache.limit
    assert cache.read("a", (500,)) is None
    cache.write({"big": np.zeros(5000, "<f2")})
    assert [path.stem for path in entries(tmp_path)] == ["j", "k", "l"]
    (tmp_path / "x.part").write_bytes(b"left by a kill")
    os.utime(tmp_path / "x.part", (0, 0))
    (tmp_path / "y.part").write_bytes(b"another process writes it")
    cache.write({"m": array})
    assert not (tmp_path / "x.part").exists() and taken(tmp_path) <= cache.limit
    assert (tmp_path / "y.part").exists()


def test_a_store_works_beyond_its_limit(encoders, tmp_path):
    small = store(encoders, tmp_path / "cache", limit_gib=1e-9)
    assert same(small.get(sample(view(0))), store(encoders).get(sample(view(0))))
    assert not entries(tmp_path / "cache")
    for limit in (0, -1, math.nan):
        with pytest.raises(ConfigError, match="above 0 GiB"):
            store(encoders, tmp_path / "cache", limit_gib=limit)


WRITER = """
import sys, numpy as np
from dino_depth.anomaly.feature_cache import FeatureCache
cache = FeatureCache(sys.argv[1], float(sys.argv[2]))
random = np.random.default_rng(int(sys.argv[3]))
for turn in range(150):
    key = int(random.integers(30))
    found = cache.read(f"k{key}", (40, 50))
    if found is None:
        cache.write({f"k{key}": np.full((40, 50), key, "<f2")})
    else:
        assert (found == key).all(), key
"""


def test_several_processes_share_a_cache(tmp_path):
    limit = 10.2 * (4000 + 32)
    command = [sys.executable, "-c", WRITER, str(tmp_path / "cache"), str(limit / 2**30)]
    running = [subprocess.Popen([*command, str(seed)], stderr=subprocess.PIPE) for seed in range(3)]
    largest = 0
    while any(process.poll() is None for process in running):
        sizes = []
        for path in (tmp_path / "cache").glob("*.features"):
            try:
                sizes.append(path.stat().st_size)
            except FileNotFoundError:
                break  # removed while this looked: a sum over moments proves nothing
        else:
            largest = max(largest, sum(sizes))
        time.sleep(0.01)
    for process in running:
        errors = process.communicate()[1].decode()
        assert process.returncode == 0 and "damaged" not in errors, errors
    assert 0 < taken(tmp_path / "cache") <= limit
    assert largest <= limit + 4032  # an entry may be removed and written again while this looks
    assert len(entries(tmp_path / "cache")) == 10


def test_a_cache_that_cannot_be_written_is_one_line(encoders, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportedError, match="feature cache .*file/cache: Not a directory: free some space"):
        store(encoders, tmp_path / "file" / "cache").cache.write({"a": np.zeros(3, "<f2")})


def test_faults_name_the_view(encoders):
    broken = replace(view(1), read_depth=fail)
    with pytest.raises(DataError, match="^cup/one, view v1: a.npy: cut short$"):
        store(encoders).get(sample(view(0), broken))
    with pytest.raises(DataError, match="view v0: the image is 40x60, the depth map 40x61"):
        store(encoders).get(sample(view(0, image=image_of(0, (40, 60)))))
    with pytest.raises(DataError, match="view v0: an image must be"):
        store(encoders).get(sample(view(0, image=image_of(0).astype(np.float32))))
    for value in (math.nan, 1e5):
        spoilt = replace(encoders[1], to_features=lambda batch, v=value: torch.full((len(batch), 4, 4, 64), v))
        with pytest.raises(DataError, match="cup/one, view v0: features of random:timm:test_vit are NaN, or beyond"):
            store((encoders[0], spoilt)).get(sample(view(0)))


def test_stores_that_cannot_work_are_refused(encoders):
    with pytest.raises(ConfigError, match="loaded for image, not for depth"):
        FeatureStore(None, encoders[0], SIDE)
    with pytest.raises(ConfigError, match="batch"):
        store(encoders, batch=0)
    small = load_frozen("raw-patches?patch=14", modality="depth")
    with pytest.raises(ConfigError, match=r"image 896 and depth 784 \(56x56\), or image 1024 and depth 896 \(64x64\)"):
        FeatureStore(encoders[0], small)
    assert FeatureStore(encoders[0], small, (1024, 896)).cells == 64
