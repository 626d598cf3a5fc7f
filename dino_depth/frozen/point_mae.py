"""Point-MAE (Pang et al. 2022) as M3DM and CFM use it: features of groups of points, interpolated to the grid of cells.

A depth map becomes points as for ``fpfh``, ``samples`` along a cell's side. 1024 of them, far apart from each other,
are centres of groups of their 128 nearest points; a small network describes each group, and 12 transformer blocks see
all of them. A group's feature is the outcome of blocks 4, 8 and 12, each through the final norm: 3 x 384 channels.
Every point has the mean of its three nearest centres' features, weighted by the inverse of the squared distance, and
a cell the mean of its points; zero where it has none.

Weights come from a file of the authors' (``pretrain.pth``), never from a network: every key of the encoder must be
there and fit. Other than in M3DM and CFM the network is in evaluation mode, so that the features of a cloud are
always the same; there, batch statistics and dropped blocks change them at every call.

Trap: the authors train on clouds in the unit sphere, M3DM and CFM use metres in the frame of the camera.
``scale=metres`` does as they do; the positions are out of the network's range if a map's unit is wrong.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from scipy.spatial import cKDTree
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError
from dino_depth.frozen.fpfh import points
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options

__all__ = ["PointTransformer", "farthest_points", "interpolation", "load"]

DIM, DEPTH, HEADS = 384, 12, 6
TAKEN = (4, 8, 12)  # blocks whose outcome is the feature, counted from 1
PREFIX = "MAE_encoder."


class _Embedding(nn.Module):
    """A group of points (groups, points, 3) as one token (groups, 384), whatever their order."""

    def __init__(self):
        super().__init__()
        self.first_conv = nn.Sequential(nn.Conv1d(3, 128, 1), nn.BatchNorm1d(128), nn.ReLU(), nn.Conv1d(128, 256, 1))
        self.second_conv = nn.Sequential(nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(), nn.Conv1d(512, DIM, 1))

    def forward(self, groups: Tensor) -> Tensor:
        single = self.first_conv(groups.transpose(1, 2))  # (groups, 256, points)
        whole = single.amax(2, keepdim=True).expand_as(single)
        return self.second_conv(torch.cat([whole, single], 1)).amax(2)


class PointTransformer(nn.Module):
    """The encoder. Its keys are those of the authors' file, without ``MAE_encoder.`` and one ``blocks.``."""

    def __init__(self):
        super().__init__()
        self.encoder = _Embedding()
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, DIM))
        self.blocks = nn.ModuleList(Block(DIM, HEADS, norm_layer=nn.LayerNorm) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, groups: Tensor, centres: Tensor) -> Tensor:
        """(groups, 1152) of groups (groups, points, 3) less their centres (groups, 3)."""
        # 16 groups at a time: a chunk of 2048 points bounds what the convolutions hold.
        tokens = torch.cat([self.encoder(part) for part in groups.split(16)])[None]
        position, taken = self.pos_embed(centres)[None], []
        for number, block in enumerate(self.blocks, 1):
            tokens = block(tokens + position)
            if number in TAKEN:
                taken.append(self.norm(tokens)[0])
        return torch.cat(taken, 1)


def load(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``point-mae:FILE[?patch=14][&samples=4][&groups=1024][&neighbours=128][&scale=metres]``, ``random:point-mae``.

    Raises:
        ConfigError: images are to be encoded, or there is no such file.
        DataError: the file's weights are not this encoder's.
    """
    if modality != "depth":
        raise ConfigError(f"encoder {spec.text}: Point-MAE describes depth, not images")
    known = {"patch": (14,), "samples": (4,), "groups": (1024,), "neighbours": (128,)}
    known |= {"scale": ("metres", "unit_sphere")} | ({"seed": (0,)} if spec.random else {})
    options = read_options(spec, known)
    if spec.random:
        if spec.name:
            raise ConfigError(f"encoder {spec.text}: random weights need no file; random:point-mae")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options["seed"])
            model = PointTransformer()
    else:
        model = _read(spec)
    model = model.eval().requires_grad_(False).to(device)
    patch, samples = options["patch"], options["samples"]

    def to_input(view: DepthMap, size: int, matrix: np.ndarray | None) -> Tensor:
        if options["scale"] == "metres" and view.kind != "metric":
            raise DataError(f"{spec.text} needs depth in metres, this map is {view.kind}; use scale=unit_sphere")
        return points(view, size // patch * samples, matrix)

    def to_features(batch: Tensor) -> Tensor:
        return torch.stack([_cells(model, cloud, options) for cloud in batch.cpu()]).to(device)

    settings = {"family": "point-mae", **options}
    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=patch,
        dim=DIM * len(TAKEN),
        fingerprint=fingerprint(settings, model.state_dict()),
        device=device,
        to_input=to_input,
        to_features=to_features,
        uses_camera=True,
    )


def _read(spec: Spec) -> PointTransformer:
    path = Path(spec.name)
    if not spec.name or not path.is_file():
        raise ConfigError(
            f"encoder {spec.text}: name the authors' file of weights, point-mae:pretrain.pth; it is never downloaded"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises what the broken content makes its parts raise
        raise DataError(f"{path}: unreadable weights: {' '.join(str(error).split())[:200]}") from None
    for key in ("base_model", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: not a file of named weights")
    weights = {name.partition(PREFIX)[2]: part for name, part in content.items() if PREFIX in name}
    weights = {name.replace("blocks.blocks.", "blocks.", 1): part for name, part in weights.items()}
    model = PointTransformer()
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError) as error:
        raise DataError(f"{path}: not the encoder of Point-MAE: {' '.join(str(error).split())[:300]}") from None
    return model


def _cells(model: PointTransformer, cloud: Tensor, options: Mapping) -> Tensor:
    """(cells, cells, 1152) of points (3, size, size), 0 where missing."""
    size, samples = cloud.shape[1], options["samples"]
    cells, valid = size // samples, (cloud[2] > 0).numpy()
    chosen = cloud.numpy()[:, valid].T.astype(np.float32)  # (points, 3)
    if not len(chosen):
        return torch.zeros(cells, cells, DIM * len(TAKEN))
    if options["scale"] == "unit_sphere":
        chosen = chosen - chosen.mean(0)
        chosen /= max(float(np.linalg.norm(chosen, axis=1).max()), 1e-12)
    centres = chosen[farthest_points(chosen, options["groups"])]
    count = min(options["neighbours"], len(chosen))
    near = cKDTree(chosen).query(centres, count)[1].reshape(len(centres), count)
    groups = torch.from_numpy(chosen[near] - centres[:, None])
    device = model.norm.weight.device
    features = model(groups.to(device), torch.from_numpy(centres).to(device)).cpu()  # (centres, 1152)
    rows, columns = np.nonzero(valid)
    cell = rows // samples * cells + columns // samples
    weights = sparse.csr_matrix((1 / np.bincount(cell)[cell], (cell, np.arange(len(cell)))), (cells**2, len(cell)))
    weights = weights @ interpolation(chosen, centres)  # the mean over a cell's points: (cells, centres)
    return torch.from_numpy((weights @ features.double().numpy()).astype(np.float32)).view(cells, cells, -1)


def farthest_points(cloud: np.ndarray, count: int) -> np.ndarray:
    """Indices of points (n, 3), the first and then again and again the farthest from all before; at most n."""
    apart, chosen = np.full(len(cloud), np.inf, np.float32), [0]
    while len(chosen) < min(count, len(cloud)):
        np.minimum(apart, np.square(cloud - cloud[chosen[-1]]).sum(1), out=apart)
        apart[chosen[-1]] = -1  # twins of points must not bring it back
        chosen.append(int(apart.argmax()))
    return np.array(chosen)


def interpolation(cloud: np.ndarray, centres: np.ndarray) -> sparse.csr_matrix:
    """Weights (points, centres) of the three nearest centres of each point, each row of sum 1."""
    count = min(3, len(centres))
    apart, near = (part.reshape(len(cloud), count) for part in cKDTree(centres).query(cloud, count))
    weight = 1 / (np.square(apart) + 1e-8)
    weight /= weight.sum(1, keepdims=True)
    rows = np.repeat(np.arange(len(cloud)), count)
    return sparse.csr_matrix((weight.ravel(), (rows, near.ravel())), (len(cloud), len(centres)))
