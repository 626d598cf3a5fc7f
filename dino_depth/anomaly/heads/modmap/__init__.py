"""ModMap: crossmodal feature mapping with cross-view modulation (Costanzino et al. 2026).

The score of a cell of a target view is the cosine distance between what it shows and the closest of the predictions
made from the other modality of all source views (equations 10 to 12; 3 to 9 are in ``crossmodal.py``).

``conditioning`` is the paper's ladder (tables 3 and 6). The steps share weights, seeds and code:

    none        source = target, no modulator: CFM (Costanzino et al. 2024); sees no class either
    view        source = target, modulators that see the view: conditioned CFM
    cross-view  all pairs of views: ModMap

Traps. The paper's widths [1152, 576, 384] of the depth-to-image network end in 384 channels where 768 are needed: the
default is the release's 384-576-576-768. View ids are positions in ``features``: views in another order than in
training look like a bad model. The training cells of a pair are those where the *target* shows any of the object,
since those are the ones scored. A prediction or an observation of zero length has cosine 0, hence distance 1.

Where the paper, its released code and these defaults differ stands in docs/anomaly.md; the configuration
``sim3d_release`` sets what the release does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dino_depth.anomaly.heads import Context, Facts, check_features, check_train, require
from dino_depth.anomaly.heads.modmap.crossmodal import (
    Mapper,
    crossmodal_distances,
    draw_cells,
    one_cycle,
    training_pairs,
    view_codes,
)
from dino_depth.anomaly.heads.modmap.release import digest, load_release
from dino_depth.anomaly.resume import Keeper
from dino_depth.anomaly.views import Views
from dino_depth.errors import ConfigError, DataError, ReportedError

__all__ = [
    "INFERENCE", "Config", "ModMap", "check", "fit", "from_state", "graph", "needs", "pair_maps", "pairs", "score",
    "title",
]  # fmt: skip

INFERENCE = frozenset({"sources", "aggregate", "distance", "modality", "view_shift"})
# Rows of features mapped at once: enough to fill the device, and a bound on memory whatever the number of views.
ROWS = {"cpu": 4096, "cuda": 65536}
FIXED = 0.9  # Adam's first momentum by default
# Within a block of sources, and of one block with the next.
REDUCTIONS = {"min": (torch.amin, torch.minimum), "mean": (torch.sum, torch.add), "max": (torch.amax, torch.maximum)}


@dataclass
class Config:
    """Supplement A.2 of the paper, and the settings of its ablations.

    Attributes:
        conditioning: the step of the ladder (tables 3 and 6).
        image_to_depth: hidden widths of the image-to-depth network; its ends follow the encoders.
        depth_to_image: the same for depth to image.
        modulator: hidden width of the modulators; GELU follows it, which the paper leaves open.
        learning_rate: largest learning rate of the one-cycle schedule.
        initial_learning_rate: where it starts (the release starts at 2e-5).
        warmup: share of the steps that the rate rises.
        momentum: Adam's first: ``cycled`` from .95 to .85 and back, against the rate; ``fixed`` at .9 (the release).
        epochs: passes over all pairs of views of all training samples.
        steps: optimisation steps instead of ``epochs``, to compare heads at equal numbers of them.
        pairs: pairs of views in a batch; no batch spans two epochs.
        cells: trained on: those whose target shows any of the ``object``, or ``all`` (the release).
        tokens: training cells drawn anew per pair and step; none means all.
        weights: file of the release's training to take instead of training; ``{category}`` in it is the class.
        sources: source views at inference: ``all`` that the conditioning knows, ``target`` alone, or how many of them
            are drawn by the seed (table 8).
        aggregate: how the distances from the sources become one (equation 12: the minimum).
        distance: ``cosine``, or ``euclidean`` of unit vectors (CFM), the root of twice the cosine distance.
        modality: whose maps are given; ``volume.aggregation`` joins both (table 10); ``product``: one map, the product
            of both at each cell, which ``prepare.smoothing`` then blurs (CFM).
        view_shift: negative control: at inference each view is taken for the one that so many places later, cyclically.
        ensemble: independently trained models, aggregated like sources. Not in the paper: with ``view`` it is the
            control that tells apart what other views add from what any other predictor adds.
    """

    conditioning: Literal["none", "view", "cross-view"] = "cross-view"
    image_to_depth: tuple[int, ...] = (768, 576)
    depth_to_image: tuple[int, ...] = (576, 576)
    modulator: int = 128
    learning_rate: float = 5e-4
    initial_learning_rate: float = 1e-4
    warmup: float = 0.1
    momentum: Literal["cycled", "fixed"] = "cycled"
    epochs: int = 200
    steps: int | None = None
    pairs: int = 48
    cells: Literal["object", "all"] = "object"
    tokens: int | None = None
    weights: str = ""
    sources: Literal["all", "target"] | int = "all"
    aggregate: Literal["min", "mean", "max"] = "min"
    distance: Literal["cosine", "euclidean"] = "cosine"
    modality: Literal["image", "depth", "both", "product"] = "both"
    view_shift: int = 0
    ensemble: int = 1


@dataclass(frozen=True)
class ModMap:
    """A fitted head.

    Attributes:
        views: number of views of each class.
        dims: channels of image and depth features.
        losses: (ensemble, steps), equation 10 averaged over the cells of each batch; no steps where weights were given.
        source: path and sha256 of the file of weights; empty where there is none.
    """

    config: Config
    seed: int
    views: tuple[int, ...]
    dims: tuple[int, int]
    members: tuple[Mapper, ...]
    losses: Tensor
    source: tuple[str, ...] = ()

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        return {
            "config": asdict(self.config),
            "seed": self.seed,
            "views": list(self.views),
            "dims": list(self.dims),
            "losses": self.losses,
            "source": list(self.source),
            "members": [{key: value.cpu() for key, value in m.state_dict().items()} for m in self.members],
        }


def from_state(state: dict[str, Any], device: torch.device) -> ModMap:
    """The head that gave ``state``.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a key is missing or weights do not fit the configuration.
    """
    try:
        config, dims = Config(**state["config"]), tuple(state["dims"])
        _check_config(config)
        members = []
        for weights in state["members"]:
            mapper = _mapper(config, dims, state["views"])
            mapper.load_state_dict(weights)
            members.append(mapper.to(device).eval().requires_grad_(False))
        views, source = tuple(state["views"]), tuple(state.get("source", ()))  # states of before have none
        if source and Path(source[0]).is_file() and digest(source[0]) != source[1]:
            raise DataError(f"modmap.weights {source[0]}: holds other weights now: name another head.cache")
        return ModMap(config, state["seed"], views, dims, tuple(members), state["losses"], source)
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"not the state of a modmap head: {' '.join(str(error).split())}") from error


def _mapper(config: Config, dims: tuple[int, int], views: Sequence[int]) -> Mapper:
    codes = 2 * max(views) + (len(views) if len(views) > 1 else 0)
    codes = 0 if config.conditioning == "none" else codes
    return Mapper(dims, config.image_to_depth, config.depth_to_image, codes, config.modulator)


def needs(config: Config) -> frozenset[str]:
    """Features of both modalities: whichever map is asked for, the other modality predicts it."""
    return frozenset({"image", "depth"})


def title(config: Config) -> str:
    """The conditioning, and what tells apart the variants of the paper's tables and their controls."""
    told = ("sources", "aggregate", "distance", "modality", "view_shift", "ensemble", "momentum", "cells")
    plain = {field.name: field.default for field in fields(Config)}
    changed = [f"{key} {getattr(config, key)}" for key in told if getattr(config, key) != plain[key]]
    return ", ".join(["modmap", f"conditioning {config.conditioning}", *changed])


def check(config: Config, facts: Facts):
    """Refuses what cannot work.

    Raises:
        ConfigError: a setting that cannot work, an encoder that is missing, or more sources than views.
    """
    _check_config(config)
    require("modmap", needs(config), facts)
    if isinstance(config.sources, int) and config.sources > facts.views:
        raise ConfigError(f"modmap.sources {config.sources} exceeds the {facts.views} views of an instance")
    if config.weights and facts.classes > 1:
        raise ConfigError("modmap.weights: the release numbers classes in an order of its own; set multiclass false")


def fit(train: Sequence[Views], config: Config, context: Context) -> ModMap:
    """Trains on nominal samples; in float32, and on the CPU with the same bits for the same seed.

    Args:
        train: samples of one class have one number of views; class indices are 0 to C - 1.

    Raises:
        ConfigError: a setting that cannot work, or a modality that was not encoded.
        DataError: features that cannot be used, a class without samples, a view that shows no object.
        ReportedError: the loss became NaN or infinite.
    """
    _check_config(config)
    classes = [sample.class_index for sample in train]
    views, dims = _check_samples(train, classes)
    image, depth, shown = (
        torch.cat([getattr(sample, name).flatten(1, 2) for sample in train]).to(context.device)
        for name in ("image", "depth", "share")
    )  # (rows, cells, image dim), (rows, cells, depth dim), (rows, cells); a row is a view of a sample
    if config.weights:
        path = config.weights.replace("{category}", train[0].sample.category)
        mapper = _mapper(config, dims, views)
        load_release(mapper, path, views[0])
        mapper.to(context.device).eval().requires_grad_(False)
        return ModMap(config, context.seed, views, dims, (mapper,), torch.zeros(1, 0), (path, digest(path)))
    shown = torch.ones_like(shown) if config.cells == "all" else shown
    pairs = training_pairs([len(sample.share) for sample in train], classes, config.conditioning)

    members, losses = [], []
    for member in range(config.ensemble):
        member_seed = int(np.random.SeedSequence([context.seed, member]).generate_state(1)[0])
        file = context.checkpoint and context.checkpoint.with_suffix(f".member{member}")
        mapper, curve = _train(config, member_seed, (image, depth), shown > 0, pairs, views, dims, file)
        members.append(mapper.eval().requires_grad_(False))
        losses.append(curve)
    return ModMap(config, context.seed, views, dims, tuple(members), torch.stack(losses))


def _check_config(config: Config):
    for name in ("modulator", "epochs", "pairs", "ensemble", "steps", "tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"modmap.{name} must be at least 1, got {value}")
    if not 0 < config.initial_learning_rate <= config.learning_rate:
        rates = f"{config.initial_learning_rate} and {config.learning_rate}"
        raise ConfigError(f"modmap: need 0 < initial_learning_rate <= learning_rate, got {rates}")
    if not 0 <= config.warmup <= 1:
        raise ConfigError(f"modmap.warmup must lie in [0, 1], got {config.warmup}")
    for name in ("image_to_depth", "depth_to_image"):
        if any(width < 1 for width in getattr(config, name)):
            raise ConfigError(f"modmap.{name}: widths must be at least 1, got {list(getattr(config, name))}")
    if isinstance(config.sources, int):
        if config.sources < 1:
            raise ConfigError(f"modmap.sources must be at least 1, got {config.sources}")
        if config.conditioning != "cross-view":
            raise ConfigError(f"modmap.sources {config.sources}: conditioning {config.conditioning} has one source")
    if config.weights and (config.conditioning != "cross-view" or config.ensemble > 1):
        raise ConfigError("modmap.weights: the release has one model of all pairs: conditioning cross-view, ensemble 1")
    if config.view_shift and config.conditioning == "none":
        raise ConfigError(f"modmap.view_shift {config.view_shift}: conditioning none does not know views")


def _check_samples(train: Sequence[Views], classes: list[int]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Number of views of each class, and channels."""
    dims = check_train(train, "modmap")
    if sorted(set(classes)) != list(range(max(classes) + 1)):
        raise DataError(f"modmap: class indices must be 0 to C - 1 with a sample each, got {sorted(set(classes))}")
    if 0 in dims:
        raise ConfigError(f"modmap needs features of both modalities, got {dims[0]} image and {dims[1]} depth channels")
    views: dict[int, int] = {}
    for place, (sample, index) in enumerate(zip(train, classes, strict=True)):
        count, cells = len(sample.share), tuple(sample.share.shape[1:])
        if count != views.setdefault(index, count):
            raise DataError(f"modmap: training sample {place} has {count} views, class {index} has {views[index]}")
        if cells != tuple(train[0].share.shape[1:]):
            first = tuple(train[0].share.shape[1:])
            raise DataError(f"modmap: training sample {place} has a grid of {cells}, the first of {first}")
        shown = (sample.share > 0).flatten(1).any(1)
        if not shown.all():
            view = int(shown.int().argmin())
            raise DataError(f"modmap: training sample {place}: no cell of view {view} shows the object")
    return tuple(views[index] for index in range(len(views))), dims


def _train(
    config: Config,
    seed: int,
    features: tuple[Tensor, Tensor],
    shown: Tensor,
    pairs: Tensor,
    views: tuple[int, ...],
    dims: tuple[int, int],
    checkpoint: Path | None,
) -> tuple[Mapper, Tensor]:
    """One model and its loss curve (steps,); goes on from ``checkpoint`` with the same bits."""
    device = shown.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mapper = _mapper(config, dims, views).to(device)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: every device trains on the same draws
    steps = config.steps or config.epochs * math.ceil(len(pairs) / config.pairs)
    optimizer = torch.optim.Adam(mapper.parameters(), lr=config.learning_rate, fused=True)
    rates = config.initial_learning_rate, config.learning_rate, config.warmup
    losses, epoch, first = [], [], 0
    keeper = Keeper(checkpoint)
    if (state := keeper.restore()) is not None:
        mapper.load_state_dict(state["mapper"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        losses, epoch, first = list(state["losses"].to(device)), list(state["epoch"]), len(state["losses"])
    for step in range(first, steps):
        epoch = epoch or list(torch.randperm(len(pairs), generator=generator).split(config.pairs))[::-1]
        source, target, *identity = pairs[epoch.pop()].to(device).unbind(1)
        cells, weight = draw_cells(shown[target], config.tokens, generator)
        distances = crossmodal_distances(
            mapper,
            tuple(part[source[:, None], cells] for part in features),
            tuple(part[target[:, None], cells] for part in features),
            view_codes(*identity, max(views), len(views)),
        )
        loss = ((distances[0] + distances[1]) * weight).sum() / weight.sum()  # equation 10
        rate, momentum = one_cycle(step, steps, *rates)
        momentum = momentum if config.momentum == "cycled" else FIXED
        optimizer.param_groups[0].update(lr=rate, betas=(momentum, 0.999))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        keeper.keep(
            lambda left=tuple(epoch): {
                "mapper": mapper.state_dict(),
                "optimizer": optimizer.state_dict(),
                "generator": generator.get_state(),
                "losses": torch.stack(losses).cpu(),
                "epoch": list(left),
            }
        )
    curve = torch.stack(losses).cpu()
    if not curve.isfinite().all():
        step = int(curve.isfinite().int().argmin())
        raise ReportedError(f"modmap: the loss became {curve[step]} at step {step}; lower modmap.learning_rate")
    return mapper, curve


@torch.inference_mode()
def pair_maps(head: ModMap, views: Views, target: int, sources: Sequence[int]) -> dict[str, Tensor]:
    """Equation 11: the maps of one target view from each of some source views, by the first member of an ensemble.

    Returns:
        {"image": (sources, rows, columns), "depth": the same}, float32 on the CPU.

    Raises:
        DataError: as ``score``.
    """
    parts = _prepare(head, views)
    grid = views.share.shape[1:]
    image, depth = _distances(head, head.members[0], parts, target, torch.as_tensor(list(sources)), views.class_index)
    return {"image": image.cpu().unflatten(1, grid), "depth": depth.cpu().unflatten(1, grid)}


def pairs(head: ModMap, views: Views, target: int) -> dict[str, Tensor] | None:
    """``pair_maps`` from every view, for the report; None where views are their own only sources."""
    if head.config.conditioning != "cross-view":
        return None
    return pair_maps(head, views, target, range(len(views.share)))


@torch.inference_mode()
def score(head: ModMap, views: Views) -> dict[str, Tensor]:
    """Equations 11 and 12: for each target view, the distances from all sources, reduced as they come.

    Beside the features, memory holds one map per view and modality, and what ``ROWS`` rows need.

    Returns:
        {"image": (views, rows, columns), "depth": the same}, or one of them, or their product as "both", float32 on the
        CPU.

    Raises:
        ConfigError: more sources asked for than there are views.
        DataError: features that cannot be used, another number of views than in training, an unknown class.
    """
    parts, (count, *grid) = _prepare(head, views), views.share.shape
    blocks = _source_blocks(head, count, max(1, ROWS[parts[0].device.type] // math.prod(grid)))
    return _named(head, _reduced(head, parts, blocks, views.class_index).cpu(), grid)


def graph(head: ModMap) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """``score`` of the features of one class's views, to be traced: all sources of a target at once."""
    blocks = _source_blocks(head, head.views[0], head.views[0])

    def maps(image: Tensor, depth: Tensor) -> dict[str, Tensor]:
        parts = image.flatten(1, 2), depth.flatten(1, 2)
        return _named(head, _reduced(head, parts, blocks, 0), image.shape[1:3])

    return maps


def _source_blocks(head: ModMap, views: int, size: int) -> list[tuple[Tensor, ...]]:
    """The source views of each target, so many at a time."""
    drawn = _draw_sources(head, views)
    return [(torch.tensor([target]) if drawn is None else drawn).split(size) for target in range(views)]


def _reduced(head: ModMap, parts: tuple[Tensor, Tensor], blocks: list[tuple[Tensor, ...]], class_index: int) -> Tensor:
    """Equation 12: (2, views, cells) on the device of the features."""
    within, across = REDUCTIONS[head.config.aggregate]
    maps = []
    for target, sources in enumerate(blocks):
        total = None
        for member in head.members:
            for block in sources:
                part = within(torch.stack(_distances(head, member, parts, target, block, class_index)), 1)
                total = part if total is None else across(total, part)  # (2, cells)
        count = sum(map(len, sources)) * len(head.members)
        maps.append(total / count if head.config.aggregate == "mean" else total)
    return torch.stack(maps, 1)


def _named(head: ModMap, maps: Tensor, grid: Sequence[int]) -> dict[str, Tensor]:
    if head.config.modality == "product":
        return {"both": maps.prod(0).unflatten(1, grid)}
    named = zip(("image", "depth"), maps.unflatten(2, grid), strict=True)
    return {name: part for name, part in named if head.config.modality in (name, "both")}


def _prepare(head: ModMap, views: Views) -> tuple[Tensor, Tensor]:
    """Image and depth features (views, cells, dim) on the head's device."""
    check_features(views, "modmap", head.dims)
    class_index = views.class_index
    if not 0 <= class_index < len(head.views):
        raise DataError(f"modmap: class index {class_index}, the head was fitted on {len(head.views)} classes")
    if len(views.share) != head.views[class_index]:
        raise DataError(f"modmap: {len(views.share)} views, the head was fitted on {head.views[class_index]}")
    device = next(head.members[0].parameters()).device
    return views.image.flatten(1, 2).to(device), views.depth.flatten(1, 2).to(device)


def _draw_sources(head: ModMap, views: int) -> Tensor | None:
    """The source views of every target, or none where each target is its own source.

    Fewer sources are the first of more, so that a curve over their number compares like with like.
    """
    sources = head.config.sources
    if head.config.conditioning != "cross-view" or sources == "target":
        return None
    if sources == "all":
        return torch.arange(views)
    if sources > views:
        raise ConfigError(f"modmap.sources {sources} exceeds the {views} views of the sample")
    return torch.randperm(views, generator=torch.Generator().manual_seed(head.seed))[:sources]


def _distances(
    head: ModMap, mapper: Mapper, parts: tuple[Tensor, Tensor], target: int, sources: Tensor, class_index: int
) -> tuple[Tensor, Tensor]:
    """Image and depth distances (sources, cells)."""
    pairs = torch.stack([sources, torch.full_like(sources, target)])
    views = (pairs + head.config.view_shift) % head.views[class_index]
    codes = view_codes(*views, torch.full_like(sources, class_index), max(head.views), len(head.views))
    codes, sources = codes.to(parts[0].device), sources.to(parts[0].device)
    found = crossmodal_distances(
        mapper, (parts[0][sources], parts[1][sources]), (parts[0][target], parts[1][target]), codes
    )
    return found if head.config.distance == "cosine" else tuple((2 * part).sqrt() for part in found)
