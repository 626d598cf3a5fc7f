"""EfficientAD: network shapes, losses and maps against slow transcriptions, weights from files, resuming."""

import numpy as np
import pytest
import torch
from anomaly_run import make_sample
from PIL import Image
from quick_heads import teacher_file

from dino_depth.anomaly import resume
from dino_depth.anomaly.config import EvaluateConfig
from dino_depth.anomaly.features import FeatureStore
from dino_depth.anomaly.foreground import ForegroundConfig
from dino_depth.anomaly.heads import Context, Facts, efficientad
from dino_depth.anomaly.heads.efficientad.networks import KERNELS, Autoencoder, pdn, read_teacher
from dino_depth.anomaly.views import Views
from dino_depth.config import parse
from dino_depth.errors import ConfigError, DataError

NOW = Context(0, torch.device("cpu"))
SMALL, MEDIUM = (3, 128, 256, 256, 384), (3, 256, 512, 512, 512, 384, 384)


def views(seed=0, bad=False, count=3):
    store = FeatureStore(None, None, 64, object_pixels=ForegroundConfig("valid"))
    return Views(make_sample(f"{seed:02d}", count, bad, seed), store)


@pytest.fixture
def config(tmp_path):
    return efficientad.Config(teacher_file(tmp_path / "teacher.pth"), steps=3)


def parameters(network):
    return sum(part.numel() for part in network.parameters())


def test_networks_are_as_large_as_published():
    with torch.device("meta"):
        small, medium = pdn(KERNELS[0], SMALL), pdn(KERNELS[1], MEDIUM)
        students = [efficientad._student(network) for network in (small, medium)]
        autoencoder = Autoencoder(384)
        assert [tuple(small(torch.zeros(1, 3, side, side)).shape[2:]) for side in (33, 64, 256)] == [
            (1, 1), (8, 8), (56, 56),
        ]  # fmt: skip
        assert autoencoder(torch.zeros(1, 3, 256, 256)).shape == (1, 384, 56, 56)
    found = [round(parameters(network) / 1e6, 3) for network in (small, medium, *students, autoencoder)]
    assert found == [2.694, 8.027, 4.267, 11.615, 1.096]


def test_the_receptive_field_is_33_pixels():
    for kernels, widths in ((KERNELS[0], (3, 4, 5, 6, 8)), (KERNELS[1], (3, 4, 5, 6, 7, 8, 8))):
        picture = torch.randn(1, 3, 65, 65, dtype=torch.float64, requires_grad=True)
        network = pdn(kernels, widths).double()
        network(picture)[0, :, 2, 3].sum().backward()
        rows, columns = picture.grad[0].abs().sum(0).nonzero().unbind(1)
        found = [(int(part.min()), int(part.max())) for part in (rows, columns)]
        assert found[0][0] >= 8 and found[0][1] <= 8 + 32 and found[1][0] >= 12 and found[1][1] <= 12 + 32
        assert max(high - low for low, high in found) > 25  # ReLUs may hide a border


def test_both_layouts_of_weights_give_the_same_teacher(tmp_path):
    picture = torch.randn(1, 3, 64, 64)
    for medium, widths in ((False, (4, 5, 6, 8)), (True, (4, 5, 5, 6, 8, 8))):
        files = [teacher_file(tmp_path / f"{named}", widths, medium, named) for named in (False, True)]
        plain, named = (read_teacher(path)(picture) for path in files)
        assert plain.shape == (1, 8, 8, 8) and torch.equal(plain, named)


def broken(weights, change):
    weights = dict(weights)
    if change == "missing":
        del weights["8.bias"]
    elif change == "extra":
        weights["9.weight"] = torch.zeros(1)
    else:
        weights["3.weight"] = torch.zeros(5, 4, 3, 3)
    return weights


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_one_line(tmp_path, change):
    path = teacher_file(tmp_path / "teacher.pth")
    torch.save(broken(torch.load(path, weights_only=True), change), path)
    with pytest.raises(DataError, match=f"{path}: (keys|shapes)") as error:
        read_teacher(path)
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_one_line(tmp_path):
    (tmp_path / "text").write_text("no weights")
    torch.save([torch.zeros(2)], tmp_path / "list")
    with pytest.raises(DataError, match="unreadable weights"):
        read_teacher(str(tmp_path / "text"))
    with pytest.raises(DataError, match="not a file of named weights"):
        read_teacher(str(tmp_path / "list"))
    with pytest.raises(ConfigError, match="no such file.*never downloaded"):
        read_teacher(str(tmp_path / "absent"))


def test_the_hardest_values_are_those_that_reach_the_quantile():
    for count in (7, 1000, 1001, 2000, 20_011):
        values = torch.rand(count, generator=torch.Generator().manual_seed(count))
        expected = values[values.double() >= np.quantile(values.double().numpy(), efficientad.HARD)]
        assert torch.equal(efficientad.hardest(values).sort().values, expected.sort().values)


def test_the_loss_is_that_of_the_paper(config):
    """In float64, with loops over channels, and no gradient into the teacher."""
    torch.manual_seed(0)
    teacher = read_teacher(config.teacher).double().requires_grad_(False)
    student, autoencoder = efficientad._student(teacher).double(), Autoencoder(8).double().eval()
    mean, std = torch.randn(8, 1, 1, dtype=torch.float64), torch.rand(8, 1, 1, dtype=torch.float64) + 0.5
    one, two, other = torch.randn(3, 1, 3, 256, 256, dtype=torch.float64)
    found = efficientad.training_loss(teacher, student, autoencoder, mean, std, one, two, other)
    t, s = teacher(one)[0], student(one)[0]
    squared = torch.stack([((t[c] - mean[c]) / std[c] - s[c]) ** 2 for c in range(8)])
    hard = squared[squared >= torch.quantile(squared, 0.999)].mean()
    penalty = sum((student(other)[0, c] ** 2).mean() for c in range(8)) / 8
    t, s, a = teacher(two)[0], student(two)[0], autoencoder(two)[0]
    rebuilt = sum((((t[c] - mean[c]) / std[c] - a[c]) ** 2).mean() for c in range(8)) / 8
    imitated = sum(((a[c] - s[8 + c]) ** 2).mean() for c in range(8)) / 8
    torch.testing.assert_close(found, hard + penalty + rebuilt + imitated)
    alone = efficientad.training_loss(teacher, student, autoencoder, mean, std, one, two, None)
    torch.testing.assert_close(alone, hard + rebuilt + imitated)


def test_maps_are_scaled_by_quantiles_of_the_held_out_views(config):
    instance = views(count=10)
    head = efficientad.fit([instance], config, NOW)
    held = efficientad._pixels(instance)[9]
    raw = efficientad._raw_maps(head, held).double()
    for place in range(2):
        expected = torch.quantile(raw[place].flatten(), torch.tensor([0.9, 0.995], dtype=torch.float64))
        torch.testing.assert_close(head.quantiles[place].double(), expected, rtol=1e-5, atol=0)
    maps = efficientad.score(head, instance)["image"]
    assert maps.shape == (10, 64, 64) and (maps >= 0).all()
    low, high = head.quantiles.double().unbind(1)
    mapped = sum((raw[at] - low[at]) / (high[at] - low[at]) * 0.1 for at in range(2)) / 2  # of the paper
    constant = (low / (high - low) * 0.1).sum() / 2
    torch.testing.assert_close(maps[9, 4:-4, 4:-4].double(), mapped + constant, rtol=1e-4, atol=1e-7)
    assert maps[9, 0, 0] == pytest.approx(float(constant), rel=1e-5)  # the paper's 0


def test_the_teachers_features_are_normalised_over_the_training_pictures(config):
    teacher = read_teacher(config.teacher).requires_grad_(False)
    rows = efficientad._pixels(views())
    mean, std = efficientad._statistics(teacher, rows)
    features = torch.cat([teacher(efficientad._normal(row, NOW.device)) for row in rows])
    changed = ((features - mean) / std).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(changed.mean(1), torch.zeros(8, dtype=torch.float64), atol=1e-3, rtol=0)
    torch.testing.assert_close(changed.std(1, correction=0), torch.ones(8, dtype=torch.float64), atol=1e-3, rtol=0)


def test_a_student_that_agrees_sees_nothing(config):
    head = efficientad.fit([views()], config, NOW)

    class Same(torch.nn.Module):
        def forward(self, picture):
            normal = (head.teacher(picture) - head.mean) / head.std
            return torch.cat([normal, head.autoencoder(picture)], 1)

    agreeing = efficientad.EfficientAd(**{**vars(head), "student": Same()})
    picture = efficientad._pixels(views(seed=4, bad=True))[0]
    assert (efficientad._raw_maps(agreeing, picture) == 0).all() and (efficientad._raw_maps(head, picture) > 0).any()


def test_training_learns_and_leaves_the_teacher_alone(config):
    before = torch.load(config.teacher, weights_only=True)
    head = efficientad.fit([views()], efficientad.Config(config.teacher, steps=12, learning_rate=3e-3), NOW)
    assert all(torch.equal(before[key], part) for key, part in head.teacher.state_dict().items())
    assert head.losses[-3:].mean() < 0.8 * head.losses[:3].mean()


def test_a_fit_that_was_killed_ends_in_the_same_bits(config, tmp_path, monkeypatch):
    whole = efficientad.fit([views()], config, NOW)
    monkeypatch.setattr(resume, "EVERY_SECONDS", 0)
    kept = Context(0, NOW.device, tmp_path / "state")
    calls, loss = [], efficientad.training_loss

    def killed(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return loss(*arguments)

    monkeypatch.setattr(efficientad, "training_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        efficientad.fit([views()], config, kept)
    monkeypatch.setattr(efficientad, "training_loss", lambda *arguments: (calls.append(1), loss(*arguments))[1])
    again = efficientad.fit([views()], config, kept)
    assert len(calls) == config.steps
    tested = views(seed=5, bad=True)
    assert torch.equal(efficientad.score(again, tested)["image"], efficientad.score(whole, tested)["image"])
    assert torch.equal(again.losses, whole.losses)


def test_the_penalty_is_of_the_users_pictures(config, tmp_path):
    folder = tmp_path / "pictures" / "deep"
    folder.mkdir(parents=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(folder / "one.png")
    with_it = efficientad.Config(config.teacher, str(tmp_path / "pictures"), 2)
    assert efficientad.title(with_it) == "efficientad" and efficientad.title(config) == "efficientad, penalty off"
    losses = [efficientad.fit([views()], chosen, NOW).losses[0] for chosen in (config, with_it)]
    assert losses[1] > losses[0]
    (folder / "one.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="efficientad.penalty .*one.png: unreadable picture"):
        efficientad.fit([views()], with_it, NOW)
    with pytest.raises(ConfigError, match="efficientad.penalty .*no picture"):
        efficientad.check(efficientad.Config(config.teacher, str(tmp_path / "empty")), Facts(frozenset(), 3, True, 1))


def test_what_cannot_work_is_said_before(config, tmp_path):
    facts = Facts(frozenset(), 12, True, 1)
    efficientad.check(config, facts)
    with pytest.raises(ConfigError, match="efficientad.teacher is missing.*never downloaded"):
        efficientad.check(efficientad.Config(), facts)
    with pytest.raises(ConfigError, match="needs two training views"):
        efficientad.check(config, Facts(frozenset(), 1, False, 1))
    for change in ({"steps": 0}, {"held_out": 1}, {"learning_rate": 0.0}, {"weight_decay": -1.0}):
        with pytest.raises(ConfigError, match=f"efficientad.*{next(iter(change))}"):
            efficientad.check(efficientad.Config(config.teacher, **change), facts)


def test_a_kept_fit_of_another_teacher_is_refused(config):
    head = efficientad.fit([views()], config, NOW)
    state = head.state()
    torch.save({key: part + 1 for key, part in torch.load(config.teacher, weights_only=True).items()}, config.teacher)
    with pytest.raises(DataError, match="is not the file of the fit"):
        efficientad.from_state(state, NOW.device)


@pytest.mark.parametrize("data", ["sim3d", "mvtec3d", "eyecandies"])
def test_each_benchmark_has_a_configuration(data):
    config = parse(EvaluateConfig, ["--config", f"{data}_efficientad"], "test")
    assert (config.head.name, config.data.name) == ("efficientad", data)
    assert config.encoder.image == config.encoder.depth == ""
