"""What is kept of a scored instance until its class is done: a file for each head, so that any process can write it.

    scored/<category>/seed<k>/<instance>.npz

holds the rows of the metrics, the head's own and those beside it, and ``facts`` as JSON. It is written last: where it
is, the instance's prediction is. Arrays that rows have in common are written once.
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from dino_depth.anomaly.metrics import Regions
from dino_depth.anomaly.results import write_arrays
from dino_depth.anomaly.scoring import Scored
from dino_depth.errors import DataError

__all__ = ["read_scored", "write_scored"]


def write_scored(path: Path, rows: Mapping[str, Scored], facts: dict[str, Any]):
    """Writes the file, atomically.

    Args:
        rows: by scorer.
        facts: plain values.
    """
    arrays: dict[str, np.ndarray] = {}
    places: dict[int, str] = {}

    def kept(value: Any) -> Any:
        """A number as it is, an array as the name of its place."""
        if not isinstance(value, np.ndarray):
            return value.item() if isinstance(value, np.generic) else value
        if id(value) not in places:
            places[id(value)] = f"array{len(places)}"
            arrays[places[id(value)]] = value
        return places[id(value)]

    named = [
        [name, {suffix: {field.name: kept(getattr(part, field.name)) for field in fields(part)}
                for suffix, part in row.regions.items()}]
        for name, row in rows.items()
    ]  # fmt: skip
    arrays["scores"] = np.array([row.score for row in rows.values()])
    arrays["text"] = np.array(json.dumps({"rows": named, "facts": facts}))
    write_arrays(path, arrays, compressed=False)


def read_scored(path: Path) -> tuple[dict[str, Scored], dict[str, Any]]:
    """The rows and the facts of a file.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        text = json.loads(str(arrays["text"]))
        rows = {}
        for (name, suffixes), score in zip(text["rows"], arrays["scores"].tolist(), strict=True):
            found = {
                suffix: {key: arrays[value] if isinstance(value, str) else value for key, value in part.items()}
                for suffix, part in suffixes.items()
            }
            rows[name] = Scored(score, {suffix: Regions(**part) for suffix, part in found.items()})
        return rows, text["facts"]
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: no scored instance, remove it and run the command again: {error}") from error
