"""DINO-Depth: self-supervised pretraining of single-channel depth encoders."""

from dino_depth.transformers_hooks import install as _install

__version__ = "0.1.0"
__all__ = ["load_encoder"]

_install()  # costs nothing until transformers is imported


def __getattr__(name: str):
    # Lazily: `import dino_depth` must not cost the seconds that torch and timm take.
    if name == "load_encoder":
        from dino_depth.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
