"""Template: distance to the same cell of the same view of the nearest training instance.

The simplest method that a fixed rig allows, and so the row that every other has to pass. It takes parts for rigid and
for put down at the same place; ``prepare.registration.method icp`` sees to the latter.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dino_depth.anomaly.heads import Context, Facts, check_features, check_train, require
from dino_depth.anomaly.views import Views
from dino_depth.errors import ConfigError, DataError

__all__ = ["INFERENCE", "Config", "Template", "check", "fit", "from_state", "graph", "needs", "score", "title"]

INFERENCE = frozenset({"distance", "reach"})


@dataclass
class Config:
    """Comparison with the same cell of the training instance.

    Attributes:
        modality: whose features are compared; ``both`` gives a map of each.
        distance: ``euclidean``, over the spread of the training cells, or ``cosine``.
        reach: cells around the same cell that are looked at as well, and the nearest taken.
        limit: largest number of training instances that are kept, the first ones.
    """

    modality: Literal["image", "depth", "both"] = "both"
    distance: Literal["euclidean", "cosine"] = "euclidean"
    reach: int = 0
    limit: int = 16


@dataclass(frozen=True)
class Template:
    """A fitted head.

    Attributes:
        features: by modality and class, (instances, views, rows, columns, dim) float32 on the device of the head.
        spreads: by modality, root mean squared distance of the training cells from their mean.
        dims: channels of image and depth features.
    """

    config: Config
    features: dict[str, tuple[Tensor, ...]]
    spreads: dict[str, float]
    dims: tuple[int, int]

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        features = {name: [part.cpu() for part in parts] for name, parts in self.features.items()}
        return {"config": asdict(self.config), "features": features, "spreads": self.spreads, "dims": list(self.dims)}


def from_state(state: dict[str, Any], device: torch.device) -> Template:
    """The head that gave ``state``.

    Raises:
        DataError: a key is missing or unknown.
    """
    try:
        features = {name: tuple(part.to(device) for part in parts) for name, parts in state["features"].items()}
        return Template(Config(**state["config"]), features, dict(state["spreads"]), tuple(state["dims"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not the state of a template head: {error}") from error


def needs(config: Config) -> frozenset[str]:
    """The features that are compared."""
    return frozenset({"image", "depth"} if config.modality == "both" else {config.modality})


def title(config: Config) -> str:
    parts = ["template", config.modality]
    return ", ".join(parts + [f"reach {config.reach}"] * bool(config.reach) + [config.distance] * _cosine(config))


def _cosine(config: Config) -> bool:
    return config.distance == "cosine"


def check(config: Config, facts: Facts):
    """Refuses what cannot work.

    Raises:
        ConfigError: a setting that cannot work, or an encoder that is missing.
    """
    _check_config(config)
    require("template", needs(config), facts)


def _check_config(config: Config):
    for name, least in (("reach", 0), ("limit", 1)):
        if getattr(config, name) < least:
            raise ConfigError(f"template.{name} must be at least {least}, got {getattr(config, name)}")


def fit(train: Sequence[Views], config: Config, context: Context) -> Template:
    """Keeps the features of the first training instances of each class.

    Raises:
        ConfigError: a setting that cannot work, or a modality that was not encoded.
        DataError: features that cannot be used, views or grids that differ within a class, or no object.
    """
    _check_config(config)
    dims = check_train(train, "template")
    kept: dict[str, list[Tensor]] = {}
    spreads = {}
    if not any(bool((views.share > 0).any()) for views in train):
        raise DataError(f"template: none of {len(train)} training samples shows an object")
    for modality in sorted(needs(config)):
        if not dims[("image", "depth").index(modality)]:
            found = f"{dims[0]} image and {dims[1]} depth channels"
            raise ConfigError(f"template.modality {config.modality}: got {found}")
        cells = torch.cat([getattr(views, modality)[views.share > 0] for views in train])
        spreads[modality] = float(cells.var(0, correction=0).sum().sqrt()) or 1.0
        kept[modality] = []
        for index in range(1 + max(views.class_index for views in train)):
            parts = [getattr(views, modality) for views in train if views.class_index == index][: config.limit]
            shapes = sorted({tuple(part.shape[:3]) for part in parts})
            if len(shapes) != 1:
                raise DataError(f"template: training samples of class {index} differ in views or grid: {shapes}")
            kept[modality].append(torch.stack(parts).to(context.device))
    return Template(config, {name: tuple(parts) for name, parts in kept.items()}, spreads, dims)


@torch.inference_mode()
def score(head: Template, views: Views) -> dict[str, Tensor]:
    """Distance of every cell from the same cell, of the nearest training instance.

    Returns:
        {"image": (views, rows, columns), "depth": the same}, or one of them, float32 on the CPU.

    Raises:
        DataError: features that cannot be used, an unknown class, or other views or cells than in training.
    """
    check_features(views, "template", head.dims)
    for modality, classes in head.features.items():
        if not 0 <= views.class_index < len(classes):
            raise DataError(f"template: class index {views.class_index}, the head was fitted on {len(classes)} classes")
        kept, given = classes[views.class_index], getattr(views, modality)
        if kept.shape[1:4] != given.shape[:3]:
            found = f"{tuple(given.shape[:3])} views and cells, the head was fitted on {tuple(kept.shape[1:4])}"
            raise DataError(f"template: {found}")
    return _maps(head, {"image": views.image, "depth": views.depth}, views.class_index)


def graph(head: Template) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """``score`` of the features of one class's views; can be traced."""
    return lambda image, depth: _maps(head, {"image": image, "depth": depth}, 0)


def _maps(head: Template, given: dict[str, Tensor], class_index: int) -> dict[str, Tensor]:
    return {
        modality: _nearest(given[modality], classes[class_index], head.config, head.spreads[modality])
        for modality, classes in head.features.items()
    }


def _nearest(given: Tensor, kept: Tensor, config: Config, spread: float) -> Tensor:
    """(V, n, m) of features (V, n, m, dim) and those of training instances (k, V, n, m, dim)."""
    reach, (_, rows, columns, _) = config.reach, given.shape
    beyond = F.pad(torch.zeros(rows, columns, device=kept.device), (reach,) * 4, value=torch.inf)
    found = []
    for place, view in enumerate(given.to(kept.device)):
        best = torch.full((rows, columns), torch.inf, device=kept.device)
        for template in kept[:, place]:  # a view and an instance at a time bounds the memory
            padded = F.pad(template, (0, 0, reach, reach, reach, reach))
            for down in range(2 * reach + 1):
                for across in range(2 * reach + 1):
                    other = padded[down : down + rows, across : across + columns]
                    if config.distance == "cosine":
                        distance = (1 - F.cosine_similarity(view, other, dim=-1)).clamp_min(0)
                    else:
                        distance = torch.linalg.vector_norm(view - other, dim=-1) / spread
                    best = torch.minimum(best, distance + beyond[down : down + rows, across : across + columns])
        found.append(best.cpu())
    return torch.stack(found)
