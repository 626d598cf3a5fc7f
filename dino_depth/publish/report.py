"""One HTML page about a run: what the network saw, how it learned, what it knows. Self-contained, readable offline.

Every number on the page is read from the run's files or from the results of ``probe`` and ``export``; what is missing
there is left out. Curves are inline SVG, images are PNGs inside the page.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np
import torch

from dino_depth.config import PretrainConfig, load_config
from dino_depth.depth import normalize
from dino_depth.errors import DataError
from dino_depth.picture import MISSING, VIRIDIS, colour, data_uri, write_page
from dino_depth.pretrain.crops import multi_crop
from dino_depth.pretrain.in_loop import Best, find_best, read_evaluations
from dino_depth.probing.figures import FIGURES
from dino_depth.probing.probe import ProbeConfig, choose_maps, collect_features, load_with_twin, pca_colours
from dino_depth.shards import DepthShards

__all__ = ["Chart", "charts", "evaluation_charts", "read_metrics", "write_report"]

CROPPED_MAPS = 6
PCA_MAPS = 12
PCA_PATCHES = 14  # fewest patches along a side of the PCA pictures; smaller inputs are enlarged
LOCALS_SHOWN = 4
TICK_HEIGHT = 12  # of a tick's text, in units of a chart
POINTS = 400  # most points of a curve
PARITY_KEYS = ("tolerance", "samples", "image_size", "dtype", "device", "largest_feature")


def read_metrics(path: Path) -> list[dict]:
    """Lines of a metrics.jsonl, oldest first; a last line cut short by a crash is left out.

    Raises:
        DataError: the file is missing or another line is not a JSON object with a step.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
            rows[-1]["step"] + 0  # noqa: B018 - a row without a numeric step is no row
        except (ValueError, KeyError, TypeError):
            if number == len(lines) - 1:
                return rows[:number]
            raise DataError(f"{path}: line {number + 1} is not a JSON object with a step") from None
    return rows


@dataclass
class Chart:
    """One curve, ready to draw in a box of ``WIDTH`` x ``HEIGHT``.

    Attributes:
        title: the metric.
        last: its last value, as text.
        path: SVG path data, broken where values are not finite.
        ticks: (y, text) of the largest and the smallest value.
        references: (y, text) of lines to compare with.
        first_step, last_step: ends of the horizontal axis.
        mark: (x, y) of the value of the best step.
    """

    WIDTH, HEIGHT = 300, 120

    title: str
    last: str
    path: str
    ticks: list[tuple[float, str]]
    references: list[tuple[float, str]]
    first_step: int
    last_step: int
    mark: tuple[float, float] | None = None


def _text(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _chart(
    title: str,
    steps: list[int],
    values: list[float],
    references: list[tuple[float, str]],
    marked: int | None = None,
) -> Chart:
    finite = [value for value in values if math.isfinite(value)]
    shown = finite + [value for value, _ in references]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    span = max(steps[-1] - steps[0], 1)

    def y(value: float) -> float:
        return round(Chart.HEIGHT * (high - value) / (high - low), 1)

    def x(step: int) -> float:
        return round(Chart.WIDTH * (step - steps[0]) / span, 1)

    path, pen = [], "M"
    stride = math.ceil(len(steps) / POINTS)
    for place in [*range(0, len(steps), stride), len(steps) - 1]:
        if not math.isfinite(values[place]):
            pen = "M"
            continue
        path.append(f"{pen}{x(steps[place])} {y(values[place])}")
        pen = "L"
    ends = (max(finite), min(finite)) if finite else ()
    ticks = [(y(value), _text(value)) for value in ends]
    if ticks and ticks[1][0] - ticks[0][0] < TICK_HEIGHT:
        ticks = ticks[:1]
    last = _text(values[-1]) if math.isfinite(values[-1]) else "not finite"
    lines = [(y(value), text) for value, text in references]
    mark = None if marked is None else (x(marked), y(values[steps.index(marked)]))
    return Chart(title, last, "".join(path), ticks, lines, steps[0], steps[-1], mark)


def _references(key: str, config: PretrainConfig) -> list[tuple[float, str]]:
    """Levels worth comparing a metric with: what a uniform guess costs, and the collapse gate's thresholds."""
    log_k = math.log(config.loss.prototypes)
    share = config.loss.mask_share  # the iBOT loss is a mean over all global crops, masked or not
    gate = config.health
    return {
        "loss/dino": [(log_k, "log K")],
        "loss/ibot": [(share * log_k, f"{share:g} log K")],
        "health/class_mean_entropy": [(gate.mean_entropy, "gate: above")],
        "health/class_target_entropy": [(gate.target_entropy, "gate: below")],
        "health/class_used": [(gate.used, "gate: above")],
    }.get(key, [])


def charts(rows: list[dict], config: PretrainConfig) -> dict[str, list[Chart]]:
    """Charts of every metric by the part of its name before the slash."""
    groups: dict[str, list[Chart]] = {}
    for key in dict.fromkeys(key for row in rows for key in row if key != "step"):
        pairs = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        if pairs:
            steps, values = map(list, zip(*pairs, strict=True))
            group, _, name = key.partition("/")
            chart = _chart(name.replace("_", " ") or "total", steps, values, _references(key, config))
            groups.setdefault(group, []).append(chart)
    return groups


def evaluation_charts(results: dict[int, dict], best: Best | None) -> list[Chart]:
    """The curve of each figure of the probes during training, the best step marked on the one that decided."""
    good = {step: result["figures"] for step, result in results.items() if "error" not in result}
    if not good:
        return []
    drawn = []
    for name, title in FIGURES.items():
        values = [figures[name]["trained"]["value"] for figures in good.values()]
        marked = best.step if best and best.metric == name else None
        drawn.append(_chart(title.replace("R2", "R²"), list(good), values, [], marked))
    return drawn


def _spread(shards: DepthShards, indices: np.ndarray, count: int) -> np.ndarray:
    """Up to ``count`` of ``indices``, taken in turn from each category."""
    queues: dict[str, list[int]] = {}
    categories = shards.values("category")
    for index in indices:
        queues.setdefault(categories[index], []).append(int(index))
    # From each category its middle maps, category by category, so that few maps already show many categories.
    ranked = sorted(
        (abs(place - len(queue) // 2), name, index)
        for name, queue in queues.items()
        for place, index in enumerate(queue)
    )
    if len(queues) <= count:
        return np.array([index for *_, index in ranked[:count]])
    first = [index for distance, _, index in ranked if distance == 0]
    return np.array([first[round(place * (len(first) - 1) / (count - 1))] for place in range(count)])


def _crops(shards: DepthShards, config: PretrainConfig) -> list[dict]:
    """Maps and their crops exactly as training draws them, as images."""
    splits = config.data.splits
    indices = np.flatnonzero(np.isin(shards.values("split"), splits)) if splits else np.arange(len(shards))
    shown = []
    for position, index in enumerate(_spread(shards, indices, CROPPED_MAPS)):
        depth_map, meta = shards.sample(int(index))
        values = normalize(depth_map, config.data.normalization)
        low, high = np.percentile(values[depth_map.valid], [1, 99])
        crops = multi_crop(values, depth_map.valid, config.crops, config.train.seed, position)
        # Where a crop of all ones is 0, the pixel is missing; in the values themselves a 0 may be a depth.
        ones = multi_crop(np.ones_like(values), depth_map.valid, config.crops, config.train.seed, position)
        images = [
            data_uri(colour(crop[0].numpy(), one[0].numpy() > 0, low, high))
            for kind, kind_ones in zip(crops, ones, strict=True)
            for crop, one in zip(kind[: max(2, LOCALS_SHOWN)], kind_ones, strict=False)
        ]
        whole = data_uri(colour(values, depth_map.valid, low, high))
        shown.append({"category": meta["category"], "map": whole, "global": images[:2], "local": images[2:]})
    return shown


def _components(run: Path, shards: DepthShards, probed: dict | None) -> dict:
    """PCA colours of patch features of query maps, trained and at random initialisation, as images."""
    trained, random = load_with_twin(str(run))
    settings = (probed or {}).get("config", {})
    keys = ("gallery_splits", "query_splits", "seed")
    choice = ProbeConfig(str(run), [], **{key: settings[key] for key in keys if key in settings})
    indices = _spread(shards, choose_maps(shards, choice)[1], PCA_MAPS)
    patch = trained.patch_size
    size = trained.size * math.ceil(PCA_PATCHES * patch / trained.size)
    columns = {}
    for name, encoder in (("trained", trained), ("random", random)):
        seen = collect_features(encoder, shards, indices, size)
        share = torch.nn.functional.avg_pool2d((seen["depth"] > 0).float(), patch)[:, 0]
        usable = share >= 0.5
        # What all patches of a map have in common says which map it is and would take all three colours.
        weights = usable[..., None] / usable.sum((1, 2)).clamp_min(1)[:, None, None, None]
        features = seen["patches"] - (seen["patches"] * weights).sum((1, 2), keepdim=True)
        colours = (255 * pca_colours(features, usable)).round().to(torch.uint8).numpy()
        colours[~usable.numpy()] = MISSING
        columns[name] = [data_uri(np.kron(tile, np.ones((8, 8, 1), np.uint8))) for tile in colours]
    columns["depth"] = []
    for depth in seen["depth"][:, 0].numpy():
        low, high = np.percentile(depth[depth > 0], [1, 99]) if (depth > 0).any() else (0, 1)
        columns["depth"].append(data_uri(colour(-depth, depth > 0, -high, -low)))
    columns["category"] = shards.values("category")[indices].tolist()
    maps = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"maps": maps, "rows": size // patch, "side": size, "trained_side": trained.size}


def _probe_rows(probed: dict) -> list[dict]:
    """The probe's figures with the intervals placed on an axis of their own, 0..100."""
    rows = []
    for name, title in FIGURES.items():
        figure = probed["figures"].get(name)
        if figure is None:
            continue
        digits = 2 if name == "normal_angle" else 3
        sources = ("trained", "random", "pixels")
        reference = [probed["chance"]] if name.startswith("knn") else []
        ends = [figure[source][end] for source in sources for end in ("low", "high")] + reference
        low, high = min(ends), max(ends)
        low, high = low - 0.04 * (high - low), high + 0.04 * (high - low)

        def place(value: float, low=low, high=high) -> float:
            return round(100 * (value - low) / ((high - low) or 1.0), 2)

        marks = {source: {end: place(figure[source][end]) for end in ("value", "low", "high")} for source in sources}
        texts = {
            source: [format(figure[source][end], f".{digits}f") for end in ("value", "low", "high")]
            for source in sources
        }
        gain = [format(figure["gain"][end], f"+.{digits}f") for end in ("value", "low", "high")]
        chance = place(reference[0]) if reference else None
        rows.append({"title": title, "marks": marks, "texts": texts, "gain": gain, "chance": chance})
    return rows


def _flat(value, prefix: str = "") -> dict:
    if isinstance(value, dict):
        return {key: leaf for name, part in value.items() for key, leaf in _flat(part, f"{prefix}{name} ").items()}
    return {prefix.strip(): value}


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: unreadable: {error}") from None


def write_report(run: Path, results: dict, shards: DepthShards | str | list[str], out: Path):
    """Writes the page about a run.

    Args:
        run: run folder with config.yaml, metrics.jsonl, env.json and a checkpoint.
        results: any of ``probe`` (of :func:`probe`), ``parity`` (of parity.json), ``gate`` (``passed`` and
            ``failures``) and ``seconds`` (duration of each stage).
        shards: the maps, seen and unseen: folders, or an index of all their splits.
        out: HTML file, written atomically.

    Raises:
        ConfigError: ``run`` is no run folder.
        DataError: a file of the run or a sample is unreadable.
    """
    run, out = Path(run), Path(out)
    shards = shards if isinstance(shards, DepthShards) else DepthShards(shards)
    config = load_config(PretrainConfig, run / "config.yaml")
    rows = read_metrics(run / "metrics.jsonl")
    probed, parity = results.get("probe"), results.get("parity")
    evaluations = read_evaluations(run)
    best = find_best(evaluations, config.train.best_by)
    folder = jinja2.PackageLoader("dino_depth.publish", "")
    environment = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["seconds"] = lambda value: f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"
    page = environment.get_template("report.html.jinja").render(
        run=run.name,
        config=config,
        config_text=(run / "config.yaml").read_text(encoding="utf-8"),
        environment=_flat(env := _read_json(run / "env.json")),
        samples=env.get("samples"),
        step=rows[-1]["step"] if rows else 0,
        gate=results.get("gate"),
        seconds=results.get("seconds", {}),
        charts=charts(rows, config),
        evaluations=evaluation_charts(evaluations, best),
        evaluated=len(evaluations),
        failed=[step for step, result in evaluations.items() if "error" in result],
        best=best,
        best_title=FIGURES[config.train.best_by],
        box=Chart,
        crops=_crops(shards, config),
        components=_components(run, shards, probed),
        probe=probed,
        probe_rows=_probe_rows(probed) if probed else [],
        parity=parity,
        parity_facts={key: parity[key] for key in PARITY_KEYS if key in parity} if parity else {},
        missing=MISSING,
        viridis=[f"rgb{tuple(row)}" for row in VIRIDIS.astype(int).tolist()],
    )
    write_page(out, page)
