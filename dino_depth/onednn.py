"""float32 matrix products by oneDNN instead of MKL, on processors with AVX-512 that are not Intel's.

torch gives float32 products to MKL. On an AMD EPYC that is half as fast as oneDNN, which torch contains as well but
uses for other types (docs/performance.md). Neither torch nor MKL has a setting for it, so ``mm`` and ``addmm`` get
another kernel in this process, by the documented way of overriding one for some inputs (``torch.library.get_kernel``).
Everything built on them gains: linear layers, their gradients, frozen encoders.
"""

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["multiply_with_onednn", "wants_onednn"]

SMALLEST = 2**20  # multiplications of a product below which finding another kernel costs more than it saves

_library: torch.library.Library | None = None


def wants_onednn() -> bool:
    """Whether torch multiplies with MKL on a processor with AVX-512 that is not Intel's.

    Decided by what the processor is, not by timing: a resumed run has to multiply as it did before.
    """
    try:
        known = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return torch.backends.mkl.is_available() and wide and "GenuineIntel" not in known


def multiply_with_onednn(enabled: bool = True) -> str | None:
    """Gives ``mm`` and ``addmm`` of large float32 matrices on CPUs to oneDNN, or back; None, or why that cannot be."""
    global _library
    _library = None  # gives them back
    if not enabled:
        return None
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.library, "get_kernel")):
        return "torch comes without oneDNN or is older than 2.9"
    before = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm")}

    def mm(keys, left: Tensor, right: Tensor) -> Tensor:
        if _suits(left, right):
            return _product(left, right)
        return before["mm"].call_boxed(keys, left, right)

    def addmm(keys, bias: Tensor, left: Tensor, right: Tensor, *, beta=1, alpha=1) -> Tensor:
        if _suits(left, right, bias) and bias.shape == right.shape[1:] and beta == alpha == 1:
            return _product(left, right, bias)
        return before["addmm"].call_boxed(keys, bias, left, right, beta=beta, alpha=alpha)

    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(64, 128, generator=generator), torch.randn(128, 256, generator=generator)
    try:
        error = (_product(left, right).double() - left.double() @ right.double()).abs().max()
        library = torch.library.Library("aten", "IMPL")
        library.impl("mm", mm, "CPU", with_keyset=True)
        library.impl("addmm", addmm, "CPU", with_keyset=True)
    except Exception as reason:  # noqa: BLE001 - a private operator may go; products are then MKL's as before
        return f"{type(reason).__name__}: {(str(reason).strip() or '-').splitlines()[0]}"
    if not error < 1e-3:
        return f"wrong product, error {error:.1e}"
    _library = library
    return None


def _suits(left: Tensor, right: Tensor, *more: Tensor) -> bool:
    """Shapes that do not fit are left to torch, whose error message is the known one."""
    return (
        all(part.dtype == torch.float32 and part.layout == torch.strided for part in (left, right, *more))
        and left.dim() == right.dim() == 2
        and left.shape[1] == right.shape[0]
        and left.shape[0] * left.shape[1] * right.shape[1] >= SMALLEST
    )


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    linear = torch.ops.mkldnn._linear_pointwise
    # A weight's gradient, whose left factor is transposed, is faster with the longer side in the place of the outputs.
    if bias is None and left.stride(0) == 1 and left.shape[0] > right.shape[1]:
        return linear(right.T, left, None, "none", [], "").T
    return linear(left, right.T, bias, "none", [], "")
