"""torch.compile of the functions that are bound by memory instead of arithmetic, for a run that asks for it.

A unit of compilation is a function marked :func:`compiled`: one residual branch, a projection, a pass over logits.
Outside :func:`compiling` it is the plain function. Units are small because twelve blocks then share what is compiled
for one, and because only what lies between two matrix products can be fused anyway. How many sequences take a branch,
how many patches are hidden and how many rows are left for the last chunk differ from step to step: these dimensions are
declared to vary before the first compilation, so that the first step compiles for all and computes as the others do.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch

__all__ = ["compiled", "compiling", "is_compiling", "probe_compiler", "vary"]

_backend: str | None = None


@contextlib.contextmanager
def compiling(enabled: bool, backend: str = "inductor") -> Iterator[None]:
    """Inside, functions marked :func:`compiled` are compiled when they are first called.

    Args:
        backend: of torch.compile; ``aot_eager`` traces forward and backward without generating code.
    """
    global _backend
    before, _backend = _backend, backend if enabled else None
    # Where gradients are averaged over ranks, torch would cut every unit at the borders of their buckets.
    whole = torch._dynamo.config.patch(optimize_ddp=False) if enabled else contextlib.nullcontext()
    try:
        with whole:
            yield
    finally:
        _backend = before


def is_compiling() -> bool:
    """Whether this is inside :func:`compiling`."""
    return _backend is not None


def compiled(function: Callable) -> Callable:
    """Marks a unit of compilation."""
    made = functools.cache(lambda backend: torch.compile(function, backend=backend))

    @functools.wraps(function)
    def call(*arguments):
        return (function if _backend is None else made(_backend))(*arguments)

    return call


def vary(*tensors: torch.Tensor):
    """Declares that the first dimension of ``tensors`` differs from call to call."""
    if _backend is not None:
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def probe_compiler(device: torch.device) -> str | None:
    """Compiles a small function; None if that works, else why not: no C++ compiler, or no headers of Python, say."""
    try:
        torch.compile(lambda values: (values * 2).sum())(torch.ones(8, device=device))
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises is the answer
        return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    return None
