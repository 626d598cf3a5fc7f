"""A stored sample, its PNG and its JSON, as a depth map: for this package, and for pipelines of WebDataset's own.

WebDataset's image decoders (``"pil"``, ``"rgb"``, ``"torch"``, ``"l"`` and their kin) turn pictures into 8 bits a
channel: 16-bit depth comes out as 255 wherever its code is above 255, which is nearly everywhere, and nothing says so.

    dataset = webdataset.WebDataset("shards/depth-{000000..000007}.tar").decode(depth_handler).map(with_depth_map)
"""

import math
from typing import Any

import numpy as np

from dino_depth.depth import DepthMap, Plane, decode, read_codes
from dino_depth.errors import DataError

__all__ = ["depth_handler", "sample_map", "with_depth_map"]

SUFFIX = "depth.png"


def sample_map(codes: np.ndarray, description: dict[str, Any]) -> DepthMap:
    """The map of codes (height, width) uint16 that a sample's ``json`` describes.

    Raises:
        DataError: the description lacks ``near``, ``far`` or ``kind``, or contradicts the codes, or its ``plane``
            is not three coefficients and a share.
    """
    try:
        near, far, kind = (description[key] for key in ("near", "far", "kind"))
    except (KeyError, TypeError) as error:
        raise DataError(f"the sample's json lacks {error}") from None
    # Shards of before there was another coding do not name theirs, nor those of before planes were stored their plane.
    return decode(codes, near, far, kind, description.get("coding", "linear"), _plane(description.get("plane")))


def _plane(stored: Any) -> Plane | None:
    if stored is None:
        return None
    numbers = stored if isinstance(stored, list) else []
    if len(numbers) != 4 or any(type(number) not in (int, float) or not math.isfinite(number) for number in numbers):
        raise DataError(f"plane must be three coefficients and a share, got {stored!r}")
    if not 0 <= numbers[3] <= 1:
        raise DataError(f"plane must have a share from 0 to 1, got {numbers[3]}")
    return np.array(numbers[:3], np.float32), float(numbers[3])


def depth_handler(key: str, data: bytes) -> np.ndarray | None:
    """The codes (height, width) uint16 of a depth PNG, for ``WebDataset.decode``; None leaves a member to others.

    Raises:
        DataError: the PNG is broken or not of 16 bits.
    """
    return read_codes(data) if key.lstrip(".").endswith(SUFFIX) else None


def with_depth_map(sample: dict[str, Any]) -> dict[str, Any]:
    """The sample with ``depth_map``, a :class:`DepthMap`, in place of its codes, for ``WebDataset.map``.

    Raises:
        DataError: the sample is none of a depth shard, or another decoder was there first.
    """
    codes, description = sample.get(SUFFIX), sample.get("json")
    if not isinstance(codes, np.ndarray) or codes.dtype != np.uint16 or not isinstance(description, dict):
        raise DataError(f"sample {sample.get('__key__')} holds no codes and description: decode(depth_handler) first")
    rest = {key: value for key, value in sample.items() if key != SUFFIX}
    return rest | {"depth_map": sample_map(codes, description)}
