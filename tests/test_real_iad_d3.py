"""Real-IAD D3: every known trap of its two layouts, arbitrary JSON, and the writer of its release."""

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import mvtec3d, real_iad_d3
from data_prep.item import sample_keys
from data_prep.real_iad_d3 import RealIadD3Options
from data_prep.shards import PrepareConfig, prepare
from data_prep.synthetic import SynthConfig, synth
from data_prep.tree import RawTree
from dino_depth.errors import ConfigError, DataError

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
JACK, CAP = "audio_jack_socket", "knob_cap"


def cloud(z=None, x=0.166, height=20, width=30, seed=0):
    """(height, width, 3) float32, Z in millimetres, X and Y constant."""
    points = np.full((height, width, 3), x, np.float32)
    points[..., 2] = np.random.default_rng(seed).uniform(390, 410, (height, width)) if z is None else z
    return points


def write_tiff(path: Path, points):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, points, photometric="rgb" if points.shape[-1] == 3 else "minisblack", metadata=None)


def recording(number, label="OK", category=JACK, kind="XYZ.tiff"):
    """Path of one recording below its category's folder, as the release names it."""
    name, suffix = kind.split(".")
    folder, state = ("OK", "OK") if label == "OK" else (f"NG/{label}", f"NG_{label}")
    return f"{folder}/S{number:04d}/{category}_{number:04d}_{state}_{name}_{0:014d}.{suffix}"


def entry(number, label="OK", category=JACK, **changes):
    return {
        "category": category,
        "anomaly_class": label,
        "image_path": recording(number, label, category, "RGBL05.jpg"),
        "ps_path": recording(number, label, category, "PS.jpg"),
        "xyz_path": recording(number, label, category),
        "mask_path": None if label == "OK" else recording(number, label, category, "RGBL05.png"),
    } | changes


def write_listing(root: Path, content, category=JACK):
    path = root / "realiad_d3_jsons" / f"{category}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def listing(train=(), validation=(), test=(), category=JACK, prefix=None):
    meta = {"normal_class": "OK", "prefix": f"{category}/" if prefix is None else prefix}
    return {"meta": meta, "train": list(train), "validation": list(validation), "test": list(test)}


def write_release(root: Path, category=JACK, **lists):
    """A small release; every listed cloud has its own depth, so that a swap would show."""
    content = listing(**lists, category=category)
    write_listing(root, content, category)
    for place, sample in enumerate([*content["train"], *content["validation"], *content["test"]]):
        write_tiff(root / "realiad_d3_raw" / category / sample["xyz_path"], cloud(seed=place))
        for path in (sample["image_path"], sample["ps_path"], sample["mask_path"]):
            if path:
                Image.new("L", (30, 20)).save(root / "realiad_d3_raw" / category / path)


def found(root: Path, options: RealIadD3Options | None = None):
    return real_iad_d3.items(RawTree(root), options or RealIadD3Options())


def read_one(root: Path, points, unit="mm"):
    write_listing(root, listing(test=[entry(1)]))
    write_tiff(root / "realiad_d3_raw" / JACK / recording(1), points)
    (item,) = found(root, RealIadD3Options(unit))
    return real_iad_d3.read(item)


# Which files


def test_json_files_are_followed_and_nothing_is_globbed(tmp_path):
    write_release(tmp_path, train=[entry(1)], test=[entry(2), entry(3, "BROKEN")])
    # Beside the listed files lie clouds that no list names, other recordings and point clouds.
    write_tiff(tmp_path / "realiad_d3_raw" / JACK / recording(9), cloud())
    for kind in ("PCD.pcd", "RGBL01.jpg"):
        (tmp_path / "realiad_d3_raw" / JACK / recording(1, kind=kind)).write_bytes(b"not looked at")
    items = found(tmp_path)
    assert [(item.dataset, item.category, item.split, item.label) for item in items] == [
        ("real_iad_d3", JACK, "test", "good"),
        ("real_iad_d3", JACK, "test", "BROKEN"),
        ("real_iad_d3", JACK, "train", "good"),
    ]
    assert [item.source for item in items] == [
        f"{JACK}/OK/S0002/{JACK}_0002_OK_XYZ_00000000000000.tiff",
        f"{JACK}/NG/BROKEN/S0003/{JACK}_0003_NG_BROKEN_XYZ_00000000000000.tiff",
        f"{JACK}/OK/S0001/{JACK}_0001_OK_XYZ_00000000000000.tiff",
    ]
    assert [item.stem for item in items] == [Path(item.source).stem for item in items]
    assert items[1].extra == {
        "image": f"{JACK}/{recording(3, 'BROKEN', kind='RGBL05.jpg')}",
        "mask": f"{JACK}/{recording(3, 'BROKEN', kind='RGBL05.png')}",
    }
    assert "mask" not in items[0].extra and len(set(sample_keys(items))) == 3


def test_images_and_masks_that_are_not_there_are_not_named(tmp_path):
    write_release(tmp_path, test=[entry(3, "scratch")])
    (tmp_path / "realiad_d3_raw" / JACK / recording(3, "scratch", kind="RGBL05.png")).unlink()
    assert set(found(tmp_path)[0].extra) == {"image"}
    write_listing(tmp_path, listing(test=[entry(3, "scratch", mask_path="", image_path=None)]))
    assert found(tmp_path)[0].extra == {}


def test_validation_entries_that_repeat_test_are_dropped_and_counted(tmp_path):
    both, alone = [entry(2), entry(3, "scratch")], entry(4)
    write_release(tmp_path, train=[entry(1)], validation=[*both, alone], test=both)
    write_release(tmp_path, CAP, train=[entry(1, category=CAP)], test=[entry(2, category=CAP)])
    items = found(tmp_path)
    assert [(item.category, item.split, item.label) for item in items] == [
        (JACK, "test", "good"),
        (JACK, "test", "scratch"),
        (JACK, "train", "good"),
        (JACK, "validation", "good"),
        (CAP, "test", "good"),
        (CAP, "train", "good"),
    ]
    assert [item.extra.get("also_listed_in") for item in items] == ["validation", "validation", None, None, None, None]
    described = real_iad_d3.describe(items)
    assert described["validation_in_test"] == 2 and "CC BY-NC-SA" in described["licence"]
    assert described["unit_assumed"] == "mm" and len(described["categories_absent"]) == 18


def test_a_file_in_every_list_is_kept_once_and_each_repetition_counts(tmp_path):
    # The second spelling is the same file.
    spelled = entry(1, xyz_path=f"{JACK}/./" + recording(1).replace("/", "\\"))
    write_release(tmp_path, train=[entry(1)])
    write_listing(tmp_path, listing(train=[entry(1)], validation=[entry(1)], test=[entry(1), spelled]))
    (item,) = found(tmp_path)
    assert item.split == "test"
    described = real_iad_d3.describe([item])
    assert [described[f"{split}_in_test"] for split in ("test", "train", "validation")] == [1, 1, 1]


def test_a_file_with_two_labels_is_refused(tmp_path):
    write_release(tmp_path, validation=[entry(1)], test=[entry(1)])
    write_listing(tmp_path, listing(validation=[entry(1, anomaly_class="dent")], test=[entry(1)]))
    with pytest.raises(DataError, match=rf"{JACK}.json: validation\[0\]: OK/S0001/.* is dent here and good in another"):
        found(tmp_path)


def test_a_copy_without_validation_list_is_read(tmp_path):
    write_release(tmp_path, train=[entry(1)], test=[entry(2)])
    content = listing(train=[entry(1)], test=[entry(2)])
    del content["validation"], content["meta"]
    write_listing(tmp_path, content)
    assert len(found(tmp_path)) == 2


def test_an_object_with_several_maps_is_one_scene_and_others_are_none(tmp_path):
    views = [entry(1, xyz_path=f"OK/S0001/{JACK}_0001_OK_C{view}_XYZ.tiff") for view in (1, 2)]
    write_release(tmp_path, train=[views[0]], test=[views[1], entry(2)])
    assert {item.source.split("/")[2]: item.group for item in found(tmp_path)} == {
        "S0001": f"{JACK}/OK/S0001",
        "S0002": None,
    }


# Where they lie

TRAIN = f"{JACK}/{recording(1)}"


@pytest.mark.parametrize(
    ("place", "prefix", "path"),
    [
        (f"realiad_d3_raw/{TRAIN}", f"{JACK}/", recording(1)),
        (f"realiad_d3_raw/{TRAIN}", JACK, recording(1)),
        (f"realiad_d3_raw/{TRAIN}", "", recording(1)),
        (f"realiad_d3_raw/{TRAIN}", f"{JACK}/", TRAIN),
        (f"realiad_d3_raw/{TRAIN}", "", TRAIN),
        (f"realiad_d3_raw/{TRAIN}", "./", TRAIN),
        (f"realiad_d3_raw/{TRAIN}", f"realiad_d3_raw/{JACK}/", recording(1)),
        (f"realiad_d3_raw/{JACK}/inner/{recording(1)}", "inner", recording(1)),
        (f"realiad_d3_raw/{JACK}/{TRAIN}", f"{JACK}/", recording(1)),
        (f"realiad_d3_raw/{recording(1)}", f"{JACK}/", recording(1)),
        (TRAIN, f"{JACK}/", recording(1)),
        (TRAIN, "", TRAIN),
        (f"elsewhere/realiad_d3_raw/{TRAIN}", f"{JACK}/", recording(1)),
    ],
)
@pytest.mark.parametrize("wrapped", ["", "Real-IAD_D3/"])
def test_a_path_is_found_wherever_loaders_look_for_it(tmp_path, place, prefix, path, wrapped):
    write_tiff(tmp_path / wrapped / place, cloud())
    write_listing(tmp_path / wrapped, listing(train=[entry(1, xyz_path=path)], prefix=prefix))
    (item,) = found(tmp_path)
    assert item.source == TRAIN and item.category == JACK
    assert real_iad_d3.read(item).depth.shape == (20, 30)


def test_the_first_stated_place_wins(tmp_path):
    write_listing(tmp_path, listing(train=[entry(1)], prefix="inner/"))
    raw = tmp_path / "realiad_d3_raw"
    for folder in (tmp_path / JACK, raw, raw / JACK, raw / JACK / "inner", raw / "inner"):
        # Each of these comes before all that were written until now.
        write_tiff(folder / recording(1), cloud())
        assert Path(str(found(tmp_path)[0].file)) == folder / recording(1)


@pytest.mark.parametrize("listed", [JACK, "audio-jack-socket"])
@pytest.mark.parametrize("stored", [JACK, "audio-jack-socket"])
def test_hyphens_and_underscores_are_the_same_and_categories_have_underscores(tmp_path, listed, stored):
    write_listing(tmp_path, listing(train=[entry(1, category=listed)], category=listed), listed)
    write_tiff(tmp_path / "realiad_d3_raw" / stored / recording(1, category=stored), cloud())
    (item,) = found(tmp_path)
    assert item.category == JACK and real_iad_d3.read(item).valid.all()
    write_listing(tmp_path, listing(train=[entry(1)]), "audio_jack-socket")
    with pytest.raises(DataError, match="audio_jack_socket is listed by .*json too"):
        found(tmp_path)


def pack(archive: Path, folder: Path, inner: bool):
    """Packs and removes a folder, with or without its own name, and with what a Mac adds."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder.parent if inner else folder)
            file.write(path, name)
            file.writestr(f"__MACOSX/{name.parent}/._{name.name}", b"resource")
            file.writestr(f"{name.parent}/._{name.name}", b"resource")
    shutil.rmtree(folder)


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("packed", [("jsons",), ("raw",), ("jsons", "raw")])
def test_archives_are_read_in_place_and_give_the_same_items_and_maps(tmp_path, packed, inner):
    lists = {"train": [entry(1)], "validation": [entry(3, "dent")], "test": [entry(2), entry(3, "dent")]}
    write_release(tmp_path, **lists)
    unpacked = found(tmp_path)
    maps = [real_iad_d3.read(item) for item in unpacked]
    if "jsons" in packed:
        pack(tmp_path / "realiad_d3_jsons.zip", tmp_path / "realiad_d3_jsons", inner)
    if "raw" in packed:
        pack(tmp_path / "realiad_d3_raw" / f"{JACK}.zip", tmp_path / "realiad_d3_raw" / JACK, inner)
    before = sorted(tmp_path.rglob("*"))
    items = found(tmp_path)
    assert [replace(item, file=None) for item in items] == [replace(item, file=None) for item in unpacked]
    for item, depth_map in zip(items, maps, strict=True):
        again = real_iad_d3.read(item)
        assert np.array_equal(again.depth, depth_map.depth) and np.array_equal(again.valid, depth_map.valid)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_category_that_was_not_downloaded_is_left_out_and_said(tmp_path):
    write_release(tmp_path, train=[entry(1)])
    write_release(tmp_path, CAP, train=[entry(1, category=CAP)])
    shutil.rmtree(tmp_path / "realiad_d3_raw" / CAP)
    items = found(tmp_path)
    assert [item.category for item in items] == [JACK]
    assert CAP in real_iad_d3.describe(items)["categories_absent"]
    shutil.rmtree(tmp_path / "realiad_d3_raw")
    with pytest.raises(DataError, match=r"none of the 2 categories .* expected realiad_d3_raw/<category>/"):
        found(tmp_path)


def test_an_isolated_missing_file_counts_as_unusable_and_says_who_names_it(tmp_path):
    write_release(tmp_path, train=[entry(1)], test=[entry(2), entry(3)])
    (tmp_path / "realiad_d3_raw" / JACK / recording(3)).unlink()
    items = found(tmp_path)
    assert len(items) == 3 and len(set(sample_keys(items))) == 3
    (item,) = [item for item in items if "S0003" in item.source]
    assert item.file.stamp() == (-1, -1)
    with pytest.raises(DataError) as error:
        real_iad_d3.read(item)
    assert str(error.value) == f"{JACK}.json names it as test[1].xyz_path, no such file"


def test_files_that_are_all_missing_are_one_line_with_json_key_and_places(tmp_path):
    write_release(tmp_path, train=[entry(1)], test=[entry(2)])
    write_listing(tmp_path, listing(train=[entry(5)], test=[entry(6)]))
    with pytest.raises(DataError) as error:
        found(tmp_path)
    assert f"{JACK}.json: test[0].xyz_path '{recording(6)}' is none of realiad_d3_raw/{JACK}/OK/S0006/" in str(
        error.value
    )
    assert str(error.value).endswith("and so for all 2 files") and "\n" not in str(error.value)


# What the JSON may hold


def changed(**changes):
    return listing(train=[entry(1)], test=[entry(2)]) | changes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "the file is empty"),
        ("{", "not readable JSON"),
        ("[" * 5000, "not readable JSON"),
        ("[]", "must hold the lists train and test, got a list"),
        ({"train": []}, "test must be a list of objects, got nothing"),
        ({"test": []}, "train must be a list of objects, got nothing"),
        ({"train": [], "test": []}, "its lists are empty"),
        (changed(test={}), "test must be a list of objects, got a dict"),
        (changed(validation=None), "validation must be a list of objects, got nothing"),
        (changed(test=["a"]), "test must be a list of objects, got a list"),
        (changed(test=[{}]), r"test\[0\].xyz_path must be a relative path without '..', got nothing"),
        (changed(test=[entry(2, xyz_path=None)]), r"test\[0\].xyz_path must be .* got nothing"),
        (changed(test=[entry(2, xyz_path=3)]), r"test\[0\].xyz_path must be .* got a int"),
        (changed(test=[entry(2, xyz_path="")]), r"test\[0\].xyz_path must be .* got ''"),
        (changed(test=[entry(2, xyz_path="a\nb")]), r"test\[0\].xyz_path must be .* got 'a\\nb'"),
        (changed(test=[entry(2, xyz_path="\ud800")]), r"test\[0\].xyz_path must be"),
        (changed(train=[entry(1), entry(2, anomaly_class=None)], test=[]), r"train\[1\].anomaly_class must be a name"),
        (changed(test=[entry(2, anomaly_class="")]), r"test\[0\].anomaly_class must be a name, got ''"),
        (changed(test=[entry(2, mask_path=1)]), r"test\[0\].mask_path must be .* got a int"),
        (changed(meta=[]), "meta.prefix must be .* got nothing"),
        (changed(meta={"prefix": ["a"]}), "meta.prefix must be .* got a list"),
    ],
)
def test_a_broken_json_file_is_one_line_with_file_key_and_value(tmp_path, content, reason):
    write_release(tmp_path, train=[entry(1)], test=[entry(2)])
    write_listing(tmp_path, content)
    with pytest.raises(DataError, match=rf"{JACK}.json: {reason}") as error:
        found(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["xyz_path", "image_path", "mask_path", "prefix"])
@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/x", "\\\\host\\x", "a\\..\\..\\x", "C:\\x", "c:x", "..", "\0"]
)
def test_a_path_that_leads_outside_is_refused(tmp_path, field, path):
    write_release(tmp_path, train=[entry(1)], test=[entry(2)])
    content = listing(train=[entry(1)], test=[entry(2)])
    (content["meta"] if field == "prefix" else content["test"][0])[field] = path
    write_listing(tmp_path, content)
    with pytest.raises(DataError, match=rf"{field} must be a relative path without '..', got "):
        found(tmp_path)


WORDS = st.one_of(
    st.text(max_size=8),
    st.sampled_from(["OK", JACK, recording(1), recording(2), recording(3), "scratch", "../x", "", "realiad_d3_raw"]),
)
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=8,
)
GOOD_ENTRIES = st.lists(st.sampled_from([entry(1), entry(2), entry(3), entry(4, "scratch")]), max_size=4)
ENTRIES = GOOD_ENTRIES | st.lists(
    st.fixed_dictionaries({}, optional={key: WORDS | ANYTHING for key in entry(1)})
    | st.fixed_dictionaries({"xyz_path": WORDS, "anomaly_class": WORDS}),
    max_size=4,
)
META = st.fixed_dictionaries({"prefix": WORDS})
LISTINGS = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {"train": GOOD_ENTRIES, "test": GOOD_ENTRIES}, optional={"validation": GOOD_ENTRIES, "meta": META}
    ),
    st.fixed_dictionaries({"train": ENTRIES, "test": ENTRIES}, optional={"validation": ENTRIES, "meta": ANYTHING}),
    st.binary(max_size=200),
)


def test_arbitrary_json_gives_items_or_one_line(tmp_path):
    write_release(tmp_path, train=[entry(1)], test=[entry(2), entry(4, "scratch")])
    tree = RawTree(tmp_path)
    outcomes = {"items": 0, "line": 0}

    @given(LISTINGS)
    @QUICK
    def follow(content):
        (path,) = (tmp_path / "realiad_d3_jsons").iterdir()
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        try:
            items = real_iad_d3.items(tree, RealIadD3Options())
            keys = sample_keys(items)
        except DataError as error:
            assert "\n" not in str(error) and str(error).encode()
            outcomes["line"] += 1
            return
        outcomes["items"] += 1
        assert items and len(set(keys)) == len(items) and real_iad_d3.describe(items)
        for item in items:
            assert ".." not in Path(str(item.file)).parts and Path(str(item.file)).is_relative_to(tmp_path)
            try:
                assert real_iad_d3.read(item).depth.shape == (20, 30)
            except DataError as error:
                assert "\n" not in str(error) and str(error).encode()

    follow()
    assert min(outcomes.values()) > 10, outcomes


# What the clouds mean


@pytest.mark.parametrize("axis", [-1, 0])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_depth_is_the_third_channel_in_metres_wherever_the_channels_are(tmp_path, axis, dtype):
    points = cloud().astype(dtype)
    expected = (points[..., 2].astype(np.float64) / 1000).astype(np.float32)
    depth_map = read_one(tmp_path, np.moveaxis(points, -1, axis).copy())
    assert depth_map.kind == "metric" and depth_map.valid.all()
    assert depth_map.depth.dtype == np.float32 and np.array_equal(depth_map.depth, expected)


def test_planes_of_a_colour_tiff_are_channels_too(tmp_path):
    write_listing(tmp_path, listing(test=[entry(1)]))
    path = tmp_path / "realiad_d3_raw" / JACK / recording(1)
    path.parent.mkdir(parents=True)
    planes = np.moveaxis(cloud(), -1, 0).copy()
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate", metadata=None)
    assert np.array_equal(real_iad_d3.read(found(tmp_path)[0]).depth, planes[2] / np.float32(1000))


@pytest.mark.parametrize("x", [0.0, 0.166, np.nan, np.inf, -5.0])
def test_x_and_y_which_leak_the_label_change_nothing(tmp_path, x):
    points = cloud(x=x)
    points[4:6, 4:6, 2] = 0
    with np.errstate(invalid="ignore"):
        depth_map = read_one(tmp_path, points)
    assert np.array_equal(depth_map.valid, points[..., 2] > 0) and depth_map.valid.sum() == 596
    assert np.array_equal(depth_map.depth, points[..., 2] / np.float32(1000))


def test_nan_zero_negative_and_infinite_z_are_missing(tmp_path):
    points = cloud()
    points[0, :6, 2] = np.nan, 0, -0.0, -400, np.inf, -np.inf
    depth_map = read_one(tmp_path, points)
    assert not depth_map.valid[0, :6].any() and np.count_nonzero(~depth_map.valid) == 6
    assert not depth_map.depth[0, :6].any()


@pytest.mark.parametrize("unit", ["mm", "m", "um"])
@pytest.mark.parametrize("stored", ["mm", "m", "um"])
def test_a_unit_that_contradicts_the_data_is_refused_with_value_and_setting(tmp_path, unit, stored):
    scale = {"m": 1.0, "mm": 1e3, "um": 1e6}[stored]
    points = cloud(0.4 * scale)
    points[..., 2] *= np.linspace(1, 1.01, 30, dtype=np.float32)
    points[:9, :, 2] = np.nan
    root = tmp_path / "tree"
    depth_map = read_one(root, points, unit)
    settings = PrepareConfig("real_iad_d3", str(root), str(tmp_path / "o"), 1, real_iad_d3=RealIadD3Options(unit))
    if unit == stored:
        assert np.allclose(depth_map.depth[9:], 0.4 * np.linspace(1, 1.01, 30), rtol=1e-6)
        described = prepare(settings)["sources"]["real_iad_d3"]
        assert (described["unit_assumed"], described["larger_is_assumed"]) == (unit, "farther")
    else:
        reason = rf"median depth .* m is outside plausible.median 0.01..30 m: real_iad_d3.unit {unit} contradicts"
        with pytest.raises(DataError, match=reason):
            prepare(settings)


def test_a_sign_that_contradicts_the_data_is_refused_until_told(tmp_path):
    points = cloud()
    points[..., 2] *= -np.linspace(1, 1.01, 30, dtype=np.float32)
    points[0, :3, 2] = np.nan, 0, np.inf
    expected = -points[..., 2].astype(np.float64) / 1000
    expected[0, :3] = 0
    with pytest.raises(DataError, match=r"100% of the values are negative, .*real_iad_d3.larger_is nearer"):
        read_one(tmp_path, points)
    (item,) = found(tmp_path, RealIadD3Options(larger_is="nearer"))
    assert np.allclose(real_iad_d3.read(item).depth, expected, rtol=1e-6)
    (item,) = found(tmp_path, RealIadD3Options(larger_is="nearer", offset=0.5))
    assert np.allclose(real_iad_d3.read(item).depth, np.where(expected > 0, 0.5 + expected, 0), rtol=1e-6)
    (tmp_path / "other").mkdir()
    read_one(tmp_path / "other", cloud())
    (item,) = found(tmp_path / "other", RealIadD3Options(larger_is="nearer", offset=0.1))
    with pytest.raises(DataError, match="600 points reach the camera: real_iad_d3.offset 0.1 is too small"):
        real_iad_d3.read(item)
    for offset, larger_is in ((-1.0, "nearer"), (1.0, "farther"), (np.inf, "nearer")):
        with pytest.raises(ConfigError, match="real_iad_d3.offset"):
            found(tmp_path, RealIadD3Options(larger_is=larger_is, offset=offset))


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (cloud(np.nan), "all pixels are missing"),
        (cloud(-400.0), "all pixels are missing"),
        (cloud()[..., 2], "expected float X, Y, Z .* got .20, 30. float32"),
        (cloud().astype(np.uint16), "got .20, 30, 3. uint16"),
        (np.concatenate([cloud(), cloud()[..., :1]], -1), "got .20, 30, 4. float32"),
    ],
)
def test_clouds_without_depth_are_refused(tmp_path, points, reason):
    with pytest.raises(DataError, match=reason):
        read_one(tmp_path, points)


def test_a_photometric_stereo_picture_is_no_cloud(tmp_path):
    write_release(tmp_path, test=[entry(1)])
    write_listing(tmp_path, listing(test=[entry(1, xyz_path=recording(1, kind="PS.jpg"))]))
    with pytest.raises(DataError, match="not a readable TIFF"):
        real_iad_d3.read(found(tmp_path)[0])


# The re-arranged tree


def test_a_rearranged_tree_is_read_without_json_files(tmp_path):
    names = {place: f"{JACK}_0001_{place.replace('/', '_')}_XYZ" for place in ("train/GOOD", "test/good", "test/dent")}
    for place, stem in names.items():
        write_tiff(tmp_path / JACK / place / "xyz" / f"{stem}.tiff", cloud())
    for beside in ("rgb/{}.jpg", "gt/rgb/{}.png"):
        path = tmp_path / JACK / "test/dent" / beside.format(names["test/dent"].replace("XYZ", "RGBL05"))
        path.parent.mkdir(parents=True)
        Image.new("L", (30, 20)).save(path)
    items = found(tmp_path)
    assert [(item.category, item.split, item.label, item.group) for item in items] == [
        (JACK, "test", "dent", None),
        (JACK, "test", "good", None),
        (JACK, "train", "good", None),
    ]
    stem = f"{JACK}_0001_test_dent_RGBL05"
    assert items[0].source == f"{JACK}/test/dent/xyz/{names['test/dent']}.tiff"
    assert items[0].extra == {
        "image": f"{JACK}/test/dent/rgb/{stem}.jpg",
        "mask": f"{JACK}/test/dent/gt/rgb/{stem}.png",
    }
    assert not items[1].extra and real_iad_d3.describe(items)["validation_in_test"] == 0
    assert np.array_equal(real_iad_d3.read(items[0]).depth, cloud()[..., 2] / np.float32(1000))
    assert [item.source for item in found(tmp_path / JACK)] == [item.source for item in items]
    pack(tmp_path / f"{JACK}.zip", tmp_path / JACK, inner=True)
    assert [item.source for item in found(tmp_path)] == [item.source for item in items]


def test_the_tree_of_another_dataset_is_refused(tmp_path):
    for split in ("train", "validation"):
        points = cloud(0.4) * np.linspace(1, 1.01, 30, dtype=np.float32)[:, None]
        write_tiff(tmp_path / "bagel" / split / "good" / "xyz" / "000.tiff", points)
    with pytest.raises(DataError, match="validation is no split of real_iad_d3: expected train, test"):
        found(tmp_path)
    shutil.rmtree(tmp_path / "bagel" / "validation")
    assert len(mvtec3d.items(RawTree(tmp_path))) == 1
    with pytest.raises(DataError, match="real_iad_d3.unit mm contradicts the data"):
        prepare(PrepareConfig("real_iad_d3", str(tmp_path), str(tmp_path / "shards"), 1))
    shutil.rmtree(tmp_path / "bagel")
    with pytest.raises(DataError, match=r"is not a real_iad_d3 tree: expected realiad_d3_jsons/<category>.json, or "):
        found(tmp_path)


def test_published_counts_add_up():
    rows = real_iad_d3.PUBLISHED
    good = [row for row in rows if row[1:3] == ("train", "good")]
    totals = {split: count for category, split, _, count in rows if category is None}
    assert len({row[0] for row in good}) == 20 and sum(row[3] for row in good) == totals["train"]
    assert totals["train"] + totals["test"] == 8450


# The writer of the release

PARTS = ["angle_bracket", "spur_gear", "hex_nut", "pipe_flange"]


def render(out: Path, **options):
    counts = {"per_category": 2, "test_per_category": 4, "validation_per_category": 3}
    synth(SynthConfig("real_iad_d3", str(out), size=48, workers=1, categories=PARTS, **counts, **options))
    return out


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return render(tmp_path_factory.mktemp("release"))


def test_a_rendered_release_holds_every_recording_and_is_read(release):
    items = found(release)
    for category in PARTS:
        mine = [item for item in items if item.category == category]
        assert sorted((item.split, item.label == "good") for item in mine) == [
            *[("test", False)] * 2, *[("test", True)] * 2, *[("train", True)] * 2,
        ]  # fmt: skip
        for item in mine:
            folder = (release / "realiad_d3_raw" / item.source).parent
            kinds = sorted(path.name.split("_")[-2] + path.suffix for path in folder.iterdir())
            mask = [] if item.label == "good" else ["RGBL05.png"]
            lightings = [f"RGBL0{number}.jpg" for number in range(1, 6)]
            assert kinds == sorted(["PCD.pcd", "PS.jpg", "XYZ.tiff", *lightings, *mask])
            assert ("mask" in item.extra) == bool(mask) and "image" in item.extra
            assert np.isclose(np.median(real_iad_d3.read(item).depth), 0.5, atol=0.25)
            if mask:
                assert 0 < np.asarray(Image.open(folder / Path(item.extra["mask"]).name)).mean() < 128
    assert real_iad_d3.describe(items)["validation_in_test"] == 3 * len(PARTS)


def test_a_rendered_release_has_the_traps_of_the_published_one(release):
    items = found(release)
    channels_first, holes, constants, points, folders = set(), set(), {}, set(), set()
    for item in items:
        values = tifffile.imread(str(item.file))
        channels_first.add(values.shape[0] == 3)
        x, y, z = np.moveaxis(values, 0 if values.shape[0] == 3 else -1, 0)
        holes.add("nan" if np.isnan(z).any() else "zero" if (z == 0).any() else "none")
        assert np.ptp(x) == np.ptp(y) == 0
        constants.setdefault(item.label == "good", set()).add(float(x[0, 0]))
        cloud_file = next(Path(str(item.file)).parent.glob("*.pcd")).read_bytes()
        header, _, data = cloud_file.partition(b"DATA ")
        encoding, _, data = data.partition(b"\n")
        points.add(encoding)
        count = int(header.split(b"POINTS ")[1].split()[0])
        assert count == np.count_nonzero(z > 0)
        assert len(data) == 12 * count if encoding == b"binary" else len(data.split()) == 3 * count
        folders.add(item.source.split("/")[1] if item.label != "good" else "OK")
    assert channels_first == {True, False} and {"nan", "zero"} <= holes
    assert constants[True] == {np.float32(0.166)} and constants[False] == {0.0}
    assert points == {b"ascii", b"binary"} and {"OK", "NG"} < folders


def test_a_rendered_release_is_deterministic_and_reads_the_same_from_its_archives(release, tmp_path):
    again = render(tmp_path / "again")
    names = sorted(path.relative_to(release) for path in release.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((release / name).read_bytes() == (again / name).read_bytes() for name in names)
    packed = render(tmp_path / "packed", archive=True)
    files = sorted(str(path.relative_to(packed)) for path in packed.rglob("*") if path.is_file())
    archives = [f"realiad_d3_raw/{part}.zip" for part in PARTS]
    assert files == sorted(["SYNTHETIC.json", "realiad_d3_jsons.zip", *archives])
    for item, other in zip(found(release), found(packed), strict=True):
        assert replace(item, file=None) == replace(other, file=None)
        assert item.file.read() == other.file.read()
