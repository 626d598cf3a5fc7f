"""Cameras and the square: the pixel convention against points whose place is known, and against slow transcriptions."""

import numpy as np
import pytest
import torch
from multiview_scene import ellipsoid_depth, off_ellipsoid, ring

from dino_depth.anomaly.geometry import Camera, SquareFit, back_project, lift, lift_mask, project, rays, resize_camera
from dino_depth.errors import DataError
from dino_depth.resample import fit_square

MATRIX = np.array([[50.0, 0, 20.3], [0, 52, 14.1], [0, 0, 1]])
LENS = (-0.21, 0.06, 0.002, -0.003, 0.01)


def camera(distortion=(), pose=None, height=30, width=40):
    return Camera(height, width, MATRIX, np.eye(4) if pose is None else pose, distortion)


def pixel_grid(height, width):
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).reshape(-1, 2).astype(np.float64)


def test_a_known_point_lands_on_the_centre_of_its_pixel():
    # On the optical axis a point appears at the principal point, in whole coordinates of pixel centres.
    pixels, depth = project(camera(), np.array([[0, 0, 2.0], [0.1, -0.2, 2.0]]))
    assert np.allclose(pixels, [[20.3, 14.1], [20.3 + 50 * 0.05, 14.1 - 52 * 0.1]], atol=1e-12)
    assert depth.tolist() == [2, 2]
    exact = Camera(30, 40, [[50, 0, 7], [0, 50, 3], [0, 0, 1]], np.eye(4))
    assert np.allclose(rays(exact)[3, 7], [0, 0, 1]) and np.allclose(rays(exact)[3, 17], [0.2, 0, 1])


def test_a_point_behind_the_camera_has_no_pixel():
    pixels, depth = project(camera(), np.array([[0.1, 0, -1.0], [0, 0, 0]]))
    assert np.isnan(pixels).all() and depth.tolist() == [-1, 0]


@pytest.mark.parametrize("distortion", [(), LENS[:4], LENS])
def test_projection_undoes_back_projection(distortion):
    seen = ring(3, distortion=distortion)[1]
    depth = np.random.default_rng(0).uniform(0.4, 0.9, (seen.height, seen.width))
    pixels, again = project(seen, back_project(seen, depth).reshape(-1, 3))
    assert np.allclose(pixels, pixel_grid(seen.height, seen.width), atol=1e-3)
    assert np.allclose(again, depth.ravel(), atol=1e-12)


def lifted(seen, depth, mask):
    return np.concatenate([points for *_, points in lift_mask(seen, depth, mask)], 1).T


@pytest.mark.parametrize("distortion", [(), LENS])
def test_a_mask_is_lifted_in_blocks_with_the_same_bits(distortion):
    seen = ring(3, distortion=distortion)[1]
    random = np.random.default_rng(0)
    depth, mask = random.uniform(0.4, 0.9, (2, seen.height, seen.width))
    assert not list(lift_mask(seen, depth, np.zeros(mask.shape, bool)))
    for share in (1.0, 0.5, 0.41):  # values from 0.4 on: of the last, blocks have a pixel or two
        rows, columns = np.nonzero(mask < share)
        assert len(rows)
        expected = lift(seen, np.stack([columns, rows], 1), depth[mask < share])
        assert np.array_equal(lifted(seen, depth, mask < share), expected)
    lone = np.zeros(mask.shape, bool)
    lone[7, 5] = lone[40, 11] = lone[40, 12] = True
    rows, columns = np.nonzero(lone)
    assert np.array_equal(lifted(seen, depth, lone), lift(seen, np.stack([columns, rows], 1), depth[lone]))


def test_rays_between_the_undistorted_ones_are_off_by_next_to_nothing():
    """SiM3D's size and lens: against undistorting every pixel, here of every 37th row and all corners."""
    matrix = np.array([[3470.28, 0, 2045.8], [0, 3468.9, 1563.63], [0, 0, 1]])
    pose = ring(3)[1].camera_to_world
    for lens, limit in (((-0.08, 0.1, 5e-4, -3e-4, 0.02), 2e-6), ((-0.3, 0.12, 1e-3, 1e-3, -0.02), 1e-5)):
        seen = Camera(3000, 4096, matrix, pose, lens)
        mask = np.zeros((3000, 4096), bool)
        mask[::37] = mask[-1] = True
        depth = np.full(mask.shape, 0.7, np.float32)
        rows, columns = np.nonzero(mask)
        exact = lift(seen, np.stack([columns, rows], 1), depth[mask])
        off = np.linalg.norm(lifted(seen, depth, mask) - exact, axis=1).max()
        assert 0 < off < limit  # metres; a pixel is 2e-4 wide at this distance


def test_distortion_is_opencvs_model():
    x, y = 0.21, -0.13
    k1, k2, p1, p2, k3 = LENS
    square = x * x + y * y
    radial = 1 + k1 * square + k2 * square**2 + k3 * square**3
    u = x * radial + 2 * p1 * x * y + p2 * (square + 2 * x * x)
    v = y * radial + p1 * (square + 2 * y * y) + 2 * p2 * x * y
    pixels, _ = project(camera(LENS), np.array([[x, y, 1.0]]))
    assert np.allclose(pixels, [[50 * u + 20.3, 52 * v + 14.1]], atol=1e-12)


def test_depth_is_planar_and_not_the_length_of_the_ray():
    seen = ring(1)[0]
    points = back_project(seen, np.full((seen.height, seen.width), 0.5))
    local = (points - seen.camera_to_world[:3, 3]) @ seen.camera_to_world[:3, :3]
    assert np.allclose(local[..., 2], 0.5, atol=1e-12)


def test_back_projected_views_of_an_ellipsoid_lie_on_it():
    for seen in ring(5, distortion=LENS):
        depth = ellipsoid_depth(seen)
        points = back_project(seen, depth)[depth > 0]
        assert len(points) > 300 and off_ellipsoid(points).max() < 1e-9


def test_some_pixels_lift_as_the_whole_map_does():
    seen = ring(2, distortion=LENS)[1]
    depth = ellipsoid_depth(seen)
    rows, columns = np.nonzero(depth)
    some = lift(seen, np.stack([columns, rows], 1), depth[rows, columns])
    assert np.allclose(some, back_project(seen, depth)[rows, columns], atol=1e-9)


def test_resizing_moves_pixel_centres_by_the_stated_rule():
    small = camera()
    large = resize_camera(small, 60, 80)
    point = np.array([[0.13, 0.07, 0.9]])
    assert np.allclose(project(large, point)[0], 2 * (project(small, point)[0] + 0.5) - 0.5, atol=1e-12)
    assert resize_camera(small, 30, 40) is small


def test_resizing_to_another_shape_is_refused():
    with pytest.raises(DataError, match="calibrated at 30x40, which has another shape than 30x60"):
        resize_camera(camera(), 30, 60)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"matrix": np.zeros((3, 3))}, "last row 0 0 1"),
        ({"matrix": [[-50, 0, 20], [0, 50, 14], [0, 0, 1]]}, "positive focal lengths"),
        ({"camera_to_world": np.full((4, 4), np.nan)}, "finite"),
        ({"camera_to_world": np.diag([2.0, 1, 1, 1])}, "rotation"),
        ({"camera_to_world": np.diag([-1.0, 1, 1, 1])}, "rotation"),
        ({"distortion": (0.1, 0.2)}, "k1 k2 p1 p2"),
        ({"height": 0}, "height and width"),
    ],
)
def test_an_impossible_camera_is_refused(fault, message):
    parts = {"height": 30, "width": 40, "matrix": MATRIX, "camera_to_world": np.eye(4)}
    with pytest.raises(DataError, match=message):
        Camera(**(parts | fault))


def test_a_distortion_that_folds_the_image_is_refused():
    with pytest.raises(DataError, match="folds the image"):
        rays(camera((-3.0, 0, 0, 0)))


def test_depth_of_another_size_than_its_camera_is_refused():
    with pytest.raises(DataError, match="depth is 20x40, its camera 30x40"):
        back_project(camera(), np.ones((20, 40)))


@pytest.mark.parametrize("shape", [(30, 40), (41, 28), (33, 33)])
def test_the_square_has_the_geometry_of_the_encoders_input(shape):
    """A blob's centre of mass moves through ``fit_square`` as ``to_square`` says."""
    height, width = shape
    rows, columns = np.mgrid[:height, :width]
    place = np.array([0.4 * width, 0.6 * height])
    blob = np.exp(-((columns - place[0]) ** 2 + (rows - place[1]) ** 2) / 18) + 1e-9
    square = fit_square(torch.from_numpy(blob).float(), torch.ones(shape, dtype=torch.bool), 84)[0].double()
    rows, columns = np.mgrid[:84, :84]
    found = [float((square * torch.from_numpy(axis)).sum() / square.sum()) for axis in (columns, rows)]
    assert np.allclose(found, SquareFit(height, width, 84).to_square(place[None])[0], atol=0.03)


def test_from_square_undoes_to_square():
    fit = SquareFit(30, 47, 896)
    pixels = np.random.default_rng(0).uniform(0, 30, (50, 2))
    assert np.allclose(fit.from_square(fit.to_square(pixels)), pixels, atol=1e-12)


def test_a_part_of_an_image_has_the_bits_of_the_whole():
    fit, maps = SquareFit(61, 83, 10), torch.rand(2, 10, 10)
    whole = fit.unfit(maps)
    for down, across in ((slice(0, 61), slice(0, 83)), (slice(3, 19), slice(7, 80)), (slice(60, 61), slice(0, 1))):
        assert torch.equal(fit.unfit(maps, down, across), whole[:, down, across])


@pytest.mark.parametrize(("shape", "cells"), [((30, 40), 7), ((37, 20), 64), ((25, 25), 25), ((9, 4), 1)])
def test_unfitting_is_bilinear_between_cell_centres(shape, cells):
    height, width = shape
    maps = np.random.default_rng(cells).standard_normal((2, cells, cells))
    places = SquareFit(height, width, cells).to_square(pixel_grid(height, width)).clip(0, cells - 1)
    slow = np.empty((2, height * width))
    for number, (column, row) in enumerate(places):
        left, top = int(column), int(row)
        right, bottom = min(left + 1, cells - 1), min(top + 1, cells - 1)
        across, down = column - left, row - top
        above = (1 - across) * maps[:, top, left] + across * maps[:, top, right]
        below = (1 - across) * maps[:, bottom, left] + across * maps[:, bottom, right]
        slow[:, number] = (1 - down) * above + down * below
    fast = SquareFit(height, width, 896).unfit(maps)
    assert np.allclose(fast, slow.reshape(2, height, width), atol=1e-12)
    assert torch.equal(SquareFit(height, width, 3).unfit(torch.from_numpy(maps)), torch.from_numpy(fast))


def test_unfitting_agrees_with_torch_where_nothing_is_padded():
    maps = torch.rand(3, 8, 8)
    expected = torch.nn.functional.interpolate(maps[None], (40, 40), mode="bilinear", align_corners=False)[0]
    assert torch.allclose(SquareFit(40, 40, 8).unfit(maps), expected, atol=1e-6)
