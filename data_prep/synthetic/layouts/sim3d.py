"""SiM3D as far as its layout is publicly known: calibrated views around one object, and voxel ground truth.

``<category>/<category>_real/{depth/<view>.npy, rgb/<view>_2.png}`` is the real training instance,
``<category>/<category>_synth/{DEPTH/posa_<view>_depth.exr, RGB/posa_<view>_2.png}`` the one rendered from CAD, and
every other folder ``<category>/<category>_<number>_{good,bad}`` a test instance, laid out as the real one. Images are
gray.
Depth of real instances is float32 millimetres, +inf where nothing was measured; the EXR files hold metres in three
equal channels, and one large value where there is no object. Views of real instances are numbered from 1 without
padding and those of the synthetic one with it: only their natural order is the same.

What is not publicly known is a choice here:

- ``calibration.json`` lists, in the order of the views, name, size, ``matrix``, ``distortion`` (none) and
  ``camera_to_world`` (metres, OpenCV axes) of each camera; every second procedural category has ``calib.xml`` (OpenCV
  FileStorage) and ``pose_ocv.txt`` (a row-major 4 x 4 matrix in each line) instead.
- ``gt.npz`` of a test instance: the ``origin`` (corner of the first voxel, metres), ``voxel_size`` and ``shape`` of a
  cubic grid with twice the object's longest side, and of every voxel with a defect the ``index`` and the number of its
  ``component``, from 1; ``kind`` names the components. These voxels hold the surface that is not where the sound
  object's is, or has another albedo, whether or not a view shows it. ``mask/<view>.png`` are the pixels of it.
- In nature a dent changes an image, too. Here a kind of defect belongs to the modalities that show it: the images of
  an instance with a dent, a bump or a missing part show the sound object.
- ``benchmark.json`` beside the categories says what was drawn.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from data_prep.synthetic.nuisances import PRESETS, Difficulty, disturb, measure, photograph
from data_prep.synthetic.parts import CATEGORIES
from data_prep.synthetic.photograph import save
from data_prep.synthetic.plan import Counts, Sample, Sim3dOptions, generator
from data_prep.synthetic.specimen import Instance, Specimen, damaged_instance, sound_instance, specimen
from data_prep.synthetic.surface_defects import DEPTH
from dino_depth.errors import ConfigError

__all__ = ["CHUNK", "DEFAULTS", "finish", "objects", "prepare", "samples", "write"]

NAME = Path(__file__).stem
CHUNK = 2  # samples in one task of a worker: one takes as long as a dozen of other layouts
DEFAULTS = {"size": 224, "test_per_category": 16}
KINDS = ("dent", "scratch", "missing", "stain", "bump", "stained_dent")
MESHES = (".glb", ".obj", ".off", ".ply", ".stl")
NOTHING = np.float32(1e10)  # depth of the background in an EXR file, as Blender writes it
PLACES = {category: place for place, category in enumerate(CATEGORIES)}


def objects(options: Sim3dOptions) -> list[str]:
    """The categories that mesh files make.

    Raises:
        ConfigError: an option has an impossible value.
    """
    if options.difficulty not in PRESETS:
        raise ConfigError(f"sim3d.difficulty: must be one of {', '.join(PRESETS)}, got {options.difficulty!r}")
    for key, least in {"views": 1, "rings": 1, "height": 32}.items():
        value = getattr(options, key)
        if value is not None and value < least:
            raise ConfigError(f"sim3d.{key}: must be at least {least}, got {value}")
    if options.views % options.rings:
        raise ConfigError(f"sim3d.rings: {options.rings} rings cannot share {options.views} views equally")
    if not 0.0005 <= options.voxel <= 0.1:
        raise ConfigError(f"sim3d.voxel: must be within 0.0005..0.1 metres, got {options.voxel}")
    paths = _meshes(options)
    names = [path.stem for path in paths]
    for path in paths:
        if not path.is_file() or path.suffix.lower() not in MESHES:
            raise ConfigError(f"sim3d.mesh: {path} is no file that ends in {', '.join(MESHES)}")
        if not re.fullmatch(r"\w[\w-]*", path.stem, re.ASCII) or re.search("bad|real|synth", path.stem):
            raise ConfigError(
                f"sim3d.mesh: {path}: rename it, folders are named after it; letters, digits, - and _ are allowed, "
                "the words bad, real and synth are not"
            )
        if path.stem in CATEGORIES or names.count(path.stem) > 1:
            raise ConfigError(f"sim3d.mesh: {path}: there is another object named {path.stem!r}")
    return names


def _meshes(options: Sim3dOptions) -> list[Path]:
    files = options.mesh or []
    return [Path(file) for file in ([files] if isinstance(files, str) else files)]


def samples(category: str, counts: Counts) -> Iterator[Sample]:
    """One training instance of each kind; half of the test instances are defective."""
    yield from (Sample(category, "train", label, 0) for label in ("real", "synth"))
    bad = counts.test // 2
    yield from (Sample(category, "test", "good", index) for index in range(counts.test - bad))
    yield from (Sample(category, "test", "bad", index) for index in range(bad))


def _specimen(category: str, size: int, seed: int, options: Sim3dOptions) -> Specimen:
    mesh = next((str(path) for path in _meshes(options) if path.stem == category), None)
    return specimen((seed, NAME), category, mesh, options.height or size, size, options.views, options.rings)


def _kind(subject: Specimen, index: int) -> str:
    """Kinds in turn; nothing can be cut out of a mesh that is not watertight."""
    kind = KINDS[index % len(KINDS)]
    return "bump" if kind == "missing" and subject.solid is None else kind


def _folder(sample: Sample) -> str:
    number = f"{sample.index + 1:02d}_" if sample.split == "test" else ""
    return f"{sample.category}/{sample.category}_{number}{sample.label}"


def prepare(root: Path, category: str, size: int, seed: int, options: Sim3dOptions) -> None:
    subject = _specimen(category, size, seed, options)
    folder = root / category
    folder.mkdir(parents=True)
    written = "xml" if PLACES.get(category, 0) % 2 else "json"
    (_write_xml if written == "xml" else _write_json)(folder, subject)
    path = root / "benchmark.json"
    stated = json.loads(path.read_text()) if path.exists() else {
        "seed": seed, "width": size, "height": subject.camera.height, "views": options.views, "rings": options.rings,
        "voxel": options.voxel, "preset": options.difficulty, "difficulty": asdict(PRESETS[options.difficulty]),
        "objects": {},
    }  # fmt: skip
    stated["objects"][category] = {
        "source": "procedural part" if category in CATEGORIES else "mesh file",
        "watertight": subject.solid is not None,
        "longest_side": subject.scale,
        "calibration": written,
    }
    path.write_text(json.dumps(stated, indent=1) + "\n")


def _write_json(folder: Path, subject: Specimen) -> None:
    camera = subject.camera
    cameras = [
        {
            "name": str(number), "height": camera.height, "width": camera.width, "matrix": camera.matrix().tolist(),
            "distortion": [], "camera_to_world": pose.tolist(),
        }
        for number, pose in enumerate(subject.poses, 1)
    ]  # fmt: skip
    (folder / "calibration.json").write_text(json.dumps({"cameras": cameras}, indent=1) + "\n")


def _write_xml(folder: Path, subject: Specimen) -> None:
    def matrix(name: str, values: np.ndarray) -> str:
        rows, columns = values.shape
        numbers = " ".join(map(repr, values.ravel().tolist()))
        shape = f"<rows>{rows}</rows>\n  <cols>{columns}</cols>\n  <dt>d</dt>"
        return f'<{name} type_id="opencv-matrix">\n  {shape}\n  <data>\n    {numbers}</data></{name}>\n'

    camera = subject.camera
    body = f"<wL>{camera.width}</wL>\n<hL>{camera.height}</hL>\n"
    body += matrix("mtxL", camera.matrix()) + matrix("distL", np.zeros((1, 5)))
    (folder / "calib.xml").write_text(f'<?xml version="1.0"?>\n<opencv_storage>\n{body}</opencv_storage>\n')
    lines = (" ".join(map(repr, pose.ravel().tolist())) for pose in subject.poses)
    (folder / "pose_ocv.txt").write_text("".join(f"{line}\n" for line in lines))


def write(root: Path, sample: Sample, size: int, plane: float, seed: int, options: Sim3dOptions) -> None:
    key = (seed, NAME, sample.category, sample.split, sample.label, sample.index)
    subject, difficulty, rng = (
        _specimen(sample.category, size, seed, options),
        PRESETS[options.difficulty],
        generator(*key),
    )
    folder = root / _folder(sample)
    if sample.label == "synth":
        _write_synthetic(folder, subject)
        return
    kind = _kind(subject, sample.index) if sample.label == "bad" else None
    instance = (
        damaged_instance(subject, kind, difficulty, options.voxel / 2, rng)
        if kind
        else sound_instance(subject, difficulty, rng)
    )
    (folder / "depth").mkdir(parents=True)
    for number in range(options.views):
        _write_view(folder, instance, kind, number, difficulty, key, (seed, NAME, sample.category))
    if sample.split == "test":
        _write_truth(folder / "gt.npz", instance, kind, options.voxel)


def _write_view(
    folder: Path, instance: Instance, kind: str | None, number: int, difficulty: Difficulty, key: tuple, room: tuple
) -> None:
    subject, rng, stem = instance.specimen, generator(*key, number), str(number + 1)
    view = instance.view(number)
    pictured = Instance(subject, instance.placement, subject.scene).view(number) if kind in DEPTH else view
    disturbance = disturb(pictured.seen, subject.camera, difficulty, rng)
    background = generator(*room, "room", number), generator(*key, "room", number)
    image = photograph(
        pictured.seen, subject.camera, pictured.albedo, subject.material.gloss, background, disturbance, difficulty, rng
    )
    depth = measure(view.seen, subject.camera, subject.scale, disturbance, difficulty, rng)
    save(image, folder / "rgb" / f"{stem}_2.png")
    np.save(folder / "depth" / f"{stem}.npy", np.where(depth > 0, depth * np.float32(1000), np.float32(np.inf)))
    if kind:
        save(view.changed, folder / "mask" / f"{stem}.png")


def _write_truth(path: Path, instance: Instance, kind: str | None, voxel: float) -> None:
    cells = int(np.ceil(2 * instance.specimen.scale / voxel))
    origin = np.full(3, -cells * voxel / 2)
    index = instance.voxels(origin, voxel)
    np.savez(
        path,
        origin=origin,
        voxel_size=np.float64(voxel),
        shape=np.full(3, cells, np.int64),
        index=index,
        component=np.ones(len(index), np.int32),
        kind=np.array([kind] if kind else [], "U16"),
    )


def _write_synthetic(folder: Path, subject: Specimen) -> None:
    """A rendering from CAD: exact depth, a material without spots or gloss, a black background."""
    import OpenEXR

    perfect = PRESETS["clean"]
    instance = sound_instance(subject, perfect, generator(0))
    (folder / "DEPTH").mkdir(parents=True)
    for number in range(len(subject.poses)):
        seen, stem = instance.view(number).seen, f"posa_{number + 1:03d}"
        disturbance = disturb(seen, subject.camera, perfect, generator(0))
        albedo = np.full(seen.depth.shape, 0.6, np.float32)
        rooms = generator(0), generator(0)
        image = photograph(seen, subject.camera, albedo, 0.0, rooms, disturbance, perfect, generator(0))
        save(np.where(seen.part, image, 0).astype(np.uint8), folder / "RGB" / f"{stem}_2.png")
        depth = np.where(seen.part, seen.depth, NOTHING)
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        with OpenEXR.File(header, {channel: depth for channel in "RGB"}) as file:
            file.write(str(folder / "DEPTH" / f"{stem}_depth.exr"))


def finish(root: Path, samples: list[Sample]) -> None:
    """Adds the test instances and their defects to ``benchmark.json``."""
    path = root / "benchmark.json"
    stated = json.loads(path.read_text())
    for sample in samples:
        if sample.split == "test":
            file = root / _folder(sample) / "gt.npz"
            with np.load(file, allow_pickle=False) as truth:
                row = {"defects": truth["kind"].tolist(), "voxels": len(truth["index"])}
            stated["objects"][sample.category].setdefault("test", {})[_folder(sample).split("/")[1]] = row
    path.write_text(json.dumps(stated, indent=1) + "\n")
