"""synth sim3d: layout, determinism, geometry by way of the written calibration, and ground truth of every defect."""

import hashlib
import json
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import trimesh
from manifold3d import Manifold
from PIL import Image

from data_prep.exr import decode_exr
from data_prep.synthetic import SynthConfig, synth
from data_prep.synthetic.layouts.sim3d import KINDS
from data_prep.synthetic.meshes import read_mesh
from data_prep.synthetic.multiview import Pinhole, Solid, fit, jitter, pinhole, ring
from data_prep.synthetic.nuisances import PRESETS, Difficulty, disturb, measure, photograph
from data_prep.synthetic.parts import triangles
from data_prep.synthetic.plan import Sim3dOptions
from data_prep.synthetic.render import Camera, Scene
from data_prep.synthetic.specimen import sound_instance, specimen
from data_prep.synthetic.surface_defects import (
    BOTH,
    CHANGE,
    DEPTH,
    FACETS,
    IMAGE,
    MISSING,
    Paint,
    changed_points,
    damage_surface,
    refine,
)
from dino_depth.cli import main
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError

SIZE, VIEWS = 64, 4


def make(folder, test=2, workers=1, seed=0, categories=("hex_nut",), size=SIZE, **options):
    options = Sim3dOptions(**({"views": VIEWS, "voxel": 0.01} | options))
    categories = list(categories) if categories else None
    config = SynthConfig(
        "sim3d", str(folder), seed=seed, size=size, test_per_category=test, categories=categories, workers=workers,
        sim3d=options,
    )  # fmt: skip
    synth(config)
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Two categories, one for each format of the calibration, with every kind of defect and no nuisance at all."""
    folder = tmp_path_factory.mktemp("sim3d") / "raw"
    return make(folder, 2 * len(KINDS), categories=("angle_bracket", "spur_gear"), difficulty="clean")


def cameras(folder):
    """(matrix, camera to world) of each view, from whichever files the category has."""
    if (folder / "calibration.json").exists():
        assert not (folder / "calib.xml").exists()
        read = json.loads((folder / "calibration.json").read_text())["cameras"]
        assert [camera["name"] for camera in read] == [str(number + 1) for number in range(len(read))]
        assert all((camera["height"], camera["width"]) == (SIZE, SIZE) for camera in read)
        return [(np.array(camera["matrix"]), np.array(camera["camera_to_world"])) for camera in read]
    tree = ElementTree.parse(folder / "calib.xml").getroot()
    assert (tree.find("wL").text, tree.find("hL").text) == (str(SIZE), str(SIZE))
    matrix = np.array(tree.find("mtxL/data").text.split(), float).reshape(3, 3)
    assert not np.array(tree.find("distL/data").text.split(), float).any()
    return [(matrix, pose.reshape(4, 4)) for pose in np.loadtxt(folder / "pose_ocv.txt", ndmin=2)]


def lifted(depth, matrix, pose, shift=0.0):
    """World points (points, 3) of the measured pixels of a depth map, metres; pixel centres have whole coordinates."""
    rows, columns = np.nonzero(depth > 0)
    pixels = np.stack([columns + shift, rows + shift, np.ones(len(rows))])
    points = np.linalg.inv(matrix) @ pixels * depth[rows, columns]
    return points.T @ pose[:3, :3].T + pose[:3, 3]


def real_depth(folder, number):
    depth = np.load(folder / "depth" / f"{number}.npy", allow_pickle=False)
    assert depth.dtype == np.float32 and (np.isfinite(depth) | np.isposinf(depth)).all()
    return np.where(np.isinf(depth), 0, depth.astype(np.float64) / 1000)


def gray(path):
    image = np.asarray(Image.open(path))
    assert image.dtype == np.uint8 and image.ndim == 2
    return image.astype(int)


def surface_distances(points, vertices, faces):
    """Exact distances of points to the nearest of the triangles, all pairs."""
    pairs = np.broadcast_to(points[:, None], (len(points), len(faces), 3)).reshape(-1, 3)
    corners = np.broadcast_to(vertices[faces], (len(points), len(faces), 3, 3)).reshape(-1, 3, 3)
    nearest = trimesh.triangles.closest_point(corners, pairs)
    return np.linalg.norm(nearest - pairs, axis=1).reshape(len(points), len(faces)).min(1)


def digests(root):
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_tree_is_laid_out_as_published(clean):
    assert sorted(path.name for path in clean.iterdir()) == [
        "SYNTHETIC.json", "angle_bracket", "benchmark.json", "spur_gear",
    ]  # fmt: skip
    for category in ("angle_bracket", "spur_gear"):
        folder = clean / category
        tests = [f"{category}_{n:02d}_{label}" for label in ("bad", "good") for n in range(1, len(KINDS) + 1)]
        instances = sorted(path.name for path in folder.iterdir() if path.is_dir())
        assert instances == sorted([*tests, f"{category}_real", f"{category}_synth"])
        for name in [*tests, f"{category}_real"]:
            inside = {str(path.relative_to(folder / name)) for path in (folder / name).rglob("*") if path.is_file()}
            expected = {f"depth/{n}.npy" for n in range(1, 5)} | {f"rgb/{n}_2.png" for n in range(1, 5)}
            expected |= set() if name.endswith("_real") else {"gt.npz"}
            expected |= {f"mask/{n}.png" for n in range(1, 5)} if "bad" in name else set()
            assert inside == expected
        synthetic = folder / f"{category}_synth"
        inside = {str(path.relative_to(synthetic)) for path in synthetic.rglob("*") if path.is_file()}
        names = [f"posa_{n:03d}" for n in range(1, 5)]
        assert inside == {f"DEPTH/{n}_depth.exr" for n in names} | {f"RGB/{n}_2.png" for n in names}
    stated = json.loads((clean / "benchmark.json").read_text())
    assert (stated["seed"], stated["preset"], stated["voxel"]) == (0, "clean", 0.01)
    gear = stated["objects"]["spur_gear"]
    assert gear["calibration"] == "xml" and gear["test"]["spur_gear_01_good"] == {"defects": [], "voxels": 0}
    assert [gear["test"][f"spur_gear_{n:02d}_bad"]["defects"] for n in range(1, 7)] == [[kind] for kind in KINDS]
    assert set(KINDS) == {*DEPTH, *IMAGE, *BOTH}


def test_the_same_bytes_whatever_the_workers_and_the_other_instances(tmp_path):
    one = digests(make(tmp_path / "one", 4, categories=("hex_nut", "circlip")))
    two = digests(make(tmp_path / "two", 4, workers=2, categories=("hex_nut", "circlip")))
    assert one == two
    fewer = digests(make(tmp_path / "fewer", 2))
    assert fewer.pop("benchmark.json") != one["benchmark.json"]
    assert fewer.items() < one.items()
    other = digests(make(tmp_path / "other", 2, seed=1))
    recorded = [name for name in fewer if name.endswith((".npy", ".exr", "_2.png"))]
    assert recorded and all(other[name] != fewer[name] for name in recorded)
    assert other["hex_nut/calibration.json"] == fewer["hex_nut/calibration.json"]


@pytest.mark.parametrize("category", ["angle_bracket", "spur_gear"])
def test_depths_lifted_by_the_written_calibration_lie_on_the_object(clean, category):
    subject = specimen((0, "sim3d"), category, None, SIZE, SIZE, VIEWS, 1)
    vertices, rng = subject.vertices * subject.scale, np.random.default_rng(0)
    errors, shifted, spread = [], [], []
    for number, (matrix, pose) in enumerate(cameras(clean / category), 1):
        content = (clean / category / f"{category}_synth" / "DEPTH" / f"posa_{number:03d}_depth.exr").read_bytes()
        exact = decode_exr(content)
        assert exact.max() == np.float32(1e10)
        synthetic = np.where(exact == exact.max(), 0, exact)
        real = real_depth(clean / category / f"{category}_real", number)
        assert np.allclose(real, synthetic, atol=1e-6) and (real > 0).sum() > 100
        points = rng.permutation(lifted(real, matrix, pose))
        spread.append(points)
        errors.append(surface_distances(points[:60], vertices, subject.faces))
        shifted.append(surface_distances(lifted(real, matrix, pose, 0.5)[::20], vertices, subject.faces))
    assert np.max(errors) < 2e-5
    # The check sees half a pixel.
    assert np.mean(np.concatenate(shifted)) > 20 * np.mean(errors)
    # All views together see all of the object.
    points = np.concatenate(spread)
    assert np.allclose(points.max(0), vertices.max(0), atol=0.02)
    assert np.allclose(points.min(0)[:2], vertices.min(0)[:2], atol=0.02)


@pytest.mark.parametrize("index", range(len(KINDS)), ids=KINDS)
def test_a_defect_is_seen_by_the_modalities_of_its_kind_and_nowhere_else(clean, index):
    kind, good = KINDS[index], clean / "angle_bracket" / "angle_bracket_01_good"
    bad = clean / "angle_bracket" / f"angle_bracket_{index + 1:02d}_bad"
    masks, images, depths = [], [], []
    for number in range(1, VIEWS + 1):
        masks.append(gray(bad / "mask" / f"{number}.png"))
        images.append(gray(bad / "rgb" / f"{number}_2.png") != gray(good / "rgb" / f"{number}_2.png"))
        depths.append(np.abs(real_depth(bad, number) - real_depth(good, number)) > 1e-6)
    mask, image, depth = np.stack(masks) > 0, np.stack(images), np.stack(depths)
    assert set(np.unique(masks)) == {0, 255} and mask.sum() >= 8
    if kind in DEPTH:
        assert not image.any() and depth[mask].mean() > 0.95
    elif kind in IMAGE:
        assert not depth.any() and image[mask].mean() > 0.95 and not image[~mask].any()
    else:
        assert image[mask].mean() > 0.8 and depth[mask].mean() > 0.8
    # Beside it only what is bent less than counts as a defect, and what a defect hides or reveals.
    assert (image | depth)[~mask].sum() <= mask.sum()


@pytest.mark.parametrize("category", ["angle_bracket", "spur_gear"])
def test_true_voxels_are_those_of_the_masked_pixels_and_lie_on_one_spot_of_the_surface(clean, category):
    scale = json.loads((clean / "benchmark.json").read_text())["objects"][category]["longest_side"]
    for place, kind in enumerate(KINDS, 1):
        folder = clean / category / f"{category}_{place:02d}_bad"
        with np.load(folder / "gt.npz", allow_pickle=False) as truth:
            origin, voxel, shape = truth["origin"], float(truth["voxel_size"]), truth["shape"]
            index, component = truth["index"], truth["component"]
            assert truth["kind"].tolist() == [kind] and voxel == 0.01
        assert index.dtype == np.int32 and component.dtype == np.int32 and (component == 1).all()
        assert (index >= 0).all() and (index < shape).all() and (shape * voxel >= 2 * scale).all()
        assert np.array_equal(index, np.unique(index, axis=0)) and len(index) == len(component) > 0
        true = {tuple(row) for row in index.tolist()}
        inside, outside = [], []
        for number, (matrix, pose) in enumerate(cameras(clean / category), 1):
            depth, mask = real_depth(folder, number), gray(folder / "mask" / f"{number}.png") > 0
            for pixels, found in ((mask, inside), (~mask, outside)):
                points = lifted(np.where(pixels, depth, 0), matrix, pose)
                found += [tuple(row) in true for row in np.floor((points - origin) / voxel).astype(int).tolist()]
        # Every defective pixel falls into a true voxel but for rounding at its faces; sound ones only at the border.
        assert np.mean(inside) > 0.97, kind
        assert np.mean(outside) < 0.1, kind
        centres = origin + (index + 0.5) * voxel
        extent = np.linalg.norm(centres - centres.mean(0), axis=1).max() / scale
        assert extent < (0.22 if kind == "scratch" else 0.16), kind


def test_good_instances_state_the_grid_and_no_voxels(clean):
    with np.load(clean / "spur_gear" / "spur_gear_01_good" / "gt.npz", allow_pickle=False) as truth:
        assert truth["index"].shape == (0, 3) and truth["component"].shape == truth["kind"].shape == (0,)
        with np.load(clean / "spur_gear" / "spur_gear_01_bad" / "gt.npz", allow_pickle=False) as other:
            assert all(np.array_equal(truth[key], other[key]) for key in ("origin", "voxel_size", "shape"))


def test_nuisances_lose_and_disturb_what_the_preset_says():
    subject = specimen((0, "sim3d"), "star_knob", None, 96, 96, 2, 1)
    view = sound_instance(subject, PRESETS["clean"], np.random.default_rng(0)).view(0)

    def record(difficulty, seed=0):
        rng = np.random.default_rng(seed)
        shape = disturb(view.seen, subject.camera, difficulty, rng)
        depth = measure(view.seen, subject.camera, subject.scale, shape, difficulty, rng)
        rooms = np.random.default_rng(1), np.random.default_rng(2 + seed)
        image = photograph(view.seen, subject.camera, view.albedo, 0.2, rooms, shape, difficulty, rng)
        return image.astype(int), depth

    image, depth = record(Difficulty())
    part = view.seen.part
    assert np.array_equal(depth, np.where(part, view.seen.depth, 0))
    noisy = record(Difficulty(depth_noise=0.0015))[1]
    assert np.std((noisy - depth)[part]) == pytest.approx(0.0015 * subject.scale, rel=0.1)
    noisy = record(Difficulty(image_noise=0.015))[0]
    assert np.std((noisy - image)[part]) == pytest.approx(0.015 * 255, rel=0.1)
    brighter = [np.median(record(Difficulty(gain=0.1), seed)[0][part] / image[part]) - 1 for seed in range(30)]
    assert np.std(brighter) == pytest.approx(0.1, rel=0.4)
    assert (record(Difficulty(light=8.0))[0] != image)[part].mean() > 0.3
    assert (record(Difficulty(background=0.5), 3)[0] != image)[~part].mean() > 0.5
    assert np.array_equal(record(Difficulty(background=0.5), 3)[0][part], image[part])
    bright, lost = record(Difficulty(glare=3.0), 1)
    spots = part & (depth > 0) & (lost == 0)
    assert spots.any() and (bright - image)[spots].min() > 20
    blobbed, lost = record(Difficulty(blobs=3.0), 1)
    assert np.array_equal(blobbed, image) and 10 < (part & (lost == 0)).sum() < 0.5 * part.sum()
    lost = record(Difficulty(dropout=0.7))[1] == 0
    cosine = -(subject.camera.rays() * view.seen.normal).sum(-1) / subject.camera.ray_lengths()
    assert lost[part & (cosine < 0.1)].mean() == pytest.approx(0.7, abs=0.2)
    assert lost[part & (cosine > 0.4) & (view.seen.normal[..., 1] > 0.5)].mean() < 0.05


def test_presets_grow_harder():
    clean, mild, hard = (PRESETS[name] for name in ("clean", "mild", "hard"))
    for key in ("light", "glare", "blobs", "dropout", "rotation", "translation", "background"):
        assert getattr(clean, key) == 0 < getattr(mild, key) < getattr(hard, key)
    assert mild.amplitude > hard.amplitude


def test_a_rig_sees_all_of_the_object_and_nothing_could_be_larger():
    rng = np.random.default_rng(0)
    for height, width, views, rings in ((64, 64, 12, 1), (48, 64, 36, 3), (90, 64, 6, 2)):
        points, camera, poses = rng.uniform(-0.5, 0.5, (200, 3)), pinhole(height, width), ring(views, rings)
        scale = fit(points, camera, poses, 0.9)
        reach = []
        for pose in poses:
            assert np.allclose(pose[:3, :3] @ pose[:3, :3].T, np.eye(3)) and np.linalg.det(pose[:3, :3]) > 0
            seen = (scale * points - pose[:3, 3]) @ pose[:3, :3]
            places = (seen @ camera.matrix().T)[:, :2] / seen[:, 2:] - camera.center
            edges = [min(c + 0.5, n - 0.5 - c) for c, n in zip(camera.center, (width, height), strict=True)]
            reach.append(np.abs(places / edges).max())
            # The origin is in the middle, 0.7 m away, and up in the world is up in the image.
            assert np.allclose((-pose[:3, 3]) @ pose[:3, :3], (0, 0, 0.7))
            assert pose[2, 1] < 0 and pose[2, 3] > 0
        assert max(reach) == pytest.approx(0.9)
        heights = poses[:, 2, 3].reshape(rings, -1)
        assert np.allclose(heights, heights[:, :1]) and (np.diff(heights[:, 0]) > 0).all()


def test_the_camera_is_the_published_one_at_its_own_size():
    camera = pinhole(3000, 4096)
    assert np.allclose(camera.focal, (3470.28, 3468.90)) and np.allclose(camera.center, (2045.80, 1563.63))


def test_one_search_tree_for_all_views_agrees_with_a_mesh_moved_before_the_camera():
    subject = specimen((3, "sim3d"), "pipe_flange", None, 96, 96, 5, 1)
    square = Camera(96, 90.0, 46.0, 50.5)
    camera = Pinhole(96, 96, (90.0, 90.0), (46.0, 50.5))
    for pose in subject.poses:
        vertices = (subject.vertices * subject.scale - pose[:3, 3]) @ pose[:3, :3]
        expected = Scene(vertices, subject.faces, []).render(square)
        seen, triangle = subject.scene.render(camera, pose)
        assert (seen.part == expected.part).mean() > 0.999 and np.array_equal(seen.part, triangle >= 0)
        both = seen.part & expected.part
        assert np.abs(seen.depth - expected.depth)[both].max() < 1e-5
        assert ((seen.normal * expected.normal).sum(-1)[both] > 0.999).mean() > 0.99


def test_refining_opens_no_crack_and_keeps_the_surface():
    vertices, faces = triangles(Manifold.cylinder(1.0, 0.3, 0.5, 17))
    vertices = vertices.astype(np.float64)
    before = trimesh.Trimesh(vertices, faces, process=False)
    for ball in (None, (vertices[0], 0.25)):
        fine, pieces, parents = refine(vertices, faces, 0.04, ball)
        after = trimesh.Trimesh(fine, pieces, process=False)
        assert after.is_watertight and after.volume == pytest.approx(before.volume)
        assert np.array_equal(fine[: len(vertices)], vertices)
        lengths = np.linalg.norm(np.diff(fine[after.edges_unique], axis=1)[:, 0], axis=1)
        inside = np.linalg.norm(fine[after.edges_unique].mean(1) - vertices[0], axis=1) < 0.2
        assert lengths[inside if ball else slice(None)].max() <= 0.04 and len(pieces) > len(faces)
        areas = np.bincount(parents, after.area_faces, len(faces))
        assert np.allclose(areas, before.area_faces)
        assert (after.face_normals * before.face_normals[parents]).sum(1).min() > 0.999


@pytest.mark.parametrize("kind", ["dent", "bump"])
def test_a_dent_has_the_profile_of_its_equation_and_crosses_nothing(kind):
    plate = Manifold.cube((1.0, 0.8, 0.05), True)
    vertices, faces = triangles(plate)
    point, normal = np.array([0.1, 0.05, 0.025]), np.array([0.0, 0.0, 1.0])
    rng = np.random.default_rng(0)
    damaged = damage_surface(kind, vertices.astype(float), faces, plate, (point, normal), (0.05, 0.11, 0.5), 0.02, rng)
    mesh = trimesh.Trimesh(damaged.vertices, damaged.faces, process=False)
    assert mesh.is_watertight and damaged.paint is None
    top = damaged.vertices[damaged.vertices[:, 2] > (-0.02 if kind == "dent" else 0.02)]
    sign = -1 if kind == "dent" else 1
    # The centre moves by the amplitude, and the back of the plate moves the same way.
    nearest = damaged.vertices[np.argsort(np.linalg.norm(damaged.vertices[:, :2] - point[:2], axis=1))[:40]]
    assert abs(nearest[:, 2].max() if kind == "bump" else nearest[:, 2].min()) == pytest.approx(
        0.075 if kind == "bump" else 0.025 + 0.05 * (1 - (0.05 / 0.11) ** 2) ** 2, abs=0.004
    )
    assert np.sign(nearest[:, 2].mean()) == sign and len(top)
    Solid(damaged.vertices, damaged.faces)
    # Triangles are called changed within the radius at which the profile falls below CHANGE.
    limit = 0.11 * np.sqrt(1 - np.sqrt(CHANGE / 0.05))
    changed = damaged.vertices[damaged.faces[damaged.changed]].mean(1)
    upper = changed[np.linalg.norm(changed[:, :2] - point[:2], axis=1) < 0.2]
    reach = np.linalg.norm(upper[:, :2] - point[:2], axis=1).max()
    assert limit - 2 * 0.11 / FACETS < reach < limit
    flat = mesh.area_faces[damaged.changed & (mesh.triangles_center[:, 2] * sign > 0)].sum()
    assert flat > 0.8 * np.pi * limit**2


def test_a_missing_part_is_a_ball_taken_away():
    block = Manifold.cube((1.0, 1.0, 1.0), True)
    vertices, faces = triangles(block)
    point, normal = np.array([0.5, 0.1, 0.2]), np.array([1.0, 0.0, 0.0])
    size = (0.05, 0.11, 0.5)
    damaged = damage_surface(
        "missing", vertices.astype(float), faces, block, (point, normal), size, 0.02, np.random.default_rng(0)
    )
    mesh = trimesh.Trimesh(damaged.vertices, damaged.faces, process=False)
    radius = MISSING * 0.05
    assert mesh.is_watertight
    assert 1 - mesh.volume == pytest.approx(2 / 3 * np.pi * radius**3, rel=0.02)
    distances = np.linalg.norm(damaged.vertices[damaged.faces] - point, axis=-1)
    assert distances[damaged.changed].max() < radius * 1.001 and distances[damaged.changed].min() > radius * 0.99
    assert mesh.area_faces[damaged.changed].sum() == pytest.approx(2 * np.pi * radius**2, rel=0.02)
    points = changed_points(damaged, 0.01)
    assert points[:, 0].max() <= 0.5 + 1e-6
    assert np.abs(np.linalg.norm(points - point, axis=1) - radius).max() < 0.01 * radius


def test_paint_covers_one_side_of_the_surface_around_its_segment():
    paint = Paint(np.array([-0.1, 0, 0.0]), np.array([0.1, 0, 0.0]), 0.02, np.array([0.0, 0, 1]), 0.5)
    points = np.array([[0, 0, 0], [0.1, 0.019, 0], [0.119, 0, 0], [0.121, 0, 0], [0, 0.021, 0], [0, 0, 0]])
    normals = np.array([[0, 0, 1.0]] * 5 + [[0, 0, -1.0]])
    assert paint.covers(points, normals).tolist() == [True, True, True, False, False, False]
    vertices, faces = triangles(Manifold.cube((1.0, 1.0, 0.2), True))
    point, normal = np.array([0.1, 0.0, 0.1]), np.array([0.0, 0.0, 1.0])
    for kind, area in (("stain", np.pi * 0.077**2), ("scratch", 0.33 * 0.033 + np.pi * 0.0165**2)):
        damaged = damage_surface(
            kind, vertices.astype(float), faces, None, (point, normal), (0.05, 0.11, 0.5), 0.02,
            np.random.default_rng(0),
        )  # fmt: skip
        points = changed_points(damaged, 0.003)
        assert np.allclose(points[:, 2], 0.1) and damaged.faces is faces and not damaged.changed.any()
        cells = np.unique(np.floor(points[:, :2] / 0.004).astype(int), axis=0)
        assert len(cells) * 0.004**2 == pytest.approx(area, rel=0.25)
        assert damaged.paint.factor in (0.5, 1.5)


def test_jitter_has_the_stated_size():
    rng = np.random.default_rng(0)
    poses = [jitter(rng, 1.0, 0.002) for _ in range(400)]
    assert np.std([pose[:3, 3] for pose in poses]) == pytest.approx(0.002, rel=0.1)
    angles = [np.degrees(pose[[2, 0, 1], [1, 2, 0]]) for pose in poses]
    assert np.std(angles) == pytest.approx(1.0, rel=0.1)


def test_meshes_of_users_are_objects_of_their_own(tmp_path):
    torus = trimesh.creation.torus(40.0, 12.0)
    torus.export(tmp_path / "ring-1.stl")
    sheet = trimesh.creation.icosphere(2, 0.3)
    sheet.update_faces(sheet.triangles_center[:, 2] > -0.1)
    sheet.export(tmp_path / "bowl.ply")
    files = [str(tmp_path / "ring-1.stl"), str(tmp_path / "bowl.ply")]
    root = make(tmp_path / "raw", 2 * len(KINDS), categories=None, mesh=files)
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == ["bowl", "ring-1"]
    objects = json.loads((root / "benchmark.json").read_text())["objects"]
    assert objects["ring-1"]["watertight"] and not objects["bowl"]["watertight"]
    assert objects["ring-1"]["source"] == "mesh file" and (root / "bowl" / "calibration.json").exists()
    kinds = {name: [row["defects"][0] for row in objects[name]["test"].values() if row["defects"]] for name in objects}
    assert kinds["ring-1"] == list(KINDS)
    assert kinds["bowl"] == ["bump" if kind == "missing" else kind for kind in KINDS]
    assert all(row["voxels"] > 0 for name in objects for row in objects[name]["test"].values() if row["defects"])
    both = make(tmp_path / "both", mesh=files[0])
    assert sorted(path.name for path in both.iterdir() if path.is_dir()) == ["hex_nut", "ring-1"]
    alone = {name: digest for name, digest in digests(root).items() if name.startswith("ring-1/")}
    together = {name: digest for name, digest in digests(both).items() if name.startswith("ring-1/")}
    assert together.items() < alone.items()


@pytest.mark.parametrize("suffix", ["stl", "ply", "obj", "off", "glb"])
def test_every_format_of_a_mesh_reads_the_same(tmp_path, suffix):
    box = trimesh.creation.box((3.0, 2.0, 1.0))
    box.export(tmp_path / f"box.{suffix}")
    vertices, faces = read_mesh(str(tmp_path / f"box.{suffix}"))
    assert len(faces) == 12 and np.allclose(np.ptp(vertices, axis=0), (3, 2, 1))
    subject = specimen((0,), "box", str(tmp_path / f"box.{suffix}"), 64, 64, 3, 1)
    assert subject.solid is not None and np.allclose(np.ptp(subject.vertices, axis=0), (1, 2 / 3, 1 / 3))


def test_a_broken_mesh_is_one_line(tmp_path, capsys):
    for name, content in (("junk.stl", b"nothing"), ("empty.ply", b""), ("flat.obj", b"v 0 0 0\nf 1 1 1\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name) as error:
            read_mesh(str(tmp_path / name))
        assert "\n" not in str(error.value)
    words = ["synth", "sim3d", "--out", str(tmp_path / "raw"), "--sim3d.mesh", str(tmp_path / "junk.stl")]
    assert main(words) == 3
    error = capsys.readouterr().err.splitlines()
    assert "junk.stl" in error[-1] and not any("Traceback" in line for line in error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"difficulty": "middling"}, "sim3d.difficulty: must be one of clean, mild, hard"),
        ({"views": 0}, "sim3d.views: must be at least 1, got 0"),
        ({"views": 12, "rings": 5}, "sim3d.rings: 5 rings cannot share 12 views equally"),
        ({"height": 8}, "sim3d.height: must be at least 32, got 8"),
        ({"voxel": 0.0}, "sim3d.voxel"),
        ({"mesh": "nowhere.stl"}, "sim3d.mesh: nowhere.stl is no file"),
        ({"mesh": ["badge.stl"]}, "bad, real and synth"),
        ({"mesh": ["hex_nut.stl"]}, "another object named 'hex_nut'"),
        ({"mesh": ["a.stl", "a.stl"]}, "another object named 'a'"),
        ({"mesh": "a.step"}, "no file that ends in"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ("badge.stl", "hex_nut.stl", "a.stl", "a.step"):
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "raw", **options)
    assert not (tmp_path / "raw").exists()


def test_options_come_from_the_command_line():
    config = parse(
        SynthConfig, ["sim3d", "--out", "x", "--sim3d.views", "36", "--sim3d.mesh", "[a.stl, b.stl]"], "p", ("layout",)
    )
    assert config.sim3d == Sim3dOptions(views=36, mesh=["a.stl", "b.stl"]) and config.size is None
    assert parse(SynthConfig, ["--out", "x", "--layout", "y", "--sim3d.mesh", "a.stl"], "p").sim3d.mesh == "a.stl"


def test_images_need_not_be_square(tmp_path):
    root = make(tmp_path / "raw", size=64, height=48, views=6, rings=2)
    folder = root / "hex_nut" / "hex_nut_01_bad"
    assert gray(folder / "rgb" / "6_2.png").shape == real_depth(folder, 6).shape == (48, 64)
    camera = json.loads((root / "hex_nut" / "calibration.json").read_text())["cameras"][5]
    assert (camera["height"], camera["width"]) == (48, 64)
