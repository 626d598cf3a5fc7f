"""Heads: equations against float64 transcriptions, fast paths against slow twins, and the ladder's reductions."""

import errno
import io
import math
import os
import weakref
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from quick_heads import QUICK
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_depth.anomaly import bank, heads, resume
from dino_depth.anomaly.features import SampleFeatures
from dino_depth.anomaly.fitted import fitted_head
from dino_depth.anomaly.heads import Context, modmap, patchcore, template
from dino_depth.anomaly.heads.modmap import Config as ModMapConfig
from dino_depth.anomaly.heads.modmap import crossmodal
from dino_depth.anomaly.heads.patchcore import Config as PatchCoreConfig
from dino_depth.anomaly.views import Views
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.lock import Busy

CPU = torch.device("cpu")
NOW = Context(0, CPU)
SMALL = ModMapConfig(image_to_depth=(10, 8), depth_to_image=(9, 8), modulator=6, steps=4, pairs=5)
# Heads of features alone; tests/test_contract.py asks every head for what all must do.
HEADS = [
    name for name in heads.names() if heads.open_head(name).needs(heads.open_head(name).Config()) <= {"image", "depth"}
]


def draw(views=3, grid=(3, 4), dims=(7, 5), seed=0, background=0.3) -> SampleFeatures:
    """Random features; the given share of cells shows no object."""
    generator = torch.Generator().manual_seed(seed)
    image, depth = (torch.randn(views, *grid, dim, generator=generator) for dim in dims)
    share = torch.rand(views, *grid, generator=generator)
    return SampleFeatures(image, depth, share * (share >= background))


def linear(views=4, grid=(8, 8), noise=0.0, seed=0) -> SampleFeatures:
    """Depth features that are a linear map of the image features, of one rank and so one of the other, too."""
    generator = torch.Generator().manual_seed(99)
    to_image, to_depth = torch.randn(4, 12, generator=generator), torch.randn(4, 8, generator=generator)
    generator.manual_seed(seed)
    hidden = torch.randn(*grid, 4, generator=generator).expand(views, -1, -1, -1)
    hidden = hidden + noise * torch.randn(hidden.shape, generator=generator)
    return SampleFeatures(hidden @ to_image, hidden @ to_depth, torch.ones(views, *grid))


def trained(config=SMALL, seed=0, **options) -> modmap.ModMap:
    """A head whose modulators have left the identity by far."""
    head = modmap.fit([draw(**options)], config, Context(seed, CPU))
    for place, member in enumerate(head.members):
        generator = torch.Generator().manual_seed(1000 + place)
        for parameter in member.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return head


def settings(name: str):
    """A head's module and a configuration that is fitted in no time."""
    module = heads.open_head(name)
    return module, SMALL if module is modmap else module.Config(**QUICK.get(name, {}))


def parts(features):
    return features.image, features.depth, features.share


def of_class(features, index):
    return replace(features, class_index=index)


def shown(features, name="real"):
    """Features as those of an instance."""
    sample = SimpleNamespace(category="part", name=name, views=[None] * len(features.share))
    return Views(sample, SimpleNamespace(get=lambda *_: features), features.class_index)


# Direct transcription of the equations: float64, one cell at a time


def transcribed_mlp(layers, vector):
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    for place, layer in enumerate(linear):
        vector = layer.weight.detach().double().numpy() @ vector + layer.bias.detach().double().numpy()
        if place < len(linear) - 1:
            vector = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in vector])
    return vector


def transcribed_distance(network, modulator, feature, observed, code):
    if modulator is not None:
        gamma, beta = np.split(transcribed_mlp(modulator, code), 2)  # equation 4
        feature = gamma * feature + beta  # equation 5
    predicted = transcribed_mlp(network, feature)  # equations 6 and 7
    lengths = math.sqrt(sum(predicted**2)) * math.sqrt(sum(observed**2))
    return 1 - sum(predicted * observed) / lengths  # equations 8 and 9


def transcribed_code(source, target, views, class_index=0, classes=1):
    code = np.zeros(2 * views + (classes if classes > 1 else 0))
    code[source] = code[views + target] = 1
    if classes > 1:
        code[2 * views + class_index] = 1
    return code


def transcribed_scores(head, features, class_index=0):
    """Image and depth distances (members * sources, 2, targets, cells) of every source, in float64."""
    image, depth = (part.flatten(1, 2).double().numpy() for part in (features.image, features.depth))
    count, cells = image.shape[:2]
    every = head.config.conditioning == "cross-view"
    found = np.zeros((len(head.members), count if every else 1, 2, count, cells))
    for place, mapper in enumerate(head.members):
        for target in range(count):
            for at, source in enumerate(range(count) if every else [target]):
                code = transcribed_code(source, target, max(head.views), class_index, len(head.views))
                for cell in range(cells):
                    found[place, at, 0, target, cell] = transcribed_distance(
                        mapper.depth_to_image, mapper.depth_modulator, depth[source, cell], image[target, cell], code
                    )
                    found[place, at, 1, target, cell] = transcribed_distance(
                        mapper.image_to_depth, mapper.image_modulator, image[source, cell], depth[target, cell], code
                    )
    return found.reshape(-1, *found.shape[2:])


def as_array(maps):
    return torch.stack([maps["image"], maps["depth"]]).flatten(2).double().numpy()


@pytest.mark.parametrize("conditioning", ["none", "view", "cross-view"])
@pytest.mark.parametrize("aggregate", ["min", "mean", "max"])
def test_maps_equal_the_equations_in_float64(conditioning, aggregate):
    head = trained(replace(SMALL, conditioning=conditioning, aggregate=aggregate, ensemble=2))
    features = draw(seed=5)
    expected = getattr(np, aggregate)(transcribed_scores(head, features), axis=0)
    assert np.ptp(transcribed_scores(head, features), axis=0).mean() > 0.1  # members and sources do differ
    np.testing.assert_allclose(as_array(modmap.score(head, features)), expected, atol=2e-6)


def test_maps_of_several_classes_equal_the_equations_in_float64():
    samples = [draw(views=3), draw(views=2, seed=1)]
    samples = [of_class(part, index) for index, part in enumerate(samples)]
    head = modmap.fit(samples, replace(SMALL, steps=40, learning_rate=0.05), NOW)
    for index, features in enumerate(samples):
        expected = transcribed_scores(head, features, index).min(0)
        np.testing.assert_allclose(as_array(modmap.score(head, features)), expected, atol=2e-6)
    head = modmap.fit([draw(), of_class(draw(seed=1), 1)], replace(SMALL, learning_rate=0.05), NOW)
    maps = [modmap.score(head, of_class(draw(), index))["image"] for index in (0, 1)]
    assert not torch.allclose(*maps, atol=1e-3)  # the class's code reaches the maps


def test_the_first_loss_equals_the_equations_in_float64():
    features = draw(views=2)
    head = modmap.fit(
        [features], replace(SMALL, pairs=4, steps=1, learning_rate=1e-12, initial_learning_rate=1e-12), NOW
    )
    scores = transcribed_scores(head, features).sum(1)  # (sources, targets, cells), equation 10
    shown = (features.share > 0).flatten(1).numpy()
    expected = np.mean([scores[source, target][shown[target]].sum() for source in range(2) for target in range(2)])
    assert head.losses.item() == pytest.approx(expected / shown.sum(1).mean(), abs=1e-6)


def test_modulators_are_the_identity_before_training():
    mapper = crossmodal.Mapper((7, 5), (10, 8), (9, 8), codes=6, modulator=6)
    codes = crossmodal.view_codes(*torch.tensor([[0, 1, 2], [2, 2, 0], [0, 0, 0]]), 3, 1)
    features = draw().image.flatten(1, 2)
    assert torch.equal(crossmodal.modulate(features, mapper.image_modulator, codes), features)
    gamma, beta = mapper.depth_modulator(codes).chunk(2, 1)
    assert torch.equal(gamma, torch.ones(3, 5)) and torch.equal(beta, torch.zeros(3, 5))


def test_all_steps_of_the_ladder_start_from_the_same_maps():
    still = replace(SMALL, learning_rate=1e-12, initial_learning_rate=1e-12, steps=1, sources="target")
    maps = [
        as_array(modmap.score(modmap.fit([draw()], replace(still, conditioning=name), Context(3, CPU)), draw(seed=8)))
        for name in ("none", "view", "cross-view")
    ]
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-6)
    np.testing.assert_allclose(maps[2], maps[0], atol=1e-6)


def test_cross_view_of_one_view_is_view():
    heads = [modmap.fit([draw(views=1)], replace(SMALL, conditioning=name), NOW) for name in ("view", "cross-view")]
    assert torch.equal(heads[0].losses, heads[1].losses)
    assert_same_maps(*(modmap.score(head, draw(views=1, seed=1)) for head in heads))


def assert_same_maps(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def test_blocks_of_sources_do_not_change_the_maps(monkeypatch):
    for aggregate in ("min", "mean", "max"):
        head, features = trained(replace(SMALL, aggregate=aggregate), views=7), draw(views=7, seed=4)
        monkeypatch.setitem(modmap.ROWS, "cpu", 1)
        one_by_one = as_array(modmap.score(head, features))
        for rows in (24, 36, 10**6):
            monkeypatch.setitem(modmap.ROWS, "cpu", rows)
            np.testing.assert_allclose(as_array(modmap.score(head, features)), one_by_one, atol=1e-6)


def test_the_fast_path_equals_a_double_loop_over_single_pairs():
    head, features = trained(views=5, dims=(32, 24)), draw(views=5, dims=(32, 24), seed=4)
    maps = modmap.score(head, features)
    for target in range(5):
        single = [modmap.pair_maps(head, features, target, [source]) for source in range(5)]
        for key, found in maps.items():
            slow = torch.stack([pair[key][0] for pair in single]).amin(0)
            torch.testing.assert_close(found[target], slow, atol=1e-6, rtol=0)


@pytest.mark.parametrize("conditioning", ["none", "view", "cross-view"])
def test_permuted_views_and_codes_permute_the_maps(conditioning):
    head, features = trained(replace(SMALL, conditioning=conditioning), views=4), draw(views=4, seed=2)
    maps = modmap.score(head, features)
    order = torch.tensor([2, 0, 3, 1])
    permuted = SampleFeatures(*(part[order] for part in parts(features)))
    if conditioning != "none":
        shifted = modmap.score(head, permuted)
        assert not torch.allclose(shifted["image"], maps["image"][order], atol=1e-3)
        for modulator in (head.members[0].image_modulator, head.members[0].depth_modulator):
            weight = modulator[0].weight
            weight.copy_(weight[:, torch.cat([order, order + 4])])
    for key, found in modmap.score(head, permuted).items():
        torch.testing.assert_close(found, maps[key][order], atol=1e-6, rtol=0)


def test_fewer_sources_are_the_first_of_more_and_all_of_them_are_all():
    head, features = trained(views=6), draw(views=6, seed=2)
    maps = {count: modmap.score(replace(head, config=replace(head.config, sources=count)), features)
            for count in (1, 2, 5, 6, "all", "target")}  # fmt: skip
    for less, more in ((1, 2), (2, 5), (5, 6)):
        for key in ("image", "depth"):
            assert (maps[more][key] <= maps[less][key] + 1e-6).all() and (maps[more][key] < maps[less][key]).any()
    np.testing.assert_allclose(as_array(maps[6]), as_array(maps["all"]), atol=1e-6)
    expected = torch.cat([modmap.pair_maps(head, features, view, [view])["image"] for view in range(6)])
    torch.testing.assert_close(maps["target"]["image"], expected, atol=1e-6, rtol=0)
    drawn = [modmap._draw_sources(replace(head, config=replace(SMALL, sources=2), seed=seed), 6) for seed in range(9)]
    assert len({tuple(one.tolist()) for one in drawn}) > 3


def test_a_shift_of_views_is_what_views_in_another_order_look_like():
    head, features = trained(views=4), draw(views=4, seed=2)
    turned = SampleFeatures(*(part.roll(1, 0) for part in parts(features)))  # view 0 lies in place 1
    expected = {key: part.roll(-1, 0) for key, part in modmap.score(head, turned).items()}
    shifted = modmap.score(replace(head, config=replace(head.config, view_shift=1)), features)
    for key, part in modmap.score(head, features).items():
        torch.testing.assert_close(shifted[key], expected[key], atol=1e-6, rtol=0)
        assert not torch.allclose(shifted[key], part, atol=1e-3)
    whole = modmap.score(replace(head, config=replace(head.config, view_shift=-4)), features)
    assert_same_maps(whole, modmap.score(head, features))


def test_one_modality_is_one_of_both_maps():
    head, features = trained(), draw(seed=2)
    both = modmap.score(head, features)
    for modality in ("image", "depth"):
        maps = modmap.score(replace(head, config=replace(head.config, modality=modality)), features)
        assert_same_maps(maps, {modality: both[modality]})


def test_cfm_as_published_multiplies_distances_of_unit_vectors():
    """Against CFM's own formulas in float64: L2 of normalised features, then the product at each cell."""
    head = trained(replace(SMALL, conditioning="none"))
    features = draw(seed=2)
    published = replace(head, config=replace(head.config, distance="euclidean", modality="product"))
    mapper = head.members[0]
    with torch.inference_mode():
        pairs = [
            (mapper.image_to_depth(features.image), features.depth),
            (mapper.depth_to_image(features.depth), features.image),
        ]
    unit = [[torch.nn.functional.normalize(part.double(), dim=-1) for part in pair] for pair in pairs]
    expected = torch.stack([(one - other).pow(2).sum(-1).sqrt() for one, other in unit]).prod(0)
    maps = modmap.score(published, features)
    assert list(maps) == ["both"]
    torch.testing.assert_close(maps["both"].double(), expected, atol=2e-3, rtol=1e-3)
    both = modmap.score(replace(published, config=replace(published.config, modality="both")), features)
    assert torch.equal(maps["both"], both["image"] * both["depth"])


class ReleasedMapping(torch.nn.Module):
    """Three linear layers under the names of the released code."""

    def __init__(self, inputs, outputs):
        super().__init__()
        middle = (inputs + outputs) // 2
        self.input, self.projection = torch.nn.Linear(inputs, middle), torch.nn.Linear(middle, middle)
        self.output = torch.nn.Linear(middle, outputs)

    def forward(self, x):
        gelu = torch.nn.functional.gelu
        return self.output(gelu(self.projection(gelu(self.input(x)))))


class ReleasedModulator(torch.nn.Module):
    def __init__(self, views, dim):
        super().__init__()
        layers = torch.nn.Linear(2 * views, 128), torch.nn.GELU(), torch.nn.Linear(128, 2 * dim)
        self.mlp = torch.nn.Sequential(*layers)

    def forward(self, x, codes):
        gamma, beta = self.mlp(codes)[:, None].chunk(2, -1)
        return gamma * x + beta


def released(path, views=4, image=10, depth=6):
    torch.manual_seed(5)
    parts = {
        "model_image2depth": ReleasedMapping(image, depth), "model_depth2image": ReleasedMapping(depth, image),
        "modulator_image": ReleasedModulator(views, image), "modulator_depth": ReleasedModulator(views, depth),
    }  # fmt: skip
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    return parts


def test_weights_of_the_released_code_score_as_its_modules_do(tmp_path):
    features = draw(views=4)
    image, depth = features.image.shape[-1], features.depth.shape[-1]
    parts = released(tmp_path / "part.pth", 4, image, depth)
    middle = ((image + depth) // 2,) * 2
    config = ModMapConfig(image_to_depth=middle, depth_to_image=middle, weights=str(tmp_path / "{category}.pth"))
    head = modmap.fit([shown(features)], config, NOW)
    expected = {"image": [], "depth": []}
    with torch.inference_mode():
        flat = {name: getattr(features, name).flatten(1, 2) for name in expected}
        for target in range(4):
            codes = torch.zeros(4, 8)
            codes[range(4), range(4)] = codes[:, 4 + target] = 1
            predicted = {
                "depth": parts["model_image2depth"](parts["modulator_image"](flat["image"], codes)),
                "image": parts["model_depth2image"](parts["modulator_depth"](flat["depth"], codes)),
            }
            for name, found in predicted.items():
                distance = 1 - torch.cosine_similarity(found, flat[name][target], dim=-1)
                expected[name].append(distance.amin(0).unflatten(0, features.share.shape[1:]))
    for name, maps in modmap.score(head, features).items():
        torch.testing.assert_close(maps, torch.stack(expected[name]), atol=1e-6, rtol=0)
    again = modmap.from_state(head.state(), CPU)
    assert_same_maps(modmap.score(again, features), modmap.score(head, features))
    released(tmp_path / "part.pth", 4, image + 1, depth)
    with pytest.raises(DataError, match="holds other weights now"):
        modmap.from_state(head.state(), CPU)
    with pytest.raises(ConfigError, match=r"part.pth: image_to_depth.0.weight is \("):
        modmap.fit([shown(features)], config, NOW)
    released(tmp_path / "part.pth", 5, image, depth)
    with pytest.raises(ConfigError, match="part.pth: of 5 views, instances have 4"):
        modmap.fit([shown(features)], config, NOW)
    torch.save({"model_image2depth": {}}, tmp_path / "part.pth")
    with pytest.raises(DataError, match="part.pth: not weights of the release: KeyError"):
        modmap.fit([shown(features)], config, NOW)
    with pytest.raises(ConfigError, match="no such file"):
        modmap.fit([shown(features)], replace(config, weights="nowhere.pth"), NOW)
    with pytest.raises(ConfigError, match="cross-view"):
        modmap.fit([shown(features)], replace(config, conditioning="view"), NOW)


def test_an_ensemble_is_the_minimum_over_models_trained_alone():
    view = replace(SMALL, conditioning="view")
    ensemble = modmap.fit([draw()], replace(view, ensemble=3), Context(5, CPU))
    alone = [replace(ensemble, members=(member,)) for member in ensemble.members]
    maps = [modmap.score(head, draw(seed=1))["depth"] for head in alone]
    assert torch.equal(modmap.score(ensemble, draw(seed=1))["depth"], torch.stack(maps).amin(0))
    assert not torch.allclose(maps[0], maps[1], atol=1e-3) and not torch.allclose(maps[1], maps[2], atol=1e-3)
    first = modmap.fit([draw()], view, Context(5, CPU))
    assert_same_maps(modmap.score(first, draw(seed=1)), modmap.score(alone[0], draw(seed=1)))


# Training


@pytest.mark.parametrize(("steps", "warmup"), [(2, 0.1), (15, 0.1), (40, 0.1), (40, 0.0), (40, 0.25), (600, 0.1)])
def test_the_schedule_is_torchs_one_cycle(steps, warmup):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 5e-4, total_steps=steps, pct_start=warmup, div_factor=5, anneal_strategy="cos"
    )
    for step in range(steps):
        group = optimizer.param_groups[0]
        assert crossmodal.one_cycle(step, steps, 1e-4, 5e-4, warmup) == pytest.approx(
            (group["lr"], group["betas"][0]), rel=1e-9
        )
        optimizer.step()
        if step < steps - 1:
            torchs.step()


def test_momentum_is_cycled_or_fixed(monkeypatch):
    seen, adam = [], torch.optim.Adam

    class Watched(adam):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["betas"][0])
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    for momentum in ("cycled", "fixed"):
        modmap.fit([draw()], replace(SMALL, steps=5, momentum=momentum), NOW)
    assert seen[:5] == pytest.approx([crossmodal.one_cycle(step, 5, 1e-4, 5e-4, 0.1)[1] for step in range(5)])
    assert seen[5:] == [0.9] * 5


def test_the_schedule_survives_few_steps():
    for steps in (1, 10):
        rates = [crossmodal.one_cycle(step, steps, 1e-4, 5e-4, 0.1)[0] for step in range(steps)]
        assert max(rates) <= 5e-4 and min(rates) > 0 and rates[-1] == pytest.approx(1e-8 if steps > 1 else rates[-1])


def test_an_epoch_is_every_pair_once(monkeypatch):
    seen, codes = [], modmap.view_codes

    def record(source, target, *more):
        seen.extend(zip(source.tolist(), target.tolist(), strict=True))
        return codes(source, target, *more)

    monkeypatch.setattr(modmap, "view_codes", record)
    head = modmap.fit([draw(views=3)], replace(SMALL, steps=None, epochs=2, pairs=4), NOW)
    every = sorted((source, target) for source in range(3) for target in range(3))
    assert head.losses.shape == (1, 6)
    assert sorted(seen[:9]) == sorted(seen[9:]) == every and seen[:9] != seen[9:]


def test_only_cells_whose_target_shows_the_object_are_trained_on():
    features = draw(views=2)
    hidden = features.share == 0
    changed = replace(features, image=features.image.masked_fill(hidden[..., None], 50.0))
    config = replace(SMALL, conditioning="view")
    assert torch.equal(modmap.fit([features], config, NOW).losses, modmap.fit([changed], config, NOW).losses)
    every = replace(config, cells="all")
    assert not torch.equal(modmap.fit([features], every, NOW).losses, modmap.fit([changed], every, NOW).losses)
    cross = [modmap.fit([one], SMALL, NOW).losses for one in (features, changed)]
    assert not torch.equal(*cross)  # a source's background predicts a target's object


def test_cells_are_drawn_without_replacement_among_those_that_show_the_object():
    shown = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) > 0.6
    shown[0], shown[1, 3:] = True, False
    generator = torch.Generator().manual_seed(1)
    for tokens in (None, 1, 6, 40, 100):
        cells, weight = crossmodal.draw_cells(shown, tokens, generator)
        for row in range(5):
            kept = cells[row][weight[row] > 0].tolist()
            assert len(set(kept)) == len(kept) == min(tokens or 40, int(shown[row].sum()))
            assert shown[row, kept].all()
    counts = torch.zeros(40)
    for _ in range(400):
        counts[crossmodal.draw_cells(shown[:1], 6, generator)[0][0]] += 1
    assert counts.min() > 30 and counts.max() < 95  # 60 each


def test_as_many_cells_as_there_are_is_all_of_them():
    losses = [modmap.fit([draw()], replace(SMALL, tokens=tokens), NOW).losses for tokens in (None, 12, 1)]
    assert torch.equal(losses[0], losses[1]) and not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("conditioning", ["none", "view", "cross-view"])
def test_the_loss_falls_where_depth_is_a_linear_map_of_the_image(conditioning):
    config = ModMapConfig(conditioning, (32, 24), (24, 24), steps=300, learning_rate=5e-3)
    head = modmap.fit([linear(noise=0.1)], config, NOW)
    assert head.losses.shape == (1, 300)
    assert head.losses[0, :5].mean() > 1 and head.losses[0, -5:].mean() < 0.15
    nominal = linear(noise=0.1, seed=0)
    defective = replace(nominal, depth=nominal.depth.clone())
    defective.depth[1, 2, 3] *= -1
    for key, maps in modmap.score(head, defective).items():
        repaired = conditioning == "cross-view" and key == "image"  # another view's depth predicts the image there
        assert (maps[1, 2, 3] > 5 * maps.flatten().quantile(0.95)) != repaired


def test_seeds_decide_and_nothing_else_does():
    torch.manual_seed(1)
    first = modmap.fit([draw()], replace(SMALL, tokens=3), NOW)
    before = torch.random.get_rng_state()
    second = modmap.fit([draw()], replace(SMALL, tokens=3), NOW)
    assert torch.equal(torch.random.get_rng_state(), before)
    other = modmap.fit([draw()], replace(SMALL, tokens=3), Context(1, CPU))
    assert torch.equal(first.losses, second.losses) and not torch.equal(first.losses, other.losses)
    assert_same_maps(modmap.score(first, draw(seed=1)), modmap.score(second, draw(seed=1)))


def test_a_diverging_loss_is_one_line():
    with pytest.raises(ReportedError, match="the loss became .* at step .*learning_rate"):
        modmap.fit([draw()], replace(SMALL, steps=30, learning_rate=1e38, initial_learning_rate=1e38), NOW)


# Memory


class Peak(TorchDispatchMode):
    """Largest number of bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.holders, self.live, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                place, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
                self.live += 0 if place in self.holders else size
                self.holders[place] = self.holders.get(place, 0) + 1
                self.peak = max(self.peak, self.live)
                weakref.finalize(tensor, self.forget, place, size)
        return result

    def forget(self, place, size):
        self.holders[place] -= 1
        if not self.holders[place]:
            del self.holders[place]
            self.live -= size


def test_peak_memory_counts_what_is_alive():
    with Peak() as peak:
        first = torch.zeros(1000)
        for _ in range(5):
            second = (torch.ones(2000) + first[:1]).view(2, 1000)
        del second
        torch.zeros(10)
    assert 4 * (1000 + 2000 * 2) <= peak.peak <= 4 * (1000 + 2000 * 3 + 1)
    assert peak.live == 4 * 1000


def test_memory_grows_with_the_number_of_views_and_not_with_its_square(monkeypatch):
    monkeypatch.setitem(modmap.ROWS, "cpu", 2048)
    peaks = {}
    for views in (4, 8, 16, 32):
        features = draw(views=views, grid=(16, 16), dims=(6, 6))
        head = modmap.fit([features], replace(SMALL, steps=1, ensemble=2), NOW)
        with Peak() as peak:
            modmap.score(head, features)
        peaks[views] = peak.peak
    features, maps = 16 * 16 * 12 * 4, 16 * 16 * 2 * 4  # bytes of one view
    assert peaks[32] - peaks[16] < 16 * (features + maps) + 4000  # and the codes of one block
    assert peaks[32] < 32 * features + 32 * 32 * maps / 4  # what all pairs at once would need is far above


# Fitted heads that are kept


def other_value(config, key):
    """Another value of a setting that works."""
    known = {
        "conditioning": "view", "image_to_depth": (8, 8), "depth_to_image": (8, 8), "modality": "image", "share": 0.5,
        "limit": 7, "warmup": 0.5, "initial_learning_rate": 2e-4, "sources": 2,
    }  # fmt: skip
    value, kind = getattr(config, key), get_type_hints(type(config))[key]
    if key in known:
        return known[key]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    if isinstance(value, bool):
        return not value
    return (value or 0) + 2 if kind in (int, int | None) else value / 2 or 0.5


@pytest.mark.parametrize("name", HEADS)
def test_only_settings_of_inference_and_nothing_else_are_served_by_the_same_fit(name, tmp_path):
    module, config = settings(name)
    training = [shown(draw())]
    head, fits = fitted_head(module, tmp_path, config, NOW, training)
    assert fits == 1 and module.INFERENCE <= vars(config).keys()
    maps, again = module.score(head, draw(seed=3)), [shown(draw())]
    loaded, fits = fitted_head(module, tmp_path, config, NOW, again)
    assert fits == 0
    assert_same_maps(module.score(loaded, draw(seed=3)), maps)
    for key in vars(config).keys() - {"weights"}:  # a file: has a test of its own
        # The modality of PatchCore decides what its bank holds.
        changed = replace(config, **{key: other_value(config, key)})
        found, fits = fitted_head(module, tmp_path, changed, NOW, training)
        assert fits == (key not in module.INFERENCE), key
        assert_same_maps(module.score(found, draw(seed=3)),
                         module.score(module.fit([draw()], changed, NOW), draw(seed=3)))  # fmt: skip
    others = {
        "seed": (1, training),
        "features": (0, [shown(draw(seed=1))]),
        "share": (0, [shown(replace(draw(), share=draw(seed=1).share))]),
        "samples": (0, [shown(draw()), shown(draw(), "more")]),
        "classes": (0, [shown(draw()), shown(of_class(draw(), 1), "more")]),
    }
    for key, (seed, other) in others.items():
        assert fitted_head(module, tmp_path, config, Context(seed, CPU), other)[1] == 1, key
    assert not list(tmp_path.glob("*.part"))


def test_one_process_fits_a_head_and_others_find_it(tmp_path, monkeypatch):
    training, fit = [shown(draw())], modmap.fit

    def watched(*arguments):
        with pytest.raises(Busy):
            fitted_head(modmap, tmp_path, SMALL, NOW, training, wait=False)
        return fit(*arguments)

    monkeypatch.setattr(modmap, "fit", watched)
    assert fitted_head(modmap, tmp_path, SMALL, NOW, training, wait=False)[1] == 1
    assert fitted_head(modmap, tmp_path, SMALL, NOW, training, wait=False)[1] == 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


def test_a_damaged_head_is_fitted_again(tmp_path, caplog):
    training = [shown(draw())]
    head, _ = fitted_head(modmap, tmp_path, SMALL, NOW, training)
    (path,) = tmp_path.glob("*.pt")
    whole = path.read_bytes()
    other = tmp_path / "other"
    fitted_head(modmap, other, SMALL, Context(1, CPU), training)
    (foreign,) = other.glob("*.pt")
    for content in (whole[:1000], b"", b"no head", foreign.read_bytes()):
        path.write_bytes(content)
        again, fits = fitted_head(modmap, tmp_path, SMALL, NOW, training)
        assert fits == 1 and f"{path} is damaged" in caplog.text
        assert_same_maps(modmap.score(again, draw(seed=1)), modmap.score(head, draw(seed=1)))
        assert fitted_head(modmap, tmp_path, SMALL, NOW, training)[1] == 0
        caplog.clear()


def test_a_folder_of_heads_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_text("")
    monkeypatch.setattr("os.fsync", full)
    for folder, reason in (("file", "File exists"), ("full", "No space left")):
        with pytest.raises(ReportedError, match=rf"{folder}/.*{reason}.*head\.cache names another folder") as error:
            fitted_head(modmap, tmp_path / folder, SMALL, NOW, [shown(draw())])
        assert error.value.exit_code == 1 and "\n" not in str(error.value)
    assert {path.suffix for path in (tmp_path / "full").iterdir()} <= {".lock"}


# PatchCore


def brute_force_coreset(points, count, first):
    chosen = [first]
    while len(chosen) < count:
        distances = [min(np.linalg.norm(point - points[at]) for at in chosen) for point in points]
        chosen.append(int(np.argmax(distances)))
    return chosen


def test_the_coreset_is_that_of_brute_force():
    for seed in range(20):
        points = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed)) + 3
        chosen = bank.greedy_coreset(points, 12, seed).tolist()
        assert chosen == brute_force_coreset(points.double().numpy(), 12, chosen[0])


def test_the_coreset_covers_and_never_repeats():
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)).repeat(3, 1)
    chosen = bank.greedy_coreset(points, 300, 0)
    assert len(set(chosen.tolist())) == 300
    assert bank.nearest_distance(points, points[chosen]).max() == 0  # 200 distinct points come before any twin
    assert bank.greedy_coreset(points, 900, 0).tolist() == list(range(600))


def test_the_projection_keeps_a_covering_coreset():
    points = torch.randn(400, 256, generator=torch.Generator().manual_seed(0))
    points[:, 4:] *= 0.01
    radius = {
        projection: torch.cdist(points, points[bank.greedy_coreset(points, 40, 0, projection)]).amin(1).max()
        for projection in (0, 64)
    }
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:40]
    assert radius[64] < 1.4 * radius[0] and radius[64] < torch.cdist(points, points[shuffled]).amin(1).max()


def test_distances_to_the_bank_equal_brute_force(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features, rows = torch.randn(50, 6, generator=generator) + 20, torch.randn(13, 6, generator=generator) + 20
    features[7] = rows[3]
    expected = np.linalg.norm(features.double().numpy()[:, None] - rows.double().numpy()[None], axis=2).min(1)
    for block in (1, 100, 2**24):
        monkeypatch.setattr(bank, "BLOCK", block)
        found = bank.nearest_distance(features, rows)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert found[7] == 0


@pytest.mark.parametrize("modality", ["image", "depth", "both"])
def test_patchcore_scores_its_training_cells_zero_and_never_keeps_the_background(modality):
    features = draw()
    head = patchcore.fit([features], PatchCoreConfig(modality, share=1.0), NOW)
    shown = features.share > 0
    assert len(head.bank) == shown.sum()
    (maps,) = patchcore.score(head, features).values()
    assert (maps[shown] == 0).all() and (maps[~shown] > 0).all()


@pytest.mark.parametrize("modality", ["image", "both"])
def test_a_view_left_out_is_compared_with_what_others_have_in_the_bank(modality):
    features = draw()
    head = patchcore.fit([features], PatchCoreConfig(modality, share=0.5), NOW)
    found = patchcore.itself(head, features)[modality]
    cells = bank.joined(features.image, features.depth, head.scales, modality)
    kept = (cells[..., None, :] == head.bank).all(-1).any(-1).numpy()
    cells, shown = cells.double().numpy(), (features.share > 0).numpy()
    assert kept.sum() == len(head.bank) < shown.sum()
    for view, row, column in np.ndindex(*shown.shape):
        expected = 0.0
        if shown[view, row, column]:
            expected = min(
                np.linalg.norm(cells[view, row, column] - cells[other])
                for other in np.ndindex(*shown.shape)
                if kept[other] and other[0] != view
            )
        assert float(found[view, row, column]) == pytest.approx(expected, rel=1e-5)


def test_patchcore_of_both_weighs_modalities_alike():
    features = draw()
    loud = replace(features, depth=features.depth * 1000)
    config = PatchCoreConfig("both", share=0.5)
    quiet, noisy = (patchcore.score(patchcore.fit([one], config, NOW), one)["both"] for one in (features, loud))
    torch.testing.assert_close(quiet, noisy, atol=1e-4, rtol=1e-4)


def test_the_bank_is_bounded():
    samples = [draw(seed=seed) for seed in range(4)]
    sizes = [len(patchcore.fit(samples, PatchCoreConfig(share=share, limit=limit), NOW).bank)
             for share, limit in ((0.25, 1000), (1.0, 17), (1.0, 10**6))]  # fmt: skip
    count = sum(int((sample.share > 0).sum()) for sample in samples)
    assert sizes == [math.ceil(count / 4), 17, count]


# What every head must do


@pytest.mark.parametrize("name", HEADS)
def test_a_head_gives_maps_and_survives_its_state(name):
    module, config = settings(name)
    head = module.fit([draw()], config, NOW)
    features = draw(seed=3)
    maps = module.score(head, features)
    for values in maps.values():
        assert values.shape == features.share.shape and values.dtype == torch.float32 and values.isfinite().all()
        assert (values >= 0).all() and not values.requires_grad
    file = io.BytesIO()
    torch.save(head.state(), file)
    file.seek(0)
    back = module.from_state(torch.load(file, weights_only=True), CPU)
    assert_same_maps(module.score(back, features), maps)
    assert_same_maps(module.score(module.fit([draw()], config, NOW), features), maps)
    with pytest.raises(DataError, match=f"not the state of a {name} head") as error:
        module.from_state({key: value for key, value in head.state().items() if key != "dims"}, CPU)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["modmap", "patchcore"])
def test_a_head_takes_several_classes_and_another_grid_at_inference(name):
    module, config = settings(name)
    head = module.fit([draw(views=3), of_class(draw(views=2, seed=1), 1)], config, NOW)
    maps = module.score(head, of_class(draw(views=2, grid=(5, 6), seed=2), 1))
    assert all(values.shape == (2, 5, 6) for values in maps.values())


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("part", ["image", "depth", "share"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_one_line(name, part, value):
    module, config = settings(name)
    broken = draw()
    getattr(broken, part)[1, 0, 0] = value
    head = module.fit([draw()], config, NOW)
    for call in (lambda: module.fit([draw(), broken], config, NOW), lambda: module.score(head, broken)):
        with pytest.raises(DataError, match=f"{part}.* of view 1 hold NaN") as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", HEADS)
def test_features_that_do_not_fit_are_one_line(name):
    module, config = settings(name)
    head = module.fit([draw()], config, NOW)
    good, empty = draw(), draw(background=2.0)
    for broken, message in (
        (draw(dims=(7, 6)), "7 image and 6 depth channels"),
        (replace(good, depth=good.depth[:2]), "must agree in views"),
        (replace(good, share=good.share[:, :2]), "must agree in views"),
        (replace(good, image=good.image[0]), "must agree in views"),
        (SampleFeatures(*(part[:0] for part in parts(good))), "no view"),
    ):
        for call in (
            lambda b=broken: module.fit([good, b], config, NOW),
            lambda b=broken: module.score(head, b),
        ):
            with pytest.raises(DataError, match=message) as error:
                call()
            assert "\n" not in str(error.value)
    for samples in ([], [empty]):
        with pytest.raises(DataError, match="no training sample|shows? (an|the) object|0 training samples"):
            module.fit(samples, config, NOW)


def test_a_modality_that_was_not_encoded_is_missed_by_the_heads_that_need_it():
    image, depth = draw(dims=(7, 0)), draw(dims=(0, 5))
    for one in (image, depth):
        with pytest.raises(ConfigError, match="modmap .* both"):
            modmap.fit([one], SMALL, NOW)
    for modality, one, other in (("image", image, depth), ("depth", depth, image)):
        maps = patchcore.score(patchcore.fit([one], PatchCoreConfig(modality), NOW), one)
        assert maps[modality].shape == one.share.shape
        for wrong in (modality, "both"):
            with pytest.raises(ConfigError, match=f"patchcore.modality {wrong}"):
                patchcore.fit([other], PatchCoreConfig(wrong), NOW)


def test_numbers_of_views_that_differ_are_one_line():
    head = modmap.fit([draw(views=3)], SMALL, NOW)
    with pytest.raises(DataError, match="4 views, the head was fitted on 3"):
        modmap.score(head, draw(views=4))
    with pytest.raises(DataError, match="class index 1, the head was fitted on 1"):
        modmap.score(head, of_class(draw(views=3), 1))
    with pytest.raises(DataError, match="sample 1 has 2 views, class 0 has 3"):
        modmap.fit([draw(views=3), draw(views=2)], SMALL, NOW)
    with pytest.raises(DataError, match=r"sample 1 has a grid of \(2, 4\), the first of \(3, 4\)"):
        modmap.fit([draw(), draw(grid=(2, 4))], SMALL, NOW)
    with pytest.raises(DataError, match=r"class indices must be 0 to C - 1"):
        modmap.fit([of_class(draw(), 1)], SMALL, NOW)
    hidden = draw()
    hidden.share[2] = 0
    with pytest.raises(DataError, match="sample 1: no cell of view 2 shows the object"):
        modmap.fit([draw(), hidden], SMALL, NOW)


@pytest.mark.parametrize(
    "change",
    [
        {"modulator": 0}, {"epochs": 0}, {"steps": 0}, {"pairs": 0}, {"tokens": 0}, {"ensemble": 0}, {"sources": 0},
        {"warmup": 1.5}, {"learning_rate": 0.0}, {"initial_learning_rate": 1.0}, {"image_to_depth": (0, 2)},
        {"sources": 2, "conditioning": "view"}, {"view_shift": 1, "conditioning": "none"},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_name_their_key(change):
    state = modmap.fit([draw()], SMALL, NOW).state()
    for call in (
        lambda: modmap.fit([draw()], replace(SMALL, **change), NOW),
        lambda: modmap.from_state(state | {"config": state["config"] | change}, CPU),
    ):
        with pytest.raises(ConfigError, match=f"modmap.*{next(iter(change))}"):
            call()


def test_more_sources_than_views_are_refused():
    head = modmap.fit([draw()], replace(SMALL, sources=4), NOW)
    with pytest.raises(ConfigError, match="modmap.sources 4 exceeds the 3 views"):
        modmap.score(head, draw())


def test_settings_of_patchcore_that_cannot_work_are_refused():
    for change in ({"share": 0.0}, {"share": 1.5}, {"limit": 0}, {"projection": -1}):
        with pytest.raises(ConfigError, match=f"patchcore.*{next(iter(change))}"):
            patchcore.fit([draw()], PatchCoreConfig(**change), NOW)


def test_the_settings_can_be_written_on_a_command_line():
    words = ["--conditioning", "view", "--sources", "5", "--tokens", "64", "--image_to_depth", "[16,8]"]
    config = parse(ModMapConfig, words, "test")
    assert (config.conditioning, config.sources, config.tokens) == ("view", 5, 64)
    assert list(config.image_to_depth) == [16, 8]
    assert parse(ModMapConfig, [], "test").sources == "all" and parse(PatchCoreConfig, [], "test").modality == "both"


# Template


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("reach", [0, 1])
def test_a_template_is_the_nearest_of_the_same_places_in_float64(distance, reach):
    train, tested = [draw(), draw(seed=1)], draw(seed=2)
    head = template.fit(train, template.Config(distance=distance, reach=reach), NOW)
    maps = template.score(head, tested)
    for modality in ("image", "depth"):
        kept = [getattr(part, modality).double().numpy() for part in train]
        shown = np.concatenate([part[one.share.numpy() > 0] for part, one in zip(kept, train, strict=True)])
        spread = math.sqrt(((shown - shown.mean(0)) ** 2).sum(1).mean())
        given = getattr(tested, modality).double().numpy()
        for place in np.ndindex(given.shape[:3]):
            view, row, column = place
            found = []
            for part in kept:
                for down in range(max(row - reach, 0), min(row + reach + 1, given.shape[1])):
                    for across in range(max(column - reach, 0), min(column + reach + 1, given.shape[2])):
                        one, other = given[place], part[view, down, across]
                        lengths = np.linalg.norm(one) * np.linalg.norm(other)
                        both = np.linalg.norm(one - other) / spread, 1 - one @ other / lengths
                        found.append(both[distance == "cosine"])
            assert float(maps[modality][place]) == pytest.approx(min(found), rel=1e-5, abs=1e-6)


def test_a_template_scores_its_training_instances_zero():
    head = template.fit([draw(), draw(seed=1)], template.Config(), NOW)
    assert not any(part.any() for part in template.score(head, draw(seed=1)).values())


# A fit that is killed


def test_a_fit_that_was_killed_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "EVERY_SECONDS", 0.0)
    config = replace(SMALL, steps=9, tokens=3, pairs=4)
    whole = modmap.fit([draw()], config, NOW)
    real, steps = modmap.one_cycle, []

    def killed(step, *rest):
        steps.append(step)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return real(step, *rest)

    monkeypatch.setattr(modmap, "one_cycle", killed)
    with pytest.raises(KeyboardInterrupt):
        fitted_head(modmap, tmp_path, config, NOW, [shown(draw())])
    assert len(list(tmp_path.glob("*.member0"))) == 1
    head, fits = fitted_head(modmap, tmp_path, config, NOW, [shown(draw())])
    assert fits == 1 and steps == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert torch.equal(head.losses, whole.losses)
    assert_same_maps(modmap.score(head, draw(seed=3)), modmap.score(whole, draw(seed=3)))
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]


def test_a_damaged_checkpoint_of_a_fit_is_left_aside(tmp_path, caplog):
    path = tmp_path / "state"
    path.write_bytes(b"no state")
    assert resume.Keeper(path).restore() is None and "state is damaged" in caplog.text
