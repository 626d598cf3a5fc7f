"""Well-formed files that mean something other than a reader assumes: read right, or refused with the way out.

Every test makes its own file; where ``shared/cases`` lies beside the checkout, the files that once failed are read too.
"""

import json
import re
import struct
import tarfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import OpenEXR
import pytest
import tifffile
import webdataset
from PIL import Image

from data_prep import folder, mvtec3d
from data_prep.check import CheckConfig, check
from data_prep.exr import decode_exr
from data_prep.folder import FolderOptions
from data_prep.formats import decode_image, decode_pfm, decode_tiff
from data_prep.inspect import InspectConfig, inspect
from data_prep.manifest import digest_json
from data_prep.plausibility import (
    PlausibilityConfig,
    check_limits,
    implausible,
    refuse_marks,
    refuse_negative,
    summarise,
)
from data_prep.shards import PrepareConfig, prepare
from data_prep.tree import RawTree
from dino_depth.depth import DepthMap, decode_png, encode
from dino_depth.errors import ConfigError, DataError
from dino_depth.sample import depth_handler, sample_map, with_depth_map

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "depth.md"
HEADER = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}


def frame(height=120, width=160):
    """(height, width) float32 metres in whole millimetres, 0.671..1.713, of which an eighth is missing, 0."""
    rows, columns = np.mgrid[0:height, 0:width] / [[[height]], [[width]]]
    depth = 0.671 + 0.3 * rows + 0.742 * (columns > 0.6) * columns
    depth = np.round(np.clip(depth, 0.671, 1.713), 3).astype(np.float32)
    depth[:, ::8] = 0
    depth[-1, -1] = 1.713
    return depth


def written(path: Path, content) -> Path:
    """A folder with one file of that content: bytes, EXR channels by name, or a list of them by part."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        channels = {name: np.ascontiguousarray(values) for name, values in content.items()}
        OpenEXR.File(dict(HEADER), channels).write(str(path))
    elif isinstance(content, list):
        parts = [OpenEXR.Part(HEADER | {"name": name}, channels) for name, channels in content]
        OpenEXR.File(parts).write(str(path))
    elif path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".png":
        Image.fromarray(content).save(path)
    else:
        tifffile.imwrite(path, content)
    return path.parent


def case(tmp_path: Path, name: str) -> Path:
    if not (CASES / name).is_file():
        pytest.skip(f"shared/cases/{name} is not beside this checkout")
    return written(tmp_path / "case" / name, (CASES / name).read_bytes())


def read(root: Path, **options) -> DepthMap:
    options = FolderOptions(**options)
    (item,) = folder.items(RawTree(root), options)
    return folder.read(item)


def stored(root: Path, out: Path, plausible=None, coding="linear", **options) -> tuple[DepthMap, dict]:
    """The one map of a folder after the whole way through a checked shard, and its description."""
    settings = PrepareConfig("folder", str(root), str(out), 1, folder=FolderOptions(**options), coding=coding)
    settings.plausible = plausible or PlausibilityConfig()
    prepare(settings)
    check(CheckConfig(str(out)))
    with tarfile.open(out / "depth-000000.tar") as tar:
        png, text = (tar.extractfile(member).read() for member in tar)
    meta = json.loads(text)
    return decode_png(png, meta["near"], meta["far"], meta["kind"], meta["coding"]), meta


def sphere(low=9.0, high=9.57, side=100):
    rows, columns = np.mgrid[0:side, 0:side] / side
    return (low + (high - low) * (rows + columns) / 2 / rows.max()).astype(np.float16)


# OpenEXR


def colours(side=100):
    return {
        name: np.random.default_rng(place).random((side, side)).astype(np.float16) for place, name in enumerate("ABGR")
    }


@pytest.mark.parametrize("real", [False, True])
def test_z_beside_colours_and_other_views_is_depth(tmp_path, real):
    channels = colours() | {"Z": sphere(), "left.Z": sphere(8.0, 8.5), "left.R": sphere()}
    root = case(tmp_path, "beachball_singlepart_thinned.exr") if real else written(tmp_path / "raw" / "a.exr", channels)
    depth_map, meta = stored(root, tmp_path / "o")
    assert 9.0 <= depth_map.depth.min() <= depth_map.depth.max() < 9.58
    assert depth_map.valid.all() and meta["distinct"] > 50
    assert read(root, layer="left.Z").depth.max() != depth_map.depth.max()


@pytest.mark.parametrize("real", [False, True])
def test_two_parts_with_depth_need_a_name(tmp_path, real):
    parts = [
        ("rgba_right", colours()), ("depth_left", {"Z": sphere()}), ("rgba_left", colours()),
        ("depth_right", {"Z": sphere(8.0, 8.5)}),
    ]  # fmt: skip
    root = case(tmp_path, "beachball_multipart_thinned.exr") if real else written(tmp_path / "raw" / "a.exr", parts)
    every = (
        "depth_left/Z",
        "depth_right/Z",
        "rgba_left/A",
        "rgba_left/B",
        "rgba_left/G",
        "rgba_left/R",
        "rgba_right/A",
    )
    with pytest.raises(DataError) as caught:
        read(root)
    assert all(name in str(caught.value) for name in every) and "name one with folder.layer" in str(caught.value)
    left, right = (read(root, layer=f"depth_{side}") for side in ("left", "right"))
    assert 8.9 < left.depth.min() < left.depth.max() < 9.6 and left.valid.all()
    assert not np.array_equal(left.depth, right.depth)
    assert np.array_equal(read(root, layer="depth_left/Z").depth, left.depth)
    for name in ("rgba_left", "nothing", "Z"):
        with pytest.raises(DataError, match=f"'{name}' is [024] of the channels depth_left/Z, depth_right/Z"):
            read(root, layer=name)


@pytest.mark.parametrize("real", [False, True])
def test_a_layer_called_depth_is_told_from_normals(tmp_path, real):
    layers = {f"ViewLayer.Normal.{axis}": colours()["R"] for axis in "XYZ"}
    layers |= {f"ViewLayer.Combined.{axis}": colours()["R"] for axis in "RGBA"} | {"ViewLayer.Depth.Z": sphere()}
    root = case(tmp_path, "blender_multilayer.exr") if real else written(tmp_path / "raw" / "a.exr", layers)
    depth_map = read(root)
    assert np.array_equal(depth_map.depth, read(root, layer="ViewLayer.Depth").depth)
    assert depth_map.depth[depth_map.valid].min() > 0.1
    with pytest.raises(DataError, match="'ViewLayer.Normal' is 3 of the channels"):
        read(root, layer="ViewLayer.Normal")


@pytest.mark.parametrize("name", ["depth", "Depth.V", "ZDepth.Z", "camera1.z-depth.R", "left_depth.Y"])
def test_names_of_depth(tmp_path, name):
    root = written(
        tmp_path / "raw" / "a.exr", {"Normal.Z": sphere(1, 2), "in-depthness.Z": sphere(1, 3), name: sphere()}
    )
    assert read(root).depth.min() == 9.0
    root = written(tmp_path / "raw" / "a.exr", {"depthless.V": sphere(1, 2), "ids.Z": sphere(1, 3)})
    with pytest.raises(DataError, match="none of the channels depthless.V, ids.Z is depth beyond doubt"):
        read(root)


def test_many_channels_are_bounded_before_they_are_decoded(tmp_path):
    """1.5 MiB of a bomb would take 2.9 GiB; what a renderer writes is read one channel at a time."""
    flat = np.zeros((1200, 1200), np.float16)
    content = written(tmp_path / "raw" / "a.exr", {f"C{place:02}": flat for place in range(40)} | {"Z": flat + 1})
    whole = (content / "a.exr").read_bytes()
    with pytest.raises(DataError, match="bytes grow to 236160000 in 41 channels: the file is damaged or hostile"):
        decode_exr(whole)
    (content / "a.exr").unlink()
    noise = np.random.default_rng(0).random((64, 64)).astype(np.float32)
    content = written(tmp_path / "raw" / "b.exr", {f"C{place:02}": noise for place in range(40)} | {"Z": noise + 1})
    assert np.array_equal(decode_exr((content / "b.exr").read_bytes()), noise + 1)


def test_a_damaged_part_is_no_other_part(tmp_path, capfd):
    """The library prints a warning and goes on with the parts that are left."""
    parts = [OpenEXR.Part(dict(HEADER), {"Z": frame() + place}, name) for place, name in enumerate(("left", "right"))]
    OpenEXR.File(parts).write(str(tmp_path / "a.exr"))
    whole = (tmp_path / "a.exr").read_bytes()
    for place, name in enumerate(("left", "right")):
        assert np.array_equal(decode_exr(whole, name), frame() + place)
    changed = bytearray(whole)
    start = len(whole) // 4
    changed[start : start + 8] = b"\xff" * 8
    with pytest.raises(DataError, match="the part 'left' is damaged or cut short"):
        decode_exr(bytes(changed), "left")
    assert np.array_equal(decode_exr(bytes(changed), "right"), frame() + 1)
    for length in (len(whole) // 4, len(whole) // 2):
        with pytest.raises(DataError, match="the part 'right' is damaged or cut short"):
            decode_exr(whole[:length], "right")
    assert capfd.readouterr() == ("", "")


def test_tiles_larger_than_the_map_are_bounded_before_they_are_decoded(tmp_path):
    """A tile of 16 million rows took seconds and 3 GiB."""
    tiles = OpenEXR.TileDescription()
    tiles.xSize = tiles.ySize = 32
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.tiledimage, "tiles": tiles}
    OpenEXR.File(header, {"Z": frame()}).write(str(tmp_path / "a.exr"))
    whole = (tmp_path / "a.exr").read_bytes()
    assert np.array_equal(decode_exr(whole), frame())
    place = whole.index(b"tiles\0tiledesc\0") + 19
    with pytest.raises(DataError, match="bytes grow to 10737418240 in 1 channels: the file is damaged or hostile"):
        decode_exr(whole[:place] + struct.pack("<II", 32, 2**24) + whole[place + 8 :])


def test_deep_data_are_refused(tmp_path):
    deep = np.empty((20, 30), object)
    for place in np.ndindex(deep.shape):
        deep[place] = np.arange(3, dtype=np.float32)
    header = {"compression": OpenEXR.ZIPS_COMPRESSION, "type": OpenEXR.deepscanline}
    OpenEXR.File(header, {"Z": deep}).write(str(tmp_path / "a.exr"))
    with pytest.raises(DataError, match="deep data"):
        read(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.uint32])
def test_the_types_of_exr(tmp_path, dtype):
    values = (sphere(1, 30000).astype(np.float64)).astype(dtype)
    root = written(tmp_path / "raw" / "a.exr", {"Z": values})
    assert np.array_equal(read(root, scale=1.0).depth, values.astype(np.float32))


# Values that are no measurements


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("name, value", [("z_1e10.exr", 1e10), ("flt_max.tif", np.finfo(np.float32).max)])
def test_a_value_for_no_measurement_is_refused_or_named(tmp_path, real, name, value):
    values = np.where(frame() > 0, frame(), np.float32(value))
    root = written(tmp_path / "raw" / name, {"Z": values} if name.endswith("exr") else values)
    root = case(tmp_path, name) if real else root
    with pytest.raises(DataError) as caught:
        stored(root, tmp_path / "refused")
    assert name in str(caught.value) and f"{value:.6g} m" in str(caught.value) and "folder.missing" in str(caught.value)
    for way, options in (("named", {"missing": [float(value)]}), ("farthest", {"farthest": 100.0})):
        depth_map, meta = stored(root, tmp_path / way, **options)
        depth = depth_map.depth[depth_map.valid]
        assert (depth.min(), depth.max()) == (pytest.approx(0.671, abs=1e-3), pytest.approx(1.713, abs=1e-3))
        assert depth_map.valid.mean() == pytest.approx(0.884 if real else 0.875, abs=1e-3) and meta["distinct"] > 100


@pytest.mark.parametrize(
    "dtype, value",
    [(np.float32, value) for value in ("-9999", "0", "65535", "3.4028234663852886e+38", "-3.40282e+38", "1e+10")]
    + [(np.uint16, "0"), (np.uint16, "65535")],
)
def test_the_nodata_tag_of_gdal_is_heeded(tmp_path, dtype, value):
    values = frame() if dtype == np.float32 else (frame() * 1000).astype(np.uint16)
    values = np.where(values > 0, values, dtype(float(value)))
    (tmp_path / "raw").mkdir()
    tifffile.imwrite(tmp_path / "raw" / "a.tif", values, extratags=[(42113, "s", 0, value, True)])
    depth_map, _ = stored(tmp_path / "raw", tmp_path / "o")
    assert np.array_equal(depth_map.valid, frame() > 0) and depth_map.depth.max() == pytest.approx(1.713)


@pytest.mark.parametrize("value, times", [(65.535, 1), (0.001, 1), (20.0, 1), (1e-30, 1)])
def test_one_value_far_from_all_others_is_refused_at_either_end(tmp_path, value, times):
    narrow = np.where(frame() > 0, 0.6 + frame() / 100, value).astype(np.float32)
    root = written(tmp_path / "raw" / "a.npy", narrow)
    with pytest.raises(DataError, match=f"12.5% of its pixels have the depth {value:.6g} m, .*folder.missing"):
        stored(root, tmp_path / "refused")
    depth_map, _ = stored(root, tmp_path / "o", missing=[value])
    assert np.array_equal(depth_map.valid, frame() > 0)
    stored(root, tmp_path / "told", PlausibilityConfig(apart=0, step=0, codes=0))


@pytest.mark.parametrize(
    "mark, dtype, options",
    [(65535, np.uint16, {}), (65535, np.uint16, {"scale": 0.0002}), (32767, np.int16, {}),
     (65504, np.float16, {"unit": "mm"}), (65535, np.float32, {"unit": "mm"})],
)  # fmt: skip
def test_the_largest_number_of_a_type_is_no_depth(tmp_path, mark, dtype, options):
    """In metres it is near enough to pass every limit, where codes are fine or the scale is small."""
    values = np.where(frame() > 0, frame() * 3000, mark).astype(dtype)
    root = written(tmp_path / "raw" / "a.npy", values)
    with pytest.raises(
        DataError, match=f"12.5% of the values are {mark}, the next is 51\\d\\d: .*name it in folder.missing"
    ):
        stored(root, tmp_path / "refused", coding="inverse", **options)
    for way, told in (("named", {"missing": [mark]}), ("farthest", {"farthest": 6.0})):
        depth_map, _ = stored(root, tmp_path / way, **options, **told)
        assert np.array_equal(depth_map.valid, frame() > 0)


@pytest.mark.parametrize(
    "marked, masked, missing, refused",
    [(10, 0, 0, True), (9, 0, 0, False), (10, 0, 5000, True), (9, 0, 5000, False), (9, 500, 500, False),
     (10, 500, 500, True)],
)  # fmt: skip
def test_a_thousandth_of_the_values_are_a_mark(marked, masked, missing, refused):
    """``masked`` of the ``missing`` values, which do not count, hold the same number."""
    values = np.linspace(500, 5000, 10000).astype(np.uint16)
    values[:marked] = values[9999 - masked : 9999] = 65535
    absent = np.zeros(10000, bool)
    absent[9999 - missing : 9999] = True
    with pytest.raises(DataError, match="0.1% of the values are 65535, the next is 5000") if refused else nullcontext():
        refuse_marks(values.reshape(100, 100), "folder", absent.reshape(100, 100))


def test_a_mark_is_farther_from_all_others_than_they_are_from_each_other():
    values = np.tile(np.array([1, 32768, 65535], np.uint16), (10, 4))
    absent = np.zeros(values.shape, bool)
    refuse_marks(values, "folder", absent)
    with pytest.raises(DataError, match="33.3% of the values are 65535, the next is 32768"):
        refuse_marks(np.where(values == 1, 2, values), "folder", absent)
    # What is missing already is no mark, however large.
    infinite = np.tile(np.array([1, 2, 65504, 1e10, np.inf], np.float32), (10, 4))
    with pytest.raises(DataError, match="20.0% of the values are 65504, the next is 2:"):
        refuse_marks(infinite, "folder", infinite > 65504)


def test_heights_have_marks_too_and_stay_below_the_camera(tmp_path):
    heights = np.where(frame() > 0, frame() * 10000, 65535).astype(np.uint16)
    root = written(tmp_path / "raw" / "a.npy", heights)
    words = {"larger_is": "nearer", "scale": 1e-5, "offset": 1.0}
    with pytest.raises(DataError, match="12.5% of the values are 65535, .*name it in folder.missing"):
        read(root, **words)
    assert np.array_equal(read(root, missing=[65535], **words).valid, frame() > 0)
    highest = heights[heights < 65535].max() * 1e-5
    with pytest.raises(DataError, match="1 heights reach the camera"):
        read(root, missing=[65535], **words | {"offset": highest})
    along = -frame()
    along[5, 5:8] = 0.1
    with pytest.raises(DataError, match="3 heights reach the camera: folder.offset 0.0 is too small"):
        read(written(tmp_path / "along" / "a.npy", along), larger_is="nearer")


def test_a_depth_that_reaches_the_largest_number_is_depth(tmp_path):
    values = np.linspace(0, 1, 120 * 160).reshape(120, 160) * 90000
    root = written(tmp_path / "raw" / "a.npy", np.minimum(values, 65535).astype(np.uint16))
    assert stored(root, tmp_path / "o", scale=0.0001)[0].depth.max() == pytest.approx(6.5535)


def test_a_nodata_tag_that_is_no_number_is_named(tmp_path):
    (tmp_path / "raw").mkdir()
    tifffile.imwrite(tmp_path / "raw" / "a.tif", frame(), extratags=[(42113, "s", 0, "none", True)])
    with pytest.raises(DataError, match="GDAL tag for missing pixels holds 'none', which is no number"):
        read(tmp_path / "raw")


def test_a_wall_behind_a_part_is_no_such_value(tmp_path):
    values = np.where(frame() > 0, frame(), 8.0).astype(np.float32)
    depth_map, _ = stored(written(tmp_path / "raw" / "a.npy", values), tmp_path / "o")
    assert depth_map.valid.all() and depth_map.depth.max() == 8


# Units and signs


@pytest.mark.parametrize("real", [False, True])
def test_millimetres_in_floats_are_refused_until_told(tmp_path, real):
    root = written(tmp_path / "raw" / "a.tif", frame() * 1000)
    root = case(tmp_path, "float32_millimetres.tif") if real else root
    with pytest.raises(
        DataError, match=r"median depth \d+(\.\d)? m is outside plausible.median 0.01..30 m: folder.unit auto"
    ):
        stored(root, tmp_path / "refused")
    depth_map, _ = stored(root, tmp_path / "o", unit="mm")
    assert 0.67 < depth_map.depth[depth_map.valid].min() < depth_map.depth.max() < 1.72


def test_a_camera_that_looks_along_minus_z_is_refused_until_told(tmp_path):
    root = written(tmp_path / "raw" / "a.npy", -frame())
    with pytest.raises(DataError, match=r"88% of the values are negative, -1.713 to -0.671: .*folder.larger_is nearer"):
        read(root)
    depth_map = read(root, larger_is="nearer")
    assert np.array_equal(depth_map.depth, frame()) and np.array_equal(depth_map.valid, frame() > 0)


def test_a_few_negative_values_and_one_for_missing_stay_missing(tmp_path):
    values = frame()
    values[:4] = -1 - np.arange(4)[:, None]  # 3 % noise
    assert np.array_equal(read(written(tmp_path / "raw" / "a.npy", values)).valid, values > 0)
    values = np.where(frame() > 0, frame(), -9999)
    assert np.array_equal(read(written(tmp_path / "raw" / "a.npy", values)).valid, frame() > 0)


@pytest.mark.parametrize("share, refused", [(0.04, False), (0.06, True), (0.3, True)])
def test_from_five_percent_of_negative_values_on_the_sign_is_in_doubt(share, refused):
    values = np.linspace(0.5, 0.6, 10_000, dtype=np.float32).reshape(100, 100)
    values.reshape(-1)[: int(share * values.size)] *= -1
    doubt = pytest.raises(DataError, match=f"{share:.0%} of the values are negative") if refused else nullcontext()
    with doubt:
        refuse_negative(values, "folder")


@pytest.mark.parametrize(
    "near, far, unit", [(700.0, 2000.0, True), (1e-6, 2e-4, True), (0.003, 0.009, True), (0.7, 2000.0, False)]
)
def test_a_wrong_unit_is_told_before_what_follows_from_it(near, far, unit):
    """Millimetres read as metres are also too far and too coarse; one value far away alone says nothing of the unit."""
    values = np.linspace(near, far, 4096).reshape(64, 64)
    codes, low, high = encode(DepthMap.from_values(values))
    reasons = list(implausible(summarise(codes, low, high, "metric", "linear"), PlausibilityConfig()))
    assert (reasons[0][1] == "unit") == unit and reasons[0][0].startswith("median depth" if unit else "its farthest")
    assert [remedy for _, remedy in reasons].count("unit") == 1 + unit


# What is no depth map


@pytest.mark.parametrize("real", [False, True])
def test_integer_colours_are_refused_until_a_channel_is_told(tmp_path, real):
    values = np.random.default_rng(0).integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    (tmp_path / "raw").mkdir()
    tifffile.imwrite(tmp_path / "raw" / "a.tif", values, photometric="rgb")
    root = case(tmp_path, "colour_rgb16.tif") if real else tmp_path / "raw"
    with pytest.raises(DataError, match="3 channels of uint16 are colours, unless folder.channel says which is depth"):
        read(root)
    assert read(root, channel=1).depth.max() < 65.6


def test_stacks_and_several_images_need_a_number(tmp_path):
    stack = np.stack([frame(), frame() + 1, frame() + 2])
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, stack, photometric="minisblack")
    with pytest.raises(DataError, match="a stack of images, 3x120x160 float32: one image is expected: name"):
        read(tmp_path)
    assert np.array_equal(read(tmp_path, layer="0").depth, frame())
    assert np.array_equal(read(tmp_path, channel=0).depth, frame())
    with pytest.raises(DataError, match="'3' is none of 0 to 2"):
        read(tmp_path, layer="3")
    with tifffile.TiffWriter(path) as writer:
        writer.write(frame())
        writer.write((frame() > 0).astype(np.uint8))
    with pytest.raises(DataError, match=r"2 images \(120x160 float32, 120x160 uint8\): one image is expected"):
        read(tmp_path)
    assert np.array_equal(read(tmp_path, layer="0").depth, frame())
    with pytest.raises(DataError, match="uint8 are not depth"):
        read(tmp_path, layer="1")


def test_thumbnails_do_not_count_and_a_tiff_mask_says_what_is_missing(tmp_path):
    seen = np.zeros((120, 160), bool)
    seen[20:100, 20:140] = True
    for values in (frame(), (frame() * 1000).astype(np.uint16)):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            writer.write(values)
            writer.write(seen, photometric="mask")
            writer.write(values[::8, ::8], subfiletype=1)
        depth_map = read(tmp_path)
        assert np.array_equal(depth_map.valid, (frame() > 0) & seen)
        assert np.allclose(depth_map.depth, np.where(seen, frame(), 0), atol=1e-3)
        assert np.array_equal(decode_tiff((tmp_path / "a.tif").read_bytes(), masked=False), values)


def test_a_palette_is_refused(tmp_path):
    table = np.random.default_rng(0).integers(0, 65536, (3, 256)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((20, 20), np.uint8), photometric="palette", colormap=table)
    with pytest.raises(DataError, match="not depth but colours by a palette"):
        decode_tiff((tmp_path / "a.tif").read_bytes())


@pytest.mark.parametrize(
    "values, reason",
    [((255, 255), "the same depth 0.255 m everywhere"), ((0, 65535), "the same depth 65.535 m"),
     ((1, 2, 3), "median depth 0.002 m is outside"), ((10, 20, 30), "only 3 distinct depths, 0.01..0.03 m, as masks"),
     (range(12), "median depth 0.006 m is outside")],
)  # fmt: skip
def test_masks_and_label_images_are_refused(tmp_path, values, reason):
    labels = np.array(values, np.uint16)[np.random.default_rng(0).integers(0, len(values), (40, 50))]
    with pytest.raises(DataError, match=reason):
        stored(written(tmp_path / "raw" / "a.png", labels), tmp_path / "o")


def test_a_map_without_a_thousandth_of_its_pixels_is_refused(tmp_path):
    values = np.where(np.arange(120 * 160).reshape(120, 160) < 15, 1 + frame(), 0).astype(np.float32)
    values.reshape(-1)[:15] += np.arange(15) / 100
    with pytest.raises(DataError, match="only 0.08% of its pixels are valid"):
        stored(written(tmp_path / "raw" / "a.npy", values), tmp_path / "o")


# The codes


def far_away(wall: float) -> np.ndarray:
    """A part with half a centimetre of relief at 0.5 m, and pixels of a wall."""
    values = (0.5 + 0.005 * np.random.default_rng(0).random((120, 160))).astype(np.float32)
    values[:, 100:] = np.linspace(0.9 * wall, wall, 60, dtype=np.float32)
    return values


def test_codes_too_coarse_for_what_the_file_tells_apart_are_refused(tmp_path):
    """With a wall at 4 m codes are 53 um apart, at 60 m 908 um."""
    stored(written(tmp_path / "raw" / "a.npy", far_away(4)), tmp_path / "near")
    root = written(tmp_path / "raw" / "a.npy", far_away(60))
    with pytest.raises(
        DataError, match=r"0.5..60 m are 908 um apart .*than plausible.step 500 um: give folder.farthest"
    ):
        stored(root, tmp_path / "refused")
    with pytest.raises(
        DataError, match=r"nearer half holds \d+ depths of which 16-bit codes over 0.5..60 tell [567] apart"
    ):
        stored(root, tmp_path / "codes", PlausibilityConfig(step=0))
    depth_map, meta = stored(root, tmp_path / "cut", farthest=2.0)
    assert depth_map.valid.mean() == pytest.approx(100 / 160) and meta["far"] < 0.506
    depth_map, meta = stored(root, tmp_path / "inverse", coding="inverse")
    assert meta["coding"] == "inverse" and depth_map.valid.all() and meta["distinct"] > 600
    assert json.loads((tmp_path / "inverse" / "manifest.json").read_text())["version"] == 3
    assert np.abs(depth_map.depth - far_away(60))[:, :100].max() < 4e-6  # half of 7.6 um


def test_where_codes_of_inverse_depth_are_too_coarse_linear_ones_are_advised(tmp_path):
    values = far_away(20)
    values[:, 20:] = np.linspace(19, 20, 140, dtype=np.float32)
    root = written(tmp_path / "raw" / "a.npy", values)
    with pytest.raises(DataError, match="um apart at its median depth.*give folder.farthest, or coding linear"):
        stored(root, tmp_path / "o", coding="inverse")


def test_what_a_sensor_cannot_tell_apart_loses_nothing(tmp_path):
    """Half a centimetre in whole millimetres is six values, and stays six under the same wall."""
    values = np.where(far_away(30) < 1, np.round(far_away(30), 3), far_away(30))
    depth_map, _ = stored(written(tmp_path / "raw" / "a.npy", values), tmp_path / "o")
    assert np.array_equal(np.round(depth_map.depth[:, :100], 3), values[:, :100])


@pytest.mark.parametrize("coding", ["linear", "inverse"])
@pytest.mark.parametrize("seed", range(3))
def test_the_summary_of_codes_is_that_of_the_pixels(coding, seed):
    random = np.random.default_rng(seed)
    values = np.where(random.random((40, 50)) < 0.2, 0, np.round(random.uniform(0.5, 3, (40, 50)), 2))
    depth_map = DepthMap.from_values(values)
    codes, near, far = encode(depth_map, coding)
    found = summarise(codes, near, far, "metric", coding)
    depth = np.sort(values[values > 0])
    assert found.distinct == len(np.unique(depth)) and found.valid == np.mean(values > 0)
    assert found.median == pytest.approx(depth[(len(depth) - 1) // 2], abs=1e-4)
    levels, counts = np.unique(depth, return_counts=True)
    (nearest, after, near_share, near_times), (farthest, before, far_share, far_times) = found.ends
    assert [nearest, after, before, farthest] == pytest.approx(levels[[0, 1, -2, -1]], abs=1e-4)
    assert [near_share, far_share] == pytest.approx(counts[[0, -1]] / len(depth))
    assert near_times == pytest.approx((levels[1] - levels[0]) / (levels[-1] - levels[1]), rel=0.02)
    assert far_times == pytest.approx((levels[-1] - levels[-2]) / (levels[-2] - levels[0]), rel=0.02)
    assert not list(implausible(found, PlausibilityConfig()))


def test_limits_out_of_range_are_refused():
    for key, value in (("median", (2.0, 1.0)), ("farthest", -1.0), ("valid", 2.0), ("values", -1), ("apart", -1.0),
                       ("step", -1.0), ("codes", -1)):  # fmt: skip
        with pytest.raises(ConfigError, match=f"plausible.{key} must be"):
            check_limits(PlausibilityConfig(**{key: value}))


# Other formats


@pytest.mark.parametrize("order, scale", [("<f4", b"-1.0"), (">f4", b"1.000")])
def test_pfm(tmp_path, order, scale):
    content = b"Pf\n160 120\n" + scale + b"\n" + frame()[::-1].astype(order).tobytes()
    assert np.array_equal(decode_pfm(content), frame())
    root = written(tmp_path / "raw" / "a.pfm", content)
    assert np.array_equal(read(root).depth, frame())
    with Image.open(root / "a.pfm") as peer:
        assert np.array_equal(np.asarray(peer), frame())
    with pytest.raises(DataError, match="three colours"):
        decode_pfm(content.replace(b"Pf", b"PF"))
    with pytest.raises(DataError, match="cut short: 76796 of 76800"):
        decode_pfm(content[:-4])


def test_photographs_of_16_bits_become_8(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (20, 30)).astype(np.uint16)
    content = (written(tmp_path / "raw" / "a.png", values) / "a.png").read_bytes()
    found = decode_image(content)
    assert found.shape == (20, 30, 3) and found.dtype == np.uint8
    assert np.array_equal(found, np.repeat(np.rint(values / 257)[..., None], 3, -1))


def test_a_file_without_a_finite_value_says_so(tmp_path):
    with pytest.raises(DataError, match="not one of 600 values is finite"):
        read(written(tmp_path / "raw" / "a.npy", np.full((20, 30), np.nan)))
    values = np.full((20, 30), np.inf)
    values[0, 0] = 1
    assert read(written(tmp_path / "raw" / "a.npy", values)).valid.sum() == 1


def test_nothing_that_libraries_say_reaches_the_terminal(tmp_path, recwarn, capfd):
    for place, content in enumerate((b"\x76\x2f\x31\x01" + b"\0" * 60, (b"II*\0\x08\0\0\0" + b"\xff" * 80))):
        for decode in (decode_exr, decode_tiff, decode_image):
            with pytest.raises(DataError):
                decode(content[: 40 + place])
    whole = (written(tmp_path / "raw" / "a.exr", {"Z": frame()}) / "a.exr").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        changed = bytearray(whole)
        changed[random.integers(8, len(whole))] = random.integers(256)
        try:
            decode_exr(bytes(changed))
        except DataError:
            pass
    assert not recwarn.list and capfd.readouterr() == ("", "")


def test_published_readers_are_judged_too(tmp_path):
    """A cloud in millimetres, in the layout of MVTec 3D-AD, whose unit nobody chooses."""
    points = np.random.default_rng(0).uniform(500, 700, (20, 30, 3)).astype(np.float32)
    path = tmp_path / "bagel" / "train" / "good" / "xyz" / "000.tiff"
    path.parent.mkdir(parents=True)
    tifffile.imwrite(path, points, photometric="rgb")
    assert len(mvtec3d.items(RawTree(tmp_path))) == 1
    with pytest.raises(DataError, match=r"median depth \d+\.?\d* m is outside plausible.median 0.01..30 m"):
        prepare(PrepareConfig("mvtec3d", str(tmp_path), str(tmp_path / "o"), 1))


# check and inspect


def test_check_and_inspect_show_step_distinct_values_and_range(tmp_path, capsys):
    for coding, step in (("linear", "15.9 um"), ("inverse", None)):
        _, meta = stored(written(tmp_path / "raw" / "a.npy", frame()), tmp_path / coding, coding=coding)
        depth = frame()[frame() > 0]
        middle = np.sort(depth)[(len(depth) - 1) // 2]
        assert meta["median"] == pytest.approx(middle, abs=1e-5) and meta["distinct"] == len(np.unique(depth))
        step = step or f"{middle**2 * (1 / 0.671 - 1 / 1.713) / 65534 * 1e6:.3g} um"
        said = capsys.readouterr().out
        assert f"folder: depth 0.671..1.713 m; one code is {step} in the median, {step[:-3]} at most; " in said
        assert f"{meta['distinct']:,} distinct depths a map" in said and "hard to believe" not in said
        inspect(InspectConfig(str(tmp_path / coding), str(tmp_path / "page.html")))
        page = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert f"step of a code {step.replace('um', 'µm')}" in page and f"distinct depths {meta['distinct']}" in page


def test_check_names_maps_that_are_hard_to_believe(tmp_path, capsys):
    """As in shards from before there were limits: nothing in them is damaged, and nobody may believe them."""
    values = np.where(frame() > 0, frame(), np.float32(1e10))
    stored(written(tmp_path / "raw" / "a.npy", values), tmp_path / "o", PlausibilityConfig((0, 0), 0, 0, 0, 0, 0, 0))
    assert "hard to believe" not in capsys.readouterr().out
    path = tmp_path / "o" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["config"]["plausible"]
    manifest["config_hash"] = digest_json(manifest["config"])
    path.write_text(json.dumps(manifest))
    check(CheckConfig(str(tmp_path / "o")))
    said = capsys.readouterr().out
    assert "1 of the maps are hard to believe: depth-000000.tar: folder/all/train-unknown-a: its farthest depth" in said
    assert "1e+10 m, beyond plausible.farthest 1000" in said and "2 distinct depths a map" in said


def test_the_brightness_of_photographs_is_not_judged(tmp_path):
    image = np.zeros((20, 30), np.uint8)
    image[:2] = 255
    root = written(tmp_path / "raw" / "a.png", image)
    _, meta = stored(root, tmp_path / "o", encoding="grey")
    assert meta["distinct"] == 2


# WebDataset


def test_the_page_about_depth_runs_as_it_stands(tmp_path, monkeypatch):
    stored(written(tmp_path / "raw" / "a.npy", frame()), tmp_path / "shards" / "mvtec3d")
    (code,) = re.findall(r"```python\n(import webdataset\n.*?)```", PAGE.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert np.array_equal(names["sample"]["depth_map"].valid, frame() > 0)


def test_image_decoders_of_webdataset_saturate_and_the_handler_does_not(tmp_path):
    """All values in docs/depth.md: if WebDataset learns 16 bits one day, its words there can go."""
    urls = str(tmp_path / "linear" / "depth-000000.tar")
    for coding in ("linear", "inverse"):
        expected, _ = stored(written(tmp_path / "raw" / "a.npy", frame()), tmp_path / coding, coding=coding)
        shard = webdataset.WebDataset(str(tmp_path / coding / "depth-000000.tar"), shardshuffle=False)
        (sample,) = list(shard.decode(depth_handler).map(with_depth_map))
        assert np.array_equal(sample["depth_map"].depth, expected.depth) and "depth.png" not in sample
        assert np.array_equal(sample["depth_map"].valid, expected.valid) and sample["json"]["category"] == "all"
    for stock, most in (("rgb8", 255), ("l8", 255), ("pil", 255), ("rgb", 1), ("torchrgb", 1), ("l", 1)):
        (sample,) = list(webdataset.WebDataset(urls, shardshuffle=False).decode(stock))
        assert np.mean(np.asarray(sample["depth.png"]) == most) > 0.8
        with pytest.raises(DataError, match=r"train-unknown-a holds no codes and description: decode\(depth_handler\)"):
            with_depth_map(sample)
    with pytest.raises(DataError, match="json lacks 'kind'"):
        sample_map(np.ones((2, 2), np.uint16), {"near": 1.0, "far": 2.0})
