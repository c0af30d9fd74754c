"""Metrics: FVD, KVD, PIC, CLIP-similarity, motion. Import the classes from here. `dcbench list` needs no torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the public names, for type checkers; at run time, __getattr__ finds them in _MODULES
    from dcbench.metrics.base import ClipMetric as ClipMetric
    from dcbench.metrics.base import FeatureExtractor as FeatureExtractor
    from dcbench.metrics.base import Metric as Metric
    from dcbench.metrics.base import Observations as Observations
    from dcbench.metrics.base import Score as Score
    from dcbench.metrics.base import SetDistance as SetDistance
    from dcbench.metrics.base import SetMetric as SetMetric
    from dcbench.metrics.base import View as View
    from dcbench.metrics.extractors import I3DExtractor as I3DExtractor
    from dcbench.metrics.stateful import ClipSimilarity as ClipSimilarity
    from dcbench.metrics.stateful import FrechetVideoDistance as FrechetVideoDistance
    from dcbench.metrics.stateful import KernelVideoDistance as KernelVideoDistance
    from dcbench.metrics.stateful import Motion as Motion
    from dcbench.metrics.stateful import PerceptualInputConformity as PerceptualInputConformity

_MODULES = ("base", "extractors", "stateful")  # the last one imports torchmetrics, which takes seconds


def __getattr__(name: str) -> Any:
    """Import a class at its first use, because the cards of this package are read without torch."""
    if name[:1].isupper():  # a class; a lower-case name is a module of this package, which Python imports itself
        for module in _MODULES:
            if hasattr(found := importlib.import_module(f"{__name__}.{module}"), name):
                return getattr(found, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
