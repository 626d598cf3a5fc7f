"""``dino-depth prep-views``: Eyecandies seen from twelve views, by warping its one view (SGANet, section 4.1).

    OUT/<category>/train/<index>/               one sample of ``train``
                   test/<index>_{good,bad}/     all of ``test_public``
        depth/<view>.npy   float32 metres, +inf where no pixel of the source is seen
        rgb/<view>.png     colours, black there
        mask/<view>.png    of tests: 255 where anomalous
        calibration.json   cameras in the coordinates of the source's camera (x right, y down, z forward)
    OUT/VIEWS.json                              the settings

The object's pixels become a mesh, whose triangles do not bridge jumps of depth. It is turned about its centroid before
the fixed camera, by R = R_x(x) R_y(y): first about the camera's y axis, then about its x axis; in the world, which is
the source's camera, that is a camera that moves on a sphere around the centroid and looks at it as before. Rays then
meet the mesh: depth is exact, colours are those of the triangle's pixels weighed by where it was hit, and masks those
of the nearest of them. The view that is not turned is the source itself.

No view shows a surface that the source did not, nor shading that moves: what many views add to one is augmentation.
The angles of the paper are lost; ``x`` and ``y`` are the likeliest of those that its two sources have. Order, lighting,
training sample and the way to find the object are guesses as well.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from data_prep import eyecandies
from data_prep.archives import RawFile
from data_prep.formats import decode_image
from data_prep.item import Item
from data_prep.tree import RawTree
from dino_depth.anomaly.dataset import named
from dino_depth.anomaly.foreground import ForegroundConfig, foreground
from dino_depth.anomaly.geometry import Camera, back_project, rays
from dino_depth.errors import ConfigError, DataError
from dino_depth.progress import Progress

__all__ = ["PrepViewsConfig", "Surface", "View", "prep_views", "surface", "turned", "turns"]

FOCAL_PER_SIDE = 711.11 / 512  # of the published renderings, whose principal point is (256, 256)
MILLIMETRES = 1000  # embree's tolerances suit such numbers
SETTINGS = "VIEWS.json"


@dataclass
class PrepViewsConfig:
    """Eyecandies from many views, warped from its one.

    Attributes:
        root: of Eyecandies: a folder, one category's, an archive, or a folder of archives.
        out: folder of the result; a call that was stopped goes on.
        categories: all if empty.
        x: degrees about the camera's x axis; more of it shows the object from farther below.
        y: degrees about its y axis.
        order: of the views: all of ``y`` for each of ``x``, or every second time backwards (``snake``), so that
            neighbours in the order are neighbours on the sphere.
        lighting: which of the six images, 0 to 5.
        train: index of the training sample; the first if empty.
        jump: depths of the corners of a triangle differ by less, share of the depth.
        slope: degrees between a triangle's normal and the ray to it, at most.
        foreground: how the object is found.
    """

    root: str = ""
    out: str = ""
    categories: list[str] = field(default_factory=list)
    x: tuple[float, ...] = (-15.0, 0.0, 15.0)
    y: tuple[float, ...] = (-30.0, -15.0, 15.0, 30.0)
    order: Literal["rows", "snake"] = "rows"
    lighting: int = 4
    train: str = ""
    jump: float = 0.02
    slope: float = 80.0
    foreground: ForegroundConfig = field(default_factory=lambda: ForegroundConfig("plane"))


@dataclass(frozen=True, eq=False)
class Surface:
    """What the source shows of the object.

    Attributes:
        camera: of the source.
        points: (n, 3) float64 metres, one for each of its pixels.
        pixels: (n, 2) their columns and rows.
        triangles: (m, 3) places among them.
        center: (3,) the centroid.
    """

    camera: Camera
    points: np.ndarray
    pixels: np.ndarray
    triangles: np.ndarray
    center: np.ndarray


@dataclass(frozen=True, eq=False)
class View:
    """A view of a surface.

    Attributes:
        camera: of the view, in the world of the source's camera.
        depth: (height, width) float64 metres, inf where nothing is seen.
        pixels: (height, width, 3) int64, the source's pixels that the triangle seen there connects, as places in its
            flat image; 0 where nothing is seen.
        weights: (height, width, 3) float64, of them, adding up to 1; 0 where nothing is seen.
    """

    camera: Camera
    depth: np.ndarray
    pixels: np.ndarray
    weights: np.ndarray

    @property
    def valid(self) -> np.ndarray:
        return np.isfinite(self.depth)

    def color(self, image: np.ndarray) -> np.ndarray:
        """(height, width, 3) uint8 of the source's (height, width, 3)."""
        flat = image.reshape(-1, image.shape[2])
        return np.rint((flat[self.pixels] * self.weights[..., None]).sum(2)).astype(np.uint8)

    def nearest(self, mask: np.ndarray) -> np.ndarray:
        """(height, width) bool of the source's: that of the nearest pixel."""
        chosen = np.take_along_axis(self.pixels, self.weights.argmax(2)[..., None], 2)[..., 0]
        return mask.ravel()[chosen] & self.valid


def turns(config: PrepViewsConfig) -> list[tuple[float, float]]:
    """The angles about x and y of every view, degrees, in their order."""
    found = []
    for place, x in enumerate(config.x):
        row = config.y if config.order == "rows" or place % 2 == 0 else config.y[::-1]
        found += [(x, y) for y in row]
    return found


def rotation(x: float, y: float) -> np.ndarray:
    """R_x(x) R_y(y), (3, 3), of angles in degrees."""
    (a, b), (c, d) = ((np.cos(angle), np.sin(angle)) for angle in np.radians([x, y]))
    about_x = np.array([[1, 0, 0], [0, a, -b], [0, b, a]])
    about_y = np.array([[c, 0, d], [0, 1, 0], [-d, 0, c]])
    return about_x @ about_y


def source_camera(height: int, width: int) -> Camera:
    """The published camera at the size of a rendering."""
    focal = FOCAL_PER_SIDE * max(height, width)
    return Camera(height, width, np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]]), np.eye(4))


def surface(camera: Camera, depth: np.ndarray, mask: np.ndarray, jump: float, slope: float) -> Surface:
    """The mesh of the pixels of a mask; arguments as ``PrepViewsConfig``.

    Raises:
        DataError: no triangle is left.
    """
    points = back_project(camera, np.where(mask, depth, 0))
    place = np.full(mask.shape, -1)
    place[mask] = np.arange(np.count_nonzero(mask))
    corners = place[:-1, :-1], place[:-1, 1:], place[1:, :-1], place[1:, 1:]
    # Seen from the camera, all run the same way round.
    triangles = np.concatenate(
        [np.stack([corners[at] for at in one], 2).reshape(-1, 3) for one in ((0, 2, 1), (1, 2, 3))]
    )
    triangles = triangles[(triangles >= 0).all(1)]
    points = points[mask]
    deep = points[triangles][..., 2]
    triangles = triangles[np.ptp(deep, axis=1) < jump * deep.min(1)]
    first, second, third = np.moveaxis(points[triangles], 1, 0)
    normal = np.cross(second - first, third - first)
    middle = (first + second + third) / 3
    lengths = np.linalg.norm(normal, axis=1) * np.linalg.norm(middle, axis=1)
    steep = np.abs((normal * middle).sum(1)) < np.cos(np.radians(slope)) * lengths
    triangles = triangles[~steep]
    if not len(triangles):
        raise DataError("the object has no surface: no neighbouring pixels at nearly one depth")
    rows, columns = np.nonzero(mask)
    return Surface(camera, points, np.stack([columns, rows], 1), triangles, points.mean(0))


def turned(source: Surface, angles: list[tuple[float, float]]) -> list[View]:
    """The views of a surface that is turned about its centroid by each pair of angles, degrees."""
    from data_prep.synthetic.engines import EmbreeScene, TriangleMesh

    scene = EmbreeScene()
    corners = (source.points * MILLIMETRES).astype(np.float32)
    TriangleMesh(scene, corners[source.triangles])
    return [_turned(scene, source, x, y) for x, y in angles]


def _turned(scene, source: Surface, x: float, y: float) -> View:
    camera, turn = source.camera, rotation(x, y)
    flat = source.pixels[:, 1] * camera.width + source.pixels[:, 0]
    depth = np.full(camera.height * camera.width, np.inf)
    pixels, weights = np.zeros((*depth.shape, 3), np.int64), np.zeros((*depth.shape, 3))
    if x == y == 0:
        used = np.unique(source.triangles)
        depth[flat[used]], pixels[flat[used], 0], weights[flat[used], 0] = source.points[used, 2], flat[used], 1
        pose = np.eye(4)
    else:
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = turn.T, source.center - turn.T @ source.center
        directions = rays(camera).reshape(-1, 3) @ turn  # the ray's z in the camera is 1, so distances are depths
        origins = np.broadcast_to(pose[:3, 3] * MILLIMETRES, directions.shape).astype(np.float32)
        hits = scene.run(np.ascontiguousarray(origins), directions.astype(np.float32), output=1)
        seen = hits["primID"] >= 0
        triangle = source.triangles[hits["primID"][seen]]
        at = _meeting(source.points[triangle], pose[:3, 3], directions[seen])
        depth[seen], weights[seen], pixels[seen] = at[0], at[1], flat[triangle]
    shape = camera.height, camera.width
    made = Camera(camera.height, camera.width, camera.matrix, pose, camera.distortion)
    return View(made, depth.reshape(shape), pixels.reshape(*shape, 3), weights.reshape(*shape, 3))


def _meeting(corners: np.ndarray, origin: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rays (n, 3) meet the planes of triangles (n, 3, 3), in float64: distances (n,) and the corners' weights."""
    first, second = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normal = np.cross(first, second)
    start = origin - corners[:, 0]
    scale = -(normal * directions).sum(1)
    distance = (normal * start).sum(1) / scale
    moment = np.cross(directions, start)  # of the ray about the first corner
    weights = np.stack([(second * moment).sum(1) / -scale, (first * moment).sum(1) / scale], 1)
    weights = np.concatenate([1 - weights.sum(1, keepdims=True), weights], 1).clip(0)
    return distance, weights / weights.sum(1, keepdims=True)


def prep_views(config: PrepViewsConfig) -> None:
    """Writes the benchmark.

    Raises:
        ConfigError: a setting that cannot work, or that differs from those of the folder.
        DataError: ``root`` has another layout, or a sample cannot be read or shows no object; the message names it.
    """
    _check(config)
    out = Path(config.out)
    settings = asdict(config) | {"root": "", "out": "", "categories": []}
    text = json.dumps(settings, indent=1) + "\n"
    if (out / SETTINGS).is_file() and (out / SETTINGS).read_text() != text:
        raise ConfigError(f"--out {out}: it was begun with other settings, see {SETTINGS}; name another folder")
    tree = RawTree(config.root)
    pattern = rf"(?:.*/)?(?P<category>[^/]+)/[^/]+/data/[^/]+_(?:image_{config.lighting}|mask)\.png"
    files = {match[0][match.start("category") :]: tree[name] for match, name in tree.find(pattern)}
    chosen = _chosen(tree, config)
    out.mkdir(parents=True, exist_ok=True)
    (out / SETTINGS).write_text(text)
    with Progress("views", len(chosen), "samples") as progress:
        for item, place in chosen:
            if not (out / place).is_dir():
                _write(files, item, out / place, config)
            progress.advance()


def _check(config: PrepViewsConfig):
    for name in ("root", "out"):
        if not getattr(config, name):
            raise ConfigError(f"--{name} is missing")
    if not config.x or not config.y or not np.isfinite([*config.x, *config.y]).all():
        raise ConfigError(f"x and y: need angles in degrees, got {list(config.x)} and {list(config.y)}")
    if len(set(turns(config))) < len(turns(config)):
        raise ConfigError(f"x and y: name each angle once, got {list(config.x)} and {list(config.y)}")
    if not 0 <= config.lighting <= 5:
        raise ConfigError(f"lighting: must be 0 to 5, got {config.lighting}")
    if not config.jump > 0 or not 0 < config.slope <= 90:
        raise ConfigError(f"need jump > 0 and slope within (0, 90], got {config.jump} and {config.slope}")


def _chosen(tree: RawTree, config: PrepViewsConfig) -> list[tuple[Item, str]]:
    """The samples to convert, and their folders in the result."""
    items = eyecandies.items(tree)
    known = sorted({item.category for item in items})
    found = []
    for category in config.categories or known:
        if category not in known:
            raise ConfigError(f"categories: {category} is not in {config.root}, which has {', '.join(known)}")
        mine = sorted((item for item in items if item.category == category), key=lambda item: item.stem)
        train = [item for item in mine if item.split == "train"]
        train = [item for item in train if item.stem == config.train] if config.train else train[:1]
        test = [item for item in mine if item.split == "test_public"]
        if not train or {item.label for item in test} != {"good", "anomalous"}:
            wanted = f"train/{config.train}" if config.train else "a sample of train"
            raise DataError(f"{config.root}: {category} needs {wanted} and labelled good and bad ones of test_public")
        found += [(train[0], f"{category}/train/{train[0].stem}")]
        found += [(item, f"{category}/test/{item.stem}_{'good' if item.label == 'good' else 'bad'}") for item in test]
    return found


def _write(files: dict[str, RawFile], item: Item, folder: Path, config: PrepViewsConfig):
    """One sample; its folder is whole or absent."""
    depth_map = named(str(item.file), eyecandies.read, item)
    image = named(str(item.file), _image, files, item, f"image_{config.lighting}.png")
    mask = np.zeros(depth_map.depth.shape, bool)
    if item.label == "anomalous":
        mask = named(str(item.file), _image, files, item, "mask.png").any(-1)
        if not mask.any():
            raise DataError(f"{item.file}: its mask is empty, but the sample is labelled anomalous")
    if image.shape[:2] != depth_map.depth.shape or mask.shape != depth_map.depth.shape:
        raise DataError(f"{item.file}: depth, image and mask differ in size")
    shown = named(str(item.file), foreground, depth_map, config.foreground)
    camera = source_camera(*shown.shape)
    source = named(str(item.file), surface, camera, depth_map.depth, shown, config.jump, config.slope)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    for name in ("depth", "rgb", "mask"):
        (partial / name).mkdir(parents=True)
    cameras = []
    for place, view in enumerate(turned(source, turns(config)), 1):
        name = f"{place:02d}"
        np.save(partial / "depth" / f"{name}.npy", view.depth.astype(np.float32))
        Image.fromarray(view.color(image)).save(partial / "rgb" / f"{name}.png")
        Image.fromarray(view.nearest(mask).astype(np.uint8) * 255).save(partial / "mask" / f"{name}.png")
        cameras.append({"name": name, "height": view.camera.height, "width": view.camera.width,
                        "matrix": view.camera.matrix.tolist(), "distortion": [],
                        "camera_to_world": view.camera.camera_to_world.tolist()})  # fmt: skip
    (partial / "calibration.json").write_text(json.dumps({"cameras": cameras}, indent=1) + "\n")
    os.replace(partial, folder)


def _image(files: dict[str, RawFile], item: Item, name: str) -> np.ndarray:
    """(height, width, 3) uint8 of a file beside the depth map."""
    source = item.source.removesuffix("depth.png") + name
    if source not in files:
        raise DataError(f"no {item.stem}_{name} beside it")
    return decode_image(files[source].read())
