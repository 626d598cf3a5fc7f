"""``dino-depth export MODEL --onnx``: encoders and head of a model as one graph for ONNX Runtime.

    MODEL/onnx/model.onnx     normalised inputs -> the head's maps, for the model's views at the model's sizes
    MODEL/onnx/deploy.json    what goes in and comes out, what stays outside, how far ONNX Runtime is from the model

The graph goes from what ``FrozenEncoder.prepare`` gives to what the head's ``score`` gives, by way of the encoders, the
rounding of features to float16, their standardisation and the head. A head takes part that offers ``graph``.
"""

import importlib.metadata
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from dino_depth import __version__
from dino_depth.anomaly.dataset import Sample, View, given
from dino_depth.anomaly.features import SampleFeatures, camera_matrix
from dino_depth.anomaly.heads import names, open_head
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, GateError, ReportedError
from dino_depth.inspection.inspector import Inspector
from dino_depth.inspection.model_folder import file_sha256
from dino_depth.inspection.parts import CATEGORY, read_parts
from dino_depth.onnx_file import OnnxFile, require_onnx, save_onnx

__all__ = ["DeployConfig", "Deployed", "deploy", "encoder_inputs"]

FORMAT = 1
GRAPH, REPORT = "model.onnx", "deploy.json"
INSIDE = (
    "encoders", "rounding of features to float16", "standardisation of features (prepare.standardize)", "head",
)  # fmt: skip
OUTSIDE = {
    "before": (
        "reading, and the foreground of each view",
        "registration: image and depth are moved to where the training part lay (prepare.registration)",
        "each encoder's input: normalisation, padding to a centred square, resizing (FrozenEncoder.prepare)",
    ),
    "after": (
        "an instance score of the head's own, such as patchcore.reweight",
        "moving maps back to the pixels they were measured at, and smoothing them (prepare.smoothing)",
        "upsampling, the foreground, joining modalities, the voxel volume",
        "threshold, decision, defects",
    ),
}
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "timm", "transformers")
TIMED = 2  # runs, of which the faster counts


@dataclass
class DeployConfig:
    """Export a model's encoders and head as one graph; publish nothing that computes something else.

    Attributes:
        model: folder of the model.
        out: folder for the graph; by default ``onnx`` in the model's.
        onnx: the form: MODEL/onnx/model.onnx and deploy.json.
        scans: folder of scans, as for ``predict``, on which parity and time are measured; by default a drawn pattern.
        samples: how many of them, the first ones.
        tolerance: largest difference of any cell of a map that passes; of maps with values above 1, as a share of
            their largest.
    """

    model: str
    out: str = ""
    onnx: bool = False
    scans: str = ""
    samples: int = 1
    tolerance: float = 1e-4


class Deployed(nn.Module):
    """From the inputs of every encoder to the head's maps.

    Args:
        inspector: the model.

    Raises:
        ConfigError: its head offers no graph.
    """

    def __init__(self, inspector: Inspector):
        super().__init__()
        model, store = inspector.model, inspector.store
        if not hasattr(model.method, "graph"):
            able = ", ".join(name for name in names() if hasattr(open_head(name), "graph"))
            raise ConfigError(
                f"head {inspector.head} cannot be exported, it is more than a network of features: fit one of {able}, "
                "or run dino-depth predict, or Inspector from Python, where the scans are"
            )
        self._encoders, self._standard = store.encoders, model.standard
        self._maps = model.method.graph(model.head)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """The maps (V, n, n) by name.

        Args:
            inputs: (V, channels, size, size) of each encoder, as stacked ``FrozenEncoder.prepare``, image first.
        """
        features = {}
        for (modality, encoder), batch in zip(self._encoders.items(), inputs, strict=True):
            rounded = encoder.to_features(batch).float().half().float()  # as FeatureStore rounds them
            features[modality] = self._standard(rounded, modality, 0) if self._standard is not None else rounded
        empty = next(iter(features.values()))[..., :0]
        return self._maps(features.get("image", empty), features.get("depth", empty))


def deploy(config: DeployConfig) -> None:
    """Writes the graph; a failed gate leaves only its ``deploy.json`` there.

    Raises:
        ConfigError: no form is asked for, the head has no graph, a package is missing, or ``out`` holds something else.
        DataError: it is no model, or a scan cannot be read.
        GateError: ONNX Runtime computes other maps.
        ReportedError: torch cannot export an encoder, or ``out`` cannot be written.
    """
    if not config.onnx:
        raise ConfigError(f"export {config.model} is a model of dino-depth fit: say --onnx, the only form it has")
    if config.samples < 1 or not config.tolerance >= 0:
        raise ConfigError(
            f"--samples must be at least 1 and --tolerance not negative, got {config.samples} and {config.tolerance}"
        )
    require_onnx()
    out = Path(config.out or Path(config.model) / "onnx")
    if out.exists() and (not out.is_dir() or any(path.name != REPORT for path in out.iterdir())):
        raise ConfigError(f"--out {out}: is there already and not empty; remove it or name a new folder")
    inspector = Inspector.load(config.model, "cpu")
    deployed = Deployed(inspector)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as staging:
        folder = Path(staging) / "export"  # of the usual permissions, unlike the one around it
        folder.mkdir()
        report = _written(folder, deployed, inspector, config)
        (folder / REPORT).write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        parity = report["parity"]
        if not parity["passed"]:
            out.mkdir(exist_ok=True)
            shutil.move(folder / REPORT, out / REPORT)
            found = "not finite" if parity["difference"] is None else f"{parity['difference']:.2e}"
            raise GateError(
                f"{out / REPORT}: nothing exported: the largest difference of ONNX Runtime's maps is {found}; "
                f"tolerance {config.tolerance:.2e}"
            )
        (out / REPORT).unlink(missing_ok=True)
        os.rename(folder, out)
    seconds = report["seconds"]
    print(
        f"{out / GRAPH}: largest difference {parity['difference']:.1e}; {seconds['onnxruntime']:.2f} s a scan, "
        f"torch {seconds['torch']:.2f} s; what stays outside: {out / REPORT}"
    )


def _written(folder: Path, deployed: Deployed, inspector: Inspector, config: DeployConfig) -> dict[str, Any]:
    """Writes the graph, and the content of deploy.json."""
    inputs, expected = next(_cases(inspector, config))
    path = folder / GRAPH
    try:
        examples = {name: torch.zeros_like(part) for name, part in inputs.items()}
        save_onnx(path, deployed, examples, [f"{name}_map" for name in expected])
    except Exception as error:  # noqa: BLE001 - torch raises what the traced code makes its parts raise
        encoders = ", ".join(encoder.name for encoder in inspector.store.encoders.values())
        cause = error.__cause__ or error
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        raise ReportedError(f"{inspector.head} with {encoders} cannot be exported to ONNX: {reason}") from error
    session = OnnxFile(path, torch.get_num_threads())
    parity, seconds = _compared(session, inspector, deployed, config)
    return {
        "format": FORMAT,
        "files": {file.name: file_sha256(file) for file in sorted(folder.iterdir())},
        "head": inspector.title,
        "views": list(inspector.names),
        "inputs": {
            name: {
                "shape": list(part.shape),
                "encoder": getattr(inspector.config.encoder, name),
                "fingerprint": inspector.store.encoders[name].fingerprint,
            }
            for name, part in inputs.items()
        },
        "outputs": {f"{name}_map": {"shape": list(part.shape)} for name, part in expected.items()},
        "inside": list(INSIDE),
        "outside": {when: list(stages) for when, stages in OUTSIDE.items()},
        "parity": parity,
        "seconds": seconds,
        "versions": {"dino_depth": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def _compared(
    session: OnnxFile, inspector: Inspector, deployed: Deployed, config: DeployConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How far the maps are from the model's, and how long either takes for a scan."""
    maps: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {"torch": [], "onnxruntime": []}
    finite, count = True, 0
    for inputs, expected in _cases(inspector, config):
        count += 1
        found = [_clocked(times["onnxruntime"], session, **inputs) for _ in range(TIMED)][0]
        with torch.inference_mode():
            for _ in range(TIMED):
                _clocked(times["torch"], deployed, *inputs.values())
        for name, part in expected.items():
            apart, largest = float((found[f"{name}_map"] - part).abs().max()), float(part.abs().max())
            finite &= bool(np.isfinite([apart, largest]).all())
            known = maps.setdefault(name, {"max_abs": 0.0, "largest": 0.0, "difference": 0.0})
            for key, value in (("max_abs", apart), ("largest", largest), ("difference", apart / max(1.0, largest))):
                known[key] = max(known[key], value)
    difference = max(known["difference"] for known in maps.values()) if finite else None
    parity = {
        "passed": difference is not None and difference <= config.tolerance,
        "difference": difference,
        "tolerance": config.tolerance,
        "maps": maps if finite else None,
        "meaning": "max_abs of ONNX Runtime's maps from the model's, over the largest value where that exceeds 1",
        "rounding": "features are rounded to float16 in the graph as in the model; a feature at the border of two such "
        "numbers may go to either, which is part of the difference",
        "inputs": f"the first {count} of the scans given" if config.scans else "a pattern at the part's distance",
        "device": "cpu",
        "dtype": "float32",
    }
    seconds = {name: min(values) for name, values in times.items()}
    return parity, {
        **seconds,
        "threads": torch.get_num_threads(),
        "meaning": "inputs to maps of a scan, the fastest run",
    }


def _clocked(times: list[float], run: Callable[..., dict[str, Tensor]], *inputs: Tensor, **named: Tensor) -> Any:
    start = time.perf_counter()
    found = run(*inputs, **named)
    times.append(time.perf_counter() - start)
    return found


@torch.inference_mode()
def _cases(inspector: Inspector, config: DeployConfig) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The graph's inputs of each scan, and the maps that the model has for it."""
    model, store = inspector.model, inspector.store
    if config.scans:
        for sample in read_parts(config.scans, inspector.rig)[1][: config.samples]:
            views = model.prepare(inspector.views(sample)).views  # as they lie after registration
            yield encoder_inputs(inspector, views.sample), model.method.score(model.head, views)
        return
    sample = _pattern(inspector)
    found = store.get(sample, lambda view: np.ones(sample.views[view].read_depth().depth.shape, bool))
    features = {
        name: getattr(found, name) if model.standard is None else model.standard(getattr(found, name), name, 0)
        for name in ("image", "depth")
    }
    yield (
        encoder_inputs(inspector, sample),
        model.method.score(model.head, SampleFeatures(**features, share=found.share)),
    )


def encoder_inputs(inspector: Inspector, sample: Sample) -> dict[str, Tensor]:
    """(V, channels, size, size) float32 for each encoder."""
    prepared: dict[str, Tensor] = {}
    for modality, encoder in inspector.store.encoders.items():
        size, rows = inspector.store.sizes[modality], []
        for view in sample.views:
            depth = view.read_depth()
            pixels = view.read_image() if modality == "image" else depth
            rows.append(encoder.prepare(pixels, size, camera_matrix(view, depth.depth.shape)))
        prepared[modality] = torch.stack(rows)
    return prepared


def _pattern(inspector: Inspector) -> Sample:
    """A scan drawn from a seed: stains on a relief, at the distance of the part and in the size of the cameras."""
    random, views = np.random.default_rng(0), []
    for name, distance in zip(inspector.names, inspector.expected["distance"], strict=True):
        camera = inspector.rig.cameras.get(name)
        shape = (256, 256) if camera is None else (camera.height, camera.width)
        image, relief = (ndimage.gaussian_filter(random.normal(size=shape), min(shape) / 32) for _ in range(2))
        pixels = (255 * (image - image.min()) / np.ptp(image)).astype(np.uint8)
        depth = DepthMap.from_values((distance * (1 + 0.05 * relief / np.abs(relief).max())).astype(np.float32))
        views.append(View(name, given(pixels), given(depth), camera))
    return Sample(CATEGORY, "pattern", "test", "unknown", None, tuple(views), given(None))
