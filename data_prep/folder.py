"""Any directory of depth files: people's own data, single frames, recordings.

16-bit png and pgm, tiff, npy, exr and organised pcd files, one map each. What a stored value means is said by
:class:`FolderOptions`; files without a depth suffix (colour images, poses, logs) are not looked at unless ``glob``
names them.

    7-Scenes      --folder.missing [65535]           *.depth.png in millimetres beside colour and poses
    Redwood       --root RGBD/depth                  millimetres
    TUM           --folder.scale 0.0002              5000 a metre
    SUN RGB-D     --folder.encoding sun_rgbd         the three low bits are stored on top
    NYU raw       --folder.encoding nyu_raw          byte-swapped Kinect disparity

With ``encoding grey`` it reads photographs instead, png and jpeg, as single-channel maps of their brightness: what an
*image* encoder with one channel is pretrained on.
"""

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from data_prep.archives import RawFile
from data_prep.formats import decode_exr, decode_image, decode_npy, decode_pgm, decode_png, decode_tiff
from data_prep.item import Item, unexpected_layout
from data_prep.pcd import decode_pcd
from data_prep.tree import RawTree
from dino_depth.depth import DepthMap, grey_map
from dino_depth.errors import ConfigError, DataError

__all__ = ["FolderOptions", "describe", "items", "read"]

METRES = {"m": 1.0, "cm": 1e-2, "mm": 1e-3, "um": 1e-6}
SUFFIXES = (".png", ".pgm", ".tif", ".tiff", ".npy", ".exr", ".pcd")
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
        channel: which of several channels is depth; 2 is the Z of X, Y, Z.
        larger_is: farther for depth; nearer for heights, which ``offset`` turns into depth.
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
    channel: int = 2
    larger_is: Literal["farther", "nearer"] = "farther"
    offset: float = 0.0
    encoding: Literal["linear", "sun_rgbd", "nyu_raw", "grey"] = "linear"


def items(tree: RawTree, options: FolderOptions) -> list[Item]:
    """Every depth file of a folder.

    Raises:
        ConfigError: an option is out of range, contradicts another, or ``glob`` names a file of another format.
        DataError: there is no depth file.
    """
    _check(options)
    suffixes = PHOTOGRAPHS if options.encoding == "grey" else SUFFIXES
    formats = "|".join(suffix[1:] for suffix in suffixes)
    found = tree.find(f"[^/]+/(?:{_expression(options.glob)})" if options.glob else rf".*\.(?i:{formats})")
    names = [name for _, name in found]
    foreign = [name for name in names if tree[name].suffix not in suffixes]
    if foreign:
        raise ConfigError(f"folder.glob matches {foreign[0]}, which is none of {', '.join(suffixes)}: narrow it")
    if not names:
        pattern = options.glob or " ".join(f"*{suffix}" for suffix in suffixes)
        raise unexpected_layout(tree, "folder", f"files matching {pattern}")
    return [_item(tree, name, options) for name in names]


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
    if options.larger_is == "nearer" and not options.offset > 0:
        raise ConfigError("folder.larger_is nearer needs folder.offset, the distance of height 0 from the camera")
    if options.channel < 0:
        raise ConfigError(f"folder.channel must be 0 or more, got {options.channel}")


def _item(tree: RawTree, source: str, options: FolderOptions) -> Item:
    file, folders = tree[source], source.split("/")[:-1]
    if not options.split and not folders:
        raise DataError(f"{file} lies in no folder that could name its split: give folder.split")
    split = options.split or folders.pop(0)
    category = options.category or (folders[-1] if folders else UNSORTED)
    # Folders that the category does not tell keep equal names in different folders apart.
    stem = "-".join([*(folders if options.category else folders[:-1]), file.stem])
    return Item(options.name, category, split, options.label, stem, file, source, options=options)


def describe(items: list[Item]) -> dict[str, str]:
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
    values = _values(item.file, options.channel)
    missing = ~np.isfinite(values)
    for value in options.missing:
        missing |= values == value
    if options.encoding != "linear":
        if values.dtype != np.uint16:
            raise DataError(f"folder.encoding {options.encoding} needs 16-bit codes, got {values.dtype}")
        if options.encoding == "sun_rgbd":
            values = values >> 3 | values << 13
        else:
            values = _kinect_depth(values.byteswap())
    depth = values.astype(np.float64) * _scale(options, values.dtype)
    if options.larger_is == "nearer":
        depth = options.offset - depth
        above = np.count_nonzero((depth <= 0) & ~missing)
        if above:
            raise DataError(f"{above} heights reach the camera: folder.offset {options.offset} is too small")
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


def _values(file: RawFile, channel: int) -> np.ndarray:
    """(height, width) stored values."""
    if file.suffix == ".pcd":
        values = decode_pcd(file.read(), channel)
    else:
        decoders = {".png": decode_png, ".pgm": decode_pgm, ".npy": decode_npy, ".exr": decode_exr}
        values = decoders.get(file.suffix, decode_tiff)(file.read())
    if values.ndim == 2:
        return values
    if values.shape[2] > values.shape[0]:
        values = np.moveaxis(values, 0, 2)
    if values.shape[2] == 1:
        return values[..., 0]
    if channel >= values.shape[2]:
        raise DataError(f"no channel {channel}: the file has {values.shape[2]}")
    return values[..., channel]
