"""dcbench: reproducible, explainable evaluation of image-to-video models."""

__version__ = "0.1.0"
