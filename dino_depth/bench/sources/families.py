"""Parts of the families of ``synth scenes``, rendered here: other parts, but of the kinds an encoder may know."""

from pathlib import Path

from dino_depth.bench.data import Source
from dino_depth.bench.sources import Options, evenly
from dino_depth.bench.sources.synthetic import BANK, TESTED

__all__ = ["FORM", "read"]

FORM = "no folder"
CHOSEN = 16


def read(_folder: Path, options: Options) -> Source:
    # Not before it is asked for: rendering needs the packages of an extra.
    from data_prep.synthetic.families import FAMILIES
    from data_prep.synthetic.parts import triangles
    from dino_depth.bench.rendered import inspections, orbits

    views, inspected, key = [], [], (options.seed, "bench families")
    chosen = evenly(sorted(FAMILIES), CHOSEN)
    for family in chosen:

        def build(rng, family=family):
            return triangles(FAMILIES[family](rng))

        views += orbits(family, build, options.objects, options.views, key)
        if options.inspect:
            inspected.append(inspections(family, build, BANK, TESTED, key))
    return Source("families", f"parts of {len(chosen)} families of synth scenes", views, inspected)
