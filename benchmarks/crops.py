"""Ten crops (2 x 224 + 8 x 98 pixels) of one 800 x 800 map on one core, against what a torchvision v2 user writes.

    python benchmarks/crops.py [--peer FILE] [--runs 20] [--json FILE] [--gate]

Speed is processor time, measured interleaved so that other load on the machine hits both alike: each round times every
variant for at least 50 ms, and the figures are medians. The error of both is against the same reference: the mean of
16 x 16 bilinear samples of the map over each crop pixel's footprint, in float64, for the same rotation, box and flips.
It is given over pixels whose footprint lies well inside the map, and, with holes cut into the map, over those next to a
hole.
`--gate` exits 4 unless ours is at least 12 times as fast as rotating every crop, twice as fast as rotating once, and no
error is larger than the peer's. Takes about a minute.
"""

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import numpy as np
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from dino_depth.config import CropConfig
from dino_depth.errors import GateError
from dino_depth.pretrain.crops import multi_crop
from dino_depth.resample import resample

SIDE = 800
EACH, ONCE = 12, 2  # least ratios to the two peers
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "bench" / "peer_torchvision_crops.py"


def noisy_map() -> np.ndarray:
    """The (800, 800) float32 map of the peer: smooth, with a step of 0.1 around a disc and sensor noise."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    smooth = 0.5 + 0.2 * np.sin(6 * x) + 0.2 * np.cos(5 * y * x) + 0.1 * ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1)
    return (smooth + np.random.default_rng(0).normal(0, 4e-4, smooth.shape)).astype(np.float32)


def holes() -> np.ndarray:
    """Validity (800, 800) with 40 round holes and 1 % of scattered missing pixels: three quarters are left."""
    random = np.random.default_rng(1)
    y, x = np.mgrid[0:SIDE, 0:SIDE]
    valid = random.random((SIDE, SIDE)) > 0.01
    for column, row, radius in random.uniform((0, 0, 5), (SIDE, SIDE, 60), (40, 3)):
        valid &= (x - column) ** 2 + (y - row) ** 2 > radius**2
    return valid


def torchvision_crops(image: torch.Tensor) -> dict:
    """The peer, written out here for where its file is absent."""

    def crop(size, scale):
        resized = v2.RandomResizedCrop(size, scale=scale, interpolation=InterpolationMode.BICUBIC, antialias=True)
        return v2.Compose([resized, v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()])

    crops = [crop(224, (0.32, 1.0))] * 2 + [crop(98, (0.05, 0.32))] * 8
    rotate = v2.RandomRotation(180, interpolation=InterpolationMode.BILINEAR)

    def rotate_once():
        turned = rotate(image)
        return [crop(turned) for crop in crops]

    return {"rotate_each": lambda: [crop(rotate(image)) for crop in crops], "rotate_once": rotate_once}


def load_peer(path: Path) -> dict:
    """The functions ``rotate_each`` and ``rotate_once`` of a peer script, which measures itself when it is run."""
    arguments, sys.argv = sys.argv, [str(path), "1"]
    names = {"__name__": "__main__"}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(path.read_text(), str(path), "exec"), names)
    finally:
        sys.argv = arguments
    return {name: names[name] for name in ("rotate_each", "rotate_once")}


def time_interleaved(variants: dict, runs: int, slice_seconds: float = 0.05) -> dict[str, float]:
    """Median milliseconds of processor time of each function over ``runs`` rounds.

    In a round every function is called once untimed, to bring the caches and the allocator into the state of a loop
    over it, and then timed for at least ``slice_seconds``.
    """
    times = {name: [] for name in variants}
    for _ in range(runs):
        for name, function in variants.items():
            function()
            start, calls = time.process_time(), 0
            while not calls or time.process_time() - start < slice_seconds:
                function()
                calls += 1
            times[name].append((time.process_time() - start) / calls * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def draw_geometry(random: np.random.Generator, size: int, scale: tuple[float, float]) -> dict:
    """One crop as torchvision applies it: rotate the map about its centre, cut an integer box, resize, flip."""
    while True:
        area, aspect = SIDE**2 * random.uniform(*scale), math.exp(random.uniform(-1, 1) * math.log(4 / 3))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if width <= SIDE and height <= SIDE:
            break
    left, top = random.integers(0, SIDE - width, endpoint=True), random.integers(0, SIDE - height, endpoint=True)
    flips = random.random(2) < 0.5
    box = {"left": int(left), "top": int(top), "width": width, "height": height}
    return box | {"size": size, "angle": random.uniform(-180, 180), "horizontal": flips[0], "vertical": flips[1]}


def affine_of(crop: dict) -> np.ndarray:
    """The affine (2, 3) from the crop's unit square to the map."""
    flip_u = [-1, 1] if crop["horizontal"] else [1, 0]
    flip_v = [-1, 1] if crop["vertical"] else [1, 0]
    unit = np.array([[flip_u[0], 0, flip_u[1]], [0, flip_v[0], flip_v[1]], [0, 0, 1]])
    box = np.array([[crop["width"], 0, crop["left"]], [0, crop["height"], crop["top"]], [0, 0, 1]])
    cosine, sine = math.cos(math.radians(crop["angle"])), math.sin(math.radians(crop["angle"]))
    centred = np.array([[1, 0, -SIDE / 2], [0, 1, -SIDE / 2], [0, 0, 1]])
    turn = np.array([[cosine, -sine, SIDE / 2], [sine, cosine, SIDE / 2]])
    return turn @ centred @ box @ unit


def torchvision_crop(values: np.ndarray, crop: dict) -> np.ndarray:
    """The same crop by torchvision: bilinear rotation, antialiased bicubic resize, flips."""
    image = functional.rotate(torch.from_numpy(values)[None], crop["angle"], InterpolationMode.BILINEAR)
    box = [crop[name] for name in ("top", "left", "height", "width")]
    image = functional.resized_crop(image, *box, [crop["size"]] * 2, InterpolationMode.BICUBIC, antialias=True)
    image = functional.horizontal_flip(image) if crop["horizontal"] else image
    return (functional.vertical_flip(image) if crop["vertical"] else image)[0].numpy()


def footprint_means(values: np.ndarray, affine: np.ndarray, size: int, samples: int = 16) -> np.ndarray:
    """Means (size, size) float64 of samples x samples bilinear samples over each pixel's footprint, 0 outside."""
    u = (np.arange(size * samples) + 0.5) / (size * samples)
    x, y = (row[0] * u + row[1] * u[:, None] + row[2] - 0.5 for row in affine)
    padded = np.pad(values.astype(np.float64), 2)
    column, row = np.floor(x), np.floor(y)
    right, down = x - column, y - row
    column, row = (np.clip(index, -2, SIDE).astype(int) + 2 for index in (column, row))
    above = padded[row, column] * (1 - right) + padded[row, column + 1] * right
    below = padded[row + 1, column] * (1 - right) + padded[row + 1, column + 1] * right
    mean = above * (1 - down) + below * down
    return mean.reshape(size, samples, size, samples).mean((1, 3))


def errors(values: np.ndarray, valid: np.ndarray) -> dict[str, float]:
    """Root mean square error of ours and of torchvision over the same crops, inside and next to holes."""
    random = np.random.default_rng(2)
    crops = [draw_geometry(random, 224, (0.32, 1.0)) for _ in range(4)]
    crops += [draw_geometry(random, 98, (0.05, 0.32)) for _ in range(16)]
    everywhere = np.ones_like(valid)
    squares = {name: [] for name in ("global", "local", "border")}
    lost = []
    for crop in crops:
        affine, size = affine_of(crop), crop["size"]
        inside = torch.from_numpy(footprint_means(everywhere, affine, size, 4) > 1 - 1e-6).float()
        inside = (-torch.nn.functional.max_pool2d(-inside[None], 7, 1, 3))[0].numpy() > 0  # 3 pixels from the edge
        for place, mask in (("interior", everywhere), ("border", valid)):
            weight = footprint_means(mask, affine, size)
            truth = footprint_means(values * mask, affine, size) / np.maximum(weight, 1e-9)
            tensors = (torch.from_numpy(array)[None] for array in (values * mask, mask))
            ours = resample(*tensors, affine[None, None], size)[0, 0, 0].numpy()
            peer = torchvision_crop(values * mask, crop)
            if place == "interior":
                squares["global" if size == 224 else "local"].append([(a - truth)[inside] ** 2 for a in (ours, peer)])
                continue
            border = inside & (weight < 1 - 1e-6) & (weight > 0.5)
            lost.append((ours[border] == 0).mean())
            border &= ours != 0
            squares["border"].append([(image - truth)[border] ** 2 for image in (ours, peer)])
    figures = {}
    for place, pairs in squares.items():
        for name, parts in zip(("ours", "torchvision"), zip(*pairs, strict=True), strict=True):
            figures[f"{place}_{name}"] = float(np.sqrt(np.concatenate(parts).mean()))
    return figures | {"border_missing": float(np.mean(lost))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, default=BESIDE, help="script with rotate_each() and rotate_once()")
    parser.add_argument("--runs", type=int, default=20, help="rounds of timing")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--gate", action="store_true", help="exit 4 below the targets")
    options = parser.parse_args()
    torch.set_num_threads(1)

    values, valid, config = noisy_map(), holes(), CropConfig()
    everywhere = np.ones_like(valid)
    if options.peer.is_file():
        peer, origin = load_peer(options.peer), str(options.peer)
    else:
        peer, origin = torchvision_crops(torch.from_numpy(values)[None]), "built-in equivalent"
        print(f"no peer at {options.peer}: measuring the equivalent written in this file")
    positions = iter(range(10**9))
    ours = {
        "ours": lambda: multi_crop(values, everywhere, config, 0, next(positions)),
        "ours_holes": lambda: multi_crop(values, valid, config, 0, next(positions)),
    }
    times = time_interleaved(peer | ours, options.runs)
    figures = errors(values, valid)

    print(f"{'ten crops of one 800 x 800 map, one core':42s} {'ms':>8s} {'/ each':>8s} {'/ once':>8s}")
    ratios = {name: [times[peer] / times[name] for peer in ("rotate_each", "rotate_once")] for name in times}
    for name, label in (
        ("rotate_each", "torchvision, rotating every crop"),
        ("rotate_once", "torchvision, rotating once"),
        ("ours", "ours, no pixel missing"),
        ("ours_holes", f"ours, {1 - valid.mean():.0%} of pixels missing"),
    ):
        print(f"{label:42s} {times[name]:8.2f} {ratios[name][0]:7.1f}x {ratios[name][1]:7.1f}x")
    print(f"\n{'RMSE to 16 x 16 samples per pixel, 1e-4':42s} {'ours':>8s} {'peer':>8s} {'ours/peer':>10s}")
    shares = {}
    for place, label in (("global", "global crops"), ("local", "local crops"), ("border", "at the border of holes")):
        mine, theirs = figures[f"{place}_ours"], figures[f"{place}_torchvision"]
        shares[place] = mine / theirs
        print(f"{label:42s} {mine * 1e4:8.2f} {theirs * 1e4:8.2f} {shares[place]:10.3f}")
    print(f"pixels at such borders that ours leaves missing: {figures['border_missing']:.1%}")
    if options.json:
        report = {"peer": origin, "milliseconds": times, "ratios": {k: ratios[k] for k in ours}, "rmse": figures}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    failures = [
        f"{name}: {ratios[name][at]:.1f}x as fast as {peer}, wanted {least}x"
        for name in ours
        for at, (peer, least) in enumerate((("rotate_each", EACH), ("rotate_once", ONCE)))
        if ratios[name][at] < least
    ] + [f"error, {place}: {share:.2f} of the peer's, wanted at most 1" for place, share in shares.items() if share > 1]
    if options.gate and failures:
        raise GateError("; ".join(failures))


if __name__ == "__main__":
    try:
        main()
    except GateError as error:
        print(f"gate failed: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
