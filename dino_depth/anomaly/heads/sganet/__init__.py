"""SGANet: cells refined by what neighbouring views show of them, aligned over modalities and views (Bai et al. 2026).

``method.py`` is section 3 of the paper, ``correspondence.py`` the pairs of cells of its section 3.5. Here are the
settings, the loop and the score: the distance of a cell's refined features, of both modalities joined, from the nearest
of the training instances' (equations 17 to 19).

The paper leaves much open; what is a guess is a setting, and ``docs/sganet.md`` lists them. Averaging the selected
neighbours without any training (``untrained``) is the row that training has to beat: trained on the one instance that
is also the memory bank, contrast can learn that instance's noise by heart. ``health`` has the figures that show it, and
``verdict`` refuses a run whose figures say so.

Traps. Views are in the order of capture, in training and in test. A sound feature of a cell whose neighbours show a
defect is drawn towards the defect, and the other way round. Without ``residual`` a cell's own feature is gone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dino_depth.anomaly.bank import greedy_coreset, nearest_distance, spread
from dino_depth.anomaly.heads import Context, Facts, check_features, check_train, require
from dino_depth.anomaly.heads.sganet.correspondence import corresponding_cells
from dino_depth.anomaly.heads.sganet.method import (
    Cells,
    Refinement,
    candidates,
    comparable,
    contrast,
    geometric_loss,
    losses,
    neighbourhood,
    successors,
    unit,
)
from dino_depth.anomaly.resume import Keeper
from dino_depth.anomaly.views import Views
from dino_depth.device import return_memory
from dino_depth.errors import ConfigError, DataError, ReportedError

__all__ = [
    "INFERENCE", "Config", "SGANet", "check", "fit", "from_state", "health", "needs", "score", "title", "verdict",
]  # fmt: skip

# All else is part of what was trained and filled the bank.
INFERENCE = frozenset({"gates", "largest_gap", "largest_distance", "least_spread"})
MODALITIES = ("image", "depth")
PROBES = 2048  # cells that distances are measured on for ``health``


@dataclass
class Config:
    """The three modules, their training and the bank; what the paper does not say is a guess.

    Attributes:
        modality: whose features are refined and compared; one alone has no contrast, and equation 1 has one term.
        candidates: K, cells selected of each adjacent view (table 7).
        alpha: of equation 1, how much a modality counts for its own selection.
        adjacency: which views lie beside each other: the order of capture, the same closed to a circle, circles of
            ``ring`` views, or the nearest optical axes (needs cameras).
        ring: views of one circle, where ``adjacency`` is ring.
        adjacent: views on either side that are selected from.
        shuffled: negative control: neighbours are those of a random order of the views, the same for all instances.
        untrained: nothing is trained: the mean of the selected cells, weighed by their likeness.
        start: of the matrices: ``identity``, or ``xavier`` at random.
        residual: refined features are added to the cell's own.
        norm: a layer norm without weights follows.
        heads: of the attention.
        shared: both modalities have the same matrices.
        steps: of the optimiser, each on all views of one training instance.
        learning_rate: of AdamW.
        weight_decay: of AdamW, towards zero.
        semantic: weight of equation 8 in the loss; 0 leaves it out (tables 9).
        structural: weight of equation 11; the paper's lambda_1 is both.
        geometric: weight of equation 16, lambda_2; not 0 needs cameras.
        temperature: of the contrast.
        symmetric: contrast from depth to the image as well.
        structure: cells that equation 9 takes the difference of: the same ``cell`` of the next view, as written, or the
            one that shows the same place.
        neighbours: k, views that equation 14 aligns with (table 8).
        counted: whether k counts views on either ``side`` or in ``total``.
        distance: of equation 15.
        length_one: features have length 1 in equation 15; as they are, they outweigh every other term.
        tolerance: by how much the depth of corresponding cells may differ, share of the depth.
        mutual: corresponding cells must find each other.
        cells: that take part: those that show any of the ``object``, or all of them.
        scale: what a modality is divided by before both are joined: its spread over the training cells, every cell's
            own length (``length``), or nothing (``none``).
        share: share of the training cells that the bank keeps, by PatchCore's coreset.
        limit: largest number of them; None for any.
        gates: a run whose ``health`` breaks one of the limits below is refused, or only reported.
        largest_gap: of equation 8, a sound test instance less the training instance, nats: memorised above.
        largest_distance: median distance of a sound instance's cells from the training instance's, over that of
            training cells from the other views of their instance, and that over the same untrained: memorised above.
        least_spread: of the bank about its mean, over that of the same cells untrained: collapsed below.
    """

    modality: Literal["image", "depth", "both"] = "both"
    candidates: int = 8
    alpha: float = 0.5
    adjacency: Literal["sequence", "sequence+wrap", "ring", "angle"] = "sequence"
    ring: int = 12
    adjacent: int = 1
    shuffled: bool = False
    untrained: bool = False
    start: Literal["identity", "xavier"] = "identity"
    residual: bool = True
    norm: bool = False
    heads: int = 1
    shared: bool = False
    steps: int = 150
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    semantic: float = 1.0
    structural: float = 1.0
    geometric: float = 1.0
    temperature: float = 0.07
    symmetric: bool = False
    structure: Literal["cell", "place"] = "cell"
    neighbours: int = 2
    counted: Literal["side", "total"] = "side"
    distance: Literal["squared", "euclidean", "cosine"] = "squared"
    length_one: bool = True
    tolerance: float = 0.01
    mutual: bool = False
    cells: Literal["object", "all"] = "object"
    scale: Literal["spread", "length", "none"] = "spread"
    share: float = 1.0
    limit: int | None = None
    gates: Literal["refuse", "report"] = "refuse"
    largest_gap: float = 1.0
    largest_distance: float = 1.5
    least_spread: float = 0.5


@dataclass(frozen=True, eq=False)
class SGANet:
    """A fitted head.

    Attributes:
        seed: of everything random.
        dims: channels of image and depth features.
        modules: the refinement of each modality.
        scales: what refined features are divided by, by modality.
        bank: (kept cells, channels) float32, refined and joined.
        curves: (steps,) of every loss by name; empty where nothing was trained.
        trained: of the training instances, what ``health`` compares with; empty where nothing was trained.
        probes: some cells of the bank, trained and as they were at the start, (n, channels).
    """

    config: Config
    seed: int
    dims: tuple[int, int]
    modules: nn.ModuleDict
    scales: dict[str, float]
    bank: Tensor
    curves: dict[str, Tensor]
    trained: dict[str, float]
    probes: dict[str, Tensor]

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        return {
            "config": asdict(self.config),
            "seed": self.seed,
            "dims": list(self.dims),
            "modules": {key: value.cpu() for key, value in self.modules.state_dict().items()},
            "scales": self.scales,
            "bank": self.bank.cpu(),
            "curves": self.curves,
            "trained": self.trained,
            "probes": {name: part.cpu() for name, part in self.probes.items()},
        }


def from_state(state: dict[str, Any], device: torch.device) -> SGANet:
    """The head that gave ``state``.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a key is missing or weights do not fit the configuration.
    """
    try:
        config, dims = Config(**state["config"]), tuple(state["dims"])
        _check_config(config)
        modules = _modules(config, dims)
        modules.load_state_dict(state["modules"])
        modules = modules.to(device).eval().requires_grad_(False)
        probes = {name: part.to(device) for name, part in state["probes"].items()}
        rest = state["bank"].to(device), dict(state["curves"]), dict(state["trained"]), probes
        return SGANet(config, state["seed"], dims, modules, dict(state["scales"]), *rest)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise DataError(f"not the state of a sganet head: {' '.join(str(error).split())}") from error


def _names(config: Config) -> tuple[str, ...]:
    return MODALITIES if config.modality == "both" else (config.modality,)


def _modules(config: Config, dims: tuple[int, int]) -> nn.ModuleDict:
    widths = dict(zip(MODALITIES, dims, strict=True))

    def make(name: str) -> Refinement:
        return Refinement(widths[name], config.start, config.heads, config.residual, config.norm)

    made: dict[str, nn.Module] = {name: make(name) for name in _names(config)}
    if config.shared and len(made) == 2:
        made["depth"] = made["image"]
    if len(made) == 2 and dims[0] != dims[1] and {"semantic", "structural"} & set(_weights(config)):
        made["narrow"] = nn.Linear(max(dims), min(dims), bias=False)
    return nn.ModuleDict(made)


def _started(config: Config, dims: tuple[int, int], context: Context) -> nn.ModuleDict:
    """The modules before training."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        return _modules(config, dims).to(context.device)


def _contrast(modules: nn.ModuleDict, config: Config, image: Tensor, depth: Tensor) -> Tensor:
    """Contrast of features of one width: of encoders of two, the wider ones are projected, here alone."""
    if "narrow" in modules:
        wide = image.shape[1] > depth.shape[1]
        image, depth = (modules["narrow"](image), depth) if wide else (image, modules["narrow"](depth))
    return contrast(image, depth, config.temperature, config.symmetric)


def _weights(config: Config) -> dict[str, float]:
    """Of the losses that the configuration trains with."""
    if config.untrained:
        return {}
    contrasts = {"semantic": config.semantic, "structural": config.structural} if config.modality == "both" else {}
    return {name: weight for name, weight in (contrasts | {"geometric": config.geometric}).items() if weight}


def needs(config: Config) -> frozenset[str]:
    """Features, and cameras where views are aligned by geometry or neighbours are told by their axes."""
    trained = _weights(config)
    found = set(_names(config))
    if config.adjacency == "angle":
        found.add("geometry")
    if "geometric" in trained or ("structural" in trained and config.structure == "place"):
        found |= {"geometry", "pixels"}
    return frozenset(found)


def title(config: Config) -> str:
    """What tells apart the variants of the paper's tables, the guesses and the controls."""
    told = [field for field in fields(Config) if field.name not in ("modality", "untrained", "shuffled")]
    if config.untrained:  # settings of the training say nothing
        kept = {"candidates", "alpha", "adjacency", "adjacent", "start", "residual", "heads", "scale", "cells", "share"}
        told = [field for field in told if field.name in kept]
    changed = [f"{field.name} {getattr(config, field.name)}" for field in told
               if getattr(config, field.name) != field.default]  # fmt: skip
    words = [name for name in ("untrained", "shuffled") if getattr(config, name)]
    return ", ".join(["sganet", config.modality, *words, *changed])


def check(config: Config, facts: Facts):
    """Refuses what cannot work.

    Raises:
        ConfigError: a setting that cannot work, an encoder or cameras that are missing, or a single view.
    """
    _check_config(config)
    if "geometry" in needs(config) and not facts.cameras:
        raise ConfigError(
            "sganet needs calibrated views, this benchmark has none: untrained, or geometric 0 with structure cell "
            "and another adjacency than angle, go without"
        )
    require("sganet", needs(config), facts)
    _check_views(config, facts.views, "this benchmark")


def _check_views(config: Config, views: int, place: str):
    if views < 2:
        raise ConfigError(f"sganet refines views by others: {place} has a single one")
    if config.adjacency == "ring" and views % config.ring:
        raise ConfigError(f"sganet.ring {config.ring}: the {views} views of {place} are no circles of so many")


def _check_config(config: Config):
    for name in ("candidates", "adjacent", "heads", "neighbours", "steps"):
        if getattr(config, name) < 1:
            raise ConfigError(f"sganet.{name} must be at least 1, got {getattr(config, name)}")
    if config.ring < 2:
        raise ConfigError(f"sganet.ring must be at least 2, got {config.ring}")
    for name in ("alpha", "share"):
        least = 0 <= getattr(config, name) if name == "alpha" else 0 < getattr(config, name)
        if not (least and getattr(config, name) <= 1):
            raise ConfigError(f"sganet.{name} must lie within {'[' if name == 'alpha' else '('}0, 1], got "
                              f"{getattr(config, name)}")  # fmt: skip
    for name in ("learning_rate", "temperature", "tolerance"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"sganet.{name} must be above 0, got {getattr(config, name)}")
    for name in ("semantic", "structural", "geometric", "weight_decay"):
        if not getattr(config, name) >= 0:
            raise ConfigError(f"sganet.{name} must not be negative, got {getattr(config, name)}")
    if config.limit is not None and config.limit < 1:
        raise ConfigError(f"sganet.limit must be at least 1, got {config.limit}")
    for name in ("largest_gap", "largest_distance", "least_spread"):
        if not getattr(config, name) > 0:
            raise ConfigError(f"sganet.{name} must be above 0, got {getattr(config, name)}")
    if not config.untrained and not _weights(config):
        raise ConfigError("sganet.geometric 0: no loss is left to train with; name a weight, or untrained true")


@dataclass(frozen=True, eq=False)
class Prepared:
    """One instance, ready to be refined.

    Attributes:
        asked: of each view the features of the cells to refine.
        rows: by modality, (N, C) the cells of all views that can be selected.
        index: by modality, of each view (P, M) the selected ones.
    """

    asked: list[Cells]
    rows: Cells
    index: dict[str, list[Tensor]]

    def refined(self, modules: nn.ModuleDict, view: int) -> Cells:
        """Equations 4 to 6."""
        return {
            name: modules[name](features, self.rows[name], self.index[name][view])
            for name, features in self.asked[view].items()
        }


def _prepare(views: Views, shown: Tensor, config: Config, seed: int, device: torch.device, asked: bool) -> Prepared:
    """Selects from the cells that are ``shown``, (V, n, n) bool; of frozen features alone, so once for an instance.

    Args:
        asked: all cells are refined, and not those that are shown alone.
    """
    names = _names(config)
    flat = {name: getattr(views, name).flatten(1, 2) for name in names}
    masks = shown.flatten(1)
    rows = {name: part[masks].to(device) for name, part in flat.items()}
    parts = {name: part.split(masks.sum(1).tolist()) for name, part in rows.items()}  # the same memory
    offered = [{name: parts[name][v] for name in names} for v in range(len(masks))]
    wanted = [{name: flat[name][v].to(device) for name in names} for v in range(len(masks))] if asked else offered
    near = _neighbours(views, config, seed, config.adjacent)
    index: dict[str, list[Tensor]] = {}
    for name in names:
        if name == "depth" and len(names) == 2 and config.alpha == 0.5:
            index[name] = index["image"]  # equation 1 is then the same for both
            continue
        places = [comparable(view, name, config.alpha) for view in offered]
        index[name] = [
            candidates(comparable(view, name, config.alpha) if asked else places[v], places, near[v], config.candidates)
            for v, view in enumerate(wanted)
        ]
    return Prepared(wanted, rows, index)


def _axes(views: Views, config: Config) -> Tensor | None:
    if config.adjacency != "angle":
        return None
    return torch.from_numpy(np.stack([camera.camera_to_world[:3, 2] for camera in views.cameras]))


def _order(views: Views, config: Config, seed: int) -> list[int]:
    """The view at each place of the sequence."""
    count = len(views.share)
    if not config.shuffled:
        return list(range(count))
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed + 1)).tolist()


def _neighbours(views: Views, config: Config, seed: int, reach: int) -> list[list[int]]:
    order = _order(views, config, seed)
    axes = _axes(views, config)
    found = neighbourhood(config.adjacency, len(order), reach, config.ring, None if axes is None else axes[order])
    return [[order[u] for u in found[place]] for place in np.argsort(order)]


def _shown(views: Views, config: Config) -> Tensor:
    return views.share > 0 if config.cells == "object" else torch.ones_like(views.share, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Cells of a training instance that its losses compare, as places among the cells that are shown.

    Attributes:
        following, matched: see ``method.losses``.
        share: of the cells, that correspond to one of a neighbouring view; NaN where nobody asked.
    """

    following: list[tuple[int, tuple[Tensor, Tensor]] | None]
    matched: dict[tuple[int, int], tuple[Tensor, Tensor]]
    share: float


def _pairs(views: Views, shown: Tensor, config: Config, seed: int, device: torch.device) -> Pairs:
    masks = shown.flatten(1).numpy()
    places = np.cumsum(masks, 1) - 1  # of a cell among those that are shown
    weights = _weights(config)

    def corresponding(v: int, u: int) -> np.ndarray:
        pairs = corresponding_cells(views, v, u, config.tolerance, config.mutual)
        return pairs[masks[v][pairs[:, 0]] & masks[u][pairs[:, 1]]]

    def chosen(v: int, u: int, pairs: np.ndarray) -> tuple[Tensor, Tensor]:
        first, second = places[v][pairs[:, 0]], places[u][pairs[:, 1]]
        return torch.from_numpy(first).to(device), torch.from_numpy(second).to(device)

    following: list[tuple[int, tuple[Tensor, Tensor]] | None] = [None] * len(masks)
    if "structural" in weights:
        order, axes = _order(views, config, seed), _axes(views, config)
        after = successors(config.adjacency, len(order), config.ring, None if axes is None else axes[order])
        for place, v in enumerate(order):
            if after[place] is None:
                continue
            u = order[after[place]]
            same = np.flatnonzero(masks[v] & masks[u])
            pairs = np.stack([same, same], 1) if config.structure == "cell" else corresponding(v, u)
            following[v] = u, chosen(v, u, pairs)
    matched, seen = {}, np.zeros_like(masks)
    if "geometric" in weights:
        near = _neighbours(views, config, seed, config.neighbours)
        for v, others in enumerate(near):
            for u in others if config.counted == "side" else others[: config.neighbours]:
                pairs = corresponding(v, u)
                if len(pairs):
                    matched[v, u] = chosen(v, u, pairs)
                    seen[v][pairs[:, 0]] = True
    share = float(seen.sum() / masks.sum()) if "geometric" in weights else float("nan")
    return Pairs(following, matched, share)


def fit(train: Sequence[Views], config: Config, context: Context) -> SGANet:
    """Trains on nominal instances and fills the bank with them; in float32, with the same bits for the same seed.

    Raises:
        ConfigError: a setting that cannot work, or a modality that was not encoded.
        DataError: features that cannot be used, a view that shows no object, or no cells that correspond.
        ReportedError: the loss became NaN or infinite.
    """
    _check_config(config)
    dims = check_train(train, "sganet")
    _check_dims(config, dims)
    given = []
    for place, views in enumerate(train):
        _check_views(config, len(views.share), f"training sample {place}")
        shown = _shown(views, config)
        if not shown.flatten(1).any(1).all():
            view = int(shown.flatten(1).any(1).int().argmin())
            raise DataError(f"sganet: training sample {place}: no cell of view {view} shows the object")
        given.append((_prepare(views, shown, config, context.seed, context.device, False), views, shown))
    modules = _started(config, dims, context)
    curves = {} if config.untrained else _train(given, modules, config, context)
    modules.eval().requires_grad_(False)
    return _filled([prepared for prepared, *_ in given], modules, config, context, dims, curves)


def _check_dims(config: Config, dims: tuple[int, int]):
    widths = dict(zip(MODALITIES, dims, strict=True))
    for name in _names(config):
        if not widths[name]:
            raise ConfigError(f"sganet.modality {config.modality}: got {dims[0]} image and {dims[1]} depth channels")
        if widths[name] % config.heads:
            raise ConfigError(f"sganet.heads {config.heads} do not divide the {widths[name]} channels of {name}")
    if config.shared and len(set(dims)) == 2 and config.modality == "both":
        raise ConfigError(
            f"sganet.shared: image and depth must have equally many channels, got {dims[0]} and {dims[1]}"
        )


@return_memory()
def _train(
    given: list[tuple[Prepared, Views, Tensor]], modules: nn.ModuleDict, config: Config, context: Context
) -> dict[str, Tensor]:
    """The loop: a step is one instance with all its views; equation 17 is its loss."""
    weights = _weights(config)
    compared = [_pairs(views, shown, config, context.seed, context.device) for _, views, shown in given]
    if weights.keys() == {"geometric"} and not any(pairs.matched for pairs in compared):
        raise DataError(f"sganet: no cells correspond within sganet.tolerance {config.tolerance}: wrong cameras?")
    terms = {
        "semantic": partial(_contrast, modules, config),
        "structural": partial(_contrast, modules, config),
        "geometric": partial(geometric_loss, distance=config.distance, length_one=config.length_one),
    }
    terms = {name: terms[name] for name in weights}
    optimizer = torch.optim.AdamW(modules.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    curves: dict[str, list[Tensor]] = {name: [] for name in weights}
    keeper, first = Keeper(context.checkpoint), 0
    if (state := keeper.restore()) is not None:
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        curves = {name: list(part) for name, part in state["curves"].items()}
        first = state["step"]
    for step in range(first, config.steps):
        prepared, pairs = given[step % len(given)][0], compared[step % len(given)]
        refined = [prepared.refined(modules, view) for view in range(len(prepared.asked))]
        found = losses(refined, pairs.following, pairs.matched, terms)
        total = sum(weights[name] * loss for name, loss in found.items())  # equation 17
        optimizer.zero_grad()
        total.backward()
        del refined  # before the next step makes its own
        optimizer.step()
        for name, curve in curves.items():
            curve.append(found[name].detach().cpu() if name in found else torch.zeros(()))
        if not total.isfinite():
            raise ReportedError(f"sganet: the loss became {float(total)} at step {step}; lower sganet.learning_rate")
        keeper.keep(
            lambda step=step: {
                "modules": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "curves": {name: torch.stack(curve) for name, curve in curves.items()},
                "step": step + 1,
            }
        )
    return {name: torch.stack(curve) for name, curve in curves.items()}


@torch.inference_mode()
def _filled(
    given: list[Prepared], modules: nn.ModuleDict, config: Config, context: Context, dims: tuple[int, int],
    curves: dict[str, Tensor],
) -> SGANet:  # fmt: skip
    """The bank of all refined cells of the training instances (equation 18)."""
    refined = [[one.refined(modules, view) for view in range(len(one.asked))] for one in given]
    views = [view for one in refined for view in one]
    cells = {name: torch.cat([view[name] for view in views]) for name in _names(config)}
    both = config.scale == "spread" and config.modality == "both"
    scales = {name: spread(part) if both else 1.0 for name, part in cells.items()}
    every = _joined(cells, scales, config)
    count = min(int(np.ceil(config.share * len(every))), len(every) if config.limit is None else config.limit)
    bank = every[greedy_coreset(every, count, context.seed, 128)]
    head = SGANet(config, context.seed, dims, modules, scales, bank, curves, {}, {})
    return head if config.untrained else _with_probes(head, given, refined, every, context)


def _with_probes(
    head: SGANet, given: list[Prepared], refined: list[list[Cells]], every: Tensor, context: Context
) -> SGANet:
    """The head with what ``health`` compares with: some cells of the bank as they are, and as they were untrained."""
    config, names = head.config, _names(head.config)
    start = _started(config, head.dims, context)
    asked = torch.randperm(len(every), generator=torch.Generator().manual_seed(context.seed))[:PROBES].sort().values
    trained, ratios, before = {}, [], {}
    for name in names:  # a modality at a time bounds the memory
        now = torch.cat([view[name] for one in refined for view in one])
        plain = [start[name](cells[name], one.rows[name], index)
                 for one in given for cells, index in zip(one.asked, one.index[name], strict=True)]  # fmt: skip
        plain = torch.cat(plain)
        ratios.append(_relative_spread(now) / _relative_spread(plain))
        joined = config.scale == "spread" and config.modality == "both"
        trained[f"{name} scale"] = spread(plain) if joined else 1.0
        before[name] = plain[asked.to(plain.device)]
    trained["spread"] = min(ratios)
    if "semantic" in _weights(config):
        trained["semantic"] = _mean_contrast([view for one in refined for view in one], head.modules, config)
    # The view and the instance of each cell.
    counts = [(place, len(view[names[0]])) for place, one in enumerate(refined) for view in one]
    view = torch.cat([torch.full((count,), number) for number, (_, count) in enumerate(counts)])
    instance = torch.tensor([place for place, _ in counts])[view]
    probes = {"trained": every[asked.to(every.device)], "start": _joined(before, _start_scales(trained, names), config)}
    for name, cells in probes.items():
        trained[f"{name} distance"] = _left_out(cells, view[asked], instance[asked])
    return replace(head, trained=trained, probes=probes)


def _start_scales(trained: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: trained[f"{name} scale"] for name in names}


def _relative_spread(features: Tensor) -> float:
    """Root mean squared distance from the mean, over the root mean squared length."""
    return spread(features) / max(float(features.square().sum(1).mean().sqrt()), 1e-12)


def _mean_contrast(views: Sequence[Cells], modules: nn.ModuleDict, config: Config) -> float:
    """Equation 8, the mean over views that show something."""
    found = [float(_contrast(modules, config, view["image"], view["depth"])) for view in views if len(view["image"])]
    return float(np.mean(found)) if found else float("nan")


def _left_out(cells: Tensor, view: Tensor, instance: Tensor) -> float:
    """Median distance of cells from those of the other views of their instance."""
    found = []
    for number in view.unique().tolist():
        mine = view == number
        others = (instance == instance[mine][0]) & ~mine
        if others.any():
            found.append(nearest_distance(cells[mine.to(cells.device)], cells[others.to(cells.device)]))
    return float(torch.cat(found).median()) if found else float("nan")


def _joined(cells: Cells, scales: dict[str, float], config: Config) -> Tensor:
    """Equation 18: the modalities side by side, (P, C_image + C_depth)."""
    parts = [unit(part) if config.scale == "length" else part / scales[name] for name, part in cells.items()]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


@torch.inference_mode()
def score(head: SGANet, views: Views) -> dict[str, Tensor]:
    """Equation 19: distance of every cell's refined features from the bank.

    Returns:
        One map under the name of the modality ("image", "depth" or "both"), (V, n, n) float32, CPU.

    Raises:
        ConfigError: a single view, or views that are no whole circles.
        DataError: features that cannot be used.
    """
    config = head.config
    check_features(views, "sganet", head.dims)
    _check_views(config, len(views.share), "an instance")
    prepared = _prepare(views, _shown(views, config), config, head.seed, head.bank.device, True)
    maps = []
    for view in range(len(prepared.asked)):  # a view at a time bounds the memory
        cells = _joined(prepared.refined(head.modules, view), head.scales, config)
        maps.append(nearest_distance(cells, head.bank).cpu().view(views.share.shape[1:]))
    return {config.modality: torch.stack(maps)}


@torch.inference_mode()
def health(head: SGANet, views: Views, maps: dict[str, Tensor]) -> dict[str, float]:
    """Figures of a sound instance that was not trained on: ``gap``, ``distance`` and ``spread``, see ``Config``.

    An untrained head has none: nothing was learned, so nothing was learned by heart.

    Args:
        maps: of ``score``; not needed here.
    """
    config, shown = head.config, _shown(views, head.config)
    if config.untrained or not shown.any():
        return {}
    device = head.bank.device
    prepared = _prepare(views, shown, config, head.seed, device, False)
    start = _started(config, head.dims, Context(head.seed, device))
    found, ratios = {"spread": head.trained["spread"]}, {}
    scales = {"trained": head.scales, "start": _start_scales(head.trained, _names(config))}
    for name, modules in (("trained", head.modules), ("start", start)):
        refined = [prepared.refined(modules, view) for view in range(len(prepared.asked))]
        cells = _joined({key: torch.cat([view[key] for view in refined]) for key in refined[0]}, scales[name], config)
        some = cells[:: max(1, len(cells) // PROBES)]
        ratios[name] = float(nearest_distance(some, head.probes[name]).median()) / head.trained[f"{name} distance"]
        if name == "trained" and "semantic" in head.trained:
            found["gap"] = _mean_contrast(refined, modules, config) - head.trained["semantic"]
    ratio = ratios["trained"] / ratios["start"] if ratios["start"] > 0 else float("nan")
    return found | ({"distance": ratio} if np.isfinite(ratio) else {})


def verdict(config: Config, figures: dict[str, float]) -> str:
    """Why results must not be believed, by the medians of ``health`` over sound instances; empty where they may."""
    found = []
    if config.untrained:  # nothing was learned, so nothing was learned by heart
        return ""
    if figures.get("gap", 0) > config.largest_gap:
        found.append(f"memorised: semantic gap {figures['gap']:.2f} nats > sganet.largest_gap {config.largest_gap:g}")
    if figures.get("distance", 0) > config.largest_distance:
        limit = f"sganet.largest_distance {config.largest_distance:g}"
        found.append(f"memorised: sound cells are {figures['distance']:.2f} times as far as untrained > {limit}")
    if figures.get("spread", 1) < config.least_spread:
        limit = f"sganet.least_spread {config.least_spread:g}"
        found.append(f"collapsed: spread of the bank {figures['spread']:.2f} of the untrained one < {limit}")
    return "; ".join(found)
