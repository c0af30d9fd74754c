"""VBench's dynamic_degree: the share of clips that move, by RAFT's optical flow (arXiv 2003.12039).

Frames at about 8 fps: every max(1, round(fps / 8))-th. A pair of neighbours moves if the mean of its largest 5 % of
flow magnitudes is above 6 pixels at a short side of 256. A clip moves if round(frames / 4) pairs do. The network is
torchvision's raft_large, which is the authors' network under other names (see `torchvision_names`).
"""

import re
from collections.abc import Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.optical_flow import raft_large

from dcbench.catalogue import MetricCard
from dcbench.clips import to_float
from dcbench.errors import UserError
from dcbench.metrics.base import ShareMetric, View
from dcbench.weights import fetch, fill, load_tensors, tensors_sha256

RATE = 8  # frames a second
UPDATES = 20
SHARE = 0.05  # of the pixels of a pair, those with the largest flow
PIXELS, SHORT_SIDE = 6.0, 256.0  # a pair moves above so many pixels, at this short side
PAIRS, FRAMES = 4, 16  # a clip moves if so many pairs of so many frames move
SMALLEST = 121  # pixels: padded to 128, from which torchvision computes correlations at four sizes

RENAMED = (
    (r"^module\.", ""),
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"_encoder\.conv1\.", "_encoder.convnormrelu.0."),
    (r"_encoder\.norm1\.", "_encoder.convnormrelu.1."),
    (r"_encoder\.conv2\.", "_encoder.conv."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"(layer\d\.\d)\.norm([12])\.", r"\1.convnormrelu\2.1."),
    (r"^update_block\.encoder\.conv([cf])(\d)\.", r"update_block.motion_encoder.conv\1\2.0."),
    (r"motion_encoder\.convc", "motion_encoder.convcorr"),
    (r"motion_encoder\.convf(?=\d)", "motion_encoder.convflow"),
    (r"^update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"^update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"^update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"^update_block\.mask\.2\.", "mask_predictor.conv."),
)


def torchvision_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of raft-things.pth under torchvision's names. Its norm3 is the norm of a shortcut once more."""
    renamed = {}
    for name, value in state.items():
        for pattern, into in RENAMED:
            name = re.sub(pattern, into, name)
        if ".norm3." not in name:
            renamed[name] = value
    return renamed


class Raft:
    """RAFT of pairs of frames, from torchvision's file or from the authors'."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        state = load_tensors(path)
        if not any(name.startswith("feature_encoder.") for name in state):
            state = torchvision_names(state)
        network = raft_large(weights=None)
        fill(network, state, path, problem="is not RAFT's large network: {} tensors differ")
        self.network, self.device = network.to(device).eval().requires_grad_(False), device
        self.weights_sha256 = tensors_sha256(state)

    @property
    def identity(self) -> dict[str, str]:
        how = f"RGB in [-1, 1] at the clip's own size, repeated at its border to multiples of 8; {UPDATES} updates"
        return {"name": "RAFT large", "weights_sha256": self.weights_sha256, "preprocessing": how}

    @torch.inference_mode()
    def __call__(self, first: Tensor, second: Tensor) -> Tensor:
        """uint8 [3 h w] twice -> float32 [2 h' w']: the flow in pixels, with the border."""
        height, width = first.shape[-2:]
        down, right = -height % 8, -width % 8
        border = (right // 2, right - right // 2, down // 2, down - down // 2)
        pair = to_float(torch.stack([first, second]).to(self.device))
        pair = F.pad(pair, border, mode="replicate")
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return self.network(pair[:1], pair[1:], num_flow_updates=UPDATES)[-1][0].cpu()


def largest(flow: Tensor) -> float:
    """float [2 h w] -> the mean of the largest 5 % of magnitudes, pixels."""
    magnitudes = flow.square().sum(0).sqrt().flatten()
    return float(magnitudes.topk(int(len(magnitudes) * SHARE)).values.mean(dtype=torch.float64))


def verdict(per_pair: list[float], short_side: int) -> dict[str, Any]:
    """The largest flows of all pairs -> {"value": 1.0 or 0.0, "threshold": pixels, "moving", "needed": pairs}.

    Of two frames 0 pairs are needed, so that such a clip always moves, as in VBench. One frame never moves.
    """
    threshold = PIXELS * short_side / SHORT_SIDE
    moving, needed = sum(found > threshold for found in per_pair), round(PAIRS * (len(per_pair) + 1) / FRAMES)
    moves = bool(per_pair) and moving >= needed
    return {"value": float(moves), "threshold": threshold, "moving": moving, "needed": needed}


class DynamicDegree(ShareMetric):
    """1 if a clip moves, else 0. The score is the share of clips that move."""

    extractor: Raft
    extractor_options = ("checkpoint",)

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value": 1.0 or 0.0, "per_pair": the largest flows, and what `verdict` adds}"""
        clip = self.check(view.clip, min_frames=2)
        if min(clip.shape[-2:]) < SMALLEST:
            height, width = clip.shape[-2:]
            raise UserError(f"{self.card.name}: frames of {height}x{width}; RAFT needs {SMALLEST} pixels or more")
        frames = clip[:: max(1, round(view.need("fps") / RATE))]
        per_pair = [largest(self.extractor(*pair)) for pair in pairwise(list(frames))]
        return {**verdict(per_pair, min(clip.shape[-2:])), "per_pair": per_pair}


@cache
def _shared(path: Path, device: str) -> Raft:
    return Raft(path, device)


def build(card: MetricCard, runtime: Any) -> DynamicDegree:
    """Entry point of `dynamic_degree`; options: checkpoint (a file, such as raft-things.pth; "" = the card's)."""
    named = card.options.get("checkpoint", "")
    path = Path(named).expanduser() if named else fetch(card.weights[0], runtime.offline)
    return DynamicDegree(card, _shared(path, runtime.device))
