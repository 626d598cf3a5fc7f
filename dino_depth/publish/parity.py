"""The export gate: every published form of an encoder computes the training model's features."""

import math
from collections.abc import Callable, Iterable
from itertools import combinations

import torch
from torch import Tensor

__all__ = ["compare", "worst"]

# Depth (1, 1, side, side) in metres, 0 where missing -> tokens (1, class and registers and patches, dim) after the
# final norm, in this order.
Model = Callable[[Tensor], Tensor]


@torch.inference_mode()
def compare(models: dict[str, Model], maps: Iterable[Tensor], tolerance: float) -> dict:
    """Runs every model on the same depth in float32 and compares each pair of them.

    Args:
        models: at least two, by name.
        maps: (1, side, side) each.
        tolerance: largest absolute difference of any class or patch feature that passes.

    Returns:
        JSON values: ``passed``, ``largest_feature`` (magnitude, to judge the differences by) and for every pair and
        each of class and patch features, registers with the patches, ``max_abs`` and ``mean_abs`` over all maps, null
        where a feature is not finite.
    """
    pairs = list(combinations(models, 2))
    largest, means = ({(pair, kind): [] for pair in pairs for kind in ("class", "patch")} for _ in range(2))
    magnitudes = []
    for depth in maps:
        tokens = {name: model(depth[None]).float() for name, model in models.items()}
        magnitudes += [features.abs().max().item() for features in tokens.values()]
        for pair in pairs:
            difference = (tokens[pair[0]] - tokens[pair[1]]).abs()  # (1, tokens, dim)
            for kind, part in (("class", difference[:, 0]), ("patch", difference[:, 1:])):
                largest[pair, kind].append(part.max().item())
                means[pair, kind].append(part.mean().item())
    report = {
        f"{pair[0]} - {pair[1]}": {
            kind: {"max_abs": _finite(_largest(largest[pair, kind])), "mean_abs": _finite(_mean(means[pair, kind]))}
            for kind in ("class", "patch")
        }
        for pair in pairs
    }
    passed = all(_largest(values) <= tolerance for values in largest.values())
    return {"passed": passed, "largest_feature": _finite(_largest(magnitudes)), "pairs": report}


def worst(report: dict) -> tuple[str, float | None]:
    """The pair and kind of feature of a report that differ most, and by how much; None: by no finite number."""
    differences = {
        f"{pair}, {kind} features": figures["max_abs"]
        for pair, kinds in report["pairs"].items()
        for kind, figures in kinds.items()
    }
    name = max(differences, key=lambda key: math.inf if differences[key] is None else differences[key])
    return name, differences[name]


def _largest(values: list[float]) -> float:
    # Not max(): it may pass over a NaN.
    return torch.tensor(values, dtype=torch.float64).max().item()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
