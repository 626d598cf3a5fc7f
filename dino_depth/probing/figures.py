"""What a probe states: its figures with bootstrap intervals, tables, components as colours, the demo's gate."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_depth.errors import DataError
from dino_depth.terminal import say

__all__ = ["FIGURES", "bootstrap", "demo_gate", "patch_sums", "pca_colours", "print_table", "query_rows"]

FIGURES = {
    "knn_class": "kNN, class feature",
    "knn_patch": "kNN, mean patch",
    "normal": "R2 normal, mean",
    "normal_z": "R2 normal z",
    "normal_angle": "normal error, deg",
    "curvature": "R2 curvature",
}


# One row per query map, summed over (resampled) maps; every figure is a function of these sums.
COLUMNS = 4 + 3 * 4 + 1  # maps, two kNN hits, patches; targets, their squares, squared errors (4 each); angles


def query_rows(hits: list[Tensor], patches: list[Tensor]) -> Tensor:
    """(maps, COLUMNS) float64 from kNN hits (maps,) each and per-patch sums (maps, 14) each."""
    ones = torch.ones(len(hits[0]), 1, dtype=torch.float64)
    return torch.cat([ones, torch.stack(hits, 1).double(), torch.cat(patches)], 1)


def patch_sums(predicted: Tensor, targets: Tensor, usable: Tensor) -> Tensor:
    """(maps, 14) float64: over the usable patches of each map, the sums that R2 and the mean angle need."""
    cosine = F.cosine_similarity(predicted[..., :3], targets[..., :3], dim=-1).clamp(-1, 1)
    angle = torch.rad2deg(cosine.acos())[..., None]
    count = torch.ones_like(angle)
    terms = torch.cat([count, targets, targets.square(), (predicted - targets).square(), angle], -1)
    return (terms * usable[..., None]).flatten(1, 2).sum(1)


def _figures(sums: Tensor) -> dict[str, Tensor]:
    """The figures (...,) of column sums (..., COLUMNS)."""
    maps, class_hits, patch_hits, count = sums[..., :4].unbind(-1)
    total, squares, errors = sums[..., 4:8], sums[..., 8:12], sums[..., 12:16]
    spread = squares - total.square() / count[..., None]
    determination = 1 - errors / spread  # (..., 4): normal x, y, z, curvature
    return {
        "knn_class": class_hits / maps,
        "knn_patch": patch_hits / maps,
        "normal": determination[..., :3].mean(-1),
        "normal_z": determination[..., 2],
        "normal_angle": sums[..., 16] / count,
        "curvature": determination[..., 3],
    }


def bootstrap(rows: dict[str, Tensor], samples: int, seed: int) -> dict[str, dict]:
    """Figures with 95 % percentile intervals over maps, and the paired interval of trained minus random.

    Args:
        rows: of ``trained`` and, where they are compared, ``random`` and ``pixels``, (maps, COLUMNS) float64 of the
            same maps in the same order.

    Returns:
        for each of ``FIGURES``: for each source, and for ``gain`` if there is ``random``, ``value``, ``low`` and
        ``high``.
    """
    maps = len(rows["trained"])
    counts = np.random.default_rng(seed).multinomial(maps, np.full(maps, 1 / maps), samples)
    counts = torch.cat([torch.ones(1, maps, dtype=torch.float64), torch.from_numpy(counts).double()])
    drawn = {source: _figures(counts @ table) for source, table in rows.items()}  # first the figure itself

    def interval(values: Tensor) -> dict[str, float]:
        low, high = torch.quantile(values[1:], torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return {"value": float(values[0]), "low": low, "high": high}

    result = {}
    for name in FIGURES:
        result[name] = {source: interval(drawn[source][name]) for source in drawn}
        if "random" in drawn:
            result[name]["gain"] = interval(drawn["trained"][name] - drawn["random"][name])
    return result


def pca_colours(features: Tensor, usable: Tensor | None = None) -> Tensor:
    """The three leading principal components of patch features as colours, fitted jointly over all maps.

    Each component spans 0..1 between its 2nd and 98th percentile. Components have no sign; each is turned so that its
    largest loading is positive, which makes the colours reproducible.

    Args:
        features: (maps, rows, columns, dim).
        usable: (maps, rows, columns) bool, the patches to fit on and to colour; the others are 0.

    Returns:
        (maps, rows, columns, 3) float32 in 0..1.
    """
    usable = torch.ones(features.shape[:3], dtype=torch.bool) if usable is None else usable
    rows = features[usable].double()
    if len(rows) < 4:
        raise DataError(f"{len(rows)} usable patches are too few for principal components")
    _, _, axes = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    axes = axes[:3] * axes[:3].gather(1, axes[:3].abs().argmax(1, keepdim=True)).sign()
    scores = (rows - rows.mean(0)) @ axes.T
    low, high = torch.quantile(scores, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    colours = torch.zeros(*features.shape[:3], 3)
    colours[usable] = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    return colours


def print_table(result: dict):
    """The figures of a probe on at most 80 columns: trained with its interval, beside random and raw pixels."""
    seen = result["queries_seen_in_training"]
    seen = "" if seen is None else f" ({seen or 'none'} of them seen in training)"
    say(f"{result['encoder']}, input {result['size']} px")
    print(f"{result['query_maps']} query maps{seen}; {result['gallery_maps']} gallery maps")
    print(f"{len(result['categories'])} categories, chance {result['chance']:.3f}")
    compared = "gain" in result["figures"]["knn_class"]
    heading = f"{'random':>8}{'pixels':>8}  {'trained - random, 95 %':>22}" if compared else ""
    print(f"{'':18}{'trained':>7} {'95 %':>14}{heading}")
    for name, title in FIGURES.items():
        row = result["figures"][name]
        digits = 2 if name == "normal_angle" else 3
        trained, beside = row["trained"], ""
        interval = f"{trained['low']:.{digits}f}..{trained['high']:.{digits}f}"
        if compared:
            gain = row["gain"]
            beside = "".join(f"{row[source]['value']:8.{digits}f}" for source in ("random", "pixels"))
            paired = f"{gain['value']:+.{digits}f} {gain['low']:+.{digits}f}..{gain['high']:+.{digits}f}"
            beside += f"  {paired:>22}"
        print(f"{title:18}{trained['value']:7.{digits}f} {interval:>14}{beside}")


def demo_gate(result: dict) -> list[str]:
    """What the demo's gate finds wrong with a probe; empty when it passes.

    kNN on the class feature must beat the same seed's random initialisation by at least 6 points with a paired 95 %
    lower bound above 3, and the curvature R2 must not lie below random's (point estimates, no tolerance).
    """
    gain, failures = result["figures"]["knn_class"]["gain"], []
    if gain["value"] < 0.06 or gain["low"] <= 0.03:
        failures.append(
            f"kNN on the class feature gains {100 * gain['value']:.1f} points on random initialisation, 95 % from "
            f"{100 * gain['low']:.1f}; the gate asks for 6 and a lower bound above 3"
        )
    trained, random = (result["figures"]["curvature"][source]["value"] for source in ("trained", "random"))
    if not trained >= random:
        failures.append(f"curvature R2 {trained:.3f} is below random initialisation's {random:.3f}")
    return failures
