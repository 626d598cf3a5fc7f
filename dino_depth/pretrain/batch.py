"""A backward pass's worth of crops and what the losses read of them, made on the host by the loader's workers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from dino_depth.compiled import vary
from dino_depth.config import CropConfig, PretrainConfig
from dino_depth.pretrain.crops import GLOBAL_CROPS, crops_of_step
from dino_depth.pretrain.stochastic_depth import kept_sequences

__all__ = ["Batch", "seen_patches"]

ON_HOST = ("depth", "metric")  # a second teacher prepares its input there


@dataclass
class Batch:
    """One backward pass's worth of crops.

    Attributes:
        global_crops: (2 * maps, 1, side, side), the first crop of every map before the second of every map; None where
            ``cuts`` are still to be made.
        local_crops: (crops * maps, 1, side, side), likewise.
        masks: (2 * maps, patches) bool, hidden from the student.
        mask_weights: (hidden,) 1 / (hidden patches of its crop * number of global crops).
        needed: (2 * maps + hidden + crops * maps,) rows the losses read of all tokens of the global, then of the local
            crops: global class tokens, hidden patches, local class tokens.
        kept: (all that are kept,) the crops that take each residual branch, branch by branch, in each the global before
            the local ones, see ``stochastic_depth.py``; None: all.
        kept_counts: of each branch, how many global and how many local ones; None likewise.
        pairs: (2, pairs) rows of the tokens of the global crops: a patch, and the patch of the map's other global crop
            that sees the place in its middle; None where the dense loss is off.
        pair_weights: (pairs,) 1 / (pairs of the patch's crop * number of global crops).
        depth: (2 * maps, 1, side, side) on the CPU, the depth of the global crops, which a second teacher sees; None
            without one.
        metric: (2 * maps,) bool on the CPU, whether it is in metres; None likewise.
        seen: (2 * maps, patches) bool, patches that hold a valid pixel and face the second teacher's; None likewise.
        cuts: what :meth:`ResidentMaps.crop` makes the crops of, on the CPU; None where workers made them.
    """

    global_crops: Tensor | None
    local_crops: Tensor | None
    masks: Tensor
    mask_weights: Tensor
    needed: Tensor
    kept: Tensor | None = None
    kept_counts: list[list[int]] | None = None
    pairs: Tensor | None = None
    pair_weights: Tensor | None = None
    depth: Tensor | None = None
    metric: Tensor | None = None
    seen: Tensor | None = None
    cuts: tuple[Tensor, Tensor, CropConfig] | None = None

    @classmethod
    def make(
        cls,
        crops: tuple[Sequence[Tensor], Sequence[Tensor]] | None,
        masks: Sequence[Tensor | np.ndarray],
        config: PretrainConfig,
        step: int = 0,
        first: int = 0,
        partners: Sequence[Tensor | np.ndarray] | None = None,
        shown: Sequence[tuple[Tensor, bool]] | None = None,
        cuts: tuple[Tensor, Tensor, CropConfig] | None = None,
    ) -> "Batch":
        """On the host, from what was drawn map by map.

        Args:
            crops: of every map its (2, 1, side, side) global, and of every map its (crops, 1, side, side) local ones;
                None with ``cuts``.
            masks: of every map, (2, patches) bool.
            step, first: the step, and the place of the first map in its batch.
            partners: of every map, (2, patches) of :func:`crops.partners`; None: no pairs.
            shown: of every map, (2, 1, side, side) depth and whether it is in metres, for a second teacher.
        """
        model, sizes = config.model, crops_of_step(config.crops, config.train.seed, step)
        counts = [GLOBAL_CROPS, sizes.local_crops]
        kept = kept_sequences(model.drop_path, 2 * model.depth, counts, config.train.seed, step, first, len(masks))
        locals_, masks = torch.arange(sizes.local_crops * len(masks)), _crop_by_crop(masks)
        weights = (1 / masks.sum(1).clamp_min(1))[:, None].expand_as(masks)[masks] / len(masks)
        crop, patch = masks.nonzero(as_tuple=True)
        prefix = 1 + model.registers  # tokens before the patches
        length, small = prefix + masks.shape[1], prefix + (sizes.local_size // model.patch_size) ** 2
        classes = torch.arange(len(masks)) * length
        needed = torch.cat([classes, crop * length + prefix + patch, len(masks) * length + locals_ * small])
        parts = map(_crop_by_crop, crops) if crops else (None, None)
        batch = cls(*parts, masks, weights, needed, cuts=cuts)
        if kept is not None:
            batch.kept = torch.from_numpy(np.concatenate([part for sets in kept for part in sets]))
            batch.kept_counts = [[len(part) for part in sets] for sets in kept]
        if partners is not None:
            batch.pairs, batch.pair_weights = _pairs(_crop_by_crop(partners), prefix)
        if shown is not None:
            depth, metric = zip(*shown, strict=True)
            batch.depth, batch.metric = _crop_by_crop(depth), torch.tensor(metric).repeat(GLOBAL_CROPS)
            batch.seen = seen_patches(batch.global_crops, model.patch_size)
        return batch

    def branches(self) -> list[list[Tensor]] | None:
        """Of each residual branch, (kept,) the global and (kept,) the local crops that take it; None: all."""
        if self.kept is None:
            return None
        parts = self.kept.split([count for counts in self.kept_counts for count in counts])
        vary(*parts)
        parts = iter(parts)
        return [[next(parts) for _ in counts] for counts in self.kept_counts]

    def pin_memory(self) -> "Batch":
        """Where a copy to a GPU is not waited for; the data loader calls it."""
        return self._changed(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        return self._changed(lambda part: part.to(device, non_blocking=True))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        parts = {name: part for name, part in vars(self).items() if isinstance(part, Tensor) and name not in ON_HOST}
        return replace(self, **{name: change(part) for name, part in parts.items()})

    def used_on(self, stream: torch.cuda.Stream):
        """Keeps the memory of what lies on a GPU from being given away before ``stream`` is done with it."""
        for part in vars(self).values():
            if isinstance(part, Tensor) and part.is_cuda:
                part.record_stream(stream)


def _crop_by_crop(maps: Sequence[Tensor | np.ndarray]) -> Tensor:
    """(crops * maps, ...), the first crop of every map before the second of every map, of (crops, ...) of every map."""
    parts = [part for crops in zip(*maps, strict=True) for part in crops]
    # In a worker, it is put together in the memory that the training process reads.
    return default_collate(parts) if parts else maps[0]


def _pairs(partners: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """``pairs`` and ``pair_weights`` of a :class:`Batch`, of partners (2 * maps, patches); ``prefix`` tokens lie before
    the patches of a crop."""
    crops, patches = partners.shape
    crop, patch = (partners >= 0).nonzero(as_tuple=True)
    other, length = (crop + crops // GLOBAL_CROPS) % crops, prefix + patches
    rows = torch.stack([crop * length + prefix + patch, other * length + prefix + partners[crop, patch]])
    return rows, 1 / ((partners >= 0).sum(1)[crop] * crops)


def seen_patches(crops: Tensor, patch_size: int) -> Tensor:
    """Which patches (crops, patches) of crops (crops, 1, side, side), 0 where missing, hold a valid pixel."""
    return F.max_pool2d((crops != 0).float(), patch_size).flatten(1) > 0
