"""``dino-depth report RUN``: one HTML page about a run of ``evaluate``, readable offline, volumes included.

Every number is read from the run's results.json, every picture from its predictions and figures; neither benchmark nor
encoders nor heads are needed. Tables hold this run, the trivial baselines and the published rows; each class shows a
few instances with the volume to rotate (``viewer.js``), ground truth and 2D maps; then come the maps of all pairs of
views (ModMap, figures 9 and 10) and the principal components of the features (figures 6 and 8). The size is bounded
whatever the number of classes and voxels. What a run lacks, such as volumes in single-view benchmarks, is left out.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from dino_depth.anomaly.packing import CONTEXT, LEVELS, PANE, PITCH, TRUTH, YAW, pack
from dino_depth.anomaly.report_tables import tables
from dino_depth.anomaly.results import alone, undefined, write_whole
from dino_depth.anomaly.strips import crop, grid, read_arrays, strips
from dino_depth.errors import ConfigError, DataError
from dino_depth.picture import VIRIDIS, data_uri
from dino_depth.terminal import say

__all__ = ["ReportConfig", "page_environment", "report", "viewer_parts"]

RESULTS = "results.json"
SHARED = "dino_depth.anomaly"  # holds the style and the viewer
KEYS = (
    "benchmark",
    "setup",
    "synthetic",
    "head",
    "config",
    "seeds",
    "categories",
    "metrics",
    "trials",
    "mean",
    "published",
    "complete",
)
VOXELS_SHOWN = 800_000  # on a page, 11 bytes each
VOXELS_EACH = 60_000
CLASSES_SHOWN = 12
OVERLAY = (0.9, 0.999)  # quantiles of the scores where colours over a view start and end
QUANTILE = 0.99  # of the scores of good instances: the first threshold lets 1 % of their voxels through


@dataclass
class ReportConfig:
    """A page about a run of ``evaluate``.

    Attributes:
        run: run folder.
        out: HTML file to write; empty means report.html in the run folder.
        compare: other run folders, whose means and features are shown beside this run's.
    """

    run: str
    out: str = ""
    compare: list[str] = field(default_factory=list)


def report(config: ReportConfig):
    """Writes the page, atomically.

    Raises:
        ConfigError: ``out`` is a folder.
        DataError: a run folder has no results, or a file of it is damaged.
    """
    run = Path(config.run)
    out = Path(config.out) if config.out else run / "report.html"
    if out.is_dir():
        raise ConfigError(f"out {out} is a folder: name a file")
    results, others = read_results(run), {path: read_results(Path(path)) for path in config.compare}
    environment = page_environment("dino_depth.anomaly")
    try:
        classes = [_class(run, results, category) for category in results["categories"][:CLASSES_SHOWN]]
        page = environment.get_template(
            "report.html.jinja"
        ).render(
            run=run.resolve().name,
            results=results,
            encoders=_encoders(results),
            level=results["config"]["metrics"]["level"],
            verdict=results.get("verdict", ""),  # results of before have none
            alone=sorted(alone(results["trials"])),
            undefined=undefined(results["trials"]),
            tables=tables(results, {Path(path).name: other for path, other in others.items()}),
            classes=classes,
            volumes=any(instance["volume"] for part in classes for instance in part["instances"]),
            hidden=results["categories"][CLASSES_SHOWN:],
            components=_components(run, results, others),
            config_text=yaml.safe_dump(results["config"], sort_keys=False),
            **viewer_parts(environment, "the ground truth"),
        )
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{run / RESULTS}: not as evaluate writes it: {type(error).__name__} {error}") from error
    write_whole(out, page.encode())
    shown = sum(len(part["instances"]) for part in classes)
    say(f"{out}: {len(results['categories'])} classes, {shown} instances shown, {out.stat().st_size / 1e6:.1f} MB")


def page_environment(package: str) -> jinja2.Environment:
    """Where pages with volumes come from: templates of a package, and the parts that all such pages share."""
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(name, "") for name in dict.fromkeys([package, SHARED])])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["seconds"] = lambda value: f"{value:.3g} s" if value < 120 else f"{value / 60:.1f} min"
    return environment


def viewer_parts(environment: jinja2.Environment, marked: str) -> dict[str, Any]:
    """What the viewer needs of a page; ``marked`` is what the pane on the right shows."""
    settings = {"ramp": VIRIDIS.tolist(), "plain": CONTEXT, "truth": TRUTH, "pane": PANE, "yaw": YAW, "pitch": PITCH}
    script = environment.loader.get_source(environment, "viewer.js")[0]
    return {
        "settings": json.dumps(settings | {"marked": marked}),
        "viridis": [f"rgb{tuple(row)}" for row in VIRIDIS.astype(int).tolist()],
        "truth": f"rgb{TRUTH}",
        "context": f"rgb{CONTEXT}",
        "pane": f"rgb{PANE}",
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }


def read_results(run: Path) -> dict:
    """What ``evaluate`` wrote, so far.

    Raises:
        DataError: there are no results, or a key is missing.
    """
    path = run / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; `dino-depth evaluate` writes it") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable: {error}") from None
    if isinstance(results, dict) and "cells" in results:  # as trials were called
        results["trials"] = results.pop("cells")
    if missing := [key for key in KEYS if not isinstance(results, dict) or key not in results]:
        raise DataError(f"{path}: key {missing[0]} is missing")
    if not results["trials"]:
        raise DataError(f"{path}: no class has been evaluated yet")
    return results


def _encoders(results: dict) -> dict[str, str]:
    chosen = results["config"].get("encoder", {})
    return {key: chosen[key] for key in ("image", "depth") if isinstance(chosen.get(key), str) and chosen[key]}


def _trial(results: dict, category: str) -> dict | None:
    """The first seed's results of a class."""
    return next((trial for trial in results["trials"] if trial["category"] == category), None)


def _chosen(instances: list[dict]) -> list[tuple[str, dict]]:
    """Instances to show and why: the anomalous ones of highest, median and lowest score, the highest nominal one."""
    by_score = sorted(instances, key=lambda instance: (-instance["score"], instance["name"]))
    anomalous = [instance for instance in by_score if instance["label"] == "anomalous"]
    good = [instance for instance in by_score if instance["label"] != "anomalous"]
    ranked = [("highest score of the anomalous", 0), ("median", len(anomalous) // 2), ("lowest", len(anomalous) - 1)]
    found = {place: (text, anomalous[place]) for text, place in reversed(ranked) if anomalous}
    shown = [found[place] for place in sorted(found)]
    return shown + [("highest score of the nominal", instance) for instance in good[:1]]


def _class(run: Path, results: dict, category: str) -> dict:
    """Everything the page shows of a class, from its first seed."""
    trial = _trial(results, category)
    if trial is None:
        return {"name": category, "instances": [], "pairs": []}
    chosen = _chosen(trial["instances"])
    figures = [_figures(run, category, instance["name"]) for _, instance in chosen]
    loaded = [read_arrays(run / instance["file"]) for _, instance in chosen]
    loaded = [crop(part, pictures["share"]) if pictures else part
              for part, pictures in zip(loaded, figures, strict=True)]  # fmt: skip
    good = [instance for instance in trial["instances"] if instance["label"] == "good"]
    limit = min(VOXELS_EACH, VOXELS_SHOWN // (4 * min(len(results["categories"]), CLASSES_SHOWN)))
    scale = _scale([arrays["score"] for arrays in loaded if "score" in arrays])
    level = _first_threshold(run, good, scale) if scale else 0
    above = {modality: _map_scale(loaded, figures, f"{modality}_map") for modality in ("image", "depth")}
    shown = []
    for (role, instance), arrays, pictures in zip(chosen, loaded, figures, strict=True):
        part = {"role": role, **instance, "volume": None, "strips": [], "views": []}
        if scale:
            truth = arrays.get("truth_index", np.empty((0, 3), np.int32))
            edge = float(arrays["size"])
            packed = pack(arrays["index"], arrays["score"], truth, edge, scale, level, limit)
            facts = {name: getattr(packed, name) for name in ("voxels", "observed", "shape", "edge")}
            part["about"] = json.dumps(facts | {"scale": scale, "threshold": level})
            part["volume"], part["still"] = packed, data_uri(packed.still)
        if pictures:
            part["strips"] = strips(crop(pictures, pictures["share"]), arrays, above)
            part["views"] = pictures["views"].tolist()
        shown.append(part)
    return {"name": category, "instances": shown, "pairs": _pairs(run, category, trial)}


def _figures(run: Path, category: str, name: str) -> dict[str, np.ndarray]:
    path = run / "figures" / category / f"{name}.npz"
    return read_arrays(path) if path.exists() else {}


def _scale(scores: list[np.ndarray]) -> tuple[float, float] | None:
    """Median and highest score of the volumes, so that one colour means one score within a class.

    No threshold of interest lies in the lower half, which may be most of the range.
    """
    if not scores:
        return None
    together = np.concatenate(scores)
    return float(np.median(together)), float(together.max())


def _first_threshold(run: Path, good: list[dict], scale: tuple[float, float]) -> int:
    """The level above which 1 % of the good instances' voxels lie; half of the scale without good instances."""
    if not good:
        return LEVELS // 2
    low, high = scale
    counts = np.zeros(LEVELS + 1, np.int64)
    for instance in good:
        score = read_arrays(run / instance["file"])["score"].astype(np.float64)
        level = np.rint(LEVELS * np.clip((score - low) / ((high - low) or 1.0), 0, 1)).astype(int)
        counts += np.bincount(level, minlength=LEVELS + 1)
    return min(int(np.searchsorted(np.cumsum(counts), QUANTILE * counts.sum())) + 1, LEVELS)


def _map_scale(loaded: list[dict], figures: list[dict], key: str) -> tuple[float, float]:
    """The score above which a modality's maps are laid over views, and the one where colours end, of all instances."""
    scores = [
        arrays[key].astype(np.float64)[crop(pictures, pictures["share"])["share"] > 0]
        for arrays, pictures in zip(loaded, figures, strict=True)
        if key in arrays and pictures
    ]
    return tuple(np.quantile(np.concatenate(scores), OVERLAY).tolist()) if scores else (0.0, 1.0)


def _pairs(run: Path, category: str, trial: dict) -> list[dict]:
    """The maps of all pairs of views of the instance that has them, one grid for each modality."""
    for instance in trial["instances"]:
        figures = _figures(run, category, instance["name"])
        if "image_pairs" in figures and len(figures["image_pairs"]) > 1:
            titles = {"depth": "image to depth", "image": "depth to image"}
            return [
                {"instance": instance["name"], "title": title, **grid(crop(figures, figures["share"]), modality)}
                for modality, title in titles.items()
            ]
    return []


def _components(run: Path, results: dict, others: dict[str, dict]) -> list[dict]:
    """One view of a class's detailed instance: its image and depth, and the PCA colours of every encoder."""
    rows = []
    for category in results["categories"][:CLASSES_SHOWN]:
        trial = _trial(results, category) or {"instances": []}
        for instance in trial["instances"]:
            figures = _figures(run, category, instance["name"])
            if not any(f"{modality}_components" in figures for modality in ("image", "depth")):
                continue
            figures = crop(figures, figures["share"])
            view = int(figures["share"].reshape(len(figures["share"]), -1).mean(1).argmax())
            gray = {key: np.repeat(figures[key][view][..., None], 3, 2) for key in ("image", "depth")
                    if figures[key][view].ndim == 2}  # fmt: skip
            gray = {"image": figures["image"][view], **gray}
            pictures = [("image", data_uri(gray["image"])), ("depth", data_uri(gray["depth"]))]
            for path, encoders in [(run, _encoders(results)), *((Path(p), _encoders(o)) for p, o in others.items())]:
                there = figures if path == run else _figures(path, category, instance["name"])
                there = crop(there, there["share"]) if there and path != run else there
                for modality in ("image", "depth"):
                    if (key := f"{modality}_components") in there and len(there[key]) > view:
                        title = f"{modality}: {encoders.get(modality, 'encoder')}"
                        pictures.append((title, data_uri(there[key][view])))
            # Runs to compare often share an encoder.
            rows.append({"category": category, "instance": instance["name"], "view": str(figures["views"][view]),
                         "pictures": list(dict(pictures).items())})  # fmt: skip
            break
    return rows
