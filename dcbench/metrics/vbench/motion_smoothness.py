"""VBench's motion_smoothness: is each second frame what AMT-S predicts from its two neighbours?

1 - mean absolute difference of frame and prediction / 255, over the frames 1, 3, 5 ... that have both neighbours.
"""

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, View
from dcbench.metrics.steps import step
from dcbench.metrics.vbench.amt import AMT, MULTIPLE
from dcbench.weights import fetch, fill, load_tensors, tensors_sha256

SMALLEST = 113  # pixels: padded to 128. Of less, the smallest correlations are one pixel wide, and the frame is NaN


class Interpolator:
    """The frame between two frames, by AMT-S."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        state = load_tensors(path)
        network = AMT()
        fill(network, state, path, problem="is not AMT-S: {} tensors differ")
        self.network, self.device = network.to(device).eval().requires_grad_(False), device
        self.weights_sha256 = tensors_sha256(state)

    @property
    def identity(self) -> dict[str, str]:
        how = f"RGB in [0, 1] at the clip's own size, repeated at its border to multiples of {MULTIPLE}; rounded down"
        return {"name": "AMT-S", "weights_sha256": self.weights_sha256, "preprocessing": how}

    @torch.inference_mode()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """uint8 [3 h w] twice -> uint8 [3 h w]. Fractions of a grey level are cut, as VBench does."""
        height, width = first.shape[-2:]
        down, right = -height % MULTIPLE, -width % MULTIPLE
        top, left = down // 2, right // 2
        pair = torch.stack([first, second]).to(self.device) / 255
        pair = F.pad(pair, (left, right - left, top, down - top), mode="replicate")
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            made = self.network(pair[:1], pair[1:])[0, :, top : top + height, left : left + width]
        return (made * 255).clamp(0, 255).to(torch.uint8).cpu()


class MotionSmoothness(ClipMetric):
    """1 for a clip whose every second frame is predicted exactly."""

    extractor: Interpolator

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value", "per_frame": of the frames 1, 3, 5 ... that have both neighbours}"""
        clip = self.check(view.clip)
        height, width = clip.shape[-2:]
        if len(clip) < 3 or min(height, width) < SMALLEST:
            raise UserError(
                f"{self.card.name}: a clip of {len(clip)} frames of {height}x{width}; it needs 3 frames, and "
                f"{SMALLEST} pixels"
            )
        per_frame = [
            1 - step(clip[middle], self.extractor(clip[middle - 1], clip[middle + 1])) / 255
            for middle in range(1, len(clip) - 1, 2)
        ]
        return {"value": math.fsum(per_frame) / len(per_frame), "per_frame": per_frame}


@cache
def _shared(path: Path, device: str) -> Interpolator:
    return Interpolator(path, device)


def build(card: MetricCard, runtime: Any) -> MotionSmoothness:
    """Entry point of `motion_smoothness`."""
    return MotionSmoothness(card, _shared(fetch(card.weights[0], runtime.offline), runtime.device))
