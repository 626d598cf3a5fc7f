"""Eyecandies: a perfect synthetic camera before a table and a wall, six lightings, per-kind masks.

``<Category>/{train,val,test_public,test_private}/data/<index>_<item>`` with ``image_0..5.png``, 16-bit ``depth.png``,
its bounds ``info_depth.yaml``, ``normals.png`` and ``pose.txt``; but for the private test split also
``obj_params.yaml``, ``metadata.yaml`` and five masks. Indices are padded to the width each published split has. Depth
is code / 65535 * (max - min) + min metres: code 0 is the nearest pixel, nothing is missing.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.synthetic.plan import Counts, Sample, generator
from data_prep.synthetic.render import Camera, shade
from data_prep.synthetic.shots import Setup, Shot, shoot

__all__ = ["archives", "prepare", "samples", "write"]

NAME = Path(__file__).stem
ARCHIVES_ARE_TARS = True  # though they are called .zip, as the published ones are
FOCAL_PER_SIZE = 711.11 / 512
# Under this wide camera parts of 3 to 12 cm are close.
SETUP = Setup(distances=(0.08, 0.18), tilts=(20, 50), wall=True)
WIDTHS = {"train": 3, "val": 2, "test_public": 2, "test_private": 3}
# The published kinds of anomaly, and the defects that stand for each.
ANOMALIES = {"bumps": ("bump",), "dents": ("dent", "hole", "cut"), "colors": ("paint",), "normals": ("scratch",)}
# image_0: all spotlights, 1: bottom, 2: right, 3: top, 4: left, 5: all of them and a light at the camera.
SPOTLIGHTS = np.array([(0.0, 1.0), (1.0, 0.0), (0.0, -1.0), (-1.0, 0.0)])


def samples(category: str, counts: Counts) -> Iterator[Sample]:
    """Every second test sample has an anomaly, each kind in turn; the test samples are half public, half private."""
    yield from (Sample(category, "train", "good", index) for index in range(counts.train))
    yield from (Sample(category, "val", "good", index) for index in range(counts.validation))
    kinds = sorted(ANOMALIES)
    for split, count in (("test_public", counts.test - counts.test // 2), ("test_private", counts.test // 2)):
        for index in range(count):
            label = kinds[index // 2 % len(kinds)] if index % 2 else "good"
            yield Sample(category, split, label, index)


def archives(root: Path) -> list[tuple[str, str]]:
    return [(f"{folder.name}.zip", folder.name) for folder in sorted(root.iterdir()) if folder.is_dir()]


def prepare(root: Path, category: str, size: int, seed: int) -> None:
    for split in WIDTHS:
        (root / _folder(category) / split / "data").mkdir(parents=True)


def _folder(category: str) -> str:
    return "".join(word.capitalize() for word in category.split("_"))


def write(root: Path, sample: Sample, size: int, plane: float, seed: int) -> None:
    # The label follows from the index here, so it is no part of the key.
    rng = generator(seed, NAME, sample.category, sample.split, sample.index)
    defect = None if sample.label == "good" else str(rng.choice(ANOMALIES[sample.label]))
    camera = Camera(size, FOCAL_PER_SIZE * size, size / 2, size / 2)
    shot = shoot((seed, NAME), sample, defect, camera, SETUP, plane, rng)
    stem = f"{sample.index:0{WIDTHS[sample.split]}d}_"
    folder = root / _folder(sample.category) / sample.split / "data"

    def save(item: str, image: np.ndarray) -> None:
        Image.fromarray(image).save(folder / f"{stem}{item}.png", compress_level=1)

    for item, image in _images(shot, defect, rng).items():
        save(item, image)
    # Bounds are written as they are read back, so that rounding cannot move the nearest pixel below them.
    near, far = float(shot.seen.depth.min()), float(shot.seen.depth.max())
    save("depth", np.rint((shot.seen.depth.astype(np.float64) - near) / (far - near) * 65535).astype(np.uint16))
    (folder / f"{stem}info_depth.yaml").write_text(f"normalization:\n  max: {far!r}\n  min: {near!r}\n")
    # Normals are stored with y up and z towards the camera.
    normals = shot.seen.normal * np.array([1, -1, -1], np.float32)
    save("normals", np.rint((normals + 1) * 127.5).astype(np.uint8))
    np.savetxt(folder / f"{stem}pose.txt", _camera_to_world(shot))
    if sample.split == "test_private":
        return
    parameters = {"category": f"{_folder(sample.category)}", "size": repr(shot.pose.scale)}
    (folder / f"{stem}obj_params.yaml").write_text("".join(f"{key}: {value}\n" for key, value in parameters.items()))
    flags = {"anomalous": int(defect is not None)} | {kind: int(kind == sample.label) for kind in ANOMALIES}
    (folder / f"{stem}metadata.yaml").write_text("".join(f"{key}: {value}\n" for key, value in flags.items()))
    mask = shot.mask.astype(np.uint8) * 255
    save("mask", mask)
    for kind in ANOMALIES:
        save(f"{kind}_mask", mask if kind == sample.label else np.zeros_like(mask))


def _images(shot: Shot, defect: str | None, rng: np.random.Generator) -> dict[str, np.ndarray]:
    seen, reach = shot.seen, 1.2 * float(np.median(shot.seen.depth[shot.seen.part]))
    albedo = np.where(seen.part, rng.uniform(0.5, 0.9), rng.uniform(0.15, 0.4)).astype(np.float32)
    tint = np.where(seen.part[..., None], rng.uniform(0.5, 1, 3), rng.uniform(0.85, 1, 3)).astype(np.float32)
    if defect == "paint":
        tint[shot.mask] = 1.5 - tint[shot.mask]
    gloss = rng.uniform(0, 0.3)
    lights = [(np.array([*(reach * place), 0.0]), 0.9) for place in SPOTLIGHTS]
    *spots, front = shade(seen, shot.camera, albedo, gloss, [*lights, (np.zeros(3), 0.4)])
    every = sum(spots) / 2
    lightings = [every, *spots, 0.7 * every + front]
    return {
        f"image_{place}": (np.clip(image[..., None] * tint, 0, 1) * 255).astype(np.uint8)
        for place, image in enumerate(lightings)
    }


def _camera_to_world(shot: Shot) -> np.ndarray:
    """(4, 4); the world has the part at its origin and the table at z = 0."""
    matrix = np.eye(4)
    matrix[:3, :3] = shot.pose.rotation.T
    matrix[:3, 3] = -shot.pose.rotation.T @ shot.pose.translation
    return matrix
