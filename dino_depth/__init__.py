"""DINO-Depth: self-supervised pretraining of single-channel depth encoders."""

__version__ = "0.1.0"
