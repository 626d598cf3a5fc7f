"""What ``import dino_depth`` adds to transformers, if and when that is imported: exports that prepare their own input.

The ``preprocessor_config.json`` of an export makes transformers by itself refuse, in a line that names this package,
because no image processor of its own makes the input of depth. After ``import dino_depth``, before or after
transformers, ``AutoImageProcessor.from_pretrained`` returns :class:`dino_depth.image_processor.DepthImageProcessor` for
it, and ``pipeline("image-feature-extraction")`` passes depth on as it is; for every other repository both are what they
were.
"""

import functools
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import ModuleType

__all__ = ["KEY", "install", "processor_config"]

KEY = "dino_depth"
REFUSAL = (
    "This encoder takes depth in metres, which only the package dino-depth makes its input of: "
    "pip install dino-depth and import dino_depth before AutoImageProcessor or pipeline; see README.md beside this file"
)


def processor_config(normalization: dict, size: int) -> dict:
    """The contents of ``preprocessor_config.json``.

    Args:
        normalization: the fields of :class:`dino_depth.depth.Normalization`.
        size: side of the square input, pixels.
    """
    # A size that is a sentence is what every version and backend of theirs refuses, and their error quotes it.
    described = {"normalization": normalization, "size": size}
    return {"image_processor_type": "BitImageProcessor", "size": REFUSAL, KEY: described}


def _change_auto(module: ModuleType):
    ours = module.AutoImageProcessor
    theirs = ours.from_pretrained

    @functools.wraps(theirs)
    def from_pretrained(name, *arguments, **options):
        from transformers.image_processing_base import ImageProcessingMixin

        places = ("cache_dir", "force_download", "token", "local_files_only", "revision", "subfolder", "proxies")
        try:
            found, _ = ImageProcessingMixin.get_image_processor_dict(
                name, **{key: value for key, value in options.items() if key in places}
            )
        except Exception:  # noqa: BLE001 - theirs says what is wrong, or knows another file
            found = {}
        if KEY not in found:
            return theirs(name, *arguments, **options)
        from dino_depth.image_processor import DepthImageProcessor

        return DepthImageProcessor.from_pretrained(name, **options)

    ours.from_pretrained = staticmethod(from_pretrained)


def _change_pipeline(module: ModuleType):
    ours = module.ImageFeatureExtractionPipeline
    theirs = ours.preprocess

    @functools.wraps(theirs)
    def preprocess(self, image, timeout=None, **options):
        from dino_depth.image_processor import DepthImageProcessor

        if not isinstance(self.image_processor, DepthImageProcessor):
            return theirs(self, image, timeout=timeout, **options)
        return self.image_processor(image, **options).to(self.dtype)  # theirs would make a picture of it first

    ours.preprocess = preprocess


CHANGES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.models.auto.image_processing_auto": _change_auto,
    "transformers.pipelines.image_feature_extraction": _change_pipeline,
}


class _AfterImport(MetaPathFinder):
    """Leaves finding to the others, and changes the modules of ``CHANGES`` once they are executed."""

    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType):
                execute(module)
                CHANGES[name](module)

            spec.loader.exec_module = exec_module
        return spec


def install():
    """Changes what is imported of transformers now, and the rest when it is; a second call does nothing."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name, change in CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name])
