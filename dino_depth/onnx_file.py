"""A module of PyTorch as an ONNX file, and ONNX Runtime on it."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from dino_depth.errors import ConfigError

__all__ = ["OnnxFile", "require_onnx", "save_onnx"]

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class OnnxFile:
    """A saved graph, run by ONNX Runtime on the CPU.

    Args:
        path: the file; weights that lie beside it are found there.
        threads: of one operation; 0 takes all cores.
    """

    def __init__(self, path: Path, threads: int = 0):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs by name."""
        names = [output.name for output in self._session.get_outputs()]
        found = self._session.run(names, {name: value.numpy() for name, value in inputs.items()})
        return {name: torch.from_numpy(value) for name, value in zip(names, found, strict=True)}


def require_onnx():
    """Refuses to go on without the packages.

    Raises:
        ConfigError: one is missing.
    """
    if missing := [package for package in PACKAGES if find_spec(package) is None]:
        raise ConfigError(f"--onnx needs {', '.join(missing)}: pip install 'dino-depth[onnx]'")


def save_onnx(
    path: Path,
    module: nn.Module,
    examples: dict[str, Tensor],
    outputs: Sequence[str],
    dynamic_shapes: dict[str, dict] | None = None,
):
    """Writes a module for inputs of the examples' shapes; weights beyond 1.5 GiB lie in ``path``.data beside it.

    Args:
        examples: the arguments of ``forward`` in order, by the names that the graph gives them.
        outputs: names of what it returns, in order.
        dynamic_shapes: as ``torch.onnx.export`` takes it.
    """
    torch.onnx.export(
        module.eval(),
        tuple(examples.values()),
        path,
        input_names=list(examples),
        output_names=list(outputs),
        dynamic_shapes=dynamic_shapes,
        dynamo=True,
        external_data=False,  # but for what a file cannot hold
        verbose=False,
    )
