"""MVTec 3D-AD: organised XYZ maps of a structured-light sensor, an image, ground truth, and the camera's calibration.

``<category>/{train,validation}/good/{rgb/NNN.png,xyz/NNN.tiff}``, ``<category>/test/<good|defect>/{rgb,xyz,gt}/NNN.*``,
``<category>/calibration/camera_parameters.json`` and ``<category>/class_ids.json``. XYZ is float32 metres in camera
coordinates, exactly (0, 0, 0) where the sensor measured nothing. Ground truth holds the class id of the defect, 0 where
there is none.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from data_prep.synthetic.defects import DEFECTS
from data_prep.synthetic.plan import Counts, Sample, generator
from data_prep.synthetic.render import Camera, dot, sense, shade
from data_prep.synthetic.shots import Setup, Shot, shoot

__all__ = ["archives", "prepare", "samples", "write"]

NAME = Path(__file__).stem
SETUP = Setup(distances=(0.3, 0.7), tilts=(0, 40))
# Parts of 3 to 12 cm fill the frame at these distances when the focal length is about 5.5 image widths.
FOCAL_PER_SIZE = 5.5
SENSOR_WIDTH = 400 * 3.75e-6  # metres, of the published 400 pixel cameras
CLASS_IDS = {"good": 0, **{kind: 255 - place for place, kind in enumerate(sorted(DEFECTS))}}


def samples(category: str, counts: Counts) -> Iterator[Sample]:
    """Defect-free training and validation samples; half of the test samples have a defect, each kind in turn."""
    yield from (Sample(category, "train", "good", index) for index in range(counts.train))
    yield from (Sample(category, "validation", "good", index) for index in range(counts.validation))
    defective = counts.test // 2
    yield from (Sample(category, "test", "good", index) for index in range(counts.test - defective))
    kinds = sorted(DEFECTS)
    for place in range(defective):
        yield Sample(category, "test", kinds[place % len(kinds)], place // len(kinds))


def archives(root: Path) -> list[tuple[str, str]]:
    return [("mvtec_3d_anomaly_detection.tar.xz", "")]


def prepare(root: Path, category: str, size: int, seed: int) -> None:
    camera = _camera(category, size, seed)
    folder = root / category / "calibration"
    folder.mkdir(parents=True)
    pixel = SENSOR_WIDTH / size
    parameters = {
        "camera_type": "area_scan_division",
        "focus": camera.focal * pixel,
        "kappa": 0.0,
        "sx": pixel,
        "sy": pixel,
        "cx": camera.center_column,
        "cy": camera.center_row,
        "image_width": size,
        "image_height": size,
    }
    (folder / "camera_parameters.json").write_text(json.dumps(parameters, indent=2) + "\n")
    ids = {str(number): kind for kind, number in sorted(CLASS_IDS.items(), key=lambda item: -item[1])}
    (root / category / "class_ids.json").write_text(json.dumps(ids, indent=2) + "\n")
    for split, label in [("train", "good"), ("validation", "good"), *(("test", label) for label in CLASS_IDS)]:
        for item in ("rgb", "xyz", "gt") if split == "test" else ("rgb", "xyz"):
            (root / category / split / label / item).mkdir(parents=True)


def _camera(category: str, size: int, seed: int) -> Camera:
    """Every category was recorded with its own camera."""
    rng = generator(seed, NAME, category, "camera")
    center = (size - 1) / 2 + rng.uniform(-0.05, 0.05, 2) * size
    return Camera(size, FOCAL_PER_SIZE * size * rng.uniform(0.95, 1.05), float(center[0]), float(center[1]))


def write(root: Path, sample: Sample, size: int, plane: float, seed: int) -> None:
    rng = generator(seed, NAME, sample.category, sample.split, sample.label, sample.index)
    defect = None if sample.label == "good" else sample.label
    shot = shoot((seed, NAME), sample, defect, _camera(sample.category, size, seed), SETUP, plane, rng)
    # The projector stands beside the camera; what it does not reach has neither depth nor direct light.
    angle, direction = np.radians(rng.uniform(4, 14)), rng.uniform(0, 2 * np.pi)
    baseline = np.tan(angle) * np.median(shot.seen.depth[shot.seen.part])
    projector = baseline * np.array([np.cos(direction), np.sin(direction), 0.0])
    lit = shot.scene.lit(shot.seen, shot.camera, projector)
    depth = sense(shot.seen, shot.camera, lit, rng)
    folder, stem = root / sample.category / sample.split / sample.label, f"{sample.index:03d}"
    xyz = shot.camera.rays() * depth[..., None]
    tifffile.imwrite(folder / "xyz" / f"{stem}.tiff", xyz, photometric="rgb", metadata=None)
    image = _image(shot, projector, lit, rng)
    Image.fromarray(image).save(folder / "rgb" / f"{stem}.png", compress_level=1)
    if sample.split == "test":
        truth = np.where(shot.mask, CLASS_IDS[sample.label], 0).astype(np.uint8)
        Image.fromarray(truth).save(folder / "gt" / f"{stem}.png")


def _image(shot: Shot, projector: np.ndarray, lit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A nearly grey image (size, size, 3) uint8 under the projector and the light of the room."""
    albedo = np.where(shot.seen.part, rng.uniform(0.35, 0.9), rng.uniform(0.08, 0.4)).astype(np.float32)
    [image] = shade(shot.seen, shot.camera, albedo, rng.uniform(0, 0.3), [(projector, rng.uniform(0.4, 0.7) * lit)])
    room = rng.uniform(-0.6, 0.6, 3) * (1, 1, 0) - (0, 0, 1)
    room = (rng.uniform(0.1, 0.25) * room / np.linalg.norm(room)).astype(np.float32)
    # Light from everywhere, more of it from one side.
    image += albedo * (np.float32(0.25) + dot(shot.seen.normal, room)) * (shot.seen.depth > 0)
    tint = 1 + rng.uniform(-0.05, 0.05, 3).astype(np.float32)
    return (np.clip(image[..., None] * tint, 0, 1) * 255).astype(np.uint8)
