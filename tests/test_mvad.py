"""MVAD: its selection against plain attention, its network, and the head on one training instance."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from anomaly_run import make_sample

from dino_depth.anomaly import resume
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads import Context, Facts, mvad
from dino_depth.anomaly.heads.mvad import Config
from dino_depth.anomaly.heads.mvad.network import Network, multi_view_selection, position_code
from dino_depth.anomaly.views import Views
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError
from dino_depth.frozen import load_frozen

NOW = Context(0, torch.device("cpu"))
QUICK = Config(steps=3, windows=(4, 2, 2), blocks=(1, 1, 1), chosen=2)


def maps(views=3, dim=8, rows=6, seed=0):
    return torch.randn(views, dim, rows, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_window_is_attention_over_all_pixels_of_all_other_views():
    query, keys = maps(), maps(seed=1)
    found = multi_view_selection(query, keys, windows=1, chosen=2, heads=1)
    for view in range(3):
        near = torch.cat([keys[other].flatten(1).T for other in range(3) if other != view])
        logits = query[view].flatten(1).T @ near.T / math.sqrt(8)
        expected = (logits.softmax(1) @ near).T.view(8, 6, 6)
        torch.testing.assert_close(found[view], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("rows", "windows"), [(6, 3), (7, 3)])
def test_windows_are_chosen_by_their_means(rows, windows):
    query, keys = maps(rows=rows), maps(rows=rows, seed=1)
    side = math.ceil(rows / windows)
    pad = side * windows - rows

    def cut(part):
        part = F.pad(part, (0, pad, 0, pad))
        return {(r, c): part[:, r * side : (r + 1) * side, c * side : (c + 1) * side].flatten(1).T
                for r in range(windows) for c in range(windows)}  # fmt: skip

    found = F.pad(multi_view_selection(query, keys, windows, 2, 2), (0, pad, 0, pad))
    for view in range(3):
        candidates = [part for other in range(3) if other != view for part in cut(keys[other]).values()]
        for (r, c), asked in cut(query[view]).items():
            scores = [float(asked.mean(0) @ part.mean(0)) for part in candidates]
            near = torch.cat([candidates[at] for at in np.argsort(scores)[::-1][:2].copy()])
            expected = torch.cat(
                [(asked[:, h] @ near[:, h].T / math.sqrt(8)).softmax(1) @ near[:, h] for h in (slice(4), slice(4, 8))],
                1,
            )
            got = found[view][:, r * side : (r + 1) * side, c * side : (c + 1) * side].flatten(1).T
            inside = torch.ones(rows, rows)
            inside = F.pad(inside, (0, pad, 0, pad))[r * side : (r + 1) * side, c * side : (c + 1) * side].flatten() > 0
            torch.testing.assert_close(got[inside], expected[inside], atol=1e-12, rtol=0)


def test_the_order_of_the_other_views_does_not_matter():
    query, keys = maps(views=4), maps(views=4, seed=1)
    found = multi_view_selection(query, keys, 3, 3, 2)
    order = [0, 3, 1, 2]
    moved = multi_view_selection(query[order], keys[order], 3, 3, 2)
    torch.testing.assert_close(moved[0], found[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(moved, found[order], atol=1e-12, rtol=0)


def test_windows_of_one_pixel_return_a_view_that_others_repeat():
    one = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    view = one.view(1, 16, 4, 4)
    assert torch.allclose(multi_view_selection(view.repeat(2, 1, 1, 1), view.repeat(2, 1, 1, 1), 4, 1, 1)[0], view[0])


def test_masked_filling_differs_only_where_windows_do_not_divide_the_grid():
    for rows, same in ((6, True), (7, False)):
        query, keys = maps(rows=rows), maps(rows=rows, seed=1)
        found = [multi_view_selection(query, keys, 3, 2, 2, masked) for masked in (False, True)]
        assert torch.allclose(*found) is same and found[1].isfinite().all()


def test_the_choice_of_windows_has_no_gradient_and_the_query_has():
    query, keys = maps().requires_grad_(), maps(seed=1)
    multi_view_selection(query, keys, 3, 2, 2).square().sum().backward()
    assert query.grad.any() and not keys.requires_grad


def test_places_have_codes_of_their_own():
    code = position_code(8, 12).flatten(1).T  # (cells, dim)
    assert code.abs().max() <= 1 and torch.cdist(code, code).fill_diagonal_(9).min() > 1e-3


def test_the_network_has_the_public_codes_shapes_and_nearly_its_parameters():
    network = Network((64, 128, 256), (1, 2, 4), (14, 9, 6), 4, 8, False).eval()
    teacher = [torch.randn(2, dim, rows, rows) for dim, rows in ((64, 64), (128, 32), (256, 16))]
    with torch.inference_mode():
        student = network(teacher)
    assert [part.shape for part in student] == [part.shape for part in teacher]
    count = sum(part.numel() for part in network.parameters())
    assert count == 9_632_448 and abs(count / 10.23e6 - 1) < 0.06  # 18.404 M less the teacher's 8.17 M


def views(seed=0, bad=False, count=4, modality="image", layers="1-2-3", size=64):
    encoder = load_frozen(f"random:timm:resnet18?layers={layers}", modality=modality)
    pair = (encoder, None) if modality == "image" else (None, encoder)
    store = FeatureStore(*pair, size, object_pixels=ForegroundConfig("valid"))
    return Views(make_sample(f"{seed:02d}", count, bad, seed, 96, 96), store)


@pytest.mark.parametrize("modality", ["image", "depth"])
def test_one_training_instance_is_enough(modality):
    config = replace(QUICK, steps=8, modality=modality)
    train = views(modality=modality)
    head = mvad.fit([train], config, NOW)
    assert len(head.losses) == 8 and head.losses[-1] < 0.7 * head.losses[0]
    found = mvad.score(head, views(5, modality=modality))[modality]
    assert found.shape == (4, 16, 16) and (found >= -1e-6).all() and (found <= 2).all()
    again = mvad.score(mvad.fit([train], config, NOW), views(5, modality=modality))[modality]
    assert torch.equal(found, again)


def test_a_student_that_equals_its_teacher_scores_zero(monkeypatch):
    head = mvad.fit([views()], QUICK, NOW)
    monkeypatch.setattr(Network, "forward", lambda self, teacher: teacher)
    assert mvad.score(head, views(5, True))["image"].abs().max() < 1e-6


def test_what_is_painted_into_one_view_raises_that_view_most():
    head = mvad.fit([views()], replace(QUICK, steps=40), NOW)
    tested = views()
    images = [view.read_image().copy() for view in tested.sample.views]
    rows, columns = np.nonzero(tested.foregrounds[2])
    middle = int(np.median(rows)), int(np.median(columns))
    images[2][middle[0] - 6 : middle[0] + 6, middle[1] - 6 : middle[1] + 6] = 255
    images[2][middle[0] - 3 : middle[0] + 3] = 0
    changed = tuple(replace(view, read_image=lambda image=image: image)
                    for view, image in zip(tested.sample.views, images, strict=True))  # fmt: skip
    painted = Views(replace(tested.sample, views=changed), tested._store)
    shown = tested.share > 0
    plain, found = (mvad.score(head, one)["image"].masked_fill(~shown, 0).flatten(1).amax(1)
                    for one in (tested, painted))  # fmt: skip
    raised = found - plain
    assert raised.argmax() == 2 and found[2] > 1.2 * plain[2], (plain, found)


def test_a_fit_that_was_stopped_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(resume, "EVERY_SECONDS", 0.0)
    place, config = tmp_path / "state", replace(QUICK, steps=4)
    whole = mvad.fit([views()], config, NOW)
    real, calls = torch.nn.utils.clip_grad_norm_, []

    def stopped(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stopped)
    with pytest.raises(KeyboardInterrupt):
        mvad.fit([views()], config, replace(NOW, checkpoint=place))
    head = mvad.fit([views()], config, replace(NOW, checkpoint=place))
    assert len(calls) == 5  # two, the one that was cut, and two more
    assert torch.equal(head.losses, whole.losses)
    for key, value in whole.network.state_dict().items():
        assert torch.equal(head.network.state_dict()[key], value), key


def test_what_cannot_work_is_one_line():
    facts = Facts(frozenset({"image"}), 1, True, 1, layers=frozenset({"image"}))
    with pytest.raises(ConfigError, match="mvad attends to other views: this benchmark has a single one"):
        mvad.check(Config(), facts)
    mvad.check(Config(cross_view=False), facts)
    with pytest.raises(ConfigError, match="training sample 0 has a single one"):
        mvad.fit([views(count=1)], QUICK, NOW)
    assert mvad.score(mvad.fit([views(count=1)], replace(QUICK, cross_view=False), NOW), views(5, count=1))
    with pytest.raises(ConfigError, match="mvad needs three layers.*got 16x16x64, 4x4x256, 2x2x512"):
        mvad.fit([views(layers="1-3-4")], QUICK, NOW)
    for change in ({"blocks": (1, 2)}, {"windows": (0, 1, 1)}, {"chosen": 0}, {"steps": 0}, {"learning_rate": 0.0}):
        with pytest.raises(ConfigError, match=f"mvad.{next(iter(change))}"):
            mvad.fit([views()], replace(QUICK, **change), NOW)


def test_it_has_settings_and_a_title():
    config = parse(Config, ["--blocks", "[1,1,1]", "--cross_view", "false"], "test")
    assert list(config.blocks) == [1, 1, 1] and mvad.title(Config()) == "mvad, image"
    assert mvad.title(Config(cross_view=False)) == "mvad, image, no other views (RD4AD)"
    head = mvad.fit([views()], QUICK, NOW)
    with pytest.raises(DataError, match="not the state of a mvad head"):
        mvad.from_state({"config": head.state()["config"]}, NOW.device)
