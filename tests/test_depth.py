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
    code_depth,
    coding_step,
    decode,
    decode_png,
    encode,
    encode_png,
    fit_plane,
    fit_plane_of_codes,
    normalize,
    plane_share,
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


@pytest.mark.parametrize("shape", [(1, 1), (9, 7)])
@pytest.mark.parametrize("spread", [1e-6, 0.1, 10.0, 1e4, 1e12])
def test_inverse_codes_are_within_half_a_step_and_finer_near_by(shape, spread):
    values = 0.4 * (1 + spread) ** np.random.default_rng(0).random(shape)
    values.flat[0] = 0 if values.size > 1 else values.flat[0]
    depth_map = DepthMap.from_values(values)
    depth = depth_map.depth.astype(np.float64)
    png, near, far = encode_png(depth_map, "inverse")
    back = decode_png(png, near, far, coding="inverse")
    assert np.array_equal(back.valid, depth_map.valid)
    inverse = np.abs(1 / back.depth[back.valid].astype(np.float64) - 1 / depth[back.valid])
    rounding = 2 * np.finfo(np.float32).eps / depth[back.valid]
    assert (inverse <= (1 / near - 1 / far) / 65534 / 2 * 1.0001 + rounding).all()
    # The codes of the slow rule, in float64.
    place = (1 / near - 1 / np.where(back.valid, depth, near)) / ((1 / near - 1 / far) / 65534 or 1.0)
    assert np.array_equal(read_codes(png), np.where(back.valid, np.rint(place) + 1, 0))
    if far < 1.5 * near:
        return
    if spread >= 10:
        assert coding_step(near, near, far, "inverse") < coding_step(near, near, far) / 5
    measured = np.diff(code_depth(np.array([30000, 30001]), near, far, "inverse"))[0]
    middle = float(code_depth(30000, near, far, "inverse"))
    assert measured == pytest.approx(coding_step(middle, near, far, "inverse"), rel=2e-3, abs=1e-12)
    assert np.diff(code_depth(np.array([7, 8]), near, far))[0] == pytest.approx(coding_step(1.0, near, far), rel=1e-6)


def test_an_unknown_coding_is_refused():
    with pytest.raises(DataError, match="coding must be one of linear, inverse, got 'cubic'"):
        decode(np.ones((2, 2), np.uint16), 1.0, 2.0, coding="cubic")


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
    assert np.median(value[20:40, 25:50]) == pytest.approx(2 * math.asinh(1 / 2), abs=within / 0.03)


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
    for formula, curve in ((1, expected), (2, 2 * np.arcsinh(expected / 2))):
        value = normalize(depth_map, Normalization("plane", formula=formula))
        assert np.allclose(value[depth_map.valid], curve[depth_map.valid], atol=1e-4)


@pytest.mark.parametrize("coding", ["linear", "inverse"])
@pytest.mark.parametrize("kind", ["metric", "relative"])
@pytest.mark.parametrize("size", [(60, 80), (150, 131), (320, 400), (1, 2), (5, 4)])
def test_the_plane_of_codes_is_that_of_the_decoded_map(monkeypatch, size, kind, coding):
    """Bit for bit, as is what the network sees by it; the fit is not made twice."""
    random = np.random.default_rng(size)
    values = 1 / (0.2 * np.linspace(0, 1, size[1]) + 2 + np.zeros(size)) + random.normal(0, 1e-4, size)
    values[random.random(size) < 0.2] += 0.03
    values[random.random(size) < 0.1] = 0
    values[0, 0] = 0.5
    codes, near, far = encode(DepthMap.from_values(values, kind), coding)
    decoded = decode(codes, near, far, kind, coding)
    plane, share = fit_plane_of_codes(codes, near, far, kind, coding)
    wanted = fit_plane(decoded)
    assert np.array_equal(plane, wanted[0]) and plane.dtype == np.float32 and share == wanted[1]
    assert plane_share(decoded, plane) == pytest.approx(share, abs=2e-3)
    expected = normalize(decoded, Normalization())
    monkeypatch.setattr("dino_depth.depth.fit_plane", None)
    known = decode(codes, near, far, kind, coding, (plane, share))
    assert np.array_equal(normalize(known, Normalization()), expected)


def plane_by_hand(depth_map, formula, start=0.2, scale=0.05):
    """Both formulas of ``plane``, pixel by pixel in float64."""
    (a, b, c), support = fit_plane(depth_map)
    median = float(np.median(depth_map.depth[depth_map.valid]))
    metric, longer = depth_map.kind == "metric", max(depth_map.depth.shape)
    unit = scale if metric else 0.1 * median
    share = min(max((support - start) / start, 0), 1) if formula == 2 else float(support >= start)
    value = np.zeros(depth_map.depth.shape)
    for row, column in np.argwhere(depth_map.valid):
        on_plane = float(a) * column / longer + float(b) * row / longer + float(c)
        if formula == 2:
            limits = (median / 4, median * 4)
            if metric:
                on_plane = 1 / on_plane if on_plane > 1 / limits[1] else limits[1]
            on_plane = min(max(on_plane, limits[0]), limits[1])
        elif metric:
            on_plane = 1 / max(on_plane, 1 / (10 * float(depth_map.depth.max())))
        height = (share * on_plane + (1 - share) * median - float(depth_map.depth[row, column])) / unit
        value[row, column] = 2 * math.asinh(height / 2) if formula == 2 else height
    return value


def steep(sign=1) -> DepthMap:
    """A floor that meets its horizon inside the picture; above it, a wall at 3 m."""
    rows = np.mgrid[0:60, 0:60][0][::sign] / 60
    inverse = 2.6 * rows - 0.6
    return DepthMap.from_values(np.where(inverse > 0.5, 1 / np.maximum(inverse, 0.5), 3.0))


@pytest.mark.parametrize("formula", [1, 2])
@pytest.mark.parametrize("kind", ["metric", "relative"])
@pytest.mark.parametrize("name", ["box", "steep", "fading"])
def test_plane_is_its_formula(name, kind, formula):
    depth_map = {"box": scene, "steep": steep, "fading": lambda: fading(0.3)}[name]()
    depth_map = DepthMap(depth_map.depth, depth_map.valid, kind)
    expected = plane_by_hand(depth_map, formula)
    value = normalize(depth_map, Normalization("plane", formula=formula))
    assert np.allclose(value, expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_beyond_the_horizon_the_reference_is_four_times_the_median_depth(sign):
    depth_map = steep(sign)
    (_, slope, offset), support = fit_plane(depth_map)
    assert support > 0.4 and min(offset, slope + offset) < 0
    median = float(np.median(depth_map.depth))
    value = normalize(depth_map, Normalization())
    beyond = value[::sign][:10]
    assert beyond == pytest.approx(2 * math.asinh((4 * median - 3) / 0.05 / 2), rel=1e-5)
    assert (
        np.abs(value).max() <= beyond.max() and normalize(depth_map, Normalization(formula=1)).max() > 20 * beyond.max()
    )


def test_a_relative_reference_is_bounded_on_both_sides():
    columns = np.mgrid[0:60, 0:60][1] / 60
    # Where the plane would be at -0.7, something stands at 0.5.
    depth_map = DepthMap(np.where(columns < 0.25, 0.5, 4 * columns - 0.7), np.ones((60, 60), bool), "relative")
    median = float(np.median(depth_map.depth))
    value = normalize(depth_map, Normalization())[:, 0]
    assert value == pytest.approx(2 * math.asinh((median / 4 - 0.5) / (0.1 * median) / 2), rel=1e-4)


def fading(share) -> DepthMap:
    """A tilted plane on the left ``share`` of the columns, and a rough ground whose pixels share no plane."""
    rows, columns = np.mgrid[0:120, 0:120] / 120
    rough = np.random.default_rng(0).uniform(0.5, 0.9, (120, 120))
    return DepthMap.from_values(np.where(columns < share, 1 / (2 - 0.6 * columns + 0.3 * rows), rough))


def test_nothing_jumps_while_a_plane_loses_its_support():
    shares = np.arange(12, 61) / 120
    maps = [fading(share) for share in shares]
    supports = [fit_plane(depth_map)[1] for depth_map in maps]
    assert min(supports) < 0.15 and max(supports) > 0.45
    jumps = {}
    for formula in (1, 2):
        inputs = [normalize(depth_map, Normalization(formula=formula)) for depth_map in maps]
        pairs = zip(maps, maps[1:], inputs, inputs[1:], strict=False)
        same = [(after - before)[one.depth == other.depth] for one, other, before, after in pairs]
        jumps[formula] = max(np.median(np.abs(change)) for change in same)
    assert jumps[2] < 0.12 < 1.0 < jumps[1]


def test_how_much_a_plane_counts():
    depth_map = fading(0.3)
    with_plane, without = (normalize(depth_map, Normalization(plane_support=start)) for start in (0.0, 1.0))
    support, median = fit_plane(depth_map)[1], np.median(depth_map.depth)
    assert np.allclose(without, 2 * np.arcsinh((median - depth_map.depth) / 0.1), atol=1e-4)
    assert np.median(np.abs(with_plane[:, :30])) < 1e-3
    for share in (0.1, 0.75):
        value = normalize(depth_map, Normalization(plane_support=support / (1 + share)))
        heights = [np.sinh(part / 2) for part in (with_plane, without, value)]
        assert np.allclose(heights[2], share * heights[0] + (1 - share) * heights[1], atol=1e-3)


def test_small_relief_passes_unchanged_and_large_distances_by_their_logarithm():
    depth = np.full((60, 60), 2.0)
    depth[:3, :3] -= 1e-4
    depth[40:, 40:] = 0.3
    value = normalize(DepthMap.from_values(depth), Normalization())
    assert value[0, 0] - value[0, 4] == pytest.approx(1e-4 / 0.05, rel=0.01)
    assert value[50, 50] == pytest.approx(2 * math.log(1.7 / 0.05), rel=1e-3)


def test_plane_fit_equals_the_plane():
    plane, support = fit_plane(scene())
    assert plane == pytest.approx([0.2, -0.1, 2.0], abs=1e-4)
    assert support == pytest.approx(1 - 20 * 25 / (60 * 80 - 35), abs=0.01)


@pytest.mark.parametrize("share, inside", [(0.8, True), (1.2, False)])
@pytest.mark.parametrize("kind", ["metric", "relative"])
def test_a_plane_holds_what_is_within_half_a_percent_of_the_median_depth(share, inside, kind):
    depth = np.full((60, 60), 0.7)
    # Scattered on both sides, so that no tilted plane comes close to all.
    places = np.random.default_rng(0).permutation(3600)[:180]
    depth.reshape(-1)[places] *= 1 + share * 0.005 * np.repeat([-1, 1], 90)
    depth_map = DepthMap(depth, np.ones((60, 60), bool), kind)
    assert fit_plane(depth_map)[1] == pytest.approx(1 if inside else 0.95, abs=1e-6)


@pytest.mark.parametrize("values", [np.ones((1, 1)), np.ones((1, 40)), np.ones((3, 3))])
def test_degenerate_maps_normalise(values):
    for method in METHODS:
        assert np.isfinite(normalize(DepthMap.from_values(values), Normalization(method))).all()


def test_unknown_method():
    with pytest.raises(DataError, match="unknown"):
        normalize(scene(), Normalization("zscore"))
