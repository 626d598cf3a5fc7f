"""Families of procedural parts, by kind: what ``synth scenes`` draws from.

The sixteen categories of ``parts.py`` are among them. A builder takes a random generator and returns a watertight solid
in any unit; to add a family, add a builder to the list at the end of a module.
"""

from collections.abc import Callable

from numpy.random import Generator

from data_prep.synthetic.engines import Manifold
from data_prep.synthetic.families import castings, sheet, smooth, tools, turned
from data_prep.synthetic.parts import CATEGORIES, rest

__all__ = ["FAMILIES", "build_family"]

FAMILIES: dict[str, Callable[[Generator], Manifold]] = CATEGORIES | {
    builder.__name__: builder for module in (turned, sheet, castings, smooth, tools) for builder in module.BUILDERS
}


def build_family(family: str, rng: Generator) -> Manifold:
    """A random part of a family: longest side 1, centred over the origin, resting on z = 0."""
    return rest(FAMILIES[family](rng))
