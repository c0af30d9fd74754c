"""What the per-clip metrics share: images for a network, remembered embeddings, and the score of a list of values."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.clips import check_clip
from dcbench.errors import UserError
from dcbench.metrics.base import Score
from dcbench.metrics.functional import mean_interval


def to_pil(frame: Tensor) -> Image.Image:
    """uint8 [3 h w] -> RGB image"""
    return Image.fromarray(frame.permute(1, 2, 0).contiguous().cpu().numpy())


class RememberedFrames:
    """`embed` applied to each different frame once, the last few clips remembered.

    Metrics that share an extractor see a clip one after the other; equal frames get equal embeddings, bit by bit.
    """

    def __init__(self, embed: Callable[[Sequence[Tensor]], Tensor], keep: int = 256) -> None:
        self._embed, self._keep = embed, keep
        self._known: OrderedDict[bytes, Tensor] = OrderedDict()

    def __call__(self, frames: Sequence[Tensor]) -> Tensor:
        """uint8 [3 h w] each -> float64 [n d]"""
        keys = [_pixels(frame) for frame in frames]
        new = {key: frame for key, frame in zip(keys, frames, strict=True) if key not in self._known}
        if new:
            for key, row in zip(new, self._embed(list(new.values())).double().cpu(), strict=True):
                self._known[key] = row
        rows = torch.stack([self._known[key] for key in keys])
        for key in keys:
            self._known.move_to_end(key)
        while len(self._known) > max(self._keep, len(frames)):
            self._known.popitem(last=False)
        return rows


def _pixels(frame: Tensor) -> bytes:
    return hashlib.blake2b(str(list(frame.shape)).encode() + frame.contiguous().numpy().tobytes()).digest()


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """[..., d], [..., d] -> [...]: 1 - |a/|a| - b/|b||² / 2, which is exactly 1 for equal vectors."""
    a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
    return 1 - (a - b).square().sum(-1) / 2


def check_inputs(
    metric: str,
    clips: Sequence[Tensor],
    images: Sequence[Tensor] | None = None,
    prompts: Sequence[str] | None = None,
    needs: Sequence[str] = (),
) -> None:
    """Clips are uint8 [t 3 h w]; what the metric needs is there, one a clip."""
    for clip in clips:
        check_clip(clip, f"{metric}: clip")
    for name, given in (("image", images), ("prompt", prompts)):
        if name in needs and (given is None or len(given) != len(clips)):
            raise UserError(f"{metric} needs one {name} for each of the {len(clips)} clips; got {len(given or [])}")


def score_values(values: Sequence[dict[str, Any]], groups: Sequence[str] | None = None, n_reference: int = 0) -> Score:
    """Mean over clips of "value", with a BCa interval over source videos; other numbers are averaged into details."""
    if not values:
        raise UserError("no clips to average over")
    numbers = [float(value["value"]) for value in values]
    if not np.isfinite(numbers).all():
        bad = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise UserError(f"the value of clip {bad} is {numbers[bad]}")
    interval = mean_interval(numbers, groups)
    details: dict[str, Any] = {}
    for key, first in sorted(values[0].items()):  # rows that were read again are sorted too
        column = [value[key] for value in values]
        if key != "value" and isinstance(first, float):
            details[key] = float(np.mean(column))
        elif isinstance(first, list) and len({len(row) for row in column}) == 1:
            details[key] = [float(mean) for mean in np.mean(column, axis=0)]
    method = "BCa bootstrap over source videos" if interval else "none: fewer than 3 independent clips"
    return Score(float(np.mean(numbers)), interval, method, n_reference, len(values), (), details)


class PerClipMetric:
    """Base of the per-clip metrics: a card and the score of a list of values."""

    def __init__(self, card: MetricCard) -> None:
        self.card = card

    def score(self, values: Sequence[dict[str, Any]], groups: Sequence[str] | None = None) -> Score:
        return score_values(values, groups)
