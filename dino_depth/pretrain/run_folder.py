"""The files of a run: resolved configuration, environment, log, metrics and TensorBoard events."""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from dino_depth import __version__, distributed
from dino_depth.config import PretrainConfig, load_config, save_config
from dino_depth.errors import ConfigError, DataError
from dino_depth.lock import EXCLUSIVE, locked
from dino_depth.shards import DepthShards
from dino_depth.terminal import TerminalWarnings
from dino_depth.urls import redacted

__all__ = ["RunFolder", "git_revision", "library_versions"]

# Settings that do not change what is computed, and may differ between a run and its resumption.
FREE = {
    "out", "resume", "data.shards", "data.cache", "data.cache_gib", "data.workers", "data.resident", "model.attention",
    "train.checkpoint_every", "train.keep", "train.log_every", "train.evaluate_every", "train.threads", "train.timeout",
    "train.device", "train.compile",
}  # fmt: skip
LOCK = ".lock"
REQUEUE_SECONDS = 120.0  # an NFS server forgets a lost client after 90
PACKAGES = (
    "torch",
    "timm",
    "transformers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "xformers",
    "onnxruntime",
)


def library_versions() -> dict[str, str]:
    """Versions of those of ``PACKAGES`` that are installed."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def git_revision() -> str:
    """The commit of the checkout this package runs from, or "unknown" (installed, perhaps inside another checkout)."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _flat(mapping: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in mapping.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


class RunFolder:
    """Opens a run's folder for writing; only rank 0 writes.

    Args:
        config: the resolved configuration.
        shards: the data; a resumed run must see the same samples.

    Raises:
        ConfigError: the folder is not empty and ``resume`` is not set, a setting changed since the run began, or
            another process trains in it.
        DataError: the shards changed since the run began.
    """

    def __init__(self, config: PretrainConfig, shards: DepthShards):
        if not config.out:
            raise ConfigError("--out is missing: name the run folder")
        self.path = Path(config.out)
        self.writes = distributed.rank() == 0
        started = (self.path / "config.yaml").is_file()
        if config.resume and started:
            self._check_unchanged(config, shards)
        elif not config.resume and self.path.exists() and any(path.name != LOCK for path in self.path.iterdir()):
            raise ConfigError(f"--out {self.path}: folder is not empty; use --resume to continue the run in it")
        self._held = contextlib.ExitStack()
        if self.writes:
            busy = f"--out {self.path}: another process is training in this folder; wait for it or end it"
            # A requeued job may start before its predecessor, or the lock of a node that was lost, is gone.
            patience = REQUEUE_SECONDS if os.environ.get("SLURM_RESTART_COUNT") else 0
            self._held.enter_context(locked(self.path / LOCK, EXCLUSIVE, busy, False, patience))
        try:
            self._open(config, shards, started)
        except BaseException:
            self._held.close()
            raise

    def _open(self, config: PretrainConfig, shards: DepthShards, started: bool):
        if self.writes and (self.path / "config.yaml").is_file() != started:
            raise ConfigError(f"--out {self.path}: another process began a run in this folder at the same moment")
        # This also waits until every rank has looked at the folder before one of them writes to it.
        distributed.require_equal("the samples of data.shards", _fingerprint(shards)[:12])
        self.log = logging.getLogger("dino_depth")
        self._metrics = self._events = None
        if not self.writes:
            return
        handler = logging.FileHandler(self.path / "run.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        self.log.handlers = [handler, TerminalWarnings()]
        environment = self._environment(shards)
        (self.path / "env.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
        if not started:
            # Last, and in one step: a run exists once its configuration does.
            partial = self.path / "config.yaml.tmp"
            save_config(config, partial)
            os.replace(partial, self.path / "config.yaml")

    def _check_unchanged(self, config: PretrainConfig, shards: DepthShards):
        before = _flat(asdict(load_config(PretrainConfig, self.path / "config.yaml")))
        now = _flat(asdict(config))
        for key in now | before:  # a table's entries (data.mixing) may be in either alone
            old, value = before.get(key), now.get(key)
            if key not in FREE and json.dumps(old) != json.dumps(value):
                raise ConfigError(
                    f"--resume: {key} was {old} when {self.path} began and is {value} now; "
                    "start a new run (--init_from keeps the weights)"
                )
        if (self.path / "env.json").is_file():
            known = json.loads((self.path / "env.json").read_text(encoding="utf-8")).get("samples_sha256")
            if known and known != _fingerprint(shards) and known != _fingerprint_of_keys(shards):
                raise DataError(f"--resume: the samples of {config.data.shards} are not those {self.path} began with")

    def _environment(self, shards: DepthShards) -> dict:
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return {
            "dino_depth": __version__,
            "git_revision": git_revision(),
            "python": platform.python_version(),
            "packages": library_versions(),
            "platform": platform.platform(),
            "processors": os.cpu_count(),
            "gpu": gpu,
            "world_size": distributed.world_size(),
            "command": redacted(" ".join(sys.argv)),
            "samples": len(shards),
            "samples_sha256": _fingerprint(shards),
            "manifests_sha256": {str(path): _sha256(path / "manifest.json") for path in shards.folders},
        }

    def open_metrics(self, first_step: int):
        """Starts appending at ``first_step``; measurements a killed run made beyond its checkpoint are dropped."""
        if not self.writes:
            return
        from torch.utils.tensorboard import SummaryWriter

        path = self.path / "metrics.jsonl"
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= first_step:
                        kept.append(line + "\n")
                except (json.JSONDecodeError, KeyError):
                    break  # a kill in mid-write leaves half a last line
        partial = path.with_suffix(".tmp")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)
        self._metrics = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by close()
        self._events = SummaryWriter(str(self.path), purge_step=first_step + 1)

    def write_metrics(self, step: int, figures: dict[str, float]):
        """One line of metrics.jsonl and the same TensorBoard scalars; figures that are not finite are left out."""
        if self._metrics is None:
            return
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        self._metrics.write(json.dumps({"step": step} | figures) + "\n")
        self.write_events(step, figures)

    def write_events(self, step: int, figures: dict[str, float]):
        """TensorBoard scalars alone; ``step`` may lie behind those of the last line of metrics.jsonl."""
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)

    def close(self):
        if self._metrics is not None:
            self._metrics.close()
            self._events.close()
        for handler in self.log.handlers:
            handler.close()
        self.log.handlers, self.log.propagate = [], True
        self._held.close()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fingerprint(shards: DepthShards) -> str:
    """What the run reads: the checksums of its shards and how many samples it selected, wherever the folders lie."""
    digest = _digest_shards(shards)
    digest.update(f" {len(shards)} samples".encode())
    return digest.hexdigest()


def _fingerprint_of_keys(shards: DepthShards) -> str:
    """What runs noted that began before there was an index: with the keys of all samples, which takes its time."""
    digest = _digest_shards(shards)
    for index in range(len(shards)):
        digest.update(shards.key(index).encode())
    return digest.hexdigest()


def _digest_shards(shards: DepthShards):
    digest = hashlib.sha256()
    for manifest in shards.manifests:
        for shard in manifest["shards"]:
            digest.update(shard["sha256"].encode())
    return digest
