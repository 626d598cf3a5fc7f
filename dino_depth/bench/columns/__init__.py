"""What is measured; the file name is the registry. A column is a module with

- ``PLACE``: its place in tables;
- ``FIGURES``: {key: Figure}, what it states;
- ``ASKED``: "views" or "inspections", the maps it needs features of;
- ``missing(source, size) -> str``: why it does not apply to a source, "" where it does; raises DataError where it
  should but the data are wrong;
- ``measure(source, size, known, asked) -> (units, sums)`` float64: sums for each unit that is resampled, from features
  (maps, cells, dim) of undisturbed maps and of the maps that are asked about, the same ones, disturbed or not;
- ``figures(sums) -> {key: values}`` of sums (..., sums).
"""

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Figure", "centred", "columns", "per_unit"]


@dataclass(frozen=True)
class Figure:
    """A figure: its title in a table, the words for it, which way is better, digits, and what it is measured in."""

    title: str
    words: str
    better: Literal["higher", "lower"] = "higher"
    digits: int = 3
    unit: str = ""


def columns() -> dict[str, ModuleType]:
    """Every column, in the order of tables."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    found = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return dict(sorted(found.items(), key=lambda item: item[1].PLACE))


def centred(features: Tensor, mean: Tensor) -> Tensor:
    """Unit vectors of features less a mean: cosines then tell cells apart, not what all cells share."""
    return torch.nn.functional.normalize((features - mean).double(), dim=-1, eps=1e-9).float()


def per_unit(rows: Tensor, unit: Tensor, count: int) -> Tensor:
    """(count, columns) float64 sums of rows (rows, columns) by the unit of each."""
    return torch.zeros(count, rows.shape[1], dtype=torch.float64).index_add_(0, unit, rows.double())
