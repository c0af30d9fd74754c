"""PSNR of the first generated frame and the input image: how well a model keeps its input image."""

import math
from typing import Any

from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.clips import resize
from dcbench.metrics.base import ClipMetric, NoNetwork, View

HIGHEST = 100.0  # dB, for equal pictures


def psnr(first: Tensor, second: Tensor) -> float:
    """PSNR in dB of two uint8 pictures of the same shape. At most 100, the value of equal pictures."""
    mse = float((first.float() - second.float()).square().mean())
    return min(HIGHEST, 10 * math.log10(255**2 / mse)) if mse else HIGHEST


class FirstFramePsnr(ClipMetric):
    """PSNR of the first frame in dB."""

    def observe(self, view: View) -> dict[str, Any]:
        first = self.check(view.clip)[0]
        image = resize(view.need("image")[None], first.shape[1], first.shape[2])[0]
        return {"value": psnr(first, image)}


def build(card: MetricCard, runtime: Any) -> FirstFramePsnr:
    """Entry point of the card `psnr_first`."""
    how = NoNetwork("PSNR, peak 255", "RGB 0..255 at the clip's own size, the image resized to it")
    return FirstFramePsnr(card, how)
