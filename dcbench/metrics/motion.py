"""Amount and quality of motion, by dense optical flow. Unlike other metrics, motion does not reward a still picture.

motion: mean length of the flow between consecutive frames, in pixels at a short side of 256 (dynamic degree). It is per
frame step, not per second, so compare only clips of one protocol.
warp_error: mean squared difference of a frame and the next frame warped back along the flow, over visible pixels
(Lai et al., ECCV 2018).
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, View

SHORT_SIDE = 256
Array = np.ndarray
Kind = Literal["motion", "warp_error"]


class OpticalFlow:
    """OpenCV's DIS flow (Kroeger et al., ECCV 2016), medium preset: deterministic, no weights."""

    def __init__(self, keep: int = 2) -> None:
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        self._keep = keep
        self._known: OrderedDict[bytes, list[Array]] = OrderedDict()

    @property
    def identity(self) -> dict[str, str]:
        return {
            "name": "opencv DIS optical flow, medium",
            "weights_sha256": "",
            "preprocessing": f"area resize to a short side of {SHORT_SIDE}, grey; flow per frame step",
        }

    def __call__(self, first: Array, second: Array) -> Array:
        """Grey uint8 [h w], [h w] -> float32 [h w 2]: displacement (x, y) of each pixel from first to second."""
        return self._flow.calc(first, second, np.zeros((*first.shape, 2), np.float32))

    def along(self, grey: Sequence[Array]) -> list[Array]:
        """Flow from each frame to the next. The last `keep` clips are cached, because both metrics use it."""
        key = hashlib.blake2b(b"".join(frame.tobytes() for frame in grey)).digest() + str(grey[0].shape).encode()
        if key not in self._known:
            self._known[key] = [self(a, b) for a, b in pairwise(grey)]
            while len(self._known) > self._keep:
                self._known.popitem(last=False)
        return self._known[key]


def prepare(clip: Tensor) -> list[Array]:
    """uint8 [t 3 h w] -> RGB uint8 [h w 3] frames with a short side of 256."""
    height, width = clip.shape[-2:]
    scale = SHORT_SIDE / min(height, width)
    size = (max(SHORT_SIDE, round(width * scale)), max(SHORT_SIDE, round(height * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    frames = [np.ascontiguousarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in clip]
    return frames if (width, height) == size else [cv2.resize(frame, size, interpolation=how) for frame in frames]


def warp_back(second: Array, flow: Array) -> Array:
    """Sample the second image along the flow. Without error, the result equals the first image where visible."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return cv2.remap(
        second, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0
    )


def visible(flow: Array, backward: Array) -> Array:
    """Mask of pixels that stay in the frame and are not occluded: both flows cancel (Ruder et al., eq. 5)."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    to_x, to_y = x + flow[..., 0], y + flow[..., 1]
    inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    returned = warp_back(backward, flow)
    away = np.square(flow + returned).sum(-1)
    return inside & (away <= 0.01 * (np.square(flow).sum(-1) + np.square(returned).sum(-1)) + 0.5)


def measure_motion(clip: Tensor, flow: OpticalFlow) -> dict[str, Any]:
    """uint8 [t 3 h w] -> {"value": mean px per step, "top5": mean of the fastest 5 % of pixels, "per_frame"}."""
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in prepare(clip)]
    lengths = [np.linalg.norm(step, axis=-1) for step in flow.along(grey)]
    per_frame = [float(length.mean()) for length in lengths]
    fastest = [float(np.sort(length, axis=None)[-max(1, length.size // 20) :].mean()) for length in lengths]
    return {"value": float(np.mean(per_frame)), "top5": float(np.mean(fastest)), "per_frame": per_frame}


def measure_warp_error(clip: Tensor, flow: OpticalFlow) -> dict[str, Any]:
    """uint8 [t 3 h w] -> {"value": mean squared error in [0, 1]², "visible": share of pixels, "per_frame"}."""
    frames = prepare(clip)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    per_frame, seen = [], []
    for index, forward in enumerate(flow.along(grey)):
        backward = flow(grey[index + 1], grey[index])
        shown = visible(forward, backward)
        first, second = frames[index].astype(np.float32) / 255, frames[index + 1].astype(np.float32) / 255
        error = np.square(warp_back(second, forward) - first).mean(-1)
        per_frame.append(float(error[shown].mean()) if shown.any() else float(np.square(second - first).mean()))
        seen.append(float(shown.mean()))
    return {"value": float(np.mean(per_frame)), "visible": float(np.mean(seen)), "per_frame": per_frame}


MEASURES = {  # and the version of each. Version 1 of the warping error had a detail `flicker`, now a metric (steps.py)
    "motion": (measure_motion, 1),
    "warp_error": (measure_warp_error, 2),
}


class MotionMetric(ClipMetric):
    """Motion or warping error of each clip."""

    extractor: OpticalFlow

    def __init__(self, card: MetricCard, kind: Kind) -> None:
        super().__init__(card, shared())
        self.measure, self.version = MEASURES[kind]

    def observe(self, view: View) -> dict[str, Any]:
        with torch.inference_mode():
            return self.measure(self.check(view.clip, min_frames=2), self.extractor)


@cache
def shared() -> OpticalFlow:
    return OpticalFlow()


def build(card: MetricCard, runtime: Any) -> MotionMetric:
    """Entry point of the cards `motion` and `warp_error`; options: kind."""
    kind = card.options.get("kind")
    if kind not in MEASURES:
        raise UserError(f'{card.name}: options.kind is "{kind}"; allowed: motion, warp_error')
    return MotionMetric(card, kind)
