"""Features of a depth map, as colours: python features.py ENCODER [DEPTH.npy] [OUT.png]

Notebook-style: an editor that knows ``# %%`` runs it cell by cell; set the three names of the first cell there.
"""

# %% An exported folder or a Hub repository; depth in metres, 0 or NaN where it is missing; the picture to write
import sys

import numpy as np
import torch
from PIL import Image

import dino_depth
from dino_depth.depth import DepthMap

ENCODER, DEPTH, OUT = (*sys.argv[1:4], *("export", None, "features.png")[len(sys.argv[1:4]) :])

# %% The encoder, in one line
encoder = dino_depth.load_encoder(ENCODER)

# %% A depth map: yours, or a ball and a box on a tilted table with a strip that the sensor did not see
if DEPTH:
    depth = np.load(DEPTH, allow_pickle=False)
else:
    y, x = np.mgrid[-1:1:480j, -1:1:480j]
    depth = 0.6 + 0.05 * y
    depth -= 0.12 * np.sqrt(np.clip(1 - ((x + 0.4) ** 2 + y**2) / 0.12, 0, None))
    depth -= 0.06 * (np.maximum(abs(x - 0.45), abs(y)) < 0.25)
    depth[300:320] = 0
depth_map = DepthMap.from_values(depth)

# %% Class feature (1, dim) and patch features (1, rows, columns, dim), at the size the export was made for
image = encoder.prepare(depth_map)[None]  # (1, 1, size, size)
class_feature, patch_features = encoder(image)
print(f"{encoder.name}: class feature {tuple(class_feature.shape)}, patch features {tuple(patch_features.shape)}")

# %% The three leading principal components of the patches that see something are red, green and blue
patches = patch_features[0]  # (rows, columns, dim)
seen = torch.nn.functional.max_pool2d(image.abs(), encoder.patch_size)[0, 0] > 0  # (rows, columns)
centred = patches - patches[seen].mean(0)
axes = torch.linalg.svd(centred[seen], full_matrices=False).Vh[:3]
scores = centred @ axes.T  # (rows, columns, 3)
low, high = scores[seen].amin(0), scores[seen].amax(0)
colours = (255 * (scores - low) / (high - low).clamp_min(1e-12) * seen[..., None]).clamp(0, 255).byte()
Image.fromarray(colours.numpy()).resize((encoder.size, encoder.size), Image.Resampling.NEAREST).save(OUT)
print(f"{OUT}: {len(axes)} principal components of {int(seen.sum())} patches")
