"""Registration and the residual head: known motions, slow twins, and what a dent of known depth measures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from multiview_scene import CENTRE, RADII, ellipsoid_depth, off_ellipsoid, ring
from scipy import ndimage
from scipy.spatial.transform import Rotation

from dino_depth.anomaly.dataset import Sample, View
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.geometry import SquareFit, back_project, lift, project
from dino_depth.anomaly.heads import Context, residual, template
from dino_depth.anomaly.heads.residual.reference import Reference, plane_distance, sampled, without_low_frequencies
from dino_depth.anomaly.model import PrepareConfig, fit_model
from dino_depth.anomaly.registration import (
    Cloud,
    RegistrationConfig,
    make_cloud,
    moved_maps,
    moved_sample,
    register,
)
from dino_depth.anomaly.views import Views
from dino_depth.depth import DepthMap
from dino_depth.frozen import load_frozen

SHAPE = (120, 160)
CONTEXT = Context(0, torch.device("cpu"))
STEP = np.eye(4)
STEP[:3, :3] = Rotation.from_rotvec([0.012, -0.008, 0.01]).as_matrix()
STEP[:3, 3] = [0.001, -0.0015, 0.002]


def scene(step=None, dent=0.0, noise=0.0, seed=0, views=4, name="00"):
    """The ellipsoid after it was moved by ``step``, with a round dent and a pattern in its image."""
    random, made = np.random.default_rng(seed), []
    step = np.eye(4) if step is None else step
    for place, camera in enumerate(ring(views, *SHAPE)):
        # A part that moves is a camera that moves the other way.
        relative = replace(camera, camera_to_world=np.linalg.inv(step) @ camera.camera_to_world)
        depth = ellipsoid_depth(relative)
        shown = depth > 0
        points = back_project(relative, np.where(shown, depth, 1.0))
        away = np.linalg.norm(points - np.array([0.054, -0.02, 0.116]), axis=-1)
        depth = np.where(shown, depth + dent * (away < 0.02) + noise * random.normal(size=depth.shape), 0)
        pattern = 120 + 60 * np.sin(points @ [150.0, 90.0, 110.0])
        image = np.where(shown, pattern, 20).astype(np.uint8)
        depth_map = DepthMap(np.where(shown, depth, 1), shown)
        made.append(View(f"{place + 1}", lambda i=image: i, lambda d=depth_map: d, camera))
    return Sample("part", name, "test", "good", None, tuple(made), lambda: None)


def store(encoded=()):
    found = {name: load_frozen("raw-patches?patch=8", modality=name) for name in encoded}
    return FeatureStore(found.get("image"), found.get("depth"), 80, object_pixels=ForegroundConfig("valid"))


def cloud(sample):
    return Views(sample, store()).cloud


def test_a_known_motion_is_found():
    motion = register(cloud(scene(STEP, noise=2e-4)), cloud(scene(noise=2e-4, seed=1)))
    off = motion.matrix @ STEP  # back to where it was
    assert not motion.failed and motion.inliers > 0.9
    assert np.degrees(Rotation.from_matrix(off[:3, :3]).magnitude()) < 0.12
    assert np.linalg.norm(off[:3, 3]) < 3e-4
    assert motion.residual < 2.5e-4 < motion.before


def test_a_defect_does_not_pull():
    plain = register(cloud(scene(STEP)), cloud(scene()))
    dented = register(cloud(scene(STEP, dent=0.008)), cloud(scene()))
    assert np.linalg.norm((dented.matrix - plain.matrix)[:3, 3]) < 2e-4


def test_what_cannot_be_registered_says_so_and_moves_nothing():
    target = cloud(scene())
    far = Cloud(target.points + 1.0, target.normals)
    turned = Rotation.from_rotvec([0, 1.2, 0]).as_matrix()
    for source in (far, Cloud(target.points @ turned.T, target.normals @ turned.T)):
        motion = register(source, target)
        assert np.array_equal(motion.matrix, np.eye(4)) and motion.failed or motion.inliers > 0.5
    assert "do not overlap" in register(far, target).failed


def test_moved_views_are_those_of_the_part_where_it_was():
    sample, wanted = scene(STEP), scene()
    views = Views(sample, store())
    moved, _ = moved_sample(sample, views.images, views.depths, views.cameras, np.linalg.inv(STEP))
    for one, other in zip(moved.views, wanted.views, strict=True):
        mine, right = one.read_depth(), other.read_depth()
        both = mine.valid & right.valid
        assert both.sum() > 0.93 * right.valid.sum()
        assert np.median(abs(mine.depth - right.depth)[both]) < 3e-4
        change = abs(one.read_image().astype(float) - other.read_image())[both]
        before = abs(sample.views[int(one.name) - 1].read_image().astype(float) - other.read_image())[both]
        assert change.mean() < 0.6 * before.mean()


def test_maps_return_to_the_pixels_they_were_measured_at():
    sample = scene(STEP)
    views = Views(sample, store())
    _, moves = moved_sample(sample, views.images, views.depths, views.cameras, np.linalg.inv(STEP))
    rows, columns = np.indices((160, 160)).astype(np.float32)
    ramp = torch.from_numpy(np.stack([rows + 2 * columns] * 4))
    back = moved_maps({"depth": ramp}, moves)["depth"]
    for view, move in enumerate(moves):
        inner = views.depths[view].valid[40:80, 60:100]
        expected = (ramp[view, 20:140].numpy() + move[..., 1] + 2 * move[..., 0])[40:80, 60:100]
        np.testing.assert_allclose(back[view, 20:140].numpy()[40:80, 60:100][inner], expected[inner], atol=0.05)


def test_a_square_of_an_image_is_its_area_average():
    values = torch.arange(30 * 40, dtype=torch.float64).view(30, 40)
    same = SquareFit(30, 40, 40).fit(values)
    assert torch.allclose(same[5:35], values) and not same[:5].any() and not same[35:].any()
    assert torch.allclose(
        SquareFit(40, 40, 20).fit(torch.ones(40, 40, dtype=torch.float64)), torch.ones(20, 20).double()
    )
    half = SquareFit(30, 40, 20).fit(values)
    assert float(half[10, 3]) == pytest.approx(float(values[15:17, 6:8].mean()))


def test_plane_distance_equals_a_loop_over_points():
    random = np.random.default_rng(0)
    view = scene().views[0]
    reference = Reference(np.zeros(SHAPE, np.float32), view.read_depth().depth, view.camera)
    rows, columns = np.nonzero(view.read_depth().valid)
    chosen = random.choice(len(rows), 60, replace=False)
    points = lift(view.camera, np.stack([columns, rows], 1)[chosen], reference.depth[rows, columns][chosen])
    points = points + random.normal(size=points.shape) * 0.004
    signed, shown, places = plane_distance(points, reference)
    surface, normals, valid = reference.surface()
    for point, found, seen, place in zip(points, signed, shown, places, strict=True):
        np.testing.assert_allclose(project(view.camera, point[None])[0][0], place)
        column, row = np.rint(place).astype(int)
        around = [
            float((point - surface[y, x]) @ normals[y, x])
            for y in range(row - 1, row + 2)
            for x in range(column - 1, column + 2)
            if 0 <= y < SHAPE[0] and 0 <= x < SHAPE[1] and valid[y, x]
        ]
        assert seen == bool(around)
        if around:
            assert found == pytest.approx(min(around, key=abs), abs=1e-12)


def test_samples_between_cells_are_bilinear():
    maps = torch.randn(5, 6, 3, generator=torch.Generator().manual_seed(0)).double()
    places = np.array([[1.25, 2.5], [0, 0], [5, 4], [-1, 9]])
    found = sampled(maps, places)
    expected = 0.75 * 0.5 * (maps[2, 1] + maps[3, 1]) + 0.25 * 0.5 * (maps[2, 2] + maps[3, 2])
    assert torch.allclose(found[0], expected) and torch.equal(found[1], maps[0, 0])
    assert torch.equal(found[2], maps[4, 5]) and torch.equal(found[3], maps[4, 0])


def model(method, registered, encoded=(), **settings):
    config = PrepareConfig(RegistrationConfig("icp" if registered else "none"))
    return fit_model(method, method.Config(**settings), config, CONTEXT, [Views(scene(), store(encoded))])


def test_a_dent_is_measured_where_it_is_and_to_its_depth():
    fitted = model(residual, True, maps=("depth",), smoothing=0.0)
    prepared = fitted.prepare(Views(scene(STEP, dent=0.006, noise=1e-4, seed=3), store()))
    signed, known = residual.deviations(fitted.head, prepared.views)
    deep = np.concatenate([part[where & (part < -0.003)] for part, where in zip(signed, known, strict=True)])
    # The dent goes along the ray, which meets the surface at an angle: what is off the plane is a little less.
    assert len(deep) > 100 and 0.0042 < -np.median(deep) < 0.0063
    rest = np.concatenate([part[where & (abs(part) < 0.003)] for part, where in zip(signed, known, strict=True)])
    assert np.quantile(abs(rest), 0.95) < 5e-4


def test_registration_takes_the_motion_out_of_every_head():
    tested = scene(STEP)
    for method, encoded, settings in (
        (residual, (), {"calibration": "none"}),
        (template, ("image",), {"modality": "image"}),
    ):
        scores = {}
        for registered in (False, True):
            found = model(method, registered, encoded, **settings).score(Views(tested, store(encoded), resident=True))
            scores[registered] = float(torch.stack([part.mean() for part in found.maps.values()]).mean())
        assert scores[True] < 0.6 * scores[False], method.__name__


def test_maps_meet_on_one_scale():
    """Calibrated maps of a sound instance stay near 1, whatever unit they had."""
    fitted = model(residual, True, ("image",), maps=("depth", "image", "features"))
    assert set(fitted.head.scales) == {"depth", "image", "features"}
    maps = fitted.score(Views(scene(STEP, noise=1e-4, seed=5), store(("image",)), resident=True)).maps
    assert all(float(part.quantile(0.99)) < 3 for part in maps.values())
    dented = fitted.score(Views(scene(STEP, dent=0.008, noise=1e-4, seed=5), store(("image",)), resident=True)).maps
    assert float(dented["depth"].max()) > 3 * float(maps["depth"].max())


def test_the_cloud_lies_on_the_surface_with_normals_towards_the_cameras():
    sample = scene()
    views = Views(sample, store())
    found = make_cloud(views.depths, views.cameras, views.foregrounds)
    assert off_ellipsoid(found.points).max() < 1e-4
    outward = (found.points - CENTRE) / RADII**2
    outward /= np.linalg.norm(outward, axis=1, keepdims=True)
    assert np.quantile((outward * found.normals).sum(1), 0.02) > 0.97


@pytest.mark.parametrize("shape", [(21, 34), (60, 45)])
def test_low_frequencies_are_those_of_a_gaussian_filter_within_the_mask(shape):
    random = np.random.default_rng(0)
    values, mask, deviation = random.normal(size=shape), random.random(shape) < 0.7, 0.1 * max(shape)
    low, weight = (ndimage.gaussian_filter(part, deviation) for part in (values * mask, mask.astype(np.float64)))
    expected = np.where(mask, values - low / weight, 0)
    assert np.abs(without_low_frequencies(values, mask, deviation) - expected).max() < 1e-5
