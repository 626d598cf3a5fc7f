"""OpenEXR files: which of the many channels of a renderer's or a camera's file is depth.

Blender and the like put colours, normals, masks and depth of several views into one file, as channels named
``<layer>.<channel>`` and as parts with names of their own. Channels are chosen by what they mean, never by where they
stand, and a file that leaves a choice is refused with all of its channels, so that one can be named.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from math import prod

import numpy as np

from data_prep.archives import LARGEST_RATIO, RATIO_MATTERS
from data_prep.formats import ManyLayers, check_shape, depth_decoder
from dino_depth.errors import ConfigError, DataError

__all__ = ["decode_exr"]

MAGIC = b"\x76\x2f\x31\x01"
# Bytes of all channels together, decompressed. Of one part, only the wanted channel is kept; of several, all are.
LARGEST_PART, LARGEST_PARTS = 2**32, 2**30
DEPTH = re.compile(r"(?i)(?<![a-z])z?-?depth(?![a-z])")


@dataclass(frozen=True)
class _Channel:
    """One channel: the number and the name of its part, and its own name."""

    part: int
    part_name: str
    name: str

    def __str__(self) -> str:
        return f"{self.part_name}/{self.name}" if self.part_name else self.name

    @property
    def is_depth(self) -> bool:
        """Whether its part, or the layer it belongs to, is called depth."""
        return any(map(DEPTH.search, (self.part_name, *self.name.split("."))))

    def answers(self, layer: str) -> bool:
        """Whether it is, or belongs to, what is called so."""
        names = (str(self), self.name, self.part_name)
        return layer in names or any(name.startswith((f"{layer}.", f"{layer}/")) for name in names)


def decode_exr(content: bytes, layer: str = "", channel: int = -1) -> np.ndarray:
    """The (height, width) depth of an OpenEXR file.

    That is the channel that ``layer`` names; else the only channel; else the channel ``Z`` outside of all layers; else
    the only one whose layer or part is called depth; else R, G and B where they are equal.

    Args:
        layer: a channel (``left.Z``), a layer or part that holds only one (``ViewLayer.Depth``), or part/channel.
        channel: which of R, G and B is depth, where there is nothing else: 2 is the third of X, Y and Z.

    Raises:
        ConfigError: the package OpenEXR is not installed.
        ManyLayers: the choice is not clear; names all channels.
        DataError: not a complete file, deep data, or more than a depth map can hold.
    """
    try:
        import OpenEXR
    except ImportError as error:
        raise ConfigError("reading .exr files needs the package OpenEXR") from error
    if content[:4] != MAGIC:
        raise DataError("not an OpenEXR file")
    with _quiet():
        return depth_decoder("OpenEXR")(_decode)(content, layer, channel, OpenEXR)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps from the terminal what the library says about a broken file, to the descriptor 2 and by Python's print."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _decode(content: bytes, layer: str, channel: int, library) -> np.ndarray:
    with library.File(io.BytesIO(content), header_only=True) as file:
        channels = _channels(file.parts, len(content), library)
        windows = [part.header["dataWindow"] for part in file.parts]
    chosen = _choose(channels, layer)
    if not chosen:
        colours = [one for name in "RGB" for one in channels if one.name == name]
        if channel > 2:
            raise DataError(f"no channel {channel}: the file has R, G and B")
        if channel >= 0:
            return _read(content, [colours[channel]], windows, library)[0]
        red, green, blue = _read(content, colours, windows, library)
        if not (np.array_equal(red, green) and np.array_equal(red, blue)):
            raise _unclear(channels)
        return red
    return _read(content, [chosen], windows, library)[0]


def _channels(parts: list, size: int, library) -> list[_Channel]:
    """Every channel of every part, after a look at what decoding them would take."""
    found, promised = [], 0
    for number, part in enumerate(parts):
        if part.type() in (library.deepscanline, library.deeptile):
            raise DataError("deep data: every pixel holds a list of depths, of which none is the depth of a map")
        low, high = part.header["dataWindow"]
        shape = tuple(int(value) + 1 for value in (high - low)[::-1])
        check_shape(shape)
        if tiles := part.header.get("tiles"):
            # Whole tiles are decoded, also where one is larger than the map.
            shape = tuple(-(-side // tile) * tile for side, tile in zip(shape, (tiles.ySize, tiles.xSize), strict=True))
        names = [one.name for one in part.header["channels"]]
        if any((one.xSampling, one.ySampling) != (1, 1) for one in part.header["channels"]):
            raise DataError("a channel has fewer pixels than the map")
        promised += 4 * prod(shape) * len(names)
        found += [_Channel(number, part.name() if len(parts) > 1 else "", name) for name in names]
    if promised > (LARGEST_PART if len(parts) == 1 else LARGEST_PARTS) or (
        promised > RATIO_MATTERS and promised > LARGEST_RATIO * size
    ):
        raise DataError(f"{size} bytes grow to {promised} in {len(found)} channels: the file is damaged or hostile")
    return sorted(found, key=str)


def _choose(channels: list[_Channel], layer: str) -> _Channel | None:
    """The channel that is depth; None where there are only R, G and B, and perhaps A."""
    if layer:
        exact = [one for one in channels if layer in (str(one), one.name)]
        named = exact or [one for one in channels if one.answers(layer)]
        if len(named) != 1:
            raise ManyLayers(f"{layer!r} is {len(named)} of the channels {_listed(channels)}")
        return named[0]
    if len(channels) == 1:
        return channels[0]
    for fits in (lambda one: one.name.upper() == "Z", lambda one: one.is_depth):
        found = [one for one in channels if fits(one)]
        if len(found) == 1:
            return found[0]
        if found:
            break
    if {one.name for one in channels} - {"A"} == {"R", "G", "B"} and len({one.part for one in channels}) == 1:
        return None
    raise _unclear(channels)


def _unclear(channels: list[_Channel]) -> ManyLayers:
    return ManyLayers(f"none of the channels {_listed(channels)} is depth beyond doubt")


def _listed(channels: list[_Channel]) -> str:
    return ", ".join(map(str, channels))


def _read(content: bytes, wanted: list[_Channel], windows: list, library) -> list[np.ndarray]:
    """The (height, width) values of channels of one part."""
    part, name = wanted[0].part, wanted[0].part_name
    if len(windows) > 1:
        # Only whole files of several parts can be read. Of a damaged part the library leaves out the channels, or the
        # part, and the others move up.
        with library.File(io.BytesIO(content), separate_channels=True) as file:
            found = [one.channels for one in file.parts if one.name() == name]
            if len(found) != 1 or not all(one.name in found[0] for one in wanted):
                raise DataError(f"the part {name!r} is damaged or cut short")
            return [np.array(found[0][one.name].pixels) for one in wanted]
    low, high = windows[part]
    width, height = (int(value) + 1 for value in high - low)
    file = library.InputFile(io.BytesIO(content))
    types = file.header()["channels"]
    dtypes = {"HALF": np.float16, "FLOAT": np.float32, "UINT": np.uint32}
    arrays = []
    for one in wanted:
        dtype = dtypes[str(types[one.name].type)]
        arrays.append(np.frombuffer(file.channel(one.name), dtype).reshape(height, width))
    return arrays
