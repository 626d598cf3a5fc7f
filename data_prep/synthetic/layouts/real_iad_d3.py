"""Real-IAD D3 as released: JSON files that list everything, and a folder for each object with all of its recordings.

``realiad_d3_jsons/<category>.json`` and ``realiad_d3_raw/<category>/OK/S0153/<category>_0153_OK_<recording>``, the
recordings being ``RGBL01..05`` (.jpg, one view under five lights), ``PS`` (.jpg, normals as a picture), ``XYZ`` (.tiff)
and ``PCD`` (.pcd), each followed by 14 digits. Objects with a defect lie under ``NG/<defect>/S0001`` or
``<defect>/S0001``, depending on the category, with their mask beside ``RGBL05`` (.png).

Categories differ as the published ones do: missing pixels are NaN or 0, tiffs are (height, width, 3) or channels first,
point clouds are ASCII or binary. Z is in millimetres; X and Y are constants that give the label away. The validation
lists repeat files of the test lists.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from data_prep.synthetic.defects import DEFECTS
from data_prep.synthetic.parts import CATEGORIES
from data_prep.synthetic.plan import Counts, Sample, generator
from data_prep.synthetic.render import Camera, sense, shade
from data_prep.synthetic.shots import Setup, Shot, shoot

__all__ = ["archives", "finish", "prepare", "samples", "write"]

NAME = Path(__file__).stem
JSONS, RAW = "realiad_d3_jsons", "realiad_d3_raw"
SETUP = Setup(distances=(0.3, 0.7), tilts=(0, 40))
# Parts of 3 to 12 cm fill the frame at these distances when the focal length is about 5.5 image widths.
FOCAL_PER_SIZE = 5.5
DIGITS = "0" * 14
# X and Y of every pixel, by whether the object is sound: what they hold in the published files says more than depth.
CONSTANTS = {True: (0.166, 0.166), False: (0.0, 0.0)}
PLACES = {category: place for place, category in enumerate(CATEGORIES)}


def samples(category: str, counts: Counts) -> Iterator[Sample]:
    """Sound training samples; half of the test samples have a defect, each kind in turn.

    A validation sample is the test sample of its label and index, listed a second time.
    """
    yield from (Sample(category, "train", "good", index) for index in range(counts.train))
    kinds = sorted(DEFECTS)
    tests = [
        ("good", place // 2) if place % 2 == 0 else (kinds[place // 2 % len(kinds)], place // 2 // len(kinds))
        for place in range(counts.test)
    ]
    yield from (Sample(category, "test", *test) for test in tests)
    yield from (Sample(category, "validation", *test) for test in tests[: counts.validation])


def prepare(root: Path, category: str, size: int, seed: int) -> None:
    (root / JSONS).mkdir(parents=True, exist_ok=True)
    (root / RAW / category).mkdir(parents=True)


def _path(sample: Sample, recording: str) -> str:
    """Path of a recording below the category's folder, ``recording`` being its name and suffix."""
    name, suffix = recording.split(".")
    if sample.label == "good":
        # Odd numbers are trained on, even ones tested, so that they never meet.
        number = f"{2 * sample.index + (1 if sample.split == 'train' else 2):04d}"
        folder, state = f"OK/S{number}", "OK"
    else:
        number = f"{sample.index + 1:04d}"
        folder, state = f"{sample.label}/S{number}", f"NG_{sample.label}"
        if PLACES[sample.category] % 2 == 0:
            folder = f"NG/{folder}"
    return f"{folder}/{sample.category}_{number}_{state}_{name}_{DIGITS}.{suffix}"


def write(root: Path, sample: Sample, size: int, plane: float, seed: int) -> None:
    if sample.split == "validation":
        return
    rng = generator(seed, NAME, sample.category, sample.split, sample.label, sample.index)
    defect = None if sample.label == "good" else sample.label
    camera = Camera(size, FOCAL_PER_SIZE * size, (size - 1) / 2, (size - 1) / 2)
    shot = shoot((seed, NAME), sample, defect, camera, SETUP, plane, rng)
    reach = float(np.median(shot.seen.depth[shot.seen.part]))
    direction = rng.uniform(0, 2 * np.pi)
    projector = 0.15 * reach * np.array([np.cos(direction), np.sin(direction), 0.0])
    depth = sense(shot.seen, camera, shot.scene.lit(shot.seen, camera, projector), rng) * np.float32(1000)

    folder = root / RAW / sample.category

    def place(recording: str) -> Path:
        path = folder / _path(sample, recording)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    for number, image in enumerate(_images(shot, reach, rng), 1):
        Image.fromarray(image).save(place(f"RGBL{number:02d}.jpg"), quality=90)
    # Normals are pictured with y up and z towards the camera.
    normals = shot.seen.normal * np.array([1, -1, -1], np.float32)
    Image.fromarray(np.rint((normals + 1) * 127.5).astype(np.uint8)).save(place("PS.jpg"), quality=90)
    _write_cloud(place("XYZ.tiff"), depth, sample)
    _write_points(place("PCD.pcd"), camera.rays() * depth[..., None], sample.category)
    if defect is not None:
        Image.fromarray(shot.mask.astype(np.uint8) * 255).save(place("RGBL05.png"))


def _images(shot: Shot, reach: float, rng: np.random.Generator) -> list[np.ndarray]:
    """(size, size, 3) uint8 under one light from each side and, last, one from the front."""
    albedo = np.where(shot.seen.part, rng.uniform(0.35, 0.9), rng.uniform(0.08, 0.4)).astype(np.float32)
    tint = 1 + rng.uniform(-0.05, 0.05, 3).astype(np.float32)
    sides = [np.array([x, y, 0.0]) * reach for x, y in ((0, -1), (1, 0), (0, 1), (-1, 0))]
    lights = [(position, 0.9) for position in [*sides, np.zeros(3)]]
    images = shade(shot.seen, shot.camera, albedo, rng.uniform(0, 0.3), lights)
    return [(np.clip(image[..., None] * tint, 0, 1) * 255).astype(np.uint8) for image in images]


def _write_cloud(path: Path, depth: np.ndarray, sample: Sample) -> None:
    points = np.empty((*depth.shape, 3), np.float32)
    points[..., :2] = CONSTANTS[sample.label == "good"]
    points[..., 2] = depth if PLACES[sample.category] % 3 else np.where(depth == 0, np.nan, depth)
    if PLACES[sample.category] % 4 == 1:
        points = np.moveaxis(points, -1, 0).copy()
        tifffile.imwrite(path, points, photometric="minisblack", metadata=None)
    else:
        tifffile.imwrite(path, points, photometric="rgb", metadata=None)


def _write_points(path: Path, points: np.ndarray, category: str) -> None:
    measured = points[points[..., 2] > 0].astype("<f4")
    binary = PLACES[category] % 5 == 2
    header = [
        "# .PCD v0.7 - Point Cloud Data file format", "VERSION 0.7", "FIELDS x y z", "SIZE 4 4 4", "TYPE F F F",
        "COUNT 1 1 1", f"WIDTH {len(measured)}", "HEIGHT 1", "VIEWPOINT 0 0 0 1 0 0 0", f"POINTS {len(measured)}",
        f"DATA {'binary' if binary else 'ascii'}",
    ]  # fmt: skip
    lines = "".join("{:.4f} {:.4f} {:.4f}\n".format(*point) for point in measured.tolist()) if not binary else ""
    path.write_bytes("\n".join([*header, lines]).encode() + (measured.tobytes() if binary else b""))


def finish(root: Path, samples: list[Sample]) -> None:
    """Writes the JSON file of every category."""
    listings: dict[str, dict] = {}
    for sample in samples:
        meta = {"normal_class": "OK", "prefix": f"{sample.category}/"}
        listing = listings.setdefault(sample.category, {"meta": meta, "train": [], "validation": [], "test": []})
        listing[sample.split].append(
            {
                "category": sample.category,
                "anomaly_class": "OK" if sample.label == "good" else sample.label,
                "image_path": _path(sample, "RGBL05.jpg"),
                "ps_path": _path(sample, "PS.jpg"),
                "xyz_path": _path(sample, "XYZ.tiff"),
                "mask_path": None if sample.label == "good" else _path(sample, "RGBL05.png"),
            }
        )
    for category, listing in listings.items():
        (root / JSONS / f"{category}.json").write_text(json.dumps(listing, indent=1) + "\n")


def archives(root: Path) -> list[tuple[str, str]]:
    """How the dataset ships: the archives, and the folder that each of them holds."""
    folders = sorted(path.name for path in (root / RAW).iterdir() if path.is_dir())
    return [(f"{JSONS}.zip", JSONS), *((f"{RAW}/{category}.zip", f"{RAW}/{category}") for category in folders)]
