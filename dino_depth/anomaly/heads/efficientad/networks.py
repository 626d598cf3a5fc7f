"""The networks of EfficientAD: patch description networks (teacher and student) and the autoencoder.

A patch description network sees 33 x 33 pixels and has a stride of 4: convolutions without padding, two of them
followed by an average over 2 x 2. Files of two layouts hold its weights: of a plain sequence (``0.weight``,
``3.weight``, ...), and of named layers (``conv1.weight``, ``conv2.weight``, ...).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dino_depth.errors import ConfigError, DataError

__all__ = ["SIZE", "Autoencoder", "pdn", "read_teacher"]

SIZE = 256  # pixels; the autoencoder's bottleneck is global at this size only
# Sides of the kernels of the small and the medium network.
KERNELS = ((4, 4, 3, 4), (4, 4, 1, 3, 4, 1))
POOLED = 2  # convolutions that an average follows
GROWN = (3, 8, 15, 32, 63, 127)  # sides that the autoencoder's features grow through before they are the map's


def pdn(kernels: Sequence[int], channels: Sequence[int]) -> nn.Sequential:
    """A network of (batch, channels[0], s, s), s >= 33, to (batch, channels[-1], r, r)."""
    layers: list[nn.Module] = []
    for place, kernel in enumerate(kernels):
        layers.append(nn.Conv2d(channels[place], channels[place + 1], kernel))
        if place + 1 < len(kernels):
            layers.append(nn.ReLU())
        if place < POOLED:
            layers.append(nn.AvgPool2d(2))
    return nn.Sequential(*layers)


def read_teacher(path: str) -> nn.Sequential:
    """The teacher of a file, small or medium by its layers, as wide as the file has it.

    Raises:
        ConfigError: there is no such file.
        DataError: it is no file of weights, or keys or shapes are not a patch description network's.
    """
    if not Path(path).is_file():
        raise ConfigError(
            f"efficientad.teacher {path!r}: no such file; name one with the weights of a patch description network "
            "(teacher_small.pth or teacher_medium.pth), they are never downloaded"
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its zip reader and unpickler meet
        raise DataError(f"{path}: unreadable weights: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise DataError(f"{path}: not a file of named weights")
    for kernels in KERNELS:
        places = [place for place, layer in enumerate(pdn(kernels, [1] * (len(kernels) + 1))) if hasattr(layer, "bias")]
        for names in ([str(place) for place in places], [f"conv{place + 1}" for place in range(len(places))]):
            if weights.keys() == {f"{name}.{part}" for name in names for part in ("weight", "bias")}:
                return _filled(path, weights, kernels, places, names)
    found = ", ".join(sorted(weights)[:4])
    raise DataError(f"{path}: keys are not those of a small or medium patch description network: {found}, ...")


def _filled(
    path: str, weights: Mapping[str, Tensor], kernels: Sequence[int], places: Sequence[int], names: Sequence[str]
) -> nn.Sequential:
    shapes = [tuple(weights[f"{name}.weight"].shape) for name in names]
    channels = [3, *(shape[0] for shape in shapes if shape)]
    wanted = [(channels[at + 1], channels[at], side, side) for at, side in enumerate(kernels)]
    biases = [tuple(weights[f"{name}.bias"].shape) for name in names]
    if shapes != wanted or biases != [(shape[0],) for shape in wanted]:
        raise DataError(f"{path}: shapes {shapes} are not those of a patch description network, such as {wanted}")
    network = pdn(kernels, channels)
    named = zip(places, names, strict=True)
    network.load_state_dict(
        {f"{at}.{part}": weights[f"{name}.{part}"].float() for at, name in named for part in ("weight", "bias")}
    )
    return network


class Autoencoder(nn.Module):
    """From a picture (batch, 3, 256, 256) to the teacher's features (batch, channels, 56, 56)."""

    def __init__(self, channels: int):
        super().__init__()
        widths = (3, 32, 32, 64, 64, 64)
        down: list[nn.Module] = []
        for before, after in zip(widths, widths[1:], strict=False):
            down += [nn.Conv2d(before, after, 4, 2, 1), nn.ReLU()]
        up: list[nn.Module] = []
        for side in GROWN:
            up += [nn.Upsample(side, mode="bilinear"), nn.Conv2d(64, 64, 4, 1, 2), nn.ReLU(), nn.Dropout(0.2)]
        side = (SIZE - 32) // 4  # of the teacher's map
        up += [nn.Upsample(side, mode="bilinear"), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU()]
        self.layers = nn.Sequential(*down, nn.Conv2d(64, 64, 8), *up, nn.Conv2d(64, channels, 3, 1, 1))

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)
