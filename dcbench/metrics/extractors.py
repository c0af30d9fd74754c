"""Feature extractors: clips to features. An extractor includes all that changes the numbers: resize, range, weights."""

import math
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dcbench.clips import check_clip
from dcbench.errors import UserError, near_match
from dcbench.metrics.base import FeatureExtractor
from dcbench.metrics.i3d import MIN_FRAMES, load_i3d, weights_path

Preprocessing = Literal["squash", "crop", "tf1", "aa"]


def to_square(frames: Tensor, mode: Preprocessing, size: int = 224) -> Tensor:
    """float [n c h w] -> [n c size size], by one of the resizes that published FVD code uses.

    squash: half-pixel bilinear, no antialias (StyleGAN-V, cd-fvd, TATS, LVDM). aa: the same with antialias.
    tf1: TensorFlow 1's bilinear, no half-pixel centres. crop: resize the short side, centre crop (VideoGPT).
    """
    if mode == "tf1":
        return _legacy_bilinear(_legacy_bilinear(frames, size, -2), size, -1)
    if mode != "crop":
        return F.interpolate(frames, (size, size), mode="bilinear", align_corners=False, antialias=mode == "aa")
    height, width = frames.shape[-2:]
    scale = size / min(height, width)
    to = (size, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), size)
    frames = F.interpolate(frames, to, mode="bilinear", align_corners=False)
    top, left = (to[0] - size) // 2, (to[1] - size) // 2
    return frames[..., top : top + size, left : left + size]


def _legacy_bilinear(x: Tensor, size: int, axis: int) -> Tensor:
    """Resize one axis; output i samples input i · (old / size): TensorFlow 1's resize_bilinear, align_corners=False."""
    old = x.shape[axis]
    position = torch.arange(size, dtype=torch.float32, device=x.device) * (old / size)
    low = position.floor().long().clamp_(max=old - 1)
    high = (low + 1).clamp_(max=old - 1)
    weight = position - low
    if axis == -2:
        weight = weight[:, None]
    first, second = x.index_select(axis, low), x.index_select(axis, high)
    return first + (second - first) * weight


class I3DExtractor(FeatureExtractor):
    """400 Kinetics logits of I3D, averaged over time, no softmax: the features of FVD and KVD."""

    name = "i3d-kinetics400"
    num_features = 400
    min_frames = MIN_FRAMES

    def __init__(
        self, preprocessing: Preprocessing = "squash", weights: Path | None = None, device: str = "cpu"
    ) -> None:
        super().__init__()
        if preprocessing not in get_args(Preprocessing):
            allowed = get_args(Preprocessing)
            raise UserError(
                f'I3D preprocessing "{preprocessing}" is unknown.{near_match(preprocessing, allowed)} '
                f"Known: {', '.join(allowed)}."
            )
        self.mode: Preprocessing = preprocessing
        self.preprocessing = preprocessing
        network, self.weights_sha256 = load_i3d(weights)
        self.network = network.to(device).to(memory_format=torch.channels_last_3d)
        self.batch_size = 2 if torch.device(device).type == "cpu" else 16  # 2 is the fastest on a CPU

    def prepare(self, clips: Tensor) -> Tensor:
        """uint8 [b t c h w] -> float32 [b c t 224 224] in [-1, 1]"""
        b, t = clips.shape[:2]
        frames = to_square(clips.flatten(0, 1).float(), self.mode)
        return (frames * (2 / 255) - 1).unflatten(0, (b, t)).transpose(1, 2)

    @torch.inference_mode()
    def forward(self, clips: Tensor) -> Tensor:
        if clips.ndim != 5:
            raise ValueError(f"expected uint8 [b, t, 3, h, w], got {clips.dtype} {list(clips.shape)}")
        check_clip(clips.flatten(0, 1), "clips")
        if clips.shape[1] < MIN_FRAMES:
            raise UserError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {clips.shape[1]}")
        x = self.prepare(clips.to(next(self.network.parameters()).device)).contiguous(
            memory_format=torch.channels_last_3d
        )
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return self.network(x).float()


@cache
def _shared(preprocessing: Preprocessing, weights: Path, device: str) -> I3DExtractor:
    return I3DExtractor(preprocessing, weights, device)


def i3d_extractor(preprocessing: Preprocessing = "squash", device: str = "cpu") -> I3DExtractor:
    """The extractor, shared by all metrics of this process."""
    return _shared(preprocessing, weights_path(), device)
