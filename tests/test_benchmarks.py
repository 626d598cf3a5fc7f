"""Benchmarks: trees written here byte by byte, every guess about SiM3D as a setting, and every fault as one line."""

import json
import pickle
import pkgutil
import re
import shutil
import struct
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import OpenEXR
import pytest
import tifffile
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multiview_scene import CENTRE, RADII, ellipsoid_depth, off_ellipsoid, ring
from PIL import Image

from data_prep.archives import RawFile
from data_prep.synthetic import SynthConfig, synth
from data_prep.synthetic.plan import Sim3dOptions as SynthOptions
from dino_depth.anomaly import benchmarks
from dino_depth.anomaly.benchmarks import BENCHMARKS, BenchmarkConfig, open_benchmark
from dino_depth.anomaly.benchmarks.calibration import CalibrationOptions, read_cameras
from dino_depth.anomaly.benchmarks.eyecandies import EyecandiesOptions
from dino_depth.anomaly.benchmarks.sim3d import Sim3dOptions
from dino_depth.anomaly.benchmarks.sim3d_views import read_depth, read_image
from dino_depth.anomaly.benchmarks.truth import TruthOptions, decode_ply, read_truth
from dino_depth.anomaly.geometry import back_project
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError

VIEWS = 12
SIZE = (30, 40)
CLASS = "badge"  # a class may hold the word that marks anomalous instances
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
LENS = (-0.1, 0.02, 0.001, -0.001, 0.0)


def write_exr(path, values):
    """One array for R, G and B, or a channel for each name."""
    channels = values if isinstance(values, dict) else dict.fromkeys("RGB", values)
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    channels = {name: np.ascontiguousarray(channel, np.float32) for name, channel in channels.items()}
    with OpenEXR.File(header, channels) as file:
        file.write(str(path))


def write_instance(folder, cameras, stems, synthetic=False):
    names = ("DEPTH", "RGB") if synthetic else ("depth", "rgb")
    for name in names:
        (folder / name).mkdir(parents=True)
    for number, (stem, camera) in enumerate(zip(stems, cameras, strict=True)):
        depth = ellipsoid_depth(camera)
        if synthetic:
            write_exr(folder / "DEPTH" / f"{stem}_depth.exr", np.where(depth > 0, depth, 1e10))
        else:
            values = np.where(depth > 0, depth * 1000, np.inf).astype(np.float32)
            np.save(folder / "depth" / f"{stem}.npy", values)
        Image.fromarray(np.full(SIZE, 10 * number, np.uint8)).save(folder / names[1] / f"{stem}_2.png")


def calibration(cameras, stems):
    rows = [
        {"name": stem, "height": camera.height, "width": camera.width, "matrix": camera.matrix.tolist(),
         "distortion": list(camera.distortion), "camera_to_world": camera.camera_to_world.tolist()}
        for stem, camera in zip(stems, cameras, strict=True)
    ]  # fmt: skip
    return json.dumps({"cameras": rows})


def write_xml(folder, cameras, name="pose_ocv.txt", convert=lambda pose: pose):
    matrix = " ".join(map(repr, cameras[0].matrix.ravel().tolist()))
    lens = " ".join(map(repr, cameras[0].distortion))
    (folder / "calib.xml").write_text(
        f'<?xml version="1.0"?>\n<opencv_storage>\n<wL>{SIZE[1]}</wL>\n<hL>{SIZE[0]}</hL>\n'
        f'<mtxL type_id="opencv-matrix"><rows>3</rows><cols>3</cols><dt>d</dt><data>{matrix}</data></mtxL>\n'
        f'<distL type_id="opencv-matrix"><rows>1</rows><cols>5</cols><dt>d</dt><data>{lens}</data></distL>\n'
        "</opencv_storage>\n"
    )
    poses = [convert(camera.camera_to_world).ravel().tolist() for camera in cameras]
    (folder / name).write_text("".join(" ".join(map(repr, pose)) + "\n" for pose in poses))


def cap_voxels(size=0.005):
    """The voxels of the ellipsoid's upper end: index, origin and shape."""
    origin, shape = np.full(3, -0.3), (120, 120, 120)
    centers = origin + (np.indices(shape).reshape(3, -1).T + 0.5) * size
    near = (off_ellipsoid(centers) < 0.03) & (centers[:, 2] > CENTRE[2] + 0.8 * RADII[2])
    return np.argwhere(near.reshape(shape)).astype(np.int32), origin, shape


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A class with a real and a synthetic training instance, two good and two anomalous ones; views 1 to 12."""
    root = tmp_path_factory.mktemp("sim3d")
    cameras, stems = ring(VIEWS, *SIZE), [str(number + 1) for number in range(VIEWS)]
    for name in ("real", "01_good", "02_good", "03_bad", "04_bad"):
        write_instance(root / CLASS / f"{CLASS}_{name}", cameras, stems)
    padded = [f"posa_{number:03d}" for number in range(VIEWS)]
    write_instance(root / CLASS / f"{CLASS}_synth", cameras, padded, synthetic=True)
    (root / CLASS / "calibration.json").write_text(calibration(cameras, stems))
    index, origin, shape = cap_voxels()
    for name in ("03_bad", "04_bad"):
        np.savez(root / CLASS / f"{CLASS}_{name}" / "gt.npz", origin=origin, voxel_size=0.005, shape=shape, index=index)
    (root / "benchmark.json").write_text("{}")
    return root


@pytest.fixture
def tree(written, tmp_path):
    shutil.copytree(written, tmp_path / "sim3d")
    return tmp_path / "sim3d"


def sim3d(root, **options):
    return open_benchmark(BenchmarkConfig("sim3d", str(root), sim3d=Sim3dOptions(**options)))


def instance(tree, name):
    return tree / CLASS / f"{CLASS}_{name}"


# The registry


def test_the_registry_is_the_modules_that_open_a_benchmark():
    modules = [module.name for module in pkgutil.iter_modules(benchmarks.__path__)]
    opening = {name for name in modules if hasattr(import_module(f"{benchmarks.__name__}.{name}"), "open_benchmark")}
    assert set(BENCHMARKS) == opening


def test_an_unknown_benchmark_or_a_missing_root_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="unknown benchmark 'sim3b'; did you mean 'sim3d'"):
        open_benchmark(BenchmarkConfig("sim3b", str(tmp_path)))
    with pytest.raises(ConfigError, match="root"):
        open_benchmark(BenchmarkConfig("sim3d"))
    for name in BENCHMARKS:
        with pytest.raises(DataError, match="nowhere"):
            open_benchmark(BenchmarkConfig(name, str(tmp_path / "nowhere")))
        with pytest.raises(DataError, match="is not a|holds no VIEWS.json"):
            open_benchmark(BenchmarkConfig(name, str(tmp_path)))


def test_every_option_can_be_given_on_the_command_line():
    arguments = ["--sim3d.calibration.axes", "opengl", "--sim3d.truth.unit", "mm", "--eyecandies.lighting", "5"]
    config = parse(BenchmarkConfig, arguments, "test")
    assert (config.sim3d.calibration.axes, config.sim3d.truth.unit, config.eyecandies.lighting) == ("opengl", "mm", 5)


# SiM3D: the layout


@pytest.mark.parametrize("setup", ["real2real", "synth2real"])
def test_sim3d_lists_one_training_instance_and_labels_by_name(written, setup):
    benchmark = sim3d(written, setup=setup)
    assert (benchmark.name, benchmark.setup, benchmark.categories) == ("sim3d", setup, (CLASS,))
    (training,) = benchmark.samples(CLASS, "train")
    assert training.name == f"{CLASS}_{'real' if setup == 'real2real' else 'synth'}" and training.label == "good"
    tested = [(sample.name, sample.label) for sample in benchmark.samples(CLASS, "test")]
    labels = ("good", "good", "anomalous", "anomalous")
    names = ("01_good", "02_good", "03_bad", "04_bad")
    assert tested == [(f"{CLASS}_{name}", label) for name, label in zip(names, labels, strict=True)]
    assert benchmark.views(CLASS) == VIEWS


def test_views_are_in_natural_order_and_have_the_camera_of_their_name(written):
    benchmark = sim3d(written)
    sample = benchmark.samples(CLASS, "test")[2]
    assert [view.name for view in sample.views] == [str(number + 1) for number in range(VIEWS)]
    for number, (view, camera) in enumerate(zip(sample.views, ring(VIEWS, *SIZE), strict=True)):
        assert np.allclose(view.camera.camera_to_world, camera.camera_to_world)
        depth = view.read_depth()
        assert np.allclose(depth.depth, ellipsoid_depth(camera), atol=1e-6) and depth.kind == "metric"
        assert np.array_equal(view.read_image(), np.full(SIZE, 10 * number, np.uint8))
        assert off_ellipsoid(back_project(view.camera, depth.depth)[depth.valid]).max() < 1e-4


def test_the_synthetic_instance_has_the_same_views_as_the_real_one(written):
    (training,) = sim3d(written, setup="synth2real").samples(CLASS, "train")
    (real,) = sim3d(written).samples(CLASS, "train")
    for mine, other in zip(training.views, real.views, strict=True):
        assert np.allclose(mine.read_depth().depth, other.read_depth().depth, atol=1e-6)
        assert np.array_equal(mine.read_image(), other.read_image())


def test_listing_reads_no_pixels(tree):
    for path in [*tree.rglob("*.npy"), *tree.rglob("*.exr"), *tree.rglob("*_2.png"), *tree.rglob("gt.npz")]:
        path.write_bytes(b"nothing")
    benchmark = sim3d(tree)
    sample = benchmark.samples(CLASS, "test")[2]
    view = sample.views[0]
    for read, name in ((view.read_depth, "1.npy"), (view.read_image, "1_2.png"), (sample.read_truth, "gt.npz")):
        with pytest.raises(DataError, match=re.escape(f"{sample.name}/") + f".*{name}: .*not a readable") as raised:
            read()
        assert "\n" not in str(raised.value)


def test_the_training_instance_may_be_tested_as_well(written):
    benchmark = sim3d(written, setup="synth2real", include_train_nominal=True)
    names = [(sample.name, sample.label) for sample in benchmark.samples(CLASS, "test")]
    assert len(names) == 5 and names[0] == (f"{CLASS}_real", "good")


def test_samples_can_be_sent_to_another_process(written):
    for sample in pickle.loads(pickle.dumps(sim3d(written).samples(CLASS, "test"))):
        assert sample.views[3].read_depth().valid.any() and sample.read_truth().kind in ("voxels", "points")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda t: instance(t, "02_good").joinpath("depth/7.npy").unlink(), "02_good has 11 views.*it lacks 7"),
        (lambda t: instance(t, "real").joinpath("depth/12.npy").unlink(), "real has 11 views.*it lacks 12"),
        (lambda t: instance(t, "03_bad").joinpath("rgb/4_2.png").unlink(), "03_bad: view 4 has no rgb/4_2.png.*suffix"),
        (lambda t: shutil.rmtree(instance(t, "03_bad") / "rgb"), "03_bad is no instance: no folder rgb"),
        (lambda t: [f.unlink() for f in (instance(t, "03_bad") / "depth").iterdir()], "no .npy or .exr file"),
        (lambda t: shutil.rmtree(instance(t, "real")), "sim3d.setup real2real trains on it"),
        (lambda t: (t / CLASS / "notes").mkdir(), "notes is no instance"),
        (lambda t: (t / CLASS / "calibration.json").unlink(), "no calibration in"),
        (lambda t: [shutil.rmtree(folder) for folder in (t / CLASS).glob("*_0*")], "no instance to test beside"),
    ],
)
def test_a_broken_tree_is_one_clear_line(tree, harm, message):
    harm(tree)
    with pytest.raises(DataError, match=message) as raised:
        sim3d(tree).samples(CLASS, "test")
    assert "\n" not in str(raised.value)


def test_a_missing_view_in_the_middle_is_found_by_its_number(tree):
    (instance(tree, "02_good") / "depth/7.npy").rename(instance(tree, "02_good") / "depth/13.npy")
    (instance(tree, "02_good") / "rgb/7_2.png").rename(instance(tree, "02_good") / "rgb/13_2.png")
    with pytest.raises(DataError, match="it lacks 7"):
        sim3d(tree).samples(CLASS, "test")


# SiM3D: the order of views


def test_an_order_that_pairs_view_10_with_view_2_is_refused(written):
    with pytest.raises(DataError, match="view_order lexicographic pairs view posa_001 with the real view 10; natural"):
        sim3d(written, setup="synth2real", view_order="lexicographic").samples(CLASS, "train")


def test_a_view_map_pairs_views_by_name(tree, tmp_path):
    pairs = {f"posa_{number:03d}": str((number + 3) % VIEWS + 1) for number in range(VIEWS)}
    (tmp_path / "map.yaml").write_text(yaml.safe_dump({CLASS: pairs}))
    (training,) = sim3d(tree, setup="synth2real", view_map=str(tmp_path / "map.yaml")).samples(CLASS, "train")
    assert [pairs[view.name] for view in training.views] == [str(number + 1) for number in range(VIEWS)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("other: {a: b}", "KeyError"),
        ("[1, 2", "map.yaml"),
        (yaml.safe_dump({CLASS: {"posa_000": "1"}}), "does not pair view 10"),
        (yaml.safe_dump({CLASS: {f"x{n}": str(n + 1) for n in range(VIEWS)}}), "does not pair view x0"),
    ],
)
def test_a_wrong_view_map_is_one_clear_line(tree, tmp_path, content, message):
    (tmp_path / "map.yaml").write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        sim3d(tree, setup="synth2real", view_map=str(tmp_path / "map.yaml")).samples(CLASS, "train")
    assert "\n" not in str(raised.value) and "view_map" in str(raised.value)


# SiM3D: depth and images


def npy(tmp_path, values, unit="auto"):
    np.save(tmp_path / "1.npy", values)
    return read_depth(RawFile(str(tmp_path), "1.npy"), unit, "sim3d.depth_unit")


def exr(tmp_path, values):
    write_exr(tmp_path / "1_depth.exr", values)
    return read_depth(RawFile(str(tmp_path), "1_depth.exr"), "auto", "sim3d.synthetic_unit")


def test_infinite_and_zero_depth_is_missing(tmp_path):
    values = np.full((4, 5), 700.0, np.float32)
    values[0, 0], values[1, 1] = np.inf, 0
    depth = npy(tmp_path, values)
    assert np.array_equal(depth.valid, np.isfinite(values) & (values > 0))
    assert np.allclose(depth.depth[depth.valid], 0.7) and not depth.depth[0, 0]


@pytest.mark.parametrize("unit", ["m", "mm"])
def test_metres_and_millimetres_tell_themselves_apart(tmp_path, unit):
    scale = {"m": 1, "mm": 1000}[unit]
    values = np.full((4, 5), 0.69 * scale, np.float32)
    assert np.allclose(npy(tmp_path, values).depth, 0.69) and np.allclose(npy(tmp_path, values, unit).depth, 0.69)
    other = {"m": "mm", "mm": "m"}[unit]
    with pytest.raises(DataError, match=f"1.npy: a median depth of .* is implausible: sim3d.depth_unit {unit} fits"):
        npy(tmp_path, values, other)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([[0.7, np.nan]], "1 values are NaN and 0 negative"),
        ([[0.7, -np.inf]], "0 values are NaN and 1 negative"),
        ([[0.7, -0.7]], "1 negative"),
        ([[np.inf, 0.0]], "all pixels are missing"),
        ([[30.0, 30.0]], "in m nor in mm"),
        (np.ones((3, 4, 2)), "depth must be"),
    ],
)
def test_depth_that_cannot_be_is_refused(tmp_path, values, message):
    with pytest.raises(DataError, match=f"1.npy: .*{message}"):
        npy(tmp_path, np.array(values))


def test_the_background_of_an_exr_file_is_its_largest_value(tmp_path):
    values = np.full((20, 30), 65504.0)
    values[5:15, 5:25] = 0.7
    values[8, 8] = -1
    depth = exr(tmp_path, values)
    expected = np.zeros((20, 30), bool)
    expected[5:15, 5:25] = True
    expected[8, 8] = False
    assert np.array_equal(depth.valid, expected)


def test_the_largest_value_of_a_map_without_background_stays(tmp_path):
    slope = 0.5 + 0.001 * np.arange(2000.0).reshape(40, 50)
    assert exr(tmp_path, slope).valid.all()  # one pixel at the border is no plateau
    floor = np.full((40, 50), 0.6)
    floor[10:30, 10:30] = 0.8  # a recess inside
    assert exr(tmp_path, floor).valid.all()


def test_the_first_channel_of_an_exr_file_counts(tmp_path):
    slope = 0.5 + 0.0001 * np.arange(2000, dtype=np.float32).reshape(40, 50)
    depth = exr(tmp_path, {"R": slope, "G": slope + 3, "B": slope + 5, "A": slope * 0 + 1})
    assert depth.valid.all() and np.array_equal(depth.depth, slope)


def test_images_are_grey(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(colours).save(tmp_path / "1_2.png")
    grey = read_image(RawFile(str(tmp_path), "1_2.png"))
    assert grey.shape == (5, 6) and abs(grey - colours @ np.array([0.299, 0.587, 0.114])).max() < 1
    Image.fromarray(colours[..., 0]).save(tmp_path / "1_2.png")
    assert np.array_equal(read_image(RawFile(str(tmp_path), "1_2.png")), colours[..., 0])


# SiM3D: calibration


FLIP = np.diag([1.0, -1, -1, 1])


def in_millimetres(pose):
    pose = pose.copy()
    pose[:3, 3] *= 1000
    return pose


def all_at_once(pose):
    return in_millimetres(np.linalg.inv(pose @ FLIP))


@pytest.mark.parametrize(
    ("name", "convert", "options"),
    [
        ("pose_ocv.txt", lambda pose: pose, {}),
        ("pose.txt", lambda pose: pose @ FLIP, {}),
        ("pose_ocv.txt", lambda pose: pose @ FLIP, {"axes": "opengl"}),
        ("pose_ocv.txt", np.linalg.inv, {"direction": "world_to_camera"}),
        ("pose.txt", lambda pose: np.linalg.inv(pose @ FLIP), {"direction": "world_to_camera"}),
        ("pose_ocv.txt", in_millimetres, {"unit": "mm"}),
        ("pose.txt", all_at_once, {"direction": "world_to_camera", "unit": "mm"}),
    ],
)
def test_every_convention_gives_the_same_cameras(tmp_path, name, convert, options):
    cameras = ring(3, *SIZE, distortion=LENS)
    write_xml(tmp_path, cameras, name, convert)
    found = read_cameras([tmp_path / "none", tmp_path], CalibrationOptions(**options))
    for (stem, camera), expected in zip(found, cameras, strict=True):
        assert stem is None and (camera.height, camera.width) == SIZE
        assert np.allclose(camera.camera_to_world, expected.camera_to_world, atol=1e-12)
        assert np.array_equal(camera.matrix, expected.matrix) and camera.distortion == LENS


def test_json_gives_the_same_cameras_with_names(tmp_path):
    cameras = ring(3, *SIZE, distortion=LENS)
    (tmp_path / "calibration.json").write_text(calibration(cameras, "abc"))
    found = read_cameras([tmp_path], CalibrationOptions(distortion=False))
    assert [name for name, _ in found] == ["a", "b", "c"] and not found[0][1].distortion
    assert np.array_equal(found[2][1].camera_to_world, cameras[2].camera_to_world)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a calibration"),
        ("[]", "not a calibration"),
        ('{"cameras": []}', "0 cameras"),
        (calibration(ring(2), "aa"), "2 cameras, and each view needs one"),
        (calibration(ring(2), "ab").replace('"matrix"', '"matrx"'), "KeyError 'matrix'"),
        (calibration(ring(2), "ab").replace("0.0, 0.0, 0.0, 1.0]", "0.0, 0.0, 1.0]"), "not a calibration"),
        (calibration(ring(2), "ab").replace("0.0, 0.0, 0.0, 1.0]", "0.0, 0.0, 0.0, NaN]"), "finite"),
    ],
)
def test_an_unreadable_json_calibration_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(DataError, match=f"calibration.json: .*{message}") as raised:
        read_cameras([tmp_path], CalibrationOptions())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("calib.xml", lambda text: text[:-30], "calib.xml: not a calibration of OpenCV"),
        ("calib.xml", lambda text: text.replace("mtxL", "mtxR"), "calib.xml: .*no mtxL"),
        ("calib.xml", lambda text: text.replace("<wL>40", "<wL>4 0"), "calib.xml: .*2 numbers instead of 1"),
        ("calib.xml", lambda text: '<!DOCTYPE a [<!ENTITY b "c">]>' + text[22:], "calib.xml: declares"),
        ("pose_ocv.txt", lambda text: text.replace("1.0\n", "\n", 1), "pose_ocv.txt: line 1: 15 numbers instead of 16"),
        ("pose_ocv.txt", lambda text: text.replace("1.0\n", "x\n"), "pose_ocv.txt: line 1: could not convert"),
        ("pose_ocv.txt", lambda text: text.replace("1.0\n", "nan\n", 1), "pose_ocv.txt: line 1: .*finite"),
    ],
)
def test_an_unreadable_xml_calibration_is_one_clear_line(tmp_path, file, change, message):
    write_xml(tmp_path, ring(2, *SIZE, distortion=LENS))
    (tmp_path / file).write_text(change((tmp_path / file).read_text()))
    with pytest.raises(DataError, match=message) as raised:
        read_cameras([tmp_path], CalibrationOptions())
    assert "\n" not in str(raised.value)


def test_poses_of_two_conventions_side_by_side_are_refused(tmp_path):
    write_xml(tmp_path, ring(2, *SIZE, distortion=LENS))
    (tmp_path / "pose.txt").write_text("")
    with pytest.raises(DataError, match="needs one of pose_ocv.txt, pose.txt"):
        read_cameras([tmp_path], CalibrationOptions())


def test_as_many_poses_as_views_are_needed(tree):
    (tree / CLASS / "calibration.json").unlink()
    write_xml(tree / CLASS, ring(VIEWS - 1, *SIZE, distortion=LENS))
    with pytest.raises(DataError, match="has 12 views, its calibration 11 cameras"):
        sim3d(tree).samples(CLASS, "train")


# SiM3D: settings against the data


@pytest.mark.parametrize("setup", ["real2real", "synth2real"])
def test_right_settings_pass_the_check(written, setup):
    found = sim3d(written, setup=setup).check_category(CLASS)
    assert 0 < found["overlap_test"] < 0.03 and 0 < found["overlap_train"] < 0.03
    assert found["truth_off_surface"] < 0.02


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": "opengl"}, "with sim3d.calibration.axes auto"),
        ({"direction": "world_to_camera"}, "with sim3d.calibration.direction camera_to_world"),
        ({"unit": "mm"}, "with sim3d.calibration.unit m, which is probably right"),
        ({"axes": "opengl", "direction": "world_to_camera"}, "axes auto and calibration.direction camera_to_world"),
    ],
)
def test_the_wrong_convention_is_named(written, options, message):
    with pytest.raises(DataError, match=f"back-projected views lie .*{message}"):
        sim3d(written, calibration=CalibrationOptions(**options)).check_category(CLASS)


def test_poses_in_the_order_of_characters_are_found_out(tree):
    (tree / CLASS / "calibration.json").unlink()
    write_xml(tree / CLASS, ring(VIEWS, *SIZE, distortion=(0.0,) * 5))
    with pytest.raises(DataError, match="with sim3d.view_order natural, which is probably right"):
        sim3d(tree, view_order="lexicographic").check_category(CLASS)


def test_poses_that_no_setting_brings_together_are_refused(tree):
    random = np.random.default_rng(0)
    poses = np.tile(np.eye(4), (VIEWS, 1, 1))
    poses[:, :3, :3] = [np.linalg.qr(random.standard_normal((3, 3)))[0] for _ in range(VIEWS)]
    poses[:, :3, 0] *= np.linalg.det(poses)[:, None]
    poses[:, :3, 3] = random.uniform(-1, 1, (VIEWS, 3))
    cameras = [replace(camera, camera_to_world=pose) for camera, pose in zip(ring(VIEWS, *SIZE), poses, strict=True)]
    text = calibration(cameras, [str(number + 1) for number in range(VIEWS)])
    (tree / CLASS / "calibration.json").write_text(text)
    with pytest.raises(DataError, match="these poses are not those of these views"):
        sim3d(tree).check_category(CLASS)


def test_ground_truth_in_another_unit_is_found_out(written):
    with pytest.raises(DataError, match="off its surface: sim3d.truth.unit m gives 0.0"):
        sim3d(written, truth=TruthOptions(unit="mm")).check_category(CLASS)


def test_a_word_that_marks_nothing_is_said_and_one_that_marks_everything_refused(written, caplog):
    sim3d(written, anomalous="defect").check_category(CLASS)
    assert re.search("all 4 tested instances are good: sim3d.anomalous 'defect' marks the names", caplog.text)
    with pytest.raises(DataError, match="all 4 tested instances are anomalous: sim3d.anomalous '0'"):
        sim3d(written, anomalous="0").check_category(CLASS)


def test_an_image_of_another_size_than_its_depth_is_found_out(tree):
    Image.new("L", (44, 33)).save(instance(tree, "01_good") / "rgb/1_2.png")
    with pytest.raises(DataError, match="view 1: the image is 33x44, its depth 30x40"):
        sim3d(tree).check_category(CLASS)


# SiM3D: ground truth


def ply(points, labels, encoding, name="label"):
    order = "<" if "little" in encoding else ">"
    kinds = [("x", "f8"), ("y", "f8"), ("z", "f8"), (name, "i4")]
    header = f"ply\nformat {encoding} 1.0\ncomment a\nelement vertex {len(points)}\n"
    header += "property double x\nproperty double y\nproperty double z\n" + f"property int {name}\n"
    header += "element face 0\nproperty list uchar int vertex_indices\nend_header\n"
    if encoding == "ascii":
        lines = (f"{x!r} {y!r} {z!r} {label}\n" for (x, y, z), label in zip(points.tolist(), labels, strict=True))
        return header.encode() + "".join(lines).encode()
    table = np.empty(len(points), [(name, order + kind) for name, kind in kinds])
    for axis, column in zip("xyz", points.T, strict=True):
        table[axis] = column
    table[name] = labels
    return header.encode() + table.tobytes()


def truth_of(folder, label="anomalous", stems=("1", "2"), **options):
    return read_truth(folder, label, stems, TruthOptions(**options))


def test_every_form_of_a_volume_gives_the_same_voxels(tmp_path):
    index, origin, shape = cap_voxels()
    volume = np.zeros(shape, np.uint8)
    volume[tuple(index.T)] = 1
    forms = {
        "sparse": {"shape": np.array(shape), "index": index[::-1]},
        "bool": {"volume": volume.astype(bool)},
        "uint8": {"volume": volume * 255},
    }
    for name, arrays in forms.items():
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "gt.npz", origin=origin, voxel_size=np.array(0.005), **arrays)
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "gt.npy", volume)
    (tmp_path / "npy" / "gt.json").write_text(json.dumps({"origin": origin.tolist(), "voxel_size": 0.005}))
    for name in (*forms, "npy"):
        truth = truth_of(tmp_path / name)
        assert truth.kind == "voxels" and truth.voxels.shape == shape and truth.component is None
        assert np.array_equal(truth.voxels.index, index) and truth.voxels.size == 0.005
    assert truth_of(tmp_path / "npy", unit="mm").voxels.origin == pytest.approx(origin / 1000)


def test_components_follow_their_voxels(tmp_path):
    index = np.array([[3, 0, 0], [1, 2, 3], [1, 0, 9]])
    arrays = {"origin": np.zeros(3), "voxel_size": 1.0}
    named = {"component": np.array([3, 1, 2]), "kind": ["dent", "bump", "stain"]}
    np.savez(tmp_path / "gt.npz", shape=(9, 9, 10), index=index, **named, **arrays)
    assert truth_of(tmp_path).component.tolist() == [2, 1, 3]
    volume = np.zeros((9, 9, 10), np.int32)
    volume[tuple(index.T)] = [30, 10, 20]
    np.savez(tmp_path / "gt.npz", volume=volume, **arrays)
    assert truth_of(tmp_path).component.tolist() == [2, 1, 3]


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("name", ["label", "scalar_label"])
def test_labelled_points_are_read(tmp_path, encoding, name):
    points = np.random.default_rng(0).uniform(-1, 1, (7, 3))
    (tmp_path / "gt.ply").write_bytes(ply(points, [0, 1, 0, 2, 2, 0, 1], encoding, name))
    truth = truth_of(tmp_path)
    assert truth.kind == "points" and np.array_equal(truth.points, points[[1, 3, 4, 6]])
    assert truth.component.tolist() == [1, 2, 2, 1]
    assert np.array_equal(truth_of(tmp_path, unit="mm").points, points[[1, 3, 4, 6]] * 0.001)
    with pytest.raises(DataError, match="gt.ply: properties x, y, z, .*expected x, y, z and defect"):
        read_truth(tmp_path, "anomalous", (), TruthOptions(label="defect"))


@pytest.mark.parametrize("encoding", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("end", [b"\r\n", b"\r"])
def test_lines_may_end_as_on_other_systems(tmp_path, encoding, end):
    points = np.random.default_rng(0).uniform(-1, 1, (7, 3))
    content = ply(points, [0, 1, 0, 2, 2, 0, 1], encoding, "label")
    header, mark, body = content.partition(b"end_header\n")
    body = body.replace(b"\n", end) if encoding == "ascii" else body
    (tmp_path / "gt.ply").write_bytes((header + mark).replace(b"\n", end) + body)
    truth = truth_of(tmp_path)
    assert np.array_equal(truth.points, points[[1, 3, 4, 6]]) and truth.component.tolist() == [1, 2, 2, 1]


def test_the_case_with_other_line_ends(tmp_path):
    case = Path(__file__).resolve().parents[2] / "shared" / "cases" / "crlf.ply"
    if not case.is_file():
        pytest.skip("shared/cases/crlf.ply is not beside this checkout")
    (tmp_path / "gt.ply").write_bytes(case.read_bytes())
    assert truth_of(tmp_path).points == pytest.approx(np.array([[0.01, 0, 0.1], [0, 0.01, 0.1]]), abs=1e-8)


def coloured_ply(points, colours, end="\n"):
    """A mesh with vertex colours and a face, binary, as in what was shown of SiM3D before its release."""
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [f"property float {axis}" for axis in "xyz"] + [
        f"property uchar {name}" for name in ("red", "green", "blue", "alpha")
    ]
    lines += ["element face 1", "property list uchar int vertex_indices", "end_header", ""]
    table = np.zeros(len(points), [(axis, "<f4") for axis in "xyz"] + [(name, "u1") for name in "rgba"])
    for axis, column in zip("xyz", points.T, strict=True):
        table[axis] = column
    for name, column in zip("rgb", colours.T, strict=True):
        table[name] = column
    table["a"] = 255
    return end.join(lines).encode() + table.tobytes() + struct.pack("<Biii", 3, 0, 1, 2)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_vertex_colours_mark_what_is_anomalous(tmp_path, end):
    points = np.random.default_rng(0).uniform(-1, 1, (9, 3)).astype(np.float32)
    colours = np.zeros((9, 3), np.uint8)
    colours[2], colours[5], colours[6], colours[7] = (255, 0, 0), (0, 2, 0), (1, 1, 1), (9, 9, 9)
    (tmp_path / "gt.ply").write_bytes(coloured_ply(points, colours, end))
    for label in ("label", "colour"):
        truth = read_truth(tmp_path, "anomalous", (), TruthOptions(label=label))
        assert truth.kind == "points" and np.array_equal(truth.points, points[[2, 5, 7]]) and truth.component is None
    with pytest.raises(DataError, match="expected x, y, z and defect"):
        read_truth(tmp_path, "anomalous", (), TruthOptions(label="defect"))
    (tmp_path / "gt.ply").write_bytes(coloured_ply(points, colours + 100, end))
    with pytest.raises(DataError, match="gt.ply: 100% of its vertices have a colour, so it marks no defect"):
        truth_of(tmp_path)
    (tmp_path / "gt.ply").write_bytes(coloured_ply(points, 0 * colours, end))
    assert len(truth_of(tmp_path, "good").points) == 0


def test_masks_are_paired_by_stem_and_absent_ones_are_empty(tmp_path):
    (tmp_path / "mask").mkdir()
    mask = np.zeros(SIZE, np.uint8)
    mask[3:5, 7:9] = 7
    Image.fromarray(mask).save(tmp_path / "mask" / "2.png")
    truth = truth_of(tmp_path)
    assert truth.kind == "masks" and not truth.masks[0].any() and np.array_equal(truth.masks[1], mask > 0)
    Image.fromarray(mask).save(tmp_path / "mask" / "9.png")
    with pytest.raises(DataError, match="9.png: no view has this name"):
        truth_of(tmp_path)


def test_a_good_instance_without_a_file_has_empty_truth(tmp_path):
    assert len(truth_of(tmp_path, "good").points) == 0
    assert truth_of(tmp_path) is None
    with pytest.raises(DataError, match=r"no gt.npz or gt.npy \(truth.kind voxels\)"):
        truth_of(tmp_path, kind="voxels")


def test_truth_that_contradicts_the_label_is_refused(tmp_path):
    arrays = {"origin": np.zeros(3), "voxel_size": 1.0, "shape": (3, 3, 3)}
    np.savez(tmp_path / "gt.npz", index=np.zeros((1, 3), int), **arrays)
    with pytest.raises(DataError, match="gt.npz: holds 1 anomalous voxels, but the instance is labelled good"):
        truth_of(tmp_path, "good")
    np.savez(tmp_path / "gt.npz", index=np.zeros((0, 3), int), **arrays)
    assert truth_of(tmp_path, "good").voxels.shape == (3, 3, 3)
    with pytest.raises(DataError, match="holds 0 anomalous voxels, but the instance is labelled anomalous"):
        truth_of(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": None}, "expected origin, voxel_size"),
        ({"index": None}, "expected origin, voxel_size and volume, or shape and index"),
        ({"voxel_size": np.ones(3)}, "voxels are cubes"),
        ({"index": np.array([[0, 0, 5]])}, "outside the grid"),
        ({"index": np.zeros((2, 3), int)}, "unique"),
        ({"index": np.zeros((2, 3))}, "integers"),
        ({"component": np.zeros(1, int)}, "integers from 1"),
        ({"volume": np.ones((2, 2, 2))}, "bool or integers"),
        ({"index": np.array([{}], object)}, "allow_pickle"),
    ],
)
def test_a_wrong_volume_is_one_clear_line(tmp_path, change, message):
    arrays = {"origin": np.zeros(3), "voxel_size": 1.0, "shape": (3, 3, 3), "index": np.zeros((1, 3), int)} | change
    np.savez(tmp_path / "gt.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(DataError, match=f"gt.npz: .*{message}") as raised:
        truth_of(tmp_path)
    assert "\n" not in str(raised.value)


CUT_SHORT = st.builds(lambda end: ply(np.ones((2, 3)), [0, 1], "ascii")[:end], st.integers(0, 300))


@QUICK
@given(st.binary(max_size=400) | CUT_SHORT)
def test_arbitrary_bytes_are_no_reason_to_crash(content):
    try:
        assert decode_ply(content).dtype.names
    except DataError as error:
        assert "\n" not in str(error)


# Single-view benchmarks


def write_mvtec(folder, stem, gt=None, rgb=True, size=SIZE):
    for name in ("xyz", "rgb", "gt"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    points = np.random.default_rng(0).uniform(0.5, 0.7, (*size, 3)).astype(np.float32)
    points[5:8, 5:8] = 0
    tifffile.imwrite(folder / "xyz" / f"{stem}.tiff", points, photometric="rgb")
    if rgb:
        Image.new("RGB", size[::-1], (9, 8, 7)).save(folder / "rgb" / f"{stem}.png")
    if gt is not None:
        mask = np.zeros(size, np.uint8)
        mask[2:4, 3:7] = gt
        Image.fromarray(mask).save(folder / "gt" / f"{stem}.png")
    return points


def test_mvtec3d_is_a_benchmark_of_single_views(tmp_path):
    points = write_mvtec(tmp_path / "bagel/train/good", "000")
    write_mvtec(tmp_path / "bagel/validation/good", "000")
    write_mvtec(tmp_path / "bagel/test/good", "000")
    write_mvtec(tmp_path / "bagel/test/good", "001", gt=0)
    write_mvtec(tmp_path / "bagel/test/hole", "000", gt=253)
    for root in (tmp_path, tmp_path / "bagel"):
        benchmark = open_benchmark(BenchmarkConfig("mvtec3d", str(root)))
        assert (benchmark.categories, benchmark.setup, benchmark.views("bagel")) == (("bagel",), "", 1)
        assert len(benchmark.samples("bagel", "train")) == len(benchmark.samples("bagel", "validation")) == 1
        tested = pickle.loads(pickle.dumps(benchmark.samples("bagel", "test")))
        labels = [(sample.name, sample.label, sample.defect) for sample in tested]
        assert labels == [("good-000", "good", None), ("good-001", "good", None), ("hole-000", "anomalous", "hole")]
        (view,) = tested[2].views
        assert view.camera is None and np.array_equal(view.read_depth().depth, points[..., 2])
        assert np.array_equal(view.read_image(), np.broadcast_to(np.uint8([9, 8, 7]), (*SIZE, 3)))
        (mask,) = tested[2].read_truth().masks
        assert mask[2:4, 3:7].all() and mask.sum() == 8
        assert [sample.read_truth().masks[0].sum() for sample in tested[:2]] == [0, 0]


def test_mvtec3d_refuses_a_mask_that_contradicts_its_folder(tmp_path):
    write_mvtec(tmp_path / "bagel/train/good", "000")
    write_mvtec(tmp_path / "bagel/test/hole", "000", gt=0)
    write_mvtec(tmp_path / "bagel/test/hole", "001")
    one, other = open_benchmark(BenchmarkConfig("mvtec3d", str(tmp_path))).samples("bagel", "test")
    with pytest.raises(DataError, match="000.png: 0 anomalous pixels, but the sample is labelled anomalous"):
        one.read_truth()
    assert other.read_truth() is None


def test_mvtec3d_refuses_a_sample_without_its_image(tmp_path):
    write_mvtec(tmp_path / "bagel/train/good", "000", rgb=False)
    with pytest.raises(DataError, match="000.tiff: no rgb/000.png"):
        open_benchmark(BenchmarkConfig("mvtec3d", str(tmp_path)))


def write_candy(data, index, anomalous=None):
    data.mkdir(parents=True, exist_ok=True)
    codes = np.random.default_rng(1).integers(0, 65536, SIZE).astype(np.uint16)
    Image.fromarray(codes).save(data / f"{index}_depth.png")
    (data / f"{index}_info_depth.yaml").write_text(yaml.safe_dump({"normalization": {"min": 0.4, "max": 0.9}}))
    for lighting in (4, 5):
        Image.new("RGB", SIZE[::-1], (lighting,) * 3).save(data / f"{index}_image_{lighting}.png")
    if anomalous is not None:
        (data / f"{index}_metadata.yaml").write_text(yaml.safe_dump({"anomalous": anomalous}))
        mask = np.zeros(SIZE, np.uint8)
        mask[2:4, 3:7] = 255 * anomalous
        Image.fromarray(mask).save(data / f"{index}_mask.png")
    return codes


def test_eyecandies_is_a_benchmark_of_single_views(tmp_path):
    codes = write_candy(tmp_path / "Confetto/train/data", "000")
    write_candy(tmp_path / "Confetto/val/data", "000")
    write_candy(tmp_path / "Confetto/test_public/data", "00", 0)
    write_candy(tmp_path / "Confetto/test_public/data", "01", 1)
    write_candy(tmp_path / "Confetto/test_private/data", "000")
    for lighting in (4, 5):
        config = BenchmarkConfig("eyecandies", str(tmp_path), eyecandies=EyecandiesOptions(lighting))
        benchmark = open_benchmark(config)
        tested = pickle.loads(pickle.dumps(benchmark.samples("Confetto", "test")))
        assert [(sample.name, sample.label) for sample in tested] == [("00", "good"), ("01", "anomalous")]
        assert len(benchmark.samples("Confetto", "validation")) == 1
        (training,) = benchmark.samples("Confetto", "train")
        assert training.views[0].read_image().max() == lighting and training.views[0].camera is None
        assert np.allclose(training.views[0].read_depth().depth, codes / 65535 * 0.5 + 0.4, atol=1e-6)
        assert [sample.read_truth().masks[0].sum() for sample in (*tested, training)] == [0, 8, 0]
    with pytest.raises(DataError, match="no 00_image_3.png beside it .eyecandies.lighting 3"):
        open_benchmark(BenchmarkConfig("eyecandies", str(tmp_path), eyecandies=EyecandiesOptions(3)))


# The synthetic benchmark


@pytest.mark.parametrize("place", [0, 1])
def test_what_synth_writes_is_what_the_reader_takes_for_sim3d(tmp_path, place):
    """Both calibrations, both setups, and ground truth on the surface that the views show."""
    category = ["angle_bracket", "spur_gear"][place]
    options = {"test_per_category": 2, "categories": [category], "workers": 1}
    options["sim3d"] = SynthOptions(views=6, height=72, voxel=0.01)
    synth(SynthConfig("sim3d", str(tmp_path / "raw"), size=96, **options))
    assert (tmp_path / "raw" / category / "calib.xml").exists() == bool(place)
    for setup in ("real2real", "synth2real"):
        benchmark = sim3d(tmp_path / "raw", setup=setup)
        found = benchmark.check_category(category)
        assert found["overlap_test"] < 0.03 and found["overlap_train"] < 0.03 and found["truth_off_surface"] < 0.03
        bad, good = benchmark.samples(category, "test")
        assert len(bad.read_truth().voxels.index) and not len(good.read_truth().voxels.index)
        assert bad.views[0].read_image().shape == bad.views[0].read_depth().depth.shape == (72, 96)
        masks = (
            sim3d(tmp_path / "raw", truth=TruthOptions(kind="masks")).samples(category, "test")[0].read_truth().masks
        )
        assert len(masks) == 6 and sum(mask.sum() for mask in masks)
