"""Shared code of the per-clip metrics: images, cached embeddings, cosines."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.metrics.base import ClipMetric, HasIdentity, View


def to_pil(frame: Tensor) -> Image.Image:
    """uint8 [3 h w] -> RGB image"""
    return Image.fromarray(frame.permute(1, 2, 0).contiguous().cpu().numpy())


class RememberedFrames:
    """Calls `embed` once for each different frame, and caches the last `keep` embeddings.

    Metrics that share an extractor reuse the cache. Equal frames get bit-identical embeddings.
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


class PerClipMetric(ClipMetric):
    """A metric with `extract(clips, images, prompts)`, the interface of dcbench 0.1 for user metrics.

    New metrics are a `ClipMetric` with `observe(view)`.
    """

    extractor: HasIdentity

    def __init__(self, card: MetricCard) -> None:
        self.card = card

    def extract(
        self, clips: Sequence[Tensor], images: Sequence[Tensor] | None, prompts: Sequence[str] | None
    ) -> list[dict[str, Any]]:
        """uint8 [t c h w], uint8 [c h w], text -> one JSON-able dict per clip with at least {"value": float}."""
        raise NotImplementedError

    def observe(self, view: View) -> dict[str, Any]:
        image, prompt = view.image, view.prompt
        return self.extract([view.clip], None if image is None else [image], None if prompt is None else [prompt])[0]
