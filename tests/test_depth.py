"""The depth contract: codes, PNG and normalisations."""

import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from dino_depth.depth import (
    DepthMap,
    Normalization,
    decode,
    decode_png,
    encode,
    encode_png,
    fit_plane,
    normalize,
    read_codes,
)
from dino_depth.errors import DataError

METHODS = ("max", "minmax", "log", "plane")


def scene(height=60, width=80, noise=0.0, plane=True, scale=1.0) -> DepthMap:
    """A tilted pinhole plane with a box on it, and a hole."""
    rows, columns = np.mgrid[0:height, 0:width] / max(height, width)
    depth = 1 / (0.2 * columns - 0.1 * rows + 2.0) if plane else np.full((height, width), 0.5)
    depth[20:40, 25:50] -= 0.03
    depth += np.random.default_rng(0).normal(0, noise, depth.shape) if noise else 0
    depth[:5, :7] = 0
    return DepthMap.from_values(depth * scale)


@given(
    arrays.arrays(np.float32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.floats(0, 1e4, width=32)),
    st.sampled_from(["metric", "relative"]),
)
def test_round_trip_is_within_half_a_code(values, kind):
    if not (values > 0).any():
        with pytest.raises(DataError, match="all pixels are missing"):
            DepthMap.from_values(values)
        return
    depth_map = DepthMap.from_values(values, kind)
    png, near, far = encode_png(depth_map)
    near, far = json.loads(json.dumps([near, far]))
    back = decode_png(png, near, far, kind)
    assert (back.valid == (values > 0)).all() and back.kind == kind
    half_code = (far - near) / 65534 / 2
    rounding = np.spacing(np.float32(far))
    assert np.abs(back.depth.astype(np.float64) - depth_map.depth)[back.valid].max() <= half_code * 1.0001 + rounding


def test_codes_are_those_of_the_format():
    values = np.array([[0.0, 0.5, 1.0, 1.5]])
    codes, near, far = encode(DepthMap.from_values(values))
    assert codes.tolist() == [[0, 1, 32768, 65535]] and (near, far) == (0.5, 1.5)
    assert encode(DepthMap.from_values(np.array([[2.0, 2.0, 0.0]])))[0].tolist() == [[1, 1, 0]]


@pytest.mark.parametrize(
    "depth, valid, text",
    [
        (np.ones((2, 2)), np.ones((2, 3), bool), "same"),
        (np.ones((2, 2, 1)), np.ones((2, 2, 1), bool), "same"),
        (np.ones((2, 2)), np.ones((2, 2)), "bool"),
        (np.array([[1, np.nan]]), np.ones((1, 2), bool), "NaN"),
        (np.array([[1, -1.0]]), np.ones((1, 2), bool), "positive"),
        (np.array([[1, 1e300]]), np.ones((1, 2), bool), "float32"),
        (np.ones((2, 2)), np.zeros((2, 2), bool), "missing"),
    ],
)
def test_what_a_map_may_not_be(depth, valid, text):
    with pytest.raises(DataError, match=text):
        DepthMap(depth, valid)


def test_a_map_never_holds_what_was_invalid():
    depth_map = DepthMap(np.array([[np.nan, 7.0], [1.0, -3.0]]), np.array([[False, False], [True, False]]))
    assert depth_map.depth.tolist() == [[0, 0], [1, 0]]


def slow_map(depth, valid):
    """What DepthMap holds or raises, one rule after the other on the valid values alone."""
    if not valid.any():
        raise DataError("all pixels are missing")
    values = depth[valid]
    if not np.isfinite(values).all():
        raise DataError(f"{np.count_nonzero(~np.isfinite(values))} valid pixels are NaN or infinite")
    if values.min() <= 0:
        raise DataError(f"valid depth must be positive, smallest is {values.min()}")
    with np.errstate(over="ignore", under="ignore"):
        clean = np.where(valid, depth, 0).astype(np.float32)
    if not np.isfinite(clean).all() or clean[valid].min() <= 0:
        raise DataError(f"depth {values.min()}..{values.max()} does not fit float32")
    return clean


def slow_codes(depth, valid):
    values = depth[valid].astype(np.float64)
    near, far = float(values.min()), float(values.max())
    codes = np.zeros(depth.shape, np.uint16)
    codes[valid] = np.rint((values - near) / ((far - near) / 65534 or 1.0)).astype(np.uint16) + 1
    return codes, near, far


def outcome(function, *arguments):
    """The result of a call, or the text of its error."""
    try:
        return function(*arguments)
    except DataError as error:
        return str(error)


SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))
# Mostly what maps hold, so that not every example is an error; NaN, infinity, subnormals, what float32 cannot hold.
SOME_DEPTH = st.one_of(*[st.floats(0.125, 8, width=32)] * 8, st.floats(), st.sampled_from([1e-46, 3e-45, 1e300]))


@given(
    st.sampled_from([np.float32, np.float64, np.dtype(">f4"), np.int32, np.uint16]),
    SHAPES,
    st.sampled_from("CF"),
    st.data(),
)
@settings(max_examples=300, deadline=None)
def test_maps_and_codes_are_those_of_the_slow_rules(dtype, shape, order, data):
    elements = st.integers(0, 9) if np.dtype(dtype).kind in "iu" else SOME_DEPTH
    with np.errstate(over="ignore", under="ignore"):
        depth = np.array(data.draw(st.lists(elements, min_size=81, max_size=81))).astype(dtype)[: math.prod(shape)]
    depth = depth.reshape(shape, order=order)
    valid = data.draw(arrays.arrays(np.bool_, shape))
    if data.draw(st.booleans()):
        valid &= np.isfinite(depth) & (depth > 0)
    expected, before = outcome(slow_map, depth, valid), depth.copy(order)
    found = outcome(lambda: DepthMap(depth, valid))
    assert np.array_equal(depth, before, equal_nan=depth.dtype.kind == "f")
    if isinstance(expected, str):
        assert found == expected
    else:
        assert found.depth.dtype == np.float32 and found.depth.flags.c_contiguous
        assert np.array_equal(found.depth.view(np.uint32), expected.view(np.uint32)) and found.valid is valid
        assert not np.shares_memory(found.depth, depth)
        codes, near, far = encode(found)
        slow, *bounds = slow_codes(expected, valid)
        assert codes.dtype == np.uint16 and np.array_equal(codes, slow) and [near, far] == bounds
        assert np.array_equal(read_codes(encode_png(found)[0]), slow)


@pytest.mark.parametrize("seed", range(4))
def test_large_maps_and_codes_are_those_of_the_slow_rules(seed):
    random = np.random.default_rng(seed)
    values = random.normal(0.6, 0.02, random.integers(200, 400, 2)) * 10.0 ** random.integers(-9, 9)
    values[random.random(values.shape) < 0.3] = random.choice([0, np.nan, np.inf, -1])
    with np.errstate(invalid="ignore"):
        valid = np.isfinite(values) & (values > 0)
    depth_map = DepthMap.from_values(values)
    assert np.array_equal(depth_map.depth, slow_map(values, valid)) and np.array_equal(depth_map.valid, valid)
    codes, near, far = encode(depth_map)
    slow, *bounds = slow_codes(depth_map.depth, valid)
    assert np.array_equal(codes, slow) and [near, far] == bounds
    png, *bounds = encode_png(depth_map)
    assert np.array_equal(read_codes(png), slow) and [near, far] == bounds


@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (37, 41)])
def test_a_png_is_one_to_other_decoders_too(shape):
    imagecodecs = pytest.importorskip("imagecodecs")
    depth_map = DepthMap.from_values(np.random.default_rng(0).uniform(0, 1, shape) + 0.1)
    png, *_ = encode_png(depth_map)
    codes = encode(depth_map)[0]
    with Image.open(io.BytesIO(png)) as image:
        image.verify()
    assert np.array_equal(imagecodecs.png_decode(png), codes) and np.array_equal(read_codes(png), codes)


@pytest.mark.parametrize("noise, ratio", [(2e-4, 1.03), (2e-3, 1.01)])
def test_maps_take_no_more_room_than_a_png_librarys(noise, ratio):
    depth_map, peer = scene(400, 400, noise), io.BytesIO()
    Image.fromarray(encode(depth_map)[0]).save(peer, "png", compress_level=2)
    assert len(encode_png(depth_map)[0]) < ratio * len(peer.getvalue())


def test_bad_png_and_bad_bounds():
    png, near, far = encode_png(scene())
    for broken in (b"", b"nothing", png[: len(png) // 2]):
        with pytest.raises(DataError, match="unreadable"):
            decode_png(broken, near, far)
    eight_bit = io.BytesIO()
    Image.fromarray(np.zeros((3, 3), np.uint8)).save(eight_bit, "png")
    with pytest.raises(DataError, match="16-bit"):
        decode_png(eight_bit.getvalue(), near, far)
    for bounds in ((0.0, 1.0), (2.0, 1.0), (math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(DataError, match="near"):
            decode(np.ones((2, 2), np.uint16), *bounds)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_missing_pixels_are_zero_and_nearer_is_monotone(method, kind):
    depth_map = scene()
    depth_map = DepthMap(depth_map.depth, depth_map.valid, kind)
    value = normalize(depth_map, Normalization(method))
    assert value.dtype == np.float32 and np.isfinite(value).all()
    assert (value[~depth_map.valid] == 0).all()
    inside, outside = value[30, 30], value[30, 60]
    assert (inside > outside) == (method == "plane")


def test_formulas():
    depth_map = DepthMap.from_values(np.array([[0.0, 1.0, 2.0], [4.0, 2.0, 3.0]]))
    assert (
        normalize(depth_map, Normalization("max")).max() == 1
        and normalize(depth_map, Normalization("max"))[0, 1] == 0.25
    )
    assert normalize(depth_map, Normalization("minmax"))[0].tolist() == pytest.approx([0, 0.1, 0.4])
    assert normalize(depth_map, Normalization("log"))[1, 0] == pytest.approx(math.log(5) / math.log(101))


@pytest.mark.parametrize("noise, within", [(0.0, 1e-4), (2e-4, 2e-3)])
def test_plane_is_removed_at_a_metric_scale(noise, within):
    value = normalize(scene(noise=noise), Normalization("plane", scale=0.03))
    assert np.median(np.abs(value[45:, :])) < within / 0.03
    # The box stands 0.03 m above the plane.
    assert np.median(value[20:40, 25:50]) == pytest.approx(1, abs=within / 0.03)


def test_relative_maps_do_not_depend_on_their_unit():
    def relative(scale):
        tilted = scene(scale=scale)
        return normalize(DepthMap(tilted.depth, tilted.valid, "relative"), Normalization("plane"))

    assert np.allclose(relative(1.0), relative(37.0), atol=1e-3)


def test_without_a_supporting_plane_the_median_depth_is_the_reference():
    rows, columns = np.mgrid[-1:1:60j, -1:1:60j]
    ball = 1 - 0.3 * np.sqrt(np.clip(1 - rows**2 - columns**2, 0, None))
    ball[rows**2 + columns**2 >= 1] = 0
    depth_map = DepthMap.from_values(ball)
    assert fit_plane(depth_map)[1] < 0.2
    expected = (np.median(depth_map.depth[depth_map.valid]) - depth_map.depth) / 0.05
    assert np.allclose(
        normalize(depth_map, Normalization("plane"))[depth_map.valid], expected[depth_map.valid], atol=1e-4
    )


def test_plane_fit_equals_the_plane():
    plane, support = fit_plane(scene())
    assert plane == pytest.approx([0.2, -0.1, 2.0], abs=1e-4)
    assert support == pytest.approx(1 - 20 * 25 / (60 * 80 - 35), abs=0.01)


@pytest.mark.parametrize("values", [np.ones((1, 1)), np.ones((1, 40)), np.ones((3, 3))])
def test_degenerate_maps_normalise(values):
    for method in METHODS:
        assert np.isfinite(normalize(DepthMap.from_values(values), Normalization(method))).all()


def test_unknown_method():
    with pytest.raises(DataError, match="unknown"):
        normalize(scene(), Normalization("zscore"))
