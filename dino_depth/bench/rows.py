"""The rows of a bench: the encoders that were given and those that stand beside every one of them, raw and filled."""

from dataclasses import dataclass

import torch

from dino_depth.errors import ConfigError
from dino_depth.frozen import FrozenEncoder, load_frozen

__all__ = ["Entry", "entries"]

# Without weights, beside every encoder: name -> label and role.
UNLEARNED = {
    "raw-patches": ("raw pixels", "pixels"),
    "surface": ("normals, curvature", "surface"),
    "fpfh": ("FPFH", "fpfh"),
}


@dataclass(frozen=True)
class Entry:
    """An encoder of the bench.

    Attributes:
        spec: its name for :func:`dino_depth.frozen.load_frozen`.
        label: for tables.
        role: "given", "untrained", "pixels", "surface" or "fpfh".
        encoder: None where it is absent.
        note: why it is absent.
    """

    spec: str
    label: str
    role: str
    encoder: FrozenEncoder | None
    note: str = ""


def entries(specs: list[str], seed: int, device: torch.device) -> list[Entry]:
    """The given encoders, each followed by the same architecture untrained, then those without weights.

    Raises:
        ConfigError: there is none, one is given twice, or one does not encode depth.
        DataError, ReportedError: weights cannot be read.
    """
    if not specs:
        raise ConfigError("name at least one encoder: dino-depth bench ENCODER...")
    if twice := next((spec for spec in specs if specs.count(spec) > 1), None):
        raise ConfigError(f"encoder {twice} is given twice")
    found, labels = [], _labels(specs)
    for spec, label in zip(specs, labels, strict=True):
        found.append(Entry(spec, label, "given", load_frozen(spec, modality="depth", device=device)))
    twins: set[str] = set()
    for spec, label in zip(specs, labels, strict=True):
        twin = _untrained(spec, label, seed, device)
        # Several checkpoints of one architecture have one untrained twin.
        if twin is not None and (twin.encoder is None or twin.encoder.fingerprint not in twins):
            twins.add(twin.encoder.fingerprint if twin.encoder else "")
            found.append(twin)
    for spec, (label, role) in UNLEARNED.items():
        if spec in specs:
            continue
        try:
            found.append(Entry(spec, label, role, load_frozen(spec, modality="depth", device=device)))
        except ConfigError as error:
            found.append(Entry(spec, label, role, None, str(error)))
    return found


def _labels(specs: list[str]) -> list[str]:
    """The end of each name, as much of it as tells them apart."""
    short = [spec.partition("?")[0].rstrip("/").rpartition("/")[2] or spec for spec in specs]
    return [name if short.count(name) == 1 else spec for name, spec in zip(short, specs, strict=True)]


def _untrained(spec: str, label: str, seed: int, device: torch.device) -> Entry | None:
    name, _, options = spec.partition("?")
    if name.startswith("random:") or name in UNLEARNED:
        return None
    options = [part for part in options.split("&") if part]
    label = f"{label} untrained"
    for kept in (options, []):  # families differ in whether an untrained network keeps the options of its input
        twin = f"random:{name}?{'&'.join([*kept, f'seed={seed}'])}"
        try:
            return Entry(twin, label, "untrained", load_frozen(twin, modality="depth", device=device))
        except ConfigError as error:
            note = str(error)
    return Entry(twin, label, "untrained", None, note)
