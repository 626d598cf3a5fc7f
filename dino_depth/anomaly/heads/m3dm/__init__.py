"""M3DM: a memory bank of each modality, their distances summed with learned weights (Wang et al. 2023).

The features are those of the encoders, in the paper DINO's of the image and Point-MAE's of the points. A cell's
distance from each bank is multiplied by the published weights (depth 1, image .1, fusion 1) and by those of a linear
one-class support vector machine that is fitted on the training cells' own distances: the decision is one weighted
sum.

``fusion true`` adds a third bank, of features that a small network fuses by a contrastive loss. In the paper it
trains on all classes together; of one instance it is another thing, and its users report lower scores with it: it is
off.

Other than published: distances do not depend on the means that the code subtracts, so only its scales are here; all
banks keep the same number of rows; cells without the object enter neither bank nor loss; the projection that the
coreset is chosen in is Gaussian; maps are blurred as floats by ``prepare.smoothing``.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dino_depth.anomaly.bank import greedy_coreset, highest_cell, kept_count, nearest_distance, projected, reweighted
from dino_depth.anomaly.heads import Context, Facts, check_features, check_train, require
from dino_depth.anomaly.heads.m3dm.fusion import Fusion, train_fusion
from dino_depth.anomaly.views import Views
from dino_depth.errors import ConfigError, DataError, ReportedError

__all__ = ["INFERENCE", "Config", "M3dm", "check", "fit", "from_state", "instance", "needs", "score", "title"]

INFERENCE = frozenset()
WEIGHTS = {"depth": 1.0, "image": 0.1, "fusion": 1.0}
OVERFLOW = 1000.0  # what the published code divides distances by before their exponentials


@dataclass
class Config:
    """Banks and the weights of their distances.

    Attributes:
        fusion: a third bank, of fused features.
        fusion_steps: of training them.
        fusion_patches: cells drawn for such a step.
        statistics: what features are divided by: ``own``, the standard deviation of each; or ``official``, that of the
            image's features for all, as the authors' code has it.
        share: share of the training cells that a bank keeps.
        limit: largest number of them, whatever the share.
        leave_out: training cells are compared with the rows of other views only, when the weights are learned; else a
            share of them has distance 0, as published.
        rows: training cells, at most, that the weights are learned from.
        reweight: rows near the nearest one that an instance's maxima are reweighted by, 3 as published; 0: an instance
            is scored by the maximum of its volume or map.
    """

    fusion: bool = False
    fusion_steps: int = 750
    fusion_patches: int = 2048
    statistics: Literal["own", "official"] = "own"
    share: float = 0.1
    limit: int = 10_000
    leave_out: bool = False
    rows: int = 50_000
    reweight: int = 0


@dataclass(frozen=True)
class M3dm:
    """A fitted head.

    Attributes:
        dims: channels of image and depth features.
        banks: by name ("depth", "image", "fusion"), (kept cells, channels) float32 on the device of the head, scaled.
        scales: what features are divided by, by name.
        weights: of the distances from the banks, (banks,), and of the instances' maxima, (banks,).
        fusion: the network of the third bank; None without.
    """

    config: Config
    dims: tuple[int, int]
    banks: dict[str, Tensor]
    scales: dict[str, float]
    weights: tuple[Tensor, Tensor]
    fusion: Fusion | None = None

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.save`` and ``torch.load(..., weights_only=True)``."""
        state = {"config": asdict(self.config), "dims": list(self.dims), "scales": self.scales}
        state["banks"] = {name: bank.cpu() for name, bank in self.banks.items()}
        state["weights"] = [part.cpu() for part in self.weights]
        if self.fusion is not None:
            state["fusion"] = {key: part.cpu() for key, part in self.fusion.state_dict().items()}
        return state


def from_state(state: dict[str, Any], device: torch.device) -> M3dm:
    """The head that gave ``state``.

    Raises:
        DataError: a key is missing or unknown, or weights do not fit.
    """
    try:
        config, dims, fusion = Config(**state["config"]), tuple(state["dims"]), None
        if config.fusion:
            fusion = Fusion(dims)
            fusion.load_state_dict(state["fusion"])
            fusion.to(device).eval().requires_grad_(False)
        banks = {name: bank.to(device) for name, bank in state["banks"].items()}
        pixels, instances = state["weights"]
        return M3dm(config, dims, banks, dict(state["scales"]), (pixels, instances), fusion)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise DataError(f"not the state of a m3dm head: {' '.join(str(error).split())[:200]}") from error


def needs(config: Config) -> frozenset[str]:
    """Features of both modalities."""
    return frozenset({"image", "depth"})


def title(config: Config) -> str:
    parts = ["m3dm", "three banks" if config.fusion else "two banks"]
    parts += ["official statistics"] * (config.statistics == "official") + ["views left out"] * config.leave_out
    return ", ".join(parts + [f"reweighted by {config.reweight}"] * bool(config.reweight))


def check(config: Config, facts: Facts):
    """Refuses what cannot work.

    Raises:
        ConfigError: a setting that cannot work, an encoder or package that is missing, or a single view to leave out.
    """
    _check_config(config)
    require("m3dm", needs(config), facts)
    if importlib.util.find_spec("sklearn") is None:
        raise ConfigError("m3dm needs scikit-learn for its decision: pip install 'dino-depth[baselines]'")
    if config.leave_out and facts.views * facts.train * facts.classes < 2:
        raise ConfigError("m3dm.leave_out needs two training views: without the only one nothing is left")


def _check_config(config: Config):
    if not 0 < config.share <= 1:
        raise ConfigError(f"m3dm.share must lie in (0, 1], got {config.share}")
    if config.share == 1 and not config.leave_out:
        raise ConfigError("m3dm.share 1 leaves every training cell at distance 0: use less, or leave_out true")
    for name in ("limit", "fusion_steps", "fusion_patches", "rows"):
        if getattr(config, name) < 1:
            raise ConfigError(f"m3dm.{name} must be at least 1, got {getattr(config, name)}")
    if config.reweight < 0 or config.reweight == 1:
        raise ConfigError(f"m3dm.reweight must be 0 or at least 2 rows, got {config.reweight}")


def fit(train: Sequence[Views], config: Config, context: Context) -> M3dm:
    """Fills the banks from nominal samples, which all classes share, and learns the weights of their distances.

    Raises:
        ConfigError: a setting that cannot work, or a modality that was not encoded.
        DataError: features that cannot be used, or no cell that shows an object.
        ReportedError: the fusion's loss became NaN, or all distances of training cells are 0.
    """
    _check_config(config)
    dims = check_train(train, "m3dm")
    if 0 in dims:
        raise ConfigError(f"m3dm needs features of both modalities, got {dims[0]} image and {dims[1]} depth channels")
    image, depth = (
        torch.cat([getattr(sample, name)[sample.share > 0] for sample in train]).to(context.device)
        for name in ("image", "depth")
    )  # (cells, channels)
    if not len(image):
        raise DataError(f"m3dm: none of {len(train)} training samples shows an object")
    cells = {"depth": depth, "image": image}
    scales = {name: _scale(image if config.statistics == "official" else part) for name, part in cells.items()}
    cells = {name: part / scales[name] for name, part in cells.items()}
    fusion = None
    if config.fusion:
        fusion = train_fusion(cells["image"], cells["depth"], config.fusion_steps, config.fusion_patches, context)
        with torch.inference_mode():
            blocks = zip(cells["image"].split(4096), cells["depth"].split(4096), strict=True)
            fused = torch.cat([fusion(*parts) for parts in blocks])
        # Its inputs are scaled, so "official" divides by what is left of the image's deviation.
        scales["fusion"] = _scale(cells["image"] if config.statistics == "official" else fused)
        cells["fusion"] = fused / scales["fusion"]
    count = kept_count(len(image), config.share, config.limit)
    kept = {
        name: greedy_coreset(part, count, context.seed, projected(len(part))) for name, part in cells.items()
    }  # rows of the cells
    banks = {name: part[kept[name]] for name, part in cells.items()}
    view = torch.cat([_view_numbers(sample) for sample in train])
    view = view + torch.repeat_interleave(_first_views(train), torch.tensor([int((s.share > 0).sum()) for s in train]))
    places = torch.randperm(len(image), generator=torch.Generator().manual_seed(context.seed))[: config.rows]
    distances = torch.stack(
        [
            WEIGHTS[name]
            * _training_distances(part, banks[name], view, view[kept[name].cpu()], places, config.leave_out)
            for name, part in cells.items()
        ],
        1,
    )  # (rows, banks)
    pixels = one_class_weights(distances, context.seed)
    head = M3dm(config, dims, banks, scales, (pixels, torch.ones(len(banks))), fusion)
    if not config.reweight:
        return head
    maxima = torch.stack([_maxima(head, sample) for sample in train])
    return M3dm(config, dims, banks, scales, (pixels, one_class_weights(maxima, context.seed)), fusion)


def _scale(features: Tensor) -> float:
    """Standard deviation over all cells and channels."""
    return float(features.double().std(correction=0)) or 1.0


def _view_numbers(sample: Views) -> Tensor:
    """The view (cells,) of each cell that shows the object."""
    return (sample.share > 0).nonzero()[:, 0]


def _first_views(train: Sequence[Views]) -> Tensor:
    """Number of views before each sample."""
    counts = torch.tensor([len(sample.share) for sample in train])
    return counts.cumsum(0) - counts


def _training_distances(
    cells: Tensor, bank: Tensor, view: Tensor, bank_view: Tensor, places: Tensor, leave_out: bool
) -> Tensor:
    """Distance (places,) on the CPU of training cells from the bank; NaN where no other view has a row in it."""
    device = cells.device
    if not leave_out:
        return nearest_distance(cells[places.to(device)], bank).cpu()
    found = torch.full((len(places),), torch.nan)
    for number in view[places].unique():
        here, others = view[places] == number, bank_view != number
        if others.any():
            found[here] = nearest_distance(cells[places[here].to(device)], bank[others.to(device)]).cpu()
    return found


def one_class_weights(distances: Tensor, seed: int) -> Tensor:
    """Weights (banks,) of a linear one-class support vector machine on nominal distances (rows, banks).

    Its score of a row is the sum of the row times these; distances are not negative, and so are they.

    Raises:
        ReportedError: no weight is left, since all distances are 0.
    """
    from sklearn.linear_model import SGDOneClassSVM

    rows = distances[distances.isfinite().all(1)].double().numpy()
    if len(rows):
        found = SGDOneClassSVM(nu=0.5, max_iter=1000, random_state=seed).fit(rows).coef_.ravel()
    if not len(rows) or not found.max() > 0:
        raise ReportedError(
            "m3dm: no training cell is at a distance from the banks, so nothing can be learned from them: keep a "
            "smaller share, or compare with other views only (leave_out true)"
        )
    return torch.from_numpy(found).float()


def _cells(head: M3dm, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
    """Scaled features (cells, channels) of every bank."""
    device = head.banks["depth"].device
    parts = {"depth": depth.to(device) / head.scales["depth"], "image": image.to(device) / head.scales["image"]}
    if head.fusion is not None:
        parts["fusion"] = head.fusion(parts["image"], parts["depth"]) / head.scales["fusion"]
    return parts


def _distances(head: M3dm, views: Views) -> Tensor:
    """(banks, views, rows, columns) on the CPU, times the published weights; a view at a time bounds the memory."""
    found = []
    for image, depth in zip(views.image, views.depth, strict=True):
        cells = _cells(head, image.flatten(0, 1), depth.flatten(0, 1))
        parts = [WEIGHTS[name] * nearest_distance(part, head.banks[name]).cpu() for name, part in cells.items()]
        found.append(torch.stack(parts).unflatten(1, image.shape[:2]))
    return torch.stack(found, 1)


@torch.inference_mode()
def score(head: M3dm, views: Views) -> dict[str, Tensor]:
    """The weighted sum of every cell's distances from the banks.

    Returns:
        {"both": (views, rows, columns)} float32, CPU.

    Raises:
        DataError: features that cannot be used.
    """
    check_features(views, "m3dm", head.dims)
    return {"both": torch.einsum("b,bvrc->vrc", head.weights[0], _distances(head, views))}


@torch.inference_mode()
def _maxima(head: M3dm, views: Views) -> Tensor:
    """(banks,): the reweighted distance of each bank's most anomalous cell, times the published weights."""
    distances = _distances(head, views)
    found = []
    for place, name in enumerate(head.banks):
        at = highest_cell(distances[place], views.share)
        cell = _cells(head, views.image[at][None], views.depth[at][None])[name][0]
        found.append(WEIGHTS[name] * reweighted(cell, head.banks[name], head.config.reweight, OVERFLOW, own=False))
    return torch.tensor(found)


@torch.inference_mode()
def instance(head: M3dm, views: Views, maps: dict[str, Tensor]) -> float | None:
    """The weighted sum of the banks' reweighted maxima; None where ``reweight`` is 0."""
    if not head.config.reweight:
        return None
    return float(_maxima(head, views) @ head.weights[1])
