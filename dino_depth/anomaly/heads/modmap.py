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
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dino_depth.anomaly.crossmodal import (
    Mapper,
    crossmodal_distances,
    draw_cells,
    one_cycle,
    training_pairs,
    view_codes,
)
from dino_depth.anomaly.features import SampleFeatures
from dino_depth.anomaly.heads import check_features
from dino_depth.errors import ConfigError, DataError, ReportedError

__all__ = ["INFERENCE", "ModMap", "ModMapConfig", "fit", "from_state", "pair_maps", "score"]

INFERENCE = frozenset({"sources", "aggregate", "modality", "view_shift"})
# Rows of features mapped at once: enough to fill the device, and a bound on memory whatever the number of views.
ROWS = {"cpu": 4096, "cuda": 65536}
# Within a block of sources, and of one block with the next.
REDUCTIONS = {"min": (torch.amin, torch.minimum), "mean": (torch.sum, torch.add), "max": (torch.amax, torch.maximum)}


@dataclass
class ModMapConfig:
    """Supplement A.2 of the paper, and the settings of its ablations.

    Attributes:
        conditioning: the step of the ladder (tables 3 and 6).
        image_to_depth: hidden widths of the image-to-depth network; its ends follow the encoders.
        depth_to_image: the same for depth to image.
        modulator: hidden width of the modulators; GELU follows it, which the paper leaves open.
        learning_rate: largest learning rate of the one-cycle schedule.
        initial_learning_rate: where it starts (the release starts at 2e-5).
        warmup: share of the steps that the rate rises.
        epochs: passes over all pairs of views of all training samples.
        steps: optimisation steps instead of ``epochs``, to compare heads at equal numbers of them.
        pairs: pairs of views in a batch; no batch spans two epochs.
        tokens: training cells drawn anew per pair and step; none means all.
        sources: source views at inference: ``all`` that the conditioning knows, ``target`` alone, or how many of them
            are drawn by the seed (table 8).
        aggregate: how the distances from the sources become one (equation 12: the minimum).
        modality: whose maps are given; ``volume.aggregation`` joins both (table 10).
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
    epochs: int = 200
    steps: int | None = None
    pairs: int = 48
    tokens: int | None = None
    sources: Literal["all", "target"] | int = "all"
    aggregate: Literal["min", "mean", "max"] = "min"
    modality: Literal["image", "depth", "both"] = "both"
    view_shift: int = 0
    ensemble: int = 1


@dataclass(frozen=True)
class ModMap:
    """A fitted head.

    Attributes:
        views: number of views of each class.
        dims: channels of image and depth features.
        losses: (ensemble, steps), equation 10 averaged over the cells of each batch.
    """

    config: ModMapConfig
    seed: int
    views: tuple[int, ...]
    dims: tuple[int, int]
    members: tuple[Mapper, ...]
    losses: Tensor

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        return {
            "config": asdict(self.config),
            "seed": self.seed,
            "views": list(self.views),
            "dims": list(self.dims),
            "losses": self.losses,
            "members": [{key: value.cpu() for key, value in m.state_dict().items()} for m in self.members],
        }


def from_state(state: dict[str, Any], device: torch.device) -> ModMap:
    """The head that gave ``state``.

    Raises:
        ConfigError: a setting that cannot work.
        DataError: a key is missing or weights do not fit the configuration.
    """
    try:
        config, dims = ModMapConfig(**state["config"]), tuple(state["dims"])
        _check_config(config)
        members = []
        for weights in state["members"]:
            mapper = _mapper(config, dims, state["views"])
            mapper.load_state_dict(weights)
            members.append(mapper.to(device).eval().requires_grad_(False))
        return ModMap(config, state["seed"], tuple(state["views"]), dims, tuple(members), state["losses"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise DataError(f"not the state of a modmap head: {' '.join(str(error).split())}") from error


def _mapper(config: ModMapConfig, dims: tuple[int, int], views: Sequence[int]) -> Mapper:
    codes = 2 * max(views) + (len(views) if len(views) > 1 else 0)
    codes = 0 if config.conditioning == "none" else codes
    return Mapper(dims, config.image_to_depth, config.depth_to_image, codes, config.modulator)


def fit(
    features: list[SampleFeatures],
    config: ModMapConfig,
    seed: int,
    device: torch.device,
    *,
    classes: list[int] | None = None,
) -> ModMap:
    """Trains on nominal samples; in float32, and on the CPU with the same bits for the same seed.

    Args:
        features: of the training samples; samples of one class have one number of views.
        classes: class index of each sample, 0 to C - 1, for one model of several classes; none: all of one.

    Raises:
        ConfigError: a setting that cannot work, or a modality that was not encoded.
        DataError: features that cannot be used, a class without samples, a view that shows no object.
        ReportedError: the loss became NaN or infinite.
    """
    _check_config(config)
    classes = [0] * len(features) if classes is None else list(classes)
    views, dims = _check_samples(features, classes)
    image, depth, shown = (
        torch.cat([getattr(sample, name).flatten(1, 2) for sample in features]).to(device)
        for name in ("image", "depth", "share")
    )  # (rows, cells, image dim), (rows, cells, depth dim), (rows, cells); a row is a view of a sample
    pairs = training_pairs([len(sample.share) for sample in features], classes, config.conditioning)

    members, losses = [], []
    for member in range(config.ensemble):
        member_seed = int(np.random.SeedSequence([seed, member]).generate_state(1)[0])
        mapper, curve = _train(config, member_seed, (image, depth), shown > 0, pairs, views, dims)
        members.append(mapper.eval().requires_grad_(False))
        losses.append(curve)
    return ModMap(config, seed, views, dims, tuple(members), torch.stack(losses))


def _check_config(config: ModMapConfig):
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
    if config.view_shift and config.conditioning == "none":
        raise ConfigError(f"modmap.view_shift {config.view_shift}: conditioning none does not know views")


def _check_samples(features: list[SampleFeatures], classes: list[int]) -> tuple[tuple[int, ...], tuple[int, int]]:
    """Number of views of each class, and channels."""
    if not features or len(classes) != len(features):
        raise DataError(f"modmap: {len(features)} training samples with {len(classes)} class indices")
    if sorted(set(classes)) != list(range(max(classes) + 1)):
        raise DataError(f"modmap: class indices must be 0 to C - 1 with a sample each, got {sorted(set(classes))}")
    dims = features[0].image.shape[-1], features[0].depth.shape[-1]
    if 0 in dims:
        raise ConfigError(f"modmap needs features of both modalities, got {dims[0]} image and {dims[1]} depth channels")
    views: dict[int, int] = {}
    for place, (sample, index) in enumerate(zip(features, classes, strict=True)):
        check_features(sample, f"modmap: training sample {place}", dims)
        count, cells = len(sample.share), tuple(sample.share.shape[1:])
        if count != views.setdefault(index, count):
            raise DataError(f"modmap: training sample {place} has {count} views, class {index} has {views[index]}")
        if cells != tuple(features[0].share.shape[1:]):
            first = tuple(features[0].share.shape[1:])
            raise DataError(f"modmap: training sample {place} has a grid of {cells}, the first of {first}")
        shown = (sample.share > 0).flatten(1).any(1)
        if not shown.all():
            view = int(shown.int().argmin())
            raise DataError(f"modmap: training sample {place}: no cell of view {view} shows the object")
    return tuple(views[index] for index in range(len(views))), dims


def _train(
    config: ModMapConfig,
    seed: int,
    features: tuple[Tensor, Tensor],
    shown: Tensor,
    pairs: Tensor,
    views: tuple[int, ...],
    dims: tuple[int, int],
) -> tuple[Mapper, Tensor]:
    """One model and its loss curve (steps,)."""
    device = shown.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mapper = _mapper(config, dims, views).to(device)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: every device trains on the same draws
    steps = config.steps or config.epochs * math.ceil(len(pairs) / config.pairs)
    optimizer = torch.optim.Adam(mapper.parameters(), lr=config.learning_rate, fused=True)
    rates = config.initial_learning_rate, config.learning_rate, config.warmup
    losses, epoch = [], []
    for step in range(steps):
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
        optimizer.param_groups[0].update(lr=rate, betas=(momentum, 0.999))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    curve = torch.stack(losses).cpu()
    if not curve.isfinite().all():
        step = int(curve.isfinite().int().argmin())
        raise ReportedError(f"modmap: the loss became {curve[step]} at step {step}; lower modmap.learning_rate")
    return mapper, curve


@torch.inference_mode()
def pair_maps(
    head: ModMap, features: SampleFeatures, target: int, sources: Sequence[int], *, class_index: int = 0
) -> dict[str, Tensor]:
    """Equation 11: the maps of one target view from each of some source views, by the first member of an ensemble.

    Returns:
        {"image": (sources, rows, columns), "depth": the same}, float32 on the CPU.

    Raises:
        DataError: as ``score``.
    """
    parts = _prepare(head, features, class_index)
    grid = features.share.shape[1:]
    image, depth = _distances(head, head.members[0], parts, target, torch.as_tensor(list(sources)), class_index)
    return {"image": image.cpu().unflatten(1, grid), "depth": depth.cpu().unflatten(1, grid)}


@torch.inference_mode()
def score(head: ModMap, features: SampleFeatures, *, class_index: int = 0) -> dict[str, Tensor]:
    """Equations 11 and 12: for each target view, the distances from all sources, reduced as they come.

    Beside the features, memory holds one map per view and modality, and what ``ROWS`` rows need.

    Args:
        class_index: the class of the sample, for a head of several.

    Returns:
        {"image": (views, rows, columns), "depth": the same}, or one of them, float32 on the CPU.

    Raises:
        ConfigError: more sources asked for than there are views.
        DataError: features that cannot be used, another number of views than in training, an unknown class.
    """
    parts = _prepare(head, features, class_index)
    views, *grid = features.share.shape
    drawn = _draw_sources(head, views)
    maps = torch.empty(2, views, math.prod(grid))
    within, across = REDUCTIONS[head.config.aggregate]
    for target in range(views):
        sources = torch.tensor([target]) if drawn is None else drawn
        blocks = sources.split(max(1, ROWS[parts[0].device.type] // math.prod(grid)))
        total = None
        for member in head.members:
            for block in blocks:
                part = within(torch.stack(_distances(head, member, parts, target, block, class_index)), 1)
                total = part if total is None else across(total, part)  # (2, cells)
        maps[:, target] = total / (len(sources) * len(head.members)) if head.config.aggregate == "mean" else total
    named = zip(("image", "depth"), maps.unflatten(2, grid), strict=True)
    return {name: part for name, part in named if head.config.modality in (name, "both")}


def _prepare(head: ModMap, features: SampleFeatures, class_index: int) -> tuple[Tensor, Tensor]:
    """Image and depth features (views, cells, dim) on the head's device."""
    check_features(features, "modmap", head.dims)
    if not 0 <= class_index < len(head.views):
        raise DataError(f"modmap: class index {class_index}, the head was fitted on {len(head.views)} classes")
    if len(features.share) != head.views[class_index]:
        raise DataError(f"modmap: {len(features.share)} views, the head was fitted on {head.views[class_index]}")
    device = next(head.members[0].parameters()).device
    return features.image.flatten(1, 2).to(device), features.depth.flatten(1, 2).to(device)


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
    return crossmodal_distances(
        mapper, (parts[0][sources], parts[1][sources]), (parts[0][target], parts[1][target]), codes
    )
