"""Fast Point Feature Histograms (Rusu et al. 2009): 33 numbers for each point, averaged over each cell; needs open3d.

A depth map becomes points by its intrinsics, without lens distortion; where they are unknown, by a pinhole camera that
sees the longer side at ``FIELD`` degrees. The map is resized, hole-safely, to ``samples`` points along a cell's side
before, and the radius is in cells, ``samples`` times the median distance between neighbouring points: it needs no unit
and fits any object. The numbers of neighbours, and the radius of normals as a fraction of the features', are those of
Back To The Feature (Horwitz and Hoshen 2022).
"""

import math

import numpy as np
import torch
from torch import Tensor

from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError
from dino_depth.frozen.interface import FrozenEncoder, Modality, fingerprint
from dino_depth.frozen.specs import Spec, read_options
from dino_depth.resample import fit_square

__all__ = ["load", "points"]

DIM = 33
FIELD = 50.0  # degrees, as of common depth cameras
NORMAL_NEIGHBOURS, FEATURE_NEIGHBOURS = 30, 100
NORMAL_RADIUS = 2 / 5


def load(spec: Spec, modality: Modality, device: torch.device) -> FrozenEncoder:
    """``fpfh[?patch=14][&samples=4][&radius=2.5]``: cell's side in pixels, points along it, radius in cells.

    Raises:
        ConfigError: images are to be encoded, a name or ``random:`` was given, or open3d is missing.
    """
    if modality != "depth":
        raise ConfigError(f"encoder {spec.text}: FPFH describes depth, not images")
    if spec.random or spec.name:
        raise ConfigError(f"encoder {spec.text}: fpfh has options only, such as fpfh?patch=16")
    options = read_options(spec, {"patch": (14,), "samples": (4,), "radius": (2.5,)})
    try:
        import open3d
    except (ImportError, OSError) as error:  # OSError: the system lacks a library that it is linked to
        raise ConfigError(f"encoder {spec.text} needs open3d: pip install 'dino-depth[fpfh]' ({error})") from None
    patch, samples = options["patch"], options["samples"]

    def to_input(view: DepthMap, size: int, matrix: np.ndarray | None) -> Tensor:
        return points(view, size // patch * samples, matrix)

    def to_features(batch: Tensor) -> Tensor:
        return torch.stack([_histograms(cloud, samples, options["radius"]) for cloud in batch.cpu()]).to(device)

    settings = {"family": "fpfh", "version": open3d.__version__, **options}
    return FrozenEncoder(
        name=spec.text,
        modality=modality,
        patch_size=patch,
        dim=DIM,
        fingerprint=fingerprint(settings, {}),
        device=device,
        to_input=to_input,
        to_features=to_features,
        uses_camera=True,
    )


def points(depth_map: DepthMap, size: int, matrix: np.ndarray | None) -> Tensor:
    """Camera coordinates (3, size, size) float32 of a map in the centred square, 0 where missing."""
    height, width = depth_map.depth.shape
    side = max(height, width)
    depth = fit_square(torch.from_numpy(depth_map.depth), torch.from_numpy(depth_map.valid), size)[0]
    if matrix is None:
        focal = side / 2 / math.tan(math.radians(FIELD / 2))
        matrix = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
    # Centres of the square's pixels, in pixels of the map.
    along = side / size * (np.arange(size) + 0.5) - 0.5
    columns, rows = np.meshgrid(along - (side - width) / 2, along - (side - height) / 2)
    flat = np.stack([columns, rows, np.ones_like(rows)]).reshape(3, -1)
    rays = (np.linalg.inv(matrix) @ flat).reshape(3, size, size)
    return torch.from_numpy(rays.astype(np.float32)) * depth


def _histograms(cloud: Tensor, samples: int, radius: float) -> Tensor:
    """(cells, cells, 33): means over the valid points (3, size, size) of each cell, 0 where there is none.

    Each of the three angles' histograms sums to 200 at a point, as open3d counts.
    """
    from open3d import geometry, pipelines, utility

    size = cloud.shape[1]
    valid = cloud[2] > 0
    features = torch.zeros(size * size, DIM)
    if valid.sum() > 1:  # one point alone has no neighbour
        chosen = cloud[:, valid].double().numpy().T
        shape = geometry.PointCloud(utility.Vector3dVector(np.ascontiguousarray(chosen)))
        reach = radius * samples * float(np.median(shape.compute_nearest_neighbor_distance()))
        shape.estimate_normals(geometry.KDTreeSearchParamHybrid(reach * NORMAL_RADIUS, NORMAL_NEIGHBOURS))
        shape.orient_normals_towards_camera_location(np.zeros(3))
        around = geometry.KDTreeSearchParamHybrid(reach, FEATURE_NEIGHBOURS)
        found = pipelines.registration.compute_fpfh_feature(shape, around).data  # (33, points)
        features[valid.flatten()] = torch.from_numpy(np.asarray(found).T.copy()).float()
    cells = size // samples
    summed = features.view(cells, samples, cells, samples, DIM).sum((1, 3))
    count = valid.view(cells, samples, cells, samples).sum((1, 3))
    return summed / count.clamp(min=1)[..., None]
