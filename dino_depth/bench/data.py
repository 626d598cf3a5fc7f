"""What encoders are judged on: posed depth maps, parts with defects, and the cells that every encoder is asked about.

Cells. A map lies in the centred square of :class:`~dino_depth.anomaly.geometry.SquareFit`, whose sides are divided into
``size / CELL`` cells. All that is measured is measured per cell, whatever the patches of an encoder.
"""

from dataclasses import dataclass, field

import numpy as np

from dino_depth.anomaly.geometry import Camera, SquareFit
from dino_depth.depth import DepthMap
from dino_depth.errors import DataError

__all__ = ["CELL", "Inspection", "Source", "View", "cell_centers", "covered", "folds", "units"]

CELL = 14  # pixels of the square along a cell's side
FEWEST_SCENES = 8  # so many are resampled as scenes; fewer do not tell their spread, so views are resampled


@dataclass(frozen=True, eq=False)
class View:
    """One posed depth map.

    Attributes:
        scene: what it shows; views of one scene see the same things.
        name: of the view, unique in its scene.
        depth: the map as a sensor measured it.
        camera: intrinsics and pose.
        category: kind of object, "" where there is none.
        part: (height, width) bool, pixels of the object that is asked about; None: all.
        defect: (height, width) bool, pixels that a defect changed; None in a sound view.
    """

    scene: str
    name: str
    depth: DepthMap
    camera: Camera
    category: str = ""
    part: np.ndarray | None = None
    defect: np.ndarray | None = None

    def __post_init__(self):
        if self.depth.depth.shape != (self.camera.height, self.camera.width):
            high, wide = self.depth.depth.shape
            raise DataError(
                f"{self.scene}/{self.name}: depth is {wide}x{high}, its camera {self.camera.width}x{self.camera.height}"
            )


@dataclass(frozen=True, eq=False)
class Inspection:
    """One part: ``bank`` are views of sound specimens, ``tested`` views of sound and of defective ones."""

    part: str
    bank: tuple[View, ...]
    tested: tuple[View, ...]


@dataclass(frozen=True, eq=False)
class Source:
    """Everything of one ``--data``.

    Attributes:
        name: for tables.
        what: one line about it.
        views: posed maps, scene by scene.
        inspections: parts with defects; empty where there are none.
    """

    name: str
    what: str
    views: list[View]
    inspections: list[Inspection] = field(default_factory=list)


def cell_centers(view: View, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The pixel (cells, 2) int (column, row) at the centre of each cell, row by row, and whether it has depth."""
    height, width = view.depth.depth.shape
    middles = (np.arange(size // CELL) + 0.5) * CELL - 0.5
    columns, rows = np.meshgrid(middles, middles)
    places = SquareFit(height, width, size).from_square(np.stack([columns.ravel(), rows.ravel()], 1))
    pixels = np.rint(places).astype(int)
    inside = ((pixels >= 0) & (pixels < (width, height))).all(1)
    pixels = np.where(inside[:, None], pixels, 0)
    return pixels, inside & view.depth.valid[pixels[:, 1], pixels[:, 0]]


def covered(view: View, size: int) -> np.ndarray:
    """(cells,) bool: cells whose centre has depth and belongs to the part."""
    pixels, usable = cell_centers(view, size)
    return usable if view.part is None else usable & view.part[pixels[:, 1], pixels[:, 0]]


def units(source: Source) -> np.ndarray:
    """(views,) what is resampled together: the scene's number where there are enough scenes, else the view's."""
    scenes = [view.scene for view in source.views]
    names = sorted(set(scenes))
    if len(names) < FEWEST_SCENES:
        return np.arange(len(scenes))
    return np.array([names.index(scene) for scene in scenes])


def folds(source: Source) -> np.ndarray:
    """(views,) 0 or 1: what is fitted on one half is asked about the other.

    Halves share no category; where there is one category only, no scene; where there is one scene only, the halves are
    the first and the second half of its views.
    """
    for groups in ([view.category for view in source.views], [view.scene for view in source.views]):
        names = sorted(set(groups))
        if len(names) > 1:
            return np.array([names.index(group) % 2 for group in groups])
    count = len(source.views)
    return (np.arange(count) >= count // 2).astype(int)
