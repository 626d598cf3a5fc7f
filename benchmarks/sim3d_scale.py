"""Seconds of one core for a view of SiM3D's real size, and the memory of an instance, without encoders.

    python benchmarks/sim3d_scale.py --out FOLDER [--views 36] [--scale 1] [--height 3000 --width 4096] [--gate]

Renders a solid of revolution in closed form, so that one picture is that of every camera of a ring around it, with a
lens like SiM3D's and in its layout (depth in millimetres as float32 .npy, grey PNG), and judges it with the code of
``dino-depth evaluate``: reading, foreground, share of the cells, maps of 64 x 64 cells for two modalities, volume,
baselines and the template on raw patches. Random maps stand for a head. Times are of the processor, each stage by
itself; then a whole instance, whose views a thread reads ahead, with one head, with one and the template, and with the
heads of three seeds and the template. Rays are undistorted once for all views of a rig, in the first of them.

``--gate`` exits 4 above 1.2 s a view or 6 GiB.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dino_depth.anomaly.baselines import TEMPLATE, trivial_scores
from dino_depth.anomaly.benchmarks import BenchmarkConfig, open_benchmark
from dino_depth.anomaly.dataset import Sample
from dino_depth.anomaly.evaluate import RAW
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.foreground import ForegroundConfig, cell_share, foreground
from dino_depth.anomaly.geometry import Camera, lift, lift_mask, rays
from dino_depth.anomaly.heads import Context, open_head
from dino_depth.anomaly.instances import read_ahead
from dino_depth.anomaly.model import PrepareConfig, fit_model
from dino_depth.anomaly.scoring import MetricsConfig, judge_volume
from dino_depth.anomaly.views import Views
from dino_depth.anomaly.volume import VoxelConfig, class_grid
from dino_depth.frozen import load_frozen

LENS = (-0.08, 0.1, 5e-4, -3e-4, 0.02)
RADII = np.array([0.17, 0.17, 0.15])  # metres, the third along the axis
SECONDS, GIB, CELLS = 1.2, 6.0, 64


def make_camera(angle: float, height: int, width: int) -> Camera:
    """One of a ring, 0.7 m from the middle of the object."""
    scale = width / 4096
    matrix = np.array([[3470.28 * scale, 0, 2045.8 * scale], [0, 3468.9 * scale, 1563.63 * scale], [0, 0, 1]])
    place = 0.7 * np.array([0.9 * np.cos(angle), 0.9 * np.sin(angle), np.sqrt(1 - 0.81)])
    forward = -place / 0.7
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.stack([right, np.cross(forward, right), forward], 1), place
    return Camera(height, width, matrix, pose, LENS)


def render(camera: Camera, radii: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Depth (height, width) float32 in millimetres, +inf beside the object, and the image uint8."""
    direction = rays(camera) @ camera.camera_to_world[:3, :3].T / radii
    start = camera.camera_to_world[:3, 3] / radii
    a, b, c = (direction**2).sum(-1), direction @ start, start @ start - 1
    inside = b * b - a * c
    hit = inside > 0
    distance = (-b - np.sqrt(np.maximum(inside, 0))) / a
    place = direction * distance[..., None] + start
    bumps = 1 + 0.002 * np.sin(37 * place[..., 2])
    noise = np.random.default_rng(0).normal(0, 2e-5, distance.shape)
    depth = np.where(hit, 1000 * (distance * bumps + noise), np.inf).astype(np.float32)
    shade = np.clip(90 + 80 * place[..., 2] + 20 * np.sin(90 * place[..., 2]), 0, 255)
    return depth, np.where(hit, shade, 8).astype(np.uint8)


def write_tree(root: Path, options: argparse.Namespace):
    """One class with an instance that is tested; once."""
    if (root / "done").exists():
        return
    angles = 2 * np.pi * np.arange(options.views) / options.views
    cameras = [make_camera(angle, options.height, options.width) for angle in angles]
    folder, bad = root / "egg", root / "egg" / "egg_01_bad"
    for part in ("depth", "rgb"):
        (bad / part).mkdir(parents=True, exist_ok=True)
    radii = options.scale * RADII
    depth, image = render(cameras[0], radii)
    np.save(bad / "depth" / "001.npy", depth)
    Image.fromarray(image).save(bad / "rgb" / "001_2.png")
    for view in range(2, options.views + 1):
        os.link(bad / "depth" / "001.npy", bad / "depth" / f"{view:03}.npy")
        os.link(bad / "rgb" / "001_2.png", bad / "rgb" / f"{view:03}_2.png")
    edge = 0.5
    index = np.argwhere(np.ones((6, 6, 6), bool)) + [int((edge / 2 + radii[0]) / 0.002) - 3, 122, 122]
    np.savez(bad / "gt.npz", origin=np.full(3, -edge / 2), voxel_size=0.002, shape=np.array([250] * 3), index=index)
    for name in ("egg_real", "egg_00_good"):  # never read, but a class has them
        shutil.copytree(bad, folder / name, copy_function=os.link, ignore=shutil.ignore_patterns("gt.npz"))
    rows = [
        {
            "name": f"{view + 1:03}",
            "height": camera.height,
            "width": camera.width,
            "matrix": camera.matrix.tolist(),
            "distortion": list(camera.distortion),
            "camera_to_world": camera.camera_to_world.tolist(),
        }
        for view, camera in enumerate(cameras)
    ]
    (folder / "calibration.json").write_text(json.dumps({"cameras": rows}))
    (root / "done").touch()


def measure(root: Path, options: argparse.Namespace) -> dict:
    """Seconds of each stage per view, medians over views; the whole; peak memory."""
    benchmark = open_benchmark(BenchmarkConfig(root=str(root)))
    tested = benchmark.samples("egg", "test")
    truth = next(sample for sample in tested if sample.label == "anomalous").read_truth()
    grid = class_grid(VoxelConfig(), (), [truth])
    stages: dict[str, list[float]] = {}

    def timed(name: str, work, *arguments):
        start = time.process_time()
        result = work(*arguments)
        stages.setdefault(name, []).append(time.process_time() - start)
        return result

    generator = torch.Generator().manual_seed(0)
    sample = tested[-1]
    for place, view in enumerate(sample.views[: options.measured]):
        depth = timed("read depth", view.read_depth)
        image = timed("read image", view.read_image)
        mask = timed("foreground", foreground, depth, ForegroundConfig())
        timed("share of cells", cell_share, mask, CELLS)
        one = Sample(sample.category, sample.name, "test", "anomalous", None, (view,), sample.read_truth)
        maps = {name: torch.rand(1, CELLS, CELLS, generator=generator) for name in ("image", "depth")}
        parts = one, {0: maps}, [depth], [mask], None, VoxelConfig(), MetricsConfig(), grid
        timed("volume" if place else "volume, first view", judge_volume, *parts)
        del image
    exact = time.process_time()
    rows, columns = np.nonzero(mask)
    points = lift(view.camera, np.stack([columns, rows], 1), depth.depth[mask])
    exact = time.process_time() - exact
    fast = np.concatenate([part for *_, part in lift_mask(view.camera, depth.depth, mask)], 1).T
    error = float(np.linalg.norm(points - fast, axis=1).max())

    images = FeatureStore(load_frozen(f"raw-patches?patch={RAW}", modality="image"), None, RAW * CELLS)
    method, context = open_head("template"), Context(0, torch.device("cpu"))
    trained = [Views(one, images) for one in benchmark.samples("egg", "train")]
    template = fit_model(method, method.Config("image"), PrepareConfig(), context, trained)
    del trained
    wholes = {}
    for name, seeds, beside in (("one head", 1, False), ("and the template", 1, True), ("three heads", 3, True)):
        start, wall = time.process_time(), time.perf_counter()
        with read_ahead(sample) as resident:
            views = Views(resident, images, resident=True)
            masks, depths, count = views.foregrounds, views.depths, len(sample.views)
            heads = {
                seed: {name: torch.rand(count, CELLS, CELLS, generator=generator) for name in ("image", "depth")}
                for seed in range(seeds)
            }
            others = {TEMPLATE: template.score(views).maps} if beside else {}
            truth = sample.read_truth()
            judge_volume(resident, heads, depths, masks, truth, VoxelConfig(), MetricsConfig(), grid, others)
            trivial_scores(resident, masks)
        wholes[name] = ((time.process_time() - start) / count, (time.perf_counter() - wall) / count)
        del resident, views, depths, masks
    return {
        "views": len(sample.views),
        "size": [options.height, options.width],
        "object": float(mask.mean()),
        "stages": {name: float(np.median(values)) for name, values in stages.items()},
        "wholes": wholes,
        "every pixel undistorted": exact,
        "largest error, metres": error,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--views", type=int, default=36)
    parser.add_argument("--height", type=int, default=3000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--scale", type=float, default=1.0, help="of the object; 1 fills a sixth of the picture")
    parser.add_argument("--measured", type=int, default=6, help="views that are measured stage by stage")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gate", action="store_true", help=f"exit 4 above {SECONDS} s a view or {GIB} GiB")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = options.out / f"{options.views}x{options.height}x{options.width}x{options.scale:g}"
    write_tree(root, options)
    found = measure(root, options)
    print(f"{found['views']} views of {options.width} x {options.height}, {found['object']:.0%} of them object")
    for name, value in found["stages"].items():
        print(f"{name:24}{value:8.3f} s")
    for name, (whole, wall) in found["wholes"].items():
        print(f"{'instance, ' + name:28}{whole:8.3f} s of one core a view, {wall:.3f} s passed")
    off = 1000 * found["largest error, metres"]
    name, seconds = "undistorting every pixel", found["every pixel undistorted"]
    print(f"{name:24}{seconds:8.3f} s; interpolated rays are {off:.5f} mm off at most")
    print(f"{'peak memory':24}{found['peak_gib']:8.2f} GiB")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.gate and (found["wholes"]["and the template"][0] > SECONDS or found["peak_gib"] > GIB):
        print(f"gate failed: wanted {SECONDS} s a view and {GIB} GiB", file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    main()
