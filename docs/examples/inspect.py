"""Fit on good parts, inspect a scan from memory, print its defects: python docs/examples/inspect.py PARTS SCAN."""

import sys

from dino_depth.inspection.fit import FitConfig, fit
from dino_depth.inspection.inspector import Inspector
from dino_depth.inspection.parts import read_instance


def main(parts: str, scan: str, model: str = "model"):
    fit(FitConfig(parts=parts, out=model))
    inspector = Inspector.load(model)
    sample, _ = read_instance(scan, inspector.rig)
    # What a scanner hands over: arrays by the name of the view, depth in metres, 0 or NaN where nothing was measured.
    images = {view.name: view.read_image() for view in sample.views}
    depths = {view.name: view.read_depth().depth for view in sample.views}
    inspection = inspector.predict(images, depths, sample.name)
    print(sample.name, {True: "anomalous", False: "good", None: "undecided"}[inspection.anomalous], inspection.score)
    for defect in inspection.defects:
        print(f"at {defect.position} {defect.unit}, {defect.area:.0f} {defect.unit}², deviation {defect.deviation} mm")


if __name__ == "__main__":
    main(*sys.argv[1:])
