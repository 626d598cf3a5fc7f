"""BOP layouts (bop.felk.cvut.cz): ``[SPLIT/]NNNNNN/scene_camera.json`` beside ``depth/*.png``.

Poses are ``cam_R_w2c`` and ``cam_t_w2c`` (millimetres). Where a data set has none, the first object of
``scene_gt.json`` stands in for the world, as the objects of a scene do not move.
"""

import json
from pathlib import Path

import numpy as np

from dino_depth.anomaly.dataset import named
from dino_depth.anomaly.geometry import Camera
from dino_depth.bench.data import Source, View
from dino_depth.bench.sources import Options, evenly, files
from dino_depth.bench.sources.posed import read_depth
from dino_depth.errors import DataError

__all__ = ["FORM", "read", "recognises"]

FILE = "scene_camera.json"
FORM = f"NNNNNN/{FILE} and NNNNNN/depth/*.png"


def _scenes(folder: Path) -> list[Path]:
    return [path for path in files(folder, FILE) if path.name == FILE]


def recognises(folder: Path) -> bool:
    return bool(_scenes(folder))


def read(folder: Path, options: Options) -> Source:
    """Raises DataError where a file is missing or broken, or a frame has no pose."""
    views = []
    scenes = _scenes(folder)
    for file in scenes:
        scene = file.parent
        cameras = _json(file)
        truth = _json(scene / "scene_gt.json") if (scene / "scene_gt.json").is_file() else {}
        shared = _shared_object(truth)
        for key in evenly(sorted(cameras, key=int), options.frames):
            path = scene / "depth" / f"{int(key):06d}.png"
            if not path.is_file():
                raise DataError(f"{path} is missing: {file.name} names frame {key}")
            views.append(_view(path, file, key, cameras[key], truth.get(key, []), shared))
    return Source(folder.name, f"{len(scenes)} BOP scenes", views)


def _json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: unreadable: {error}") from None


def _shared_object(truth: dict) -> int | None:
    """The first object that every frame shows exactly once."""
    counts = [[entry.get("obj_id") for entry in entries] for entries in truth.values()]
    return next((one for one in (counts[0] if counts else []) if all(ids.count(one) == 1 for ids in counts)), None)


def _view(path: Path, file: Path, key: str, camera: dict, objects: list, shared: int | None) -> View:
    where, turn, move = f"{file} frame {key}", "cam_R_w2c", "cam_t_w2c"
    stated = camera
    if turn not in camera and shared is not None:
        turn, move = "cam_R_m2c", "cam_t_m2c"
        stated = next(entry for entry in objects if entry["obj_id"] == shared)
    if turn not in stated or move not in stated:
        raise DataError(f"{where}: no pose: neither {turn} nor an object in scene_gt.json that all frames show once")
    try:
        from_world = np.eye(4)
        from_world[:3, :3] = np.reshape(np.array(stated[turn], np.float64), (3, 3))
        from_world[:3, 3] = np.array(stated[move], np.float64) / 1000
        matrix = np.reshape(np.array(camera["cam_K"], np.float64), (3, 3))
        depth = read_depth(path, float(camera["depth_scale"]) / 1000)
        pose = np.linalg.inv(from_world)
        pose[3] = 0, 0, 0, 1
    except (KeyError, ValueError, TypeError, np.linalg.LinAlgError) as error:
        raise DataError(f"{where}: {type(error).__name__} {error}") from None
    return View(file.parent.name, key, depth, named(where, Camera, *depth.depth.shape, matrix, pose))
