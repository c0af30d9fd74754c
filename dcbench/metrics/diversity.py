"""How different the clips of one input are: mean ST-LPIPS between them, frame by frame (see `st_lpips`).

A model that makes the same clip for every seed has 0. Noise has much, so read it together with a metric of quality.
"""

from itertools import combinations
from statistics import fmean
from typing import Any

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, View
from dcbench.metrics.st_lpips import StLpips, squared, st_lpips


class Diversity(ClipMetric):
    """Mean distance of all pairs of clips of an input, frame by frame; 0 if they are all equal."""

    extractor: StLpips
    extractor_options = ("net",)
    in_workers = True
    of_items = True

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value", "clips": how many, "per_frame"}. Only the features of one frame of each clip are in memory."""
        clips = [self.check(clip) for clip in (view.clip, *view.need("siblings"))]
        if len({clip.shape for clip in clips}) > 1:
            shapes = ", ".join(str(list(clip.shape)) for clip in clips)
            raise UserError(f"{self.card.name}: the clips of an input have different shapes: {shapes}")
        per_frame = []
        for frames in zip(*clips, strict=True):
            features = [self.extractor.features(frame) for frame in frames]
            per_frame.append(fmean(squared(a, b) for a, b in combinations(features, 2)))
        return {"value": fmean(per_frame), "clips": len(clips), "per_frame": per_frame}


def build(card: MetricCard, runtime: Any) -> Diversity:
    """Entry point of the card `diversity`; options: net."""
    return Diversity(card, st_lpips(card.options.get("net", "alex"), runtime.device))
