"""``dino-depth convert FORM ROOT --out PARTS``: other people's layouts to the folders of ``parts.py``.

    sim3d    ROOT of the benchmark; good and anomalous instances of a class go to PARTS/good and PARTS/bad
    bop      ROOT is a scene of the BOP benchmark (T-LESS, IPD, XYZ-IBD), or a folder of scenes; a scene becomes an
             instance whose world is that of cam_R_w2c or, where there is none, of the object
    clouds   ROOT holds organised point clouds, one instance each: PCD, or TIFF of X, Y, Z as MVTec 3D-AD has them

Depth is written as float32 metres, NaN where it is missing.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tifffile
from PIL import Image

from data_prep import folder as depth_files
from data_prep.archives import hidden
from data_prep.folder import FolderOptions
from data_prep.formats import decode_image, decode_png
from data_prep.tree import RawTree, refuse_links_out
from dino_depth.anomaly.benchmarks.sim3d import Sim3dOptions, open_benchmark
from dino_depth.anomaly.dataset import Sample, named
from dino_depth.anomaly.geometry import Camera, resize_camera
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError
from dino_depth.inspection.rig import RIG, Rig, rig_json
from dino_depth.progress import Progress
from dino_depth.terminal import say

__all__ = ["ConvertConfig", "convert", "write_instance"]

CLOUDS = "**/*.[pt][ci][df]*"  # .pcd, .tif, .tiff; images lie beside


@dataclass
class ConvertConfig:
    """Other layouts to folders of one's own parts.

    Attributes:
        form: sim3d, bop or clouds.
        root: folder to read.
        out: folder to write, new or empty.
        category: class of sim3d; may be left out where there is one.
        object: object of bop, by its obj_id: all else becomes missing depth; 0 keeps the whole scene.
        sim3d: what is unknown about SiM3D's files.
        folder: what depths of clouds mean, as in `prep folder`.
    """

    form: Literal["sim3d", "bop", "clouds"]
    root: str
    out: str = ""
    category: str = ""
    object: int = 0
    sim3d: Sim3dOptions = field(default_factory=Sim3dOptions)
    folder: FolderOptions = field(default_factory=FolderOptions)


def convert(config: ConvertConfig) -> None:
    """Writes the folders.

    Raises:
        ConfigError: ``out`` is missing or not empty.
        DataError: the layout is another, or a file cannot be read.
    """
    out = Path(config.out)
    if not config.out:
        raise ConfigError("--out is missing: name the folder to write")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not an empty folder: name a new one")
    if not Path(config.root).is_dir():
        raise DataError(f"root {config.root} is not a folder")
    refuse_links_out(config.root)
    instances = {"sim3d": _sim3d, "bop": _bop, "clouds": _clouds}[config.form](config)
    with Progress(f"convert {config.form}", len(instances), "instances") as progress:
        for place, write in instances:
            write(out / place)
            progress.advance()
    say(f"{out}: {len(instances)} instances; dino-depth check {out / instances[0][0].parent}")


def write_instance(
    folder: Path, images: Iterable[np.ndarray], depths: Iterable[DepthMap], names: list[str], rig: Rig | None
):
    """Writes the views of an instance and, unless it is None, its rig."""
    for name, image, depth in zip(names, images, depths, strict=True):
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / "image.png")
        tifffile.imwrite(
            place / "depth.tiff", np.where(depth.valid, depth.depth, np.nan).astype(np.float32), compression="zlib"
        )
    if rig is not None:
        (folder / RIG).write_text(json.dumps(rig_json(rig), indent=1) + "\n", encoding="utf-8")


def _names(count: int) -> list[str]:
    return [f"view_{place:02d}" for place in range(1, count + 1)]


def _sim3d(config: ConvertConfig) -> list:
    benchmark = open_benchmark(config.root, config.sim3d)
    if not config.category and len(benchmark.categories) > 1:
        raise ConfigError(f"--category is missing: one of {', '.join(benchmark.categories)}")
    category = config.category or benchmark.categories[0]
    samples = [*benchmark.samples(category, "train"), *benchmark.samples(category, "test")]
    kind = {"good": "good", "anomalous": "bad"}
    return [(Path(kind[sample.label], sample.name), _writer(sample)) for sample in samples]


def _writer(sample: Sample):
    def write(folder: Path):
        names = _names(len(sample.views))
        depths = [view.read_depth() for view in sample.views]
        cameras = {
            name: resize_camera(view.camera, *depth.depth.shape)
            for name, view, depth in zip(names, sample.views, depths, strict=True)
        }
        write_instance(folder, (view.read_image() for view in sample.views), depths, names, None)
        (folder.parent / RIG).write_text(json.dumps(rig_json(Rig(cameras)), indent=1) + "\n", encoding="utf-8")

    return write


def _bop(config: ConvertConfig) -> list:
    root = Path(config.root)
    scenes = [root] if (root / "scene_camera.json").is_file() else sorted(root.glob("*/scene_camera.json"))
    scenes = [path if path.is_dir() else path.parent for path in scenes]
    if not scenes:
        raise DataError(f"{root} is no scene of BOP and holds none: no scene_camera.json")

    def writer(scene: Path):
        return lambda folder: _write_scene(scene, folder, config.object)

    return [(Path(scene.name), writer(scene)) for scene in scenes]


def _write_scene(scene: Path, folder: Path, wanted: int):
    cameras, poses = _json(scene / "scene_camera.json"), {}
    if (scene / "scene_gt.json").is_file():
        poses = _json(scene / "scene_gt.json")
    images, depths, made = [], [], {}
    numbers = sorted(cameras, key=int)
    for name, number in zip(_names(len(numbers)), numbers, strict=True):
        place = f"{scene}, image {number}"
        row = cameras[number]
        image, codes = _pixels(scene, int(number))
        valid = codes > 0
        objects = poses.get(number, [])
        if wanted:
            valid = valid & _visible(scene, int(number), objects, wanted, codes.shape)
        try:
            depth = codes * (float(row.get("depth_scale", 1.0)) / 1000)
            matrix = np.array(row["cam_K"], np.float64).reshape(3, 3)
            to_camera = _pose(row, "cam_R_w2c", "cam_t_w2c")
            if to_camera is None:
                listed = [other for other in objects if wanted in (0, other["obj_id"])]
                to_camera = _pose(listed[0], "cam_R_m2c", "cam_t_m2c") if listed else None
            if to_camera is None and len(numbers) > 1:
                raise DataError(f"{place}: neither cam_R_w2c nor a pose of the object says where the camera is")
            pose = np.eye(4) if to_camera is None else np.linalg.inv(to_camera)
        except (KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
            raise DataError(f"{place}: {type(error).__name__} {error}") from error
        pose[3] = 0, 0, 0, 1
        if not valid.any():
            raise DataError(f"{place}: shows nothing of object {wanted}" if wanted else f"{place}: no depth")
        made[name] = named(place, Camera, *codes.shape, matrix, pose)
        images.append(image)
        depths.append(DepthMap(np.where(valid, depth, 0), valid))
    write_instance(folder, images, depths, list(made), Rig(made))


def _json(path: Path) -> dict:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _pose(row: dict, turn: str, shift: str) -> np.ndarray | None:
    """(4, 4) world to camera, metres; None where the row has none."""
    if turn not in row:
        return None
    matrix = np.eye(4)
    matrix[:3, :3] = np.array(row[turn], np.float64).reshape(3, 3)
    matrix[:3, 3] = np.array(row[shift], np.float64) / 1000
    return matrix


def _pixels(scene: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The image and the stored depths (height, width) of a view."""
    found = [
        scene / kind / f"{number:06d}{ending}" for kind in ("rgb", "gray") for ending in (".png", ".jpg")
        if (scene / kind / f"{number:06d}{ending}").is_file()
    ]  # fmt: skip
    if not found:
        raise DataError(f"{scene}: no rgb/{number:06d}.png, .jpg or gray/{number:06d}.png")
    image = named(str(found[0]), decode_image, found[0].read_bytes())
    path = scene / "depth" / f"{number:06d}.png"
    if not path.is_file():
        raise DataError(f"{path} is not there")
    return image, named(str(path), decode_png, path.read_bytes())


def _visible(scene: Path, number: int, objects: list, wanted: int, shape: tuple[int, int]) -> np.ndarray:
    """Pixels (height, width) bool that show an object."""
    seen = np.zeros(shape, bool)
    for place, row in enumerate(objects):
        path = scene / "mask_visib" / f"{number:06d}_{place:06d}.png"
        if row.get("obj_id") == wanted and path.is_file():
            seen |= named(str(path), decode_image, path.read_bytes())[..., 0] > 0
    return seen


def _clouds(config: ConvertConfig) -> list:
    given = config.folder
    options = replace(given, split="scan", category=given.category or "part", glob=given.glob or CLOUDS)
    items = depth_files.items(RawTree(config.root), options)
    names = {item.stem for item in items}
    if len(names) < len(items):
        raise DataError(f"{config.root}: clouds of equal names, such as {items[0].stem}: convert one folder at a time")

    def writer(item):
        def write(folder: Path):
            depth = named(str(item.file), depth_files.read, item)
            write_instance(folder, [_photograph(item, depth)], [depth], _names(1), None)

        return write

    return [(Path(item.stem), writer(item)) for item in items if not hidden(item.stem)]


def _photograph(item, depth: DepthMap) -> np.ndarray:
    """The image of a cloud: ../rgb/NAME.png where there is one, as MVTec 3D-AD has it, else its depth as brightness."""
    path = Path(str(item.file))
    photograph = path.parent.parent / "rgb" / f"{path.stem}.png"
    if photograph.is_file():
        return named(str(photograph), decode_image, photograph.read_bytes())
    near, far = np.percentile(depth.depth[depth.valid], [1, 99])
    level = 1 - np.clip((depth.depth - near) / max(far - near, 1e-9), 0, 1)
    return np.where(depth.valid, 30 + 225 * level, 0).astype(np.uint8)
