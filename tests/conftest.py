"""Shared by all tests: small shards, a tiny pretraining, and one thread a process so that two cores serve two."""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it, and for the processes tests start

import numpy as np
import pytest
import torch
from expected_skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401  hooks
from hypothesis import settings

from data_prep.folder import FolderOptions
from data_prep.manifest import digest_file, digest_json
from data_prep.shards import PrepareConfig, prepare
from dino_depth.config import PretrainConfig, parse

torch.set_num_threads(1)
# A busy machine is no fault of what is tested.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def depth_scene(index: int, side: int = 48) -> np.ndarray:
    """A float32 map in metres of one of three shapes on a tilted plane, with a hole, drawn from ``index``."""
    random = np.random.default_rng(index)
    rows, columns = np.mgrid[0:side, 0:side] / side - 0.5
    depth = 0.5 + random.uniform(-0.1, 0.1) * rows + random.uniform(-0.1, 0.1) * columns
    x, y = random.uniform(-0.15, 0.15, 2)
    away = (np.hypot(rows - x, columns - y), np.maximum(abs(rows - x), abs(columns - y)), abs(rows - columns + x))
    depth -= 0.05 * (away[index % 3] < 0.25)
    depth += random.normal(0, 2e-4, depth.shape)
    depth[:6, : 2 + index % 5] = 0
    return depth.astype(np.float32)


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A small shard folder: 3 categories, 20 training and 8 test maps each."""
    root = tmp_path_factory.mktemp("depth")
    index = 0
    for split, count in (("train", 20), ("test", 8)):
        for category in range(3):
            (root / "raw" / split / f"shape{category}").mkdir(parents=True)
            for place in range(count):
                np.save(
                    root / "raw" / split / f"shape{category}" / f"{place:03}.npy", depth_scene(3 * index + category)
                )
                index += 1
    options = FolderOptions(unit="m", split="")
    prepare(PrepareConfig("folder", str(root / "raw"), str(root / "shards"), 1, samples_per_shard=25, folder=options))
    return root / "shards"


def write_manifest(folder: Path, samples: int, sources: dict[str, dict]):
    """The manifest of a shard folder of one tar, as an older version of prep left it: there is no index."""
    (path,) = folder.glob("*.tar")
    row = {"file": path.name, "sha256": digest_file(path), "bytes": path.stat().st_size, "samples": samples}
    stated = {"reader": "folder", "licence": "none", "synthetic": False, "files_listed": {}, "maps": samples}
    sources = {name: {**stated, "dropped": [], **source} for name, source in sources.items()}
    manifest = {"format": "dino-depth shards", "version": 2, "sources": sources, "config": {}, "versions": {}}
    manifest |= {"config_hash": digest_json({}), "total": samples, "counts": {}, "shards": [row]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def tiny(shards, tmp_path) -> PretrainConfig:
    """A pretraining that takes milliseconds a step."""
    config = parse(PretrainConfig, ["--config", "pretrain_demo"], "test")
    config.out, config.data.shards = str(tmp_path / "run"), str(shards)
    config.data.workers, config.data.resident = 0, False
    config.crops.global_size, config.crops.local_size, config.crops.local_crops = 42, 14, 2
    config.model.dim, config.model.depth, config.model.heads, config.model.drop_path = 32, 2, 2, 0.25
    config.loss.prototypes, config.loss.hidden, config.loss.bottleneck = 32, 32, 16
    config.train.batch, config.train.steps, config.train.checkpoint_every, config.train.log_every = 8, 8, 2, 1
    config.optim.warmup = 2
    config.health.every = 4
    config.train.device = "cpu"  # exactness is promised there
    return config


# The keys of the files of Depth Anything V2's repositories on the Hub; only the sizes are smaller.
DEPTH_ANYTHING = {
    "_commit_hash": None, "architectures": ["DepthAnythingForDepthEstimation"], "backbone": None,
    "backbone_config": {
        "architectures": ["Dinov2Model"], "hidden_size": 32, "image_size": 70, "model_type": "dinov2",
        "num_attention_heads": 2, "num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"],
        "out_indices": [1, 2, 3, 4], "patch_size": 14, "reshape_hidden_states": False, "torch_dtype": "float32",
    },
    "fusion_hidden_size": 8, "head_hidden_size": 8, "head_in_index": -1, "initializer_range": 0.02,
    "model_type": "depth_anything", "neck_hidden_sizes": [8, 8, 16, 16], "patch_size": 14,
    "reassemble_factors": [4, 2, 1, 0.5], "reassemble_hidden_size": 32, "torch_dtype": "float32",
    "transformers_version": None, "use_pretrained_backbone": False,
}  # fmt: skip
DEPTH_ANYTHING_PROCESSOR = {
    "_valid_processor_keys": ["images", "do_resize", "size", "keep_aspect_ratio", "ensure_multiple_of", "resample"],
    "do_normalize": True, "do_pad": False, "do_rescale": True, "do_resize": True, "ensure_multiple_of": 14,
    "image_mean": [0.485, 0.456, 0.406], "image_processor_type": "DPTImageProcessor",
    "image_std": [0.229, 0.224, 0.225], "keep_aspect_ratio": True, "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"height": 70, "width": 70}, "size_divisor": None,
}  # fmt: skip


@pytest.fixture(scope="session")
def depth_anything(tmp_path_factory) -> Path:
    """A Depth Anything V2 of random weights, large enough that its disparity has relief, as a Hub repository."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    folder = tmp_path_factory.mktemp("model") / "tiny-hf"
    torch.manual_seed(0)
    network = DepthAnythingForDepthEstimation(DepthAnythingConfig.from_dict(DEPTH_ANYTHING))
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1:
                torch.nn.init.normal_(weights, std=weights[0].numel() ** -0.5)
        network.head.conv3.bias.fill_(2.0)
    network.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(DEPTH_ANYTHING))
    (folder / "preprocessor_config.json").write_text(json.dumps(DEPTH_ANYTHING_PROCESSOR))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- depth\n---\n# A model\n")
    return folder
