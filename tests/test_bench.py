"""The bench: its recall against a double loop, its readout, its intervals, its sources, its forms, its bad input."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from dino_depth.anomaly.geometry import Camera
from dino_depth.bench import rows as bench_rows
from dino_depth.bench.columns import anomaly, category, columns, recall, surface
from dino_depth.bench.data import CELL, Source, View, folds, units
from dino_depth.bench.disturb import DISTURBANCES, disturbed, filled
from dino_depth.bench.intervals import estimate, resample
from dino_depth.bench.push import evaluations, push
from dino_depth.bench.run import BenchConfig, bench
from dino_depth.bench.sources import Options, open_source
from dino_depth.bench.table import as_markdown, as_text
from dino_depth.cli import main
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError
from dino_depth.surface import seen_geometry

SIZE = 224
SIDE = SIZE // CELL
OPTIONS = Options(frames=16, objects=2, views=3, seed=0)


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("synthetic", OPTIONS)


def world_points(source: Source) -> torch.Tensor:
    """(views, cells, 3) world coordinates of the centres of cells, NaN without depth, by plain float64 loops."""
    found = np.full((len(source.views), SIDE**2, 3), np.nan)
    for number, view in enumerate(source.views):
        height, width = view.depth.depth.shape
        side = max(height, width)
        for cell in range(SIDE**2):
            place = [(part + 0.5) / SIDE * side - 0.5 for part in (cell % SIDE, cell // SIDE)]
            column = round(place[0] - (side - width) / 2)
            row = round(place[1] - (side - height) / 2)
            if not (0 <= column < width and 0 <= row < height and view.depth.valid[row, column]):
                continue
            z = float(view.depth.depth[row, column])
            local = z * np.linalg.inv(view.camera.matrix) @ [column, row, 1]
            found[number, cell] = view.camera.camera_to_world[:3, :3] @ local + view.camera.camera_to_world[:3, 3]
    return torch.from_numpy(found)


def on_sphere(points: torch.Tensor) -> torch.Tensor:
    """Unit vectors (..., 4) whose cosine falls with the distance of points: stereographic projection."""
    scaled = (points - points[~points.isnan().any(-1)].mean(0)).nan_to_num(9.0) * 2
    square = scaled.square().sum(-1, keepdim=True)
    return torch.cat([2 * scaled, square - 1], -1) / (1 + square)


def brute_force(source: Source, features: torch.Tensor) -> tuple[float, int]:
    """Recall and queries by a double loop over cells of pairs of views in float64."""
    points, hits, queries = world_points(source), 0, 0
    centred = features.double() - features.double().mean((0, 1))
    centred = centred / centred.norm(dim=-1, keepdim=True)
    for first, one in enumerate(source.views):
        for second, other in enumerate(source.views):
            if first == second or one.scene != other.scene:
                continue
            inverse = np.linalg.inv(other.camera.camera_to_world)
            height, width = other.depth.depth.shape
            counted, right = 0, 0
            for cell in range(SIDE**2):
                if points[first, cell].isnan().any():
                    continue
                if one.part is not None:
                    column, row = (round((part + 0.5) / SIDE * width - 0.5) for part in (cell % SIDE, cell // SIDE))
                    if not one.part[row, column]:
                        continue
                local = inverse[:3, :3] @ points[first, cell].numpy() + inverse[:3, 3]
                if local[2] <= 0:
                    continue
                u, v, _ = other.camera.matrix @ (local / local[2])
                if not (0 <= round(u) < width and 0 <= round(v) < height):
                    continue
                there = other.depth.depth[round(v), round(u)]
                if there <= 0 or abs(there - local[2]) > 0.015 * local[2]:
                    continue
                side = max(height, width)
                place = np.array([(u + 0.5 + (side - width) / 2), (v + 0.5 + (side - height) / 2)]) / side * SIDE
                if np.linalg.norm(place - np.array([cell % SIDE + 0.5, cell // SIDE + 0.5])) <= 1:
                    continue
                best, most = None, -math.inf
                for candidate, likeness in enumerate((centred[second] @ centred[first, cell]).tolist()):
                    if likeness > most and not math.isnan(points[second, candidate, 0]):
                        best, most = candidate, likeness
                counted += 1
                right += np.linalg.norm(np.array([best % SIDE + 0.5, best // SIDE + 0.5]) - place) <= 1
            if counted >= 8:
                hits, queries = hits + right, queries + counted
    return hits / queries, queries


def test_recall_is_that_of_a_double_loop(source):
    features = torch.randn(len(source.views), SIDE**2, 5, generator=torch.Generator().manual_seed(0))
    features = 0.1 * features + on_sphere(world_points(source)).float()[..., [0, 1, 2, 3, 3]]
    some = slice(12, 30)
    few = Source("few", "", source.views[some])
    sums = recall.measure(few, SIZE, features[some], features[some]).sum(0)
    expected, queries = brute_force(few, features[some])
    assert queries > 50 and 0.1 < expected < 0.9
    assert sums[1] == queries
    assert recall.figures(sums)["recall"].item() == pytest.approx(expected, abs=1e-12)


def test_perfect_features_reach_the_ceiling_and_random_ones_the_floor(source):
    perfect = on_sphere(world_points(source)).float()
    value = recall.figures(recall.measure(source, SIZE, perfect, perfect).sum(0))["recall"]
    noise = torch.randn(len(source.views), SIDE**2, 16, generator=torch.Generator().manual_seed(1))
    floor = recall.figures(recall.measure(source, SIZE, noise, noise).sum(0))["recall"]
    assert value > 0.85
    candidates = np.mean([len(pair.candidates) for pair in recall.pairs(source, SIZE)])
    assert floor < 3 * math.pi / candidates


def test_places_alone_earn_nothing(source):
    """A feature that is only where in the image a cell lies finds the same place, which never counts."""
    place = torch.eye(SIDE**2)[None].expand(len(source.views), -1, -1)
    value = recall.figures(recall.measure(source, SIZE, place, place).sum(0))["recall"]
    assert value < 0.05


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_intervals_cover_as_often_as_they_say(spread):
    """Cells of a unit share its quality: resampling units covers the true share in 95 of 100 studies, about."""
    random, covered = np.random.default_rng(3), 0
    studies, unit_count, cells = 200, 40, 25
    for study in range(studies):
        quality = 1 / (1 + np.exp(-spread * random.standard_normal(unit_count)))
        hits = random.binomial(cells, quality)
        sums = torch.tensor(np.stack([hits, np.full(unit_count, cells)], 1), dtype=torch.float64)
        draws = recall.figures(resample(unit_count, 400, study) @ sums)["recall"]
        found = estimate(draws)
        covered += found.low <= 0.5 <= found.high
    assert 0.89 <= covered / studies <= 0.99


def test_paired_differences_are_narrower_than_their_parts():
    random = np.random.default_rng(0)
    easy = random.uniform(0.1, 0.9, 60)
    hits = [random.binomial(50, easy * share) for share in (1, 0.8)]
    rows = [torch.tensor(np.stack([found, np.full(60, 50)], 1)).double() for found in hits]
    counts = resample(60, 1000, 0)
    one, other = (recall.figures(counts @ row)["recall"] for row in rows)
    paired, alone = estimate(one - other), estimate(one)
    assert paired.low > 0
    assert paired.high - paired.low < (alone.high - alone.low) / 2


def test_undefined_figures_have_no_interval():
    assert estimate(torch.tensor([math.nan, 1.0, 2.0])) is None
    found = estimate(torch.tensor([1.0, math.nan, 1.0, 1.0], dtype=torch.float64))
    assert (found.value, found.low, found.high) == (1, 1, 1)


def sphere_view(radius: float = 0.3, distance: float = 1.0) -> View:
    focal, side = 250.0, 224
    columns, rows = np.meshgrid(np.arange(side), np.arange(side))
    rays = np.stack([(columns - 111.5) / focal, (rows - 111.5) / focal, np.ones((side, side))], -1)
    square, along = (rays**2).sum(-1), rays[..., 2] * distance
    inside = along**2 - square * (distance**2 - radius**2)
    depth = np.where(inside > 0, (along - np.sqrt(np.maximum(inside, 0))) / square, 0)
    matrix = np.array([[focal, 0, 111.5], [0, focal, 111.5], [0, 0, 1.0]])
    return View("sphere", "0", DepthMap.from_values(depth), Camera(side, side, matrix, np.eye(4)))


def test_normals_and_curvature_of_a_sphere_are_exact():
    view = sphere_view()
    cloud = surface.points(view.depth, 224, view.camera.matrix)[None].double()
    targets, usable = seen_geometry(cloud, 250.0, 1)
    centre = cloud[0] - torch.tensor([0, 0, 1.0])[:, None, None]
    expected = centre / 0.3 * torch.tensor([1.0, 1.0, -1.0])[:, None, None]
    mask = usable[0]
    assert mask.sum() > 8000
    angle = torch.rad2deg((targets[0, ..., :3] * expected.permute(1, 2, 0)).sum(-1)[mask].clamp(-1, 1).acos())
    assert angle.median() < 0.1 and angle.quantile(0.95) < 1.5
    ratio = targets[0, ..., 3][mask] / (cloud[0, 2][mask] / 250 / 0.3)
    assert abs(ratio.median() - 1) < 0.02


def test_a_readout_of_the_answer_is_right_and_one_of_noise_is_not(source):
    values, _ = surface.targets(source, SIZE)
    right = surface.figures(surface.measure(source, SIZE, values.float(), values.float()).sum(0))
    assert right["normal"] < 0.2 and right["normal_11"] > 0.999 and right["curvature"] > 0.999
    noise = torch.randn(*values.shape[:2], 8, generator=torch.Generator().manual_seed(0))
    wrong = surface.figures(surface.measure(source, SIZE, noise, noise).sum(0))
    assert wrong["normal"] > 20 and wrong["normal_11"] < 0.3 and wrong["curvature"] < 0.02


def test_the_median_is_that_of_all_cells(source):
    features = torch.randn(len(source.views), SIDE**2, 8, generator=torch.Generator().manual_seed(0))
    sums = surface.measure(source, SIZE, features, features).sum(0)
    histogram = sums[: surface.BINS]
    middles = torch.repeat_interleave((torch.arange(surface.BINS) + 0.5) * surface.STEP, histogram.long())
    assert surface.figures(sums)["normal"].item() == pytest.approx(middles.median().item(), abs=surface.STEP)


def test_kinds_are_told_by_other_objects_only(source):
    """A feature of the object itself, not of its kind, is worth nothing."""
    scenes = sorted({view.scene for view in source.views})
    kinds = sorted({view.category for view in source.views})
    for names, attribute, expected in ((kinds, "category", 1.0), (scenes, "scene", 0.0)):
        place = torch.tensor([names.index(getattr(view, attribute)) for view in source.views])
        features = torch.eye(len(names))[place][:, None].expand(-1, SIDE**2, -1)
        value = category.figures(category.measure(source, SIZE, features, features).sum(0))["knn"].item()
        assert value == pytest.approx(expected, abs=0.15)


def test_defects_are_found_by_a_feature_that_marks_them(source):
    maps = [view for one in source.inspections for view in (*one.bank, *one.tested)]
    features = torch.randn(len(maps), SIDE**2, 3, generator=torch.Generator().manual_seed(0)) * 0.01
    features[..., 0] += 1
    noise = anomaly.figures(anomaly.measure(source, SIZE, features, features).sum(0))["anomaly"]
    for number, view in enumerate(maps):
        if view.defect is not None:
            share = view.defect.reshape(SIDE, -1, SIDE, 224 // SIDE).mean((1, 3)).ravel()
            features[number, torch.from_numpy(share > 0.02)] = torch.tensor([-1.0, 5.0, 0.0])
    found = anomaly.figures(anomaly.measure(source, SIZE, features, features).sum(0))["anomaly"]
    assert noise < 0.4 and found > 0.9


def test_halves_share_no_kind_and_few_scenes_are_resampled_by_view(source):
    half = folds(source)
    kinds = [{view.category for view, fold in zip(source.views, half, strict=True) if fold == side} for side in (0, 1)]
    assert kinds[0] and kinds[1] and not kinds[0] & kinds[1]
    assert len(set(units(source))) == len({view.scene for view in source.views})
    few = Source("few", "", source.views[:6])
    assert len(set(units(few))) == 6
    one = Source("one", "", source.views[:3])
    assert folds(one).tolist() == [0, 1, 1]


def test_disturbances_are_what_they_say_and_fixed_by_the_seed(source):
    view = source.views[0]
    for name in DISTURBANCES:
        first, again, other = (disturbed(view, name, seed) for seed in (0, 0, 1))
        assert np.array_equal(first.depth, again.depth) and not np.array_equal(first.depth, other.depth)
    lost = disturbed(view, "holes", 0)
    assert lost.valid.sum() == pytest.approx(0.8 * view.depth.valid.sum(), rel=0.01)
    assert not (lost.valid & ~view.depth.valid).any()
    both = view.depth.valid
    error = disturbed(view, "noise", 0).depth[both] / view.depth.depth[both] - 1
    assert error.std() == pytest.approx(0.003, rel=0.03)
    stereo = disturbed(view, "sensor", 0)
    both = stereo.valid
    assert np.median(abs(stereo.depth[both] / view.depth.depth[both] - 1)) < 0.01
    whole = filled(view.depth)
    assert whole.valid.all() and np.array_equal(whole.depth[view.depth.valid], view.depth.depth[view.depth.valid])
    assert np.isin(whole.depth, view.depth.depth[view.depth.valid]).all()


def quick(encoders: list[str], **changes) -> BenchConfig:
    values = {"objects": 1, "views": 2, "disturbances": ["holes"], "resamples": 50, "speed": False, "device": "cpu"}
    return BenchConfig(encoders, **(values | {"columns": ["recall", "surface"]} | changes))


def write_frames(folder, source: Source, count: int = 3):
    folder.mkdir()
    for view in source.views[:count]:
        codes = np.rint(view.depth.depth * 10000).astype(np.uint16)
        Image.fromarray(codes).save(folder / f"{view.name}.depth.png")
        pose = view.camera.camera_to_world.copy()
        pose[:3, 3] *= 10
        np.savetxt(folder / f"{view.name}.pose.txt", pose)
    np.savetxt(folder / "camera-intrinsics.txt", view.camera.matrix)


def test_a_posed_folder_is_read_as_it_was_written(tmp_path, source):
    write_frames(tmp_path / "frames", source)
    read = open_source(str(tmp_path / "frames"), OPTIONS)
    assert [view.name for view in read.views] == ["0", "1", "2"]
    for got, view in zip(read.views, source.views, strict=False):
        assert np.allclose(got.depth.depth, 10 * view.depth.depth, atol=6e-4)
        assert np.allclose(got.camera.camera_to_world[:3, 3], 10 * view.camera.camera_to_world[:3, 3])
    assert len(open_source(str(tmp_path / "frames"), Options(2, 1, 2, 0)).views) == 2


def test_bad_data_are_one_line_each(tmp_path, source, capsys):
    def failure(*arguments: str) -> str:
        code = main(["bench", "raw-patches", "--columns", "[recall]", "--device", "cpu", *arguments])
        error = capsys.readouterr().err.strip().splitlines()
        assert code in (2, 3) and error[-1].startswith("dino-depth: ")
        return error[-1]

    frames = tmp_path / "frames"
    write_frames(frames, source)
    (frames / "1.pose.txt").rename(tmp_path / "kept")
    assert "1.depth.png: its pose 1.pose.txt is missing" in failure("--data", str(frames))
    (frames / "1.pose.txt").write_text("1 2 3\n")
    assert "1.pose.txt: must be 4x4 numbers, got 1x3" in failure("--data", str(frames))
    np.savetxt(frames / "1.pose.txt", 2 * np.eye(4))
    assert "1.pose.txt: camera_to_world must" in failure("--data", str(frames))
    (tmp_path / "kept").rename(frames / "1.pose.txt")
    np.savetxt(frames / "camera-intrinsics.txt", [[2000, 0, 900], [0, 2000, 900], [0, 0, 1]])
    assert "no two views of a scene overlap" in failure("--data", str(frames))
    for name in ("1", "2"):
        (frames / f"{name}.depth.png").unlink()
    assert "has one view only" in failure("--data", str(frames))
    assert "no such folder, and none of" in failure("--data", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "of no known form" in failure("--data", str(tmp_path / "empty"))
    assert "a multiple of 14" in failure("--size", "225")
    assert "'colour' is none of recall" in failure("--columns", "[colour]")
    assert "'rain' is none of noise" in failure("--disturbances", "[rain]")
    assert main(["bench"]) == 2 and "missing argument ENCODERS" in capsys.readouterr().err
    assert main(["bench", "fpfh?depth_as=log"]) == 2 and "unknown option" in capsys.readouterr().err
    assert main(["bench", "random:raw-patches"]) == 2


def test_rows_are_the_given_their_twins_once_and_the_baselines(monkeypatch):
    device = torch.device("cpu")
    with pytest.raises(ConfigError, match="given twice"):
        bench_rows.entries(["raw-patches", "raw-patches"], 0, device)
    twin = bench_rows.entries(["random:timm:vit_tiny_patch16_224"], 0, device)
    assert [one.role for one in twin] == ["given", "pixels", "surface", "fpfh"]

    load = bench_rows.load_frozen

    def stand_in(spec, **arguments):
        if spec == "fpfh":
            raise ConfigError("encoder fpfh needs open3d")
        return load("raw-patches?patch=16" if "random" in spec else "raw-patches?patch=28", **arguments)

    monkeypatch.setattr(bench_rows, "load_frozen", stand_in)
    found = bench_rows.entries(["runs/a/export", "runs/b/export"], 7, device)
    assert [one.role for one in found] == ["given", "given", "untrained", "pixels", "surface", "fpfh"]
    assert [one.label for one in found[:2]] == ["runs/a/export", "runs/b/export"]
    assert found[2].spec == "random:runs/a/export?seed=7"
    assert found[-1].encoder is None and "open3d" in found[-1].note


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[dict, object]:
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        without_open3d(patch)
        return bench(quick(["raw-patches?patch=16"], out=str(out))), out


def without_open3d(patch: pytest.MonkeyPatch):
    """FPFH is slow, and its row says so where open3d is not installed."""
    load = bench_rows.load_frozen

    def absent(spec, **arguments):
        if spec == "fpfh":
            raise ConfigError("encoder fpfh needs open3d: pip install 'dino-depth[fpfh]'")
        return load(spec, **arguments)

    patch.setattr(bench_rows, "load_frozen", absent)


def test_four_forms_say_the_same(outcome, capsys):
    result, out = outcome
    assert json.loads((out / "bench.json").read_text()) == json.loads(json.dumps(result))
    text = as_text(result)
    assert "FPFH: absent: encoder fpfh needs open3d" in text
    assert max(map(len, text.splitlines())) <= 80
    with open(out / "bench.csv", newline="") as file:
        table = list(csv.DictReader(file))
    source = result["sources"][0]
    for row in source["rows"]:
        value = source["estimates"][row]["recall"]["value"]
        [line] = [
            line for line in table
            if (line["row"], line["figure"], line["against"], line["disturbance"]) == (row, "recall", "", "")
        ]  # fmt: skip
        assert float(line["value"]) == value
        assert f"| {row} | {value:.3f}".replace(" 0.", " .") in as_markdown(result)
    page = (out / "bench.html").read_text()
    assert all(row.rpartition(", ")[0] in page for row in source["rows"])
    assert "http://" not in page and "https://" not in page
    first, other = source["rows"][:2]
    [pair] = [one for one in source["differences"] if (one["row"], one["against"]) == (first, other)]
    both = [source["estimates"][row]["normal"]["value"] for row in (first, other)]
    assert pair["normal"]["value"] == pytest.approx(both[0] - both[1])


def test_the_same_seed_gives_the_same_figures(outcome, monkeypatch):
    result, _ = outcome
    without_open3d(monkeypatch)
    again = bench(quick(["raw-patches?patch=16"]))
    assert again == result


def test_the_model_index_of_a_card_holds_the_figures_and_keeps_others(outcome, tmp_path):
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    result, _ = outcome
    other = EvalResult("classification", "imagenet", "ImageNet", "acc", 0.5)
    data = ModelCardData(license="apache-2.0", model_name="mine", eval_results=[other])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Card\n").save(tmp_path / "README.md")
    for _ in range(2):  # a second time replaces, and adds nothing
        push(result, str(tmp_path))
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.license == "apache-2.0" and "# Card" in card.text
        kept = [one for one in card.data.eval_results if one.dataset_type == "imagenet"]
        ours = [one for one in card.data.eval_results if one.dataset_type == "synthetic"]
        assert len(kept) == 1 and len(ours) == len(evaluations(result)) == 2 * 4
    row = result["sources"][0]["estimates"]["raw-patches, raw"]
    [value] = [one for one in ours if one.metric_type == "recall" and one.dataset_config == "raw"]
    assert value.metric_value == round(row["recall"]["value"], 5)
    with pytest.raises(ConfigError, match="no README"):
        bench(quick(["raw-patches"], push=str(tmp_path.parent)))


def test_every_column_says_what_it_is(source):
    for name, module in columns().items():
        assert module.missing(source, SIZE) == "", name
        assert module.ASKED in ("views", "inspections") and module.FIGURES
    nothing = Source("bare", "", [View("s", str(n), v.depth, v.camera) for n, v in enumerate(source.views[12:15])])
    assert category.missing(nothing, SIZE) and anomaly.missing(nothing, SIZE)
    with pytest.raises(DataError, match="overlap"):
        recall.missing(Source("apart", "", [source.views[0]]), SIZE)
    view = source.views[12]
    still = Source("still", "", [View("s", name, view.depth, view.camera) for name in "ab"])
    assert "nothing moves" in recall.missing(still, SIZE)
