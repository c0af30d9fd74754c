"""Per-clip metrics over several clips, for the tests."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dcbench.metrics import ClipMetric, Observations, Score, SetMetric, View


def observed(
    metric: ClipMetric,
    clips: Sequence[Tensor],
    images: Sequence[Tensor] | None = None,
    prompts: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """What the metric observes of each clip, alone with its own image and prompt."""
    return [
        metric.observe(View(clip, images[k] if images else None, prompts[k] if prompts else None))
        for k, clip in enumerate(clips)
    ]


def between(metric: SetMetric, real: Tensor, generated: Tensor) -> Score:
    """The score of two sets of features."""
    return metric.score(Observations(list(generated), list(real)))


def scored(metric: ClipMetric, rows: Sequence[dict[str, Any]], groups: Sequence[str] | None = None) -> Score:
    return metric.score(Observations(list(rows), groups=list(groups) if groups else None))
