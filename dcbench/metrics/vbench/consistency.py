"""VBench's four dimensions of cosines: does a clip keep its picture, its subject, its background?

i2v_subject, i2v_background: 0.4 max_t cos(picture, frame t) + 0.3 mean_t cos(frame t - 1, frame t) + 0.3 min_t of the
same. subject_consistency, background_consistency: mean over t >= 1 of (cos(frame t - 1, frame t) + cos(frame 0,
frame t)) / 2. Each cosine below 0 counts as 0. A still clip of its own picture scores 1 in all four.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError, near_match
from dcbench.metrics.base import ClipMetric, Observations, View, score_arranged
from dcbench.metrics.design import Design, codes
from dcbench.metrics.per_clip import cosine
from dcbench.metrics.pic import dreamsim_embedder
from dcbench.metrics.statistics import Comparison, compare_scores
from dcbench.metrics.vbench import embedders
from dcbench.metrics.vbench.embedders import FrameEmbedder
from dcbench.record import Score

MAX, MEAN, MIN = 0.4, 0.3, 0.3  # weights of the parts of conformity
Over = Literal["clips", "frames"]


def positive(cosines: Tensor) -> list[float]:
    return cosines.clamp(min=0).tolist()


class Conformity(ClipMetric):
    """`i2v_subject` or `i2v_background`."""

    extractor: FrameEmbedder
    extractor_options = ("antialias",)

    def lacks(self, view: View) -> str | None:
        """The picture's own file is used where there is one, else the input image."""
        return super().lacks(view) if view.picture is None and view.image is None else None

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value", "per_frame": cosines with the picture, "steps": the t - 1 cosines of consecutive frames}"""
        frames = self.extractor.frames(list(self.check(view.clip, min_frames=2)))
        picture = self.extractor.picture(view.need("image") if view.picture is None else view.picture)
        kept, steps = positive(cosine(picture[None], frames)), positive(cosine(frames[:-1], frames[1:]))
        value = MAX * max(kept) + MEAN * math.fsum(steps) / len(steps) + MIN * min(steps)
        return {"value": value, "per_frame": kept, "steps": steps}


class Consistency(ClipMetric):
    """`subject_consistency` or `background_consistency`.

    over = "clips": the mean over clips. "frames": the mean over the frames from the second on of all clips, so that a
    longer clip counts more. The two are equal for clips of one length.
    """

    extractor: FrameEmbedder
    extractor_options = ("model",)

    def __init__(self, card: MetricCard, extractor: FrameEmbedder, over: Over) -> None:
        super().__init__(card, extractor)
        self.over: Over = over

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value", "per_frame": the t - 1 values of the frames from the second on}"""
        frames = self.extractor.frames(list(self.check(view.clip, min_frames=2)))
        before, first = positive(cosine(frames[:-1], frames[1:])), positive(cosine(frames[:1], frames[1:]))
        per_frame = [(a + b) / 2 for a, b in zip(before, first, strict=True)]
        return {"value": math.fsum(per_frame) / len(per_frame), "per_frame": per_frame}

    def score(self, seen: Observations) -> Score:
        if self._by_clips(seen):
            score = super().score(seen)
        else:
            sums = [[math.fsum(row["per_frame"]), len(row["per_frame"])] for row in seen.generated]
            rows = torch.tensor(sums, dtype=torch.float64)
            groups = seen.groups or [str(place) for place in range(len(rows))]
            score = score_arranged(_ratio, rows[:0], rows, Design(codes([]), codes(groups)), lowest=0, highest=1)
        return score.model_copy(update={"details": score.details | {"over": self.over}})

    def difference(self, first: Observations, second: Observations) -> Comparison:
        if self._by_clips(first) and self._by_clips(second):
            return super().difference(first, second)
        return compare_scores(self.score(first), self.score(second))

    def _by_clips(self, seen: Observations) -> bool:
        """Whether the mean over clips is the value: it is also the one over frames if all clips have one length."""
        return self.over == "clips" or len({len(row["per_frame"]) for row in seen.generated}) == 1


def _ratio(real: Tensor, generated: Tensor, design: Design) -> float:
    """Rows [n 2] of sums and numbers of frames -> the mean over frames."""
    total, number = generated.sum(0).tolist()
    return total / number


def build_i2v_subject(card: MetricCard, runtime: Any) -> Conformity:
    """Entry point of `i2v_subject`; options: antialias."""
    antialias = _antialias(card)
    return Conformity(card, embedders.DinoCrop(embedders.dino(card, runtime), antialias, runtime.device))


def build_i2v_background(card: MetricCard, runtime: Any) -> Conformity:
    """Entry point of `i2v_background`; options: antialias."""
    antialias = _antialias(card)
    network = dreamsim_embedder("ensemble", card.weights, runtime)
    return Conformity(card, embedders.DreamSimSquash(network, antialias, runtime.device))


def build_subject_consistency(card: MetricCard, runtime: Any) -> Consistency:
    """Entry point of `subject_consistency`; options: over."""
    over = _over(card)
    return Consistency(card, embedders.DinoWhole(embedders.dino(card, runtime), runtime.device), over)


def build_background_consistency(card: MetricCard, runtime: Any) -> Consistency:
    """Entry point of `background_consistency`; options: over, model."""
    over = _over(card)
    return Consistency(card, embedders.clip(card, runtime), over)


def _antialias(card: MetricCard) -> bool:
    given = card.options.get("antialias")
    if not isinstance(given, bool):
        raise UserError(f"{card.name}: options.antialias is {given!r}; allowed: true, false")
    return given


def _over(card: MetricCard) -> Over:
    given = card.options.get("over")
    if given not in ("clips", "frames"):
        hint = near_match(str(given), ("clips", "frames"))
        raise UserError(f'{card.name}: options.over is "{given}"; allowed: clips, frames.{hint}')
    return given  # type: ignore[return-value]
