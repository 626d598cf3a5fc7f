"""The rig that took the scans of a part: its views, their cameras, and what a stored depth means.

``rig.json`` lies in the folder of an instance, or in one of the two folders above it, for all instances below:

    {"format": 1,
     "depth": {"unit": "mm", "missing": [65535]},                 options of `prep folder`; may be left out
     "calibration": {"unit": "mm", "axes": "opencv", "direction": "camera_to_world"},          may be left out
     "cameras": [{"name": "view_01", "height": 480, "width": 640, "matrix": 3x3, "distortion": [], "camera_to_world":
                  4x4}, ...]}

A part with a single view needs neither cameras nor, where floats are metres and integers millimetres, the file.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.folder import FolderOptions
from data_prep.tree import refuse_link_out
from dino_depth.anomaly.benchmarks.calibration import CalibrationOptions, cameras_of
from dino_depth.anomaly.dataset import named
from dino_depth.anomaly.geometry import Camera
from dino_depth.config import suggestion
from dino_depth.errors import DataError

__all__ = ["RIG", "Rig", "difference", "find_rig", "read_rig", "rig_json"]

RIG = "rig.json"
FORMAT = 1
ABOVE = 2  # folders above an instance that may hold the rig of all
LARGEST = 2**24
DEPTH_KEYS = ("kind", "unit", "scale", "missing", "farthest", "channel", "layer", "larger_is", "offset", "encoding")
SAME_PIXELS = 1e-3  # intrinsics that differ by less are written with fewer digits
SAME_PLACE = 1e-5  # of poses, metres and parts of a rotation matrix


@dataclass(frozen=True, eq=False)
class Rig:
    """Views of a rig in the order of their names.

    Attributes:
        cameras: by the name of the view; empty for a single view without one.
        depth: what stored depths mean.
        calibration: what the numbers of the file meant; ``cameras`` are in OpenCV's axes and metres whatever it says.
        rows: the cameras as the file had them, to read them under other conventions.
    """

    cameras: dict[str, Camera] = field(default_factory=dict)
    depth: FolderOptions = field(default_factory=FolderOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)
    rows: list[dict[str, Any]] = field(default_factory=list)


def find_rig(folder: Path) -> Path | None:
    """The rig.json that holds for an instance's folder; None where there is none."""
    places = [folder, *list(folder.absolute().parents)[:ABOVE]]
    return next((place / RIG for place in places if (place / RIG).is_file()), None)


def read_rig(path: Path) -> Rig:
    """The rig of a file.

    Raises:
        DataError: it is no rig.json, a link out of its folder, or a key or a value of it is impossible; the message
            names it.
    """
    refuse_link_out(path, path.parent.resolve())
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(f"{path}: larger than {LARGEST >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return named(str(path), rig_of, content)


def rig_of(content: Any) -> Rig:
    """The rig of what rig.json holds; raises DataError as ``read_rig``."""
    _known(content, ("format", "depth", "calibration", "cameras"), "rig")
    if content.get("format") != FORMAT:
        raise DataError(f"format is {content.get('format')!r}, this version reads {FORMAT}")
    depth = _options(FolderOptions, content.get("depth", {}), DEPTH_KEYS, "depth")
    calibration = _options(
        CalibrationOptions, content.get("calibration", {}), tuple(f.name for f in fields(CalibrationOptions)),
        "calibration",
    )  # fmt: skip
    if depth.kind != "metric":
        raise DataError(f"depth.kind is {depth.kind!r}: parts are inspected in millimetres, which need metric depth")
    rows = content.get("cameras", [])
    return Rig(dict(cameras_of(rows, calibration)) if rows else {}, depth, calibration, rows)


def _known(content: Any, keys: tuple[str, ...], name: str):
    if not isinstance(content, Mapping):
        raise DataError(f"{name} must hold keys and values, got {type(content).__name__}")
    for key in content:
        if key not in keys:
            raise DataError(f"{name}: unknown key {key!r}{suggestion(str(key), list(keys))}")


def _options(kind: type, content: Any, keys: tuple[str, ...], name: str) -> Any:
    """A dataclass of strings, numbers and lists of numbers from JSON, each value of its type and among its choices."""
    _known(content, keys, name)
    plain = {entry.name: entry for entry in fields(kind)}
    for key, value in content.items():
        choices = getattr(plain[key].type, "__args__", ()) if plain[key].type is not list else ()
        default = getattr(kind(), key)
        if choices and not isinstance(default, list):
            if value not in choices:
                raise DataError(f"{name}.{key} must be one of {', '.join(map(str, choices))}, got {value!r}")
        elif isinstance(default, list):
            if not isinstance(value, list) or not all(_number(item) for item in value):
                raise DataError(f"{name}.{key} must be a list of numbers, got {value!r}")
        elif isinstance(default, bool) or isinstance(default, str):
            if not isinstance(value, type(default)):
                raise DataError(f"{name}.{key} must be {type(default).__name__}, got {value!r}")
        elif not _number(value) or (isinstance(default, int) and value != int(value)):
            raise DataError(f"{name}.{key} must be a number, got {value!r}")
    return kind(**content)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def rig_json(rig: Rig) -> dict[str, Any]:
    """What ``rig_of`` reads back: cameras in OpenCV's axes, metres and from camera to world."""
    rows = [
        {
            "name": name, "height": camera.height, "width": camera.width, "matrix": camera.matrix.tolist(),
            "distortion": list(camera.distortion), "camera_to_world": camera.camera_to_world.tolist(),
        }
        for name, camera in rig.cameras.items()
    ]  # fmt: skip
    plain, depth = FolderOptions(), asdict(rig.depth)
    kept = {key: depth[key] for key in DEPTH_KEYS if depth[key] != getattr(plain, key)}
    return {"format": FORMAT, "depth": kept, **({"cameras": rows} if rows else {})}


def difference(rig: Rig, other: Rig) -> str:
    """What ``other`` has that ``rig`` has not, in words; empty where both are the same rig."""
    for key in DEPTH_KEYS:
        one, two = getattr(rig.depth, key), getattr(other.depth, key)
        if one != two:
            return f"depth.{key} is {two!r} and was {one!r}"
    if set(rig.cameras) != set(other.cameras):
        return f"its cameras are {_list(other.cameras)} and were {_list(rig.cameras)}"
    for name, camera in rig.cameras.items():
        found = other.cameras[name]
        if (camera.height, camera.width) != (found.height, found.width):
            return f"camera {name} is {found.height}x{found.width} and was {camera.height}x{camera.width}"
        lens = (tuple(part.distortion) + (0.0,) * (5 - len(part.distortion)) for part in (camera, found))
        if abs(camera.matrix - found.matrix).max() > SAME_PIXELS or not np.allclose(*lens, rtol=0, atol=1e-6):
            return f"camera {name} has another matrix or distortion"
        if abs(camera.camera_to_world - found.camera_to_world).max() > SAME_PLACE:
            moved = 1000 * np.linalg.norm((camera.camera_to_world - found.camera_to_world)[:3, 3])
            return f"camera {name} stands elsewhere (by {moved:.3g} mm) or is turned"
    return ""


def _list(names: Mapping[str, Any]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "") if shown else "none"
