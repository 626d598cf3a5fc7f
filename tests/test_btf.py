"""Memory banks as published: the reweighted score, PatchCore's own pooling, and BTF's joined features."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dino_depth.anomaly import bank
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.features import SampleFeatures
from dino_depth.anomaly.heads import Context, btf, patchcore
from dino_depth.config import parse
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError
from dino_depth.frozen import load_frozen, timm_cnn

NOW = Context(0, torch.device("cpu"))


def draw(views=3, grid=(3, 4), dims=(7, 5), seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, depth = (torch.randn(views, *grid, dim, generator=generator) for dim in dims)
    share = torch.rand(views, *grid, generator=generator)
    return SampleFeatures(image, depth, share * (share >= 0.3))


def equation_7(cell, rows, neighbours, scale, own):
    """Slow, in float64, as the papers write it."""
    cell, rows = cell.double().numpy(), rows.double().numpy()
    distances = [math.dist(cell, row) for row in rows]
    nearest = int(np.argmin(distances))
    order = sorted(range(len(rows)), key=lambda at: (at != nearest, math.dist(rows[nearest], rows[at])))
    around = order[:neighbours] if own else order[1:neighbours]
    total = sum(math.exp(distances[at] / scale) for at in around)
    return distances[nearest] * (1 - math.exp(distances[nearest] / scale) / total)


@pytest.mark.parametrize(("neighbours", "scale", "own"), [(3, 1.0, True), (9, 1.0, True), (3, math.sqrt(6), False)])
def test_the_reweighted_score_is_equation_7(neighbours, scale, own):
    for seed in range(10):
        rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
        rows[7] = rows[3]  # twins of the nearest row must not take its place
        cell = rows[3] + 0.1
        found = bank.reweighted(cell, rows, neighbours, scale, own)
        assert found == pytest.approx(equation_7(cell, rows, neighbours, scale, own), rel=1e-4)


def test_the_reweighted_score_stays_finite_where_exponentials_do_not():
    rows = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * 5000
    cell = torch.full((6,), 10_000.0)
    star = float(torch.linalg.vector_norm(rows - cell, dim=1).min())
    assert star > 1e4
    for own in (True, False):
        assert 0 <= bank.reweighted(cell, rows, 3, own=own) <= star
    alone = float(torch.linalg.vector_norm(rows[0] - cell))
    assert bank.reweighted(cell, rows[:1], 3, own=False) == pytest.approx(alone)


def test_an_instance_is_scored_by_its_highest_cell_of_the_object():
    features = draw(seed=1)
    features.image[0, 0, 0] = 100.0
    features.share[0, 0, 0] = 0  # the background is far from everything, and not looked at
    for module, config, scale, own in (
        (patchcore, patchcore.Config("image", share=1.0, reweight=3), 1.0, True),
        (btf, btf.Config("image", share=1.0, reweight=3), math.sqrt(7), False),
    ):
        head = module.fit([draw()], config, NOW)
        maps = module.score(head, features)
        places = [tuple(place) for place in (features.share > 0).nonzero().tolist()]
        highest = max(places, key=lambda place: float(maps["image"][place]))
        expected = equation_7(features.image[highest], head.bank, 3, scale, own)
        assert module.instance(head, features, maps) == pytest.approx(expected, rel=1e-4)
        plain = module.from_state(head.state() | {"config": {"modality": "image", "share": 1.0}}, NOW.device)
        assert module.instance(plain, features, maps) is None


def slow_patches(part):
    """(rows, columns, channels x 9): every neighbourhood by hand, beyond the border zero."""
    channels, rows, columns = part.shape
    padded = torch.zeros(channels, rows + 2, columns + 2)
    padded[:, 1:-1, 1:-1] = part
    cells = [[padded[:, y : y + 3, x : x + 3].reshape(-1) for x in range(columns)] for y in range(rows)]
    return torch.stack([torch.stack(line) for line in cells])


def slow_means(vector, dim):
    edges = [(i * len(vector) // dim, -(-(i + 1) * len(vector) // dim)) for i in range(dim)]
    return torch.stack([vector[low:high].mean() for low, high in edges])


def test_unfolded_pooling_is_that_of_patchcores_code():
    """Neighbourhoods first, resized to the finest grid, then pooled: the order of the paper's code."""
    generator = torch.Generator().manual_seed(0)
    fine, coarse = (
        torch.randn(5, 6, 6, generator=generator, dtype=torch.float64).float(),
        torch.randn(7, 3, 3, generator=generator),
    )
    fine_patches = slow_patches(fine)
    wide = slow_patches(coarse).permute(2, 0, 1)[None]
    wide = F.interpolate(wide, (6, 6), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    found = timm_cnn.pooled([fine[None], coarse[None]], [6, 6], 4)[0]
    for row in range(6):
        for column in range(6):
            levels = [slow_means(part[row, column], 4) for part in (fine_patches, wide)]
            torch.testing.assert_close(found[row, column], slow_means(torch.cat(levels), 4), atol=1e-5, rtol=1e-5)


def test_an_encoder_with_unfolded_pooling():
    spec = "random:timm:resnet18?layers=2-3&pool=unfold&dim=24"
    encoder = load_frozen(spec, modality="image")
    batch = torch.stack([encoder.prepare(np.full((64, 64), level, np.uint8), 64) for level in (20, 200)])
    features = encoder.encode(batch)
    assert features.shape == (2, 8, 8, 24) and encoder.dim == 24
    torch.testing.assert_close(features[1:], encoder.encode(batch[1:]))
    assert encoder.fingerprint != load_frozen("random:timm:resnet18?layers=2-3", modality="image").fingerprint
    with pytest.raises(ConfigError, match="unknown option 'dim'"):
        load_frozen("random:timm:resnet18?layers=2-3&dim=24", modality="image")


def test_the_joined_bank_is_its_parts_side_by_side():
    features, tested = draw(), draw(seed=1)
    heads = {name: btf.fit([features], btf.Config(name, share=1.0), NOW) for name in ("both", "image", "depth")}
    assert torch.equal(heads["both"].bank, torch.cat([heads["image"].bank, heads["depth"].bank], 1))
    plain = replace(features, depth=features.depth * 0), replace(tested, depth=tested.depth * 0)
    alone = btf.score(btf.fit([plain[0]], btf.Config(share=1.0), NOW), plain[1])["both"]
    other = patchcore.fit([features], patchcore.Config("image", share=1.0), NOW)
    torch.testing.assert_close(alone, patchcore.score(other, tested)["image"])


def test_scaling_is_what_the_loud_modality_hides():
    features, tested = draw(), draw(seed=1)
    loud = [replace(one, depth=one.depth * 1000) for one in (features, tested)]
    for scale, equal in (("spread", True), ("none", False)):
        config = btf.Config(scale=scale, share=1.0)
        pairs = ((features, tested), loud)
        quiet, noisy = (btf.score(btf.fit([train], config, NOW), test)["both"] for train, test in pairs)
        assert torch.allclose(quiet, noisy, rtol=1e-3, atol=1e-3) == equal


def test_the_projection_has_the_published_dimension():
    """scikit-learn's johnson_lindenstrauss_min_dim at eps 0.9, for the cells of 12 and of 36 views."""
    assert (bank.projected(9408), bank.projected(451_584)) == (225, 321)


@pytest.mark.parametrize("change", [{"share": 0.0}, {"limit": 0}, {"reweight": 1}, {"reweight": -1}])
def test_settings_that_cannot_work_are_refused(change):
    with pytest.raises(ConfigError, match=f"btf.{next(iter(change))}"):
        btf.fit([draw()], btf.Config(**change), NOW)
    if "reweight" in change:
        with pytest.raises(ConfigError, match="patchcore.reweight"):
            patchcore.fit([draw()], patchcore.Config(**change), NOW)
    with pytest.raises(ConfigError, match="btf.modality both: got 7 image and 0 depth channels"):
        btf.fit([draw(dims=(7, 0))], btf.Config(), NOW)


@pytest.mark.parametrize("data", ["sim3d", "mvtec3d", "eyecandies"])
@pytest.mark.parametrize("name", ["patchcore", "btf"])
def test_each_benchmark_has_a_configuration(data, name):
    config = parse(EvaluateConfig, ["--config", f"{data}_{name}"], "test")
    assert (config.head.name, config.data.name) == (name, data)
    single = data != "sim3d"
    assert bool(getattr(config.head, name).reweight) == single and config.prepare.smoothing == (4 if single else 0)


def test_fpfh_is_open3ds_averaged_over_each_cell():
    """On a relief with a hole, from points computed here; BTF's neighbours, and a radius that none reaches."""
    open3d = pytest.importorskip("open3d", reason="open3d is not installed", exc_type=ImportError)
    rows, columns = np.mgrid[:48, :48].astype(np.float64)
    depth = 0.5 + 0.01 * np.sin(rows / 5) * np.cos(columns / 7)
    depth[10:20, 30:40] = 0
    matrix = np.array([[60.0, 0, 23.5], [0, 60, 23.5], [0, 0, 1]])
    encoder = load_frozen("fpfh?patch=16&samples=16&radius=1000", modality="depth")
    found = encoder.encode(encoder.prepare(DepthMap.from_values(depth.astype(np.float32)), 48, matrix)[None])[0]
    valid = depth > 0
    points = np.stack([(columns - 23.5) / 60 * depth, (rows - 23.5) / 60 * depth, depth], -1)[valid]
    cloud = open3d.geometry.PointCloud(open3d.utility.Vector3dVector(points))
    cloud.estimate_normals(open3d.geometry.KDTreeSearchParamKNN(30))
    cloud.orient_normals_towards_camera_location(np.zeros(3))
    search = open3d.geometry.KDTreeSearchParamKNN(100)
    features = np.zeros((48, 48, 33))
    features[valid] = np.asarray(open3d.pipelines.registration.compute_fpfh_feature(cloud, search).data).T
    for row in range(3):
        for column in range(3):
            cell = np.s_[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            expected = features[cell][valid[cell]].mean(0)
            np.testing.assert_allclose(found[row, column], expected, atol=0.5)
