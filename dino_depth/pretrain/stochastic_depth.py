"""Which crops skip which residual branch: a function of the step and of the map's place in it, not of the rank.

Stochastic depth (Huang et al. 2016) on samples, as in DINOv2: a crop that skips a branch costs nothing there. Who is
kept is drawn by systematic sampling (Madow and Madow 1944): the map at place p of a step's batch keeps a branch where
floor((p + 1 + u) q) > floor((p + u) q), q the share that is kept and u uniform in [0, 1 / q) per branch and crop. Each
map is kept with probability q, and of any n places in a row floor(n q) or ceil(n q) are: ranks and passes that share a
batch, however many there are, draw what one process would, and have equal work.
"""

import numpy as np

__all__ = ["kept_sequences"]

DROPS = 4  # last word of the generator's key, see ``order.py``


def kept_sequences(
    drop_path: float, branches: int, crops: list[int], seed: int, step: int, first: int, maps: int
) -> list[list[np.ndarray]] | None:
    """The sequences that take each residual branch.

    Args:
        drop_path: share that skips; with 0 there is nothing to draw.
        branches: residual branches of the network, two a block.
        crops: of each set of crops, how many crops a map has in it.
        first: place in the step's batch of the first of ``maps`` maps.

    Returns:
        for each branch and each set, (kept,) int64 sequences in order; a set holds the first crop of every map before
        the second of every map. None without ``drop_path``.
    """
    if not drop_path:
        return None
    share = 1 - drop_path
    offset = np.random.default_rng([seed, step, DROPS]).uniform(0, 1 / share, (branches, sum(crops), 1))
    passed = np.floor((np.arange(first, first + maps + 1) + offset) * share)
    keeps = np.diff(passed) > 0  # (branches, crops, maps)
    ends = np.cumsum([0, *crops])
    sets = [keeps[:, start:end].reshape(branches, -1) for start, end in zip(ends, ends[1:], strict=False)]
    return [[np.flatnonzero(part[branch]) for part in sets] for branch in range(branches)]
