"""Weights of encoders inside a model, so that it opens on a machine without the Hub or the folders of training.

MODEL/encoders/image, MODEL/encoders/depth      a copy of the encoder's folder or file
"""

import os
import shutil
from pathlib import Path

from dino_depth.errors import ConfigError, DataError
from dino_depth.frozen import FAMILIES
from dino_depth.frozen.specs import parse_spec

__all__ = ["bundled_spec", "copy_encoder"]

COPIED = ("", "transformers", "defm")  # families whose names are files and folders
PACKAGED = ("tiny", "lite0", "raw-patches", "surface", "fpfh")


def copy_encoder(spec: str, modality: str, folder: Path) -> dict[str, str] | None:
    """Copies what an encoder is read from; None where that comes with a package.

    Returns:
        Parts of the spec, for ``bundled_spec``.

    Raises:
        ConfigError: its weights are in no folder or file that is known.
    """
    parsed = parse_spec(spec, tuple(FAMILIES))
    if parsed.random or parsed.family in PACKAGED or (not parsed.family and parsed.name in PACKAGED):
        return None
    source = Path(parsed.name)
    if parsed.family not in COPIED or not source.exists():
        raise ConfigError(
            f"--bundle: encoder.{modality} {spec} is no folder or file here: download it first and name its folder"
        )
    target = folder / "encoders" / modality / (source.name if source.is_file() else "weights")
    if target.exists():
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copy2 if source.is_file() else shutil.copytree)(source, target)
    return {
        "family": parsed.family,
        "path": os.path.relpath(target, folder),
        "options": "&".join(f"{key}={value}" for key, value in parsed.options.items()),
    }


def bundled_spec(folder: Path, parts: dict[str, str]) -> str:
    """The name of an encoder that was copied into a model.

    Raises:
        DataError: it is not there, or lies outside.
    """
    path = (folder / parts["path"]).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.exists():
        raise DataError(f"{folder}: the encoder {parts['path']} is not in it")
    family = f"{parts['family']}:" if parts["family"] else ""
    return f"{family}{path}" + (f"?{parts['options']}" if parts["options"] else "")
