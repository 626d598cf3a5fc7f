"""Ground truth of a multi-view sample from files: a voxel volume, sparse voxels, labelled points, or a mask per view.

The format of SiM3D's ground truth is unknown; these are looked for in the folder of an instance, in this order:

    gt.npz     origin (3,), voxel_size (), and either volume (x, y, z), not 0 where anomalous, or sparse voxels:
               shape (3,), index (n, 3) and, optionally, component (n,)
    gt.npy     volume (x, y, z), with origin and voxel_size in gt.json
    gt.ply     points, anomalous where the property ``label`` (or CloudCompare's ``scalar_label``) is above 0; without
               one, where the vertex colours red, green and blue are brighter than 1 of 255, as in what was shown of
               SiM3D before its release
    mask/      <stem of a view>.png, not 0 where anomalous; a view without a file shows nothing anomalous

Origin is the corner of voxel (0, 0, 0) in world coordinates. Several distinct values of a volume, a component or a
label tell defects apart; of a single one, connected parts are defects.
"""

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.archives import RawFile, hidden
from data_prep.formats import decode_image, decoder
from dino_depth.anomaly.dataset import Truth, Voxels, named
from dino_depth.errors import DataError

__all__ = ["TruthOptions", "decode_ply", "read_truth"]

LARGEST = 2**31  # bytes of a volume
LONGEST_HEADER = 2**16
COLOUR = "colour"
BLACK = 1  # of 255
TEXTURED = 0.5  # share of the vertices
TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "float": "f4",
    "double": "f8", "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip


@dataclass
class TruthOptions:
    """What the files of ground truth mean.

    Attributes:
        kind: the form to read; ``auto`` is the first that an instance has.
        unit: of the origin and size of voxels, and of points.
        label: the property of labelled points; ``colour``: their vertex colours.
    """

    kind: Literal["auto", "voxels", "points", "masks"] = "auto"
    unit: Literal["m", "mm"] = "m"
    label: str = "label"


def read_truth(folder: Path, label: str, stems: tuple[str, ...], options: TruthOptions) -> Truth | None:
    """The ground truth of an instance; empty for a good one without a file, None for an anomalous one without.

    Args:
        stems: of the views.

    Raises:
        DataError: a file cannot be read, contradicts the label, or ``options.kind`` asks for one that is not there.
    """
    forms = {
        "voxels": (folder / "gt.npz", folder / "gt.npy"), "points": (folder / "gt.ply",), "masks": (folder / "mask",),
    }  # fmt: skip
    if options.kind != "auto":
        forms = {options.kind: forms[options.kind]}
    found = next(((kind, path) for kind, paths in forms.items() for path in paths if path.exists()), None)
    if found is None:
        if label == "good":
            return Truth("points", points=np.zeros((0, 3)))
        if options.kind != "auto":
            names = " or ".join(path.name for path in forms[options.kind])
            raise DataError(f"{folder}: no {names} (truth.kind {options.kind})")
        return None
    kind, path = found
    if kind == "voxels":
        truth = named(str(path), _read_voxels, path, options)
        count = len(truth.voxels.index)
    elif kind == "points":
        truth = named(str(path), _read_points, path, options)
        count = len(truth.points)
    else:
        truth = _read_masks(path, stems)
        count = sum(np.count_nonzero(mask) for mask in truth.masks)
    if (count > 0) != (label == "anomalous"):
        raise DataError(f"{path}: holds {count} anomalous {kind}, but the instance is labelled {label}")
    return truth


def _read_voxels(path: Path, options: TruthOptions) -> Truth:
    if path.suffix == ".npy":
        side = path.with_suffix(".json")
        try:
            arrays = {key: np.asarray(value, np.float64) for key, value in json.loads(side.read_text()).items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"needs {side.name} with origin and voxel_size beside it: {error}") from error
        arrays["volume"] = _load(path)
    else:
        arrays = _load(path)
    missing = [key for key in ("origin", "voxel_size") if key not in arrays]
    if missing or not ("volume" in arrays or {"shape", "index"} <= set(arrays)):
        raise DataError(
            f"holds {', '.join(sorted(arrays))}: expected origin, voxel_size and volume, or shape and index"
        )
    metres = 0.001 if options.unit == "mm" else 1.0
    origin, size = arrays["origin"] * metres, _single(arrays["voxel_size"]) * metres
    if "volume" in arrays:
        volume = arrays["volume"]
        if volume.ndim != 3 or volume.dtype.kind not in "biu":
            raise DataError(f"volume must be (x, y, z) bool or integers, got {volume.shape} {volume.dtype}")
        index = np.argwhere(volume)
        return Truth("voxels", Voxels(origin, size, volume.shape, index), component=_components(volume[volume != 0]))
    index, shape = arrays["index"], tuple(np.ravel(arrays["shape"]).tolist())
    if index.ndim != 2 or index.shape[1] != 3 or index.dtype.kind not in "iu":
        raise DataError(f"index must be (n, 3) integers, got {index.shape} {index.dtype}")
    order = np.lexsort(index.T[::-1])
    component = arrays.get("component")
    if component is not None:
        if component.shape != (len(index),) or component.dtype.kind not in "iu" or (component < 1).any():
            raise DataError(f"component must be {len(index)} integers from 1, got {component.shape} {component.dtype}")
        component = component[order].astype(np.int32)
    return Truth("voxels", Voxels(origin, size, shape, index[order]), component=component)


def _single(values: np.ndarray) -> float:
    if values.size != 1:
        raise DataError(f"voxel_size must be one number, voxels are cubes; got {values.tolist()}")
    return float(values.ravel()[0])


def _components(values: np.ndarray) -> np.ndarray | None:
    """Numbers from 1 (n,) for the distinct values; None where there is only one."""
    names, number = np.unique(values, return_inverse=True)
    return (number + 1).astype(np.int32) if len(names) > 1 else None


@decoder("NumPy")
def _load(path: Path):
    """The array of a .npy file, or a dictionary of those of a .npz file; objects are refused, never unpickled."""
    sizes = [path.stat().st_size]
    if path.suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            sizes = [member.file_size for member in archive.infolist()]
    if sum(sizes) > LARGEST:
        raise DataError(f"{sum(sizes)} bytes of arrays are more than {LARGEST >> 30} GiB")
    loaded = np.load(path, allow_pickle=False)
    return loaded if path.suffix == ".npy" else {key: loaded[key] for key in loaded.files}


def _read_points(path: Path, options: TruthOptions) -> Truth:
    vertices = decode_ply(RawFile(str(path.parent), path.name).read())
    names = vertices.dtype.names
    value = _labels(vertices, options.label)
    if value is None or not {"x", "y", "z"} <= set(names):
        raise DataError(
            f"properties {', '.join(names)}: expected x, y, z and {options.label} (truth.label), or colours"
        )
    chosen = value > 0
    points = np.stack([vertices[axis][chosen].astype(np.float64) for axis in "xyz"], 1)
    if not np.isfinite(points).all():
        raise DataError("holds points that are not finite")
    points = points * (0.001 if options.unit == "mm" else 1.0)
    return Truth("points", points=points, component=_components(value[chosen]))


def _labels(vertices: np.ndarray, label: str) -> np.ndarray | None:
    """(n,) above 0 where a vertex is anomalous: its label, else 1 where it is coloured; None without either.

    Raises:
        DataError: most vertices have a colour, as those of a textured mesh.
    """
    names = vertices.dtype.names
    if found := next((name for name in (label, f"scalar_{label}") if name in names), None):
        return vertices[found]
    if label not in ("label", COLOUR) or not {"red", "green", "blue"} <= set(names):
        return None
    # Shades at the rim of a painted area are no further defects, so the colours themselves tell none apart.
    coloured = np.max([vertices[name] for name in ("red", "green", "blue")], 0) > BLACK
    if coloured.mean() > TEXTURED:
        raise DataError(f"{coloured.mean():.0%} of its vertices have a colour, so it marks no defect: a texture?")
    return coloured.astype(np.int32)


@decoder("PLY")
def decode_ply(content: bytes) -> np.ndarray:
    """The vertices (n,) of a PLY file, ascii or binary, as a structured array with the file's names.

    Raises:
        DataError: not a complete PLY file whose first element is its vertices.
    """
    # Lines end in LF, CR LF or CR; the header says which, and binary vertices start right behind its last one.
    end = re.match(rb"ply[ \t]*(\r\n|\n|\r)(?:.*?(?:\r\n|\n|\r))?end_header[ \t]*\1", content[:LONGEST_HEADER], re.S)
    if end is None:
        raise DataError("not a PLY file")
    start, line_end = end.end(), end[1]
    lines = [line.split() for line in content[:start].decode("ascii").splitlines() if line]
    encoding = next(line[1] for line in lines if line[0] == "format")
    places = [place for place, line in enumerate(lines) if line[0] == "element"] + [len(lines)]
    name, count = lines[places[0]][1], int(lines[places[0]][2])
    if name != "vertex" or count < 0:
        raise DataError(f"the first element is {count} of {name}, expected vertices")
    order = {"ascii": "=", "binary_little_endian": "<", "binary_big_endian": ">"}[encoding]
    properties = [line[1:] for line in lines[places[0] + 1 : places[1]] if line[0] == "property"]
    vertex = np.dtype([(name, order + TYPES[kind]) for kind, name in properties])
    if encoding != "ascii":
        return np.frombuffer(content, vertex, count, start)
    rows = content[start:].split(line_end, count)[:count]
    if len(rows) < count:
        raise DataError(f"cut short: {len(rows)} of {count} vertices")
    values = np.array([row.split() for row in rows], np.float64).reshape(count, len(properties))
    vertices = np.empty(count, vertex)
    for place, (_, name) in enumerate(properties):
        vertices[name] = values[:, place]
    return vertices


def _read_masks(path: Path, stems: tuple[str, ...]) -> Truth:
    files = {file.stem: file for file in path.iterdir() if file.suffix.lower() == ".png" and not hidden(file.name)}
    foreign = sorted(set(files) - set(stems))
    if foreign:
        raise DataError(f"{files[foreign[0]]}: no view has this name")
    masks = {stem: named(str(file), _mask, file) for stem, file in files.items()}
    if not masks:
        raise DataError(f"{path}: no mask of any view")
    empty = np.zeros_like(next(iter(masks.values())))
    return Truth("masks", masks=tuple(masks.get(stem, empty) for stem in stems))


def _mask(file: Path) -> np.ndarray:
    return decode_image(RawFile(str(file.parent), file.name).read()).any(-1)
