"""What frozen features know about depth maps they have not seen, beside the same network untrained and raw pixels.

Categories: top-1 of a weighted k-nearest-neighbour vote over cosine similarities, on the class feature and on the mean
of the patch features. Geometry: ridge regression from a patch's feature to its mean surface normal and mean curvature.

Every figure has a bootstrap interval over query maps, and the difference to the untrained network a *paired* one: both
networks are scored on the same resampled maps. A collapsed run can still beat its random initialisation by some
points, so no figure here replaces the health gate.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dino_depth import checkpoint
from dino_depth.config import DataConfig, PretrainConfig, load_config
from dino_depth.device import pick_device
from dino_depth.encoder import Encoder
from dino_depth.errors import ConfigError, DataError
from dino_depth.probing.figures import (
    FIGURES,
    bootstrap,
    demo_gate,
    patch_sums,
    pca_colours,
    print_table,
    query_rows,
)
from dino_depth.progress import Progress
from dino_depth.readout import Moments, fit_ridge, knn
from dino_depth.resample import fit_square
from dino_depth.shards import DepthShards
from dino_depth.storage import location
from dino_depth.surface import patch_geometry
from dino_depth.vit import DepthTransformer

__all__ = [
    "ProbeConfig", "choose_maps", "collect_features", "count_seen", "demo_gate", "label_maps", "load_with_twin",
    "pca_colours", "print_table", "probe", "probe_encoders",
]  # fmt: skip

PIXEL_GRID = 16  # the raw-pixel baseline's kNN vector is the input averaged to 16 x 16
HELD_OUT = 4  # one gallery map in so many chooses the ridge penalty


@dataclass
class ProbeConfig:
    """Probe a frozen encoder: kNN by category, ridge regression of normals and curvature, on held-out maps.

    Attributes:
        encoder: run folder (its newest checkpoint), one checkpoint file of a run, exported folder or Hub id.
        shards: shard folder made by ``prep``, or a list of them.
        out: JSON file for the result.
        size: side of the square input, pixels, that all are measured at, positions resized; by default the encoder's,
            which for an export is the large size it was exported for: give the training size to compare it with its
            run. At 896 use a ``batch`` of 4 to 16.
        gallery_splits: splits whose maps are the neighbours and fit the regressions.
        query_splits: splits that are scored; empty means every other. Where the shards hold a single split, a third of
            it, chosen by a hash of the sample's key, is the queries.
        neighbours: voters of the kNN; each weighs exp(cosine / 0.07), 1 is the plain nearest neighbour.
        batch: maps per forward pass.
        baselines: measure the same network untrained and raw pixels too, on the same maps.
        bootstrap: resamples of the query maps behind the intervals.
        seed: of the bootstrap, of the choice below and of an export's untrained twin.
        max_gallery: most gallery maps used, chosen at random.
        max_queries: most query maps used, chosen at random.
        device: ``auto`` (cuda where there is one), ``cuda`` or ``cpu``.
    """

    encoder: str
    shards: str | list[str]
    out: str | None = None
    size: int | None = None
    gallery_splits: list[str] = field(default_factory=lambda: ["train"])
    query_splits: list[str] = field(default_factory=list)
    neighbours: int = 20
    batch: int = 64
    baselines: bool = True
    bootstrap: int = 1000
    seed: int = 0
    max_gallery: int = 8192
    max_queries: int = 4096
    device: Literal["auto", "cuda", "cpu"] = "auto"


def _prepared(encoder: Encoder, shards: DepthShards, indices, size: int, batch: int) -> Iterator[tuple]:
    """(indices, inputs, depth), both (batch, 1, size, size), decoded by two threads ahead of the encoder."""

    def load(index: int):
        depth_map, meta = shards.sample(int(index))
        valid = torch.from_numpy(depth_map.valid)
        depth = fit_square(torch.from_numpy(depth_map.depth), valid, size)
        return encoder.prepare(depth_map, size), depth

    parts = [indices[start : start + batch] for start in range(0, len(indices), batch)]
    with ThreadPoolExecutor(2) as pool:
        ahead = [pool.submit(load, index) for index in parts[0]]
        for number, part in enumerate(parts):
            pending, following = ahead, parts[number + 1 : number + 2]
            ahead = [pool.submit(load, index) for index in following[0]] if following else []
            images, depth = zip(*[task.result() for task in pending], strict=True)
            yield part, torch.stack(images), torch.stack(depth)


@torch.inference_mode()
def collect_features(encoder: Encoder, shards: DepthShards, indices, size: int | None = None, batch: int = 64) -> dict:
    """Features of chosen maps, on the CPU.

    Returns:
        ``classes`` (maps, dim), ``patches`` (maps, rows, columns, dim), ``images`` (maps, 1, size, size) as the network
        sees them, ``depth`` of the same shape in the maps' units, 0 where missing.

    Raises:
        DataError: a feature is not finite.
    """
    device, collected = next(encoder.parameters()).device, []
    for part, images, depth in _prepared(encoder, shards, indices, size or encoder.size, batch):
        classes, patches = _finite(encoder(images.to(device)), encoder.name, shards, part)
        collected.append((classes.cpu(), patches.cpu(), images, depth))
    names = ("classes", "patches", "images", "depth")
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*collected, strict=True), strict=True)}


def _finite(features: tuple[Tensor, Tensor], name: str, shards: DepthShards, indices) -> tuple[Tensor, Tensor]:
    good = features[0].isfinite().all(1) & features[1].isfinite().flatten(1).all(1)
    if not good.all():
        key = shards.key(int(indices[int(good.int().argmin())]))
        raise DataError(f"{name}: features of {int((~good).sum())} maps are NaN or infinite, first of sample {key}")
    return features


def choose_maps(shards: DepthShards, config: ProbeConfig) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the gallery and of the query maps.

    Raises:
        ConfigError: a split does not exist or is on both sides.
        DataError: a side has fewer than two maps.
    """
    splits = shards.values("split")
    found, where = sorted(set(splits)), ", ".join(map(str, shards.folders))
    if len(found) == 1:
        digests = [hashlib.sha256(shards.key(index).encode()).digest() for index in range(len(shards))]
        is_query = np.array([digest[0] % 3 == 0 for digest in digests])
        is_gallery = ~is_query
    else:
        if unknown := sorted({*config.gallery_splits, *config.query_splits} - set(found)):
            raise ConfigError(f"{where}: no split {unknown[0]!r}; found {', '.join(found)}")
        if both := sorted(set(config.gallery_splits) & set(config.query_splits)):
            raise ConfigError(f"split {both[0]!r} is in both gallery_splits and query_splits")
        is_gallery = np.isin(splits, config.gallery_splits)
        is_query = np.isin(splits, config.query_splits) if config.query_splits else ~is_gallery
    chosen, random = [], np.random.default_rng(config.seed)
    for name, mask, most in (("gallery", is_gallery, config.max_gallery), ("query", is_query, config.max_queries)):
        indices = np.sort(random.permutation(np.flatnonzero(mask))[:most])
        if len(indices) < 2:
            raise DataError(f"{where}: {len(indices)} {name} maps among splits {', '.join(found)}; 2 are needed")
        chosen.append(indices)
    return chosen[0], chosen[1]


def label_maps(shards: DepthShards, gallery: np.ndarray, queries: np.ndarray) -> tuple[list[str], Tensor, Tensor]:
    """Categories, and the class numbers of gallery and query maps; a category may come from several datasets.

    Raises:
        DataError: a query's category has no gallery map, or there is one category only.
    """
    names = shards.values("category")[[*gallery, *queries]].tolist()
    known, asked = set(names[: len(gallery)]), set(names[len(gallery) :])
    if missing := sorted(asked - known):
        raise DataError(f"query category {missing[0]!r} has no map in the gallery ({len(missing)} such categories)")
    if len(known) < 2:
        raise DataError(f"all maps are of category {names[0]!r}: kNN by category needs at least two")
    categories = sorted(known)
    numbers = torch.tensor([categories.index(name) for name in names])
    return categories, numbers[: len(gallery)], numbers[len(gallery) :]


Encode = Callable[[Tensor, np.ndarray], tuple[Tensor, Tensor, Tensor]]


def _encoders(trained: Encoder, random: Encoder | None, shards: DepthShards) -> dict[str, Encode]:
    """For each source, inputs -> two kNN vectors (batch, dim) and patch features (batch, rows, columns, dim)."""
    patch = trained.patch_size

    def network(encoder: Encoder) -> Encode:
        def encode(images: Tensor, indices: np.ndarray):
            classes, patches = _finite(encoder(images), encoder.name, shards, indices)
            return classes, patches.mean((1, 2)), patches

        return encode

    def pixels(images: Tensor, indices: np.ndarray):
        vector = F.adaptive_avg_pool2d(images, PIXEL_GRID).flatten(1)
        rows = images.shape[-1] // patch
        return vector, vector, F.unfold(images, patch, stride=patch).mT.unflatten(1, (rows, rows))

    if random is None:
        return {"trained": network(trained)}
    return {"trained": network(trained), "random": network(random), "pixels": pixels}


@torch.inference_mode()
def probe_encoders(trained: Encoder, random: Encoder | None, config: ProbeConfig) -> dict:
    """Compares an encoder with its untrained twin, where there is one, and raw pixels; the result of :func:`probe`."""
    start = time.monotonic()
    size, device = config.size or trained.size, next(trained.parameters()).device
    shards = DepthShards(config.shards, [])
    gallery, queries = choose_maps(shards, config)
    categories, gallery_labels, query_labels = label_maps(shards, gallery, queries)
    encoders = _encoders(trained, random, shards)
    vectors = {source: ([], []) for source in encoders}
    moments = {}
    weights, hits, sums = {}, {}, {source: [] for source in encoders}
    usable_patches = 0

    with Progress("probe", len(gallery) + len(queries), "maps") as progress:
        for part, images, depth in _prepared(trained, shards, gallery, size, config.batch):
            targets, usable = patch_geometry(depth.to(device), trained.patch_size)
            chooses = torch.from_numpy(np.searchsorted(gallery, part) % HELD_OUT == 0).to(device)
            for source, encode in encoders.items():
                *knn_vectors, patches = encode(images.to(device), part)
                for kept, vector in zip(vectors[source], knn_vectors, strict=True):
                    kept.append(vector)
                fit, choose = moments.setdefault(source, [Moments(patches.shape[-1], 4) for _ in range(2)])
                fit.add(*(table[usable & ~chooses[:, None, None]] for table in (patches, targets)))
                choose.add(*(table[usable & chooses[:, None, None]] for table in (patches, targets)))
            progress.advance(len(part))
        for source, kept in vectors.items():
            vectors[source] = [torch.cat(parts) for parts in kept]
            weights[source] = fit_ridge(*moments[source]).to(device)
            hits[source] = [[], []]
        labels = gallery_labels.to(device)
        for first, (part, images, depth) in enumerate(_prepared(trained, shards, queries, size, config.batch)):
            targets, usable = patch_geometry(depth.to(device), trained.patch_size)
            answers = query_labels[first * config.batch :][: len(part)].to(device)
            for source, encode in encoders.items():
                *knn_vectors, patches = encode(images.to(device), part)
                for kept, gallery_vectors, vector in zip(hits[source], vectors[source], knn_vectors, strict=True):
                    voted = knn(gallery_vectors, labels, vector, config.neighbours, len(categories))
                    kept.append((voted == answers).cpu())
                predicted = patches.double() @ weights[source][:-1] + weights[source][-1]
                sums[source].append(patch_sums(predicted, targets.double(), usable).cpu())
            usable_patches += int(usable.sum())
            progress.advance(len(part))

    rows = {source: query_rows([torch.cat(part) for part in hits[source]], sums[source]) for source in encoders}
    figures = bootstrap(rows, config.bootstrap, config.seed)
    for name, title in FIGURES.items():
        if not all(np.isfinite([*interval.values()]).all() for interval in figures[name].values()):
            raise DataError(f"{title} is undefined: too few query patches, or all with the same surface")
    return {
        "encoder": trained.name,
        "beside": random.name if random else None,
        "size": size,
        "patch_size": trained.patch_size,
        "dim": trained.dim,
        "gallery_maps": len(gallery),
        "query_maps": len(queries),
        "categories": categories,
        "chance": 1 / len(categories),
        "queries_seen_in_training": _seen(config.encoder, shards, queries),
        "patches": {"gallery": moments["trained"][0].count + moments["trained"][1].count, "query": usable_patches},
        "figures": figures,
        "config": asdict(config),
        "seconds": time.monotonic() - start,
    }


def _seen(source: str, shards: DepthShards, queries: np.ndarray) -> int | None:
    """How many query maps the run trained on; None if the encoder is of no run, which does not tell."""
    run = _run_of(source)
    return count_seen(load_config(PretrainConfig, run / "config.yaml").data, shards, queries) if run else None


def count_seen(data: DataConfig, shards: DepthShards, queries: np.ndarray) -> int:
    """How many of the maps ``queries`` of ``shards`` a run with these data trains on."""
    folders = [data.shards] if isinstance(data.shards, str) else data.shards
    trained = {location(folder).resolve() for folder in folders}
    splits = shards.values("split")
    return sum(
        shards.folder(index).resolve() in trained and (not data.splits or splits[index] in data.splits)
        for index in queries
    )


def _run_of(source: str) -> Path | None:
    """The run that ``source`` is, or is a file of (``RUN/checkpoints/best.pt``); None if it is neither."""
    run = Path(source).absolute().parent.parent if source.endswith(".pt") else Path(source)
    return run if (run / "config.yaml").is_file() else None


def _load(source: str) -> Encoder:
    if not source.endswith(".pt"):
        return checkpoint.load_encoder_or_run(source)
    if (run := _run_of(source)) is None:
        raise ConfigError(f"{source}: no file of a run folder (../config.yaml is missing)")
    state = checkpoint.load(Path(source))
    encoder = checkpoint.load_run_encoder(run, random_initialization=True)
    checkpoint.load_backbone(encoder.backbone, state["teacher"], Path(source))
    encoder.name = f"{run.name}, step {state['step']}"
    return encoder


def load_with_twin(source: str, seed: int = 0, size: int | None = None) -> tuple[Encoder, Encoder]:
    """A frozen encoder and the same network at random initialisation.

    Of a run, the twin is the network the run began with. Exports do not record how they were initialised: their twin
    is a new network of the same sizes, drawn with ``seed`` in DINO-v2's way, its positions at the grid of ``size``.

    Raises:
        ConfigError: ``source`` is no run, export or Hub repository.
        DataError: its weights do not fit its configuration.
    """
    trained = _load(source)
    if run := _run_of(source):
        return trained, checkpoint.load_run_encoder(run, random_initialization=True)
    torch.manual_seed(seed)
    twin = DepthTransformer(trained.backbone.config, size or trained.size)
    return trained, Encoder(twin, trained.normalization, "random initialisation", trained.size)


def probe(config: ProbeConfig) -> dict:
    """Probes an encoder, prints the table and writes ``config.out``; see :class:`ProbeConfig`.

    Raises:
        ConfigError: the encoder, a split or the output path cannot work.
        DataError: too few maps or categories, or features that are not finite.
    """
    if config.neighbours < 1 or config.batch < 1 or config.bootstrap < 1:
        raise ConfigError("neighbours, batch and bootstrap must be at least 1")
    device = pick_device(config.device)
    if config.baselines:
        trained, random = (encoder.to(device) for encoder in load_with_twin(config.encoder, config.seed, config.size))
    else:
        trained, random = _load(config.encoder).to(device), None
    result = probe_encoders(trained, random, config)
    print_table(result)
    if config.out:
        path = Path(config.out)
        partial = path.with_name(path.name + ".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            raise ConfigError(f"--out {path}: {error.strerror}") from None
    return result
