"""Weights as the released code of ModMap saves them: four state dicts, one file for each class and setup.

    model_image2depth, model_depth2image    input, projection, output: three linear layers, GELU between them
    modulator_image, modulator_depth        mlp.0, mlp.2: of [v_s; v_t] to [gamma, beta]

They are the networks of ``crossmodal.Mapper`` under other names. No such file has been published yet: names and
shapes are those of the code, and the tests save theirs by it.
"""

import hashlib
from pathlib import Path

import torch

from dino_depth.anomaly.heads.modmap.crossmodal import Mapper
from dino_depth.errors import ConfigError, DataError

__all__ = ["digest", "load_release"]

NETWORKS = {"image_to_depth": "model_image2depth", "depth_to_image": "model_depth2image"}
MODULATORS = {"image_modulator": "modulator_image", "depth_modulator": "modulator_depth"}
LAYERS = {"0": "input", "2": "projection", "4": "output"}


def digest(path: str) -> str:
    """sha256 of a file, hexadecimal."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def load_release(mapper: Mapper, path: str, views: int):
    """Fills a model with the weights of a file.

    Args:
        views: of the instances that are to be scored.

    Raises:
        ConfigError: there is no such file, or widths or the number of views are others.
        DataError: it holds something else; nothing in it is executed.
    """
    if not Path(path).is_file():
        raise ConfigError(f"modmap.weights {path!r}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        names = {ours: (theirs, LAYERS, "") for ours, theirs in NETWORKS.items()}
        names |= {ours: (theirs, {"0": "0", "2": "2"}, "mlp.") for ours, theirs in MODULATORS.items()}
        found = {
            f"{ours}.{place}.{part}": content[theirs][f"{prefix}{layer}.{part}"]
            for ours, (theirs, layers, prefix) in names.items()
            for place, layer in layers.items()
            for part in ("weight", "bias")
        }
        codes = found["image_modulator.0.weight"].shape[1]
    except Exception as error:  # torch raises whatever its zip reader and unpickler meet
        reason = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise DataError(f"modmap.weights {path}: not weights of the release: {reason}") from None
    if codes != 2 * views:
        raise ConfigError(f"modmap.weights {path}: of {codes / 2:g} views, instances have {views}")
    expected = mapper.state_dict()
    if expected.keys() != found.keys():
        raise ConfigError(f"modmap.weights {path}: has two hidden layers, image_to_depth and depth_to_image say others")
    for key, part in found.items():
        if part.shape != expected[key].shape:
            shapes = f"{tuple(part.shape)}, by the encoders and the widths of modmap it is"
            raise ConfigError(f"modmap.weights {path}: {key} is {shapes} {tuple(expected[key].shape)}")
    mapper.load_state_dict(found)
