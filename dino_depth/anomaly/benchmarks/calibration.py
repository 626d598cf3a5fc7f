"""Cameras of a class from files, and whether the views they place meet.

The format of SiM3D's calibration is unknown, so two adapters exist. Both are looked for beside the instances of the
class, then in the root of the benchmark.

    calibration.json               {"cameras": [{"name": stem of a view, "height", "width", "matrix": 3x3,
                                    "distortion": [k1, k2, p1, p2, k3] or [], "camera_to_world": 4x4}, ...]}
    calib.xml + pose_ocv.txt       OpenCV's FileStorage with wL, hL, mtxL, distL; one view a line in the order of the
                                   views, 16 numbers, a 4x4 matrix by rows. pose.txt has OpenGL's axes (y up, z back).

A wrong convention does not raise: it scatters the views. ``check_overlap`` measures that, and finds the setting that
would have brought them together. What it cannot see is a mistake that turns all views alike, or the order of the views
of an object that looks the same from all of them; ground truth off the surface shows the former.
"""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from scipy.spatial import KDTree

from dino_depth.anomaly.dataset import named
from dino_depth.anomaly.geometry import Camera, lift, resize_camera
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = [
    "CalibrationOptions", "Thinned", "cameras_of", "check_overlap", "check_truth", "overlap", "read_cameras",
    "rival_settings", "thin",
]  # fmt: skip

JSON = "calibration.json"
XML = "calib.xml"
POSES = {"pose_ocv.txt": "opencv", "pose.txt": "opengl"}
OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
LARGEST_FILE = 2**24
THINNED = 800  # points of a view that are compared
COMPARED = 6  # views that are looked for in all others, at least that many
BETTER = 2 / 3  # a setting that brings views, or ground truth and surface, this much closer contradicts the one in use
APART = 0.1  # views that are farther apart than this share of their own extent do not show one object


@dataclass
class CalibrationOptions:
    """What the numbers of calibration files mean.

    Attributes:
        axes: of the camera: ``opencv`` (x right, y down, z forward) or ``opengl`` (x right, y up, z back); ``auto`` is
            opengl for pose.txt and opencv for all other files.
        direction: what a pose does.
        unit: of its translation.
        distortion: whether the lens's distortion is undone.
    """

    axes: Literal["auto", "opencv", "opengl"] = "auto"
    direction: Literal["camera_to_world", "world_to_camera"] = "camera_to_world"
    unit: Literal["m", "mm"] = "m"
    distortion: bool = True


def read_cameras(folders: Sequence[Path], options: CalibrationOptions) -> list[tuple[str | None, Camera]]:
    """The cameras of a class and the views they belong to; None where a file only has their order.

    Args:
        folders: where to look; the first that holds a calibration counts.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    for folder in folders:
        if (folder / JSON).is_file():
            return named(str(folder / JSON), _read_json, folder / JSON, options)
        if (folder / XML).is_file():
            found = [name for name in POSES if (folder / name).is_file()]
            if len(found) != 1:
                raise DataError(f"{folder / XML}: needs one of {', '.join(POSES)} beside it, found {found or 'none'}")
            lens = named(str(folder / XML), _read_xml, folder / XML)
            return named(str(folder / found[0]), _read_poses, folder / found[0], lens, options)
    places = " or ".join(map(str, folders))
    raise DataError(f"no calibration in {places}: expected {JSON}, or {XML} and one of {', '.join(POSES)}")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise DataError(f"larger than {LARGEST_FILE >> 20} MiB")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}") from error


def _read_json(path: Path, options: CalibrationOptions) -> list[tuple[str | None, Camera]]:
    try:
        rows = json.loads(_text(path))["cameras"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"not a calibration: {type(error).__name__} {error}") from error
    return cameras_of(rows, options)


def cameras_of(rows: Any, options: CalibrationOptions) -> list[tuple[str, Camera]]:
    """The cameras of the list in calibration.json, with the views they belong to.

    Raises:
        DataError: a key or a number is missing or impossible.
    """
    try:
        read = [
            (str(row["name"]), int(row["height"]), int(row["width"]), _numbers(row["matrix"], 9).reshape(3, 3),
             tuple(_numbers(row.get("distortion", []))), _numbers(row["camera_to_world"], 16).reshape(4, 4))
            for row in rows
        ]  # fmt: skip
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"not a calibration: {type(error).__name__} {error}") from error
    if len({name for name, *_ in read}) < len(read) or not read:
        raise DataError(f"{len(read)} cameras, and each view needs one of its own")
    return [(name, _camera(*lens, pose, "opencv", options)) for name, *lens, pose in read]


def _numbers(values: Any, count: int | None = None) -> np.ndarray:
    numbers = np.asarray(values, np.float64).ravel()
    if count is not None and len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers instead of {count}")
    return numbers


def _read_xml(path: Path) -> tuple[int, int, np.ndarray, tuple[float, ...]]:
    """Height, width, matrix and distortion of the left camera."""
    text = _text(path)
    if "<!" in text.replace("<!--", ""):
        raise DataError("declares entities or types of documents, which no calibration needs")
    try:
        tree = ElementTree.fromstring(text)
        values = {}
        for name in ("wL", "hL", "mtxL", "distL"):
            text = tree.findtext(f"{name}/data") or tree.findtext(name)
            if not text:
                raise ValueError(f"no {name}")
            values[name] = _numbers(text.split())
        width, height = (int(_numbers(values[name], 1)[0]) for name in ("wL", "hL"))
        return height, width, _numbers(values["mtxL"], 9).reshape(3, 3), tuple(values["distL"])
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"not a calibration of OpenCV: {error}") from error


def _read_poses(path: Path, lens: tuple, options: CalibrationOptions) -> list[tuple[str | None, Camera]]:
    cameras = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            pose = _numbers(line.replace(",", " ").split(), 16).reshape(4, 4)
        except ValueError as error:
            raise DataError(f"line {number}: {error}") from error
        cameras.append((None, named(f"line {number}", _camera, *lens, pose, POSES[path.name], options)))
    return cameras


def _camera(
    height: int,
    width: int,
    matrix: np.ndarray,
    distortion: tuple[float, ...],
    pose: np.ndarray,
    axes: str,
    options: CalibrationOptions,
) -> Camera:
    pose = pose.copy()
    if options.unit == "mm":
        pose[:3, 3] /= 1000
    if options.direction == "world_to_camera":
        try:
            pose = np.linalg.inv(pose)
        except np.linalg.LinAlgError as error:
            raise DataError(f"a pose cannot be inverted: {pose.tolist()}") from error
        pose[3] = 0, 0, 0, 1
    if (axes if options.axes == "auto" else options.axes) == "opengl":
        pose = pose @ OPENGL
    return Camera(height, width, matrix, pose, distortion if options.distortion else ())


def overlap(clouds: Sequence[np.ndarray]) -> float:
    """How far views lie apart: the distance within which three quarters of a view's points (n, 3) meet another view,
    over the diagonal of its bounding box; the mean over some views. About a hundredth for views of one object."""
    apart = []
    for place in range(0, len(clouds), max(1, len(clouds) // COMPARED)):  # the time of all grows with their square
        cloud = clouds[place]
        others = np.concatenate([other for number, other in enumerate(clouds) if number != place])
        extent = np.linalg.norm(np.ptp(cloud, 0))
        apart.append(np.quantile(KDTree(others).query(cloud)[0], 0.75) / max(extent, 1e-12))
    return float(np.mean(apart))


@dataclass(frozen=True, eq=False)
class Thinned:
    """Some pixels (n, 2), as (column, row), of a depth map of ``shape``, and their depths (n,), metres."""

    shape: tuple[int, int]
    pixels: np.ndarray
    depth: np.ndarray


def thin(depth_map: DepthMap) -> Thinned:
    """About ``THINNED`` pixels on a regular grid, those that are valid."""
    step = max(1, int(np.sqrt(np.count_nonzero(depth_map.valid) / THINNED)))
    rows, columns = (axis * step for axis in np.nonzero(depth_map.valid[::step, ::step]))
    return Thinned(depth_map.depth.shape, np.stack([columns, rows], 1), depth_map.depth[rows, columns])


def check_overlap(
    views: Sequence[Thinned], cameras: Sequence[Camera], rivals: Iterable[tuple[str, Sequence[Camera]]]
) -> float:
    """The overlap of the views of one object; NaN for a single view.

    Args:
        rivals: what the cameras would be under other settings, and those in words; of equals the first is named.

    Raises:
        DataError: the views do not meet, or meet far better under another setting, which is named.
    """
    if len(views) < 2:
        return float("nan")
    measured = overlap(_clouds(views, cameras))
    better = [(overlap(_clouds(views, other)), words) for words, other in rivals]
    best, words = min(better, default=(np.inf, ""), key=lambda rival: rival[0])
    if best < min(measured * BETTER, APART):
        raise DataError(
            f"back-projected views lie {measured:.3f} of their extent apart, but {best:.3f} with {words}, which is "
            "probably right"
        )
    if measured > APART:
        raise DataError(
            f"back-projected views lie {measured:.3f} of their extent apart, above {APART}: these poses are not those "
            "of these views, or are listed in another order"
        )
    return measured


def check_truth(points: np.ndarray, views: Sequence[Thinned], cameras: Sequence[Camera], unit: str) -> float:
    """The median distance of ground truth (n, 3) to the surface that the views show, over the extent of that surface.

    Args:
        unit: m or mm, the setting under which the points are metres.

    Raises:
        DataError: it lies elsewhere, or would lie far nearer in the other unit.
    """
    surface = np.concatenate(_clouds(views, cameras))
    tree, extent = KDTree(surface), max(float(np.linalg.norm(np.ptp(surface, 0))), 1e-12)
    other, factor = ("m", 1000) if unit == "mm" else ("mm", 0.001)
    off, off_other = (float(np.median(tree.query(points * scale)[0])) / extent for scale in (1, factor))
    if off > APART or off_other < off * BETTER:
        hint = f": sim3d.truth.unit {other} gives {off_other:.3f}" if off_other < min(off * BETTER, APART) else ""
        raise DataError(f"the ground truth lies {off:.3f} of the object's extent off its surface{hint}")
    return off


def _clouds(views: Sequence[Thinned], cameras: Sequence[Camera]) -> list[np.ndarray]:
    """World points (n, 3) of each view that shows anything."""
    return [
        lift(resize_camera(camera, *view.shape), view.pixels, view.depth)
        for view, camera in zip(views, cameras, strict=True)
        if len(view.pixels)
    ]


def rival_settings(options: CalibrationOptions) -> list[tuple[str, CalibrationOptions]]:
    """Every other combination of conventions, in words and as settings, those that change least first."""
    choices = {name: get_args(field_type) for name, field_type in _literals().items()}
    rivals = []
    for values in product(*choices.values()):
        changed = {key: value for key, value in zip(choices, values, strict=True) if value != getattr(options, key)}
        if changed:
            words = " and ".join(f"calibration.{key} {value}" for key, value in changed.items())
            rivals.append((len(changed), words, replace(options, **changed)))
    return [(words, rival) for _, words, rival in sorted(rivals, key=lambda rival: rival[:2])]


def _literals() -> dict[str, Any]:
    return {field.name: field.type for field in fields(CalibrationOptions) if get_args(field.type)}
