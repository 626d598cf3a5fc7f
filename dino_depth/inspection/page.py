"""A page about one scan, readable offline: the decision, its defects, the volume to turn, views with their maps."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from dino_depth.anomaly.figures import view_pictures
from dino_depth.anomaly.geometry import SquareFit
from dino_depth.anomaly.packing import LEVELS, pack
from dino_depth.anomaly.report import page_environment, viewer_parts
from dino_depth.anomaly.strips import crop, strips
from dino_depth.inspection.inspector import Inspection
from dino_depth.picture import data_uri, write_page

__all__ = ["write_inspection_page"]

VOXELS_SHOWN = 120_000
CELLS = 80  # along a side of the maps that are laid over the views
BRIGHTEST = 3.0  # times the threshold: where the colours of a map end, or at its highest score


def write_inspection_page(path: Path, inspection: Inspection):
    """Writes the page, atomically."""
    environment = page_environment("dino_depth.inspection")
    volume, about = None, ""
    limit = inspection.decision.map_threshold
    highest = max(float(part.max()) for part in inspection.pixel_maps)
    if inspection.volume is not None:
        scored, marked = inspection.volume, inspection.found.voxels > 0
        scale = float(np.median(scored.score)), max(float(scored.score.max()), limit or 0.0)
        share = ((scale[1] if limit is None else limit) - scale[0]) / ((scale[1] - scale[0]) or 1.0)
        level = int(np.clip(np.ceil(LEVELS * share), 1, LEVELS))
        index = scored.voxels.index
        volume = pack(index, scored.score, index[marked], scored.voxels.size, scale, level, VOXELS_SHOWN)
        facts = {name: getattr(volume, name) for name in ("voxels", "observed", "shape", "edge")}
        about = json.dumps(facts | {"scale": scale, "threshold": level})
    end = highest if limit is None else min(max(highest, limit), BRIGHTEST * limit) if limit > 0 else highest
    page = environment.get_template("page.html.jinja").render(
        one=inspection, limit=limit, volume=volume, about=about, marked="defects",
        still=None if volume is None else data_uri(volume.still),
        names=[view.name for view in inspection.views.sample.views],
        strips=_strips(inspection, (0.5 * end if limit is None else 0.5 * limit, end)),
        **viewer_parts(environment, "the defects"),
    )  # fmt: skip
    write_page(path, page)


def _strips(inspection: Inspection, scale: tuple[float, float]) -> list[dict]:
    """The views with the map over image and depth, and outlines of the defects."""
    masks = [part > 0 for part in inspection.found.pixels]
    figures = view_pictures(inspection.views.sample, masks, CELLS)
    share = _squares([mask.astype(np.float32) for mask in inspection.views.foregrounds])
    figures["share"] = np.rint(255 * share).astype(np.uint8)
    maps = _squares(inspection.pixel_maps, highest=True)
    arrays = {"image_map": maps, "depth_map": maps}
    cropped, arrays = crop(figures, figures["share"]), crop(arrays, figures["share"])
    return strips(cropped, arrays, {"image": scale, "depth": scale})


def _squares(parts: Sequence[np.ndarray], highest: bool = False) -> np.ndarray:
    """(V, CELLS, CELLS) over the padded square of maps (height, width), their mean or their highest value."""
    squares = []
    for part in parts:
        fit = SquareFit(*part.shape, max(*part.shape, CELLS) if highest else CELLS)
        square = fit.fit(torch.from_numpy(np.ascontiguousarray(part)))
        squares.append(torch.nn.functional.adaptive_max_pool2d(square[None], CELLS)[0] if highest else square)
    return torch.stack(squares).numpy()
