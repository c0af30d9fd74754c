"""VBench's aesthetic_quality: LAION's linear predictor on CLIP ViT-L/14, mean over all frames, over ten.

The head was fitted to ratings of pictures from 1 to 10. Its value is not limited to that range.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcbench.catalogue import MetricCard
from dcbench.files import digest
from dcbench.metrics.base import ClipMetric, View
from dcbench.metrics.vbench import embedders
from dcbench.metrics.vbench.embedders import FrameEmbedder
from dcbench.weights import fetch, fill, load_tensors, tensors_sha256

FEATURES = 768  # of CLIP ViT-L/14


class Aesthetics:
    """The rating of frames: CLIP's features at length one, and one linear layer (sa_0_4_vit_l_14_linear.pth)."""

    def __init__(self, embedder: FrameEmbedder, head: Path, features: int = FEATURES) -> None:
        state = load_tensors(head)
        self.layer = nn.Linear(features, 1)
        fill(self.layer, state, head, problem="is not LAION's linear head: {} tensors differ")
        self.layer.double().requires_grad_(False)
        self.embedder = embedder
        self.identity = embedder.identity | {
            "name": f"{embedder.name}, LAION's linear head",
            "weights_sha256": digest([embedder.weights_sha256, tensors_sha256(state)], 64),
        }

    @torch.inference_mode()
    def __call__(self, frames: Sequence[Tensor]) -> Tensor:
        """uint8 [3 h w] each -> float64 [n], on LAION's scale of 1 to 10."""
        features = self.embedder.frames(frames)
        return self.layer(features / features.norm(dim=-1, keepdim=True))[:, 0]


class AestheticQuality(ClipMetric):
    """Mean over frames of the rating / 10."""

    extractor: Aesthetics
    extractor_options = ("model",)

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value", "per_frame"}"""
        per_frame = (self.extractor(list(self.check(view.clip))) / 10).tolist()
        return {"value": math.fsum(per_frame) / len(per_frame), "per_frame": per_frame}


def build(card: MetricCard, runtime: Any) -> AestheticQuality:
    """Entry point of `aesthetic_quality`; options: model."""
    embedder = embedders.clip(card, runtime)
    return AestheticQuality(card, Aesthetics(embedder, fetch(card.weights[1], runtime.offline)))
