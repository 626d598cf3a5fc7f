"""Products by oneDNN against float64, and against the products that torch makes otherwise."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dino_depth import device, onednn
from dino_depth.config import ModelConfig
from dino_depth.onednn import multiply_with_onednn, wants_onednn
from dino_depth.vit import DepthTransformer

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not hasattr(torch.library, "get_kernel"), reason="torch has no oneDNN"
)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    multiply_with_onednn(False)


@pytest.fixture
def counted(monkeypatch) -> list:
    """Shapes of the products that went to oneDNN."""
    monkeypatch.setattr(onednn, "SMALLEST", 1)
    assert multiply_with_onednn() is None
    seen, product = [], onednn._product

    def counting(left, right, bias=None):
        seen.append((*left.shape, right.shape[1]))
        return product(left, right, bias)

    monkeypatch.setattr(onednn, "_product", counting)
    return seen


def layouts(rows: int, columns: int):
    """The same values as rows, as columns, with gaps and from the middle of a larger matrix."""
    values = torch.randn(rows, columns)
    wide, larger = torch.zeros(rows, 2 * columns), torch.zeros(rows + 3, columns + 5)
    wide[:, ::2], larger[2:-1, 3:-2] = values, values
    return [values, values.T.contiguous().T, wide[:, ::2], larger[2:-1, 3:-2]]


@pytest.mark.parametrize("rows, inner, columns", [(64, 48, 80), (1, 300, 7), (300, 7, 1), (129, 1, 65), (5, 0, 6)])
def test_products_of_every_layout_equal_float64(counted, rows, inner, columns):
    bias = torch.randn(columns)
    for left in layouts(rows, inner):
        for right in layouts(inner, columns):
            expected = left.double() @ right.double()
            torch.testing.assert_close((left @ right).double(), expected, atol=1e-4, rtol=1e-5)
            torch.testing.assert_close(torch.addmm(bias, left, right).double(), expected + bias, atol=1e-4, rtol=1e-5)
    assert len(counted) == 32 or inner == 0


def test_a_network_and_its_gradients_are_those_of_torch(counted):
    model = DepthTransformer(ModelConfig(dim=32, depth=2, heads=2, layer_scale=0.5), 56)
    images, weights = torch.randn(3, 1, 56, 56), torch.randn(3, 17, 32)
    (model.forward_features(images) * weights).sum().backward()
    assert len(counted) >= 2 * 3 * 4  # four layers a block, forward and both gradients
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    multiply_with_onednn(False)
    model.zero_grad()
    (model.forward_features(images) * weights).sum().backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad, rtol=1e-4, atol=1e-4)
        assert gradient.isfinite().all(), name


def test_the_same_product_gives_the_same_bits(counted):
    left, right = torch.randn(200, 96), torch.randn(96, 150)
    assert torch.equal(left @ right, left @ right)
    assert torch.equal(left.T @ left, left.T @ left)


def test_what_is_not_a_float32_matrix_stays_with_torch(counted):
    wide, numbers = torch.randn(20, 20).double(), torch.arange(9).view(3, 3)
    assert torch.equal(wide @ torch.eye(20).double(), wide)
    assert (numbers @ numbers).dtype == torch.int64
    assert (wide.bfloat16() @ wide.bfloat16()).dtype == torch.bfloat16
    assert torch.mm(torch.eye(3).to_sparse(), torch.ones(3, 2)).sum() == 6
    matrix = torch.randn(4, 4)
    expected = 0.5 * matrix + 2 * (matrix.double() @ matrix.double())
    torch.testing.assert_close(
        torch.addmm(matrix, matrix, matrix, beta=0.5, alpha=2).double(), expected, atol=1e-5, rtol=0
    )
    assert counted == []


def test_wrong_shapes_and_nan_are_as_in_torch(counted):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        torch.randn(3, 4) @ torch.randn(5, 6)
    with pytest.raises(RuntimeError, match="expected|expand|match"):
        torch.addmm(torch.randn(7), torch.randn(3, 4), torch.randn(4, 6))
    left = torch.ones(8, 8)
    left[2, 3] = torch.nan
    assert (left @ torch.ones(8, 8)).isnan().sum(1).tolist() == [0, 0, 8, 0, 0, 0, 0, 0]


def test_it_draws_no_random_numbers():
    state = torch.get_rng_state()
    multiply_with_onednn()
    assert torch.equal(torch.get_rng_state(), state)


def test_small_products_are_left_alone(monkeypatch):
    multiply_with_onednn()
    monkeypatch.setattr(onednn, "_product", lambda *_: pytest.fail("a small product went to oneDNN"))
    assert F.linear(torch.ones(2, 3), torch.ones(4, 3)).sum() == 24


def test_an_operator_that_is_gone_leaves_torch_as_it_was(monkeypatch):
    def gone(*_):
        raise AttributeError("no attribute '_linear_pointwise'")

    monkeypatch.setattr(onednn, "_product", gone)
    assert "no attribute" in multiply_with_onednn()
    assert (torch.ones(200, 200) @ torch.ones(200, 200)).eq(200).all()
    monkeypatch.setattr(onednn, "_product", lambda left, right: left @ right + 1)
    assert "wrong product" in multiply_with_onednn()


@pytest.mark.parametrize(
    "vendor, capability, expected",
    [("GenuineIntel", "AVX512", False), ("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False)],
)
def test_it_is_for_avx512_that_mkl_does_not_use(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(Path, "read_text", lambda self: f"vendor_id\t: {vendor}\n")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert wants_onednn() == expected
    device.pick_device("cpu")
    assert (onednn._library is not None) == expected
