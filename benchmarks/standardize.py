"""Two exports whose patch features have mean 0 and variance 1 in every channel, for ``ladder.py``.

    python benchmarks/standardize.py SIM3D --image EXPORT --depth EXPORT --out FOLDER

What small, briefly trained networks have in common in all cells is a large part of their features, and it hides what
differs from a cosine. So the shift and scale of the last norm are set such that nothing is common, measured on the
nominal training instances below SIM3D, a tree of ``dino-depth synth sim3d`` whose objects are not those to be tested.
Writes FOLDER/image, FOLDER/depth, and FOLDER/depth_random: the same network with random weights, treated alike.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dino_depth.anomaly.foreground import ForegroundConfig, cell_share, foreground
from dino_depth.depth import DepthMap
from dino_depth.frozen import load_frozen

CATEGORIES = (
    "angle_bracket",
    "butt_hinge",
    "coil_spring",
    "handwheel",
    "heat_sink",
    "hex_nut",
    "impeller",
    "spur_gear",
)
VIEWS = (1, 5, 9)
WEIGHTS = "model.safetensors"


def nominal_views(root: Path) -> list[tuple[np.ndarray, DepthMap]]:
    """Gray images (height, width) and depth maps."""
    views = []
    for category in CATEGORIES:
        folder = root / category / f"{category}_real"
        for view in VIEWS:
            millimetres = np.load(folder / "depth" / f"{view}.npy", allow_pickle=False)
            image = np.asarray(Image.open(folder / "rgb" / f"{view}_2.png"))
            views.append((image, DepthMap.from_values(millimetres / np.float32(1000))))
    return views


def object_cells(export: Path, modality: str, views: list[tuple[np.ndarray, DepthMap]], size: int) -> Tensor:
    """Features (cells, channels) float64 of the cells that show an object."""
    encoder, rows = load_frozen(str(export), modality=modality), []
    for image, depth in views:
        features = encoder.encode(encoder.prepare(image if modality == "image" else depth, size, None)[None])[0]
        share = torch.from_numpy(cell_share(foreground(depth, ForegroundConfig()), len(features)))
        rows.append(features[share > 0])
    return torch.cat(rows).double()


def standardize(export: Path, modality: str, views: list[tuple[np.ndarray, DepthMap]], size: int):
    """Changes the last norm of the export in place."""
    cells, weights = object_cells(export, modality, views, size), load_file(export / WEIGHTS)
    mean, spread = cells.mean(0), cells.std(0)
    weights["layernorm.weight"] = (weights["layernorm.weight"].double() / spread).float()
    weights["layernorm.bias"] = ((weights["layernorm.bias"].double() - mean) / spread).float()
    save_file(weights, export / WEIGHTS, metadata={"format": "pt"})


def randomize(export: Path):
    """Linear layers as at the beginning of ``initialization: xavier``, positions and class feature small, no bias."""
    weights, generator = load_file(export / WEIGHTS), torch.Generator().manual_seed(0)
    for name, value in weights.items():
        if name.endswith("bias"):
            value.zero_()
        elif value.ndim == 1:
            value.fill_(1.0)
        elif "embeddings." in name and "projection" not in name:
            value.normal_(0, 0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(value.flatten(1), generator=generator)
    save_file(weights, export / WEIGHTS, metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--depth", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", type=int, default=224)
    options = parser.parse_args()
    views = nominal_views(options.root)
    for name, source in (("image", options.image), ("depth", options.depth), ("depth_random", options.depth)):
        export = options.out / name
        shutil.copytree(source / "transformers", export)
        if name == "depth_random":
            randomize(export)
        standardize(export, name.split("_")[0], views, options.size)


if __name__ == "__main__":
    main()
