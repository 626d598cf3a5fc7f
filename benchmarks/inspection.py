"""What inspecting one's own parts costs and how well it measures, on rendered scans with known defects.

python benchmarks/inspection.py speed [--sizes 448 896] [--views 12]      seconds of a scan, by stage
python benchmarks/inspection.py deviations [--objects ...] [--scans 8]    reported against true heights
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from dino_depth.anomaly.heads import open_head
from dino_depth.inspection.inspector import InspectionConfig, Inspector

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from inspection_scans import MILD, Scanner, arrays  # noqa: E402  the scans that the tests inspect

OBJECTS = ["hex_nut", "handwheel", "angle_bracket", "star_knob"]
LOWEST, STEP = 0.015, 0.005  # heights of defects, shares of the longest side


def fitted(scanner: Scanner, good: int) -> Inspector:
    head = open_head("residual")
    inspector = Inspector.fit(scanner.rig, [scanner.good("first", 0)], "residual", head.Config(), InspectionConfig(),
                              device="cpu")  # fmt: skip
    return inspector.calibrated([scanner.good(f"good{seed}", seed) for seed in range(1, good + 1)])


def speed(sizes: list[int], views: int):
    for size in sizes:
        scanner = Scanner(size, views)
        inspector = fitted(scanner, 1)
        scan, _ = scanner.bad("bad", "dent", 0.04, 3)
        images, depths = arrays(scan)
        runs, processor = [], []
        for _ in range(3):
            start = time.process_time()
            runs.append(inspector.predict(images, depths).seconds)
            processor.append(time.process_time() - start)
        stages = {stage: np.median([run[stage] for run in runs]) for stage in runs[0]}
        told = ", ".join(f"{stage} {100 * value / sum(stages.values()):.0f} %" for stage, value in stages.items())
        wall, busy = sum(stages.values()), np.median(processor)
        print(f"{views} views of {size} px: {wall:.2f} s, {busy:.2f} s of the processor ({told})", flush=True)


def deviations(objects: list[str], scans: int):
    """Of the regions that were measured the one where the defect is, if any lies within a tenth of the part."""
    rows = []
    for category in objects:
        scanner = Scanner(160, 6, category)
        inspector = fitted(scanner, 2)
        noise, size = 1000 * MILD.depth_noise * scanner.subject.scale, 1000 * scanner.subject.scale
        for seed in range(scans):
            kind = ("dent", "bump")[seed % 2]
            scan, height = scanner.bad(f"{kind}{seed}", kind, LOWEST + STEP * seed, 10 + seed)
            true, place = scanner.truth(kind, LOWEST + STEP * seed, 10 + seed)
            found = [one for one in inspector.inspect(scan).defects if one.deviation is not None]
            apart = [np.linalg.norm(np.array(one.position) - place) for one in found]
            told = abs(found[int(np.argmin(apart))].deviation) if found and min(apart) < 0.1 * size else None
            within = told is not None and abs(told - true) <= max(0.1 * true, noise)
            rows.append((told is not None, within, told is not None and abs(told / true - 1)))
            shown = "not found" if told is None else f"{told:.2f}"
            print(f"{category} {kind} {height:.2f} mm high, {true:.2f} off the sound surface, noise {noise:.2f}: "
                  f"{shown}{' ok' if within else ''}", flush=True)  # fmt: skip
    measured = [row for row in rows if row[0]]
    errors = np.array([row[2] for row in measured])
    print(f"{len(measured)} of {len(rows)} measured; {sum(row[1] for row in measured)} within a tenth or the noise; "
          f"median error {100 * np.median(errors):.1f} %")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("speed")
    one.add_argument("--sizes", type=int, nargs="+", default=[448, 896])
    one.add_argument("--views", type=int, default=12)
    one = commands.add_parser("deviations")
    one.add_argument("--objects", nargs="+", default=OBJECTS)
    one.add_argument("--scans", type=int, default=8)
    given = vars(parser.parse_args())
    {"speed": speed, "deviations": deviations}[given.pop("command")](**given)
