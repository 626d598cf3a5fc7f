"""Residual: what an instance differs in from the training instance, in depth, in the image and in features.

Nothing is trained. With ``prepare.registration.method icp`` the training instance is compared where the part lies,
without it where it lay. Three maps, each a setting and a row of its own:

    depth     point-to-plane distance of every measured point from the training surface, the least over the views
    image     luminance less that of the same point in the same training view, low frequencies removed
    features  distance from the training features of the same point, the least over the views that see it

Each map is divided by how large it becomes where nothing is wrong (``calibration``), so that their maximum compares
like with like.

It takes parts for rigid and alike: tolerances of sound parts that no training instance shows are deviations.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from dino_depth.anomaly.geometry import Camera, SquareFit, lift
from dino_depth.anomaly.heads import Context, Facts, require
from dino_depth.anomaly.heads.residual.reference import (
    Reference,
    Surface,
    plane_distance,
    sampled,
    thin_view,
    without_low_frequencies,
)
from dino_depth.anomaly.views import Views
from dino_depth.errors import ConfigError, DataError

__all__ = [
    "INFERENCE", "Config", "Residual", "check", "deviations", "fit", "from_state", "itself", "needs", "score", "title",
]  # fmt: skip

INFERENCE = frozenset()  # a fit is next to nothing
PARTS = ("depth", "image", "features")
OUTSTANDING = 4.0  # times the median distance: what is farther off is measured from the whole surface


@dataclass
class Config:
    """Registered comparison with the training instances.

    Attributes:
        maps: which of ``depth``, ``image`` and ``features``.
        features: whose features ``features`` compares.
        pixels: longest side that views are thinned to, pixels.
        sources: training views that depth and features are compared with: ``all``, or the same view alone (``target``).
        lowest: standard deviation of the Gaussian below whose frequencies the image is not compared, share of its side.
        smoothing: standard deviation of the Gaussian that averages noise in depth and image, share of the side.
        calibration: what each map is divided by: ``training``, its ``quantile`` where each view of the training
            instance is compared with the others of it, and nothing is wrong; ``median`` of the view's own map;
            ``none`` leaves millimetres, grey values and spreads.
        quantile: see ``calibration``. What the maximum of the maps has to agree in is their tail, not their middle.
        beyond: a point farther than this behind what another view shows is hidden from it, share of the part's size.
        limit: largest number of training instances that are kept, the first ones.
    """

    maps: tuple[Literal["depth", "image", "features"], ...] = ("depth", "image")
    features: Literal["image", "depth", "both"] = "image"
    pixels: int = 1024
    sources: Literal["all", "target"] = "all"
    lowest: float = 0.05
    smoothing: float = 0.01
    calibration: Literal["training", "median", "none"] = "training"
    quantile: float = 0.998
    beyond: float = 0.1
    limit: int = 4


@dataclass(frozen=True, eq=False)
class Instance:
    """A training instance.

    Attributes:
        views: one reference for each.
        features: by modality, (views, n, n, dim) float32.
        class_index: its class.
    """

    views: tuple[Reference, ...]
    features: dict[str, Tensor]
    class_index: int


@dataclass(frozen=True, eq=False)
class Residual:
    """A fitted head.

    Attributes:
        instances: of training.
        spreads: by modality, root mean squared distance of the training cells from their mean.
        size: longest diagonal of a training instance's bounding box, metres.
        scales: by map, its quantile where views of the training instance are compared with each other.
    """

    config: Config
    instances: tuple[Instance, ...]
    spreads: dict[str, float]
    size: float
    scales: dict[str, float]

    def surface(self, class_index: int) -> Surface:
        """All that the first training instance of a class shows."""
        if class_index not in self._surfaces:
            first = next(one for one in self.instances if one.class_index == class_index)
            self._surfaces[class_index] = Surface.of(first.views)
        return self._surfaces[class_index]

    @cached_property
    def _surfaces(self) -> dict[int, Surface]:
        return {}

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        return {
            "config": asdict(self.config),
            "instances": [
                {
                    "views": [view.state() for view in one.views],
                    "features": one.features,
                    "class_index": one.class_index,
                }
                for one in self.instances
            ],
            "spreads": self.spreads,
            "size": self.size,
            "scales": self.scales,
        }


def from_state(state: dict[str, Any], device: torch.device) -> Residual:
    """The head that gave ``state``.

    Raises:
        DataError: a key is missing or unknown.
    """
    try:
        instances = tuple(
            Instance(tuple(map(Reference.of_state, one["views"])), dict(one["features"]), one["class_index"])
            for one in state["instances"]
        )
        settings = state["config"] | {"maps": tuple(state["config"]["maps"])}
        return Residual(Config(**settings), instances, dict(state["spreads"]), state["size"], dict(state["scales"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"not the state of a residual head: {error}") from error


def needs(config: Config) -> frozenset[str]:
    """Pixels, cameras and the motion between the instances; encoders for the map of features alone."""
    encoded = {"image", "depth"} if config.features == "both" else {config.features}
    return frozenset({"pixels", "geometry", "motion"} | (encoded if "features" in config.maps else set()))


def title(config: Config) -> str:
    maps = [f"{name} of {config.features}" if name == "features" else name for name in config.maps]
    return ", ".join(["residual", " + ".join(maps), *(["same view only"] if config.sources == "target" else [])])


def check(config: Config, facts: Facts):
    """Refuses what cannot work.

    Raises:
        ConfigError: a setting that cannot work, an encoder or cameras that are missing.
    """
    _check_config(config)
    require("residual", needs(config), facts)
    if config.calibration == "training" and facts.views < 2:
        raise ConfigError("residual.calibration training compares views with each other: there is one; use median")


def _check_config(config: Config):
    if not config.maps or len(set(config.maps)) < len(config.maps):
        raise ConfigError(f"residual.maps: name some of {', '.join(PARTS)} once each, got {list(config.maps)}")
    for name in ("pixels", "limit"):
        if getattr(config, name) < 1:
            raise ConfigError(f"residual.{name} must be at least 1, got {getattr(config, name)}")
    for name in ("lowest", "beyond"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"residual.{name} must be above 0, got {getattr(config, name)}")
    if not 0 < config.quantile < 1:
        raise ConfigError(f"residual.quantile must lie within (0, 1), got {config.quantile}")
    if not config.smoothing >= 0:
        raise ConfigError(f"residual.smoothing must not be negative, got {config.smoothing}")


@torch.inference_mode()
def fit(train: Sequence[Views], config: Config, context: Context) -> Residual:
    """Keeps the first training instances of each class, where the first of them lies.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: there is no training instance, a view cannot be read, or shows no object.
    """
    _check_config(config)
    if not train:
        raise DataError("residual: no training sample")
    instances, cells, size, counts = [], {}, 0.0, {}
    for views in train:
        counts[views.class_index] = counts.get(views.class_index, 0) + 1
        if counts[views.class_index] > config.limit:
            continue
        features = {name: getattr(views, name) for name in sorted(needs(config) & {"image", "depth"})}
        for name, part in features.items():
            cells.setdefault(name, []).append(part[views.share > 0])
        instances.append(Instance(tuple(_thinned(views, config)[0]), features, views.class_index))
        size = max(size, views.cloud.diagonal)
    spreads = {name: float(torch.cat(parts).var(0, correction=0).sum().sqrt()) or 1.0 for name, parts in cells.items()}
    head = Residual(config, tuple(instances), spreads, size, {})
    if config.calibration == "training":
        return _calibrated(head, train[0])
    return head


def _thinned(views: Views, config: Config) -> tuple[list[Reference], list[np.ndarray]]:
    """The views at working size, and which of their pixels are the object; a motion moves the cameras instead."""
    references, masks = [], []
    move = np.eye(4) if views.motion is None else views.motion.matrix
    for image, depth, camera, mask in zip(views.grey(), views.depths, views.cameras, views.foregrounds, strict=True):
        thin, step = thin_view(image, depth, _moved(camera, move), config.pixels)
        references.append(thin)
        masks.append(np.ascontiguousarray(mask[::step, ::step]) & (thin.depth > 0))
    return references, masks


def _moved(camera: Camera, move: np.ndarray) -> Camera:
    return replace(camera, camera_to_world=move @ camera.camera_to_world)


@torch.inference_mode()
def score(head: Residual, views: Views) -> dict[str, Tensor]:
    """The maps that the settings name, (views, n, n) at working size, float32.

    Raises:
        DataError: a view cannot be read or shows no object, another number of views than in training, or a class that
            was not trained on.
    """
    seen, masks = _thinned(views, head.config)
    found = _maps(head, views, seen, masks)
    return {name: _squares(_divided(head, name, parts, masks), masks) for name, parts in found.items()}


@torch.inference_mode()
def itself(head: Residual, views: Views) -> dict[str, Tensor]:
    """The maps of a training instance whose views are compared with each other, as if each were new; as ``score``.

    Raises:
        DataError: as ``score``.
    """
    seen, masks = _thinned(views, head.config)
    found = {name: [np.nan_to_num(part) for part in parts]
             for name, parts in _maps(head, views, seen, masks, others=True).items()}  # fmt: skip
    return {name: _squares(_divided(head, name, parts, masks), masks) for name, parts in found.items()}


def deviations(head: Residual, views: Views) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Signed distance (height, width) float64 from the training surface at working size, metres, and where it is known.

    Positive is towards the camera: material that the first training instance has not. To be measured from, so it is
    neither averaged over pixels nor the least over views, which noise would shrink: where a pixel stands out it is the
    distance from the nearest place of the whole training surface, elsewhere that from what the same view shows.

    Raises:
        DataError: as ``score``.
    """
    seen, masks = _thinned(views, head.config)
    first, surface = _of_class(head, views)[0], head.surface(views.class_index)
    signed, known = [], []
    for view, (thin, mask) in enumerate(zip(seen, masks, strict=True)):
        points = _points(thin, mask)
        values, shown, _ = plane_distance(points, first.views[view], [(0, 0)])
        far = ~shown | (np.abs(values) > OUTSTANDING * _typical(np.abs(values[shown])))
        values[far] = surface.distance(points[far])
        here = np.zeros(mask.shape)
        here[mask] = values
        signed.append(here)
        known.append(mask)
    return signed, known


def _of_class(head: Residual, views: Views) -> list[Instance]:
    chosen = [one for one in head.instances if one.class_index == views.class_index]
    if not chosen:
        raise DataError(f"residual: class index {views.class_index} was not fitted on")
    counts = {len(one.views) for one in chosen}
    if counts != {len(views)}:
        raise DataError(f"residual: {len(views)} views, the head was fitted on {sorted(counts)}")
    return chosen


def _maps(
    head: Residual, views: Views, seen: list[Reference], masks: list[np.ndarray], others: bool = False
) -> dict[str, list[np.ndarray]]:
    """(height, width) of each view by map.

    Args:
        others: compares with the other views alone, to see how views differ anyway; NaN where none of them sees.
    """
    instances = _of_class(head, views)
    found: dict[str, list[np.ndarray]] = {name: [] for name in head.config.maps}
    for view, (thin, mask) in enumerate(zip(seen, masks, strict=True)):
        if "depth" in found:
            signed, known = _deviation(head, instances, view, thin, mask, others)
            found["depth"].append(np.abs(np.where(known, signed, np.nan) if others else signed) * 1000)
        if "image" in found:
            found["image"].append(_luminance(head, instances, view, thin, mask, others))
        if "features" in found:
            found["features"].append(_feature_distance(head, instances, view, views, thin, mask, others))
    return found


def _chosen(head: Residual, instance: Instance, view: int, others: bool) -> list[int]:
    """Views of a training instance that a view is compared with."""
    if others:
        return [other for other in range(len(instance.views)) if other != view]
    return [view] if head.config.sources == "target" else list(range(len(instance.views)))


def _points(thin: Reference, mask: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(mask)
    return lift(thin.camera, np.stack([columns, rows], 1), thin.depth[rows, columns])


def _deviation(
    head: Residual, instances: list[Instance], view: int, thin: Reference, mask: np.ndarray, others: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The signed distance of least size over training views and instances, and where any of them shows a surface."""
    points = _points(thin, mask)
    signed, size = np.zeros(len(points)), np.full(len(points), np.inf)
    for instance in instances:
        for other in _chosen(head, instance, view, others):
            distance, shown, _ = plane_distance(points, instance.views[other])
            better = shown & (np.abs(distance) < size)
            signed[better], size[better] = distance[better], np.abs(distance[better])
    # Where no training view shows anything there was nothing: as far off as anything can be told to be.
    known = np.isfinite(size)
    signed[~known] = 0.0 if others else head.config.beyond * head.size
    values, where = np.zeros(mask.shape), np.zeros(mask.shape, bool)
    values[mask], where[mask] = signed, known
    return _averaged(values, mask, head.config), where


def _averaged(values: np.ndarray, mask: np.ndarray, config: Config) -> np.ndarray:
    """A Gaussian average within the mask, that takes the noise of single pixels away."""
    deviation = config.smoothing * max(mask.shape)
    if not deviation:
        return values
    weight = ndimage.gaussian_filter(mask.astype(np.float64), deviation)
    return np.where(mask, ndimage.gaussian_filter(values * mask, deviation) / np.maximum(weight, 1e-9), 0)


def _luminance(
    head: Residual, instances: list[Instance], view: int, thin: Reference, mask: np.ndarray, others: bool
) -> np.ndarray:
    points, best = _points(thin, mask), np.full(mask.shape, np.inf)
    for instance in instances:
        # Gloss moves with the view, so an image is compared with the same view's alone.
        for other in _chosen(head, instance, view, others) if others else [view]:
            reference = instance.views[other]
            _, shown, places = plane_distance(points, reference)
            there = sampled(torch.from_numpy(reference.image[..., None]), np.nan_to_num(places)).numpy()[:, 0]
            change, where = np.zeros(mask.shape, np.float32), mask.copy()
            change[mask] = thin.image[mask] - there
            where[mask] = shown
            change = without_low_frequencies(change, where, head.config.lowest * max(mask.shape))
            change = np.abs(_averaged(change, where, head.config))
            best = np.where(where, np.minimum(best, change), best)
    return np.where(np.isfinite(best), best, np.nan if others else 0) * mask


def _feature_distance(
    head: Residual, instances: list[Instance], view: int, views: Views, thin: Reference, mask: np.ndarray,
    others: bool,
) -> np.ndarray:  # fmt: skip
    """At the resolution of the cells, brought to that of the working size."""
    points, shown = views.cell_points
    move = np.eye(4) if views.motion is None else views.motion.matrix
    here = shown[view]
    moved = points[view][here] @ move[:3, :3].T + move[:3, 3]
    count = here.shape[0]
    best = torch.full((len(moved),), torch.inf)
    for instance in instances:
        for other in _chosen(head, instance, view, others):
            reference = instance.views[other]
            distance, visible, places = plane_distance(moved, reference)
            visible &= np.abs(distance) < head.config.beyond * head.size
            cells = SquareFit(*reference.depth.shape, count).to_square(np.nan_to_num(places))
            total = torch.zeros(len(moved))
            for name, kept in instance.features.items():
                given = getattr(views, name)[view][torch.from_numpy(here)]
                total += torch.linalg.vector_norm(given - sampled(kept[other], cells), dim=1) / head.spreads[name]
            best = torch.where(torch.from_numpy(visible), torch.minimum(best, total), best)
    values = torch.zeros(count, count)
    known = best.isfinite()
    best = torch.where(known, best, best[known].max() if known.any() else 0.0)  # nothing alike anywhere
    values[torch.from_numpy(here)] = best
    return SquareFit(*mask.shape, count).unfit(values).numpy() * mask


def _divided(head: Residual, name: str, parts: list[np.ndarray], masks: list[np.ndarray]) -> list[np.ndarray]:
    """Each view's map over how large it is where nothing is wrong."""
    if head.config.calibration == "none":
        return parts
    if head.config.calibration == "training":
        return [part / head.scales[name] for part in parts]
    return [part / _typical(part[mask]) for part, mask in zip(parts, masks, strict=True)]


def _typical(values: np.ndarray) -> float:
    found = float(np.median(values)) if len(values) else 0.0
    return found if found > 0 else 1.0


def _calibrated(head: Residual, first: Views) -> Residual:
    """With the quantile of every map where the views of the training instance are compared with each other."""
    seen, masks = _thinned(first, head.config)
    found = _maps(head, first, seen, masks, others=True)
    scales = {}
    for name, parts in found.items():
        values = np.concatenate([part[mask] for part, mask in zip(parts, masks, strict=True)])
        values = values[np.isfinite(values)]
        scales[name] = (float(np.quantile(values, head.config.quantile)) if len(values) else 0.0) or 1.0
    return replace(head, scales=scales)


def _squares(parts: list[np.ndarray], masks: list[np.ndarray]) -> Tensor:
    """(V, n, n) over the padded square of maps (height, width) of each view, n being the longest side of any."""
    count = max(max(mask.shape) for mask in masks)
    return torch.stack([SquareFit(*part.shape, count).fit(torch.from_numpy(part.astype(np.float32))) for part in parts])
