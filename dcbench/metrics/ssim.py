"""SSIM of the input image and each frame. It needs no weights. `st_lpips_image` is nearer to PIC.

Mean over frames, like PIC, of SSIM (Wang et al., IEEE TIP 2004, eq. 13; Gaussian window of 11 pixels, sigma 1.5,
mirrored border as in torchmetrics). SSIM compares pixels at the same position, so motion lowers it more than PIC: read
it together with `motion`.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from dcbench.catalogue import MetricCard
from dcbench.clips import resize
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, NoNetwork, View

WINDOW = 11


class SsimImage(ClipMetric):
    """Mean SSIM of input image and frame, in [-1, 1]; a still picture scores 1."""

    def observe(self, view: View) -> dict[str, Any]:
        clip, image = self.check(view.clip), view.need("image")
        height, width = clip.shape[-2:]
        if min(height, width) < WINDOW:
            raise UserError(f"{self.card.name}: frames of {height}x{width}; its window needs {WINDOW} pixels")
        found = ssim_of(clip, resize(image[None], height, width).expand_as(clip))
        return {"value": float(found.mean()), "per_frame": found.tolist()}


def ssim_of(frames: Tensor, others: Tensor) -> Tensor:
    """uint8 [t 3 h w] twice, at least WINDOW pixels high and wide -> float64 [t]"""
    with torch.inference_mode():
        found = ssim(frames.double(), others.double(), data_range=255.0, reduction="none")
    assert isinstance(found, Tensor)
    return found


def build(card: MetricCard, runtime: Any) -> SsimImage:
    """Entry point of the card `ssim_image`."""
    how = "RGB 0..255 at the clip's own size, the image resized to it"
    return SsimImage(card, NoNetwork(f"torchmetrics SSIM, gaussian window {WINDOW}", how))
