"""Readers of raw datasets: every known trap, every format, and arbitrary bytes."""

import contextlib
import json
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep import exr, eyecandies, folder, formats, mvtec3d, pcd, visa
from data_prep.folder import FolderOptions
from data_prep.tree import RawTree
from dino_depth.errors import ConfigError, DataError

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def cloud(height=20, width=30, seed=0, border=True):
    """X, Y, Z in metres with a hole, and with an empty border where asked."""
    generator = np.random.default_rng(seed)
    points = generator.uniform(0.5, 0.7, (height, width, 3)).astype(np.float32)
    points[5:8, 5:8] = 0
    if not border:
        points[:3] = points[-3:] = 0
        points[:, :3] = points[:, -3:] = 0
    return points


def write_tiff(path: Path, values, **options):
    planar = {"planarconfig": "separate"} if values.ndim == 3 and values.shape[0] == 3 else {}
    colours = {"photometric": "rgb"} if values.ndim == 3 else {}
    tifffile.imwrite(path, values, **planar, **colours, **options)


def write_cloud(path: Path, points, rgb=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tiff(path, points)
    if rgb:
        image = path.parents[1] / "rgb" / f"{path.stem}.png"
        image.parent.mkdir(exist_ok=True)
        Image.new("RGB", points.shape[1::-1]).save(image)


def write_candy(data: Path, index: str, codes, low=0.4, high=0.9, anomalous=None):
    data.mkdir(parents=True, exist_ok=True)
    Image.fromarray(codes).save(data / f"{index}_depth.png")
    (data / f"{index}_info_depth.yaml").write_text(yaml.safe_dump({"normalization": {"min": low, "max": high}}))
    if anomalous is not None:
        (data / f"{index}_metadata.yaml").write_text(yaml.safe_dump({"anomalous": anomalous}))


def codes(height=20, width=30, seed=0):
    values = np.random.default_rng(seed).integers(1, 65535, (height, width)).astype(np.uint16)
    values[0, 0], values[0, 1] = 0, 65535
    return values


def read_folder(path: Path, **options):
    options = FolderOptions(**options)
    (item,) = folder.items(RawTree(path), options)
    return folder.read(item)


# MVTec 3D-AD


def test_mvtec3d_reads_splits_labels_and_depth(tmp_path):
    for place in ("train/good", "validation/good", "test/good", "test/cut"):
        write_cloud(tmp_path / "bagel" / place / "xyz" / "000.tiff", cloud())
    items = mvtec3d.items(RawTree(tmp_path))
    assert [(item.split, item.label, item.stem, item.category) for item in items] == [
        ("test", "cut", "000", "bagel"),
        ("test", "good", "000", "bagel"),
        ("train", "good", "000", "bagel"),
        ("validation", "good", "000", "bagel"),
    ]
    depth_map = mvtec3d.read(items[0])
    assert depth_map.depth.shape == (20, 30) and depth_map.kind == "metric"
    assert np.array_equal(depth_map.depth, cloud()[..., 2])
    assert np.array_equal(~depth_map.valid, (cloud() == 0).all(-1)) and not depth_map.valid[6, 6]


def test_mvtec3d_root_may_be_one_category(tmp_path):
    write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff", cloud())
    alone, whole = (mvtec3d.items(RawTree(root)) for root in (tmp_path / "bagel", tmp_path))
    assert [alone.source for alone in alone] == [item.source for item in whole] == ["bagel/train/good/xyz/000.tiff"]
    assert alone[0].category == "bagel"


def test_mvtec3d_refuses_a_validation_folder_of_another_name(tmp_path):
    write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff", cloud())
    write_cloud(tmp_path / "bagel" / "val" / "good" / "xyz" / "000.tiff", cloud())
    with pytest.raises(DataError, match="val is no split of mvtec3d: expected train, validation, test"):
        mvtec3d.items(RawTree(tmp_path))


def test_mvtec3d_pairs_masks_by_stem_and_takes_labels_from_folders(tmp_path):
    category = tmp_path / "cable_gland"
    for stem in ("000", "001", "002"):
        write_cloud(category / "test" / "cut" / "xyz" / f"{stem}.tiff", cloud())
    # The second mask is absent: pairing by order would shift it. Its values are class ids, none is 0 or 255.
    (category / "test" / "cut" / "gt").mkdir()
    for stem in ("000", "002"):
        Image.fromarray(np.full((20, 30), 254, np.uint8)).save(category / "test" / "cut" / "gt" / f"{stem}.png")
    (category / "class_ids.json").write_text(json.dumps({"254": "cut", "0": "good"}))
    items = mvtec3d.items(RawTree(tmp_path))
    assert [item.label for item in items] == ["cut"] * 3
    assert [item.extra.get("mask") for item in items] == [
        "cable_gland/test/cut/gt/000.png",
        None,
        "cable_gland/test/cut/gt/002.png",
    ]
    assert {item.extra["class_id"] for item in items} == {254}


def test_mvtec3d_refuses_broken_class_ids(tmp_path):
    write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff", cloud())
    (tmp_path / "bagel" / "class_ids.json").write_text("[1]")
    with pytest.raises(DataError, match="class_ids.json must map class ids"):
        mvtec3d.items(RawTree(tmp_path))


def test_mvtec3d_treats_non_finite_points_as_missing(tmp_path):
    points = cloud()
    points[0, 0] = np.nan
    points[0, 1, 2] = np.inf
    write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff", points)
    valid = mvtec3d.read(mvtec3d.items(RawTree(tmp_path))[0]).valid
    assert not valid[0, :2].any() and valid[0, 2:].all()


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        (np.zeros((20, 30, 3), np.float32), "all pixels are missing"),
        (cloud()[..., 2], "expected float X, Y, Z"),
        (np.moveaxis(cloud(), 2, 0).copy(), "expected float X, Y, Z"),
        ((cloud() * 1000).astype(np.uint16), "expected float X, Y, Z"),
        ((cloud() * 100).astype(np.uint8), "are not depth"),
        (-cloud(), "behind the camera"),
    ],
)
def test_mvtec3d_refuses_what_is_no_cloud(tmp_path, points, reason):
    write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff", points, rgb=False)
    with pytest.raises(DataError, match=reason):
        mvtec3d.read(mvtec3d.items(RawTree(tmp_path))[0])


def test_mvtec3d_refuses_a_cloud_of_another_size_than_its_image(tmp_path):
    path = tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff"
    write_cloud(path, cloud())
    write_tiff(path, cloud(19, 30))
    with pytest.raises(DataError, match="the cloud is 19x30, its rgb image 20x30"):
        mvtec3d.read(mvtec3d.items(RawTree(tmp_path))[0])


def test_mvtec3d_recognises_raw_trees(tmp_path):
    for stem in ("000", "001"):
        write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / f"{stem}.tiff", cloud())
    assert mvtec3d.describe(mvtec3d.items(RawTree(tmp_path)))["preprocessed"] is False


def test_mvtec3d_recognises_a_removed_plane(tmp_path):
    write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff", cloud())
    write_cloud(tmp_path / "tire" / "train" / "good" / "xyz" / "000.tiff", cloud(30, 30, border=False))
    # Copies may mark with NaN what they removed.
    points = cloud(30, 30, border=False)
    points[(points == 0).all(-1)] = np.nan
    write_cloud(tmp_path / "rope" / "train" / "good" / "xyz" / "000.tiff", points)
    description = mvtec3d.describe(mvtec3d.items(RawTree(tmp_path)))
    assert description["preprocessed"] is True
    removed = "0.0% of the border is valid, the plane was removed"
    assert description["preprocessed_reason"] == f"rope: {removed}; tire: {removed}"


@pytest.mark.parametrize("share, preprocessed", [(0.045, True), (0.055, False)])
def test_mvtec3d_a_plane_that_was_removed_leaves_a_few_points_at_the_border(tmp_path, share, preprocessed):
    """Real preprocessing leaves specks at the border, and real raw clouds have holes there: 5 % parts the two."""
    points = cloud(100, 100, border=False)
    border = np.ones((100, 100), bool)
    border[1:-1, 1:-1] = False
    places = np.flatnonzero(border)
    chosen = np.random.default_rng(0).permutation(places)[: round(share * len(places))]
    points.reshape(-1, 3)[chosen] = 0.6
    write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff", points)
    described = mvtec3d.describe(mvtec3d.items(RawTree(tmp_path)))
    assert described["preprocessed"] is preprocessed
    assert ("valid, the plane was removed" in described["preprocessed_reason"]) is preprocessed


def test_mvtec3d_only_the_origin_is_missing(tmp_path):
    """A point with Z = 0 beside the axis was measured, so the cloud is broken; in a real one the camera is at Z = 0."""
    points = cloud()
    points[10, 10] = 0.1, 0.2, 0
    write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff", points)
    with pytest.raises(DataError, match="1 points have Z <= 0, behind the camera"):
        mvtec3d.read(mvtec3d.items(RawTree(tmp_path))[0])
    points[10, 10] = 0, 0, 0.5  # on the axis, and valid
    write_cloud(tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff", points)
    assert mvtec3d.read(mvtec3d.items(RawTree(tmp_path))[0]).valid[10, 10]


def test_mvtec3d_recognises_clouds_padded_beyond_their_images(tmp_path):
    path = tmp_path / "rope" / "train" / "good" / "xyz" / "000.tiff"
    write_cloud(path, cloud(20, 30))
    write_tiff(path, np.pad(cloud(20, 30), ((5, 5), (0, 0), (0, 0))))
    items = mvtec3d.items(RawTree(tmp_path))
    assert mvtec3d.read(items[0]).depth.shape == (30, 30)
    assert "padded beyond images of 20x30" in mvtec3d.describe(items)["preprocessed_reason"]


# Eyecandies


def test_eyecandies_code_zero_is_the_nearest_point(tmp_path):
    write_candy(tmp_path / "CandyCane" / "train" / "data", "000", codes(), 0.4, 0.9)
    (item,) = eyecandies.items(RawTree(tmp_path))
    depth_map = eyecandies.read(item)
    assert depth_map.valid.all()
    assert depth_map.depth[0, 0] == pytest.approx(0.4) and depth_map.depth[0, 1] == pytest.approx(0.9)
    assert np.allclose(depth_map.depth, codes() / 65535 * 0.5 + 0.4, atol=1e-7)


def test_eyecandies_depth_zero_is_missing(tmp_path):
    write_candy(tmp_path / "CandyCane" / "train" / "data", "000", codes(), 0.0, 0.9)
    valid = eyecandies.read(eyecandies.items(RawTree(tmp_path))[0]).valid
    assert not valid[0, 0] and valid.sum() == valid.size - 1


def test_eyecandies_bounds_are_read_per_sample(tmp_path):
    write_candy(tmp_path / "Lollipop" / "val" / "data", "00", codes(), 0.4, 0.9)
    write_candy(tmp_path / "Lollipop" / "val" / "data", "01", codes(), 1.4, 1.9)
    first, second = (eyecandies.read(item).depth for item in eyecandies.items(RawTree(tmp_path)))
    assert np.allclose(second - first, 1.0)


def test_eyecandies_paddings_splits_and_labels(tmp_path):
    category = tmp_path / "GummyBear"
    write_candy(category / "train" / "data", "007", codes())
    write_candy(category / "train" / "data", "1007", codes())
    write_candy(category / "test_public" / "data", "07", codes(), anomalous=1)
    write_candy(category / "test_public" / "data", "08", codes(), anomalous=False)
    write_candy(category / "test_public" / "data", "09", codes())
    write_candy(category / "test_private" / "data", "7", codes(), anomalous=1)
    Image.new("RGB", (30, 20)).save(category / "train" / "data" / "007_normals.png")
    for root in (tmp_path, category):
        assert [(item.split, item.stem, item.label) for item in eyecandies.items(RawTree(root))] == [
            ("test_private", "7", "unknown"),
            ("test_public", "07", "anomalous"),
            ("test_public", "08", "good"),
            ("test_public", "09", "unknown"),
            ("train", "007", "good"),
            ("train", "1007", "good"),
        ]


@pytest.mark.parametrize("text", ["{}", "[]", "a: [", "anomalous: maybe"])
def test_eyecandies_refuses_unclear_metadata(tmp_path, text):
    data = tmp_path / "GummyBear" / "test_public" / "data"
    write_candy(data, "07", codes())
    (data / "07_metadata.yaml").write_text(text)
    with pytest.raises(DataError, match="07_metadata.yaml"):
        eyecandies.items(RawTree(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["{}", "normalization: 3", "normalization: {min: 0.5}", "normalization: {min: 0.9, max: 0.4}", "a: [", "",
     "normalization: {min: .nan, max: 1}", "!!python/object/apply:os.system [true]"],
)  # fmt: skip
def test_eyecandies_refuses_unclear_bounds(tmp_path, text):
    data = tmp_path / "GummyBear" / "train" / "data"
    write_candy(data, "007", codes())
    (data / "007_info_depth.yaml").write_text(text)
    with pytest.raises(DataError):
        eyecandies.read(eyecandies.items(RawTree(tmp_path))[0])


def test_eyecandies_refuses_missing_bounds_and_eight_bits(tmp_path):
    data = tmp_path / "GummyBear" / "train" / "data"
    write_candy(data, "007", codes())
    (item,) = eyecandies.items(RawTree(tmp_path))
    Image.fromarray((codes() >> 8).astype(np.uint8)).save(item.file.path)
    with pytest.raises(DataError, match="8-bit grey"):
        eyecandies.read(item)
    Image.fromarray(codes()).save(item.file.path)
    (data / "007_info_depth.yaml").unlink()
    (item,) = eyecandies.items(RawTree(tmp_path))
    with pytest.raises(DataError, match="no 007_info_depth.yaml"):
        eyecandies.read(item)


# Wrong roots


def test_wrong_roots_say_what_was_expected_and_found(tmp_path):
    write_candy(tmp_path / "candies" / "GummyBear" / "train" / "data", "007", codes())
    write_cloud(tmp_path / "mvtec" / "bagel" / "train" / "good" / "xyz" / "000.tiff", cloud())
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"expected .*xyz/\*.tiff, found GummyBear/ > train/ > data/ > 007_depth.png"):
        mvtec3d.items(RawTree(tmp_path / "candies"))
    with pytest.raises(DataError, match=r"expected .*data/\*_depth.png, found bagel/ > train/ > good/ > rgb/, xyz/"):
        eyecandies.items(RawTree(tmp_path / "mvtec"))
    for reader in (mvtec3d.items, eyecandies.items, lambda tree: folder.items(tree, FolderOptions())):
        with pytest.raises(DataError, match="found nothing"):
            reader(RawTree(tmp_path / "empty"))


# Folders


@pytest.mark.parametrize(("unit", "metres"), [("auto", 1e-3), ("mm", 1e-3), ("um", 1e-6), ("cm", 1e-2), ("m", 1.0)])
def test_folder_png_units(tmp_path, unit, metres):
    Image.fromarray(codes()).save(tmp_path / "a.png")
    depth_map = read_folder(tmp_path, unit=unit)
    assert np.allclose(depth_map.depth, codes() * metres, rtol=1e-6)
    assert not depth_map.valid[0, 0] and depth_map.valid.sum() == depth_map.valid.size - 1


def test_folder_scale_missing_values_and_kind(tmp_path):
    Image.fromarray(codes()).save(tmp_path / "a.png")
    depth_map = read_folder(tmp_path, scale=0.0002, missing=[65535], kind="relative")
    assert depth_map.kind == "relative" and not depth_map.valid[0, :2].any()
    assert np.allclose(depth_map.depth[1:], codes()[1:] * 0.0002)


def test_folder_floats_are_metres_and_nan_is_missing(tmp_path):
    values = cloud()[..., 2].copy()
    values[0, :3] = np.nan, np.inf, -1
    np.save(tmp_path / "a.npy", np.asfortranarray(values.astype(np.float64)))
    depth_map = read_folder(tmp_path)
    assert np.array_equal(depth_map.depth[1:], values[1:]) and not depth_map.valid[0, :3].any()


def test_folder_channels(tmp_path):
    points = cloud()
    write_tiff(tmp_path / "a.tiff", points)
    assert np.array_equal(read_folder(tmp_path).depth, points[..., 2])
    assert np.array_equal(read_folder(tmp_path, channel=0).depth, points[..., 0])
    with pytest.raises(DataError, match="no channel 3"):
        read_folder(tmp_path, channel=3)
    write_tiff(tmp_path / "a.tiff", np.moveaxis(points, 2, 0).copy())
    assert np.array_equal(read_folder(tmp_path).depth, points[..., 2])
    write_tiff(tmp_path / "a.tiff", points[..., 1])
    assert np.array_equal(read_folder(tmp_path).depth, points[..., 1])


def test_folder_heights(tmp_path):
    heights = np.zeros((20, 20), np.float32)
    heights[5:9, 5:9] = 0.1
    heights[0, 0] = -9999
    np.save(tmp_path / "a.npy", heights)
    depth_map = read_folder(tmp_path, larger_is="nearer", offset=0.5, missing=[-9999])
    assert depth_map.depth[6, 6] == pytest.approx(0.4) and depth_map.depth[10, 10] == pytest.approx(0.5)
    assert np.count_nonzero(~depth_map.valid) == 1
    with pytest.raises(DataError, match="offset 0.05 is too small"):
        read_folder(tmp_path, larger_is="nearer", offset=0.05, missing=[-9999])


def test_folder_sun_rgbd_codes(tmp_path):
    millimetres = codes()
    Image.fromarray(millimetres << 3 | millimetres >> 13).save(tmp_path / "a.png")
    assert np.allclose(read_folder(tmp_path, encoding="sun_rgbd").depth, millimetres * 1e-3)


def test_folder_nyu_raw_codes(tmp_path):
    disparity = np.full((20, 20), 800, np.uint16)
    disparity[0] = 2047
    # The files hold the least significant byte first, against what a PGM promises.
    (tmp_path / "a.pgm").write_bytes(b"P5 20 20 65535\n" + disparity.astype("<u2").tobytes())
    depth_map = read_folder(tmp_path, encoding="nyu_raw")
    assert not depth_map.valid[0].any() and np.allclose(depth_map.depth[1:], 351.3 / (1092.5 - 800))
    with pytest.raises(DataError, match="needs 16-bit codes"):
        np.save(tmp_path / "b.npy", cloud()[..., 2])
        read_folder(tmp_path, encoding="nyu_raw", glob="*.npy")


def test_folder_categories_and_splits_from_folders(tmp_path):
    for name in ("train/bolt/a.png", "train/nut/a.png", "test/bolt/deep/a.png", "test/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(codes()).save(tmp_path / name)
    placed = {item.source: item for item in folder.items(RawTree(tmp_path), FolderOptions(split=""))}
    assert {source: (item.split, item.category, item.stem) for source, item in placed.items()} == {
        "train/bolt/a.png": ("train", "bolt", "a"),
        "train/nut/a.png": ("train", "nut", "a"),
        "test/bolt/deep/a.png": ("test", "deep", "bolt-a"),
        "test/a.png": ("test", "all", "a"),
    }
    fixed = folder.items(
        RawTree(tmp_path), FolderOptions(category="part", name="mine", label="good", glob="train/**/*.png")
    )
    assert sorted((item.dataset, item.split, item.category, item.label, item.stem) for item in fixed) == [
        ("mine", "train", "part", "good", "train-bolt-a"),
        ("mine", "train", "part", "good", "train-nut-a"),
    ]
    Image.fromarray(codes()).save(tmp_path / "loose.png")
    with pytest.raises(DataError, match="in no folder that could name its split"):
        folder.items(RawTree(tmp_path), FolderOptions(split=""))


def test_folder_beside_colour_images(tmp_path):
    Image.fromarray(codes()).save(tmp_path / "0.depth.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "0.color.png")
    Image.new("RGB", (30, 20)).save(tmp_path / "0.jpg")
    (tmp_path / "pose.txt").write_text("1 0 0 0")
    assert [item.source for item in folder.items(RawTree(tmp_path), FolderOptions(glob="*.depth.png"))] == [
        "0.depth.png"
    ]
    faults = []
    for item in folder.items(RawTree(tmp_path), FolderOptions()):
        try:
            folder.read(item)
        except DataError as error:
            faults.append((item.source, str(error)))
    assert faults == [("0.color.png", "not depth but a PNG of 8-bit RGB: depth is 16-bit grey")]
    with pytest.raises(ConfigError, match="0.jpg, which is none of .png"):
        folder.items(RawTree(tmp_path), FolderOptions(glob="0*"))


@pytest.mark.parametrize(
    "options",
    [{"scale": -1.0}, {"scale": 0.1, "unit": "mm"}, {"offset": 1.0}, {"larger_is": "nearer", "offset": -1.0},
     {"farthest": -1.0}, {"farthest": np.inf}, {"channel": -2},
     {"glob": "/absolute/*.png"}, {"encoding": "nyu_raw", "unit": "mm"}],
)  # fmt: skip
def test_folder_refuses_contradictions(tmp_path, options):
    Image.fromarray(codes()).save(tmp_path / "a.png")
    with pytest.raises(ConfigError):
        folder.items(RawTree(tmp_path), FolderOptions(**options))


def test_folder_reads_photographs_as_brightness(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png")
    depth_map = read_folder(tmp_path, encoding="grey")
    expected = (colours @ [0.299, 0.587, 0.114] + 1) / 256
    assert depth_map.valid.all() and depth_map.kind == "relative" and np.abs(depth_map.depth - expected).max() < 1e-6
    Image.fromarray(colours[..., 0]).save(tmp_path / "a.png")
    brightness = (colours[..., 0].astype(np.float64) + 1) / 256
    assert np.abs(read_folder(tmp_path, encoding="grey").depth - brightness).max() < 1e-6
    with pytest.raises(ConfigError, match="grey is brightness"):
        read_folder(tmp_path, encoding="grey", unit="mm")


# Formats


def test_exr(tmp_path):
    OpenEXR = pytest.importorskip("OpenEXR", reason="OpenEXR is not installed")
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    points = cloud()

    def write(**channels):
        OpenEXR.File(header, channels).write(str(tmp_path / "a.exr"))

    write(Z=points[..., 2].copy(), A=points[..., 0].copy())
    assert np.array_equal(read_folder(tmp_path).depth, points[..., 2])
    write(Y=points[..., 1].copy())
    assert np.array_equal(read_folder(tmp_path).depth, points[..., 1])
    write(RGB=points)
    for channel in range(3):
        assert np.array_equal(read_folder(tmp_path, channel=channel).depth, points[..., channel])
    with pytest.raises(DataError, match="no channel 3: the file has R, G and B"):
        read_folder(tmp_path, channel=3)
    with pytest.raises(DataError, match="channels B, G, R is depth beyond doubt: name one with folder.layer"):
        read_folder(tmp_path)
    write(RGB=np.repeat(points[..., :1], 3, -1))
    assert np.array_equal(read_folder(tmp_path).depth, points[..., 0])
    write(A=points[..., 0].copy(), B=points[..., 1].copy())
    with pytest.raises(DataError, match="none of the channels A, B is depth"):
        read_folder(tmp_path)
    assert np.array_equal(read_folder(tmp_path, layer="B").depth, points[..., 1])
    whole = (tmp_path / "a.exr").read_bytes()
    for length in (0, 3, 100, len(whole) // 2, len(whole) - 5):
        (tmp_path / "a.exr").write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_folder(tmp_path)
    generator = np.random.default_rng(0)
    for _ in range(100):
        changed = bytearray(whole)
        changed[generator.integers(8, len(whole))] = generator.integers(256)
        (tmp_path / "a.exr").write_bytes(changed)
        try:
            assert exr.decode_exr(bytes(changed)).ndim == 2
        except DataError as error:
            assert str(tmp_path) not in str(error)


def pcd_bytes(points, encoding, dtype="<f4", count=1):
    """A cloud with an extra field before and after its coordinates."""
    height, width = points.shape[:2]
    names = ["label", "x", "y", "z", "rgba"]
    flat = points.reshape(-1, 3)
    columns = [np.ones((len(flat), count), "<u2"), *(flat[:, [axis]].astype(dtype) for axis in range(3))]
    columns.append(np.zeros((len(flat), 1), "<u4"))
    sizes = [column.dtype.itemsize for column in columns]
    kinds = [column.dtype.kind.upper() for column in columns]
    counts = [column.shape[1] for column in columns]
    lines = [
        "# .PCD v0.7", "VERSION 0.7", f"FIELDS {' '.join(names)}", f"SIZE {' '.join(map(str, sizes))}",
        f"TYPE {' '.join(kinds)}", f"COUNT {' '.join(map(str, counts))}", f"WIDTH {width}", f"HEIGHT {height}",
        "VIEWPOINT 0 0 0 1 0 0 0", f"POINTS {len(flat)}", f"DATA {encoding}", "",
    ]  # fmt: skip
    header = "\n".join(lines).encode()
    if encoding == "ascii":
        rows = np.concatenate([column.astype(np.float64) for column in columns], 1)
        return header + "\n".join(" ".join(repr(float(value)) for value in row) for row in rows).encode() + b"\n"
    if encoding == "binary":
        parts = [np.ascontiguousarray(column).view(np.uint8).reshape(len(flat), -1) for column in columns]
        return header + np.concatenate(parts, 1).tobytes()
    plain = b"".join(column.tobytes() for column in columns)
    packed = imagecodecs.lzf_encode(plain)
    return header + struct.pack("<II", len(packed), len(plain)) + packed


@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("dtype", ["<f4", "<f8"])
@pytest.mark.parametrize("count", [1, 3])
def test_pcd_encodings(tmp_path, encoding, dtype, count):
    points = cloud()
    points[0, 0] = np.nan
    (tmp_path / "a.pcd").write_bytes(pcd_bytes(points, encoding, dtype, count))
    depth_map = read_folder(tmp_path)
    assert not depth_map.valid[0, 0] and np.array_equal(depth_map.depth[1:], points[1:, :, 2])
    assert np.array_equal(read_folder(tmp_path, channel=0).depth[1:], points[1:, :, 0])


@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
def test_pcd_cut_short(encoding):
    whole = pcd_bytes(cloud(), encoding)
    start = whole.index(b"DATA")
    for length in (10, start, start + 12, start + 40, len(whole) - 300):
        with pytest.raises(DataError):
            pcd.decode_pcd(whole[:length])


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("HEIGHT 20", "HEIGHT 1", "not organised"),
        ("POINTS 600", "POINTS 599", "differs from 30x20"),
        ("WIDTH 30", "WIDTH 900000000", "megapixels"),
        ("FIELDS label x y z rgba", "FIELDS label x y w rgba", "no field z"),
        ("TYPE U F F F U", "TYPE U F F Q U", "unknown type"),
        ("SIZE 2 4 4 4 4", "SIZE 2 4 4 4", "differ in length"),
        ("COUNT 1 1 1 1 1", "COUNT 1 1 1 0 1", "impossible"),
        ("WIDTH 30", "WIDTH -3", "whole numbers"),
        ("WIDTH 30\n", "", "lacks WIDTH"),
    ],
)
def test_pcd_refuses_impossible_headers(old, new, reason):
    whole = pcd_bytes(cloud(), "binary")
    assert old.encode() in whole
    with pytest.raises(DataError, match=reason):
        pcd.decode_pcd(whole.replace(old.encode(), new.encode()))


@given(st.binary(min_size=1, max_size=2000), st.integers(1, 50))
@QUICK
def test_lzf_inverts_an_independent_compressor(content, repeats):
    plain = content * repeats
    packed = imagecodecs.lzf_encode(plain, out=len(plain) * 2 + 64)
    assert pcd.decompress_lzf(packed, len(plain)) == plain
    assert pcd.decompress_lzf(packed, len(plain) // 2) == plain[: len(plain) // 2]


@pytest.mark.parametrize(
    ("packed", "reason"),
    [
        (b"", "end after 0 of 9"),
        (b"\x01a", "within a literal"),
        (b"\x00a\x20", "within a match"),
        (b"\x00a\xe0\x01", "within a match"),
        (b"\x00a\x20\x01", "before the data"),
        (b"\x00a\x3f\xff", "before the data"),
    ],
)
def test_lzf_refuses_broken_data(packed, reason):
    with pytest.raises(DataError, match=reason):
        pcd.decompress_lzf(packed, 9)
    assert pcd.decompress_lzf(b"\x01ab\xe0\x00\x01", 9) == b"ababababa"


def valid_files(folder_path: Path) -> dict[str, bytes]:
    points = cloud()
    write_tiff(folder_path / "a.tiff", points)
    write_tiff(folder_path / "b.tiff", points, compression="zlib", tile=(16, 16))
    np.save(folder_path / "a.npy", points[..., 2])
    Image.fromarray(codes()).save(folder_path / "a.png")
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    photograph.save(folder_path / "b.png")
    photograph.save(folder_path / "b.jpg", quality=95)
    return {
        "tiff": (folder_path / "a.tiff").read_bytes(),
        "tiled tiff": (folder_path / "b.tiff").read_bytes(),
        "npy": (folder_path / "a.npy").read_bytes(),
        "png": (folder_path / "a.png").read_bytes(),
        "image png": (folder_path / "b.png").read_bytes(),
        "image jpeg": (folder_path / "b.jpg").read_bytes(),
        "pfm": b"Pf\n30 20\n-1.0\n" + points[..., 2].astype("<f4").tobytes(),
        "pgm": b"P5\n# made by hand\n30 20 65535\n" + codes().astype(">u2").tobytes(),
        **{f"{encoding} pcd": pcd_bytes(points, encoding) for encoding in ("ascii", "binary", "binary_compressed")},
    }


DECODERS = {
    "tiff": formats.decode_tiff, "tiled tiff": formats.decode_tiff, "npy": formats.decode_npy,
    "png": formats.decode_png, "pgm": formats.decode_pgm, "pfm": formats.decode_pfm, "ascii pcd": pcd.decode_pcd,
    "binary pcd": pcd.decode_pcd, "binary_compressed pcd": pcd.decode_pcd, "image png": formats.decode_image,
    "image jpeg": formats.decode_image,
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return valid_files(tmp_path_factory.mktemp("files"))


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_accept_whole_and_refuse_cut_files(files, name):
    whole = files[name]
    assert DECODERS[name](whole).shape[:2] == (20, 30)
    for length in (1, 9, 30, len(whole) // 3, len(whole) - 200):
        with pytest.raises(DataError):
            DECODERS[name](whole[:length])


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_survive_arbitrary_and_mutated_bytes(files, name):
    """Anything but an array or a DataError fails; so does a message that names this machine or this moment."""
    whole = files[name]

    @given(st.data())
    @QUICK
    def decode(data):
        if data.draw(st.booleans()):
            content = whole[: data.draw(st.integers(0, 16))] + data.draw(st.binary(max_size=200))
        else:
            changed = bytearray(whole)
            # Headers are short: half of the changes go there.
            places = st.one_of(st.integers(0, min(300, len(whole)) - 1), st.integers(0, len(whole) - 1))
            for place in data.draw(st.lists(places, min_size=1, max_size=8)):
                changed[place] = data.draw(st.integers(0, 255))
            content = bytes(changed)
        try:
            array = DECODERS[name](content)
        except DataError as error:
            assert " at 0x" not in str(error) and "\n" not in str(error)
        else:
            assert array.ndim in (2, 3) and array.dtype.kind in "fiu"

    decode()


def test_npy_never_unpickles_and_checks_the_size_first(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[{}, []]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="are not depth"):
        formats.decode_npy((tmp_path / "a.npy").read_bytes())
    np.save(tmp_path / "a.npy", np.zeros((20, 30)))
    whole = (tmp_path / "a.npy").read_bytes()
    with pytest.raises(DataError, match="cut short"):
        formats.decode_npy(whole.replace(b"(20, 30)", b"(20, 31)"))
    with pytest.raises(DataError, match="megapixels"):
        formats.decode_npy(whole.replace(b"(20, 30), }      ", b"(90000, 90000), }"))


@given(
    st.binary(max_size=60) | st.text(st.sampled_from("anomlus:{}[]0123456789,\n .-!&*'\""), max_size=60).map(str.encode)
)
@QUICK
def test_descriptions_of_any_content_are_read_or_refused(tmp_path, content):
    """YAML beside a map, class ids in JSON and a table of splits in CSV, of arbitrary bytes."""
    candies, clouds, photographs = (tmp_path / name for name in ("candies", "clouds", "photographs"))
    if not candies.exists():
        write_candy(candies / "GummyBear" / "test_public" / "data", "07", codes(), anomalous=1)
        write_cloud(clouds / "bagel" / "train" / "good" / "xyz" / "000.tiff", cloud())
        (photographs / "pcb1" / "Data" / "Images" / "Normal").mkdir(parents=True)
        Image.new("RGB", (30, 20)).save(photographs / "pcb1" / "Data" / "Images" / "Normal" / "0000.JPG", "jpeg")
        (photographs / "split_csv").mkdir()
    for name in ("info_depth", "metadata"):
        (candies / "GummyBear" / "test_public" / "data" / f"07_{name}.yaml").write_bytes(content)
    (clouds / "bagel" / "class_ids.json").write_bytes(content)
    (photographs / "split_csv" / "1cls.csv").write_bytes(b"object,split,label,image,mask\n" + content)
    attempts = (
        lambda: [eyecandies.read(item) for item in eyecandies.items(RawTree(candies))],
        lambda: mvtec3d.items(RawTree(clouds)),
        lambda: visa.items(RawTree(photographs), visa.VisaOptions()),
    )
    for attempt in attempts:
        with contextlib.suppress(DataError):
            attempt()
