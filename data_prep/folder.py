"""Any directory of depth files: people's own data, single frames, recordings.

16-bit png and pgm, pfm, tiff, npy, exr and organised pcd files, one map each. What a stored value means is said by
:class:`FolderOptions`; files without a depth suffix (colour images, poses, logs) are not looked at unless ``glob``
names them.

    7-Scenes      --folder.missing [65535]           *.depth.png in millimetres beside colour and poses
    Redwood       --root RGBD/depth                  millimetres
    TUM           --folder.scale 0.0002              5000 a metre
    SUN RGB-D     --folder.encoding sun_rgbd         the three low bits are stored on top
    NYU raw       --folder.encoding nyu_raw          byte-swapped Kinect disparity
    Blender       --folder.layer ViewLayer.Depth     one of many channels, where none says that it is depth

Nothing is guessed that a file leaves open: which of several images, channels or layers is depth is told by ``layer``
or ``channel``, and values below 0 in number are a camera that looks the other way.

With ``encoding grey`` it reads photographs instead, png and jpeg, as single-channel maps of their brightness: what an
*image* encoder with one channel is pretrained on.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np

from data_prep.archives import RawFile
from data_prep.exr import decode_exr
from data_prep.formats import (
    ManyLayers,
    decode_image,
    decode_npy,
    decode_pfm,
    decode_pgm,
    decode_png,
    decode_tiff,
)
from data_prep.item import FolderItems, Item, unexpected_layout
from data_prep.pcd import decode_pcd
from data_prep.plausibility import refuse_marks, refuse_negative
from data_prep.tree import RawTree
from dino_depth.depth import DepthMap, grey_map
from dino_depth.errors import ConfigError, DataError

__all__ = ["FolderOptions", "describe", "items", "read"]

METRES = {"m": 1.0, "cm": 1e-2, "mm": 1e-3, "um": 1e-6}
SUFFIXES = (".png", ".pgm", ".pfm", ".tif", ".tiff", ".npy", ".exr", ".pcd")
PHOTOGRAPHS = (".png", ".jpg", ".jpeg")
UNSORTED = "all"


@dataclass
class FolderOptions:
    """What the files of a folder mean.

    Attributes:
        glob: files to read, relative to root, such as ``**/depth/*.png``; empty: every file with a depth suffix.
        name: the dataset's name in the shards.
        category: category of every map; empty: the name of the folder a file lies in ("all" for root itself).
        split: split of every map; empty: the name of the first folder below root.
        label: label of every map: good, a defect's name, or unknown.
        licence: licence of the data, for the manifest.
        kind: metric, or relative for depth of unknown scale.
        unit: m, cm, mm or um; auto is metres for floats and millimetres for integers (ROS REP 118).
        scale: metres (or relative depth) of a stored 1, instead of ``unit``; 0: from ``unit``.
        missing: stored values that mean "missing", besides NaN, infinity and, where larger is farther, 0 and less.
        farthest: what is farther, in metres (or relative depth) after scaling, is missing; 0: nothing is.
        channel: which of several channels is depth; -1: the third of floats, which are X, Y and Z, while integers are
            colours and refused.
        layer: which of several images is depth: a number from 0 in a tiff, the name of a layer or channel in an exr.
        larger_is: farther for depth; nearer for heights, which ``offset`` turns into depth, and for cameras that look
            along -Z.
        offset: where larger is nearer: distance of the height 0 from the camera, in metres after scaling.
        encoding: linear, the raw codes of a known dataset (sun_rgbd, nyu_raw), or grey for photographs.
    """

    glob: str = ""
    name: str = "folder"
    category: str = ""
    split: str = "train"
    label: str = "unknown"
    licence: str = "unstated"
    kind: Literal["metric", "relative"] = "metric"
    unit: Literal["auto", "m", "cm", "mm", "um"] = "auto"
    scale: float = 0.0
    missing: list[float] = field(default_factory=list)
    farthest: float = 0.0
    channel: int = -1
    layer: str = ""
    larger_is: Literal["farther", "nearer"] = "farther"
    offset: float = 0.0
    encoding: Literal["linear", "sun_rgbd", "nyu_raw", "grey"] = "linear"


def items(tree: RawTree, options: FolderOptions) -> Sequence[Item]:
    """Every depth file of a folder.

    Raises:
        ConfigError: an option is out of range, contradicts another, or ``glob`` names a file of another format.
        DataError: there is no depth file, or none of its folders could name the split.
    """
    _check(options)
    suffixes = PHOTOGRAPHS if options.encoding == "grey" else SUFFIXES
    formats = "|".join(suffix[1:] for suffix in suffixes)
    names = tree.find_names(f"[^/]+/(?:{_expression(options.glob)})" if options.glob else rf".*\.(?i:{formats})")
    if foreign := next((name for name in names if tree[name].suffix not in suffixes), ""):
        raise ConfigError(f"folder.glob matches {foreign}, which is none of {', '.join(suffixes)}: narrow it")
    if not names:
        pattern = options.glob or " ".join(f"*{suffix}" for suffix in suffixes)
        raise unexpected_layout(tree, "folder", f"files matching {pattern}")
    if not options.split and (bare := next((name for name in names if "/" not in name), "")):
        raise DataError(f"{tree[bare]} lies in no folder that could name its split: give folder.split")
    if tree.plain:
        return FolderItems(partial(_folder_item, str(tree.root), options), names)
    return [_item(tree[name], name, options) for name in names]


def _expression(glob: str) -> str:
    """A glob as a regular expression: ``*`` and ``?`` stay within a folder's name, ``**/`` is any number of folders."""
    if glob.startswith("/") or ".." in glob.split("/"):
        raise ConfigError(f"folder.glob {glob!r} is not a pattern below root")
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^/\]]+\])", glob)
    return "".join(
        wildcards.get(piece) or (piece.replace("[!", "[^") if piece.startswith("[") else re.escape(piece))
        for piece in pieces
    )


def _check(options: FolderOptions):
    if options.scale < 0 or not np.isfinite(options.scale):
        raise ConfigError(f"folder.scale must be 0 or a positive number, got {options.scale}")
    if options.scale and options.unit != "auto":
        raise ConfigError(f"folder.scale {options.scale} and folder.unit {options.unit} contradict: give one")
    if options.encoding == "grey" and (options.scale or options.unit != "auto" or options.missing):
        raise ConfigError("folder.encoding grey is brightness: it has no folder.unit, scale or missing")
    if options.encoding == "nyu_raw" and (options.scale or options.unit != "auto"):
        raise ConfigError("folder.encoding nyu_raw is metric by itself: give neither folder.scale nor folder.unit")
    if options.larger_is == "farther" and options.offset:
        raise ConfigError(f"folder.offset {options.offset} needs folder.larger_is nearer")
    for name, value, lowest in (("offset", options.offset, 0), ("farthest", options.farthest, 0)):
        if not lowest <= value < np.inf:
            raise ConfigError(f"folder.{name} must be {lowest} or more, got {value}")
    if options.channel < -1:
        raise ConfigError(f"folder.channel must be -1 or more, got {options.channel}")


def _folder_item(root: str, options: FolderOptions, source: str) -> Item:
    return _item(RawFile(root, source), source, options)


def _item(file: RawFile, source: str, options: FolderOptions) -> Item:
    folders = source.split("/")[:-1]
    split = options.split or folders.pop(0)
    category = options.category or (folders[-1] if folders else UNSORTED)
    # Folders that the category does not tell keep equal names in different folders apart.
    stem = "-".join([*(folders if options.category else folders[:-1]), file.stem])
    return Item(options.name, category, split, options.label, stem, file, source, options=options)


def describe(items: Sequence[Item]) -> dict[str, str]:
    """For the manifest: the licence."""
    return {"licence": items[0].options.licence}


def read(item: Item) -> DepthMap:
    """The depth of a file.

    Raises:
        DataError: not a complete depth file of its suffix, no such channel, a height above ``offset``, or no valid
            pixel.
    """
    options: FolderOptions = item.options
    if options.encoding == "grey":
        return grey_map(decode_image(item.file.read()))
    values = _values(item.file, options)
    missing = np.ma.getmaskarray(values) | ~np.isfinite(np.ma.getdata(values))
    values = np.ma.getdata(values)
    for value in options.missing:
        # A float32 does not hold every decimal number: 1e10 it holds, -3.4e38 it rounds.
        missing |= values == (np.asarray(value).astype(values.dtype) if values.dtype.kind == "f" else value)
    if options.encoding != "linear":
        if values.dtype != np.uint16:
            raise DataError(f"folder.encoding {options.encoding} needs 16-bit codes, got {values.dtype}")
        if options.encoding == "sun_rgbd":
            values = values >> 3 | values << 13
        else:
            values = _kinect_depth(values.byteswap())
    if options.larger_is == "farther":
        refuse_negative(values, "folder", missing)
    depth = values.astype(np.float64) * _scale(options, values.dtype)
    if options.larger_is == "nearer":
        missing |= (values == 0) & (options.offset == 0)
        depth = options.offset - depth
        above = np.count_nonzero((depth <= 0) & ~missing)
        if above:
            raise DataError(f"{above} heights reach the camera: folder.offset {options.offset} is too small")
    if options.farthest:
        missing |= depth > options.farthest
    refuse_marks(values, "folder", missing)
    np.copyto(depth, 0, where=missing)
    return DepthMap.from_values(depth, options.kind)


def _scale(options: FolderOptions, dtype: np.dtype) -> float:
    if options.scale:
        return options.scale
    if options.kind == "relative":
        return 1.0
    return METRES[options.unit if options.unit != "auto" else "m" if dtype.kind == "f" else "mm"]


def _kinect_depth(disparity: np.ndarray) -> np.ndarray:
    """Metres of the first Kinect's 11-bit disparity, with the constants of the NYU Depth V2 toolbox."""
    with np.errstate(divide="ignore"):
        depth = 351.3 / (1092.5 - disparity.astype(np.float64))
    # The toolbox's range; what lies beyond is the code 2047 for "no measurement" and noise at the pole.
    return np.where((depth > 0) & (depth <= 10), depth, 0)


def _values(file: RawFile, options: FolderOptions) -> np.ndarray:
    """(height, width) stored values; masked where the file says that they are missing."""
    content, channel = file.read(), options.channel
    try:
        if file.suffix == ".pcd":
            values = decode_pcd(content, 2 if channel < 0 else channel)
        elif file.suffix == ".exr":
            values = decode_exr(content, options.layer, channel)
        elif file.suffix in (".tif", ".tiff"):
            values = decode_tiff(content, options.layer, stack=channel >= 0)
        else:
            decoders = {".png": decode_png, ".pgm": decode_pgm, ".pfm": decode_pfm, ".npy": decode_npy}
            values = decoders[file.suffix](content)
    except ManyLayers as error:
        raise DataError(f"{error}: name one with folder.layer") from error
    if values.ndim == 2:
        return values
    if values.shape[2] > values.shape[0]:
        values = np.moveaxis(values, 0, 2)
    channels = values.shape[2]
    if channels == 1:
        return values[..., 0]
    if channel < 0 and values.dtype.kind != "f":
        raise DataError(f"{channels} channels of {values.dtype} are colours, unless folder.channel says which is depth")
    if channel >= channels or (channel < 0 and channels < 3):
        raise DataError(f"no channel {2 if channel < 0 else channel}: the file has {channels} (folder.channel)")
    return values[..., channel if channel >= 0 else 2]
