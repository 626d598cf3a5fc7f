"""Frozen encoders and heads on a GPU that computes nothing, whose tensors' twins do; run by ``test_rehearsal.py``.

Each has to give on the GPU, bit for bit, what it gives on the CPU, since the twins are computed there: what differs is
taken from the wrong place.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rehearsal import GPU, rehearsing
from torch._subclasses.fake_tensor import FakeTensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_contract import CONTEXT, opened, views  # noqa: E402
from test_frozen import FAMILIES as TRANSFORMERS  # noqa: E402
from test_frozen import save_model  # noqa: E402

from dino_depth.anomaly import heads  # noqa: E402
from dino_depth.anomaly.heads import Context  # noqa: E402
from dino_depth.depth import DepthMap  # noqa: E402
from dino_depth.frozen import FAMILIES, load_frozen  # noqa: E402
from dino_depth.frozen.specs import parse_spec  # noqa: E402

SIDE = 64
# Name -> modality, side of its input. Weights do not matter.
ENCODERS = {
    "tiny": ("depth", 98),
    "random:dino-depth": ("depth", 56),
    "random:timm:test_vit": ("image", 64),
    "random:timm:resnet18?layers=1-2-3": ("image", 64),
    "random:timm:efficientnet_b0?blocks=4": ("image", 64),
    "random:lite0": ("image", 64),
    "random:defm:vit_s14": ("depth", 56),
    "raw-patches?patch=8": ("depth", 64),
    "surface?patch=8": ("depth", 64),
    "random:point-mae?samples=2&groups=16&neighbours=8": ("depth", 56),
}
# Of a family of their own: a folder of transformers, below, and what open3d computes on the CPU.
APART = {"transformers", "fpfh"}
# Where heads compute in float64.
EXACT = {
    "_statistics": "sums of squares over all pictures",
    "_scale": "a standard deviation of all cells",
}


def picture(modality: str) -> np.ndarray | DepthMap:
    if modality == "image":
        return np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    return DepthMap.from_values(np.linspace(0.5, 0.6, SIDE * SIDE, dtype=np.float32).reshape(SIDE, SIDE))


def compute_alike(load, modality: str, side: int):
    """Whatever the encoder of ``load(device)`` gives is the same on both devices; it waits for its input only."""
    given = {}
    for device in (torch.device("cpu"), GPU):
        with rehearsing(values=True) as gpu:
            encoder, given[device] = load(device), []
            pictures = torch.stack([encoder.prepare(picture(modality), side)] * 2).pin_memory()
            for output in ("encode", "class_and_patches", *(("layers",) if encoder.to_layers else ())):
                gpu.forget()
                found = getattr(encoder, output)(pictures)
                assert "point-mae" in encoder.name or sum(gpu.waits.values()) == (device == GPU)
                for part in found if isinstance(found, tuple) else [found]:
                    assert part.device == device and part.dtype == torch.float32
                    given[device].append(part.cpu())
    for expected, found in zip(*given.values(), strict=True):
        assert type(found) is torch.Tensor and found.isfinite().all() and torch.equal(found, expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_a_frozen_encoder_computes_on_the_gpu(name):
    modality, side = ENCODERS[name]
    compute_alike(lambda device: load_frozen(name, modality=modality, device=device), modality, side)


@pytest.mark.parametrize("family", ["dinov2", "registers", "dinov3"])
@pytest.mark.parametrize("modality", ["image", "depth"])
def test_a_transformer_computes_on_the_gpu(family, modality, tmp_path):
    save_model(tmp_path, TRANSFORMERS[family][0])
    name = f"transformers:{tmp_path}"
    compute_alike(lambda device: load_frozen(name, modality=modality, device=device), modality, 56)


def test_every_family_is_rehearsed():
    assert {parse_spec(name, tuple(FAMILIES)).family for name in ENCODERS} | APART == FAMILIES.keys()


@pytest.mark.parametrize("name", heads.names())
def test_a_head_fits_and_scores_on_the_gpu(name):
    module, config = opened(name)
    needs = module.needs(config)
    train, tested = views(needs), views(needs, seed=5, bad=True)
    expected = module.score(module.fit([train], config, CONTEXT), tested)
    with rehearsing(values=True) as gpu:
        head = module.fit([train], config, Context(CONTEXT.seed, GPU))
        maps = module.score(head, tested)
        again = module.score(module.from_state(head.state(), GPU), tested)
        wide = {where for where, types in gpu.calls if "float64" in types}
    assert maps.keys() == expected.keys()
    for key, values in expected.items():
        for found in (maps[key], again[key]):
            assert not isinstance(found, FakeTensor)
            torch.testing.assert_close(found, values, atol=1e-6, rtol=0)
    assert {where.split(":")[1] for where in wide} <= EXACT.keys()
