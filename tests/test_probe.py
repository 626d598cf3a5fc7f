"""The probe: its equations against plain transcriptions, and encoders whose score is known beforehand."""

import io
import json
import math
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dino_depth import checkpoint
from dino_depth.config import CropConfig, DataConfig, ModelConfig, PretrainConfig, TrainConfig, save_config
from dino_depth.depth import DepthMap, Normalization, encode_png
from dino_depth.encoder import ARCHITECTURES, Encoder
from dino_depth.errors import ConfigError, DataError
from dino_depth.probing import figures as statement
from dino_depth.probing.figures import FIGURES, bootstrap, pca_colours
from dino_depth.probing.probe import (
    ProbeConfig,
    collect_features,
    demo_gate,
    load_with_twin,
    print_table,
    probe,
    probe_encoders,
)
from dino_depth.readout import PENALTIES, Moments, fit_ridge, knn
from dino_depth.shards import DepthShards
from dino_depth.surface import FOCAL, SHARPEST, WINDOW, patch_geometry, surface
from dino_depth.vit import DepthTransformer
from dino_depth.weight_names import to_transformers
from tests.conftest import write_manifest

MODEL = ModelConfig(patch_size=14, dim=32, depth=2, heads=2, drop_path=0.0, layer_scale=1.0, initialization="xavier")
SIZE = 56
CATEGORIES = ("bump", "dent", "tilt")


def relief(category: str, random: np.random.Generator, side: int = 64) -> DepthMap:
    """A noisy bump towards the camera, dent away from it, or tilted plane, half a metre away, with a hole."""
    v, u = np.mgrid[:side, :side] / side - 0.5
    centre = random.uniform(-0.1, 0.1, 2)
    distance = (u - centre[0]) ** 2 + (v - centre[1]) ** 2
    shape = {"bump": -0.05 * np.exp(-distance / 0.05), "dent": 0.05 * np.exp(-distance / 0.05)}
    depth = 0.5 + shape.get(category, random.uniform(0.1, 0.2) * u) + random.normal(0, 2e-4, (side, side))
    valid = np.ones((side, side), bool)
    row, column = random.integers(0, side - 8, 2)
    valid[row : row + 8, column : column + 8] = False
    return DepthMap(depth, valid)


def write_shards(folder, splits=("train", "test"), categories=CATEGORIES, maps=8, seed=0, relief=relief):
    """A shard folder as prep leaves it: one tar and its manifest."""
    random = np.random.default_rng(seed)
    folder.mkdir()
    path = folder / "shard-000000.tar"
    with tarfile.open(path, "w") as tar:
        for split in splits:
            for category in categories:
                for number in range(maps):
                    key = f"{split}_{category}_{number}"
                    png, near, far = encode_png(relief(category, random))
                    meta = {"dataset": "made", "category": category, "split": split, "label": "good"}
                    meta |= {"near": near, "far": far, "kind": "metric", "unit": "m"}
                    for name, data in ((f"{key}.depth.png", png), (f"{key}.json", json.dumps(meta).encode())):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    write_manifest(folder, len(splits) * len(categories) * maps, {"made": {}})
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards") / "made")


def encoder(name="trained", seed=0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(DepthTransformer(MODEL, SIZE), Normalization("minmax"), name, SIZE)


class Oracle(nn.Module):
    """Features that state what the input is: the relief's sign as class feature, the patch's surface as patch feature.

    ``prepare`` passes metric depth through, so nothing is lost on the way.
    """

    name, size, patch_size, dim = "oracle", SIZE, 14, 6

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.helper = encoder()
        self.helper.normalization = None

    def prepare(self, depth_map, size=None):
        from dino_depth.resample import fit_square

        return fit_square(torch.from_numpy(depth_map.depth), torch.from_numpy(depth_map.valid), size or SIZE)

    def forward(self, images):
        flat = images.masked_fill(images == 0, math.nan).flatten(1)
        near, far = flat.nan_to_num(9).min(1).values, flat.nan_to_num(0).max(1).values
        middle = flat.nanmedian(1).values
        skew = (far + near - 2 * middle) / (far - near)
        code = torch.stack([skew < -0.3, skew > 0.3, skew.abs() <= 0.3], 1).float()
        targets, _ = patch_geometry(images, 14)
        code = torch.cat([code, torch.zeros(len(code), 3)], 1)
        return code, torch.cat([targets, torch.zeros(*targets.shape[:3], 2)], -1) + 1e-3 * code[:, None, None]


class Constant(nn.Module):
    """Says the same of everything."""

    name, size, patch_size, dim = "constant", SIZE, 14, 6

    def __init__(self, value=1.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value), requires_grad=False)

    prepare = Oracle.prepare

    def forward(self, images):
        return self.value.expand(len(images), 6), self.value.expand(len(images), 4, 4, 6)


# --- surface ---------------------------------------------------------------------------------------------------------


def pixels_to_depth(z: torch.Tensor, side: int) -> torch.Tensor:
    """Depth whose surface in pixel units is ``z`` (height, width) up to a shift: the median becomes 1 metre."""
    return (1 + (z - z.median()) / (FOCAL * side))[None, None].double()


def grid(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    v, u = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return u.double() - side // 2, v.double() - side // 2


def test_plane_has_its_normal_and_no_curvature():
    u, v = grid(41)
    normals, curvature, known = surface(pixels_to_depth(0.3 * u - 0.4 * v, 41))
    expected = torch.tensor([0.3, -0.4, 1.0], dtype=torch.float64) / math.sqrt(1 + 0.09 + 0.16)
    inside = (0, slice(WINDOW, -WINDOW), slice(WINDOW, -WINDOW))
    assert torch.allclose(normals.permute(0, 2, 3, 1)[inside], expected.expand(37, 37, 3), atol=1e-9)
    assert curvature.abs().max() < 1e-9
    assert known[inside].all() and known.sum() == 37 * 37


@pytest.mark.parametrize("sign", [1, -1])
def test_sphere_has_curvature_one_over_radius(sign):
    u, v = grid(41)
    radius = 60.0
    # A sphere that bulges towards the camera (+1): depth is smallest at its centre.
    z = -sign * (radius**2 - u**2 - v**2).sqrt()
    normals, curvature, known = surface(pixels_to_depth(z, 41))
    inside = (0, slice(WINDOW, -WINDOW), slice(WINDOW, -WINDOW))
    assert torch.allclose(curvature[inside], torch.full((37, 37), sign / radius, dtype=torch.float64), rtol=0.01)
    exact = torch.stack([sign * u, sign * v, (radius**2 - u**2 - v**2).sqrt()], -1) / radius
    assert torch.allclose(normals.permute(0, 2, 3, 1)[inside], exact[inside[1:]], atol=2e-3)


def test_curvature_is_clipped_where_the_window_cannot_resolve_it():
    u, _ = grid(41)
    _, curvature, _ = surface(pixels_to_depth(50.0 * (u > 0), 41))
    assert curvature.abs().max() <= SHARPEST


def test_a_window_fit_is_plain_least_squares():
    random = np.random.default_rng(0)
    z = torch.from_numpy(random.normal(0, 3, (9, 9)))
    normals, curvature, _ = surface(pixels_to_depth(z, 9))
    v, u = (part.ravel() for part in np.mgrid[-2:3, -2:3])
    design = np.stack([np.ones(25), u, v, u * u / 2, u * v, v * v / 2], 1)
    _, p, q, r, s, t = np.linalg.lstsq(design, z[1:6, 3:8].numpy().ravel(), rcond=None)[0]
    length = math.sqrt(1 + p * p + q * q)
    assert normals[0, :, 3, 5].tolist() == pytest.approx([p / length, q / length, 1 / length], abs=1e-9)
    mean = ((1 + q * q) * r - 2 * p * q * s + (1 + p * p) * t) / (2 * length**3)
    assert float(curvature[0, 3, 5]) == pytest.approx(np.clip(mean, -SHARPEST, SHARPEST), abs=1e-9)


def test_missing_pixels_change_nothing_around_them():
    u, v = grid(42)
    depth = pixels_to_depth((u**2 + v**2) / 60, 42)
    whole = surface(depth)
    holed = depth.clone()
    holed[..., 10:14, 20:22] = 0
    normals, curvature, known = surface(holed)
    shift = depth.median() / holed[holed > 0].median()
    assert abs(shift - 1) < 2e-3
    assert not known[0, 8:16, 18:24].any() and known.sum() == whole[2].sum() - 8 * 6
    assert torch.allclose(normals * known[:, None], whole[0] * known[:, None], atol=2e-3)
    assert normals[0, :, 8:16, 18:24].abs().max() == 0 and curvature[0, 8:16, 18:24].abs().max() == 0


def test_patch_targets_are_means_over_known_pixels():
    u, v = grid(42)
    depth = pixels_to_depth((u**2 + v**2) / 60, 42)
    depth[..., 0:9, 14:28] = 0
    depth[..., 20:23, 20:23] = 0
    normals, curvature, known = surface(depth)
    targets, usable = patch_geometry(depth, 14)
    assert targets.shape == (1, 3, 3, 4)
    for row in range(3):
        for column in range(3):
            block = (0, slice(14 * row, 14 * row + 14), slice(14 * column, 14 * column + 14))
            inside = known[block]
            assert usable[0, row, column] == (inside.double().mean() >= 0.5)
            if inside.any():
                mean = [normals[0, axis][block[1:]][inside].mean() for axis in range(3)]
                mean.append(curvature[block][inside].mean())
                assert torch.allclose(targets[0, row, column], torch.stack(mean), atol=1e-9)
    assert not usable[0, 0, 1] and usable[0, 1, 1] and usable[0, 2, 2]


def test_an_empty_map_has_no_usable_patch():
    targets, usable = patch_geometry(torch.zeros(1, 1, 28, 28), 14)
    assert not usable.any() and targets.isfinite().all()


# --- readout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [1, 5, 500])
def test_knn_is_the_loop_it_stands_for(neighbours):
    random = np.random.default_rng(1)
    gallery, queries = random.normal(size=(60, 8)), random.normal(size=(30, 8))
    labels = random.integers(0, 4, 60)
    expected = []
    for query in queries:
        cosine = [float(query @ row / np.linalg.norm(query) / np.linalg.norm(row)) for row in gallery]
        votes = [0.0] * 4
        for index in sorted(range(60), key=lambda index: -cosine[index])[:neighbours]:  # noqa: B023
            votes[labels[index]] += math.exp(cosine[index] / 0.07)
        expected.append(int(np.argmax(votes)))
    got = knn(torch.from_numpy(gallery), torch.from_numpy(labels), torch.from_numpy(queries), neighbours, 4)
    assert got.tolist() == expected


def ridge_by_hand(features, targets, penalty):
    """Normal equations on standardised features, in float64."""
    mean, scale = features.mean(0), features.std(0)
    z = (features - mean) / scale
    y = targets - targets.mean(0)
    weights = np.linalg.solve(z.T @ z / len(z) + penalty * np.eye(z.shape[1]), z.T @ y / len(z)) / scale[:, None]
    return np.concatenate([weights, (targets.mean(0) - mean @ weights)[None]])


def test_ridge_is_the_normal_equations_with_the_best_penalty():
    random = np.random.default_rng(2)
    truth = random.normal(size=(6, 4))

    def draw(rows, noise):
        features = random.normal(size=(rows, 6)) * [1, 10, 0.1, 1, 1, 1] + [0, 3, 0, -2, 0, 0]
        return features, features @ truth + noise * random.normal(size=(rows, 4)) + 5

    fit, choose = draw(20, np.array([0, 1, 10, 100])), draw(50, np.array([0, 1, 10, 100]))
    moments = []
    for features, targets in (fit, choose):
        moments.append(Moments(6, 4))
        for start in range(0, len(features), 7):  # as batches arrive
            part = slice(start, start + 7)
            moments[-1].add(torch.from_numpy(features[part]), torch.from_numpy(targets[part]))
    weights = fit_ridge(*moments)
    assert moments[0].count == 20
    both = [np.concatenate(parts) for parts in zip(fit, choose, strict=True)]
    for output in range(4):
        errors = []
        for penalty in PENALTIES:
            trial = ridge_by_hand(*fit, penalty)[:, output]
            errors.append(np.square(choose[0] @ trial[:-1] + trial[-1] - choose[1][:, output]).sum())
        best = PENALTIES[int(np.argmin(errors))]
        assert np.allclose(weights[:, output], ridge_by_hand(*both, best)[:, output], rtol=1e-6, atol=1e-8)


def test_a_feature_that_never_changes_gets_no_weight():
    features = torch.randn(50, 3, dtype=torch.float64)
    features[:, 1] = 0.1
    targets = features[:, :1] * 2 + 1
    moments = [Moments(3, 1), Moments(3, 1)]
    for part in moments:
        part.add(features, targets)
    weights = fit_ridge(*moments)[:, 0]
    assert weights[1] == 0 and weights[[0, 3]].tolist() == pytest.approx([2, 1], abs=1e-4)


def query_rows(maps=40, seed=0, shift=0.0):
    """Made-up sums per map of a source, and the per-patch numbers they came from."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.nn.functional.normalize(torch.randn(maps, 3, 3, 4, generator=random, dtype=torch.float64), dim=-1)
    usable = torch.rand(maps, 3, 3, generator=random) > 0.3
    predicted = targets + (0.3 - shift) * torch.randn(maps, 3, 3, 4, generator=random, dtype=torch.float64)
    hits = [torch.rand(maps, generator=random) < 0.4 + shift for _ in range(2)]
    rows = statement.query_rows(hits, [statement.patch_sums(predicted, targets, usable)])
    return rows, hits, targets, usable, predicted


def test_figures_and_intervals_are_what_they_say():
    tables = {source: query_rows(seed=0, shift=shift) for source, shift in (("trained", 0.2), ("random", 0.0))}
    tables["pixels"] = query_rows(seed=3)
    result = bootstrap({source: table[0] for source, table in tables.items()}, 80, 7)

    def by_hand(table, chosen):
        _, hits, targets, usable, predicted = table
        y = np.concatenate([targets[i][usable[i]].numpy() for i in chosen])
        guess = np.concatenate([predicted[i][usable[i]].numpy() for i in chosen])
        r2 = 1 - np.square(y - guess).sum(0) / np.square(y - y.mean(0)).sum(0)
        cosine = (y[:, :3] * guess[:, :3]).sum(1) / np.linalg.norm(y[:, :3], axis=1)
        cosine /= np.linalg.norm(guess[:, :3], axis=1)
        angle = np.degrees(np.arccos(cosine)).mean()
        accuracy = [float(np.mean([bool(part[i]) for i in chosen])) for part in hits]
        return dict(zip(FIGURES, [*accuracy, r2[:3].mean(), r2[2], angle, r2[3]], strict=True))

    counts = np.random.default_rng(7).multinomial(40, np.full(40, 1 / 40), 80)
    draws = [np.repeat(np.arange(40), row) for row in counts]
    for source, table in tables.items():
        exact = by_hand(table, range(40))
        drawn = [by_hand(table, draw) for draw in draws]
        for name in FIGURES:
            assert result[name][source]["value"] == pytest.approx(exact[name])
            low, high = np.percentile([figure[name] for figure in drawn], [2.5, 97.5])
            assert [result[name][source][end] for end in ("low", "high")] == pytest.approx([low, high])
    paired = [
        by_hand(tables["trained"], draw)["curvature"] - by_hand(tables["random"], draw)["curvature"] for draw in draws
    ]
    assert result["curvature"]["gain"]["low"] == pytest.approx(np.percentile(paired, 2.5))
    again = bootstrap({source: table[0] for source, table in tables.items()}, 80, 7)
    other = bootstrap({source: table[0] for source, table in tables.items()}, 80, 8)
    assert again == result != other


def test_pca_colours_are_bounded_joint_and_masked():
    features = torch.randn(5, 4, 4, 16)
    features[..., 3] *= 9
    usable = torch.rand(5, 4, 4) > 0.3
    colours = pca_colours(features, usable)
    assert colours.shape == (5, 4, 4, 3) and colours.min() == 0 and colours.max() == 1
    assert colours[~usable].abs().max() == 0
    # The first colour is the direction that varies most, in the same units on every map.
    first, strong = colours[usable][:, 0], features[usable][:, 3]
    inside = (first > 0) & (first < 1)
    assert torch.corrcoef(torch.stack([first[inside], strong[inside]]))[0, 1] > 0.97
    assert torch.equal(colours, pca_colours(features.clone(), usable))
    with pytest.raises(DataError, match="too few"):
        pca_colours(features, torch.zeros(5, 4, 4, dtype=torch.bool))


# --- probe -----------------------------------------------------------------------------------------------------------


def test_an_oracle_is_right_and_a_constant_encoder_guesses(folder, capsys):
    result = probe_encoders(Oracle(), Constant(), ProbeConfig("-", folder, bootstrap=50, neighbours=5))
    figures = result["figures"]
    assert figures["knn_class"]["trained"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert figures["knn_class"]["random"]["value"] == pytest.approx(result["chance"]) == pytest.approx(1 / 3)
    for name in ("normal", "normal_z", "curvature"):
        assert figures[name]["trained"]["value"] > 0.999
        assert abs(figures[name]["random"]["value"]) < 0.1
    assert figures["normal_angle"]["trained"]["value"] < 0.5 < 2 < figures["normal_angle"]["random"]["value"]
    assert demo_gate(result) == []
    assert result["gallery_maps"] == result["query_maps"] == 24
    assert result["categories"] == ["bump", "dent", "tilt"]
    print_table(result)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and max(map(len, lines)) <= 80


def test_the_gate_names_what_fails(folder):
    worse = probe_encoders(Constant(), Oracle(), ProbeConfig("-", folder, bootstrap=50, neighbours=5))
    failures = demo_gate(worse)
    assert len(failures) == 2 and "kNN" in failures[0] and "curvature" in failures[1]
    for gain, passes in (
        ({"value": 0.06, "low": 0.031}, True),
        ({"value": 0.059, "low": 0.04}, False),
        ({"value": 0.2, "low": 0.03}, False),
    ):
        worse["figures"]["knn_class"]["gain"] = gain
        assert (len(demo_gate(worse)) == 1) == passes


def test_streaming_gives_what_collected_features_give(folder):
    """Batches, threads and moments change nothing: the slow way, everything in memory, has the same figures."""
    trained, random = encoder("trained", 0), encoder("random", 1)
    config = ProbeConfig("-", folder, bootstrap=10, neighbours=3, batch=5)
    result = probe_encoders(trained, random, config)
    shards = DepthShards(folder)
    split = shards.values("split")
    gallery, queries = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
    kept, asked = (collect_features(trained, shards, indices, batch=24) for indices in (gallery, queries))
    labels = [
        torch.tensor([CATEGORIES.index(shards.values("category")[i]) for i in part]) for part in (gallery, queries)
    ]
    voted = knn(kept["patches"].mean((1, 2)), labels[0], asked["patches"].mean((1, 2)), 3, 3)
    assert result["figures"]["knn_patch"]["trained"]["value"] == pytest.approx((voted == labels[1]).double().mean())
    moments = []
    for chosen in (gallery % 4 != 0, gallery % 4 == 0):
        targets, usable = patch_geometry(kept["depth"][chosen], 14)
        moments.append(Moments(32, 4))
        moments[-1].add(kept["patches"][chosen][usable], targets[usable])
    weights = fit_ridge(*moments)
    targets, usable = patch_geometry(asked["depth"], 14)
    predicted = asked["patches"][usable].double() @ weights[:-1] + weights[-1]
    truth = targets[usable].double()
    r2 = 1 - (predicted - truth).square().sum(0) / (truth - truth.mean(0)).square().sum(0)
    assert result["figures"]["curvature"]["trained"]["value"] == pytest.approx(float(r2[3]), rel=1e-4)
    assert result["figures"]["normal"]["trained"]["value"] == pytest.approx(float(r2[:3].mean()), rel=1e-4)


def make_run(path, folder, splits=("train",)):
    config = PretrainConfig(
        data=DataConfig(shards=folder, splits=list(splits), normalization=Normalization("minmax")),
        crops=CropConfig(global_size=SIZE, local_size=28),
        model=MODEL,
        train=TrainConfig(seed=5),
    )
    path.mkdir()
    save_config(config, path / "config.yaml")
    torch.manual_seed(9)
    weights = {"backbone." + key: value for key, value in DepthTransformer(MODEL, SIZE).state_dict().items()}
    checkpoint.save({"step": 3, "teacher": weights}, checkpoint.checkpoint_path(path, 3))
    return path


@pytest.mark.parametrize("splits", [["train"], []])
def test_probe_of_a_run_writes_its_result(folder, tmp_path, capsys, splits):
    run = make_run(tmp_path / "run", folder, splits)
    trained, random = load_with_twin(str(run))
    torch.manual_seed(5)
    first = DepthTransformer(MODEL, SIZE).state_dict()
    assert all(torch.equal(value, first[key]) for key, value in random.backbone.state_dict().items())
    assert not torch.equal(trained.backbone.pos_embed, random.backbone.pos_embed)
    out = tmp_path / "new" / "probe.json"
    result = probe(ProbeConfig(str(run), folder, str(out), bootstrap=20, device="cpu"))
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert [path.name for path in out.parent.iterdir()] == ["probe.json"]
    assert "run, step 3" in capsys.readouterr().out
    assert result["queries_seen_in_training"] == (0 if splits else 24)
    assert result["size"] == SIZE and result["beside"] == "run, random initialisation"
    assert probe(ProbeConfig(str(run), folder, bootstrap=20, device="cpu"))["figures"] == result["figures"]


def test_an_export_is_probed_beside_a_new_network(tmp_path):
    torch.manual_seed(3)
    weights = DepthTransformer(MODEL, SIZE).state_dict()
    config = ARCHITECTURES["dinov2"] | {
        "model_type": "dinov2",
        "patch_size": 14,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config |= {"layerscale_value": 1.0, "image_size": SIZE}
    config["dino_depth"] = {"step": 7, "normalization": asdict(Normalization("minmax"))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(to_transformers(weights, MODEL), tmp_path / "model.safetensors")
    trained, twin = load_with_twin(str(tmp_path), 4, 28)
    assert all(torch.equal(value, weights[key]) for key, value in trained.backbone.state_dict().items())
    assert twin.backbone.pos_embed.shape == (1, 5, 32) and twin.normalization == trained.normalization
    again, other = (load_with_twin(str(tmp_path), seed, 28)[1].backbone.pos_embed for seed in (4, 5))
    assert torch.equal(twin.backbone.pos_embed, again) and not torch.equal(again, other)


def test_a_single_split_is_divided_by_key(tmp_path):
    folder = write_shards(tmp_path / "one", splits=("test",), maps=12)
    result = probe_encoders(Oracle(), Constant(), ProbeConfig("-", folder, bootstrap=10))
    assert result["gallery_maps"] + result["query_maps"] == 36
    assert 4 <= result["query_maps"] <= 20


def test_caps_are_seeded(folder):
    config = ProbeConfig("-", folder, bootstrap=10, max_gallery=18, max_queries=9, neighbours=1)
    results = [probe_encoders(Oracle(), Constant(), config) for _ in range(2)]
    assert results[0]["gallery_maps"] == 18 and results[0]["query_maps"] == 9
    assert results[0]["figures"] == results[1]["figures"]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"gallery_splits": ["trian"]}, ConfigError, "no split 'trian'; found test, train"),
        ({"query_splits": ["train"]}, ConfigError, "'train' is in both"),
        ({"max_queries": 1}, DataError, "2 are needed"),
        ({"size": 57}, ConfigError, "no multiple of the patch size 14; use 56"),
    ],
)
def test_settings_that_cannot_work(folder, changes, kind, message):
    with pytest.raises(kind, match=message):
        probe_encoders(encoder(), encoder(), ProbeConfig("-", folder, **changes))


def test_data_that_cannot_work(tmp_path, folder):
    single = write_shards(tmp_path / "single", categories=("bump",))
    with pytest.raises(DataError, match="'bump': kNN by category needs at least two"):
        probe_encoders(Oracle(), Constant(), ProbeConfig("-", single))
    one = write_shards(tmp_path / "a", splits=("train",), categories=("bump", "dent"))
    two = write_shards(tmp_path / "b", splits=("test",), categories=("bump", "tilt"))
    with pytest.raises(DataError, match="'tilt' has no map in the gallery"):
        probe_encoders(Oracle(), Constant(), ProbeConfig("-", [one, two]))
    holes = write_shards(tmp_path / "holes", relief=lambda *_: DepthMap.from_values(np.eye(64) + 0.0))
    with pytest.raises(DataError, match="no patch of the gallery maps has enough valid depth"):
        probe_encoders(encoder(), encoder(), ProbeConfig("-", holes))
    flat = write_shards(tmp_path / "flat", relief=lambda *_: DepthMap.from_values(np.ones((64, 64))))
    with pytest.raises(DataError, match="R2 normal, mean is undefined"):
        probe_encoders(encoder(), encoder(), ProbeConfig("-", flat, bootstrap=5))
    with pytest.raises(DataError, match="features of 24 maps are NaN or infinite, first of sample train_bump_0"):
        probe_encoders(Constant(math.nan), Constant(), ProbeConfig("-", folder))


def test_output_that_cannot_be_written(folder, tmp_path):
    run = make_run(tmp_path / "run", folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out .*file/probe.json"):
        probe(ProbeConfig(str(run), folder, str(tmp_path / "file" / "probe.json"), bootstrap=5, device="cpu"))
    with pytest.raises(ConfigError, match="neighbours"):
        probe(ProbeConfig(str(run), folder, neighbours=0))


def test_one_checkpoint_of_a_run_alone(folder, tmp_path, capsys):
    """``RUN/checkpoints/x.pt`` is measured, not the newest; without baselines its figures are the same."""
    run = make_run(tmp_path / "run", folder)
    torch.manual_seed(11)
    older = {"backbone." + key: value for key, value in DepthTransformer(MODEL, SIZE).state_dict().items()}
    path = run / "checkpoints" / "best.pt"
    checkpoint.save({"step": 1, "teacher": older}, path)
    full = probe(ProbeConfig(str(path), folder, bootstrap=20, device="cpu"))
    assert full["encoder"] == "run, step 1" and full["queries_seen_in_training"] == 0
    assert full["figures"] != probe(ProbeConfig(str(run), folder, bootstrap=20, device="cpu"))["figures"]
    capsys.readouterr()
    alone = probe(ProbeConfig(str(path), folder, bootstrap=20, baselines=False, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and max(map(len, lines[3:])) <= 42 and "random" not in lines[3]
    assert alone["beside"] is None
    for name in FIGURES:
        assert alone["figures"][name] == {"trained": full["figures"][name]["trained"]}
    lost = tmp_path / "lost.pt"
    lost.write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"lost\.pt: no file of a run folder"):
        probe(ProbeConfig(str(lost), folder))


@pytest.mark.parametrize("size", [28, 112])
def test_all_are_measured_at_the_size_asked_for(folder, tmp_path, size):
    """A run's positions are resized; the figures are those of features collected at that size."""
    run = make_run(tmp_path / "run", folder)
    result = probe(ProbeConfig(str(run), folder, bootstrap=20, device="cpu", size=size, neighbours=3))
    trained, _ = load_with_twin(str(run))
    shards = DepthShards(folder)
    split = shards.values("split")
    kept, asked = (collect_features(trained, shards, np.flatnonzero(split == name), size) for name in ("train", "test"))
    assert kept["patches"].shape == (24, size // 14, size // 14, 32)
    labels = torch.tensor([CATEGORIES.index(shards.values("category")[i]) for i in np.flatnonzero(split == "train")])
    voted = knn(kept["classes"], labels, asked["classes"], 3, 3)  # the query maps come in the same order
    assert result["figures"]["knn_class"]["trained"]["value"] == pytest.approx((voted == labels).double().mean())
    assert result["size"] == size and result["patches"]["query"] <= 24 * (size // 14) ** 2
