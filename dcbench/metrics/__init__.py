"""Metrics: FVD, KVD, PIC, CLIP-similarity, motion. Import the classes from here; `dcbench list` imports no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dcbench.metrics.base import ClipMetric, FeatureExtractor, Score, SetMetric
    from dcbench.metrics.extractors import I3DExtractor
    from dcbench.metrics.stateful import (
        ClipSimilarity,
        FrechetVideoDistance,
        KernelVideoDistance,
        Motion,
        PerceptualInputConformity,
    )

_WHERE = {
    "ClipMetric": "base",
    "FeatureExtractor": "base",
    "Score": "base",
    "SetMetric": "base",
    "FrechetVideoDistance": "stateful",
    "KernelVideoDistance": "stateful",
    "PerceptualInputConformity": "stateful",
    "ClipSimilarity": "stateful",
    "Motion": "stateful",
    "I3DExtractor": "extractors",
}
__all__ = [
    "ClipMetric",
    "ClipSimilarity",
    "FeatureExtractor",
    "FrechetVideoDistance",
    "I3DExtractor",
    "KernelVideoDistance",
    "Motion",
    "PerceptualInputConformity",
    "Score",
    "SetMetric",
]


def __getattr__(name: str) -> Any:
    """Load a class when it is asked for: the cards of this package are read without torch."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
