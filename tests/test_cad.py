"""Views from a CAD file: the depth of the layout's own renderer, of a float64 transcription, and every bad input."""

import dataclasses
import json

import numpy as np
import pytest
import trimesh
from step_box import step_box

from data_prep.synthetic.nuisances import PRESETS
from data_prep.synthetic.plan import generator
from data_prep.synthetic.specimen import sound_instance, specimen
from dino_depth.anomaly.geometry import Camera, rays
from dino_depth.errors import ConfigError, DataError
from dino_depth.inspection.cad import CadConfig, read_part, render_views
from dino_depth.inspection.check import PartsConfig, check
from dino_depth.inspection.convert import write_instance
from dino_depth.inspection.parts import read_parts
from dino_depth.inspection.rig import RIG, Rig, rig_json

PERFECT = {"depth_noise": 0.0, "dropout": 0.0, "image_noise": 0.0}
SIDES = np.array([0.06, 0.04, 0.03])  # of the box, metres


def real_part(category="hex_nut", views=3):
    """A part in the layout of SiM3D: its mesh in metres, its rig, and the instance that was not moved."""
    made = specimen((5, "sim3d"), category, None, 96, 128, views, 1)
    cameras = {
        f"view_{number + 1:02d}": Camera(96, 128, made.camera.matrix(), pose) for number, pose in enumerate(made.poses)
    }
    mesh = trimesh.Trimesh(made.scale * made.vertices, made.faces, process=False)
    return mesh, Rig(cameras), sound_instance(made, PRESETS["clean"], generator(0))


def box_rig(distortion=(), distance=0.3):
    """Two cameras that look at the middle of the box, whose corner is the origin, from oblique."""
    cameras = {}
    for number, outward in enumerate(([0.5, 0.6, 0.62], [-0.7, 0.3, 0.65])):
        outward = np.array(outward) / np.linalg.norm(outward)
        right = np.cross([0, 0, 1.0], outward)
        right /= np.linalg.norm(right)
        pose = np.eye(4)
        pose[:3] = np.stack([right, np.cross(-outward, right), -outward, SIDES / 2 + distance * outward], 1)
        matrix = np.array([[150.0, 0, 46.5], [0, 148.0, 30.2], [0, 0, 1]])
        cameras[f"view_{number + 1:02d}"] = Camera(64, 90, matrix, pose, distortion)
    return Rig(cameras)


def write_box(path, scale=1000.0):
    mesh = trimesh.creation.box(SIDES)
    mesh.apply_translation(SIDES / 2)
    mesh.apply_scale(scale)
    mesh.export(path)
    return path


def box_depth(camera: Camera) -> np.ndarray:
    """Depth (height, width) of the box by slabs, ray by ray in float64; 0 where a ray passes it."""
    directions = rays(camera) @ camera.camera_to_world[:3, :3].T  # z of the camera is 1: the parameter is the depth
    with np.errstate(divide="ignore"):
        ends = (np.stack([np.zeros(3), SIDES]) - camera.camera_to_world[:3, 3])[:, None, None] / directions
    enter, leave = ends.min(0).max(-1), ends.max(0).min(-1)
    return np.where(enter < leave, enter, 0)


@pytest.mark.parametrize("category", ["hex_nut", "angle_bracket"])
def test_depth_is_that_of_the_layout_without_noise(tmp_path, category):
    mesh, rig, instance = real_part(category)
    for suffix, scale, unit in (
        ("stl", 1000, "auto"),
        ("ply", 100, "cm"),
        ("obj", 1 / 0.0254, "inch"),
        ("glb", 1, "auto"),
    ):
        file = tmp_path / f"{category}.{suffix}"
        scaled = mesh.copy()
        scaled.apply_scale(scale)
        scaled.export(file)
        config = CadConfig(unit=unit, **PERFECT)
        [sample] = render_views(read_part(file, config), rig, config)
        assert len(sample.views) == 3 and sample.label == "good"
        for number, view in enumerate(sample.views):
            seen, depth = instance.view(number).seen, view.read_depth()
            assert (depth.valid != seen.part).mean() < 1e-3  # rays that graze a silhouette
            both = depth.valid & seen.part
            assert both.mean() > 0.05
            # 10 um of 0.7 m: an STL's float32 numbers, and an OBJ's eight digits.
            differences = np.abs(depth.depth - seen.depth)[both]
            assert np.quantile(differences, 0.999) < 1e-5, (suffix, differences.max())


@pytest.mark.parametrize("distortion", [(), (-0.15, 0.05, 0.002, -0.001)])
def test_depth_is_that_of_slabs_through_any_lens(tmp_path, distortion):
    rig, config = box_rig(distortion), CadConfig(**PERFECT)
    [sample] = render_views(read_part(write_box(tmp_path / "box.stl"), config), rig, config)
    for view in sample.views:
        expected, depth = box_depth(view.camera), view.read_depth()
        assert (depth.valid != (expected > 0)).sum() <= 2
        both = depth.valid & (expected > 0)
        assert both.sum() > 300 and np.abs(depth.depth - expected)[both].max() < 2e-6


def test_step_is_read_in_the_unit_it_states(tmp_path):
    for prefix, metres in ((".MILLI.", 0.001), ("$", 1.0)):
        file = tmp_path / "box.step"
        file.write_text(step_box(tuple(SIDES / metres), prefix))
        assert np.allclose(np.ptp(read_part(file, CadConfig()).vertices, axis=0), SIDES, atol=1e-6)


def test_a_part_stands_where_it_is_said_to(tmp_path):
    rig, moved = box_rig(), np.eye(4)
    moved[:3, :3] = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    moved[:3, 3] = 0.1, -0.2, 0.05
    cameras = {
        name: dataclasses.replace(camera, camera_to_world=moved @ camera.camera_to_world)
        for name, camera in rig.cameras.items()
    }
    file = write_box(tmp_path / "box.stl")
    placed = CadConfig(part_to_world=moved.ravel().tolist(), **PERFECT)
    [one] = render_views(read_part(file, CadConfig(**PERFECT)), rig, CadConfig(**PERFECT))
    [two] = render_views(read_part(file, placed), Rig(cameras), placed)
    for first, second in zip(one.views, two.views, strict=True):
        before, after = first.read_depth(), second.read_depth()
        assert (before.valid != after.valid).sum() <= 2
        assert np.abs(before.depth - after.depth)[before.valid & after.valid].max() < 2e-6
    with pytest.raises(DataError, match="part_to_world, unit or rig"):
        render_views(read_part(file, CadConfig()), Rig(cameras), CadConfig())


def test_noise_is_what_was_asked_for_and_is_drawn_from_the_seed(tmp_path):
    file, rig = write_box(tmp_path / "box.stl"), box_rig()
    exact, noisy = CadConfig(**PERFECT), CadConfig(depth_noise=0.5, dropout=0.0, instances=2, image_noise=0.02)
    part = read_part(file, exact)
    [clean], recorded = render_views(part, rig, exact), render_views(part, rig, noisy)
    assert [sample.name for sample in recorded] == ["box_00", "box_01"]
    depths = [np.concatenate([v.read_depth().depth.ravel() for v in sample.views]) for sample in (clean, *recorded)]
    shown = depths[0] > 0
    for depth in depths[1:]:
        assert np.std((depth - depths[0])[shown]) == pytest.approx(5e-4, rel=0.05) and not depth[~shown].any()
    assert np.corrcoef((depths[1] - depths[0])[shown], (depths[2] - depths[0])[shown])[0, 1] < 0.1
    again = render_views(part, rig, noisy)[1].views[0]
    assert np.array_equal(again.read_depth().depth, recorded[1].views[0].read_depth().depth)
    image = again.read_image()
    assert image.dtype == np.uint8 and np.array_equal(image, recorded[1].views[0].read_image())
    valid = again.read_depth().valid
    assert image[valid].mean() > image[~valid].mean() + 40


def test_depth_is_lost_where_a_surface_is_seen_at_a_grazing_angle(tmp_path):
    sphere = trimesh.creation.icosphere(4, 20.0)
    sphere.apply_translation(1000 * SIDES / 2)
    sphere.export(tmp_path / "ball.ply")
    part, rig = read_part(tmp_path / "ball.ply", CadConfig()), box_rig()
    whole, lossy = (
        render_views(part, rig, CadConfig(dropout=share, depth_noise=0.0))[0].views[0].read_depth()
        for share in (0.0, 1.0)
    )
    rows, columns = np.nonzero(whole.valid)
    away = np.hypot(rows - rows.mean(), columns - columns.mean())
    rim = away > 0.95 * away.max()
    kept = lossy.valid[rows, columns]
    assert kept[rim].mean() < 0.5 and kept[away < 0.3 * away.max()].mean() > 0.8 and not lossy.valid[~whole.valid].any()


def test_what_is_written_is_a_folder_of_own_parts(tmp_path):
    config = CadConfig()
    mesh, rig, _ = real_part(views=6)
    mesh.apply_scale(1000)
    mesh.export(tmp_path / "nut.stl")
    [sample] = render_views(read_part(tmp_path / "nut.stl", config), rig, config)
    images, depths = ([getattr(view, f"read_{kind}")() for view in sample.views] for kind in ("image", "depth"))
    write_instance(tmp_path / "parts" / sample.name, images, depths, list(rig.cameras), None)
    (tmp_path / "parts" / RIG).write_text(json.dumps(rig_json(rig)))
    _, [read] = read_parts(tmp_path / "parts")
    assert read.name == "nut_00" and np.array_equal(read.views[0].read_image(), images[0])
    [checked] = check(PartsConfig(str(tmp_path / "parts")))
    assert checked.views == 6 and checked.overlap < 0.05


@pytest.mark.parametrize(
    "scale, words",
    [
        (1.0, "unit m$"),  # metres, read as millimetres
        (1e6, "camera of view_01 is within its bounding box"),  # micrometres
        (1000 / 25.4, "unit cm or inch$"),
    ],
)
def test_a_wrong_unit_is_named(tmp_path, scale, words):
    config, rig = CadConfig(), box_rig(distance=0.9)
    part = read_part(write_box(tmp_path / "box.stl", scale), config)
    with pytest.raises(DataError, match=words) as error:
        render_views(part, rig, config)
    assert "\n" not in str(error.value) and str(error.value).startswith("box: ")


BAD = [
    ("nothing.stl", b"", {}, DataError, "nothing.stl"),
    ("empty.stl", b"solid empty\nendsolid empty\n", {}, DataError, "no triangles"),
    ("points.ply", b"ply\nformat ascii 1.0\nelement vertex 1\nproperty float x\nproperty float y\nproperty float z\n"
     b"end_header\n0 0 0\n", {}, DataError, "points.ply"),
    ("part.step", b"ISO-10303-21;\n", {}, DataError, "part.step"),
    ("part.dwg", b"AC1032", {}, DataError, "part.dwg"),
    ("", b"", {}, DataError, "is not a file"),
    ("box.stl", None, {"unit": "feet"}, ConfigError, "unit: must be auto, m, cm, mm, inch"),
    ("box.stl", None, {"part_to_world": [1.0]}, ConfigError, "part_to_world: must be 16"),
    ("box.stl", None, {"part_to_world": [2.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1]}, ConfigError, "rotation"),
    ("box.stl", None, {"depth_noise": -1.0}, ConfigError, "depth_noise: must be within 0..100"),
    ("box.stl", None, {"instances": 0}, ConfigError, "instances: must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize("name, content, settings, kind, words", BAD, ids=[f"{b[0]}{list(b[2])}" for b in BAD])
def test_bad_input_is_one_line(tmp_path, name, content, settings, kind, words):
    path, config = tmp_path / (name or "nowhere.stl"), CadConfig(**settings)
    if name and content is not None:
        path.write_bytes(content)
    elif name:
        write_box(path)
    with pytest.raises(kind, match=words.replace(".", r"\.")) as error:
        render_views(read_part(path, config), box_rig(), config)
    assert "\n" not in str(error.value)


def test_a_rig_without_cameras_is_refused(tmp_path):
    with pytest.raises(DataError, match="no cameras"):
        render_views(read_part(write_box(tmp_path / "box.stl"), CadConfig()), Rig(), CadConfig())
