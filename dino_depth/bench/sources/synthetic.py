"""Objects of kinds that no family of ``synth scenes`` makes, rendered here: needs no download."""

from pathlib import Path

from dino_depth.bench.data import Source
from dino_depth.bench.sources import Options

__all__ = ["FORM", "read"]

FORM = "no folder"
BANK, TESTED = 6, 3


def read(_folder: Path, options: Options) -> Source:
    # Not before it is asked for: rendering needs the packages of an extra.
    from data_prep.synthetic.parts import triangles
    from dino_depth.bench.objects import KINDS
    from dino_depth.bench.rendered import inspections, orbits

    views, inspected, key = [], [], (options.seed, "bench")
    for kind, builder in KINDS.items():

        def build(rng, builder=builder):
            return triangles(builder(rng))

        views += orbits(kind, build, options.objects, options.views, key)
        if options.inspect:
            inspected.append(inspections(kind, build, BANK, TESTED, key))
    what = f"{len(KINDS)} kinds of rendered objects that synth scenes does not have"
    return Source("synthetic", what, views, inspected)
