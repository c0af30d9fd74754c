"""FID of frames: the Fréchet distance of InceptionV3 features of the single frames of two sets of clips.

The network is the one of the first FID (Heusel et al., arXiv 1706.08500): TensorFlow's Inception of 2015-12-05, ported
to PyTorch. It differs from torchvision's InceptionV3 in its weights and in the pools of some blocks.
"""

from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import inception_v3
from torchvision.models.inception import BasicConv2d, InceptionA, InceptionB, InceptionC, InceptionD, InceptionE

from dcbench.catalogue import MetricCard
from dcbench.clips import check_clip
from dcbench.errors import UserError, near_match
from dcbench.metrics import functional as fn
from dcbench.metrics.base import FeatureExtractor, Observations, SetMetric, score_statistic
from dcbench.metrics.design import Design
from dcbench.metrics.extractors import to_square
from dcbench.metrics.statistics import Comparison, compare_scores
from dcbench.record import Score
from dcbench.weights import fetch, fill, load_tensors, tensors_sha256

Frames = Literal["all", "middle", "first", "between"]
Resize = Literal["clean", "legacy"]
SIZE, FEATURES = 299, 2048
RECOMMENDED_CLIPS = 2048


# Network -------------------------------------------------------------------------------------------------------------


def average(x: Tensor) -> Tensor:
    """TensorFlow's average pool: the padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(average(x))]


class BlockC(InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(average(x))]


class BlockE(InceptionE):
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(average(x))]


class LastBlock(InceptionE):
    """The last block of the TensorFlow graph has a max pool in its pool branch."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [*super()._forward(x)[:-1], self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))]


def build_inception() -> nn.Module:
    """float [b 3 299 299] in [-1, 1] -> features [b 2048], the average pool before the classifier."""
    blocks = [BasicConv2d, BlockA, InceptionB, BlockC, InceptionD, BlockE, nn.Identity]  # the last one is not used
    network = inception_v3(
        weights=None, aux_logits=False, transform_input=False, init_weights=False, inception_blocks=blocks
    )
    network.Mixed_7c = LastBlock(2048)
    network.fc = nn.Identity()  # type: ignore[assignment]
    return network.eval().requires_grad_(False)


class FrameExtractor(FeatureExtractor):
    """Features of the chosen frames of a clip, [t 2048]."""

    name = "inception-v3-2015-12-05"
    num_features = FEATURES

    def __init__(
        self, network: nn.Module, frames: Frames = "all", resize: Resize = "clean", device: str = "cpu"
    ) -> None:
        super().__init__()
        for option, value, allowed in (("frames", frames, get_args(Frames)), ("resize", resize, get_args(Resize))):
            if value not in allowed:
                hint = near_match(str(value), allowed)
                raise UserError(f'fid: options.{option} is "{value}"; allowed: {", ".join(allowed)}.{hint}')
        self.frames: Frames = frames
        self.resize: Resize = resize
        self.network = network.to(device).to(memory_format=torch.channels_last)  # three times as fast on a CPU
        self.weights_sha256 = tensors_sha256(network.state_dict())
        self.preprocessing = f"{frames} frames, {resize} resize to {SIZE}"
        self.frames_at_once = 16 if torch.device(device).type == "cpu" else 128
        self.batch_size = 1

    def chosen(self, number: int) -> list[int]:
        """The indices of the frames that count, of a clip of `number` frames."""
        if self.frames == "between" and number < 3:
            raise UserError(f'fid: frames = "between", but a clip of {number} frames has none between its ends')
        every = list(range(number))
        return {"all": every, "middle": [number // 2], "first": [0], "between": every[1:-1]}[self.frames]

    def prepare(self, frames: Tensor) -> Tensor:
        """uint8 [n 3 h w] -> float32 [n 3 299 299] in [-1, 1)

        clean: bicubic with antialias, not rounded, as in clean-fid (arXiv 2104.11222). legacy: TensorFlow 1's bilinear
        without half-pixel centres, as in the first FID and torch-fidelity.
        """
        x = frames.float()
        if self.resize == "clean":
            x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", align_corners=False, antialias=True).clamp(0, 255)
        else:
            x = to_square(x, "tf1", SIZE)
        return (x - 128) / 128

    @torch.inference_mode()
    def forward(self, clips: Tensor) -> Tensor:
        """uint8 [b t 3 h w] -> float32 [b t' 2048], of the t' frames that count."""
        check_clip(clips.flatten(0, 1), "clips")
        device = next(self.network.parameters()).device
        of_clips = clips[:, self.chosen(clips.shape[1])]
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            rows = [
                self.network(self.prepare(part.to(device)).contiguous(memory_format=torch.channels_last)).float()
                for part in of_clips.flatten(0, 1).split(self.frames_at_once)
            ]
        return torch.cat(rows).unflatten(0, of_clips.shape[:2])


def load_inception(path: Path) -> nn.Module:
    """From pt_inception-2015-12-05-6726825d.pth. UserError if its tensors do not fit. Its classifier is not read."""
    network = build_inception()
    fill(network, load_tensors(path), path, ignored=("fc.",))
    return network


@cache
def frame_extractor(path: Path, frames: Frames, resize: Resize, device: str) -> FrameExtractor:
    """The extractor, shared by all metrics of this process."""
    return FrameExtractor(load_inception(path), frames, resize, device)


# Score ---------------------------------------------------------------------------------------------------------------


def score_frames(real: list[Tensor], generated: list[Tensor], design: Design | None = None) -> Score:
    """FID of the frames' features [t d] of each clip, with a delete-a-block jackknife interval.

    The frames of one clip depend on each other, so blocks are of whole clips, and of all clips of a group. `design`: of
    the clips; None: they are independent.
    """
    if not real or not generated:
        raise UserError(f"{len(real)} reference and {len(generated)} generated clips: nothing to compare")
    if design is None:
        design = Design.independent(*(torch.stack([clip.mean(0) for clip in side]) for side in (real, generated)))
    of_frames = Design(
        np.repeat(design.real, [len(clip) for clip in real]),
        np.repeat(design.generated, [len(clip) for clip in generated]),
    )
    rows = torch.cat(real), torch.cat(generated)
    score = score_statistic(_frechet, *rows, of_frames, lowest=0.0, biased=True)
    score.n_reference, score.n_generated = len(real), len(generated)
    score.details |= {
        "definition": "|μ1-μ2|² + tr(Σ1+Σ2-2√(Σ1Σ2)), covariances with n-1, float64",
        "frames": [len(side) for side in rows],
    }
    score.warnings = _warnings(score, min(map(len, rows)), rows[0].shape[1])
    return score


def _frechet(real: Tensor, generated: Tensor, design: Design) -> float:
    return fn.frechet_distance(real, generated, fast=True)


def _warnings(score: Score, frames: int, dimensions: int) -> list[str]:
    found, clips = [], min(score.n_reference, score.n_generated)
    if score.n_reference != score.n_generated:
        found.append(
            f"{score.n_reference} reference and {score.n_generated} generated clips: compare only with scores of the "
            "same two sizes"
        )
    if frames <= dimensions:
        found.append(
            f"{frames} frames span fewer than the {dimensions} feature dimensions: the covariances are singular"
        )
    if clips < RECOMMENDED_CLIPS:
        found.append(
            f"{frames} frames of {clips} clips: the frames of a clip resemble each other, so the distance is biased "
            f"upwards more than that of {frames} single images"
        )
    return found


class FrameDistance(SetMetric):
    """FID of the frames of generated and reference clips. An observation has a row for each frame: [t 2048]."""

    extractor: FrameExtractor
    biased = True

    def observation_shape(self, clip: Tensor) -> tuple[int, ...]:
        return (len(self.extractor.chosen(len(clip))), self.extractor.num_features)

    def score(self, seen: Observations) -> Score:
        return score_frames(seen.reference, seen.generated, seen.design)

    def difference(self, first: Observations, second: Observations) -> Comparison:
        return compare_scores(self.score(first), self.score(second))


def build_fid(card: MetricCard, runtime: Any) -> FrameDistance:
    """Entry point of the `fid` card; options: frames, resize."""
    path, options = fetch(card.weights[0], runtime.offline), card.options
    extractor = frame_extractor(path, options.get("frames", "all"), options.get("resize", "clean"), runtime.device)
    return FrameDistance(card, extractor)
