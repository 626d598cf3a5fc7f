"""Seconds of exact V-AUPRO on a sparse volume, against NumPy sorting its occupied scores, on one core.

    python benchmarks/aupro.py [--side 512] [--occupied 0.03] [--defects 50] [--rounds 15] [--gate]

Both sorts are timed (``np.sort`` gives the scores alone, ``np.argsort`` their order, which takes several times as long)
and each stage of ours, interleaved so that other load on the machine hits all alike, in processor time:

    aupro, labelled    `regions` and `pooled_aupro` of scores and component labels of the occupied voxels
    separate           `voxel_regions` with labelled defects: coordinates -> places, defects found among them
    label              `label_components` of the defects, once per ground truth
    aupro, voxels      everything from coordinates

``--gate`` exits 4 where "aupro, voxels" takes more than 3 times ``np.sort``.
"""

import argparse
import statistics
import sys
import time
import tracemalloc

import numpy as np

from dino_depth.anomaly.metrics import label_components, pooled_aupro, regions, voxel_regions

TIMES_SORT = 3.0


def volume(side: int, occupied: float, defects: int, radius: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates and scores of occupied voxels, and the coordinates of defects among them: separate balls."""
    random = np.random.default_rng(0)
    ball = np.argwhere(np.ones((2 * radius + 1,) * 3)) - radius
    ball = ball[(ball**2).sum(1) <= radius**2]
    step = 2 * radius + 3
    cells = random.choice((side // step) ** 3, defects, replace=False)
    centres = np.stack(np.unravel_index(cells, (side // step,) * 3), 1) * step + radius
    defect = np.sort(np.ravel_multi_index(tuple((centres[:, None] + ball).reshape(-1, 3).T), (side,) * 3))
    keys = np.union1d(np.flatnonzero(random.random(side**3, np.float32) < occupied), defect)
    scores = random.random(len(keys), np.float32) + 0.3 * np.isin(keys, defect).astype(np.float32)
    index, defect = (np.stack(np.unravel_index(k, (side,) * 3), 1).astype(np.int32) for k in (keys, defect))
    return index, scores, defect


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--occupied", type=float, default=0.03)
    parser.add_argument("--defects", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--gate", action="store_true", help="exit 4 above the target")
    options = parser.parse_args()
    index, scores, defect = volume(options.side, options.occupied, options.defects)
    shape = (options.side,) * 3
    labels = label_components(defect)
    places, defect_places = (np.ravel_multi_index(tuple(i.T), shape) for i in (index, defect))
    truth = np.zeros(len(scores), np.int32)
    truth[np.searchsorted(places, defect_places)] = labels
    empty = options.side**3 - len(scores)
    functions = {
        "np.sort": lambda: np.sort(scores),
        "np.argsort": lambda: np.argsort(scores),
        "aupro, labelled": lambda: pooled_aupro([regions(scores, truth, empty_normal=empty)]),
        "separate": lambda: voxel_regions(index, scores, defect, shape, labels=labels),
        "label": lambda: label_components(defect),
        "aupro, voxels": lambda: pooled_aupro([voxel_regions(index, scores, defect, shape)]),
    }
    print(f"{options.side}^3 grid, {len(scores):,} occupied, {labels.max()} defects of {len(defect):,} voxels")
    values = [functions[name]() for name in ("aupro, labelled", "aupro, voxels")]
    print(f"V-AUPRO@1% {values[0]:.4f} and {values[1]:.4f}, empty voxels counted as normals")
    seconds = {name: [] for name in functions}
    for round_ in range(options.rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if round_:
                seconds[name].append(time.process_time() - start)
    print(f"{'':18}{'ms, median':>12}{'of np.sort':>12}{'of np.argsort':>15}   (medians of ratios within a round)")
    ratios = {}
    for name, ours in seconds.items():
        ratios[name], order = (
            statistics.median(a / b for a, b in zip(ours, seconds[sort], strict=True))
            for sort in ("np.sort", "np.argsort")
        )
        print(f"{name:18}{1000 * statistics.median(ours):12.1f}{ratios[name]:12.2f}{order:15.2f}")
    tracemalloc.start()
    functions["aupro, voxels"]()
    given, peak = (count / 2**20 for count in (index.nbytes + scores.nbytes, tracemalloc.get_traced_memory()[1]))
    print(f"coordinates and scores {given:.0f} MiB; aupro, voxels holds at most {peak:.0f} MiB besides")
    if options.gate and ratios["aupro, voxels"] > TIMES_SORT:
        print(f"aupro takes {ratios['aupro, voxels']:.2f} x np.sort, wanted at most {TIMES_SORT}", file=sys.stderr)
        sys.exit(4)


if __name__ == "__main__":
    main()
