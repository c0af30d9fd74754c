"""Physics-IQ (Motamed et al., arXiv 2501.09038): does a clip move where, when and as much as the real event?

Where something moves is found by subtracting a running mean of the frames; no network is needed. A clip is compared
with the first take of the real event. The second take is compared with the first one too: this is the physical
variance. Constants and order of steps are those of google-deepmind/physics-IQ-benchmark (2026-04).
"""

import itertools
import math
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, NoNetwork, Observations, View, score_arranged
from dcbench.metrics.design import Design, codes
from dcbench.metrics.statistics import Comparison, compare_scores
from dcbench.record import Score

SECONDS = 5.0
MEMORY, THRESHOLD = 0.3, 10  # weight of a new frame in the running mean; levels of grey that count as motion
KERNEL = np.ones((5, 5), np.uint8)
SHRINK = 4  # clips are compared at a quarter of the size of the real videos
PARTS = ("spatiotemporal_iou", "spatial_iou", "weighted_iou", "mse")
GROUPINGS = ("view", "category", "scenario")
Array = np.ndarray


# --- one clip ---------------------------------------------------------------------------------------------------------


def masks(frames: Iterable[Array]) -> Iterator[Array]:
    """RGB uint8 [h w 3] frames -> uint8 [h w] each: 255 where something moves, else 0. The first mask is empty."""
    mean: Array | None = None
    for frame in frames:
        grey = cv2.GaussianBlur(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), (5, 5), 0)
        if mean is None:
            mean = grey.astype(np.float64)
            yield np.zeros_like(grey)
            continue
        cv2.accumulateWeighted(grey, mean, MEMORY)
        change = cv2.absdiff(grey, cv2.convertScaleAbs(mean))
        mask = cv2.threshold(change, THRESHOLD, 255, cv2.THRESH_BINARY)[1]
        mask = cv2.morphologyEx(mask, cv2.MORPH_OPEN, KERNEL)
        yield cv2.morphologyEx(mask, cv2.MORPH_CLOSE, KERNEL)


@dataclass(frozen=True)
class Motion:
    """A clip at the size at which clips are compared."""

    frames: Array  # uint8 [t h w 3]
    masks: Array  # bool [t h w]


def motion_of(frames: Iterable[Array], size: tuple[int, int], compressed_at: float | None = None) -> Motion:
    """RGB uint8 [h w 3] frames -> their motion at `size` (height, width). Masks are made first, then resized.

    `compressed_at`: the masks go through an mp4v video of this frame rate, as in the official code.
    """
    small: list[Array] = []

    def kept() -> Iterator[Array]:
        for frame in frames:
            small.append(cv2.resize(frame, size[::-1]))
            yield frame

    found = masks(kept())
    found = found if compressed_at is None else through_mp4v(found, compressed_at)
    moving = [cv2.resize(mask, size[::-1]) > 127 for mask in found]
    return Motion(np.stack(small), np.stack(moving))


def through_mp4v(found: Iterable[Array], fps: float) -> Iterator[Array]:
    """Masks, uint8 [h w] each, as they come back from OpenCV's MPEG-4 video. UserError for odd sides."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "masks.mp4")
        writer: cv2.VideoWriter | None = None
        for mask in found:
            height, width = mask.shape
            if height % 2 or width % 2:
                raise UserError(f"masks of {width}x{height} cannot be stored as mp4v: give clips with even sides")
            if writer is None:
                code = cv2.VideoWriter.fourcc(*"mp4v")
                writer = cv2.VideoWriter(path, code, round(fps), (width, height), isColor=False)
                if not writer.isOpened():
                    raise UserError("this OpenCV cannot write mp4v videos; use the option masks=exact")
            writer.write(mask)
        if writer is not None:
            writer.release()
        reader = cv2.VideoCapture(path)
        try:
            while (got := reader.read())[0]:
                yield got[1][..., 0]
        finally:
            reader.release()


def compare(one: Motion, other: Motion) -> dict[str, Any]:
    """The four measures of two clips of equal length and size, and the curves of those that have one value a frame."""
    ious = [_iou(a, b) for a, b in zip(one.masks, other.masks, strict=True)]
    errors = [_mse(a, b) for a, b in zip(one.frames, other.frames, strict=True)]
    shares = one.masks.mean(0), other.masks.mean(0)  # of the time that something moves there
    union = float(np.maximum(*shares).sum())
    return {
        "spatiotemporal_iou": float(np.mean(ious)),
        "spatial_iou": _iou(one.masks.max(0), other.masks.max(0)),
        "weighted_iou": float(np.minimum(*shares).sum()) / union if union else 1.0,
        "mse": float(np.mean(errors)),
        "per_frame": {"spatiotemporal_iou": ious, "mse": errors},
    }


def _iou(one: Array, other: Array) -> float:
    """Of bool arrays; 1 if both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def _mse(one: Array, other: Array) -> float:
    """Of uint8 frames, in [0, 1]."""
    return float(np.square((one.astype(np.float32) - other.astype(np.float32)) / 255).mean(dtype=np.float64))


class Measure:
    """The measures of a clip against take 1, and of take 2 against take 1. The last clip is remembered: all five
    metrics ask for it."""

    def __init__(self, compressed: bool) -> None:
        self.compressed = compressed  # the masks, as in the official code
        self._last: tuple[View, dict[str, Any], dict[str, Any]] | None = None

    def __call__(self, view: View) -> tuple[dict[str, Any], dict[str, Any]]:
        """(the clip against take 1, take 2 against take 1). UserError for a clip that is not five seconds long."""
        if self._last and self._last[0].clip is view.clip and self._last[0].takes is view.takes:
            return self._last[1:]
        takes, fps = view.need("takes"), view.need("fps")
        if len(view.clip) != round(SECONDS * fps) or not math.isclose(len(view.clip) / fps, SECONDS, abs_tol=1e-3):
            raise UserError(
                f"Physics-IQ compares clips of {SECONDS:g} seconds; this one has {len(view.clip)} frames at {fps:g} "
                f"fps, which is {len(view.clip) / fps:.3f} seconds"
            )
        one = takes.first.frames(fps, SECONDS)
        start = next(one)
        size = start.shape[0] // SHRINK, start.shape[1] // SHRINK
        rate = fps if self.compressed else None
        ours = (np.ascontiguousarray(frame.permute(1, 2, 0).numpy()) for frame in view.clip)
        first = motion_of(itertools.chain([start], one), size, rate)
        second = motion_of(takes.second.frames(fps, SECONDS), size, rate)
        clip = motion_of(ours, size, rate)
        found = compare(first, clip), compare(first, second)
        self._last = view, *found
        return found


@cache
def _shared(compressed: bool) -> Measure:
    return Measure(compressed)


# --- all clips --------------------------------------------------------------------------------------------------------


class PhysicsMetric(ClipMetric):
    """One of the four measures. The physical variance is in the details, under `variance`."""

    def __init__(self, card: MetricCard, part: str, measure: Measure) -> None:
        super().__init__(card, EXTRACTOR)
        self.part, self.measure = part, measure

    def observe(self, view: View) -> dict[str, Any]:
        ours, variance = self.measure(view)
        row = {"value": ours[self.part], "variance": variance[self.part], **_labels(view)}
        curve = ours["per_frame"].get(self.part)
        return row | ({"per_frame": curve} if curve else {})

    def score(self, seen: Observations) -> Score:
        score = super().score(seen)
        score.details |= _by_group(seen.generated, _mean_of_values)
        return score


class PhysicsScore(ClipMetric):
    """The score: the four measures, divided by the physical variance. It is a function of means over all clips, so a
    single clip has no value of its own."""

    def __init__(self, card: MetricCard, measure: Measure) -> None:
        super().__init__(card, EXTRACTOR)
        self.measure = measure

    def observe(self, view: View) -> dict[str, Any]:
        ours, variance = self.measure(view)
        row = {part: ours[part] for part in PARTS} | {f"{part}_variance": variance[part] for part in PARTS}
        return row | _labels(view)

    def score(self, seen: Observations) -> Score:
        rows = _table(seen.generated)
        groups = seen.groups or [str(place) for place in range(len(rows))]
        design = Design(codes([]), codes(groups))
        score = score_arranged(_statistic, rows[:0], rows, design, lowest=0, highest=100)
        score.details |= dict(zip(COLUMNS, rows.mean(0).tolist(), strict=True))
        score.details |= _by_group(seen.generated, lambda part: score_of(_table(part)))
        return score

    def difference(self, first: Observations, second: Observations) -> Comparison:
        """By the values of both without each block of scenarios. UserError if there are fewer than three."""
        return compare_scores(self.score(first), self.score(second))


EXTRACTOR = NoNetwork("opencv running mean of frames", f"real size / {SHRINK}, bilinear")
COLUMNS = (*PARTS, *(f"{part}_variance" for part in PARTS))


def score_of(rows: Tensor) -> float:
    """Rows [n 8] with the columns COLUMNS -> the score, 0 to 100. UserError if the two takes have nothing in common."""
    mean = dict(zip(COLUMNS, rows.mean(0).tolist(), strict=True))
    for part in PARTS[:3]:
        if mean[f"{part}_variance"] == 0:
            raise UserError(f"the masks of the two takes never overlap ({part} is 0), so the score has no scale")
    ratios = [mean[part] / mean[f"{part}_variance"] for part in PARTS[:3]]
    score = 100 * (math.fsum(ratios) / 3 - (mean["mse"] - mean["mse_variance"]))
    return min(100.0, max(0.0, score))


def _statistic(real: Tensor, generated: Tensor, design: Design) -> float:
    return score_of(generated)


def _table(rows: Sequence[dict[str, Any]]) -> Tensor:
    return torch.tensor([[row[name] for name in COLUMNS] for row in rows], dtype=torch.float64)


def _labels(view: View) -> dict[str, str]:
    """View, category and scenario of a clip, from its data set."""
    truth = view.need("truth")
    return {name: str(truth[name]) for name in GROUPINGS}


def _mean_of_values(rows: Sequence[dict[str, Any]]) -> float:
    return math.fsum(row["value"] for row in rows) / len(rows)


def _by_group(rows: Sequence[dict[str, Any]], value: Callable[[Sequence[dict[str, Any]]], float]) -> dict[str, Any]:
    """The value of the clips of each view, category and scenario: by_view, by_category, by_scenario."""
    found: dict[str, Any] = {}
    for name in GROUPINGS:
        parts: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            parts[row[name]].append(row)
        found[f"by_{name}"] = {label: _value_or_none(value, part) for label, part in sorted(parts.items())}
    return found


def _value_or_none(value: Callable[[Sequence[dict[str, Any]]], float], rows: Sequence[dict[str, Any]]) -> Any:
    try:
        return {"value": value(rows), "n": len(rows)}
    except UserError as error:
        return {"value": None, "n": len(rows), "reason": str(error)}


def build(card: MetricCard, runtime: Any) -> ClipMetric:
    """Entry point of the cards `physics_iq...`; options: part, masks."""
    part, kind = card.options.get("part"), card.options.get("masks")
    if kind not in ("exact", "mp4v"):
        raise UserError(f'{card.name}: options.masks is "{kind}"; allowed: exact, mp4v')
    measure = _shared(kind == "mp4v")
    if part == "score":
        return PhysicsScore(card, measure)
    if part not in PARTS:
        raise UserError(f'{card.name}: options.part is "{part}"; allowed: score, {", ".join(PARTS)}')
    return PhysicsMetric(card, part, measure)
