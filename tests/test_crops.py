import math
from collections import Counter

import numpy as np
import pytest
import torch

from dino_depth.config import CropConfig
from dino_depth.errors import ConfigError
from dino_depth.pretrain.crops import check_crops, crops_of_step, draw_crops, multi_crop, partners
from dino_depth.resample import Pyramid, fit_square, resample

GENERATOR = np.random.default_rng(0)


def affine(size_map, centre=None, scale=(1.0, 1.0), angle=0.0, flip=(1, 1)):
    """(2, 3): a box of ``scale`` times the map (height, width), flipped, turned, centred at ``centre`` (x, y)."""
    height, width = size_map
    turn = math.radians(angle)
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    linear = turned @ np.diag([flip[0] * scale[0] * width, flip[1] * scale[1] * height])
    centre = np.array(centre or (width / 2, height / 2))
    return np.column_stack([linear, centre - linear @ (0.5, 0.5)])


def crop(values, valid, matrix, size):
    result = resample(torch.from_numpy(values)[None], torch.from_numpy(valid)[None], matrix[None, None], size)
    return result[0, 0, 0].numpy()


def random_map(height, width, missing=0.3):
    values = GENERATOR.normal(0.3, 1, (height, width)).astype(np.float32)
    return values, GENERATOR.random((height, width)) >= missing


def pixel_weights(position, length, level):
    """Weight (length,) of each pixel along one axis: a tent over the level's pixels, each the mean of its box."""
    step = 2 ** (level // 2)
    box = step * (1 + level % 2)
    weights = np.zeros(length)
    for index in range(-3, length // step + 4):
        centre = step * index if level % 2 else step * (index + 0.5)
        tent = max(0.0, 1 - abs(position - centre) / step)
        for pixel in range(length):
            weights[pixel] += tent / box * (abs(pixel + 0.5 - centre) < box / 2)
    return weights


def slow_crop(values, valid, matrix, size):
    """The definition, pixel by pixel in float64: (values, weights), both (size, size)."""
    spans = np.linalg.norm(matrix[:, :2], axis=0) / size
    area = abs(np.linalg.det(matrix[:, :2])) / size**2
    if spans.max() > 1:
        limits, radius = (1.958, 4.932, 7.161, 11.549, 15.536), 1 / math.sqrt(8)
        level = sum(math.sqrt(area) > limit for limit in limits)
        offsets = [(radius * math.sin(t), radius * math.cos(t)) for t in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
    else:
        level, offsets = 0, [(0.0, 0.0)]
    output, weights = np.zeros((size, size)), np.zeros((size, size))
    clean = np.where(valid, values, 0).astype(np.float64)
    for i in range(size):
        for j in range(size):
            total = weight = 0.0
            for du, dv in offsets:
                x, y = matrix @ ((j + 0.5 + du) / size, (i + 0.5 + dv) / size, 1)
                along_x = pixel_weights(x, values.shape[1], level)
                along_y = pixel_weights(y, values.shape[0], level)
                total += along_y @ clean @ along_x
                weight += along_y @ valid @ along_x
            weights[i, j] = weight / len(offsets)
            output[i, j] = total / weight if weights[i, j] > 0.5 else 0
    return output, weights


@pytest.mark.parametrize(
    "shape, scale, angle, flip, size",
    [
        ((16, 16), (1.0, 1.0), 0, (1, 1), 16),  # unshrunk
        ((9, 13), (0.4, 0.5), 33, (-1, 1), 11),  # enlarged
        ((17, 23), (1.0, 0.9), 200, (1, -1), 14),  # level 0, one sample in tiles of 14
        ((31, 26), (1.0, 0.8), -75, (-1, -1), 9),  # level 1, odd sides
        ((35, 41), (0.9, 1.0), 117, (1, 1), 8),  # level 1 and 2
        ((37, 33), (1.0, 1.0), 12, (1, -1), 5),  # level 2 or 3, odd sides halved
        ((45, 51), (1.0, 1.0), 71, (1, 1), 4),  # level 4
    ],
)
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_matches_definition(shape, scale, angle, flip, size, missing):
    values, valid = random_map(*shape, missing)
    matrix = affine(shape, (shape[1] * 0.55, shape[0] * 0.48), scale, angle, flip)
    expected, weights = slow_crop(values, valid, matrix, size)
    decided = abs(weights - 0.5) > 1e-4  # there float32 may fall on either side
    assert decided.mean() > 0.8
    np.testing.assert_allclose(crop(values, valid, matrix, size)[decided], expected[decided], rtol=0, atol=2e-4)


def test_every_level_and_its_bytes_are_exact_sums():
    values = np.ones((1, 300, 219), np.float32)
    pyramid = Pyramid(torch.from_numpy(values), torch.ones(1, 300, 219, dtype=torch.bool))
    for index in range(10):
        total, weight = pyramid.level(index)
        assert torch.equal(total, weight)
        assert weight.max() == 4 ** ((index + 1) // 2)


def test_holes_never_enter_values():
    valid = GENERATOR.random((90, 120)) > 0.3
    valid[30:50, 40:70] = False
    values = np.where(valid, 1, GENERATOR.choice([-1e6, 1e6], valid.shape)).astype(np.float32)
    affines = np.stack([affine(valid.shape, None, (s, s), a) for s in (0.2, 0.6, 1.0) for a in (0, 17, 90, 211)])[None]
    result = resample(torch.from_numpy(values)[None], torch.from_numpy(valid)[None], affines, 28)
    kept = result != 0
    assert 0.2 < kept.float().mean() < 0.95
    torch.testing.assert_close(result[kept], torch.ones_like(result[kept]), rtol=0, atol=3e-7)


def test_values_never_enter_holes():
    values, valid = np.ones((100, 100), np.float32), np.ones((100, 100), bool)
    valid[30:70, 30:70] = False
    for angle in (0, 30, 45):
        result = crop(values, valid, affine(valid.shape, angle=angle), 40)
        turned = math.cos(math.radians(angle)) + math.sin(math.radians(angle))
        inside = math.floor(8 / turned) - 1  # half the side, in crop pixels, of what surely lies in the hole
        assert not result[20 - inside : 20 + inside, 20 - inside : 20 + inside].any()
    straight = crop(values, valid, affine(valid.shape), 50)
    assert not straight[15:35, 15:35].any() and straight[:15].all() and straight[35:].all()


def test_outside_is_missing():
    values, valid = np.ones((40, 60), np.float32), np.ones((40, 60), bool)
    assert not crop(values, valid, affine((40, 60), (200.0, 20.0)), 14).any()
    half = crop(values, valid, affine((40, 60), (60.0, 20.0)), 20)
    assert (half[:, :10] == 1).all() and not half[:, 10:].any()


@pytest.mark.parametrize("size", [64, 128])
def test_identity_flips_and_quarter_turns_are_exact(size):
    values, valid = random_map(size, size)
    clean = np.where(valid, values, 0)
    np.testing.assert_array_equal(crop(values, valid, affine((size, size)), size), clean)
    np.testing.assert_array_equal(crop(values, valid, affine((size, size), flip=(-1, 1)), size), clean[:, ::-1])
    np.testing.assert_array_equal(crop(values, valid, affine((size, size), flip=(1, -1)), size), clean[::-1])
    for turns in (1, 2, 3):  # y points down: a positive angle turns x towards y, so the picture turns left
        result = crop(values, valid, affine((size, size), angle=90 * turns), size)
        np.testing.assert_array_equal(result, np.rot90(clean, turns))


def test_identity_of_any_size():
    values, valid = random_map(99, 99)
    result = crop(values, valid, affine((99, 99)), 99)
    np.testing.assert_array_equal(result != 0, valid)
    np.testing.assert_allclose(result, np.where(valid, values, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [2, 3, 4, 6])
@pytest.mark.parametrize("angle", [0, 45, 90, 20])
def test_shrinking_is_antialiased(factor, angle):
    board = (np.indices((240, 240)).sum(0) % 2).astype(np.float32)
    matrix = affine(board.shape, None, (0.6, 0.6), angle)
    result = crop(board, np.ones_like(board, bool), matrix, int(240 * 0.6 / factor))
    plain = slow_crop(board[:8, :8], np.ones((8, 8), bool), affine((8, 8), (4.2, 4.1), (0.5, 0.5), angle), 4)[0]
    assert np.ptp(plain) > 0.3  # unshrunk, the board is there
    np.testing.assert_allclose(result, 0.5, rtol=0, atol=1e-6)


def test_error_to_dense_supersampling():
    y, x = np.mgrid[0:300, 0:300] / 300
    values = (np.sin(9 * x) + np.cos(7 * x * y) + (np.hypot(x - 0.5, y - 0.5) < 0.3)).astype(np.float32)
    matrix = affine(values.shape, (150.0, 150.0), (0.6, 0.5), 33)
    u = (np.arange(60 * 12) + 0.5) / (60 * 12)
    column, row = (r[0] * u + r[1] * u[:, None] + r[2] - 0.5 for r in matrix)
    left, top = np.floor(column).astype(int), np.floor(row).astype(int)
    right, down = column - left, row - top
    above = values[top, left] * (1 - right) + values[top, left + 1] * right
    below = values[top + 1, left] * (1 - right) + values[top + 1, left + 1] * right
    dense = (above * (1 - down) + below * down).reshape(60, 12, 60, 12).mean((1, 3))
    error = np.sqrt(np.mean((crop(values, np.ones_like(values, bool), matrix, 60) - dense) ** 2))
    point = (above * (1 - down) + below * down)[6::12, 6::12]
    assert error < 0.011 < 3 * error < np.sqrt(np.mean((point - dense) ** 2))


def test_batch_equals_one_by_one():
    config = CropConfig(global_size=56, local_size=28, local_crops=6)
    maps = [random_map(150, 130) for _ in range(4)]
    affines = np.stack([draw_crops(valid, config, 3, position) for position, (_, valid) in enumerate(maps)])
    values, valid = (torch.from_numpy(np.stack(part)) for part in zip(*maps, strict=True))
    for size, part in ((56, affines[:, :2]), (28, affines[:, 2:])):
        together = resample(values, valid, part, size)
        assert together.dtype == torch.float32 and together.shape == (4, part.shape[1], 1, size, size)
        for index in range(4):
            alone = resample(values[index : index + 1], valid[index : index + 1], part[index : index + 1], size)
            assert torch.equal(alone[0], together[index])
            for k in range(part.shape[1]):
                single = part[index : index + 1, k : k + 1]
                one = resample(values[index : index + 1], valid[index : index + 1], single, size)
                assert torch.equal(one[0, 0], together[index, k])


def test_multi_crop_is_a_function_of_seed_and_position():
    config = CropConfig(global_size=28, local_size=14, local_crops=3)
    values, valid = random_map(70, 110)
    first, again = (multi_crop(values, valid, config, 5, 6) for _ in range(2))
    assert [tuple(crops.shape) for crops in first] == [(2, 1, 28, 28), (3, 1, 14, 14)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    expected = draw_crops(valid, config, 5, 6)
    for crops, part, size in zip(first, (expected[:2], expected[2:]), (28, 14), strict=True):
        tensors = torch.from_numpy(values)[None], torch.from_numpy(valid)[None]
        assert torch.equal(crops, resample(*tensors, part[None], size)[0])
    for seed, position in ((5, 7), (6, 6), (6, 5)):
        assert not np.allclose(draw_crops(valid, config, seed, position), expected)


def test_no_local_crops():
    config = CropConfig(global_size=28, local_crops=0)
    global_crops, local_crops = multi_crop(*random_map(50, 50), config, 0, 0)
    assert global_crops.shape == (2, 1, 28, 28) and local_crops.shape == (0, 1, 98, 98)


@pytest.mark.parametrize("shape", [(400, 400), (300, 420)])
def test_draws_follow_the_recipe(shape):
    config = CropConfig(rotation=120, horizontal_flip=0.3, vertical_flip=0.6, minimum_valid=0)
    affines = np.stack([draw_crops(np.ones(shape, bool), config, 1, position) for position in range(1200)])
    height, width = shape
    columns = np.linalg.norm(affines[..., :2], axis=-2)  # (maps, crops, 2): width and height of the box
    share, aspect = columns.prod(-1) / (height * width), columns[..., 0] / columns[..., 1]
    centre = affines[..., :2].mean(-1) + affines[..., 2]
    assert (columns[..., 0] <= width + 1e-9).all() and (columns[..., 1] <= height + 1e-9).all()
    for axis, side in enumerate((width, height)):
        assert (centre[..., axis] >= columns[..., axis] / 2 - 1e-9).all()
        assert (centre[..., axis] <= side - columns[..., axis] / 2 + 1e-9).all()
    # Local boxes always fit a map this square, so area and aspect are as drawn.
    local = share[:, 2:].ravel()
    assert local.min() >= 0.05 and local.max() <= 0.32 and abs(local.mean() - 0.185) < 0.003
    assert abs(np.log(aspect[:, 2:]).mean()) < 0.01 and abs(np.log(aspect[:, 2:]).std() - 0.166) < 0.005
    assert aspect.min() >= 0.75 - 1e-9 and aspect.max() <= 4 / 3 + 1e-9
    assert share[:, :2].min() >= 0.32 and share[:, :2].max() <= 1
    # One flip makes a mirror image; both are a half turn, so only the parity and the angle can be read back.
    mirrored = np.linalg.det(affines[..., :2]) < 0
    assert abs(mirrored.mean() - (0.3 * 0.4 + 0.7 * 0.6)) < 0.015
    angles = np.degrees(np.arctan2(affines[..., 1, 0], affines[..., 0, 0]))  # of u, plus 180 if flipped along u
    turned_back = (abs(angles) > 120 + 1e-9).mean()  # only flips get there: a flip leaves +-120 a third of the time
    assert abs(turned_back - 0.3 * 0.5) < 0.015


def test_draws_without_rotation_and_flips_are_upright():
    config = CropConfig(rotation=0, horizontal_flip=0, vertical_flip=0)
    affines = draw_crops(np.ones((80, 80), bool), config, 0, 0)
    assert not affines[:, 0, 1].any() and not affines[:, 1, 0].any()
    assert (affines[:, [0, 1], [0, 1]] > 0).all()


def test_crops_with_too_few_valid_pixels_are_redrawn():
    valid = np.zeros((300, 300), bool)
    valid[:110] = True
    values = np.ones(valid.shape, np.float32)

    def shares(minimum):
        config = CropConfig(global_size=28, local_size=28, minimum_valid=minimum)
        return np.concatenate([multi_crop(values, valid, config, 0, n)[1].mean((1, 2, 3)) for n in range(30)])

    before, after = shares(0), shares(0.5)
    assert (before < 0.4).mean() > 0.4
    assert (after < 0.4).mean() < 0.05


def test_best_draw_stays_when_none_is_valid_enough():
    valid = np.zeros((200, 200), bool)
    affines = draw_crops(valid, CropConfig(), 0, 0)
    assert np.isfinite(affines).all()
    valid[90:110, 90:110] = True
    loose, strict = (draw_crops(valid, CropConfig(minimum_valid=m), 0, 0) for m in (0.0, 1.0))
    middle = [np.linalg.norm(a[..., :2].mean(-1) + a[..., 2] - 100, axis=-1).mean() for a in (loose[2:], strict[2:])]
    assert middle[1] < middle[0]


@pytest.mark.parametrize("shape", [(30, 300), (300, 30)])
def test_elongated_maps(shape):
    affines = draw_crops(np.ones(shape, bool), CropConfig(), 0, 0)
    columns = np.linalg.norm(affines[:, :2, :2], axis=-2)
    aspect = columns[:, 0] / columns[:, 1]
    assert (columns[:, 0] <= shape[1] + 1e-9).all() and (columns[:, 1] <= shape[0] + 1e-9).all()
    assert aspect.min() >= 0.75 - 1e-9 and aspect.max() <= 4 / 3 + 1e-9


@pytest.mark.parametrize(
    "field, value",
    [
        ("global_size", 0),
        ("local_crops", -1),
        ("sizes", [(28, 14), (28, -14)]),
        ("local_scale", (0.5, 0.1)),
        ("global_scale", (0.5, 1.5)),
        ("aspect", (0.0, 1.0)),
        ("rotation", 181.0),
        ("vertical_flip", 1.5),
        ("minimum_valid", -0.1),
    ],
)
def test_impossible_recipes_are_refused(field, value):
    check_crops(CropConfig())
    with pytest.raises(ConfigError, match=f"crops.{field} .*got"):
        check_crops(CropConfig(**{field: value}))


def test_sides_are_multiples_of_the_patch():
    check_crops(CropConfig(sizes=[(518, 98)]), 14)
    for wrong in (CropConfig(global_size=225), CropConfig(local_size=90), CropConfig(sizes=[(448, 98), (448, 100)])):
        with pytest.raises(ConfigError, match="must be a multiple of model.patch_size 14, got (225|90|100)"):
            check_crops(wrong, 14)


def test_every_size_comes_as_often_and_is_a_function_of_the_step():
    config = CropConfig(sizes=[(448, 98), (518, 112)])
    drawn = [crops_of_step(config, 7, step) for step in range(3000)]
    shares = Counter((crops.global_size, crops.local_size) for crops in drawn)
    assert shares.keys() == {(224, 98), (448, 98), (518, 112)} and all(abs(n - 1000) < 100 for n in shares.values())
    assert drawn == [crops_of_step(config, 7, step) for step in range(3000)]
    assert drawn != [crops_of_step(config, 8, step) for step in range(3000)]
    assert drawn[0].rotation == config.rotation and crops_of_step(CropConfig(), 7, 3) == CropConfig()


def test_wrong_inputs_are_refused():
    values, valid = torch.zeros(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool)
    for wrong in ((values[0], valid[0]), (values, valid[:, 1:]), (values.double(), valid), (values, valid.float())):
        with pytest.raises(ValueError, match="must be"):
            Pyramid(*wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_matches_cpu():
    config = CropConfig(global_size=56, local_size=28)
    maps = [random_map(150, 130) for _ in range(3)]
    affines = np.stack([draw_crops(valid, config, 3, position) for position, (_, valid) in enumerate(maps)])
    values, valid = (torch.from_numpy(np.stack(part)) for part in zip(*maps, strict=True))
    here = resample(values, valid, affines, 56)
    there = resample(values.cuda(), valid.cuda(), affines, 56).cpu()
    differs = abs(here - there) > 1e-3  # a weight of one half may be decided either way
    assert differs.float().mean() < 1e-3


@pytest.mark.parametrize("height, width", [(32, 64), (64, 32), (64, 64)])
def test_fit_square_centres_the_map_in_missing_pixels(height, width):
    values = torch.rand(height, width) + 1
    square = fit_square(values, torch.ones(height, width, dtype=torch.bool), 64)[0]
    top, left = (64 - height) // 2, (64 - width) // 2
    inner = square[top : top + height, left : left + width]
    assert torch.allclose(inner, values, atol=1e-5)
    assert square.sum().item() == pytest.approx(inner.sum().item())


def test_partners_see_the_same_place():
    """A map that holds its own coordinates: the middle of a patch has them, and its partner has them inside."""
    config, grid, side = CropConfig(global_size=98, global_scale=(0.2, 0.6), local_crops=1), 7, 120
    valid = np.ones((side, side), bool)
    found = 0
    for position in range(6):
        affines = draw_crops(valid, config, 3, position)
        ours = partners(affines, grid)
        assert ours.shape == (2, grid * grid)
        for crop in range(2):
            own, other = affines[crop], affines[1 - crop]
            inverse = np.linalg.inv(np.vstack([other, [0, 0, 1]]))
            for patch in range(grid * grid):
                row, column = divmod(patch, grid)
                u, v, _ = inverse @ [*(own @ [(column + 0.5) / grid, (row + 0.5) / grid, 1]), 1]
                inside = 0 <= u < 1 and 0 <= v < 1
                assert ours[crop, patch] == (int(v * grid) * grid + int(u * grid) if inside else -1)
                found += inside
    assert 100 < found < 500
    assert np.array_equal(partners(affines[[0, 0]], grid), [np.arange(49)] * 2)
