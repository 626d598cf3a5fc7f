"""Pseudo-depth: the model's files, its batches, disparity to depth, and flat images."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save_file

from data_prep import pseudo_depth
from data_prep.pseudo_depth import FlatDepth, PseudoDepthConfig, convert, estimate, resolve
from dino_depth.depth import DepthMap, decode_png, encode_png
from dino_depth.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[1]
SMALL = "depth-anything/Depth-Anything-V2-Small-hf"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(depth_anything) -> Path:
    return depth_anything


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def options(folder, **settings) -> PseudoDepthConfig:
    return PseudoDepthConfig(model=str(folder), device="cpu", **settings)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8: coloured patches."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 9 + 1, width // 9 + 1, 3), np.uint8)
    return coarse.repeat(9, 0).repeat(9, 1)[:height, :width]


def maps(config, images, names=None) -> list[np.ndarray]:
    results = estimate(resolve(config), config, images, names or [str(index) for index in range(len(images))])
    return [depth_map.depth for depth_map, _ in results]


def scene(height: int = 60, width: int = 80) -> np.ndarray:
    """Disparity of a dome and a box on a tilted plane, without noise."""
    rows, columns = np.mgrid[0:height, 0:width] / height
    dome = np.maximum(0.09 - (rows - 0.4) ** 2 - (columns - 0.5) ** 2, 0)
    return 1.5 + 0.1 * rows + 0.05 * columns + 2 * dome + 0.1 * ((abs(rows - 0.8) < 0.1) & (columns > 0.9))


# Disparity to depth


def by_hand(disparity: np.ndarray, conversion: str, nearest: float, clip: tuple[float, float]) -> np.ndarray:
    """The two equations, value by value in Python's floats, with percentiles by linear interpolation of ranks."""
    ordered = sorted(disparity.ravel().tolist())

    def percentile(share: float) -> float:
        place = share / 100 * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    low, high = percentile(clip[0]), percentile(clip[1])
    depth = []
    for value in disparity.ravel().tolist():
        n = min(max((value - low) / (high - low), 0.0), 1.0)
        if conversion == "linear":
            depth.append(nearest + (1 - n) * (1 - nearest))
        else:
            depth.append(1 / (n * (1 / nearest - 1 / 1.0) + 1 / 1.0))
    return np.array(depth).reshape(disparity.shape)


@pytest.mark.parametrize("conversion", ["linear", "inverse"])
@pytest.mark.parametrize("nearest", [0.9, 0.25])
@pytest.mark.parametrize("clip", [(0.5, 99.5), (0.0, 100.0)])
def test_conversion_equals_its_equation_is_monotone_and_ends_exactly(conversion, nearest, clip):
    disparity = (scene() + np.random.default_rng(0).normal(0, 0.02, (60, 80))).astype(np.float32)
    depth_map, record = convert(disparity, PseudoDepthConfig(conversion=conversion, nearest=nearest, clip=clip))
    assert depth_map.kind == "relative" and depth_map.valid.all()
    assert np.allclose(depth_map.depth, by_hand(disparity, conversion, nearest, clip), rtol=1e-7, atol=0)
    assert depth_map.depth.min() == np.float32(nearest) and depth_map.depth.max() == 1
    order = np.argsort(disparity, axis=None)
    assert (np.diff(depth_map.depth.ravel()[order]) <= 0).all()
    assert record["disparity"]["minimum"] == disparity.min() and record["disparity"]["maximum"] == disparity.max()


@pytest.mark.parametrize("conversion", ["linear", "inverse"])
def test_raw_disparity_comes_back_from_depth_and_record(conversion):
    disparity = scene().astype(np.float32)
    depth_map, record = convert(disparity, PseudoDepthConfig(conversion=conversion, nearest=0.6))
    record = json.loads(json.dumps(record))
    low, high = record["disparity"]["low"], record["disparity"]["high"]
    inside = (disparity >= low) & (disparity <= high)
    assert 0.98 < inside.mean() < 1
    stored = decode_png(*encode_png(depth_map), "relative")
    for depth, tolerance in ((depth_map.depth, 1e-6), (stored.depth, 2e-5)):
        z, nearest = depth.astype(np.float64), record["nearest"]
        n = {"linear": (1 - z) / (1 - nearest), "inverse": (1 / z - 1) / (1 / nearest - 1)}[record["conversion"]]
        assert np.allclose((low + n * (high - low))[inside], disparity[inside], rtol=0, atol=tolerance * (high - low))


def test_inverse_keeps_a_plane_in_space_and_linear_a_ramp():
    rows, columns = np.mgrid[0:60, 0:80] / 60
    ramp = 3 + rows + 0.5 * columns
    points = np.stack([np.ones(ramp.size), rows.ravel(), columns.ravel()], 1)
    for conversion, straight in (("linear", lambda z: z), ("inverse", lambda z: 1 / z)):
        config = PseudoDepthConfig(conversion=conversion, nearest=0.5, clip=(0.0, 100.0), minimum_relief=0.0)
        values = straight(convert(ramp, config)[0].depth.astype(np.float64)).ravel()
        fit = points @ np.linalg.lstsq(points, values, rcond=None)[0]
        assert abs(values - fit).max() < 1e-6


def test_conversions_nearly_coincide_for_shallow_relief():
    linear, inverse = (
        convert(scene(), PseudoDepthConfig(conversion=conversion))[0].depth for conversion in ("linear", "inverse")
    )
    assert 0.002 < abs(linear - inverse).max() < 0.003


# Flat images


def test_relief_equals_a_least_squares_fit_and_ignores_scale_and_ramps():
    disparity = scene()
    rows, columns = np.mgrid[0:60, 0:80]
    points = np.stack([np.ones(disparity.size), rows.ravel(), columns.ravel()], 1)
    everything = PseudoDepthConfig(clip=(0.0, 100.0), minimum_relief=0.0)
    left = disparity.ravel() - points @ np.linalg.lstsq(points, disparity.ravel(), rcond=None)[0]
    relief = convert(disparity, everything)[1]["relief"]
    assert relief == pytest.approx(np.ptp(left) / disparity.max(), rel=1e-9)
    assert convert(7 * disparity, everything)[1]["relief"] == pytest.approx(relief, rel=1e-9)
    ramped = disparity + 0.01 * rows - 0.02 * columns
    assert convert(ramped, everything)[1]["relief"] * ramped.max() == pytest.approx(np.ptp(left), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_ramps_with_noise_are_flat_and_objects_are_not(scale):
    rows, columns = np.mgrid[0:60, 0:80] / 60
    noise = np.random.default_rng(0).normal(0, 0.002, rows.shape)
    with pytest.raises(FlatDepth, match=r"relief 0\.00\d+ off its plane, pseudo_depth.minimum_relief is 0.02"):
        convert(scale * (1.5 + rows + 0.5 * columns + noise), PseudoDepthConfig())
    with pytest.raises(FlatDepth):
        convert(scale * (1.5 + noise), PseudoDepthConfig())
    assert convert(scale * (scene() + noise), PseudoDepthConfig())[1]["relief"] > 0.05
    convert(scale * (1.5 + noise), PseudoDepthConfig(minimum_relief=0.0))


@pytest.mark.parametrize("value", [0.0, 2.5, -1.0])
def test_constant_disparity_is_flat_whatever_the_limit(value):
    disparity = np.full((60, 80), value, np.float32)
    disparity[0, :3] += 1  # fewer than the percentiles cut off
    with pytest.raises(FlatDepth, match="relief 0.0000"):
        convert(disparity, PseudoDepthConfig(minimum_relief=0.0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_disparity_that_is_not_finite_is_an_error_but_not_flat(value):
    disparity = scene()
    disparity[3, 4:6] = value
    with pytest.raises(DataError, match="2 pixels is NaN or infinite") as raised:
        convert(disparity, PseudoDepthConfig(minimum_relief=0.0))
    assert not isinstance(raised.value, FlatDepth)


# Holes


def test_holes_have_their_share_follow_the_name_and_seek_edges():
    disparity = scene()
    whole = convert(disparity, PseudoDepthConfig(), "a")[0]
    holed, again, other = (convert(disparity, PseudoDepthConfig(holes=0.1), name)[0] for name in ("a", "a", "b"))
    assert (~holed.valid).mean() == pytest.approx(0.1, abs=1e-3)
    assert np.array_equal(holed.valid, again.valid) and not np.array_equal(holed.valid, other.valid)
    assert np.array_equal(holed.depth[holed.valid], whole.depth[holed.valid])
    jump = np.hypot(*np.gradient(whole.depth))
    edges = jump >= np.percentile(jump, 98)
    assert (~holed.valid)[edges].mean() > 5 * (~holed.valid)[~edges].mean()


# The model's files


def test_a_local_folder_is_named_by_its_weights(folder, copy):
    model = resolve(options(folder))
    assert model.identity == "tiny-hf" and model.revision.startswith("sha256:") and len(model.revision) == 71
    assert model.licence == "apache-2.0" and model.device == "cpu" and model.folder == folder
    assert model.versions["torch"] == torch.__version__ and hash(model)
    (copy / "README.md").unlink()
    tensors = load((copy / "model.safetensors").read_bytes())
    tensors["head.conv3.bias"] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    changed = resolve(options(copy))
    assert changed.revision != model.revision and changed.licence == "unstated, see the model's card"


def rewrite(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def break_weights(folder: Path, change):
    tensors = load((folder / "model.safetensors").read_bytes())
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def only_pickles(folder: Path):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("damage", "error", "reason"),
    [
        (lambda f: rewrite(f / "config.json", architectures=["DPTModel"]), ConfigError, "architectures is"),
        (lambda f: rewrite(f / "config.json", depth_estimation_type="metric"), ConfigError, "put out disparity"),
        (lambda f: rewrite(f / "preprocessor_config.json", image_processor_type="ViTImageProcessor"), ConfigError,
         "image_processor_type is ViT"),
        (lambda f: (f / "model.safetensors").unlink(), ConfigError, "no model.safetensors in it$"),
        (only_pickles, ConfigError, r"no model.safetensors in it; pickled weights \(\*.bin\) are not read"),
        (lambda f: (f / "preprocessor_config.json").unlink(), ConfigError, "no preprocessor_config.json"),
        (lambda f: (f / "config.json").write_text("{"), DataError, "config.json: unreadable"),
        (lambda f: (f / "config.json").write_text("[]"), DataError, "must hold keys and values, got list"),
        (cut, DataError, "cannot be loaded: SafetensorError"),
        (lambda f: rewrite(f / "config.json", backbone_config={"model_type": "x"}), DataError, "cannot be loaded"),
        (lambda f: rewrite(f / "config.json", head_hidden_size=9), DataError, "mismatched_keys.*head.conv2"),
        (lambda f: break_weights(f, lambda t: t.pop("head.conv3.bias")), DataError, "missing_keys.*head.conv3.bias"),
        (lambda f: break_weights(f, lambda t: t.update(extra=torch.zeros(2))), DataError, "unexpected_keys.*extra"),
    ],
)  # fmt: skip
def test_unusable_folders_are_one_line(copy, damage, error, reason):
    damage(copy)
    with pytest.raises(error, match=reason) as raised:
        resolve(options(copy))
    assert str(copy) in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 600


@pytest.mark.parametrize(
    "settings",
    [{"batch": -1}, {"threads": 0}, {"nearest": 0.0}, {"nearest": 1.0}, {"clip": (1.0, 1.0)}, {"clip": (-1.0, 99.0)},
     {"minimum_relief": 1.0}, {"holes": 0.6}, {"revision": "main"}],
)  # fmt: skip
def test_values_out_of_range_name_their_key(folder, settings):
    with pytest.raises(ConfigError, match=f"pseudo_depth.{next(iter(settings))}"):
        resolve(options(folder, **settings))


def test_a_folder_that_is_absent_is_no_hub_id(tmp_path):
    with pytest.raises(ConfigError, match="absent: neither a folder nor a Hub id"):
        resolve(options(tmp_path / "absent"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_is_refused_where_there_is_none(folder):
    model = resolve(PseudoDepthConfig(model=str(folder)))
    assert model.device == "cpu" and pseudo_depth.processes(model) == 0
    with pytest.raises(ConfigError, match="torch sees no CUDA device"):
        resolve(PseudoDepthConfig(model=str(folder), device="cuda"))


# The Hub


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


RESOLVE = """
import time
from dino_depth.errors import ConfigError
from data_prep.pseudo_depth import PseudoDepthConfig, resolve
start = time.time()
try:
    for revision in {revisions!r}:
        print(resolve(PseudoDepthConfig(model={model!r}, revision=revision, device="cpu")).revision)
except ConfigError as error:
    print(error)
assert time.time() - start < 30
"""


@pytest.mark.parametrize("network", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_without_network_one_line_says_how_to_point_at_a_folder(tmp_path, network):
    ended = run_python(RESOLVE.format(model=SMALL, revisions=[""]), HF_HOME=str(tmp_path), **network)
    assert ended.returncode == 0 and ended.stderr == ""
    assert ended.stdout.count("\n") == 1 and "--pseudo_depth.model FOLDER" in ended.stdout
    pinned = pseudo_depth.COMMITS[SMALL]
    assert f"hf download {SMALL} --revision {pinned} --local-dir FOLDER" in ended.stdout


class Hub(BaseHTTPRequestHandler):
    """The few answers of the Hub that a download takes."""

    folder: Path

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0]
        files = sorted(self.folder.iterdir())
        if path.startswith("/api/models/someone/tiny-hf/revision/"):
            body = {"id": "someone/tiny-hf", "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            content = json.dumps(body).encode()
        elif path.startswith("/api/models/someone/tiny-hf/tree/"):
            rows = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40} for file in files]
            content = json.dumps(rows).encode()
        elif path.startswith(f"/someone/tiny-hf/resolve/{COMMIT}/") and (self.folder / Path(path).name).is_file():
            content = (self.folder / Path(path).name).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{len(content):040x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def test_a_branch_becomes_a_commit_that_is_found_again_without_network(folder, tmp_path):
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Here", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        home = {"HF_HOME": str(tmp_path)}
        code = RESOLVE.format(model="someone/tiny-hf", revisions=["main"])
        online = run_python(code, HF_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}", **home)
    finally:
        server.shutdown()
        (folder / "pytorch_model.bin").unlink()
    assert online.stdout == f"{COMMIT}\n", online.stderr
    assert not list(tmp_path.rglob("*.bin"))
    code = RESOLVE.format(model="someone/tiny-hf", revisions=["main", COMMIT])
    offline = run_python(code, HF_ENDPOINT="http://127.0.0.1:9", **home)
    assert (offline.stdout, offline.stderr) == (f"{COMMIT}\n" * 2, "")


# Images to maps

SIZES = [(90, 120), (120, 90), (91, 121), (100, 100), (90, 120), (57, 33), (91, 121), (70, 70), (15, 14)]


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    return [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]


def test_results_have_the_images_order_and_sizes(folder, images):
    depths = maps(options(folder, minimum_relief=0.0), images)
    assert [depth.shape for depth in depths] == SIZES
    backwards = maps(options(folder, minimum_relief=0.0), images[::-1])
    assert all(np.array_equal(one, other) for one, other in zip(depths, backwards[::-1], strict=True))


@pytest.mark.parametrize("batch", [2, 16])
def test_batches_repeat_exactly_and_equal_single_images_to_float32(folder, images, batch):
    config = options(folder, minimum_relief=0.0, batch=batch)
    batched, again, single = maps(config, images), maps(config, images), maps(replace(config, batch=1), images)
    for one, two, three in zip(batched, again, single, strict=True):
        assert np.array_equal(one, two)
        assert abs(one - three).max() < 1e-5


def test_disparity_equals_the_pipeline_of_transformers(folder, images):
    import transformers

    pil = getattr(transformers, "DPTImageProcessorPil", None) or transformers.DPTImageProcessor  # its name before
    processor = pil.from_pretrained(folder)
    theirs = transformers.pipeline("depth-estimation", model=str(folder), image_processor=processor, device="cpu")
    config = options(folder, minimum_relief=0.0, clip=(0.0, 100.0))
    results = estimate(resolve(config), config, images, [""] * len(images))
    for image, (depth_map, record) in zip(images, results, strict=True):
        expected = theirs(Image.fromarray(image))["predicted_depth"].numpy()
        assert record["disparity"]["minimum"] == pytest.approx(expected.min(), abs=1e-6)
        assert record["disparity"]["maximum"] == pytest.approx(expected.max(), abs=1e-6)
        assert np.allclose(depth_map.depth, convert(expected, config)[0].depth, rtol=0, atol=1e-6)


def test_the_record_says_what_made_a_map(folder, images):
    config = options(folder, minimum_relief=0.0)
    (_, record), *_ = estimate(resolve(config), config, images[:1], ["a"])
    record = json.loads(json.dumps(record))
    assert record["model"] == "tiny-hf" and record["revision"] == resolve(config).revision
    assert (record["processor"], record["dtype"], record["device"]) == ("pil", "float32", "cpu")
    assert (record["conversion"], record["nearest"], record["clip"]) == ("linear", 0.9, [0.5, 99.5])
    assert set(record) - {"model", "revision", "processor", "dtype", "device", "conversion", "nearest", "clip"} == {
        "disparity", "relief", "holes",
    }  # fmt: skip


def test_one_unusable_image_leaves_the_others_alone(copy, images):
    grey = np.full((80, 80, 3), 128, np.uint8)
    narrow = np.zeros((10, 300, 3), np.uint8)
    config = options(copy, minimum_relief=0.0, batch=4)
    first, flat, refused, last = estimate(resolve(config), config, [images[0], grey, narrow, images[3]], list("abcd"))
    assert isinstance(flat[0], DepthMap)  # random weights see relief even here
    assert isinstance(refused, DataError) and "image of 300x10 is too narrow" in str(refused)
    assert first[0].depth.shape == images[0].shape[:2] and last[0].depth.shape == images[3].shape[:2]

    break_weights(copy, lambda tensors: tensors["head.conv3.weight"].zero_())
    results = estimate(resolve(config), config, [images[0], grey], ["a", "b"])
    assert all(isinstance(result, FlatDepth) for result in results)


def test_bfloat16_is_close_and_its_disparity_keeps_float32_steps(folder):
    image = picture(70, 70)
    single, half = (
        estimate(resolve(config), config, [image], ["a"])[0]
        for config in (options(folder, minimum_relief=0.0, precision=precision) for precision in ("fp32", "bf16"))
    )
    assert half[1]["dtype"] == "bfloat16"
    difference = abs(single[0].depth - half[0].depth)
    assert 0 < difference.max() < 0.03 and difference.mean() < 0.003
    # Of 4,900 values in bfloat16 at most a few hundred would differ.
    assert len(np.unique(half[0].depth)) > 0.9 * len(np.unique(single[0].depth))


def test_a_quiet_run_and_an_import_without_torch(folder):
    code = f"""
import sys
import numpy as np
from data_prep.pseudo_depth import PseudoDepthConfig, estimate, resolve
assert not {{"torch", "transformers", "huggingface_hub"}} & sys.modules.keys()
config = PseudoDepthConfig(model={str(folder)!r}, device="cpu", threads=2, minimum_relief=0.0)
image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
print(estimate(resolve(config), config, [image], ["a"])[0][0].depth.shape)
import torch
assert torch.get_num_threads() == 2
"""
    ended = run_python(code)
    assert (ended.stdout, ended.stderr) == ("(40, 50)\n", "")
