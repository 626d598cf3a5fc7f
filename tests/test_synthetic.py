"""Synthetic raw trees: layouts as published, determinism, ground truth, and parts worth learning from."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import tifffile
import trimesh
import yaml
from PIL import Image

from data_prep.synthetic import SynthConfig, synth
from data_prep.synthetic.defects import DEFECTS
from data_prep.synthetic.parts import CATEGORIES, build, triangles
from data_prep.synthetic.plan import Sample, generator
from data_prep.synthetic.render import Camera, Scene, draw_pose, sense, shade
from data_prep.synthetic.shots import Setup, shoot
from dino_depth.errors import ConfigError, DataError

CAMERA = Camera(96, 5.5 * 96, 47.5, 47.5)
SETUP = Setup(distances=(0.3, 0.7), tilts=(0, 40))


def make(folder, layout, **options):
    options = {"size": 64, "per_category": 2, "test_per_category": 16, "workers": 1} | options
    synth(SynthConfig(layout=layout, out=str(folder), **options))
    return folder


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def mvtec3d(tmp_path_factory):
    return make(tmp_path_factory.mktemp("mvtec3d"), "mvtec3d", categories=["hex_nut", "circlip"])


@pytest.fixture(scope="module")
def eyecandies(tmp_path_factory):
    return make(tmp_path_factory.mktemp("eyecandies"), "eyecandies", categories=["heat_sink", "spur_gear"])


def test_every_category_is_watertight_rests_on_the_table_and_has_random_proportions():
    assert len(CATEGORIES) >= 16
    for category in CATEGORIES:
        sizes = []
        for seed in range(4):
            part = build(category, np.random.default_rng(seed))
            vertices, faces = triangles(part)
            mesh = trimesh.Trimesh(vertices, faces, process=False)
            assert mesh.is_watertight and mesh.volume > 0, category
            assert vertices[:, 2].min() == pytest.approx(0, abs=1e-5)
            assert np.ptp(vertices, axis=0).max() == pytest.approx(1, abs=1e-5)
            sizes.append(mesh.volume)
        assert np.std(sizes) / np.mean(sizes) > 0.02, category


def test_categories_look_different_from_above():
    camera, maps = Camera(48, 240, 23.5, 23.5), {}
    for category in CATEGORIES:
        heights = []
        for seed in range(6):
            vertices, faces = triangles(build(category, np.random.default_rng(seed)))
            points = vertices * (1, -1, -1) + (0, 0, 5.5)
            seen = Scene(points, faces, [(np.array([0.0, 0.0, -1.0]), -5.5)]).render(camera)
            heights.append(np.where(seen.depth > 0, 5.5 - seen.depth, 0))
        maps[category] = np.mean(heights, axis=0)
    names = list(maps)
    distances = {
        (first, second): np.abs(maps[first] - maps[second]).mean()
        for first in names
        for second in names
        if first < second
    }
    closest = min(distances, key=distances.get)
    assert distances[closest] > 0.015, closest  # shares of the longest side


def test_rays_agree_with_trimesh():
    """The depth of un-normalised rays is the z of the hit that trimesh's own ray tracer finds."""
    vertices, faces = triangles(build("pipe_flange", generator("rays")))
    pose = draw_pose(vertices, CAMERA, generator("rays"), SETUP.distances, SETUP.tilts)
    mesh = trimesh.Trimesh(pose.to_camera(vertices), faces, process=False)
    seen = Scene(pose.to_camera(vertices), faces, []).render(CAMERA)
    directions = CAMERA.rays().reshape(-1, 3)
    points, rays, hit = mesh.ray.intersects_location(np.zeros_like(directions), directions, multiple_hits=False)
    depth = np.zeros(len(directions))
    depth[rays] = points[:, 2]
    both = (depth > 0) & seen.part.ravel()
    assert (both == seen.part.ravel()).mean() > 0.999 and (both == (depth > 0)).mean() > 0.999
    assert np.abs(seen.depth.ravel()[both] - depth[both]).max() < 1e-4
    normal = np.zeros((len(directions), 3))
    normal[rays] = mesh.face_normals[hit]
    agree = np.abs((seen.normal.reshape(-1, 3) * normal).sum(-1))[both]
    assert (agree > 0.999).mean() > 0.99
    assert (np.einsum("hwi,hwi->hw", seen.normal, CAMERA.rays())[seen.part] < 0).all()


def test_shading_agrees_with_its_definition():
    shot = shoot((0,), Sample("star_knob", "train", "good", 0), None, CAMERA, SETUP, 1.0, generator("light"))
    light, albedo = np.array([0.2, -0.1, 0.05]), np.full((96, 96), 0.7, np.float32)
    image = shade(shot.seen, CAMERA, albedo, 0.2, [(light, 0.8)])[0]
    for row, column in [(48, 48), (10, 20), (60, 40)]:
        ray = CAMERA.rays()[row, column].astype(float)
        normal = shot.seen.normal[row, column].astype(float)
        towards = light - ray * shot.seen.depth[row, column]
        towards /= np.linalg.norm(towards)
        half = towards - ray / np.linalg.norm(ray)
        half /= np.linalg.norm(half)
        cosine = max(towards @ normal, 0)
        expected = 0.8 * (0.7 * cosine + 0.2 * max(half @ normal, 0) ** 32 * (cosine > 0))
        assert image[row, column] == pytest.approx(expected, abs=1e-4)


def test_shadows_agree_with_trimesh():
    """Pixels outside the window that is searched for shadows are lit as well."""
    sample, light = Sample("pipe_flange", "train", "good", 0), np.array([0.12, -0.06, 0.0])
    shot = shoot((0,), sample, None, CAMERA, SETUP, 1.0, generator("shadow"))
    part = build("pipe_flange", generator(0, "train", "good", 0, "pipe_flange"))
    vertices, faces = triangles(part)
    mesh = trimesh.Trimesh(shot.pose.to_camera(vertices), faces, process=False)
    points = (CAMERA.rays() * shot.seen.depth[..., None] + 2e-4 * shot.seen.normal).reshape(-1, 3).astype(float)
    hidden = mesh.ray.intersects_any(points, light - points).reshape(96, 96)
    lit = shot.scene.lit(shot.seen, CAMERA, light)
    assert hidden.mean() > 0.05 and (hidden & ~shot.seen.part).any()
    assert (lit == ~hidden).mean() > 0.999


def test_parts_fill_the_frame():
    for category in CATEGORIES:
        for index in range(2):
            sample = Sample(category, "train", "good", index)
            part = shoot((0,), sample, None, CAMERA, SETUP, 1.0, generator("fill", category, index)).seen.part
            rows, columns = np.nonzero(part)
            assert 0.55 < max(np.ptp(rows), np.ptp(columns)) / 96 < 0.92, category
            border = part[0].any() or part[-1].any() or part[:, 0].any() or part[:, -1].any()
            assert not border, category


@pytest.mark.parametrize("defect", [*sorted(DEFECTS), "paint"])
def test_every_defect_is_visible_and_its_mask_is_where_the_render_changed(defect):
    for index, category in enumerate(list(CATEGORIES)[::3]):
        sample, rng = Sample(category, "test", defect, index), generator("defect", category)
        shot = shoot((0,), sample, defect, CAMERA, SETUP, 1.0, rng)
        assert shot.mask.sum() >= 8
        sound = shoot((0,), sample, None, CAMERA, SETUP, 1.0, generator("defect", category))
        same = ~shot.mask
        assert np.abs(shot.seen.depth - sound.seen.depth)[same].max() <= 0.0041 * shot.pose.scale
        if defect != "paint":
            assert (shot.seen.depth != sound.seen.depth)[shot.mask].mean() > 0.9


def test_even_the_smallest_map_shows_a_scratch_on_a_thin_wire():
    camera = Camera(32, 711.11 / 512 * 32, 16, 16)
    for index in range(8):
        sample, rng = Sample("coil_spring", "test", "scratch", index), generator("small", index)
        assert shoot((0,), sample, "scratch", camera, Setup((0.08, 0.18), (20, 50)), 1.0, rng).mask.sum() >= 8


def test_a_defect_that_cannot_be_seen_is_an_error(monkeypatch):
    monkeypatch.setattr("data_prep.synthetic.shots._changed", lambda sound, seen, pose: np.zeros_like(sound.part))
    with pytest.raises(DataError, match="no visible dent found on a hex_nut"):
        shoot((0,), Sample("hex_nut", "test", "dent", 0), "dent", CAMERA, SETUP, 1.0, generator(0))


def test_sensor_noise_grows_with_distance_and_edges_are_missing():
    shot = shoot((0,), Sample("heat_sink", "train", "good", 0), None, CAMERA, SETUP, 1.0, generator("sensor"))
    lit = np.ones((96, 96), bool)
    measured = sense(shot.seen, CAMERA, lit, generator("noise"))
    valid = measured > 0
    assert 0.5 < valid.mean() < 1
    error = (measured - shot.seen.depth)[valid & ~shot.seen.part]
    assert 1e-5 < np.std(error) < 1e-3
    far = type(shot.seen)(2 * shot.seen.depth, shot.seen.normal, shot.seen.part)
    doubled = sense(far, CAMERA, lit, generator("noise"))
    both = valid & (doubled > 0) & ~shot.seen.part
    ratio = np.std((doubled - far.depth)[both]) / np.std((measured - shot.seen.depth)[both])
    assert ratio == pytest.approx(4, rel=0.05)
    jump = np.abs(np.diff(shot.seen.depth, axis=1)) > 0.02 * shot.seen.depth[:, 1:]
    assert (measured[:, 1:][jump] == 0).mean() > 0.5 > (measured == 0).mean()
    assert (sense(shot.seen, CAMERA, ~lit, generator("noise")) == 0).all()


def test_mvtec3d_tree(mvtec3d):
    assert sorted(path.name for path in mvtec3d.iterdir()) == ["SYNTHETIC.json", "circlip", "hex_nut"]
    root = mvtec3d / "hex_nut"
    assert sorted(path.name for path in (root / "train" / "good" / "xyz").iterdir()) == ["000.tiff", "001.tiff"]
    assert sorted(path.name for path in (root / "validation" / "good" / "rgb").iterdir()) == ["000.png"]
    ids = json.loads((root / "class_ids.json").read_text())
    assert ids == {
        "255": "bent",
        "254": "bump",
        "253": "cut",
        "252": "dent",
        "251": "hole",
        "250": "scratch",
        "0": "good",
    }
    number = {kind: int(value) for value, kind in ids.items()}
    assert {path.name for path in (root / "test").iterdir()} == set(number)
    assert sum(len(list((root / "test" / kind / "gt").iterdir())) for kind in number) == 16
    assert len(list((root / "test" / "good" / "gt").iterdir())) == 8
    for kind, value in number.items():
        for path in sorted((root / "test" / kind / "gt").iterdir()):
            truth = Image.open(path)
            assert truth.mode == "L"
            assert set(np.unique(truth)) == ({0} if kind == "good" else {0, value})
            assert (root / "test" / kind / "xyz" / f"{path.stem}.tiff").exists()
            assert Image.open(root / "test" / kind / "rgb" / path.name).mode == "RGB"


def test_mvtec3d_xyz_projects_back_to_its_pixel(mvtec3d):
    for category in ("hex_nut", "circlip"):
        camera = json.loads((mvtec3d / category / "calibration" / "camera_parameters.json").read_text())
        assert camera["camera_type"] == "area_scan_division" and camera["kappa"] == 0
        assert camera["image_width"] == camera["image_height"] == 64
        for path in sorted((mvtec3d / category / "train" / "good" / "xyz").iterdir()):
            xyz = tifffile.imread(path)
            assert xyz.shape == (64, 64, 3) and xyz.dtype == np.float32
            valid = xyz[..., 2] > 0
            assert 0.4 < valid.mean() < 1 and (xyz[~valid] == 0).all()
            assert 0.2 < xyz[valid][:, 2].min() and xyz[valid][:, 2].max() < 1.2
            rows, columns = np.nonzero(valid)
            x, y, z = xyz[valid].astype(float).T
            assert np.abs(x / z * camera["focus"] / camera["sx"] + camera["cx"] - columns).max() < 0.01
            assert np.abs(y / z * camera["focus"] / camera["sy"] + camera["cy"] - rows).max() < 0.01


def test_mvtec3d_without_a_plane_has_no_background(tmp_path):
    root = make(tmp_path / "raw", "mvtec3d", plane=0.0, categories=["ball_bearing"], test_per_category=0)
    xyz = tifffile.imread(root / "ball_bearing" / "train" / "good" / "xyz" / "000.tiff")
    assert (xyz[[0, 0, -1, -1], [0, -1, 0, -1]] == 0).all() and (xyz[..., 2] > 0).mean() < 0.7


def test_eyecandies_tree(eyecandies):
    lights = {f"image_{place}.png" for place in range(6)}
    public = lights | {"depth.png", "info_depth.yaml", "normals.png", "pose.txt"}
    masks = {"mask.png", "bumps_mask.png", "dents_mask.png", "colors_mask.png", "normals_mask.png"}
    everything = public | masks | {"obj_params.yaml", "metadata.yaml"}
    assert sorted(path.name for path in eyecandies.iterdir()) == ["HeatSink", "SYNTHETIC.json", "SpurGear"]
    widths = {"train": 3, "val": 2, "test_public": 2, "test_private": 3}
    for split, count in {"train": 2, "val": 1, "test_public": 8, "test_private": 8}.items():
        items = {}
        for path in (eyecandies / "SpurGear" / split / "data").iterdir():
            index, item = path.name.split("_", 1)
            items.setdefault(index, set()).add(item)
        assert sorted(items) == [f"{index:0{widths[split]}d}" for index in range(count)]
        for found in items.values():
            assert found == (public if split == "test_private" else everything)


def test_eyecandies_depth_normals_and_pose_agree(eyecandies):
    folder = eyecandies / "HeatSink" / "train" / "data"
    for path in sorted(folder.glob("*_depth.png")):
        index = path.name.split("_")[0]
        codes = np.array(Image.open(path))
        assert codes.dtype == np.uint16 and codes.min() == 0 and codes.max() == 65535
        bounds = yaml.safe_load((folder / f"{index}_info_depth.yaml").read_text())["normalization"]
        assert isinstance(bounds["min"], float) and 0.01 < bounds["min"] < bounds["max"] < 2
        depth = codes / 65535 * (bounds["max"] - bounds["min"]) + bounds["min"]
        normals = np.array(Image.open(folder / f"{index}_normals.png")) / 127.5 - 1
        lengths = np.linalg.norm(normals, axis=-1)
        assert np.abs(lengths - 1).max() < 0.02  # every pixel has a surface: nothing is missing
        focal = 711.11 * 64 / 512
        rows, columns = np.mgrid[:64, :64]
        points = np.stack([(columns - 32) / focal * depth, (rows - 32) / focal * depth, depth], -1)
        pose = np.loadtxt(folder / f"{index}_pose.txt")
        world = points @ pose[:3, :3].T + pose[:3, 3]
        table = np.abs(world[..., 2]) < 1e-4
        assert table.mean() > 0.15 and world[..., 2].min() > -1e-4
        upward = (normals * (1, -1, -1)) @ pose[:3, :3].T
        assert np.median(upward[table][:, 2]) > 0.98


def test_eyecandies_labels_match_the_masks(eyecandies):
    seen = set()
    for category in ("HeatSink", "SpurGear"):
        for path in sorted((eyecandies / category).glob("*/data/*_metadata.yaml")):
            flags = yaml.safe_load(path.read_text())
            stem = str(path)[: -len("metadata.yaml")]
            masks = {kind: np.array(Image.open(f"{stem}{kind}_mask.png")) for kind in flags if kind != "anomalous"}
            total = np.array(Image.open(f"{stem}mask.png"))
            assert set(np.unique(total)) <= {0, 255}
            assert {kind: int(mask.any()) for kind, mask in masks.items()} == {kind: flags[kind] for kind in masks}
            assert (total == np.maximum.reduce(list(masks.values()))).all() and bool(total.any()) == flags["anomalous"]
            assert path.parts[-3] == "test_public" or not flags["anomalous"]
            seen |= {kind for kind, flag in flags.items() if flag}
    assert seen == {"anomalous", "bumps", "dents", "colors", "normals"}


@pytest.mark.parametrize("layout", ["mvtec3d", "eyecandies"])
def test_the_tree_does_not_depend_on_workers_and_a_sample_not_on_their_number(tmp_path, layout):
    options = {"size": 32, "categories": ["t_slot_profile", "circlip"], "validation_per_category": 2}
    one = digests(make(tmp_path / "one", layout, per_category=5, test_per_category=10, **options))
    two = digests(make(tmp_path / "two", layout, per_category=5, test_per_category=10, workers=2, **options))
    assert one == two
    fewer = digests(make(tmp_path / "fewer", layout, per_category=3, test_per_category=4, **options))
    assert fewer.items() < one.items()
    other = digests(make(tmp_path / "other", layout, per_category=3, test_per_category=4, seed=1, **options))
    depths = [name for name in fewer if name.endswith(("depth.png", ".tiff"))]
    assert depths and all(other[name] != fewer[name] for name in depths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "mvtec"}, "did you mean 'mvtec3d'"),
        ({"layout": "nothing"}, "unknown layout"),
        ({"per_category": 0}, "per_category: must be at least 1, got 0"),
        ({"size": 16}, "size: must be at least 32, got 16"),
        ({"test_per_category": -1}, "test_per_category"),
        ({"workers": -1}, "workers"),
        ({"plane": 1.5}, "plane"),
        ({"categories": 17}, "categories: must be 1..16, got 17"),
        ({"categories": ["hexnut"]}, "did you mean 'hex_nut'"),
        ({"categories": []}, "categories"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(tmp_path, options, message):
    config = SynthConfig(**({"layout": "mvtec3d", "out": str(tmp_path / "raw")} | options))
    with pytest.raises(ConfigError, match=message):
        synth(config)
    assert not (tmp_path / "raw").exists()


def test_a_folder_with_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="not an empty folder"):
        make(tmp_path, "mvtec3d")
    with pytest.raises(ConfigError, match="not an empty folder"):
        make(tmp_path / "mine.txt", "mvtec3d")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_workers_import_no_torch():
    code = "import sys, data_prep.synthetic.layouts.mvtec3d, data_prep.synthetic.layouts.eyecandies; "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], check=True)


def test_floating_parts_show_every_kind_of_defect(tmp_path):
    """Without a supporting plane a part is seen from any side, also from where one kind of defect never shows."""
    config = SynthConfig(
        "mvtec3d", str(tmp_path / "o"), 1, size=64, test_per_category=24, categories=2, plane=0.0, workers=1
    )
    synth(config)
    masks = [path for path in (tmp_path / "o").glob("*/test/*/gt/*.png") if path.parents[1].name != "good"]
    assert len(masks) == 24 and all(np.asarray(Image.open(path)).any() for path in masks)
