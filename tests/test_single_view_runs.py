"""The configurations of single views run on genuine scans of MVTec 3D-AD, one of them with a painted defect."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from quick_heads import teacher_file

from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.evaluate import evaluate
from dino_depth.config import parse

GENUINE = Path(__file__).resolve().parents[2] / "shared" / "realdata" / "mvtec3d_cable_gland" / "cable_gland"
pytestmark = pytest.mark.skipif(
    not GENUINE.is_dir(), reason="shared/realdata/mvtec3d_cable_gland is not beside this checkout"
)
# What a machine without the papers' weights has in their place: ImageNet weights from a package, or random ones.
FPFH = "fpfh?patch=8&samples=4"
ENCODERS = {
    "patchcore": ["--encoder.image", "lite0", "--encoder.size", "224"],
    "btf": ["--encoder.image", "lite0", "--encoder.depth", FPFH],
    "m3dm": ["--encoder.image", "lite0", "--encoder.depth", FPFH],
    "ast": [
        "--encoder.image", "random:timm:tf_efficientnet_lite0?blocks=6", "--encoder.size", "192",
        "--encoder.depth_size", "48", "--head.ast.steps", "2", "--head.ast.teacher", "4", "--head.ast.student", "4",
    ],
    "efficientad": ["--head.efficientad.steps", "2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two scans to train on; the third as it is and, for a defect, with a black square painted on the part."""
    root = tmp_path_factory.mktemp("mvtec3d")
    part = root / "cable_gland"
    shutil.copytree(GENUINE / "train", part / "train")
    for defect in ("good", "hole"):
        shutil.copytree(GENUINE / "validation" / "good", part / "test" / defect)
        mask = np.zeros((400, 400), np.uint8)
        if defect == "hole":
            path = part / "test" / defect / "rgb" / "000.png"
            picture = np.array(Image.open(path).convert("RGB"))
            picture[190:215, 190:215] = 0
            Image.fromarray(picture).save(path)
            mask[190:215, 190:215] = 253
        (part / "test" / defect / "gt").mkdir()
        Image.fromarray(mask).save(part / "test" / defect / "gt" / "000.png")
    return root


@pytest.mark.parametrize("head", ENCODERS)
def test_a_single_view_configuration_runs_on_genuine_scans(tree, tmp_path, head):
    if FPFH in ENCODERS[head] and importlib.util.find_spec("open3d") is None:
        pytest.skip("open3d is not installed")
    words = ["--config", f"mvtec3d_{head}", "--data.root", str(tree), "--out", str(tmp_path / "run"), "--device", "cpu"]
    words += [*ENCODERS[head], "--metrics.resamples", "10"]
    if head == "efficientad":
        words += ["--head.efficientad.teacher", teacher_file(tmp_path / "teacher.pth")]
    evaluate(parse(EvaluateConfig, words, "test"))
    results = json.loads((tmp_path / "run" / "results.json").read_bytes())
    (trial,) = results["trials"]
    assert results["complete"] and results["head"].startswith(head)
    assert {"I-AUROC", "P-AUROC", "AUPRO@30%", "AUPRO@1%"} <= trial["metrics"].keys()
    assert all(np.isfinite(value) for value in trial["metrics"].values())
    if head in ("patchcore", "m3dm"):  # pretrained features: the square stands out
        assert trial["metrics"]["P-AUROC"] > 0.9
        scores = {one["label"]: one["score"] for one in trial["instances"]}
        assert scores["anomalous"] > scores["good"]
