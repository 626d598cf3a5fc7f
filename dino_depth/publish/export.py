"""Exports a run's teacher as folders that transformers, timm and :func:`dino_depth.load_encoder` load in one line.

    OUT/transformers   Dinov2Model with one channel, model card, provenance; Dinov2WithRegistersModel with registers,
                       DINOv3ViTModel with rotary positions
    OUT/timm           the same weights under timm's names
    OUT/onnx           on request
    OUT/torch_export   on request
    OUT/parity.json    how far they are from the training model on real maps

A learned position embedding is resized once, here, to the grid the encoder is used at: off that grid every library
resizes it differently, on it they agree to the last bit. Everything is written beside OUT and moved there in one step
after the parity gate has passed.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from dino_depth import __version__
from dino_depth import checkpoint as checkpoints
from dino_depth.config import PretrainConfig, load_config
from dino_depth.depth import DepthMap
from dino_depth.encoder import Encoder, load_encoder
from dino_depth.errors import ConfigError, DataError, GateError, ReportedError
from dino_depth.onnx_file import require_onnx
from dino_depth.pretrain.in_loop import choose_checkpoint
from dino_depth.pretrain.run_folder import library_versions
from dino_depth.progress import Progress
from dino_depth.publish.model_card import Subject, TrainingData, license_text, training_data, write_json, write_papers
from dino_depth.publish.model_folders import (
    write_onnx,
    write_timm,
    write_torch_export,
    write_transformers,
)
from dino_depth.publish.parity import Model, compare, worst
from dino_depth.resample import fit_square
from dino_depth.shards import DepthShards
from dino_depth.vit import DepthTransformer, resize_position_embedding

__all__ = ["ExportConfig", "export"]


@dataclass
class ExportConfig:
    """Export a run's teacher for transformers, timm and dino_depth; publish nothing that computes something else.

    Attributes:
        run: run folder.
        out: folder for the export; must be empty or new.
        checkpoint: ``last``, ``best`` (by the probes during training, see ``train.evaluate_every``), a step, or a file.
        image_size: side of the input the export is made for, pixels; the position embedding is stored at this size.
        shards: shard folder, or a list of them, with the maps of the parity gate; by default the run's.
        samples: maps the gate compares on, spread over the shards.
        tolerance: largest absolute difference of any class or patch feature that passes the gate.
        onnx: also write OUT/onnx/model.onnx, with any batch size.
        torch_export: also write OUT/torch_export/model.pt2 for torch.export.load, with any batch size.
        push_to_hub: repository (owner/name) for the transformers folder; the timm folder goes to owner/name-timm.
        private: make those repositories private.
        license: Hub identifier of the weights' licence.
    """

    run: str
    out: str
    checkpoint: str = "last"
    image_size: int = 896
    shards: str | list[str] = ""
    samples: int = 8
    tolerance: float = 1e-5
    onnx: bool = False
    torch_export: bool = False
    push_to_hub: str | None = None
    private: bool = False
    license: str = "apache-2.0"


@dataclass(frozen=True)
class _Teacher:
    """The encoder as it was trained, and where it comes from."""

    encoder: Encoder
    config: PretrainConfig
    checkpoint: Path
    step: int
    choice: dict


def export(config: ExportConfig) -> None:
    """Writes ``config.out``; a failed gate leaves only its ``parity.json`` there.

    Raises:
        ConfigError: a value is out of range, ``out`` is not empty, ``run`` has no checkpoint, a package is missing.
        DataError: the checkpoint or the shards are unreadable.
        GateError: the weights are not finite, or an exported form computes other features.
        ReportedError: ``out`` cannot be written, or the upload failed (the folder is complete then).
    """
    _check(config)
    out = Path(os.path.abspath(config.out))
    teacher = _read_teacher(config)
    weights = _deployed_weights(teacher, config.image_size)
    gate_shards, data = _open_shards(config, teacher.config)
    with _staging(out) as folder:
        models = _write_models(folder, teacher, weights, config)
        parity = _measure(models, teacher.encoder, gate_shards, config)
        if not parity["passed"]:
            out.mkdir(exist_ok=True)
            write_json(out / "parity.json", parity)
            name, difference = worst(parity)
            found = "not finite" if difference is None else f"{difference:.2e}"
            raise GateError(
                f"{out / 'parity.json'}: nothing exported: the largest difference, of {name}, is {found}; "
                f"tolerance {config.tolerance:.2e}"
            )
        subject = Subject(
            teacher.config, teacher.step, config.image_size, config.license, data, parity, teacher.choice,
            config.push_to_hub,
        )  # fmt: skip
        write_papers(folder, subject, Path(config.run), teacher.checkpoint)
        (out / "parity.json").unlink(missing_ok=True)
        os.rename(folder, out)
    name, difference = worst(parity)
    print(f"{out}: step {teacher.step} for {config.image_size} px; largest difference {difference:.1e} ({name})")
    if config.push_to_hub:
        _push(config, out)


def _check(config: ExportConfig):
    """Refuses what cannot work before anything is computed."""
    if not config.out:
        raise ConfigError("--out is missing: name the folder for the export")
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: not a folder")
    # A failed gate leaves its report; trying again replaces it.
    if out.is_dir() and any(path.name != "parity.json" for path in out.iterdir()):
        raise ConfigError(f"--out {out}: folder is not empty")
    if config.samples < 1:
        raise ConfigError(f"--samples must be at least 1, got {config.samples}")
    if not config.tolerance >= 0:
        raise ConfigError(f"--tolerance must not be negative, got {config.tolerance}")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", config.license):
        raise ConfigError(f"--license {config.license!r}: not a licence identifier of the Hub, such as apache-2.0")
    license_text(config.license)
    if config.onnx:
        require_onnx()
    if config.push_to_hub:
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        try:
            validate_repo_id(f"{config.push_to_hub}-timm")
        except HFValidationError as error:
            raise ConfigError(f"--push-to-hub {config.push_to_hub}: {error}") from None


def _read_teacher(config: ExportConfig) -> _Teacher:
    run = Path(config.run)
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: no run folder (config.yaml is missing)")
    run_config = load_config(PretrainConfig, run / "config.yaml")
    patch_size = run_config.model.patch_size
    if config.image_size < patch_size or config.image_size % patch_size:
        near = max(1, round(config.image_size / patch_size)) * patch_size
        raise ConfigError(f"--image_size {config.image_size} is no multiple of the patch size {patch_size}; use {near}")
    path, choice = choose_checkpoint(run, config.checkpoint)
    state = checkpoints.load(path)
    backbone = DepthTransformer(run_config.model, run_config.crops.global_size)
    checkpoints.load_backbone(backbone, state["teacher"], path)
    for name, tensor in backbone.state_dict().items():
        if not tensor.isfinite().all():
            raise GateError(f"{path}: weight {name} is not finite; nothing exported")
    name = f"{run.name}, step {state['step']}"
    encoder = Encoder(backbone, run_config.data.normalization, name, config.image_size)
    return _Teacher(encoder, run_config, path, state["step"], choice)


def _deployed_weights(teacher: _Teacher, image_size: int) -> dict[str, Tensor]:
    """The backbone's weights, with a learned position embedding at the deployment grid."""
    weights = dict(teacher.encoder.backbone.state_dict())
    side = image_size // teacher.encoder.patch_size
    if "pos_embed" in weights:
        weights["pos_embed"] = resize_position_embedding(weights["pos_embed"], (side, side))
    return weights


def _open_shards(config: ExportConfig, run_config: PretrainConfig) -> tuple[DepthShards, TrainingData | None]:
    """The maps of the gate, and what the run was trained on if that is still there."""
    if not config.shards:
        shards = DepthShards.configured(run_config.data)
        return shards, training_data(shards)
    try:
        data = training_data(DepthShards.configured(run_config.data))
    except (ConfigError, DataError):
        data = None
    return DepthShards(config.shards), data


@contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """An empty folder on ``out``'s file system, gone at the end unless it was moved away."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent, ignore_cleanup_errors=True) as outer:
            # A temporary folder is private to its owner; the one inside it has the usual permissions.
            inner = Path(outer) / "export"
            inner.mkdir()
            yield inner
    except (OSError, SafetensorError) as error:
        raise ReportedError(f"--out {out}: the export cannot be written: {error}") from error


def _write_models(folder: Path, teacher: _Teacher, weights: dict, config: ExportConfig) -> dict[str, Model]:
    """Writes every form of the encoder and loads it back; with the training model, by name."""
    from transformers import AutoImageProcessor

    description = {
        "normalization": asdict(teacher.config.data.normalization),
        "missing_value": 0.0,
        "depth_unit": "metre",
        "step": teacher.step,
        "version": __version__,
    }
    sizes = teacher.config.model
    transformers = write_transformers(folder / "transformers", weights, sizes, config.image_size, description)
    timm = write_timm(folder / "timm", weights, sizes, config.image_size, config.license)
    # Every route begins with the same depth and prepares it as its users do.
    ours, processor = load_encoder(folder), AutoImageProcessor.from_pretrained(folder / "transformers")
    models = {
        "training": _prepared(teacher.encoder, teacher.encoder.backbone.forward_features),
        "transformers": lambda depth: transformers(**processor(depth[0])).last_hidden_state,
        "timm": _prepared(ours, timm.forward_features),
        "dino_depth": _prepared(ours, ours.backbone.forward_features),
    }
    normalization = teacher.config.data.normalization
    if config.onnx:
        models["onnx"] = write_onnx(folder / "onnx", transformers, normalization)
    if config.torch_export:
        models["torch_export"] = write_torch_export(folder / "torch_export", transformers, normalization)
    return models


def _prepared(encoder: Encoder, network: Model) -> Model:
    return lambda depth: network(encoder.prepare(DepthMap.from_values(depth[0, 0].numpy()))[None])


def _measure(models: dict[str, Model], encoder: Encoder, shards: DepthShards, config: ExportConfig) -> dict:
    """The parity report on maps spread evenly over the shards."""
    count = min(config.samples, len(shards))
    chosen = [round(place * (len(shards) - 1) / max(count - 1, 1)) for place in range(count)]
    keys = []

    def maps(progress: Progress) -> Iterator[Tensor]:
        for index in chosen:
            depth_map, meta = shards.sample(index)
            keys.append(meta["key"])
            yield _square(depth_map, config.image_size)
            progress.advance()

    with Progress("parity", count, "maps") as progress:
        report = compare(models, maps(progress), config.tolerance)
    return {
        **report,
        "tolerance": config.tolerance,
        "image_size": config.image_size,
        "trained_size": encoder.backbone.patch_embed.img_size[0],
        "dtype": "float32",
        "device": "cpu",
        "attention": "scaled_dot_product_attention in the training model, transformers and timm",
        "samples": count,
        "keys": keys,
        "versions": library_versions(),
    }


def _square(depth_map: DepthMap, size: int) -> Tensor:
    """(1, size, size) depth, 0 where missing; the median of a relative map, which has no unit, stands for a metre."""
    unit = 1.0 if depth_map.kind == "metric" else float(np.median(depth_map.depth[depth_map.valid]))
    return fit_square(torch.from_numpy(depth_map.depth / np.float32(unit)), torch.from_numpy(depth_map.valid), size)


def _push(config: ExportConfig, out: Path):
    """Uploads the folders; what the Hub or the network answers becomes one line."""
    from huggingface_hub import HfApi

    hub = HfApi(library_name="dino-depth", library_version=__version__)
    uploads = [(config.push_to_hub, "transformers", "."), (f"{config.push_to_hub}-timm", "timm", ".")]
    for name, asked in (("onnx", config.onnx), ("torch_export", config.torch_export)):
        if asked:
            uploads.append((config.push_to_hub, name, name))
    for place, (repository, folder, target) in enumerate(uploads):
        try:
            hub.create_repo(repository, private=config.private, exist_ok=True)
            hub.upload_folder(
                repo_id=repository, folder_path=out / folder, path_in_repo=target, commit_message="dino-depth export"
            )
        except Exception as error:  # noqa: BLE001 - besides its own errors the client lets its HTTP library's through
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            left = [f"`hf upload {name} {out / source} {where}`" for name, source, where in uploads[place:]]
            raise ReportedError(
                f"--push-to-hub {repository}: {reason}; the export is complete, upload it later: {', '.join(left)}"
            ) from error
        print(f"{out / folder} is at https://huggingface.co/{repository}")
