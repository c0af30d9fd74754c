"""Two metrics of the steps of a clip, the mean absolute differences of its frames in grey levels 0..255. No network.

flicker: VBench's temporal flickering (arXiv 2311.17982, temporal_flickering.py), (255 - mean of the steps) / 255.
loop_seam: the step from the last frame back to the first, over the median of the other steps; for clips that repeat.

Both read the pixels at the clip's own size, all three colours alike.
"""

from itertools import pairwise
from statistics import fmean, median
from typing import Any, Literal

from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, NoNetwork, View

Kind = Literal["flicker", "loop_seam"]


def step(first: Tensor, second: Tensor) -> float:
    """Mean absolute difference of two uint8 frames [3 h w], in 0..255. The sum is of whole numbers, so it is exact."""
    return int((first.short() - second.short()).abs().sum()) / first.numel()


def steps(clip: Tensor) -> list[float]:
    """uint8 [t 3 h w] -> the t - 1 steps of neighbouring frames."""
    return [step(first, second) for first, second in pairwise(clip)]


def measure_flicker(clip: Tensor) -> dict[str, Any]:
    """uint8 [t 3 h w], t >= 2 -> {"value" in [0, 1], 1 for a still clip; "per_frame": the same of each step}."""
    per_frame = [1 - found / 255 for found in steps(clip)]
    return {"value": fmean(per_frame), "per_frame": per_frame}


def measure_loop_seam(clip: Tensor) -> dict[str, Any]:
    """uint8 [t 3 h w], t >= 3 -> {"value": seam / step, >= 0; "seam", "step": grey levels}.

    UserError if the median step is 0: a still clip has nothing to compare its seam with.
    """
    usual, seam = median(steps(clip)), step(clip[-1], clip[0])
    if not usual:
        raise UserError("loop_seam: half of the clip's frames or more equal the next frame, so it has no usual step")
    return {"value": seam / usual, "seam": seam, "step": usual}


class StepMetric(ClipMetric):
    """`flicker` or `loop_seam` of each clip."""

    in_workers = True

    def __init__(self, card: MetricCard, kind: Kind) -> None:
        super().__init__(card, NoNetwork("mean absolute difference of frames", "RGB 0..255 at the clip's own size"))
        self.kind = kind

    def observe(self, view: View) -> dict[str, Any]:
        if self.kind == "flicker":
            return measure_flicker(self.check(view.clip, min_frames=2))
        return measure_loop_seam(self.check(view.clip, min_frames=3))  # of two frames, the seam is the only step


def build(card: MetricCard, runtime: Any) -> StepMetric:
    """Entry point of the cards `flicker`, `temporal_flickering` and `loop_seam`; options: kind."""
    kind = card.options.get("kind")
    if kind not in ("flicker", "loop_seam"):
        raise UserError(f'{card.name}: options.kind is "{kind}"; allowed: flicker, loop_seam')
    return StepMetric(card, kind)
