"""``dino-depth check PARTS``: whether a folder of one's own parts is what its rig.json says.

Reads every view of every instance: sizes, missing pixels, distances, and whether the back-projected views of an
instance meet, which wrong poses, units or conventions prevent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dino_depth.anomaly.benchmarks.calibration import (
    CalibrationOptions,
    cameras_of,
    check_overlap,
    rival_settings,
    thin,
)
from dino_depth.anomaly.dataset import Sample, named
from dino_depth.anomaly.geometry import Camera, lift, resize_camera
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError
from dino_depth.inspection.parts import instance_folders, read_instance
from dino_depth.inspection.rig import Rig
from dino_depth.progress import Progress
from dino_depth.terminal import say

__all__ = ["PartsCheck", "PartsConfig", "check", "check_instance"]

PLAUSIBLE = (0.02, 50.0)  # metres: median distances of a part before a camera
EMPTY = 0.98  # a view that misses more of its pixels shows nothing


@dataclass(frozen=True)
class PartsCheck:
    """What one instance measured.

    Attributes:
        views: their number.
        missing: share of the pixels without depth.
        distance: median depth, metres.
        extent: of the bounding box of all valid points, metres; (0, 0, 0) without cameras.
        overlap: see ``check_overlap``; NaN for a single view.
    """

    views: int
    missing: float
    distance: float
    extent: tuple[float, float, float]
    overlap: float


def check_instance(sample: Sample, rig: Rig) -> PartsCheck:
    """Measures an instance.

    Raises:
        DataError: a view cannot be read, is empty or implausibly far, image and depth differ in size, or views do not
            meet; the message names the view and, where another convention of ``calibration`` would do, that.
    """
    depths = []
    for view in sample.views:
        place = f"{sample.name}/{view.name}"
        depth, image = named(place, view.read_depth), named(place, view.read_image)
        if image.shape[:2] != depth.depth.shape:
            raise DataError(f"{place}: the image is {_size(image.shape)}, the depth {_size(depth.depth.shape)}")
        if 1 - depth.valid.mean() > EMPTY:
            raise DataError(f"{place}: {100 * (1 - depth.valid.mean()):.1f} % of the depth is missing")
        median = float(np.median(depth.depth[depth.valid]))
        if not PLAUSIBLE[0] <= median <= PLAUSIBLE[1]:
            raise DataError(f"{place}: a median depth of {median:.4g} m: depth.unit {rig.depth.unit} does not fit")
        depths.append(depth)
    overlap, extent = float("nan"), np.zeros(3)
    if rig.cameras:
        cameras = [view.camera for view in sample.views]
        clouds = [_points(depth, camera) for depth, camera in zip(depths, cameras, strict=True)]
        extent = np.ptp(np.concatenate(clouds), axis=0)
        overlap = named(sample.name, check_overlap, [thin(depth) for depth in depths], cameras, _rivals(rig, sample))
    together = np.concatenate([depth.depth[depth.valid].ravel() for depth in depths])
    missing = 1 - float(np.mean([depth.valid.mean() for depth in depths]))
    return PartsCheck(len(depths), missing, float(np.median(together)), tuple(extent.tolist()), overlap)


def _size(shape: Sequence[int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _points(depth: DepthMap, camera: Camera) -> np.ndarray:
    thinned = thin(depth)
    return lift(resize_camera(camera, *thinned.shape), thinned.pixels, thinned.depth)


def _rivals(rig: Rig, sample: Sample):
    """The cameras of the views under every other convention."""
    for words, options in rival_settings(rig.calibration):
        try:
            cameras = dict(cameras_of(rig.rows, options)) if rig.rows else {}
        except DataError:
            continue  # under this convention the numbers are no cameras
        if cameras:
            yield words, [cameras[view.name] for view in sample.views]


@dataclass
class PartsConfig:
    """Verification of a folder of one's own parts.

    Attributes:
        parts: the folder, or that of a single instance.
    """

    parts: str


def check(config: PartsConfig) -> list[PartsCheck]:
    """Checks every instance of a folder and prints a line for each.

    Raises:
        DataError: the first fault.
    """
    root = config.parts
    folders, rig, checked = instance_folders(root), None, []
    with Progress("check", len(folders), "instances") as progress:
        for folder in folders:
            sample, rig = read_instance(folder, rig)
            checked.append(check_instance(sample, rig))
            progress.advance()
    width = max(len(folder.name) for folder in folders)
    for folder, part in zip(folders, checked, strict=True):
        extent = " x ".join(f"{1000 * side:.0f}" for side in part.extent)
        told = f"points span {extent} mm, views meet within {part.overlap:.3f}" if rig.cameras else "no camera"
        told = told.replace(", views meet within nan", "")
        say(f"{folder.name:{width}}  missing {100 * part.missing:4.1f} %  at {part.distance:.3f} m  {told}")
    convention = "" if rig.calibration == CalibrationOptions() else f", {rig.calibration.unit} {rig.calibration.axes}"
    say(f"{root}: {len(checked)} instances of {checked[0].views} views{convention}, nothing contradicts the rig")
    return checked
