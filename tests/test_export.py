import dataclasses
import io
import json
import math
import runpy
import socket
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from safetensors.torch import load, load_file, save_file
from transformers import AutoModel, Dinov2Model

import dino_depth
from dino_depth import checkpoint, onnx_file
from dino_depth.config import CropConfig, DataConfig, ModelConfig, PretrainConfig, TrainConfig, load_config, save_config
from dino_depth.depth import DepthMap, Normalization, encode_png
from dino_depth.encoder import load_encoder
from dino_depth.errors import ConfigError, DataError, GateError, ReportedError
from dino_depth.publish import export as export_module
from dino_depth.publish import model_folders
from dino_depth.publish.export import ExportConfig, export
from dino_depth.publish.model_card import Subject, _title, _training, training_data
from dino_depth.publish.parity import compare, worst
from dino_depth.shards import DepthShards
from dino_depth.vit import DepthTransformer, resize_position_embedding
from dino_depth.weight_names import from_transformers, to_transformers
from tests.conftest import write_manifest

SIZE = 112
TINY = ModelConfig(dim=128, depth=4, heads=2, layer_scale=1.0)


def write_shards(folder, maps=5, licence="Example, CC BY-NC-SA 4.0 (non-commercial)"):
    """A shard folder as ``prep`` writes it: cones with a hole before a plane."""
    folder.mkdir()
    rows, columns = np.mgrid[:60, :80]
    with tarfile.open(folder / "depth-000000.tar", "w") as tar:
        for index in range(maps):
            height = np.clip(0.2 - 0.01 * np.hypot(rows - 30, columns - 20 - 8 * index), 0, None)
            depth = 0.5 + 0.001 * columns - 0.3 * height
            depth[10:14, 30:50] = 0
            depth_map = DepthMap.from_values(depth)
            png, near, far = encode_png(depth_map)
            meta = {"near": near, "far": far, "kind": "metric", "dataset": "example", "category": "cone"}
            meta |= {"split": "train", "label": "good"}
            for suffix, data in (("depth.png", png), ("json", json.dumps(meta).encode())):
                member = tarfile.TarInfo(f"example/cone/train-good-{index:03d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    write_manifest(folder, maps, {"example": {"licence": licence}})
    return folder


def write_run(folder, shards, model=TINY, step=7, spoil=None):
    """A run folder whose teacher has no two equal parameters, so that a swapped pair changes features."""
    crops = CropConfig(global_size=4 * model.patch_size, local_size=2 * model.patch_size, sizes=[(84, 14)])
    normalization = Normalization(method="plane", scale=0.07)
    data = DataConfig(shards=str(shards), normalization=normalization)
    (folder / "checkpoints").mkdir(parents=True)
    train = TrainConfig(evaluate_shards=[str(shards)])
    config = PretrainConfig(out=str(folder), data=data, crops=crops, model=model, train=train)
    save_config(config, folder / "config.yaml")
    (folder / "env.json").write_text(json.dumps({"git_revision": "f00", "command": f"x --out {folder}"}))
    torch.manual_seed(step)
    backbone = DepthTransformer(model, crops.global_size)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    if spoil:
        backbone.get_parameter(spoil).data.view(-1)[3] = math.nan
    teacher = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    teacher["dino_head.last.weight"] = torch.randn(3, 4)
    checkpoint.save({"step": step, "teacher": teacher}, checkpoint.checkpoint_path(folder, step))
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def shards(place):
    return write_shards(place / "shards")


@pytest.fixture(scope="module")
def run(place, shards):
    return write_run(place / "run", shards)


@pytest.fixture(scope="module")
def exported(place, run):
    export(ExportConfig(run=str(run), out=str(place / "out"), image_size=SIZE, samples=3))
    return place / "out"


@pytest.fixture(scope="module")
def images(run, shards):
    encoder = checkpoint.load_run_encoder(run)
    samples = DepthShards(str(shards))
    return torch.stack([encoder.prepare(samples.sample(index)[0], SIZE) for index in (0, 3)])  # (2, 1, SIZE, SIZE)


def raw_and_prepared(encoder, shards, side):
    """Two maps as squares of depth in metres with every kind of missing pixel, and as the network's input of them."""
    samples = DepthShards(str(shards))
    depth = torch.stack([export_module._square(samples.sample(index)[0], side) for index in (0, 3)])
    assert (depth == 0).any()
    depth[0, 0, 0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    return depth, torch.stack([encoder.prepare(DepthMap.from_values(each[0].numpy()), side) for each in depth])


@pytest.fixture(scope="module")
def expected(run, images):
    """Tokens of the training model, with its own position embedding resized on the fly."""
    return checkpoint.load_run_encoder(run).backbone.forward_features(images)


def test_parity_report(exported):
    report = json.loads((exported / "parity.json").read_text())
    assert report["passed"] is True
    assert set(report["pairs"]) == {
        "training - transformers", "training - timm", "training - dino_depth", "transformers - timm",
        "transformers - dino_depth", "timm - dino_depth",
    }  # fmt: skip
    for kinds in report["pairs"].values():
        for figures in kinds.values():
            assert 0 <= figures["mean_abs"] <= figures["max_abs"] <= report["tolerance"] == 1e-5
    assert report["keys"] == [f"example/cone/train-good-{index:03d}" for index in (0, 2, 4)]
    assert (report["samples"], report["image_size"], report["trained_size"]) == (3, SIZE, 56)
    assert report["largest_feature"] > 1
    assert {"torch", "timm", "transformers"} <= report["versions"].keys()


def test_both_folders_load_in_one_line(exported, images, expected):
    model = AutoModel.from_pretrained(exported / "transformers")
    assert type(model) is Dinov2Model and not model.training
    with torch.inference_mode():
        output = model(pixel_values=images)
    torch.testing.assert_close(output.last_hidden_state, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pooler_output, expected[:, 0], atol=1e-5, rtol=0)

    model = timm.create_model(f"local-dir:{exported / 'timm'}", pretrained=True).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(images), expected[:, 0], atol=1e-5, rtol=0)
    assert load_file(exported / "timm" / "model.safetensors").keys() == model.state_dict().keys()
    data_config = timm.data.resolve_model_data_config(model)
    assert tuple(data_config["input_size"]) == (1, SIZE, SIZE)
    assert (list(data_config["mean"]), list(data_config["std"])) == ([0.0], [1.0])


def test_load_encoder_equals_the_run(exported, run, images, shards):
    theirs = checkpoint.load_run_encoder(run)
    for path in (exported, exported / "transformers", str(exported)):
        ours = dino_depth.load_encoder(path)
        assert ours.normalization == theirs.normalization == Normalization(method="plane", scale=0.07)
        assert (ours.size, ours.dim, ours.patch_size) == (SIZE, 128, 14)
        assert not any(parameter.requires_grad for parameter in ours.parameters())
        for feature, other in zip(ours(images), theirs(images), strict=True):
            torch.testing.assert_close(feature, other, atol=1e-5, rtol=0)
    depth_map, _ = DepthShards(str(shards)).sample(1)
    assert torch.equal(ours.prepare(depth_map), theirs.prepare(depth_map, SIZE))


def test_loading_draws_no_random_numbers(exported):
    before = torch.get_rng_state()
    load_encoder(exported)
    assert torch.equal(torch.get_rng_state(), before)


def plain_transformer(weights, image, heads):
    """Tokens of one image (1, side, side): the Vision Transformer written out, one head and one patch at a time."""
    weights = {name: value.double() for name, value in weights.items()}
    kernel = weights["patch_embed.proj.weight"]
    side = kernel.shape[-1]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    patches = [
        (image[:, top : top + side, left : left + side].double() * kernel).sum((1, 2, 3))
        for top in range(0, image.shape[1], side)
        for left in range(0, image.shape[2], side)
    ]
    x = torch.cat([weights["cls_token"][0], torch.stack(patches) + weights["patch_embed.proj.bias"]])
    x = x + weights["pos_embed"][0]
    dim = x.shape[1]
    for index in range(sum(name.endswith("ls1.gamma") for name in weights)):
        block = f"blocks.{index}"
        fused = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        outputs = []
        for head in range(heads):
            columns = slice(head * dim // heads, (head + 1) * dim // heads)
            query, key, value = (fused[:, part * dim : (part + 1) * dim][:, columns] for part in range(3))
            scores = query @ key.T / math.sqrt(dim // heads)
            outputs.append(scores.softmax(-1) @ value)
        x = x + weights[f"{block}.ls1.gamma"] * linear(torch.cat(outputs, 1), f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + weights[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "norm")


def test_transformers_equals_the_written_out_model_in_float64(exported, run, images):
    backbone = checkpoint.load_run_encoder(run).backbone
    weights = dict(backbone.state_dict())
    grid = (SIZE // 14, SIZE // 14)
    weights["pos_embed"] = resize_position_embedding(weights["pos_embed"], grid)
    model = AutoModel.from_pretrained(exported / "transformers").double()
    with torch.inference_mode():
        tokens = model(pixel_values=images[:1].double()).last_hidden_state[0]
    torch.testing.assert_close(tokens, plain_transformer(weights, images[0], heads=2), atol=1e-10, rtol=0)


def test_every_parameter_is_mapped_once(exported, run):
    backbone = checkpoint.load_run_encoder(run).backbone
    weights = backbone.state_dict()
    pieces = to_transformers(weights, TINY)
    assert sum(piece.numel() for piece in pieces.values()) == sum(weight.numel() for weight in weights.values())
    back = from_transformers(pieces, TINY)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)

    model, report = Dinov2Model.from_pretrained(exported / "transformers", output_loading_info=True)
    assert not any(report.values())
    fused = weights["blocks.2.attn.qkv.weight"]
    attention = model.encoder.layer[2].attention
    attention = getattr(attention, "attention", attention)  # the lowest version nests them, under other names
    projections = [module for module in attention.children() if isinstance(module, torch.nn.Linear)][:3]
    for place, projection in enumerate(projections):
        assert torch.equal(projection.weight, fused[128 * place : 128 * (place + 1)])
    assert torch.equal(model.embeddings.mask_token, weights["mask_token"])


@pytest.mark.parametrize("change", ["missing", "unknown"])
def test_mapping_is_strict(run, change):
    weights = dict(checkpoint.load_run_encoder(run).backbone.state_dict())
    pieces = to_transformers(weights, TINY)
    if change == "missing":
        del weights["blocks.3.ls2.gamma"], pieces["encoder.layer.3.layer_scale2.lambda1"]
    else:
        weights["register_token"] = pieces["embeddings.register_tokens"] = torch.zeros(1, 4, 128)
    with pytest.raises(ValueError, match="ls2.gamma|register_token"):
        to_transformers(weights, TINY)
    with pytest.raises(ValueError, match="scale2|register_token"):
        from_transformers(pieces, TINY)


ARCHITECTURES = {
    "Dinov2WithRegistersModel": dataclasses.replace(TINY, registers=3),
    "DINOv3ViTModel": dataclasses.replace(TINY, positions="rotary"),
    "DINOv3ViTModel with registers": dataclasses.replace(TINY, positions="rotary", registers=2, patch_size=16),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_other_architectures_pass_the_gate_and_load_back(kind, shards, tmp_path):
    sizes = ARCHITECTURES[kind]
    run, out = write_run(tmp_path / "run", shards, sizes), tmp_path / "out"
    side = 8 * sizes.patch_size
    export(ExportConfig(run=str(run), out=str(out), image_size=side, samples=2, torch_export=True))
    report = json.loads((out / "parity.json").read_text())
    assert report["passed"] and report["pairs"]["training - torch_export"]["patch"]["max_abs"] <= 1e-5
    theirs, ours = checkpoint.load_run_encoder(run), load_encoder(out)
    images = torch.stack([theirs.prepare(DepthShards(str(shards)).sample(index)[0], side) for index in (0, 3)])
    class_feature, patch_features = ours(images)
    assert patch_features.shape == (2, 8, 8, 128) and ours.backbone.config.registers == sizes.registers
    for feature, other in zip((class_feature, patch_features), theirs(images), strict=True):
        torch.testing.assert_close(feature, other, atol=1e-5, rtol=0)
    model = AutoModel.from_pretrained(out / "transformers")
    assert type(model).__name__ == kind.split()[0]
    small = images[..., ::2, :]  # off the exported grid these architectures are resized alike everywhere
    with torch.inference_mode():
        tokens = model(pixel_values=images).last_hidden_state
        off_grid = model(pixel_values=small).last_hidden_state
        by_timm = timm.create_model(f"local-dir:{out / 'timm'}", pretrained=True).eval()
        torch.testing.assert_close(by_timm(images), class_feature, atol=1e-5, rtol=0)
        torch.testing.assert_close(by_timm.forward_features(small), off_grid, atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens[:, 1 + sizes.registers :].unflatten(1, (8, 8)), patch_features, atol=1e-5, rtol=0)
    torch.testing.assert_close(off_grid, ours.backbone.forward_features(small), atol=1e-5, rtol=0)
    weights = theirs.backbone.state_dict()
    pieces = to_transformers(weights, sizes)
    back = from_transformers(pieces, sizes)
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)
    assert load_file(out / "transformers" / "model.safetensors").keys() == pieces.keys()
    loaded = torch.export.load(out / "torch_export" / "model.pt2").module()
    depth, prepared = raw_and_prepared(theirs, shards, side)
    with torch.inference_mode():
        tokens = model(pixel_values=prepared).last_hidden_state
    for batch in (depth[:1], depth.repeat(2, 1, 1, 1)):
        torch.testing.assert_close(loaded(batch)[0], tokens.repeat(2, 1, 1)[: len(batch)], atol=1e-5, rtol=0)
    card = (out / "transformers" / "README.md").read_text()
    assert f"(1, {1 + sizes.registers} + patches, 128)" in card
    assert ("rotary and fit every size" in card) == (sizes.positions == "rotary")


def swapped(pieces):
    query, key = (f"encoder.layer.1.attention.attention.{name}.weight" for name in ("query", "value"))
    return pieces | {query: pieces[key], key: pieces[query]}


def nudged(pieces):
    name = "encoder.layer.2.mlp.fc2.weight"
    changed = pieces[name].clone()
    changed[5, 7] += 1e-2
    return pieces | {name: changed}


def not_finite(pieces):
    return pieces | {"layernorm.bias": pieces["layernorm.bias"] * math.nan}


@pytest.mark.parametrize("corrupt", [swapped, nudged, not_finite])
def test_a_changed_tensor_publishes_nothing(corrupt, place, run, monkeypatch, tmp_path):
    arguments = ExportConfig(run=str(run), out=str(tmp_path / "out"), image_size=56, samples=1)
    monkeypatch.setattr(model_folders, "to_transformers", lambda *given: corrupt(to_transformers(*given)))
    with pytest.raises(GateError, match="nothing exported") as caught:
        export(arguments)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["parity.json"]
    report = json.loads((tmp_path / "out" / "parity.json").read_text())
    assert report["passed"] is False
    assert report["pairs"]["training - timm"]["patch"]["max_abs"] <= 1e-5
    difference = report["pairs"]["training - transformers"]["patch"]["max_abs"]
    assert difference is None if corrupt is not_finite else difference > 1e-5
    if corrupt is not nudged:
        return
    monkeypatch.undo()
    export(arguments)
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"] is True


def test_the_gate_covers_timm(run, monkeypatch, tmp_path):
    def turned(folder, weights, *others):
        return model_folders.write_timm(folder, weights | {"pos_embed": weights["pos_embed"].flip(1)}, *others)

    monkeypatch.setattr(export_module, "write_timm", turned)
    with pytest.raises(GateError, match="timm"):
        export(ExportConfig(run=str(run), out=str(tmp_path / "out"), image_size=56, samples=1))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["parity.json"]


def test_a_tensor_transformers_does_not_know_fails_the_gate(run, monkeypatch, tmp_path):
    def extended(*given):
        return to_transformers(*given) | {"embeddings.register_tokens": torch.zeros(1, 4, 128)}

    monkeypatch.setattr(model_folders, "to_transformers", extended)
    with pytest.raises(GateError, match="register_tokens"):
        export(ExportConfig(run=str(run), out=str(tmp_path / "out"), image_size=56, samples=1))
    assert not any(tmp_path.iterdir())


def test_weights_that_are_not_finite(shards, tmp_path):
    run = write_run(tmp_path / "run", shards, spoil="blocks.1.mlp.fc1.weight")
    with pytest.raises(GateError, match=r"blocks\.1\.mlp\.fc1\.weight is not finite"):
        export(ExportConfig(run=str(run), out=str(tmp_path / "out"), image_size=56))
    assert not (tmp_path / "out").exists()


def test_compare_looks_at_every_image_and_feature():
    images = [torch.full((1, 2, 2), float(index)) for index in range(3)]

    def model(image):
        return image.mean().expand(1, 5, 4).clone()

    def off_once(image):
        tokens = model(image)
        tokens[0, 4, 3] += 2e-5 * (image.mean() == 1)
        return tokens

    def nan_once(image):
        tokens = model(image)
        tokens[0, 0, 0] = math.nan if image.mean() == 1 else tokens[0, 0, 0]
        return tokens

    assert compare({"a": model, "b": model}, images, 0.0)["passed"] is True
    report = compare({"a": model, "b": off_once}, images, 1e-5)
    assert report["passed"] is False and worst(report)[0] == "a - b, patch features"
    assert report["pairs"]["a - b"]["patch"]["max_abs"] == pytest.approx(2e-5, rel=1e-2)
    assert report["pairs"]["a - b"]["patch"]["mean_abs"] == pytest.approx(2e-5 / 48, rel=1e-2)
    assert report["pairs"]["a - b"]["class"]["max_abs"] == 0
    assert compare({"a": model, "b": off_once}, images, 3e-5)["passed"] is True
    report = compare({"a": model, "b": nan_once}, images, 1e9)
    assert report["passed"] is False and worst(report) == ("a - b, class features", None)


def test_off_the_exported_grid_only_transformers_resizes_differently(exported, images):
    small = images[..., ::2, ::2]
    ours = load_encoder(exported).backbone.forward_features(small)
    with torch.inference_mode():
        by_timm = timm.create_model(f"local-dir:{exported / 'timm'}", pretrained=True).eval().forward_features(small)
        by_transformers = AutoModel.from_pretrained(exported / "transformers")(pixel_values=small).last_hidden_state
    torch.testing.assert_close(by_timm, ours, atol=1e-5, rtol=0)
    assert (by_transformers - ours).abs().max() > 1e-3


@pytest.mark.parametrize("layer_scale", [1.0, 1e-5])
def test_explicit_checkpoint_and_shards(layer_scale, shards, tmp_path):
    run = write_run(tmp_path / "run", tmp_path / "moved", dataclasses.replace(TINY, layer_scale=layer_scale), step=3)
    newest = checkpoint.load(checkpoint.checkpoints(run)[0])
    newest["teacher"] = {name: value * 0 for name, value in newest["teacher"].items()}
    checkpoint.save(newest | {"step": 9}, checkpoint.checkpoint_path(run, 9))
    older = checkpoint.checkpoint_path(run, 3)
    arguments = ExportConfig(run=str(run), out=str(tmp_path / "out"), image_size=56, samples=99)
    with pytest.raises(DataError, match="moved"):
        export(arguments)
    export(dataclasses.replace(arguments, checkpoint=str(older), shards=[str(shards)]))
    weights = load_file(tmp_path / "out" / "timm" / "model.safetensors")
    trained = checkpoint.load(older)["teacher"]
    assert torch.equal(weights["blocks.0.ls1.gamma"], trained["backbone.blocks.0.ls1.gamma"])
    assert torch.equal(weights["pos_embed"], trained["backbone.pos_embed"])
    provenance = json.loads((tmp_path / "out" / "transformers" / "provenance.json").read_text())
    assert provenance["step"] == 3 and provenance["training_data"] == "unknown"
    assert "unknown" in (tmp_path / "out" / "transformers" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["samples"] == 5


def test_the_network_behind_pseudo_depth_brings_its_own_terms(tmp_path):
    """Depth of freely licensed images that a non-commercial network estimated is not free of its terms."""
    folder = write_shards(tmp_path / "shards", licence="VisA, CC BY 4.0")
    assert not training_data(DepthShards(str(folder))).non_commercial
    manifest = json.loads((folder / "manifest.json").read_text())
    estimated = {"model": "owner/net", "revision": "c0ffee", "licence": "CC-BY-NC-4.0"}
    manifest["sources"]["example"]["pseudo_depth"] = estimated
    (folder / "manifest.json").write_text(json.dumps(manifest))
    data = training_data(DepthShards(str(folder)))
    assert data.rows[0]["licence"] == "VisA, CC BY 4.0; depth by owner/net, CC-BY-NC-4.0" and data.non_commercial


@pytest.mark.parametrize(
    "licence",
    [
        "<script>alert(1)</script>", "[free](https://example.org)", "![x](https://example.org/x.png)",
        "`a` **b** ~~c~~ &lt;", "_a_ __b__ c_d $e$", "a | b | c", "one\n\n# A title\n| x |", "a\\| b", "<!-- gone -->",
    ],
)  # fmt: skip
def test_what_a_manifest_says_is_text_on_a_card_and_no_markup(tmp_path, licence):
    shards = write_shards(tmp_path / "shards", licence=licence)
    card = _training(Subject(PretrainConfig(), 7, 56, "apache-2.0", training_data(DepthShards(str(shards))), {}, {}))
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    page = ElementTree.fromstring(f"<page>{parser.render(card)}</page>")
    table = page.find("table")
    cells = [[cell.text for cell in row] for row in table.iter("tr")][1:]
    assert cells == [["example", "5", " ".join(licence.split())]]
    assert {part.tag for part in table.iter()} == {"table", "thead", "tbody", "tr", "th", "td"}
    assert len(page.findall("table")) == 1 and [title.text for title in page.iter("h1")] == []


def test_a_card_names_the_second_teacher(run):
    config = load_config(PretrainConfig, run / "config.yaml")
    for teacher, terms in [
        ("lite0?layers=2-3", "Apache-2.0 by the licence file"),
        ("timm:resnet18?layers=1-2", "this card does not know it"),
        (str(run), "this card does not know it"),
    ]:
        config.distill.teacher, config.loss.koleo_weight, config.loss.dense_weight = teacher, 0.0, 0.5
        text = _training(Subject(config, 7, 56, "apache-2.0", None, {}, {}))
        name = run.name if teacher == str(run) else teacher
        assert f"frozen encoder `{name}` on the same depth" in text and terms in text
        assert "KoLeo" not in text and "a dense loss between crops (0.5)" in text and str(run.parent) not in text


def test_a_card_says_where_no_loss_read_the_class_token(run):
    config = load_config(PretrainConfig, run / "config.yaml")
    subject = Subject(config, 7, 56, "apache-2.0", None, {}, {"criterion": "last"})
    assert "DINOv2 recipe" in _title(subject) and "class token" not in _title(subject)
    local = f"{config.crops.global_size} and {config.crops.local_crops} of {config.crops.local_size} pixels"
    assert local in " ".join(_training(subject).split())
    config.loss.dino_weight, config.loss.ibot_weight, config.loss.koleo_weight = 0.0, 0.0, 0.0
    config.loss.surface_weight = 1.0
    assert "**No loss read the class token**" in _title(subject) and "DINOv2" not in _title(subject)
    text = " ".join(_training(subject).split())
    assert text.startswith("## Training the surface of every patch (1); 7 steps")
    assert f"per map 2 crops of {config.crops.global_size} pixels" in text and " and 2 of" not in text
    config.distill.teacher = "lite0"
    assert "No loss read" not in _title(subject)


def test_cards_and_papers(exported, place, run):
    for library in ("transformers", "timm"):
        folder = exported / library
        card = (folder / "README.md").read_text()
        front, body = card.removeprefix("---\n").split("\n---\n", 1)
        metadata = yaml.safe_load(front)
        assert metadata["license"] == "apache-2.0"
        assert metadata["library_name"] == library
        assert metadata["pipeline_tag"] == "image-feature-extraction"
        assert {"depth", "anomaly-detection", "dinov2"} <= set(metadata["tags"])
        assert metadata["datasets"] == ["example"]
        assert "model-index" not in metadata
        assert "non-commercial" in body and "CC BY-NC-SA 4.0" in body
        assert "`method` = 'plane'" in body and "`scale` = 0.07" in body and "metres" in body
        assert "2 crops of\n56 and 8 of 28 pixels, in other steps 84 and 14, spatial augmentation only" in body
        assert "Apache License" in (folder / "LICENSE").read_text()
        for path in folder.iterdir():
            assert str(place).encode() not in path.read_bytes(), f"{path} names a folder of this machine"
    main = exported / "transformers"
    config = json.loads((main / "config.json").read_text())
    assert config["dino_depth"]["normalization"] == dataclasses.asdict(Normalization(method="plane", scale=0.07))
    assert (config["image_size"], config["num_channels"], config["dino_depth"]["missing_value"]) == (SIZE, 1, 0)
    training = yaml.safe_load((main / "training_config.yaml").read_text())
    assert training["model"]["dim"] == 128 and training["data"]["shards"] == "shards"
    provenance = json.loads((main / "provenance.json").read_text())
    (row,) = provenance["training_data"]
    assert (row["dataset"], row["maps"], len(row["manifest_sha256"])) == ("example", 5, 64)
    assert provenance["training_environment"] == {"git_revision": "f00"}
    assert provenance["export"]["dino_depth"] == dino_depth.__version__


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_onnx_and_torch_export_at_896_with_any_batch(positions, shards, tmp_path):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    sizes = ModelConfig(dim=32, depth=2, heads=1, layer_scale=1.0, positions=positions)
    run, out = write_run(tmp_path / "run", shards, sizes), tmp_path / "out"
    export(ExportConfig(run=str(run), out=str(out), samples=1, onnx=True, torch_export=True))
    report = json.loads((out / "parity.json").read_text())
    assert report["image_size"] == 896
    for kind in ("onnx", "torch_export"):
        assert report["pairs"][f"training - {kind}"]["patch"]["max_abs"] <= 1e-5
    encoder = checkpoint.load_run_encoder(run)
    depth, images = raw_and_prepared(encoder, shards, 896)
    expected = encoder.backbone.forward_features(images)
    session = onnxruntime.InferenceSession(out / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    program = torch.export.load(out / "torch_export" / "model.pt2").module()
    for count in (1, 2):
        with torch.inference_mode():
            results = [session.run(None, {"depth": depth[:count].numpy()}), program(depth[:count])]
        for tokens, pooled in results:
            np.testing.assert_allclose(tokens, expected[:count], atol=1e-5, rtol=0)
            np.testing.assert_allclose(pooled, expected[:count, 0], atol=1e-5, rtol=0)


def test_onnx_without_its_packages(run, monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ConfigError, match=r"onnxscript: pip install 'dino-depth\[onnx\]'"):
        export(ExportConfig(run=str(run), out=str(tmp_path / "out"), onnx=True))


def test_what_cannot_work_is_refused_at_once(exported, run, shards, tmp_path):
    def fails(error, message, **changes):
        arguments = {"run": str(run), "out": str(tmp_path / "new"), "image_size": 56} | changes
        with pytest.raises(error, match=message) as caught:
            export(ExportConfig(**arguments))
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "new").exists()

    before = (exported / "timm" / "model.safetensors").stat().st_mtime_ns
    fails(ConfigError, "not empty", out=str(exported))
    assert (exported / "timm" / "model.safetensors").stat().st_mtime_ns == before
    fails(ConfigError, "not a folder", out=str(run / "config.yaml"))
    fails(ConfigError, "--out is missing", out="")
    fails(ConfigError, r"no run folder \(config.yaml is missing\)", run=str(tmp_path / "nowhere"))
    fails(ConfigError, "no such file", checkpoint=str(tmp_path / "step-00000001.pt"))
    fails(ConfigError, "patch size 14; use 98", image_size=100)
    fails(ConfigError, "--samples", samples=0)
    fails(ConfigError, "--tolerance", tolerance=math.nan)
    fails(ConfigError, "--license", license="Apache 2.0")
    fails(ConfigError, "--push-to-hub", push_to_hub="a/b/c")
    fails(DataError, "manifest.json", shards=str(tmp_path))
    empty = write_run(tmp_path / "empty", shards)
    (empty / "checkpoints" / "step-00000007.pt").write_bytes(b"cut short")
    fails(DataError, "unreadable checkpoint", run=str(empty))
    (empty / "checkpoints" / "step-00000007.pt").unlink()
    fails(ConfigError, "no checkpoint yet", run=str(empty))
    fails(ReportedError, "cannot be written", out=str(run / "config.yaml" / "out"))


def test_push_without_network_keeps_the_export(run, monkeypatch, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
    out = tmp_path / "out"
    with pytest.raises(ReportedError, match="--push-to-hub me/depth: ") as caught:
        export(ExportConfig(run=str(run), out=str(out), image_size=56, samples=1, push_to_hub="me/depth"))
    assert caught.value.exit_code == 1
    assert "\n" not in str(caught.value) and f"hf upload me/depth-timm {out / 'timm'}" in str(caught.value)
    assert {path.name for path in out.iterdir()} == {"transformers", "timm", "parity.json"}
    load_encoder(out)


def test_push_sends_each_folder_to_its_repository(run, monkeypatch, tmp_path):
    calls = []

    class Hub:
        def __init__(self, **names):
            pass

        def create_repo(self, repository, private, exist_ok):
            calls.append((repository, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, path_in_repo, commit_message):
            calls.append((repo_id, folder_path.name, path_in_repo, (folder_path / "README.md").is_file()))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    arguments = ExportConfig(run=str(run), out=str(tmp_path / "out"), image_size=56, samples=1)
    export(dataclasses.replace(arguments, push_to_hub="me/depth", private=True, torch_export=True))
    assert calls == [
        ("me/depth", True, True), ("me/depth", "transformers", ".", True),
        ("me/depth-timm", True, True), ("me/depth-timm", "timm", ".", True),
        ("me/depth", True, True), ("me/depth", "torch_export", "torch_export", False),
    ]  # fmt: skip
    assert 'load_encoder("me/depth")' in (tmp_path / "out" / "transformers" / "README.md").read_text()
    assert '"hf-hub:me/depth-timm"' in (tmp_path / "out" / "timm" / "README.md").read_text()


def test_load_encoder_from_the_hub(exported, monkeypatch):
    asked = {}

    def snapshot_download(repository, revision, allow_patterns):
        asked.update(repository=repository, revision=revision, allow_patterns=allow_patterns)
        return str(exported / "transformers")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert load_encoder("me/depth", revision="v1").size == SIZE
    # Nothing that could be executed or unpickled is even fetched.
    assert asked == {"repository": "me/depth", "revision": "v1", "allow_patterns": ["config.json", "model.safetensors"]}


def copy_export(exported, folder, change=None, weights=None):
    folder.mkdir()
    config = json.loads((exported / "transformers" / "config.json").read_text())
    if change:
        change(config)
    (folder / "config.json").write_text(json.dumps(config))
    content = (exported / "transformers" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content if weights is None else weights(content))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.pop("dino_depth"), "no key 'dino_depth'"),
        (lambda config: config.update(num_channels=3), "num_channels is 3"),
        (lambda config: config.update(use_swiglu_ffn=True), "use_swiglu_ffn"),
        (lambda config: config.update(image_size="112"), "image_size must be an integer from 1"),
        (lambda config: config.update(model_type="vit"), "model_type is 'vit', none of dinov2, "),
        (lambda config: config["dino_depth"].pop("step"), "dino_depth lacks"),
        (lambda config: config["dino_depth"]["normalization"].pop("scale"), "normalization has keys"),
        (lambda config: config["dino_depth"]["normalization"].update(method="mean"), "method cannot be 'mean'"),
        (lambda config: config["dino_depth"]["normalization"].update(scale="1"), "scale cannot be '1'"),
    ],
)
def test_load_encoder_refuses_another_model(exported, tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        load_encoder(copy_export(exported, tmp_path / "copy", change))


def test_what_was_trained_before_the_second_formula_keeps_the_first(exported, run, tmp_path):
    old = copy_export(exported, tmp_path / "copy", lambda config: config["dino_depth"]["normalization"].pop("formula"))
    assert load_encoder(old).normalization == Normalization("plane", scale=0.07, formula=1)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert load_config(PretrainConfig, run / "config.yaml").data.normalization.formula == 2
    del settings["data"]["normalization"]["formula"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert load_config(PretrainConfig, tmp_path / "config.yaml").data.normalization.formula == 1


def test_load_encoder_names_what_is_broken(exported, run, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="unreadable weights"):
        load_encoder(copy_export(exported, tmp_path / "short", weights=lambda content: content[:5000]))
    other = copy_export(exported, tmp_path / "other")
    # Copies: a loaded file is mapped, and is written anew here.
    tensors = load((other / "model.safetensors").read_bytes())
    save_file({name: tensor for name, tensor in tensors.items() if "norm1" not in name}, other / "model.safetensors")
    with pytest.raises(DataError, match="weights missing.*norm1"):
        load_encoder(other)
    save_file(tensors | {"layernorm.bias": torch.zeros(64)}, other / "model.safetensors")
    with pytest.raises(DataError, match="size mismatch for norm.bias"):
        load_encoder(other)
    (other / "model.safetensors").unlink()
    with pytest.raises(DataError, match="unreadable weights"):
        load_encoder(other)
    with pytest.raises(ConfigError, match="no such folder"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="no config.json in it"):
        load_encoder(run)
    with pytest.raises(ConfigError, match="model_type is None"):
        load_encoder(exported / "timm")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ReportedError, match="neither a folder nor a readable Hub repository") as caught:
        load_encoder("nobody/nothing-of-this-name")
    assert "\n" not in str(caught.value)


def test_importing_the_package_is_light():
    script = "import sys, dino_depth; assert 'load_encoder' in dino_depth.__all__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_example_runs(exported, tmp_path, monkeypatch, capsys):
    script = Path(__file__).parents[1] / "docs" / "examples" / "features.py"
    depth = np.full((50, 40), 0.6)
    depth[10:30, 10:25], depth[40:] = 0.5, 0
    np.save(tmp_path / "depth.npy", depth)
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["depth.npy", "mine.png"]):
        monkeypatch.setattr(sys, "argv", [str(script), str(exported), *arguments])
        runpy.run_path(str(script))
        assert "class feature (1, 128), patch features (1, 8, 8, 128)" in capsys.readouterr().out
    for name in ("features.png", "mine.png"):
        picture = np.asarray(Image.open(tmp_path / name))
        assert picture.shape == (SIZE, SIZE, 3) and picture.std() > 20
    assert not picture[-14:].any()  # rows without depth, of which nothing is shown
