"""``dino-depth fit PARTS --out MODEL`` and ``dino-depth calibrate MODEL GOOD_PARTS``: from good parts to a model.

Some of the parts are fitted on, the others calibrate the decision; ``calibrate`` adds more of them later, without
fitting again. ``fit --cad PART.stl --rig RIG.json`` needs no scan: nominal views are rendered.
"""

import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dino_depth.anomaly.config import MethodConfig
from dino_depth.anomaly.dataset import Sample
from dino_depth.errors import ConfigError
from dino_depth.inspection.cad import CadConfig, read_part, render_views
from dino_depth.inspection.inspector import InspectionConfig, Inspector
from dino_depth.inspection.model_folder import MODEL
from dino_depth.inspection.parts import read_parts
from dino_depth.inspection.rig import Rig, read_rig
from dino_depth.lock import EXCLUSIVE, locked
from dino_depth.progress import Progress
from dino_depth.terminal import say

__all__ = ["CalibrateConfig", "FitConfig", "calibrate", "fit", "told"]

SHARE, MOST = 0.2, 10  # of the parts that are fitted on, unless the number is given


@dataclass
class FitConfig(InspectionConfig):
    """Fit a model on good parts.

    Attributes:
        parts: folder of good parts, see docs/inspect.md.
        cad: file of the part (STL, PLY, OBJ, OFF, GLB, STEP) in place of ``parts``: its nominal views are rendered.
        rig: rig.json of the rig whose views are rendered.
        nominal: what neither a CAD file nor a rig says.
        out: folder of the model.
        train: how many of the parts, the first ones, are fitted on; the others calibrate the decision. 0: one in five,
            at least one and at most ten.
        good: folder of further good parts that calibrate the decision.
        bundle: copies the encoders' weights into the model.
        seed: of everything random.
        device: ``auto`` (cuda where there is one), ``cuda`` or ``cpu``.
        head: the method.
        encoder: the frozen encoders; the head says which it needs.
        prepare: what is done around the head.
        foreground: which pixels are the part.
        volume: the grid of voxels, and how modalities meet.
        decision: how many false alarms there may be.
        defects: what counts as one.
    """

    parts: str = ""
    cad: str = ""
    rig: str = ""
    nominal: CadConfig = field(default_factory=CadConfig)
    out: str = ""
    train: int = 0
    good: str = ""
    bundle: bool = False
    seed: int = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    head: MethodConfig = field(default_factory=MethodConfig)


@dataclass
class CalibrateConfig:
    """Add good parts to those that the decision of a model rests on.

    Attributes:
        model: folder of the model.
        parts: folder of good parts that the model was not fitted on.
        device: ``auto`` (cuda where there is one), ``cuda`` or ``cpu``.
    """

    model: str
    parts: str
    device: Literal["auto", "cuda", "cpu"] = "auto"


def fit(config: FitConfig) -> Inspector:
    """Fits, calibrates and writes the model; a killed fit is continued by the same command.

    Raises:
        ConfigError: a setting that cannot work, or ``out`` holds something else.
        DataError: a part cannot be read, or is of another rig; the CAD file's part is not before the rig.
    """
    out = Path(config.out)
    if not config.out:
        raise ConfigError("--out is missing: name the folder of the model")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "a model is there already" if (out / MODEL).is_file() else "is not empty"
        raise ConfigError(f"--out {out}: {what}; name a new folder")
    settings = getattr(config.head, config.head.name)
    rig, parts, held_out = _given(config)
    if config.cad and "image" in getattr(settings, "maps", ()):
        # A rendered image is no photograph of the part's material.
        settings = replace(settings, maps=tuple(name for name in settings.maps if name != "image"))
        print(f"{config.cad}: images are not compared, the file knows shapes only: {config.head.name}.maps "
              f"{list(settings.maps)}")  # fmt: skip
    scratch = out.with_name(f"{out.name}.fitting")
    with locked(scratch / "lock", EXCLUSIVE, f"--out {out}: another process fits there"):
        inspector = Inspector.fit(
            rig, parts, config.head.name, settings, config.around(), seed=config.seed, device=config.device,
            scratch=scratch,
        )  # fmt: skip
        inspector = _calibrated(inspector, held_out)
        inspector.save(out, bundle=config.bundle)
        shutil.rmtree(scratch, ignore_errors=True)
    say(f"{out}: {inspector.title} on {_counted(len(parts))}, {_counted(len(held_out))} to calibrate")
    say(told(inspector))
    return inspector


def calibrate(config: CalibrateConfig) -> Inspector:
    """Adds good parts to the decision of a model.

    Raises:
        DataError: a part was fitted on or counts already, or cannot be read; the model is then as it was.
    """
    folder = Path(config.model)
    inspector = Inspector.load(folder, config.device)
    _, parts = read_parts(config.parts, inspector.rig)
    with locked(folder / ".lock", EXCLUSIVE, f"{folder}: another process calibrates it"):
        inspector = _calibrated(inspector, parts)
        inspector.save_decision(folder)
    say(told(inspector))
    return inspector


def _given(config: FitConfig) -> tuple[Rig, list[Sample], list[Sample]]:
    """The rig, the parts to fit on, and those to calibrate with."""
    if bool(config.parts) == bool(config.cad):
        raise ConfigError("name a folder of good parts, or --cad FILE with --rig RIG.json: one of them")
    if config.cad:
        if not config.rig:
            raise ConfigError("--rig is missing: name the rig.json whose cameras will scan the part")
        if config.train:
            raise ConfigError("--train counts scanned parts; of a CAD file, --nominal.instances are rendered")
        rig = read_rig(Path(config.rig))
        parts, held_out = render_views(read_part(config.cad, config.nominal), rig, config.nominal), []
    else:
        rig, listed = read_parts(config.parts)
        count = config.train or min(max(1, math.ceil(SHARE * len(listed))), MOST)
        if not 0 < count <= len(listed):
            raise ConfigError(f"--train {config.train}: {config.parts} holds {len(listed)} parts")
        parts, held_out = listed[:count], listed[count:]
    return rig, parts, held_out + (read_parts(config.good, rig)[1] if config.good else [])


def told(inspector: Inspector) -> str:
    """The decision in a line."""
    decision = inspector.decision
    threshold = "" if decision.threshold is None else f"threshold {decision.threshold:.4g}, "
    return f"{threshold}{decision.told()}"


def _calibrated(inspector: Inspector, parts: list[Sample]) -> Inspector:
    with Progress("calibrate", len(parts), "parts") as progress:
        return inspector.calibrated(parts, progress.advance)


def _counted(count: int) -> str:
    return f"{count} part{'' if count == 1 else 's'}"
