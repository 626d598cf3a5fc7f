"""SGANet: its equations against float64 transcriptions, what they must be in closed form, and the whole head."""

import importlib
import json
import math
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomaly_run import make_sample
from test_heads import Peak

from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.features import FeatureStore, SampleFeatures
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.geometry import Camera
from dino_depth.anomaly.heads import Context, Facts, patchcore, sganet
from dino_depth.anomaly.heads.sganet import Config, method
from dino_depth.anomaly.heads.sganet.correspondence import corresponding_cells
from dino_depth.anomaly.instances import Session, score_instances
from dino_depth.anomaly.results import Run
from dino_depth.anomaly.trials import make_trial
from dino_depth.anomaly.views import Views
from dino_depth.anomaly.volume import VoxelConfig, accumulate, combine
from dino_depth.config import parse
from dino_depth.depth import DepthMap
from dino_depth.errors import ConfigError, DataError, GateError
from dino_depth.frozen import load_frozen

NOW = Context(0, torch.device("cpu"))
# No cameras are needed: features alone.
FREE = Config(geometric=0.0, steps=3, learning_rate=1e-3)
UNTRAINED = Config(untrained=True)


def draw(views=4, grid=(3, 4), dims=(6, 6), seed=0, background=0.3) -> SampleFeatures:
    """Random features; the given share of cells shows no object."""
    generator = torch.Generator().manual_seed(seed)
    image, depth = (torch.randn(views, *grid, dim, generator=generator) for dim in dims)
    share = torch.rand(views, *grid, generator=generator)
    share = share * (share >= background)
    share[:, 0, 0] = 1  # some object in every view
    return SampleFeatures(image, depth, share)


def rows(count, dim=5, seed=0, kind=torch.float64):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=kind)


def view(count, dim=5, seed=0, kind=torch.float64):
    return {"image": rows(count, dim, seed, kind), "depth": rows(count, dim, seed + 100, kind)}


def cosine(one, other):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return one @ other / (np.linalg.norm(one) * np.linalg.norm(other))


# Neighbours


def test_neighbours_follow_the_order_of_capture():
    near = method.neighbourhood
    assert near("sequence", 4, 1) == [[1], [2, 0], [3, 1], [2]]
    assert near("sequence+wrap", 4, 1) == [[1, 3], [2, 0], [3, 1], [0, 2]]
    assert near("sequence", 5, 2)[2] == [3, 1, 4, 0] and near("sequence", 5, 2)[0] == [1, 2]
    assert near("sequence+wrap", 2, 1) == [[1], [0]]
    assert near("sequence+wrap", 3, 4) == [[1, 2], [2, 0], [0, 1]]  # never the view itself, nor one twice
    ring = near("ring", 6, 1, 3)
    assert ring == [[1, 2], [2, 0], [0, 1], [4, 5], [5, 3], [3, 4]]
    assert method.successors("sequence", 3) == [1, 2, None]
    assert method.successors("sequence+wrap", 3) == [1, 2, 0]
    assert method.successors("ring", 4, 2) == [1, 0, 3, 2]


def test_neighbours_by_angle_are_those_of_the_ring_whatever_the_order():
    angles = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
    axes = torch.stack([angles.cos(), angles.sin(), torch.zeros(8, dtype=torch.float64)], 1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0)).tolist()
    found = method.neighbourhood("angle", 8, 1, axes=axes[order])
    assert [{order[u] for u in near} for near in found] == [{(v + 1) % 8, (v - 1) % 8} for v in order]
    assert all(u in near for u, near in zip(method.successors("angle", 8, axes=axes[order]), found, strict=True))


# Selection, equations 1 to 3


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_equation_1(alpha):
    query, other = view(7), view(6, seed=3)
    for name, rest in (("image", "depth"), ("depth", "image")):
        found = method.comparable(query, name, alpha) @ method.comparable(other, name, alpha).T
        expected = [
            [alpha * cosine(query[name][i], other[name][j]) + (1 - alpha) * cosine(query[rest][i], other[rest][j])
             for j in range(6)] for i in range(7)
        ]  # fmt: skip
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_with_alpha_one_the_other_modality_has_no_influence_and_with_a_half_both_select_alike():
    query, other = view(9), view(20, seed=3)

    def chosen(name, alpha, one=query, two=other):
        return method.select(method.comparable(one, name, alpha), method.comparable(two, name, alpha), 3)

    changed = chosen("image", 1.0, query | {"depth": rows(9, seed=55)}, other | {"depth": rows(20, seed=56)})
    assert torch.equal(chosen("image", 1.0), changed)
    assert not torch.equal(chosen("image", 0.4), chosen("depth", 0.4))
    assert torch.equal(chosen("image", 0.5), chosen("depth", 0.5))
    scaled = {name: part * torch.rand(20, 1).double() * 9 + 0 for name, part in other.items()}
    assert torch.equal(chosen("image", 0.5), chosen("image", 0.5, two=scaled))


def test_a_cell_of_zeros_is_like_nothing_and_not_nan():
    query, other = view(4), view(5, seed=3)
    query["image"][1] = 0
    found = method.comparable(query, "image", 1.0) @ method.comparable(other, "image", 1.0).T
    assert (found[1] == 0).all() and found.isfinite().all()


def test_selection_is_that_of_sorting_whatever_the_blocks_and_of_equals_the_first(monkeypatch):
    query, offered = rows(50, seed=1), rows(30, seed=2)
    expected = (-(query @ offered.T)).argsort(1)[:, :4].sort(1).values
    ties = torch.tensor([[1.0, 0], [0, 1]]).double().repeat(5, 1)  # exact products: two values, five times each
    for block in (1, 100, 2**24):
        monkeypatch.setattr(method, "BLOCK", block)
        assert torch.equal(method.select(query, offered, 4), expected)
        assert method.select(ties[:2], ties, 3).tolist() == [[0, 2, 4], [1, 3, 5]]
        assert method.select(ties[:2], ties, 6).tolist() == [[0, 1, 2, 4, 6, 8], [0, 1, 3, 5, 7, 9]]
    assert method.select(query, offered, 99).tolist() == [list(range(30))] * 50
    assert method.select(query, offered[:0], 4).shape == (50, 0)


def test_candidates_are_places_among_the_cells_of_all_views():
    views = [rows(count, seed=count) for count in (4, 6, 5)]
    index = method.candidates(views[1], views, [2, 0], 3)
    assert index.shape == (6, 6)
    assert torch.equal(index[:, :3] - 10, method.select(views[1], views[2], 3))
    assert torch.equal(index[:, 3:], method.select(views[1], views[0], 3))


# Attention, equations 4 to 6


def module(dim=4, seed=0, **options):
    torch.manual_seed(seed)
    return method.Refinement(dim, "xavier", **options).double()


def plainly(made, features, kept, index):
    """Equations 4 to 6 as they are written, with autograd."""
    found, width = [], features.shape[1] // made.heads
    for head in range(made.heads):
        part = slice(head * width, (head + 1) * width)
        query, keys, values = features @ made.query[:, part], kept @ made.key[:, part], kept @ made.value[:, part]
        logits = (keys[index] * query[:, None]).sum(2) / math.sqrt(width)
        found.append((logits.softmax(1)[..., None] * values[index]).sum(1))
    return torch.cat(found, 1) + (features if made.residual else 0)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("block", [1, 40, 2**24])
def test_refinement_and_its_gradients_are_those_of_the_equations(heads, block, monkeypatch):
    monkeypatch.setattr(method, "BLOCK", block)
    made = module(heads=heads)
    features, kept = rows(9, 4), rows(27, 4, seed=1)
    index = torch.randint(27, (9, 4), generator=torch.Generator().manual_seed(2))
    weight = rows(9, 4, seed=3)
    found, expected = made(features, kept, index), plainly(made, features, kept, index)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    mine = torch.autograd.grad((found * weight).sum(), list(made.parameters()))
    others = torch.autograd.grad((expected * weight).sum(), list(made.parameters()))
    for one, other in zip(mine, others, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_mixture_passes_gradcheck():
    query, kept = rows(9, 4).requires_grad_(), rows(27, 4, seed=1)
    index = torch.randint(27, (9, 4), generator=torch.Generator().manual_seed(2))
    assert torch.autograd.gradcheck(lambda given: method._Mixture.apply(given, kept, index, 0.5), query)


def test_all_cells_of_one_view_are_dense_attention():
    made = method.Refinement(4, residual=False).double()
    features, kept = rows(9, 4), rows(12, 4, seed=1)
    index = method.candidates(features, [features, kept], [1], 12)
    dense = (features @ kept.T / 2).softmax(1) @ kept
    torch.testing.assert_close(made(features, torch.cat([features, kept]), index), dense, atol=1e-12, rtol=0)


def test_one_candidate_is_copied_and_leaves_query_and_key_without_gradient():
    features, kept = rows(9, 4), rows(12, 4, seed=1)
    index = method.candidates(features, [features, kept], [1], 1)
    made = module(residual=False)
    found = made(features, torch.cat([features, kept]), index)
    torch.testing.assert_close(found, kept[index[:, 0] - 9] @ made.value, atol=1e-12, rtol=0)
    found.square().sum().backward()
    assert not made.query.grad.any() and not made.key.grad.any() and made.value.grad.any()
    one = method.Refinement(4, residual=False).double()
    same = method.candidates(method.unit(features), [method.unit(features)] * 2, [1], 1)
    assert torch.equal(one(features, torch.cat([features, features]), same), features)
    assert torch.equal(replace_residual(one)(features, torch.cat([features, features]), same), 2 * features)


def replace_residual(made):
    made.residual = True
    return made


def test_without_residual_outputs_are_convex_combinations():
    features, kept = rows(9, 4), rows(12, 4, seed=1)
    index = method.candidates(features, [features, kept], [1], 5)
    made = method.Refinement(4, residual=False).double()
    longest = torch.cat([features, kept])[index].norm(dim=2).amax(1)
    assert (made(features, torch.cat([features, kept]), index).norm(dim=1) <= longest + 1e-12).all()


# Contrast, equations 7 to 13


def test_contrast_is_that_of_the_equations_in_float64():
    image, depth = rows(7), rows(7, seed=1)
    terms = [[math.exp(cosine(i, j) / 0.3) for j in depth] for i in image]
    expected = -np.mean([math.log(row[place] / sum(row)) for place, row in enumerate(terms)])
    assert float(method.contrast(image, depth, 0.3)) == pytest.approx(expected, abs=1e-12)
    back = -np.mean([math.log(terms[p][p] / sum(row[p] for row in terms)) for p in range(7)])
    assert float(method.contrast(image, depth, 0.3, True)) == pytest.approx((expected + back) / 2, abs=1e-12)


def test_contrast_in_closed_form():
    # Orthonormal and alike in both modalities; constants; n cells alike among others that are orthogonal.
    count = 64
    expected = math.log(1 + (count - 1) * math.exp(-1 / 0.07))
    apart = torch.eye(count, dtype=torch.float64)  # what is left of 1 / 0.07 has two digits in float32
    assert float(method.contrast(apart, apart, 0.07)) == pytest.approx(expected, rel=1e-6)
    assert math.log(1 + 4095 * math.exp(-1 / 0.07)) == pytest.approx(0.00255, abs=5e-5)
    constant = torch.ones(count, 5)
    assert float(method.contrast(constant, constant, 0.07)) == pytest.approx(math.log(count), rel=1e-6)
    alike = torch.eye(count)
    alike[:16] = alike[0]
    floor = 16 / count * math.log(16)
    assert floor <= float(method.contrast(alike, alike, 0.07)) < floor + 0.01


def test_contrast_does_not_see_scales_a_common_rotation_or_a_common_order():
    image, depth = rows(9), rows(9, seed=1)
    plain = float(method.contrast(image, depth, 0.2))
    turn = torch.linalg.qr(rows(5, 5, seed=7))[0]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(9, 1, generator=torch.Generator().manual_seed(1)).double() + 0.1
    for one, other in ((image * scale, depth), (image @ turn, depth @ turn), (image[order], depth[order])):
        assert float(method.contrast(one, other, 0.2)) == pytest.approx(plain, abs=1e-12)
    assert float(method.contrast(image[order], depth, 0.2)) != pytest.approx(plain, abs=1e-3)
    swapped = float(method.contrast(depth, image, 0.2))
    assert swapped != pytest.approx(plain, abs=1e-6)
    both = float(method.contrast(image, depth, 0.2, True))
    assert both == pytest.approx(float(method.contrast(depth, image, 0.2, True)), abs=1e-12)


def structural(views):
    every = torch.arange(9)
    return method.losses(
        views, [(1, (every, every)), None], {}, {"structural": lambda i, d: method.contrast(i, d, 0.2)}
    )  # fmt: skip


def test_a_constant_of_a_modality_leaves_the_structural_loss_and_not_the_semantic():
    views = [view(9), view(9, seed=4)]
    moved = [{"image": part["image"] + 3, "depth": part["depth"] - 1} for part in views]
    assert float(structural(views)["structural"]) == pytest.approx(float(structural(moved)["structural"]), abs=1e-12)
    plain, other = (float(method.contrast(part["image"], part["depth"], 0.2)) for part in (views[0], moved[0]))
    assert plain != pytest.approx(other, abs=1e-3)


def test_views_alike_have_no_structure_and_no_infinite_gradient():
    base = view(9)
    twin = {name: part.clone() for name, part in base.items()}
    twin["image"][:4] += rows(4, seed=8)
    twin["depth"][2:6] += rows(4, seed=9)
    for part in twin.values():
        part.requires_grad_()
    every = torch.arange(9)
    change = method.differences(base, twin, (every, every))
    assert len(change["image"]) == len(change["depth"]) == 2  # those that differ in both modalities
    method.contrast(change["image"], change["depth"], 0.07).backward()
    assert all(part.grad.isfinite().all() for part in twin.values())
    assert structural([base, base]) == {}


# Geometry, equations 14 to 16


class Plane:
    """Views of a plane before cameras that look along z; a cell is a pixel."""

    def __init__(self, moves, turns=None, box=None, side=12):
        matrix = np.array([[side, 0, (side - 1) / 2], [0, side, (side - 1) / 2], [0, 0, 1.0]])
        self.cameras, self.depths, points, shown = [], [], [], []
        for place, move in enumerate(moves):
            pose = np.eye(4)
            pose[0, 3] = move / side  # a pixel at 1 m
            if turns is not None and turns[place]:
                pose[:2, :2] = [[-1, 0], [0, -1]]
            self.cameras.append(Camera(side, side, matrix, pose))
            depth = np.ones((side, side))
            if box is not None and place == 1:
                depth[box] = 0.5
            self.depths.append(DepthMap(depth, np.ones((side, side), bool)))
            at = np.stack([*np.meshgrid(np.arange(side), np.arange(side)), np.ones((side, side))], 2).astype(float)
            local = at @ np.linalg.inv(matrix).T * depth[..., None]
            points.append(local @ pose[:3, :3].T + pose[:3, 3])
            shown.append(np.ones((side, side), bool))
        self.cell_points = np.stack(points), np.stack(shown)


def test_correspondences_of_a_shifted_plane_are_exact():
    plane = Plane([0, 3])
    pairs = corresponding_cells(plane, 0, 1)
    rows_, columns = np.divmod(np.arange(144), 12)
    expected = np.stack([np.arange(144), np.arange(144) - 3], 1)[columns >= 3]
    np.testing.assert_array_equal(pairs, expected)  # 3 columns leave the image
    np.testing.assert_array_equal(corresponding_cells(plane, 0, 0), np.stack([np.arange(144)] * 2, 1))
    np.testing.assert_array_equal(corresponding_cells(plane, 0, 1, mutual=True), expected)
    turned = corresponding_cells(Plane([0, 0], turns=[False, True]), 0, 1)
    np.testing.assert_array_equal(turned, np.stack([np.arange(144), np.arange(144)[::-1]], 1))


def test_what_a_box_covers_has_no_correspondence():
    box = (slice(4, 7), slice(2, 8))
    plane = Plane([0, 0], box=box)
    covered = np.zeros((12, 12), bool)
    covered[box] = True
    pairs = corresponding_cells(plane, 0, 1)
    np.testing.assert_array_equal(pairs[:, 0], np.flatnonzero(~covered))


def real_views(seed=0, bad=False, size=80, patch=5):
    encoders = [load_frozen(f"raw-patches?patch={patch}", modality=name) for name in ("image", "depth")]
    store = FeatureStore(*encoders, size, object_pixels=ForegroundConfig("valid"))
    return Views(make_sample(f"{seed:02d}", 8, bad, seed), store)


def test_correspondences_of_a_smooth_object_return():
    views = real_views(patch=4)
    there, back = corresponding_cells(views, 0, 1), dict(corresponding_cells(views, 1, 0).tolist())
    assert len(there) > 40
    returned = [(i, back[j]) for i, j in there.tolist() if j in back]
    count = views.share.shape[-1]
    off = [max(abs(i // count - k // count), abs(i % count - k % count)) for i, k in returned]
    assert np.mean(np.array(off) <= 1) >= 0.95 and len(returned) >= 0.9 * len(there)


def test_the_geometric_loss():
    one, other = rows(9), rows(8, seed=1)
    pairs = torch.tensor([0, 3, 3]), torch.tensor([2, 2, 7])
    plain = [(one[i] - other[j]).numpy() for i, j in zip(*pairs, strict=True)]
    loss = method.geometric_loss
    assert float(loss(one, other, pairs, "squared", False)) == pytest.approx(np.mean([d @ d for d in plain]))
    assert float(loss(one, other, pairs, "euclidean", False)) == pytest.approx(
        np.mean([np.linalg.norm(d) for d in plain]), abs=1e-9
    )
    cosines = [cosine(one[i], other[j]) for i, j in zip(*pairs, strict=True)]
    assert float(loss(one, other, pairs, "cosine")) == pytest.approx(np.mean([1 - c for c in cosines]))
    assert float(loss(one, other, pairs)) == pytest.approx(np.mean([2 - 2 * c for c in cosines]))
    assert float(loss(3 * one, 3 * other, pairs, "squared", False)) == pytest.approx(
        9 * np.mean([d @ d for d in plain])
    )
    turn = torch.linalg.qr(rows(5, 5, seed=7))[0]
    assert float(loss(one @ turn, other @ turn, pairs)) == pytest.approx(float(loss(one, other, pairs)))
    constant = torch.ones(9, 5).double()
    assert float(loss(constant, constant, pairs)) == 0  # the collapse that equation 16 alone invites


# The whole head


def maps_of(head, features):
    (found,) = sganet.score(head, features).values()
    return found


@pytest.mark.parametrize("modality", ["image", "depth", "both"])
def test_without_values_it_is_patchcore_bit_for_bit(modality):
    features, tested = draw(), draw(seed=3)
    core = patchcore.fit([features], patchcore.Config(modality, share=1.0), NOW)
    config = replace(UNTRAINED, modality=modality)
    zero = sganet.fit([features], config, NOW)
    for part in zero.modules.values():
        part.value.zero_()
    given = [(sganet._prepare(features, features.share > 0, config, 0, NOW.device, False))]
    head = sganet._filled(given, zero.modules, config, NOW, zero.dims, {})
    assert torch.equal(head.bank, core.bank)
    assert torch.equal(maps_of(head, tested), patchcore.score(core, tested)[modality])
    assert not torch.equal(maps_of(sganet.fit([features], config, NOW), tested), maps_of(head, tested))


@pytest.mark.parametrize("config", [UNTRAINED, FREE, replace(FREE, scale="length"), replace(FREE, residual=False)])
def test_the_training_instance_scores_zero_and_nothing_of_the_background_is_kept(config):
    features = draw()
    head = sganet.fit([features], config, NOW)
    shown = features.share > 0
    assert len(head.bank) == shown.sum()
    found = maps_of(head, features)
    assert (found[shown] < 1e-5).all() and (found[~shown] > 1e-3).all()


def test_untrained_is_the_weighed_mean_of_the_selected_cells():
    features = draw(background=0)
    config = replace(UNTRAINED, candidates=2, scale="none")
    head = sganet.fit([features], config, NOW)
    count = 12
    flat = {name: getattr(features, name).flatten(1, 2).double().numpy() for name in ("image", "depth")}
    expected = []
    for v in range(4):
        for i in range(count):
            joined = []
            likeness = {u: [0.5 * sum(cosine(flat[m][v][i], flat[m][u][j]) for m in flat) for j in range(count)]
                        for u in (v - 1, v + 1) if 0 <= u < 4}  # fmt: skip
            for m in ("image", "depth"):
                near = [flat[m][u][j] for u, row in likeness.items() for j in np.argsort(row)[::-1][:2]]
                weights = np.exp([flat[m][v][i] @ part / math.sqrt(6) for part in near])
                joined.append(flat[m][v][i] + (weights / weights.sum()) @ np.array(near))
            expected.append(np.concatenate(joined))
    np.testing.assert_allclose(head.bank, np.array(expected), atol=1e-5)


def test_rolling_and_reversing_the_views_rolls_and_reverses_the_maps_where_the_sequence_closes():
    features, tested = draw(), draw(seed=3)
    for config in (replace(UNTRAINED, adjacency="sequence+wrap"), replace(FREE, adjacency="sequence+wrap")):
        head = sganet.fit([features], config, NOW)
        plain = maps_of(head, tested)
        for change in (lambda part: part.roll(1, 0), lambda part: part.flip(0)):
            moved = replace(tested, **{name: change(getattr(tested, name)) for name in ("image", "depth", "share")})
            torch.testing.assert_close(maps_of(head, moved), change(plain), atol=1e-5, rtol=1e-5)
    # Without the closure the ends have other neighbours.
    head = sganet.fit([features], UNTRAINED, NOW)
    moved = replace(tested, **{name: getattr(tested, name).roll(1, 0) for name in ("image", "depth", "share")})
    assert not torch.allclose(maps_of(head, moved), maps_of(head, tested).roll(1, 0), atol=1e-3)


def test_only_neighbours_are_seen_and_the_control_takes_others():
    features = draw(views=6)
    head = sganet.fit([features], UNTRAINED, NOW)
    tested = draw(views=6, seed=3)
    changed = replace(tested, image=tested.image.clone())
    changed.image[0] += 5
    same = (maps_of(head, tested) == maps_of(head, changed)).flatten(1).all(1)
    assert same.tolist() == [False, False, True, True, True, True]
    control = sganet.fit([features], replace(UNTRAINED, shuffled=True), NOW)
    seen = (maps_of(control, tested) == maps_of(control, changed)).flatten(1).all(1)
    assert seen.tolist() != same.tolist() and not seen[0] and (~seen).sum() <= 3


def test_cells_may_come_in_any_order_within_their_view():
    features, tested = draw(), draw(seed=3)
    head = sganet.fit([features], UNTRAINED, NOW)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))

    def shuffled(part):
        kept = part.clone()
        kept[1] = part[1].flatten(0, 1)[order].view(part[1].shape)
        return kept

    moved = replace(tested, **{name: shuffled(getattr(tested, name)) for name in ("image", "depth", "share")})
    plain, found = maps_of(head, tested), maps_of(head, moved)
    torch.testing.assert_close(found, shuffled(plain), atol=1e-5, rtol=1e-5)


def test_more_cells_in_the_bank_are_never_farther_and_both_are_at_least_each():
    first, second, tested = draw(), draw(seed=1), draw(seed=3)
    config = replace(UNTRAINED, scale="none")
    one, two = (sganet.fit(part, config, NOW) for part in ([first], [first, second]))
    assert (maps_of(two, tested) <= maps_of(one, tested)).all()
    alone = [maps_of(sganet.fit([first], replace(config, modality=name, alpha=1.0), NOW), tested)
             for name in ("image", "depth")]  # fmt: skip
    both = maps_of(sganet.fit([first], replace(config, alpha=1.0), NOW), tested)
    assert (both**2 >= alone[0] ** 2 + alone[1] ** 2 - 1e-4).all()
    small = sganet.fit([first], replace(config, share=0.5, limit=9), NOW)
    assert len(small.bank) == 9 and (maps_of(small, tested) >= maps_of(one, tested)).all()


def gradients(names, seed=0):
    """Which matrices some losses reach."""
    torch.manual_seed(seed)
    modules = {name: method.Refinement(5, "xavier").double() for name in ("image", "depth")}
    cells = [view(9, seed=place) for place in range(3)]
    every = torch.arange(9)
    kept = {name: torch.cat([part[name] for part in cells]) for name in modules}
    near = method.neighbourhood("sequence", 3, 1)
    refined = []
    for v, part in enumerate(cells):
        refined.append({})
        for name, made in modules.items():
            offered = [method.comparable(one, name, 0.5) for one in cells]
            refined[v][name] = made(part[name], kept[name], method.candidates(offered[v], offered, near[v], 2))
    terms = {
        "semantic": lambda i, d: method.contrast(i, d, 0.2), "structural": lambda i, d: method.contrast(i, d, 0.2),
        "geometric": lambda one, other, pairs: method.geometric_loss(one, other, pairs),
    }  # fmt: skip
    if "one modality" in names:
        refined = [{"image": part["image"]} for part in refined]
    found = method.losses(
        refined, [(1, (every, every)), (2, (every, every)), None], {(0, 1): (every, every)},
        {name: terms[name] for name in names if name in terms},
    )  # fmt: skip
    sum(found.values()).backward()
    return {f"{name}.{key}": bool(part.grad is not None and part.grad.any())
            for name, made in modules.items() for key, part in made.named_parameters()}  # fmt: skip


def test_each_loss_reaches_its_matrices():
    assert all(gradients(["semantic"]).values()) and all(gradients(["structural"]).values())
    assert all(gradients(["geometric"]).values())
    alone = gradients(["geometric", "one modality"])
    assert all(found == name.startswith("image") for name, found in alone.items())


def test_the_gradients_of_a_step_are_those_of_the_plain_equations_in_float64(monkeypatch):
    monkeypatch.setattr(method, "BLOCK", 40)
    torch.manual_seed(0)
    modules = {name: method.Refinement(5, "xavier").double() for name in ("image", "depth")}
    cells, every = [view(9, seed=place) for place in range(3)], torch.arange(9)
    kept = {name: torch.cat([part[name] for part in cells]) for name in modules}
    near = method.neighbourhood("sequence", 3, 1)
    offered = [method.comparable(one, "image", 0.5) for one in cells]
    index = [method.candidates(offered[v], offered, near[v], 2) for v in range(3)]
    pairs = {(0, 1): (every[:7], every[2:]), (2, 1): (every, every.flip(0))}
    terms = {
        "semantic": lambda i, d: method.contrast(i, d, 0.2), "structural": lambda i, d: method.contrast(i, d, 0.2),
        "geometric": method.geometric_loss,
    }  # fmt: skip

    def gradient(refine, total):
        refined = [{name: refine(made, part[name], kept[name], index[v]) for name, made in modules.items()}
                   for v, part in enumerate(cells)]  # fmt: skip
        weights = [part for made in modules.values() for part in made.parameters()]
        return torch.autograd.grad(total(refined), weights)

    def plain(refined):
        def contrast(one, other):
            logits = torch.stack([torch.stack([a @ b / (a.norm() * b.norm()) for b in other]) for a in one]) / 0.2
            return -(logits.exp().diagonal() / logits.exp().sum(1)).log().mean()

        parts = [[contrast(part["image"], part["depth"]) for part in refined]]
        parts += [[contrast(*(refined[v + 1][name] - refined[v][name] for name in modules)) for v in (0, 1)]]
        parts += [[
            torch.stack([(refined[v][name][i] / refined[v][name][i].norm()
                          - refined[u][name][j] / refined[u][name][j].norm()).square().sum()
                         for i, j in zip(*one, strict=True)]).mean()
            for (v, u), one in pairs.items() for name in modules
        ]]  # fmt: skip
        return sum(torch.stack(part).mean() for part in parts)

    def lean(refined):
        following = [(1, (every, every)), (2, (every, every)), None]
        return sum(method.losses(refined, following, pairs, terms).values())

    found = gradient(lambda made, *rest: made(*rest), lean)
    for one, other in zip(found, gradient(plainly, plain), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-10)


def bytes_of_a_step(views):
    """The most bytes that a step holds at one time beside what is given to it; views of 256 cells, 32 channels each."""
    features = draw(views=views, grid=(16, 16), dims=(32, 32))
    features.share[:] = 1
    config, every = replace(FREE, adjacency="sequence+wrap"), torch.arange(256)
    prepared = sganet._prepare(features, features.share > 0, config, 0, NOW.device, False)
    modules = sganet._modules(config, (32, 32))
    near = method.neighbourhood("sequence+wrap", views, 2)
    following = [((v + 1) % views, (every, every)) for v in range(views)]
    terms = {
        "semantic": lambda i, d: method.contrast(i, d, 0.07), "structural": lambda i, d: method.contrast(i, d, 0.07),
        "geometric": method.geometric_loss,
    }  # fmt: skip
    with Peak() as peak:
        refined = [prepared.refined(modules, view) for view in range(views)]
        matched = {(v, u): (every, every) for v, others in enumerate(near) for u in others}
        sum(method.losses(refined, following, matched, terms).values()).backward()
    return peak.peak


def test_a_step_holds_few_copies_of_the_features_and_few_matrices_of_all_cells(monkeypatch):
    monkeypatch.setattr(method, "BLOCK", 2**15)
    few, many = bytes_of_a_step(6), bytes_of_a_step(12)
    features, matrix = 6 * 256 * 64 * 4, 256 * 256 * 4
    assert many - few < 6 * features  # six more views; keeping keys, values or what is gathered would be far more
    assert few < 6 * features + 4 * matrix + 4 * 2**17


HEAP = """
import resource, torch
from dino_depth.device import return_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def left(mebibytes):
    large = torch.ones(mebibytes * 2**18)
    lasting = torch.ones(2**10)  # above it in the heap
    before = resident()
    del large
    return 1 - (before - resident()) / (mebibytes * 2**20)

torch.ones(24 * 2**18)  # of which glibc learns to keep blocks of this size in the heap
kept = left(16)
with return_memory():
    print(kept, left(20))  # no hole is as large
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_tensors_go_back_to_the_kernel_while_a_step_is_taken():
    found = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True).stdout
    kept, left = map(float, found.split())
    assert kept > 0.9 and left < 0.1


def test_the_losses_are_means_over_views_and_pairs():
    cells, every = [view(9, seed=place) for place in range(3)], torch.arange(9)
    found = method.losses(
        cells, [(1, (every, every)), (2, (every, every)), None],
        {(0, 1): (every, every), (2, 1): (every[:4], every[:4])},
        {"semantic": lambda i, d: method.contrast(i, d, 0.2), "structural": lambda i, d: method.contrast(i, d, 0.2),
         "geometric": method.geometric_loss},
    )  # fmt: skip
    contrasts = [float(method.contrast(part["image"], part["depth"], 0.2)) for part in cells]
    changes = [float(method.contrast(*(cells[v + 1][name] - cells[v][name] for name in ("image", "depth")), 0.2))
               for v in (0, 1)]  # fmt: skip
    pairs = [float(method.geometric_loss(cells[v][name], cells[1][name], (every[:n], every[:n])))
             for v, n in ((0, 9), (2, 4)) for name in ("image", "depth")]  # fmt: skip
    for name, values in (("semantic", contrasts), ("structural", changes), ("geometric", pairs)):
        assert float(found[name]) == pytest.approx(np.mean(values), abs=1e-12)


def test_training_lowers_the_loss_with_cameras_and_uses_them():
    config = Config(steps=12, learning_rate=1e-3)
    head = sganet.fit([real_views()], config, NOW)
    assert set(head.curves) == {"semantic", "structural", "geometric"}
    assert all(len(curve) == 12 and curve[-1] < curve[0] for curve in head.curves.values())
    again = sganet.fit([real_views()], config, NOW)
    assert torch.equal(head.bank, again.bank)
    wider = sganet.fit([real_views()], replace(config, adjacency="angle", structure="place", counted="total"), NOW)
    assert not torch.equal(wider.bank, head.bank)
    assert sganet.score(wider, real_views(5, True))["both"].isfinite().all()


def test_encoders_of_different_widths_are_contrasted_through_a_projection():
    features = draw(dims=(6, 4))
    head = sganet.fit([features], FREE, NOW)
    assert head.bank.shape[1] == 10 and head.modules["narrow"].weight.shape == (4, 6)
    back = sganet.from_state(head.state(), NOW.device)
    assert torch.equal(maps_of(back, draw(dims=(6, 4), seed=3)), maps_of(head, draw(dims=(6, 4), seed=3)))
    with pytest.raises(ConfigError, match="sganet.shared: image and depth must have equally many channels"):
        sganet.fit([features], replace(FREE, shared=True), NOW)


def test_shared_matrices_are_one():
    head = sganet.fit([draw()], replace(FREE, shared=True), NOW)
    assert head.modules["image"] is head.modules["depth"]
    apart = sganet.fit([draw()], FREE, NOW)
    assert not torch.equal(apart.modules["image"].value, apart.modules["depth"].value)


# What cannot work


@pytest.mark.parametrize(
    "change",
    [
        {"candidates": 0}, {"alpha": 1.5}, {"ring": 1}, {"adjacent": 0}, {"heads": 0}, {"steps": 0}, {"share": 0.0},
        {"learning_rate": 0.0}, {"temperature": 0.0}, {"tolerance": -1.0}, {"semantic": -1.0}, {"neighbours": 0},
        {"limit": 0}, {"weight_decay": -0.1},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_name_their_key(change):
    with pytest.raises(ConfigError, match=f"sganet.{next(iter(change))}"):
        sganet.fit([draw()], replace(FREE, **change), NOW)


def test_what_a_benchmark_lacks_is_refused_before_anything_runs():
    both = frozenset({"image", "depth"})
    with pytest.raises(ConfigError, match="sganet needs calibrated views"):
        sganet.check(Config(), Facts(both, 4, False, 1))
    sganet.check(FREE, Facts(both, 4, False, 1))
    with pytest.raises(ConfigError, match="sganet refines views by others"):
        sganet.check(FREE, Facts(both, 1, False, 1))
    with pytest.raises(ConfigError, match="sganet.ring 12: the 4 views"):
        sganet.check(replace(FREE, adjacency="ring"), Facts(both, 4, False, 1))
    with pytest.raises(ConfigError, match="no loss is left to train with"):
        sganet.check(replace(FREE, semantic=0.0, structural=0.0), Facts(both, 4, False, 1))
    with pytest.raises(ConfigError, match="sganet.heads 4 do not divide the 6 channels"):
        sganet.fit([draw()], replace(FREE, heads=4), NOW)
    empty = draw()
    empty.share[2] = 0
    with pytest.raises(DataError, match="training sample 0: no cell of view 2 shows the object"):
        sganet.fit([empty], FREE, NOW)


def test_a_test_view_without_an_object_takes_no_part():
    head = sganet.fit([draw()], UNTRAINED, NOW)
    tested = draw(seed=3)
    tested.share[1] = 0
    assert maps_of(head, tested).isfinite().all()


def test_the_score_of_an_instance_is_the_maximum_over_its_views():
    views = real_views(5, True, patch=10)
    (values,) = sganet.score(sganet.fit([real_views(patch=10)], UNTRAINED, NOW), views).values()
    shown = views.foregrounds
    volume = accumulate({"both": values}, views.sample, views.depths, shown, VoxelConfig(extent="union"))
    by_view = [combine({"both": values}, place, mask, "max").max() for place, mask in enumerate(shown)]
    assert volume.instance_score == max(by_view)


def test_titles_tell_variants_apart():
    assert sganet.title(Config()) == "sganet, both"
    assert sganet.title(UNTRAINED) == "sganet, both, untrained"
    assert sganet.title(Config(candidates=2, semantic=0.0)) == "sganet, both, candidates 2, semantic 0.0"
    assert sganet.needs(UNTRAINED) == {"image", "depth"} and "geometry" in sganet.needs(Config())
    words = ["--adjacency", "sequence+wrap", "--limit", "null", "--untrained", "true"]
    assert parse(Config, words, "test").adjacency == "sequence+wrap"


# Gates


def test_the_figures_of_a_sound_instance():
    features, tested = draw(views=3, background=0), draw(views=3, seed=3, background=0)
    config = replace(FREE, scale="none", steps=2)
    head = sganet.fit([features], config, NOW)
    figures = sganet.health(head, tested, sganet.score(head, tested))

    def refined(given, modules):
        prepared = sganet._prepare(given, given.share > 0, config, 0, NOW.device, False)
        return [prepared.refined(modules, view) for view in range(3)]

    mine, theirs = refined(features, head.modules), refined(tested, head.modules)
    gaps = [np.mean([float(method.contrast(part["image"], part["depth"], 0.07)) for part in one])
            for one in (theirs, mine)]  # fmt: skip
    assert figures["gap"] == pytest.approx(gaps[0] - gaps[1], abs=1e-5)
    start = sganet.fit([features], replace(config, untrained=True), NOW)
    ratios = []
    for name in ("image", "depth"):
        parts = [torch.cat([part[name] for part in one]) for one in (mine, refined(features, start.modules))]
        ratios.append(
            np.divide(*[float(p.var(0, correction=0).sum() / p.square().sum(1).mean()) ** 0.5 for p in parts])
        )
    assert figures["spread"] == pytest.approx(min(ratios), rel=1e-4)
    far = []
    for modules in (head.modules, start.modules):
        joined, others = (
            [torch.cat([part["image"], part["depth"]], 1).double() for part in refined(one, modules)]
            for one in (features, tested)
        )
        out = torch.cat([torch.cdist(joined[v], torch.cat([joined[u] for u in range(3) if u != v])).amin(1)
                         for v in range(3)])  # fmt: skip
        far.append(float(torch.cdist(torch.cat(others), torch.cat(joined)).amin(1).median() / out.median()))
    assert figures["distance"] == pytest.approx(far[0] / far[1], rel=1e-4)
    assert sganet.health(start, tested, sganet.score(start, tested)) == {}


def test_learning_by_heart_opens_the_gap_and_collapse_closes_the_spread():
    features, tested = draw(), draw(seed=3)
    heart = sganet.fit([features], replace(FREE, steps=200, learning_rate=1e-2), NOW)
    figures = sganet.health(heart, tested, sganet.score(heart, tested))
    assert figures["gap"] > 1 and "memorised: semantic gap" in sganet.verdict(heart.config, figures)
    assert sganet.verdict(heart.config, {"gap": 0.2, "distance": 1.0, "spread": 0.9}) == ""
    assert "times as far as untrained" in sganet.verdict(heart.config, {"distance": 9.0})
    # The geometric loss alone, on pairs that have nothing in common, is least where all features are one.
    config = replace(UNTRAINED, untrained=False, residual=False, steps=150, learning_rate=1e-2, scale="none")
    config = replace(config, semantic=0.0, structural=0.0)
    every = torch.arange(12)
    given = draw(background=0)
    prepared = sganet._prepare(given, given.share > 0, config, 0, NOW.device, False)
    modules = sganet._started(config, (6, 6), NOW)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1e-2)
    pairs = {(v, v + 1): (every, every.roll(5)) for v in range(3)}
    for _ in range(150):
        refined = [prepared.refined(modules, view) for view in range(4)]
        loss = method.losses(refined, [None] * 4, pairs, {"geometric": method.geometric_loss})["geometric"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head = sganet._filled([prepared], modules, config, NOW, (6, 6), {})
    assert head.trained["spread"] < config.least_spread
    assert "collapsed" in sganet.verdict(config, {"spread": head.trained["spread"]})


def test_a_run_whose_head_learned_by_heart_is_refused_or_reported(tmp_path):
    benchmark = SimpleNamespace(
        name="parts", setup="", categories=("part",), check_category=None, pixels=False,
        samples=lambda category, split: [replace(make_sample("00", 4, False, 0), split="train")] if split == "train"
        else [make_sample("01", 4, False, 1), make_sample("02", 4, True, 2)],
    )  # fmt: skip
    encoders = [load_frozen("raw-patches?patch=10", modality=name) for name in ("image", "depth")]
    store = FeatureStore(*encoders, 80, object_pixels=ForegroundConfig("valid"))
    for gates in ("refuse", "report"):
        words = ["--out", str(tmp_path / gates), "--head.name", "sganet", "--head.sganet.steps", "2"]
        words += ["--head.sganet.gates", gates, "--head.sganet.largest_distance", "1e-6"]
        config = parse(EvaluateConfig, words, "test")
        run = Run(config, {"setup": "", "synthetic": True})
        score_instances(Session(config, benchmark, store, run, NOW.device), ["part"], [("part", "01"), ("part", "02")])
        if gates == "refuse":
            with pytest.raises(GateError, match=r"part, seed 0: memorised: sound cells.*head.sganet.gates report"):
                make_trial(run, benchmark, "part", 0)
        else:
            trial, _ = make_trial(run, benchmark, "part", 0)
            assert set(trial["checks"]) == {"gap", "distance", "spread"}
        line = json.loads((tmp_path / gates / "metrics.jsonl").read_text())
        assert line["instances"] == 1 and line["distance"] > 0 and line["verdict"].startswith("memorised")


def test_the_linear_mapping_of_the_benchmark_finds_what_is_linear(monkeypatch):
    """Against numpy's least squares; a cell that breaks the rule is told, and only in what it breaks it by."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    linear = importlib.import_module("linear_cfm")
    random = torch.Generator().manual_seed(0)
    image, share = torch.randn(2, 6, 6, 3, generator=random), torch.ones(2, 6, 6)
    share[:, 0] = 0
    offsets = torch.tensor([[0.0], [2.0]])[:, None, None]
    depth = image @ torch.randn(3, 3, generator=random) + offsets + 0.01 * torch.randn(2, 6, 6, 3, generator=random)
    views = SimpleNamespace(image=image, depth=depth, share=share)
    head = linear.fit([views], linear.Config(penalty=1e-9), None)
    shown = share.numpy() > 0
    inputs = np.concatenate([image.numpy()[shown], np.eye(2)[np.nonzero(shown)[0]]], 1)
    slow = inputs @ np.linalg.lstsq(inputs, depth.numpy()[shown], rcond=None)[0]
    predicted, _ = head.mappings["depth"].both(views, "depth")
    mean, deviation = head.mappings["depth"].outputs
    np.testing.assert_allclose((predicted * deviation + mean).numpy()[shown], slow, atol=1e-4)
    assert linear.explained(head, "depth", [views]) > 0.999
    changed = SimpleNamespace(image=image, depth=depth.clone(), share=share)
    changed.depth[1, 3, 4] = -changed.depth[1, 3, 4]
    before, after = linear.score(head, views), linear.score(head, changed)
    assert set(after) == {"image", "depth"} and after["depth"].argmax() == 1 * 36 + 3 * 6 + 4
    assert before["depth"][share > 0].max() < 1e-2 < after["depth"].max()
    assert set(linear.score(linear.fit([views], linear.Config(("image",)), None), views)) == {"image"}
