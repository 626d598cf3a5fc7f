"""Losses and centering against direct float64 transcriptions of their equations."""

import math

import pytest
import torch
import torch.nn.functional as F

from dino_depth.config import LossConfig, PretrainConfig
from dino_depth.pretrain import losses
from dino_depth.pretrain.batch import Batch
from dino_depth.pretrain.heads import PrototypeHead
from dino_depth.pretrain.losses import koleo, prototype_cross_entropy, sinkhorn
from dino_depth.pretrain.student_teacher import Networks, Targets, student_losses, teacher_targets


def sinkhorn_by_the_book(logits, temperature, iterations):
    """SwAV's algorithm on the explicit (K, samples) matrix, in float64."""
    q = torch.exp(logits.double() / temperature).T
    q /= q.sum()
    prototypes, samples = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True)
        q /= prototypes
        q /= q.sum(0, keepdim=True)
        q /= samples
    return (q * samples).T


@pytest.mark.parametrize("samples, prototypes", [(7, 33), (64, 16), (1, 5), (40, 1000)])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_equals_the_algorithm(samples, prototypes, temperature, dtype):
    logits = (torch.rand(samples, prototypes) * 2 - 1).to(dtype)
    expected = sinkhorn_by_the_book(logits, temperature, 3)
    assert torch.allclose(sinkhorn(logits, temperature, 3).double(), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("iterations", [0, 3])
def test_sinkhorn_is_computed_in_float32_inside_autocast(iterations):
    logits = torch.randn(48, 200, generator=torch.Generator().manual_seed(3)) * 0.3
    outside = sinkhorn(logits, 0.04, iterations)
    with torch.autocast("cpu", torch.bfloat16):
        inside = sinkhorn(logits, 0.04, iterations)
    assert torch.equal(inside, outside)
    torch.testing.assert_close(inside.sum(1), torch.ones(48), atol=1e-5, rtol=0)


def test_sinkhorn_without_iterations_is_the_softmax():
    logits = torch.randn(5, 9)
    assert torch.allclose(sinkhorn(logits, 0.1, 0), (logits / 0.1).softmax(1))


def test_sinkhorn_survives_extreme_logits():
    result = sinkhorn(torch.tensor([[9.0, -9.0, 0.0], [9.0, -9.0, 0.0]]), 0.04, 3)
    assert torch.isfinite(result).all()


def cross_entropy_by_the_book(features, prototypes, targets, index, weights, temperature):
    logits = features @ prototypes.T / temperature
    terms = zip(logits, index, weights, strict=True)
    return sum(weight * -(targets[i] * F.log_softmax(row, -1)).sum() for row, i, weight in terms)


def random_problem(rows=37, width=8, prototypes=50, targets=5):
    features = F.normalize(torch.randn(rows, width), dim=-1)
    table = torch.rand(targets, prototypes).softmax(-1) * torch.tensor([1, 1, 2, 1, 2])[:targets, None]
    return features, torch.randn(prototypes, width), table, torch.randint(targets, (rows,)), torch.rand(rows)


def test_cross_entropy_and_gradients_equal_autograd_in_float64(monkeypatch):
    monkeypatch.setattr(losses, "MATMUL_ROWS", 20)
    monkeypatch.setattr(losses, "CACHE_ROWS", 8)
    features, prototypes, targets, index, weights = random_problem()
    leaves = [features.requires_grad_(), prototypes.requires_grad_()]
    (3 * prototype_cross_entropy(*leaves, targets, index, weights, 0.1)).backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    loss = cross_entropy_by_the_book(*exact, targets.double(), index, weights.double(), 0.1)
    (3 * loss).backward()
    for leaf, reference in zip(leaves, exact, strict=True):
        assert torch.allclose(leaf.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)
    value = prototype_cross_entropy(*leaves, targets, index, weights, 0.1)
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("rows", [45, 20, 0])
def test_without_an_index_row_faces_its_own_target(monkeypatch, rows):
    monkeypatch.setattr(losses, "MATMUL_ROWS", 20)
    monkeypatch.setattr(losses, "CACHE_ROWS", 8)
    features, prototypes, targets, _, weights = random_problem(rows)
    targets = torch.rand(rows, len(prototypes)).softmax(-1)
    results = []
    for index in (None, torch.arange(rows)):
        leaves = [features.clone().requires_grad_(), prototypes.clone().requires_grad_()]
        loss = prototype_cross_entropy(*leaves, targets, index, weights, 0.1)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_cross_entropy_in_bfloat16_is_close():
    features, prototypes, targets, index, weights = random_problem()
    features.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        narrow = prototype_cross_entropy(features, prototypes, targets, index, weights, 0.1)
    wide = prototype_cross_entropy(features, prototypes, targets, index, weights, 0.1)
    assert narrow.item() == pytest.approx(wide.item(), rel=2e-2)
    (gradient,) = torch.autograd.grad(narrow, features)
    (expected,) = torch.autograd.grad(wide, features)
    assert (gradient - expected).norm() / expected.norm() < 2e-2


def test_koleo_equals_the_equation():
    features = torch.randn(9, 4)
    unit = F.normalize(features.double(), dim=-1)
    expected = -sum(math.log(min((unit[i] - unit[j]).norm().item() for j in range(9) if j != i)) for i in range(9)) / 9
    assert koleo(features).item() == pytest.approx(expected, rel=1e-4)


def test_koleo_of_equal_samples_is_finite_with_its_gradient():
    features = torch.ones(4, 3, requires_grad=True)
    loss = koleo(features)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(features.grad).all()


def test_prototypes_are_weight_normed():
    head = PrototypeHead(6, LossConfig(prototypes=11, hidden=7, bottleneck=5))
    reference = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 11, bias=False))
    reference.parametrizations.weight.original1.data = head.direction.data
    reference.parametrizations.weight.original0.data = torch.linspace(0.5, 2, 11)[:, None]
    head.gain.data = torch.linspace(0.5, 2, 11)[:, None]
    assert torch.allclose(head.prototypes(), reference.weight, atol=1e-6)
    assert torch.allclose(head(torch.randn(3, 6)).norm(dim=-1), torch.ones(3), atol=1e-5)


def tiny_config() -> PretrainConfig:
    config = PretrainConfig()
    config.crops.global_size, config.crops.local_size, config.crops.local_crops = 28, 14, 3
    config.model.dim, config.model.depth, config.model.heads, config.model.drop_path = 24, 2, 2, 0.0
    config.model.layer_scale = 1.0
    config.loss.prototypes, config.loss.hidden, config.loss.bottleneck = 40, 16, 8
    return config


def tiny_batch(maps=3, partners=None) -> Batch:
    masks = torch.zeros(maps, 2, 4, dtype=torch.bool)
    masks[0, 1, :2] = masks[2, 0, 1] = masks[1, 0, 3] = True
    crops = torch.randn(maps, 2, 1, 28, 28), torch.randn(maps, 3, 1, 14, 14)
    return Batch.make(crops, masks, tiny_config(), partners=partners)


def test_student_losses_equal_the_published_pairing():
    """All pairs written out crop by crop, through timm's own forward, in float64."""
    config, batch, maps = tiny_config(), tiny_batch(), 3
    student, teacher = Networks(config), Networks(config)
    torch.nn.init.normal_(student.backbone.mask_token)
    targets = teacher_targets(teacher, batch, 0.05, 3)
    found = student_losses(student, batch, targets, config)

    student, teacher = student.double(), teacher.double()
    globals_, locals_ = batch.global_crops.double(), batch.local_crops.double()
    taught = teacher.backbone.forward_features(globals_)
    logits = teacher.dino_head(taught[:, 0]).double() @ teacher.dino_head.prototypes().T
    class_targets = sinkhorn_by_the_book(logits, 0.05, 3)
    hidden = taught[:, 1:][batch.masks]
    patch_targets = sinkhorn_by_the_book(teacher.ibot_head(hidden).double() @ teacher.ibot_head.prototypes().T, 0.05, 3)
    assert torch.allclose(targets.classes.double(), class_targets, atol=1e-5)
    assert torch.allclose(targets.patches.double(), patch_targets, atol=1e-5)

    def log_probabilities(head, tokens):
        return F.log_softmax(head(tokens).double() @ head.prototypes().T / 0.1, -1)

    embedded = student.backbone.embed(globals_, batch.masks)
    whole = student.backbone.norm(student.backbone.blocks(embedded))
    local = student.backbone.forward_features(locals_)
    pairs = []
    for image in range(maps):
        for target in range(2):
            wanted = class_targets[target * maps + image]
            crops = [whole[(1 - target) * maps + image, 0]] + [local[k * maps + image, 0] for k in range(3)]
            pairs += [-(wanted * log_probabilities(student.dino_head, crop[None])[0]).sum() for crop in crops]
    assert len(pairs) == maps * (2 + 2 * 3)
    assert found["dino"].item() == pytest.approx(sum(pairs).item() / len(pairs), rel=1e-5)

    per_crop = torch.zeros(2 * maps, dtype=torch.float64)
    rows, columns = batch.masks.nonzero(as_tuple=True)
    for place, (row, column) in enumerate(zip(rows, columns, strict=True)):
        entropy = -(patch_targets[place] * log_probabilities(student.ibot_head, whole[row, 1 + column][None])[0]).sum()
        per_crop[row] += entropy / batch.masks[row].sum()
    assert found["ibot"].item() == pytest.approx(per_crop.sum().item() / (2 * maps), rel=1e-5)

    spread = koleo(whole[:maps, 0].float()) + koleo(whole[maps:, 0].float())
    assert found["koleo"].item() == pytest.approx(spread.item(), rel=1e-4)
    expected = found["dino"] + found["ibot"] + 0.1 * found["koleo"]
    assert found["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_dense_loss_pairs_patches_of_one_place():
    """Pair by pair in float64: a student's patch faces the teacher's assignment of its partner in the other crop."""
    config, maps = tiny_config(), 3
    config.loss.dense_weight = 0.7
    partners = torch.tensor(
        [[[2, -1, 0, 1], [3, 3, -1, -1]], [[-1] * 4, [0, 1, 2, 3]], [[1, 1, 1, 1], [-1, 0, -1, -1]]]
    )
    batch = tiny_batch(maps, partners)
    student, teacher = Networks(config), Networks(config)
    torch.nn.init.normal_(student.backbone.mask_token)
    targets = teacher_targets(teacher, batch, 0.05, 3)
    found = student_losses(student, batch, targets, config)
    student, teacher = student.double(), teacher.double()
    crops = batch.global_crops.double()
    taught = teacher.backbone.forward_features(crops)[:, 1:]
    seen = student.backbone.norm(student.backbone.blocks(student.backbone.embed(crops, batch.masks)))[:, 1:]
    wanted, rows, counts = [], [], []
    for crop in range(2):
        for image in range(maps):
            pairs = [(patch, other) for patch, other in enumerate(partners[image, crop].tolist()) if other >= 0]
            for patch, other in pairs:
                rows.append(seen[crop * maps + image, patch])
                wanted.append(taught[(1 - crop) * maps + image, other])
                counts.append(len(pairs))
    head = teacher.ibot_head
    wanted = sinkhorn_by_the_book(head(torch.stack(wanted)).double() @ head.prototypes().T, 0.05, 3)
    assert torch.allclose(targets.paired.double(), wanted, atol=1e-5)
    head = student.ibot_head
    given = F.log_softmax(head(torch.stack(rows)).double() @ head.prototypes().T / 0.1, -1)
    expected = (-(wanted * given).sum(1) / torch.tensor(counts)).sum() / (2 * maps)
    assert found["dense"].item() == pytest.approx(expected.item(), rel=1e-5)
    whole = found["dino"] + found["ibot"] + 0.1 * found["koleo"] + 0.7 * found["dense"]
    assert found["loss"].item() == pytest.approx(whole.item(), rel=1e-6)
    plain = student_losses(
        student.float(), tiny_batch(), teacher_targets(teacher.float(), tiny_batch(), 0.05, 3), config
    )
    assert plain.keys() == {"loss", "dino", "ibot", "koleo"}


def test_every_student_parameter_learns():
    config, batch = tiny_config(), tiny_batch()
    student, teacher = Networks(config), Networks(config)
    loss = student_losses(student, batch, teacher_targets(teacher, batch, 0.05, 3), config)["loss"]
    loss.backward()
    silent = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    assert isinstance(teacher_targets(teacher, batch, 0.05, 3), Targets)
