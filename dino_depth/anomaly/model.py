"""A fitted head with all that stands between an instance's views and its maps: the one path of ``evaluate`` and users.

views -> registered, if asked for -> features standardised, if asked for -> the head's maps -> back to the pixels they
were measured at -> smoothed, if asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import getLogger
from types import ModuleType
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from dino_depth.anomaly.heads import Context
from dino_depth.anomaly.registration import Cloud, Motion, RegistrationConfig, moved_maps, register
from dino_depth.anomaly.views import Standard, Views
from dino_depth.errors import ConfigError

__all__ = ["Model", "PrepareConfig", "Prepared", "Scores", "fit_model"]

log = getLogger("dino_depth")


@dataclass
class PrepareConfig:
    """What is done around every head.

    Attributes:
        registration: whether instances are brought to where the training instance lay.
        standardize: every channel of the features is given mean 0 and variance 1 over the training instances' object.
        smoothing: standard deviation of a Gaussian over the maps, pixels of a square of 224 (PatchCore and M3DM: 4).
    """

    registration: RegistrationConfig = field(default_factory=RegistrationConfig)
    standardize: bool = False
    smoothing: float = 0.0

    def __post_init__(self):
        if not self.smoothing >= 0:
            raise ConfigError(f"prepare.smoothing: must not be negative, got {self.smoothing}")


@dataclass(frozen=True, eq=False)
class Prepared:
    """An instance as the head is given it.

    Attributes:
        views: for the head.
        motion: that was found; None without registration.
        moves: displacement of every pixel, (height, width, 2) of each view, where views were moved.
    """

    views: Views
    motion: Motion | None = None
    moves: list[np.ndarray] | None = None


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model says of an instance.

    Attributes:
        maps: {name: (views, n, n)} float32 on the CPU, over the padded square, larger is more anomalous.
        instance: the head's own score; None where it is the maximum of the volume.
        prepared: what the head was given.
        health: the head's figures of a sound instance; empty where nobody asked or the head has none.
    """

    maps: dict[str, Tensor]
    instance: float | None
    prepared: Prepared
    health: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Model:
    """A fitted head and what it was fitted in.

    Attributes:
        method: the head's module.
        head: what its ``fit`` gave.
        settings: the head's configuration.
        config: what is done around it.
        standard: None where features stay as they are.
        targets: the surface of each class's first training instance; None without registration.
    """

    method: ModuleType
    head: Any
    settings: Any
    config: PrepareConfig
    standard: Standard | None = None
    targets: tuple[Cloud, ...] | None = None

    def prepare(self, views: Views) -> Prepared:
        """Registers an instance and standardises its features.

        Raises:
            DataError: a view cannot be read, shows nothing, or has no camera that registration needs.
        """
        return _prepare(views, self.method.needs(self.settings), self.standard, self.targets)

    def score(self, views: Views, health: bool = False, prepared: Prepared | None = None) -> Scores:
        """The maps of an instance.

        Args:
            health: the instance is sound, and what the head has to say of that is measured.
            prepared: what ``prepare`` gave, of this model or of one that differs in its seed only.

        Raises:
            DataError: as ``prepare`` and the head's ``score``.
        """
        prepared = self.prepare(views) if prepared is None else prepared
        maps = self.method.score(self.head, prepared.views)
        instance = None
        if hasattr(self.method, "instance"):
            found = self.method.instance(self.head, prepared.views, maps)
            instance = None if found is None else float(found)
        figures = {}
        if health and hasattr(self.method, "health"):
            figures = self.method.health(self.head, prepared.views, maps)
        if prepared.moves is not None:
            maps = moved_maps(maps, prepared.moves)
        smoothed = {name: _smoothed(part, self.config.smoothing) for name, part in maps.items()}
        return Scores(smoothed, instance, prepared, figures)

    def itself(self, first: Views) -> dict[str, Tensor] | None:
        """The maps of the first training instance, where it lies, each view compared with the others of it.

        None for heads that cannot.

        Raises:
            DataError: as the head's ``score``.
        """
        if not hasattr(self.method, "itself"):
            return None
        maps = self.method.itself(self.head, _prepare(first, frozenset(), self.standard, None).views)
        return {name: _smoothed(part, self.config.smoothing) for name, part in maps.items()}

    def pairs(self, prepared: Prepared, target: int) -> dict[str, Tensor] | None:
        """A view's maps from each source view, by name, (views, n, n), where the head has such."""
        return self.method.pairs(self.head, prepared.views, target) if hasattr(self.method, "pairs") else None


def fit_model(
    method: ModuleType, settings: Any, config: PrepareConfig, context: Context, train: Sequence[Views], fit: Any = None
) -> Model:
    """Fits a head on training instances, after all that is done around it.

    Args:
        method: the head's module.
        settings: its configuration.
        fit: takes the place of ``method.fit``, to look for a fit that is there already.

    Raises:
        ConfigError, DataError, ReportedError: as the head's ``fit`` and ``Model.prepare``.
    """
    needs, targets, standard = method.needs(settings), None, None
    if config.registration.method == "icp":
        first = {views.class_index: views for views in reversed(train)}
        targets = tuple(first[index].cloud for index in range(len(first)))
    # An instance that is itself the target lies where it lies.
    given = [
        _prepare(views, needs, None, targets).views
        if targets is None or views.cloud is not targets[views.class_index]
        else views
        for views in train
    ]
    if config.standardize:
        standard = Standard.of(given)
        given = [views.changed(standard=standard) for views in given]
    head = (fit or method.fit)(given, settings, context)
    return Model(method, head, settings, config, standard, targets)


def _prepare(
    views: Views, needs: frozenset[str], standard: Standard | None, targets: tuple[Cloud, ...] | None
) -> Prepared:
    motion, moves = None, None
    if targets is not None:
        motion = register(views.cloud, targets[views.class_index])
        if motion.failed:
            log.warning("%s: registration failed, it is scored as it lies: %s", views.place, motion.failed)
        if "motion" in needs:
            views = views.changed(motion=motion)
        elif not motion.failed:
            views, moves = views.moved(motion)
    if standard is not None:
        views = views.changed(standard=standard)
    return Prepared(views, motion, moves)


def _smoothed(maps: Tensor, deviation: float) -> Tensor:
    """(V, n, n) after a Gaussian whose deviation counts pixels of a square of 224."""
    if not deviation:
        return maps
    sigma = deviation * maps.shape[-1] / 224
    return torch.from_numpy(ndimage.gaussian_filter(maps.numpy(), (0, sigma, sigma), mode="nearest"))
