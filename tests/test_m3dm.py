"""M3DM: banks, statistics, the learned sum and the fusion's loss against slow transcriptions."""

import math

import numpy as np
import pytest
import torch

from dino_depth.anomaly import resume
from dino_depth.anomaly.bank import reweighted
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.features import SampleFeatures
from dino_depth.anomaly.heads import Context, Facts, m3dm
from dino_depth.anomaly.heads.m3dm import fusion as fusing
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError, ReportedError

NOW = Context(0, torch.device("cpu"))


def draw(views=3, grid=(6, 6), dims=(7, 5), seed=0, background=0.3):
    generator = torch.Generator().manual_seed(seed)
    image, depth = (torch.randn(views, *grid, dim, generator=generator) * dim + 1 for dim in dims)
    share = torch.rand(views, *grid, generator=generator)
    return SampleFeatures(image, depth, share * (share >= background))


def nearest(cell, bank):
    return min(math.dist(cell.tolist(), row.tolist()) for row in bank)


def test_the_map_is_the_weighted_sum_of_the_distances_from_each_bank():
    train, tested = draw(), draw(seed=1)
    head = m3dm.fit([train], m3dm.Config(share=0.3), NOW)
    (maps,) = m3dm.score(head, tested).values()
    image = train.image[train.share > 0].double()
    depth = train.depth[train.share > 0].double()
    scales = float(image.std(correction=0)), float(depth.std(correction=0))
    assert len(head.banks["image"]) == len(head.banks["depth"]) == math.ceil(0.3 * len(image))
    for bank, cells, scale in ((head.banks["image"], image, scales[0]), (head.banks["depth"], depth, scales[1])):
        assert torch.cdist(bank.double(), cells / scale).amin(1).max() < 1e-5
    for place in ((0, 0, 0), (1, 3, 4), (2, 5, 5)):
        parts = [
            1.0 * nearest(tested.depth[place] / scales[1], head.banks["depth"]),
            0.1 * nearest(tested.image[place] / scales[0], head.banks["image"]),
        ]
        assert float(maps[place]) == pytest.approx(float(np.dot(parts, head.weights[0].numpy())), rel=1e-4)


def test_statistics_are_each_ones_own_or_as_published_the_images():
    train = draw()
    image, depth = (part[train.share > 0] for part in (train.image, train.depth))
    own, official = (m3dm.fit([train], m3dm.Config(statistics=name), NOW).scales for name in ("own", "official"))
    assert own["image"] == pytest.approx(np.std(image.numpy()), rel=1e-5)
    assert own["depth"] == pytest.approx(np.std(depth.numpy()), rel=1e-5)
    assert official == {"image": own["image"], "depth": own["image"]}


def test_the_learned_weights_are_scikit_learns():
    from sklearn.linear_model import SGDOneClassSVM

    random = np.random.default_rng(0)
    rows = random.gamma(2, 1, (400, 3))
    machine = SGDOneClassSVM(nu=0.5, max_iter=1000, random_state=5).fit(rows)
    found = m3dm.one_class_weights(torch.from_numpy(rows), 5)
    np.testing.assert_allclose(rows @ found.double().numpy(), machine.score_samples(rows), rtol=1e-5)
    assert (found >= 0).all() and found.max() > 0
    for none in (torch.zeros(5, 2), torch.full((5, 2), math.nan)):
        with pytest.raises(ReportedError, match="keep a smaller share"):
            m3dm.one_class_weights(none, 0)


def test_training_cells_are_compared_with_other_views_if_asked_for():
    train = [draw(views=2), draw(views=2, seed=1)]
    cells = torch.cat([one.image[one.share > 0] for one in train])
    view = torch.cat([m3dm._view_numbers(one) + 2 * at for at, one in enumerate(train)])
    kept = torch.arange(0, len(cells), 4)
    bank, places = cells[kept], torch.arange(len(cells))
    plain = m3dm._training_distances(cells, bank, view, view[kept], places, False)
    apart = m3dm._training_distances(cells, bank, view, view[kept], places, True)
    assert (plain[kept] == 0).all() and (apart > 0).all() and (apart >= plain).all()
    for at in (0, 5, len(cells) - 1):
        others = [row for row, number in zip(bank, view[kept], strict=True) if number != view[at]]
        assert float(apart[at]) == pytest.approx(nearest(cells[at], others), rel=1e-4)
    alone = m3dm._training_distances(cells, bank, view, torch.zeros_like(kept), places, True)
    assert alone[view == 0].isnan().all() and alone[view > 0].isfinite().all()
    every = m3dm.fit(train, m3dm.Config(share=1.0, leave_out=True), NOW)
    assert (every.weights[0] > 0).all()


def test_the_fusions_loss_is_that_of_a_double_loop():
    torch.manual_seed(0)
    network = fusing.Fusion((6, 4)).double()
    image, depth = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    one, other = network.image_head(network.image(image)), network.depth_head(network.depth(depth))
    total = 0.0
    for row in range(5):
        logits = []
        for column in range(5):
            cosine = (one[row] * other[column]).sum() / one[row].norm() / other[column].norm()
            logits.append(float(cosine.detach()))
        total -= math.log(math.exp(logits[row]) / sum(math.exp(value) for value in logits))
    assert float(fusing.contrastive_loss(network, image, depth).detach()) == pytest.approx(2 * total / 5)


def test_the_fused_features_are_depths_beside_images_and_are_learned():
    torch.manual_seed(0)
    network = fusing.Fusion((6, 4))
    image, depth = torch.randn(5, 6), torch.randn(5, 4)
    fused = network(image, depth)
    assert torch.equal(fused[:, :4], network.depth(depth)) and torch.equal(fused[:, 4:], network.image(image))
    shared = torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
    image, depth = shared @ torch.randn(3, 6), shared @ torch.randn(3, 4)
    losses = [
        float(fusing.contrastive_loss(fusing.train_fusion(image, depth, steps, 100, NOW), image, depth).detach())
        for steps in (1, 60)
    ]
    assert losses[1] < losses[0] - 0.2


def test_the_background_teaches_the_fusion_nothing():
    train = draw()
    seen = train.share[..., None] > 0
    loud = SampleFeatures(torch.where(seen, train.image, 1e4), torch.where(seen, train.depth, -1e4), train.share)
    config = m3dm.Config(fusion=True, fusion_steps=3)
    heads = [m3dm.fit([one], config, NOW) for one in (train, loud)]
    assert heads[0].banks["fusion"].shape[1] == 12 and list(heads[0].banks) == ["depth", "image", "fusion"]
    for name in heads[0].banks:
        assert torch.equal(heads[0].banks[name], heads[1].banks[name])


def test_a_fusion_that_was_killed_ends_in_the_same_bits(tmp_path, monkeypatch):
    config = m3dm.Config(fusion=True, fusion_steps=5, fusion_patches=20)
    whole = m3dm.fit([draw()], config, NOW)
    monkeypatch.setattr(resume, "EVERY_SECONDS", 0)
    kept, calls, loss = Context(0, NOW.device, tmp_path / "state"), [], fusing.contrastive_loss

    def killed(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return loss(*arguments)

    monkeypatch.setattr(fusing, "contrastive_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        m3dm.fit([draw()], config, kept)
    monkeypatch.setattr(fusing, "contrastive_loss", lambda *arguments: (calls.append(1), loss(*arguments))[1])
    again = m3dm.fit([draw()], config, kept)
    assert len(calls) == 5
    assert torch.equal(m3dm.score(again, draw(seed=2))["both"], m3dm.score(whole, draw(seed=2))["both"])


def test_an_instance_is_the_weighted_sum_of_reweighted_maxima():
    train = [draw(views=1, seed=seed) for seed in range(5)]
    head = m3dm.fit(train, m3dm.Config(reweight=3), NOW)
    tested = draw(views=1, seed=9)
    maps = m3dm.score(head, tested)
    total = 0.0
    for place, (name, weight) in enumerate((("depth", 1.0), ("image", 0.1))):
        features = getattr(tested, name) / head.scales[name]
        cells = features[tested.share > 0]
        highest = max(cells, key=lambda cell, name=name: nearest(cell, head.banks[name]))
        total += float(head.weights[1][place]) * weight * reweighted(highest, head.banks[name], 3, 1000.0, own=False)
    assert m3dm.instance(head, tested, maps) == pytest.approx(total, rel=1e-3)
    plain = m3dm.fit(train, m3dm.Config(), NOW)
    assert m3dm.instance(plain, tested, maps) is None


def test_what_cannot_work_is_said(monkeypatch):
    facts = Facts(frozenset({"image", "depth"}), 1, False, 1)
    m3dm.check(m3dm.Config(), facts)
    with pytest.raises(ConfigError, match="leave_out needs two training views"):
        m3dm.check(m3dm.Config(leave_out=True), facts)
    for change in ({"share": 0.0}, {"share": 1.0}, {"limit": 0}, {"rows": 0}, {"reweight": 1}, {"fusion_steps": 0}):
        with pytest.raises(ConfigError, match=f"m3dm.{next(iter(change))}"):
            m3dm.fit([draw()], m3dm.Config(**change), NOW)
    with pytest.raises(ConfigError, match="both modalities, got 7 image and 0 depth"):
        m3dm.fit([draw(dims=(7, 0))], m3dm.Config(), NOW)
    with pytest.raises(DataError, match="shows an object"):
        m3dm.fit([draw(background=2.0)], m3dm.Config(), NOW)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dino-depth\[baselines\]'"):
        m3dm.check(m3dm.Config(), facts)


@pytest.mark.parametrize("data", ["sim3d", "mvtec3d", "eyecandies"])
def test_each_benchmark_has_a_configuration(data):
    config = parse(EvaluateConfig, ["--config", f"{data}_m3dm"], "test")
    assert (config.head.name, config.data.name) == ("m3dm", data)
    assert bool(config.head.m3dm.reweight) == (data != "sim3d")
