"""Surface orientation and curvature of depth maps: what probe and bench ask patch features about.

Both come from the depth itself, whatever an encoder's input normalisation keeps of it, so that encoders with different
normalisations answer the same question. One that removes the supporting plane cannot tell the plane's tilt.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NUMBERS", "PARTS", "part_means", "patch_geometry", "relief_surface", "seen_geometry", "surface"]

# Nominal focal length in image sides (28 degrees), as maps carry no intrinsics: between a Kinect's 0.8 and the 5 or so
# of industrial sensors close to a part.
FOCAL = 2.0
WINDOW = 2  # radius of the window of a surface fit, pixels
SHARPEST = 1 / (2 * WINDOW + 1)  # largest curvature such a window resolves, 1/pixel
KNOWN_SHARE = 0.5  # share of a patch's pixels whose surface must be known for the patch to count
PARTS = 2  # along a side of a patch, in ``part_means``
NUMBERS = 6 * PARTS**2  # of a patch there
SCALE = 10.0  # pixels: there a curvature of a radius of 10 pixels counts as much as a normal
JUMP = 0.1  # of the depth: a larger change within a window is an edge, not a slope


def surface(depth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Surface orientation and curvature of depth maps, in pixels.

    Maps carry no intrinsics, so the camera is weakly perspective: every pixel covers median depth / focal length, with
    a nominal focal length of two image sides. In these units the surface is z(u, v), with u to the right, v down and z
    away from the camera; on a window of 5 x 5 pixels a quadratic is fitted by least squares (a Savitzky-Golay filter),
    which smooths sensor noise and reproduces planes and paraboloids exactly. Only windows without a missing
    pixel count.

    Args:
        depth: (maps, 1, height, width), 0 where missing.

    Returns:
        unit normals (maps, 3, height, width) towards the camera: right, down, towards; mean curvature (maps, height,
        width) in 1/pixel, positive where the surface bulges towards the camera, 1/radius on a sphere, clipped at the
        +-1/5 that the window resolves; and where both are known, (maps, height, width) bool. Elsewhere all are 0.
    """
    side = max(depth.shape[-2:])
    missing = depth <= 0
    flat = depth.masked_fill(missing, math.nan).flatten(1)
    median = flat.nanmedian(1).values.nan_to_num(1.0)[:, None, None, None]
    relief = ((depth - median) * (FOCAL * side / median)).masked_fill(missing, 0)
    return relief_surface(relief, missing)


def relief_surface(relief: Tensor, missing: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`surface`, of z in pixels (maps, 1, height, width), 0 where ``missing``."""
    blocked = F.pad(missing.to(relief.dtype), [WINDOW] * 4, value=1.0)
    known = F.max_pool2d(blocked, 2 * WINDOW + 1, 1)[:, 0] == 0
    p, q, r, s, t = F.conv2d(relief, _derivative_kernels(relief.dtype, relief.device), padding=WINDOW).unbind(1)
    length = (1 + p * p + q * q).sqrt()
    normals = torch.stack([p, q, torch.ones_like(p)], 1) / length[:, None]
    curvature = ((1 + q * q) * r - 2 * p * q * s + (1 + p * p) * t) / (2 * length**3)
    return normals * known[:, None], curvature.clamp(-SHARPEST, SHARPEST) * known, known


def part_means(normals: Tensor, curvature: Tensor, known: Tensor, patch_size: int) -> Tensor:
    """What :func:`surface` found, of the ``PARTS`` x ``PARTS`` parts of each patch, (maps, rows, columns, NUMBERS).

    Number by number, and of each number part by part (rows first): the mean normal, the mean curvature and the mean of
    its absolute value, both times ``SCALE``, over the pixels where they are known, and the share of those.
    """
    curvature = SCALE * curvature[:, None]
    share = F.avg_pool2d(known[:, None].to(curvature.dtype), patch_size // PARTS)
    sums = F.avg_pool2d(torch.cat([normals, curvature, curvature.abs()], 1), patch_size // PARTS)
    return F.pixel_unshuffle(torch.cat([sums / share.clamp_min(1e-6), share], 1), PARTS).permute(0, 2, 3, 1)


@lru_cache
def _derivative_kernels(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(5, 1, window, window) filters for z_u, z_v, z_uu, z_uv, z_vv of the least-squares quadratic at the centre."""
    with torch.inference_mode(False):
        offsets = torch.arange(-WINDOW, WINDOW + 1, dtype=torch.float64, device="cpu")
        v, u = (part.flatten() for part in torch.meshgrid(offsets, offsets, indexing="ij"))
        design = torch.stack([torch.ones_like(u), u, v, u * u / 2, u * v, v * v / 2], 1)  # (pixels, 6)
        kernels = torch.linalg.pinv(design)[1:].reshape(5, 1, len(offsets), len(offsets))
        return kernels.to(dtype).to(device, non_blocking=True)  # nothing waits for a GPU


def patch_geometry(depth: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Regression targets of patches: the mean normal and the mean curvature over the pixels where they are known.

    Args:
        depth: (maps, 1, height, width), 0 where missing.

    Returns:
        targets (maps, rows, columns, 4) and the patches that count, (maps, rows, columns) bool: those with at least
        half of their pixels known.
    """
    normals, curvature, known = surface(depth)
    share = F.avg_pool2d(known[:, None].to(depth.dtype), patch_size)
    sums = F.avg_pool2d(torch.cat([normals, curvature[:, None]], 1), patch_size)
    return (sums / share.clamp_min(1e-6)).permute(0, 2, 3, 1), share[:, 0] >= KNOWN_SHARE


def seen_geometry(cloud: Tensor, focal: float, patch_size: int) -> tuple[Tensor, Tensor]:
    """As :func:`patch_geometry`, of points whose camera is known: exact perspective, so that angles are angles.

    The quadratic is fitted to x, y and z of the points on the same windows; normal and mean curvature follow from the
    first and second fundamental form. Windows over which depth changes by more than ``JUMP`` of itself span an edge.

    Args:
        cloud: (maps, 3, height, width) camera coordinates, x right, y down, z away from the camera; 0 where missing.
        focal: pixels of this grid.

    Returns:
        targets (maps, rows, columns, 4): mean normal right, down, towards the camera, and mean curvature in 1/pixel of
        a surface seen head-on at that depth, positive where it bulges towards the camera; and the patches that count.
    """
    maps, _, height, width = cloud.shape
    missing = cloud[:, 2:] <= 0
    blocked = F.pad(missing.to(cloud.dtype), [WINDOW] * 4, value=1.0)
    whole = F.max_pool2d(blocked, 2 * WINDOW + 1, 1) == 0
    window = {"kernel_size": 2 * WINDOW + 1, "stride": 1, "padding": WINDOW}
    depth = cloud[:, 2:]
    spread = F.max_pool2d(depth, **window) + F.max_pool2d(-depth, **window)
    known = (whole & (spread <= JUMP * depth))[:, 0]
    parts = F.conv2d(cloud.flatten(0, 1)[:, None], _derivative_kernels(cloud.dtype, cloud.device), padding=WINDOW)
    u, v, uu, uv, vv = parts.view(maps, 3, 5, height, width).unbind(2)  # (maps, 3, height, width) each
    normal = torch.cross(v, u, dim=1)  # of a plane before the camera: towards it
    length = normal.norm(dim=1, keepdim=True)
    normal = normal / length.clamp_min(1e-30)
    first = [(one * other).sum(1) for one, other in ((u, u), (u, v), (v, v))]
    second = [(part * normal).sum(1) for part in (uu, uv, vv)]
    # Away from the camera around a bulge, so the second form of a bulge is negative.
    mean = second[1] * first[1] - (second[0] * first[2] + second[2] * first[0]) / 2
    curvature = mean / (first[0] * first[2] - first[1] ** 2).clamp_min(1e-30) * depth[:, 0] / focal
    normal = normal * torch.tensor([1.0, 1.0, -1.0], dtype=cloud.dtype, device=cloud.device)[:, None, None]
    curvature = curvature.clamp(-SHARPEST, SHARPEST) * known
    share = F.avg_pool2d(known[:, None].to(cloud.dtype), patch_size)
    sums = F.avg_pool2d(torch.cat([normal * known[:, None], curvature[:, None]], 1), patch_size)
    return (sums / share.clamp_min(1e-6)).permute(0, 2, 3, 1), share[:, 0] >= KNOWN_SHARE
