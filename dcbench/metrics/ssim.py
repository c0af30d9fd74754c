"""SSIM of the input image and each frame: needs no weights, so it stands in for PIC where DreamSim's are not to be had.

Mean over frames of SSIM (Wang et al., IEEE TIP 2004, eq. 13; gaussian window of 11 pixels, sigma 1.5, mirrored at the
border as torchmetrics does), as PIC is a mean over frames. It compares pixels at one place, so it falls with motion
faster than PIC does: read it beside `motion`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure as ssim

from dcbench.catalogue import MetricCard
from dcbench.clips import resize
from dcbench.errors import UserError
from dcbench.metrics.per_clip import PerClipMetric, check_inputs

WINDOW = 11


class Ssim:
    """What computes the similarity; its identity is part of every score."""

    identity = {
        "name": f"torchmetrics SSIM, gaussian window {WINDOW}",
        "weights_sha256": "",
        "preprocessing": "RGB 0..255 at the clip's own size, the image resized to it",
    }


class SsimImage(PerClipMetric):
    """Mean SSIM of input image and frame, in [-1, 1]; a still picture scores 1."""

    extractor = Ssim()

    def extract(
        self, clips: Sequence[Tensor], images: Sequence[Tensor] | None = None, prompts: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        check_inputs(self.card.name, clips, images, needs=("image",))
        assert images is not None
        rows = []
        for clip, image in zip(clips, images, strict=True):
            height, width = clip.shape[-2:]
            if min(height, width) < WINDOW:
                raise UserError(f"{self.card.name}: frames of {height}x{width}; its window needs {WINDOW} pixels")
            target = resize(image[None], height, width).double().expand_as(clip)
            with torch.inference_mode():
                found = ssim(clip.double(), target, data_range=255.0, reduction="none")
            assert isinstance(found, Tensor)
            rows.append({"value": float(found.mean()), "per_frame": found.tolist()})
        return rows


def build(card: MetricCard, runtime: Any) -> SsimImage:
    """Entry point of the card `ssim_image`."""
    return SsimImage(card)
