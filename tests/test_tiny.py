"""The encoder that comes with the package."""

import hashlib
import json

import numpy as np
import pytest
import torch

from dino_depth import encoder as encoders
from dino_depth.depth import DepthMap, Normalization
from dino_depth.encoder import SHIPPED, load_encoder
from dino_depth.errors import ConfigError
from dino_depth.frozen import load_frozen

FOLDER = SHIPPED["tiny"]


def test_it_is_small_and_says_where_it_comes_from():
    weights = FOLDER / "model.safetensors"
    assert weights.stat().st_size < 12e6
    assert sum(parameter.numel() for parameter in load_encoder("tiny").parameters()) < 6e6
    provenance = json.loads((FOLDER / "provenance.json").read_text())
    assert provenance["training_data"][0]["licence"] == "Apache-2.0" and provenance["training_data"][0]["synthetic"]
    settings = hashlib.sha256((FOLDER / "training_config.yaml").read_bytes()).hexdigest()
    assert provenance["training_config_sha256"] == settings
    losses = [json.loads(line) for line in (FOLDER / "losses.jsonl").read_text().splitlines()]
    assert losses[-1]["step"] == provenance["step"] and losses[-1]["loss"] < losses[0]["loss"]
    assert json.loads((FOLDER / "parity.json").read_text())["passed"]


def test_it_loads_by_name_from_anywhere_without_a_network(tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise AssertionError("asked the network")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    encoder = load_encoder("tiny")
    assert encoder.normalization == Normalization() and encoder.dim == 192
    with pytest.raises(ConfigError, match="no config.json"):
        load_encoder("./tiny")
    rows, columns = np.mgrid[0:60, 0:80] / 80
    depth_map = DepthMap.from_values(1 / (2 + 0.2 * columns) - 0.05 * ((rows - 0.4) ** 2 + (columns - 0.5) ** 2 < 0.04))
    frozen = load_frozen("tiny", modality="depth")
    for size in (56, 224):
        image = encoder.prepare(depth_map, size)
        features = frozen.encode(frozen.prepare(depth_map, size)[None])
        assert features.shape == (1, size // 14, size // 14, 192) and features.isfinite().all()
        torch.testing.assert_close(features, encoder(image[None])[1])
    assert features.flatten(1, 2).std(1).mean() > 0.1


def test_random_tiny_is_the_same_network_with_other_weights():
    ours, theirs = load_encoder("tiny"), encoders.random_encoder("tiny", 1)
    assert ours.backbone.state_dict().keys() == theirs.backbone.state_dict().keys()
    assert not torch.equal(ours.backbone.blocks[0].mlp.fc1.weight, theirs.backbone.blocks[0].mlp.fc1.weight)
    assert ours.normalization == theirs.normalization
