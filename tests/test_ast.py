"""AST: the flow's inverse and Jacobian in float64, losses against loops, sizes as published, resuming."""

import math

import numpy as np
import pytest
import timm
import torch

from dino_depth.anomaly import resume
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.features import SampleFeatures
from dino_depth.anomaly.heads import Context, Facts, ast
from dino_depth.anomaly.heads.ast.networks import CLAMP, Flow, Student, position_code
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError, ReportedError
from dino_depth.frozen import load_frozen

NOW = Context(0, torch.device("cpu"))
SMALL = ast.Config(steps=4, teacher=6, student=8)


def draw(views=3, grid=(5, 6), dims=(5, 4), seed=0, background=0.3):
    generator = torch.Generator().manual_seed(seed)
    image, depth = (torch.randn(views, *grid, dim, generator=generator) for dim in dims)
    share = torch.rand(views, *grid, generator=generator)
    return SampleFeatures(image, depth, share * (share >= background))


def moved(channels=7, seed=0):
    """A flow in float64 whose couplings have left the identity by far."""
    torch.manual_seed(seed)
    flow = Flow(channels, 6).double()
    with torch.no_grad():
        for coupling in flow.couplings:
            coupling.of_first.gamma += 1.3
            coupling.of_second.gamma -= 0.7
    return flow


def test_networks_are_as_large_as_published():
    with torch.device("meta"):
        sizes = [
            sum(part.numel() for part in network.parameters())
            for network in (Flow(304, 64), Flow(368, 64), Student(304, 1024), Student(368, 1024))
        ]
    assert [round(size / 1e6, 2) for size in sizes[:2]] == [3.25, 3.89]
    assert [round(size / 1e6, 1) for size in sizes[2:]] == [81.4, 82.6]


@pytest.mark.parametrize("channels", [6, 7])
def test_the_flow_is_undone_by_its_inverse(channels):
    flow = moved(channels)
    features = torch.randn(2, channels, 4, 5, dtype=torch.float64) * 3
    z, _ = flow(features)
    assert (z - features).abs().max() > 0.5
    torch.testing.assert_close(flow.inverse(z), features, atol=1e-12, rtol=1e-12)


def test_the_log_determinants_of_the_cells_sum_to_the_jacobians():
    flow = moved(4)
    features = torch.randn(1, 4, 3, 2, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x)[0].flatten(), features).flatten(1)
    sign, expected = torch.linalg.slogdet(jacobian)
    _, found = flow(features)
    assert found.shape == (1, 3, 2) and abs(float(sign)) == 1
    torch.testing.assert_close(found.sum(), expected, atol=1e-12, rtol=1e-12)


def test_an_untrained_flow_only_permutes():
    flow = Flow(9, 4)
    features = torch.randn(2, 9, 3, 3)
    z, log_det = flow(features)
    assert (log_det == 0).all() and torch.equal(z.sort(1).values, features.sort(1).values)
    assert not torch.equal(z, features)


def test_a_coupling_is_its_formulas():
    """One block by hand: split, convolutions with a replicated border, the clamped scale."""
    coupling = moved(5).couplings[0]
    x, code = torch.randn(1, 5, 3, 3, dtype=torch.float64), position_code(3, 3, torch.zeros(0, dtype=torch.float64))

    def subnet(net, half):
        hidden = torch.cat([half, code], 1)
        for place, layer in enumerate((net.first, net.second)):
            padded = torch.nn.functional.pad(hidden, (1, 1, 1, 1), mode="replicate")
            hidden = torch.nn.functional.conv2d(padded, layer.weight, layer.bias)
            hidden = hidden.clamp_min(0) if place == 0 else hidden
        scale, shift = (hidden * net.gamma).chunk(2, 1)
        return 1.9 * 0.636 * torch.atan(scale / 1.9), shift

    scale, shift = subnet(coupling.of_first, x[:, 2:])
    first = torch.exp(scale) * x[:, :2] + shift
    other, moved_by = subnet(coupling.of_second, first)
    second = torch.exp(other) * x[:, 2:] + moved_by
    found, log_det = coupling(x, code)
    torch.testing.assert_close(found, torch.cat([first, second], 1))
    torch.testing.assert_close(log_det, scale.sum(1) + other.sum(1))
    assert scale.abs().max() < CLAMP


def test_positions_are_sines_of_column_and_row():
    code = position_code(4, 6, torch.zeros(0, dtype=torch.float64))[0]
    for channel in range(16):
        rate = 10_000 ** (-(channel // 2 * 2) / 16)
        wave = math.sin if channel % 2 == 0 else math.cos
        assert code[channel, 3, 5] == pytest.approx(wave(5 * rate))
        assert code[16 + channel, 3, 5] == pytest.approx(wave(3 * rate))
    assert len({tuple(cell) for cell in code.flatten(1).T.tolist()}) == 24


def test_losses_are_means_over_the_objects_cells():
    flow, student = moved(5), Student(5, 4).double().eval()
    features, shown = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.rand(2, 3, 4) > 0.4
    with torch.no_grad():
        (z, log_det), made = flow(features), student(features)
    likelihood, squares = [], []
    for view, row, column in shown.nonzero().tolist():
        likelihood.append(sum(float(part) ** 2 for part in z[view, :, row, column]) / 2 - log_det[view, row, column])
        pairs = zip(z[view, :, row, column], made[view, :, row, column], strict=True)
        squares.append(sum(float(one - other) ** 2 for one, other in pairs) / 5)
    assert float(ast.teacher_loss(z, log_det, shown)) == pytest.approx(float(sum(likelihood)) / len(likelihood))
    assert float(ast.student_loss(flow, student, features, shown)) == pytest.approx(sum(squares) / len(squares))
    hidden = torch.where(shown[:, None], features, features + 100)
    other = flow(hidden)
    assert float(ast.teacher_loss(z, log_det, shown)) != pytest.approx(float(ast.teacher_loss(*other, shown | True)))


def test_a_step_takes_every_view_once_in_an_epoch():
    for rows, batch in ((12, 8), (12, 5), (3, 8), (8, 8)):
        count = rows // min(batch, rows)
        for epoch in range(3):
            taken = torch.cat([ast.batch_rows(rows, batch, epoch * count + at, (0, 1)) for at in range(count)])
            assert len(set(taken.tolist())) == len(taken) == count * min(batch, rows)
    orders = {tuple(ast.batch_rows(12, 12, step, (0, 1)).tolist()) for step in range(3)}
    assert len(orders) == 3


def test_training_learns_and_the_score_is_the_squared_difference():
    features = draw(views=6)
    config = ast.Config(steps=60, teacher=8, student=8, learning_rate=2e-3)
    head = ast.fit([features], config, NOW)
    # The flow's first and last losses: what it learns is the likelihood of normal features.
    assert (head.losses[:, -5:].mean(1) < head.losses[:, :5].mean(1) - 0.05).all()
    maps = ast.score(head, features)["both"]
    given = torch.cat([features.image, features.depth], -1).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = (head.teacher(given)[0] - head.student(given)).square().mean(1)
    torch.testing.assert_close(maps, expected)
    odd = SampleFeatures(features.image.clone(), features.depth, features.share)
    odd.image[2, 3, 3] = 8
    found = ast.score(head, odd)["both"][2, 3, 3]
    assert found > 5 * maps[2, 3, 3] and found > 20 * maps[features.share > 0].median()


def test_a_fit_that_was_killed_ends_in_the_same_bits(tmp_path, monkeypatch):
    features, whole = draw(), ast.fit([draw()], SMALL, NOW)
    monkeypatch.setattr(resume, "EVERY_SECONDS", 0)
    original = ast.batch_rows
    for place in (2, 4, 6):  # in the teacher, at the student's first step, in the student
        kept, calls = Context(0, NOW.device, tmp_path / f"state{place}"), []

        def killed(*arguments, calls=calls, place=place):
            if len(calls) == place:
                raise KeyboardInterrupt
            calls.append(1)
            return original(*arguments)

        monkeypatch.setattr(ast, "batch_rows", killed)
        with pytest.raises(KeyboardInterrupt):
            ast.fit([features], SMALL, kept)
        monkeypatch.setattr(
            ast, "batch_rows", lambda *arguments, calls=calls: (calls.append(1), original(*arguments))[1]
        )
        again = ast.fit([features], SMALL, kept)
        assert len(calls) == 2 * SMALL.steps
        assert torch.equal(ast.score(again, draw(seed=3))["both"], ast.score(whole, draw(seed=3))["both"])
        assert torch.equal(again.losses, whole.losses)


def test_one_modality_alone_and_several_samples_of_single_views():
    samples = [draw(views=1, seed=seed) for seed in range(4)]
    for modality, channels in (("image", 5), ("depth", 4)):
        head = ast.fit(samples, ast.Config(modality, steps=2, teacher=4, student=4), NOW)
        assert head.student.layers[-1].out_channels == channels and list(ast.score(head, samples[0])) == [modality]
    assert ast.needs(ast.Config("image")) == {"image"}


def test_what_cannot_work_is_said():
    ast.check(SMALL, Facts(frozenset({"image", "depth"}), 12, True, 1))
    with pytest.raises(ConfigError, match="ast needs two training views"):
        ast.check(SMALL, Facts(frozenset({"image", "depth"}), 1, False, 1))
    for change in ({"steps": 0}, {"batch": 0}, {"student": 0}, {"learning_rate": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ConfigError, match=f"ast.*{next(iter(change))}"):
            ast.fit([draw()], ast.Config(**change), NOW)
    with pytest.raises(ConfigError, match="ast.modality both: got 5 image and 0 depth"):
        ast.fit([draw(dims=(5, 0))], SMALL, NOW)
    with pytest.raises(DataError, match="differ in their grids"):
        ast.fit([draw(), draw(grid=(4, 4))], SMALL, NOW)
    with pytest.raises(ReportedError, match="the teacher's loss became .* lower ast.learning_rate"):
        ast.fit([draw()], ast.Config(steps=40, teacher=4, student=4, learning_rate=1e30), NOW)


@pytest.mark.parametrize("data", ["sim3d", "mvtec3d", "eyecandies"])
def test_each_benchmark_has_a_configuration_on_one_grid(data):
    config = parse(EvaluateConfig, ["--config", f"{data}_ast"], "test")
    assert (config.head.name, config.data.name) == ("ast", data)
    assert config.encoder.size // 32 == config.encoder.depth_size // 8 == 24


def test_the_papers_layer_of_efficientnet():
    """Its block 35, counted from 0: the last of stage 5, 304 channels at a stride of 32."""
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_b5")
        assert sum(len(stage) for stage in model.blocks[:6]) == 36
    encoder = load_frozen("random:timm:tf_efficientnet_lite0?blocks=6", modality="image")
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    batch = encoder.prepare(picture, 64)[None]
    features = encoder.encode(batch)
    assert features.shape == (1, 2, 2, 192) and encoder.patch_size == 32 and encoder.dim == 192
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    with torch.no_grad():
        expected = model.bn1(model.conv_stem(batch))
        for stage in model.blocks[:6]:
            expected = stage(expected)
    torch.testing.assert_close(features, expected.permute(0, 2, 3, 1))
    for wrong, message in (("resnet18?blocks=3", "blocks"), ("tf_efficientnet_lite0?blocks=9", "1 to 7, got 9")):
        with pytest.raises(ConfigError, match=message):
            load_frozen(f"random:timm:{wrong}", modality="image")
