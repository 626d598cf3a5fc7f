"""Depth in, right features out, or an error: the graph of the normalisation, and transformers with an export."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import depth_scene
from PIL import Image
from transformers import AutoImageProcessor, BitImageProcessor, pipeline

from dino_depth.depth import DepthMap, Normalization, fit_plane, normalize
from dino_depth.depth_graph import GraphNormalization
from dino_depth.encoder import SHIPPED, load_encoder
from dino_depth.errors import ConfigError, DataError
from dino_depth.image_processor import DepthImageProcessor
from dino_depth.transformers_hooks import processor_config

ROOT = Path(__file__).resolve().parents[1]


def room(index: int, side: int) -> np.ndarray:
    """Metres: three to five walls beside each other, noise, and a third of the pixels missing."""
    random = np.random.default_rng(index)
    rows, columns = np.mgrid[:side, :side] / side
    count = 3 + index % 3
    a, b, c = random.uniform([[-0.4], [-0.4], [0.6]], [[0.4], [0.4], [1]], (3, count))
    wall = (rows * count).astype(int)
    depth = 1 / (a[wall] * columns + b[wall] * rows + c[wall]) * (1 + random.normal(0, 2e-3, rows.shape))
    return np.where(random.random(rows.shape) < 0.3, 0, depth).astype(np.float32)


def line(side: int) -> np.ndarray:
    depth = np.zeros((side, side), np.float32)
    depth[side // 8 * 4] = np.linspace(0.4, 0.6, side)
    return depth


METHODS = [Normalization(method) for method in ("plane", "minmax", "log", "max")]
METHODS += [Normalization(formula=1), Normalization(plane_support=0.0), Normalization(plane_support=0.45)]


@pytest.mark.parametrize(("side", "normalization"), [(154, METHODS[0]), *((42, each) for each in METHODS)])
def test_the_graph_is_the_normalisation(normalization, side):
    """To the last bits, on parts, on rooms whose planes compete, and where no plane exists."""
    maps = [depth_scene(index, side) for index in range(3)] + [room(index, side) for index in range(5)] + [line(side)]
    few = np.zeros((side, side), np.float32)
    few[:2, :3] = 0.5  # fewer than the thinned grid needs
    maps += [few, np.full((side, side), 0.7, np.float32)]
    supports = [fit_plane(DepthMap.from_values(each))[1] for each in maps]
    assert sum(0.2 < support < 0.4 for support in supports) > 1 and supports[-3] == 0 and supports[-1] == 1
    wanted = np.stack([normalize(DepthMap.from_values(each), normalization) for each in maps])
    depth = torch.from_numpy(np.stack(maps))[:, None]
    for missing in (-1.0, torch.nan):
        found = GraphNormalization(normalization, side)(torch.where(depth > 0, depth, missing))
        np.testing.assert_allclose(found[:, 0].numpy(), wanted, atol=2e-6, rtol=1e-6)


def test_the_graph_of_nothing_is_nothing():
    for normalization in METHODS:
        for missing in (0.0, torch.nan):
            found = GraphNormalization(normalization, 42)(torch.full((2, 1, 42, 42), missing))
            assert not found.any() and found.isfinite().all()


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("tiny")


@pytest.fixture(scope="module")
def processor():
    return AutoImageProcessor.from_pretrained(SHIPPED["tiny"])


def test_the_processor_is_prepare(encoder, processor, tmp_path):
    assert type(processor) is DepthImageProcessor and processor.size == encoder.size
    wide = depth_scene(4, 60)[:40]
    wide[3, :5] = [np.nan, np.inf, -1, -np.inf, 0]
    wanted = encoder.prepare(DepthMap.from_values(wide))
    np.save(tmp_path / "depth.npy", wide)
    Image.fromarray(wide).save(tmp_path / "depth.tiff")
    forms = [wide, torch.from_numpy(wide)[None], wide[..., None], wide.astype(np.float64), DepthMap.from_values(wide)]
    forms += [Image.fromarray(wide), tmp_path / "depth.npy", str(tmp_path / "depth.tiff")]
    values = processor(forms)["pixel_values"]
    assert values.shape == (len(forms), 1, encoder.size, encoder.size)
    for each in values:
        assert torch.equal(each, wanted)
    assert torch.equal(processor(wide, size={"height": 98, "width": 98})["pixel_values"][0],
                       encoder.prepare(DepthMap.from_values(wide), 98))  # fmt: skip


@pytest.mark.parametrize("unit, kind", [(0.001, np.uint16), (0.0001, np.uint16), (0.001, np.int32)])
def test_whole_numbers_are_millimetres_unless_told(encoder, processor, tmp_path, unit, kind):
    codes = np.round(np.nan_to_num(depth_scene(5)) / unit).astype(kind)
    valid = codes > 0
    codes[1, :4] = 65535  # no measurement
    valid[1, :4] = False
    wanted = encoder.prepare(DepthMap(np.where(valid, codes * unit, 0), valid))
    name = tmp_path / ("depth.png" if kind == np.uint16 else "depth.tiff")
    Image.fromarray(codes).save(name)
    options = {} if unit == 0.001 else {"metres_per_unit": unit}
    for form in (codes, name):
        assert torch.equal(processor(form, **options)["pixel_values"][0], wanted)


def test_what_is_no_depth_is_an_error(processor, tmp_path):
    depth = depth_scene(1)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no")
    for form, message in [
        (Image.new("RGB", (9, 9)), "a picture of mode RGB"),
        (Image.new("L", (9, 9), 7), "a picture of mode L"),
        (np.zeros((9, 9, 3), np.float32), r"\(9, 9, 3\) float32; depth is"),
        (np.stack([depth, depth]), "several maps are a list"),
        (np.ones((9, 9), np.uint8), "uint8"),
        (depth * 1000, "the median depth would be 4.*floats are metres"),
        ((depth * 100000).astype(np.uint16), "the median depth would be .*metres_per_unit"),
        (depth * 0, "all pixels are missing"),
        (tmp_path / "broken.png", "broken.png: unreadable depth"),
        (str(tmp_path / "none.npy"), "none.npy: unreadable depth"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            processor(form)
        assert "\n" not in str(caught.value)
    for options, message in [({"size": 0}, "size must be"), ({"metres_per_unit": 0}, "metres_per_unit must be")]:
        with pytest.raises(ConfigError, match=message):
            processor(depth, **options)


def test_the_pipeline_gives_the_encoders_features(encoder, tmp_path):
    extract = pipeline("image-feature-extraction", model=str(SHIPPED["tiny"]), return_tensors=True)
    codes = np.round(depth_scene(6) * 1000).astype(np.uint16)
    Image.fromarray(codes).save(tmp_path / "depth.png")
    metres = depth_scene(7, 70)
    expected = [encoder(encoder.prepare(DepthMap.from_values(each))[None]) for each in (metres, codes * 0.001)]
    found = [extract(metres), extract(str(tmp_path / "depth.png")), *extract([metres, str(tmp_path / "depth.png")])]
    for tokens, (classes, patches) in zip(found, expected * 2, strict=True):
        torch.testing.assert_close(tokens[:, 0], classes, atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens[:, 1:], patches.flatten(1, 2), atol=1e-5, rtol=0)


def test_other_repositories_are_left_alone(tmp_path):
    BitImageProcessor(size={"height": 30, "width": 30}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    found = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(found).__name__.startswith("BitImageProcessor")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8))
    assert found(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 28, 28)
    with pytest.raises(OSError, match="nothing"):
        AutoImageProcessor.from_pretrained(tmp_path / "nothing", local_files_only=True)


SCRIPT = """
import sys
from transformers import AutoImageProcessor, pipeline  # before dino_depth
for call in (lambda: AutoImageProcessor.from_pretrained(sys.argv[1], backend="torchvision"),
             lambda: AutoImageProcessor.from_pretrained(sys.argv[1], backend="pil"),
             lambda: pipeline("image-feature-extraction", model=sys.argv[2])):
    try:
        call()
    except ValueError as error:
        assert "pip install dino-depth and import dino_depth" in str(error) and "\\n" not in str(error), error
    else:
        raise SystemExit("taken")
assert "dino_depth" not in sys.modules
import dino_depth
print(type(AutoImageProcessor.from_pretrained(sys.argv[1])).__name__)
"""


def test_transformers_by_itself_refuses(processor, tmp_path):
    """Also a copy that the processor saved; after ``import dino_depth``, here behind transformers, it works."""
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved == processor_config(asdict(processor.normalization), processor.size)
    arguments = [sys.executable, "-c", SCRIPT, str(tmp_path), str(SHIPPED["tiny"])]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=offline)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DepthImageProcessor"]


def test_importing_the_package_imports_no_library():
    script = "import sys, dino_depth; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
