"""Families of parts, sensors and scenes: what the shipped encoder is trained on."""

import hashlib
import json

import numpy as np
import pytest
import trimesh
from PIL import Image

from data_prep.synthetic import SynthConfig, scenes, sensors, synth
from data_prep.synthetic.families import FAMILIES, build_family
from data_prep.synthetic.layouts.scenes import STEP
from data_prep.synthetic.parts import CATEGORIES, triangles
from data_prep.synthetic.render import Camera, Scene
from data_prep.synthetic.scenes import build_world, shoot_world
from dino_depth.cli import main
from dino_depth.shards import DepthShards


def test_every_family_is_watertight_rests_on_the_table_and_has_random_proportions():
    assert len(FAMILIES) >= 60 and FAMILIES.keys() > CATEGORIES.keys()
    for family in FAMILIES.keys() - CATEGORIES.keys():
        volumes = []
        for seed in (0, 1, 2, 0):
            vertices, faces = triangles(build_family(family, np.random.default_rng(seed)))
            mesh = trimesh.Trimesh(vertices, faces, process=False)
            assert mesh.is_watertight and mesh.volume > 0 and len(faces) < 10_000, family
            assert vertices[:, 2].min() == pytest.approx(0, abs=1e-5), family
            assert np.ptp(vertices, axis=0).max() == pytest.approx(1, abs=1e-5), family
            volumes.append(mesh.volume)
        assert volumes[0] == volumes[3] and len(set(volumes)) == 3, family


def step_scene(size=96):
    """A wall at .6 m, its left half .05 m nearer, and a floor that slopes away below."""
    camera = Camera(size, 1.5 * size, (size - 1) / 2, (size - 1) / 2)
    box = trimesh.creation.box((0.4, 0.6, 0.1))
    vertices = box.vertices + (-0.2, 0, 0.6)
    wall = (np.array([0.0, 0.0, -1.0]), -0.6)
    floor = (np.array([0.0, -1.0, 0.0]), -0.12)
    return camera, Scene(vertices.astype(np.float32), box.faces.astype(np.int32), [wall, floor])


@pytest.mark.parametrize("sensor", [entry for entry, _ in sensors.SENSORS], ids=lambda entry: entry.__name__)
def test_sensors_measure_what_is_there_with_their_noise_and_holes(sensor):
    camera, scene = step_scene()
    seen = scene.render(camera)
    lit = scene.lit(seen, camera, np.array([-0.1, 0, 0], np.float32))
    assert 0 < np.count_nonzero(~lit & (seen.depth > 0)) < 0.2 * lit.size
    kept, errors, between = [], [], 0
    for seed in range(12):
        depth = sensor(seen, camera, lit, np.random.default_rng(seed))
        again = sensor(seen, camera, lit, np.random.default_rng(seed))
        assert depth.dtype == np.float32 and np.array_equal(depth, again) and np.isfinite(depth).all()
        kept.append((depth > 0).mean())
        flat = np.zeros(depth.shape, bool)
        flat[8:48, 8:40] = flat[8:48, 56:88] = True
        errors.append((depth - seen.depth)[flat & (depth > 0)])
        row = depth[8:48, 44:52]
        between += np.count_nonzero((row > 0.555) & (row < 0.595))
        if sensor.__name__ in ("structured_light", "stereo"):
            assert not depth[~lit].any()
    errors = np.concatenate(errors)
    spread = np.median(np.abs(errors))
    bounds = {
        "perfect": (0, 1e-6),
        "structured_light": (5e-5, 3e-4),
        "stereo": (5e-5, 3e-3),
        "time_of_flight": (2e-4, 4e-3),
    }
    low, high = bounds[sensor.__name__]
    assert low <= spread <= high and abs(np.median(errors)) < 1e-3 and 0.5 < np.mean(kept) <= 1
    # Only time of flight puts points where nothing is, between front and back.
    assert (between > 20) == (sensor.__name__ == "time_of_flight")
    assert (np.mean(kept) > 0.999) == (sensor.__name__ == "perfect")


def test_disparity_has_steps():
    camera, scene = step_scene()
    seen = scene.render(camera)
    depth = sensors.stereo(seen, camera, seen.depth > 0, np.random.default_rng(3))
    inverse = np.unique(1 / depth[8:48, 56:88][depth[8:48, 56:88] > 0].astype(np.float64))
    gaps = np.diff(inverse)
    assert len(inverse) < 100 and np.allclose(gaps / gaps.min(), np.rint(gaps / gaps.min()), atol=0.05)


def test_worlds_hold_their_family_and_are_seen_from_all_sides():
    kinds, heights = set(), {True: [], False: []}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        world = build_world("hex_nut", 0.5, rng)
        kinds.add(world.kind)
        floor = bool(world.walls) and np.array_equal(world.walls[0][0], [0, 0, 1])
        if floor:
            assert world.vertices[:, 2].min() == pytest.approx(0, abs=1e-5)
        if world.kind == "part":
            heights[floor].append(scenes._side(world, rng)[2])
        assert world.kind != "room" or (floor and len(world.walls) > 1)
        assert world.faces.max() == len(world.vertices) - 1
    assert kinds == set(scenes.KINDS)
    assert min(heights[True]) > 0.2 and min(heights[False]) < -0.3 and max(heights[False]) > 0.3


def nearest_hit(ray, corners, planes):
    """Distance along a ray (3,) with z = 1 to triangles (triangles, 3, 3) and planes (Moeller and Trumbore)."""
    origin, first, second = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    across = np.cross(ray, second)
    determinant = (first * across).sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        u = (-origin * across).sum(1) / determinant
        v = (np.cross(-origin, first) @ ray) / determinant
        distance = (np.cross(-origin, first) * second).sum(1) / determinant
    hits = list(distance[(u >= 0) & (v >= 0) & (u + v <= 1) & (distance > 0)])
    hits += [offset / (ray @ normal) for normal, offset in planes if offset / (ray @ normal) > 0]
    return min(hits, default=0)


def test_depth_is_that_of_the_world(monkeypatch):
    """The world is moved and scaled as a whole, and every pixel has the distance of what its ray meets first."""
    looked, meshes = [], []

    class Recorded(Scene):
        def __init__(self, vertices, faces, planes):
            meshes.append(vertices.astype(np.float64)[faces])
            super().__init__(vertices, faces, planes)

    own = scenes._look
    monkeypatch.setattr(scenes, "Scene", Recorded)
    monkeypatch.setattr(scenes, "_look", lambda *arguments: looked.append(own(*arguments)) or looked[-1])
    monkeypatch.setattr(scenes, "SENSORS", [(sensors.perfect, 1.0)])
    for seed in range(8):
        rng = np.random.default_rng(seed)
        world = build_world("superquadric", 0.7, rng)
        depth = shoot_world(world, 32, rng)
        camera, scene = looked[-1]
        moved, before = (points - points[:1] for points in (scene.vertices, world.vertices.astype(float)))
        scale = np.linalg.norm(moved, axis=1).max() / np.linalg.norm(before, axis=1).max()
        assert np.allclose(moved @ moved[-9:].T, scale**2 * before @ before[-9:].T, atol=1e-5 * scale**2)
        assert 0.05 < np.median(depth[depth > 0]) < 4
        for row, column in rng.integers(0, 32, (40, 2)):
            ray = camera.rays()[row, column].astype(np.float64)
            assert depth[row, column] == pytest.approx(nearest_hit(ray, meshes[-1], scene.planes), rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "raw"
    options = {"per_category": 4, "validation_per_category": 1, "test_per_category": 0, "size": 48, "plane": 0.6}
    synth(SynthConfig(layout="scenes", out=str(root), categories=["lump", "wrench"], workers=1, **options))
    return root


def digests(root):
    return {path.relative_to(root): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.png")}


def test_a_tree_does_not_depend_on_processes_or_on_how_many_there_are(tree, tmp_path):
    options = {"per_category": 6, "validation_per_category": 1, "test_per_category": 0, "size": 48, "plane": 0.6}
    synth(SynthConfig(layout="scenes", out=str(tmp_path), categories=["wrench", "lump"], workers=2, **options))
    more, fewer = digests(tmp_path), digests(tree)
    assert len(fewer) == 10 and len(more) == 14 and more.items() >= fewer.items()
    assert len(set(more.values())) == 14


def test_prep_reads_what_synth_wrote(tree, tmp_path):
    arguments = ["--folder.name", "scenes", "--folder.scale", str(STEP), "--out", str(tmp_path), "--workers", "1"]
    assert main(["prep", "folder", "--root", str(tree), *arguments]) == 0
    shards = DepthShards(str(tmp_path))
    assert len(shards) == 10
    seen = set()
    for index in range(10):
        depth_map, meta = shards.sample(index)
        path = tree / meta["source"]
        codes = np.array(Image.open(path))
        assert np.array_equal(depth_map.valid, codes > 0) and depth_map.kind == "metric"
        assert np.abs(depth_map.depth - codes * STEP)[depth_map.valid].max() < STEP / 2
        seen.add(path)
    assert len(seen) == 10
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert "Apache-2.0" in json.dumps(manifest)
