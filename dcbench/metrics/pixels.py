"""PSNR, SSIM and squared error: of the input image and the frames, or of a clip and its true clip. No weights.

All numbers are of RGB frames, 0 to 255, at the clip's own size. A frame's value is over all pixels and colours, and the
value of a clip is the mean over its frames. SSIM is Wang et al., IEEE TIP 2004, eq. 13: Gaussian window of 11 pixels,
sigma 1.5, at the places where the window lies inside the frame.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio

from dcbench.catalogue import MetricCard
from dcbench.clips import resize
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, HasIdentity, NoNetwork, View

WINDOW = 11
HIGHEST = 100.0  # dB, for equal pictures, whose PSNR is infinite

Frames = Literal["all", "middle", "between"]
Measure = Callable[[Tensor, Tensor], Tensor]  # uint8 [t 3 h w] twice -> float64 [t]


def mse_of(frames: Tensor, others: Tensor) -> Tensor:
    """uint8 [t 3 h w] twice -> float64 [t]: mean squared difference of pixels in [0, 1]."""
    return ((frames.double() - others.double()) / 255).square().mean((1, 2, 3))


@torch.inference_mode()
def psnr_of(frames: Tensor, others: Tensor) -> Tensor:
    """uint8 [t 3 h w] twice -> float64 [t], dB; at most 100, the value of equal frames."""
    found = peak_signal_noise_ratio(frames.double(), others.double(), 255.0, reduction="none", dim=(1, 2, 3))
    return found.clamp(max=HIGHEST)


def ssim_of(frames: Tensor, others: Tensor) -> Tensor:
    """uint8 [t 3 h w] twice -> float64 [t], in [-1, 1]. UserError for frames that are smaller than the window.

    By scikit-image: torchmetrics' mean counts a mirrored border too (0.1 away at 64 pixels), and takes 25 times longer.
    """
    if min(frames.shape[-2:]) < WINDOW:
        height, width = frames.shape[-2:]
        raise UserError(f"frames of {height}x{width}; the window of SSIM needs {WINDOW} pixels")
    pairs = zip(frames.cpu().numpy(), others.cpu().numpy(), strict=True)
    return torch.tensor([_ssim(frame, other) for frame, other in pairs], dtype=torch.float64)


def _ssim(frame: np.ndarray, other: np.ndarray) -> float:
    how: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(structural_similarity(frame, other, data_range=255, channel_axis=0, **how))  # type: ignore[arg-type]


def fitted(image: Tensor, clip: Tensor) -> Tensor:
    """An image uint8 [3 h w] at the size of a clip [t 3 h w]: [3 h w]."""
    return resize(image[None], clip.shape[-2], clip.shape[-1])[0]


class OfImage(ClipMetric):
    """The input image and each frame: does the clip stay with its picture? A still picture has the best value."""

    version = 2  # 1: SSIM by torchmetrics, which counts a mirrored border

    def __init__(self, card: MetricCard, measure: Measure, extractor: HasIdentity) -> None:
        super().__init__(card, extractor)
        self.measure = measure

    def observe(self, view: View) -> dict[str, Any]:
        clip = self.check(view.clip)
        found = self.measure(clip, fitted(view.need("image"), clip).expand_as(clip))
        return {"value": float(found.mean()), "per_frame": found.tolist()}


class OfFirstFrame(OfImage):
    """The input image and the first frame: does the clip begin with its picture?"""

    version = 1

    def observe(self, view: View) -> dict[str, Any]:
        clip = self.check(view.clip)
        return {"value": float(self.measure(clip[:1], fitted(view.need("image"), clip)[None])[0])}


def known_frames(card: MetricCard) -> Frames:
    """A card's option `frames`. UserError for another value."""
    given = card.options.get("frames", "all")
    if given not in get_args(Frames):
        raise UserError(f'{card.name}: frames is "{given}"; allowed: {", ".join(get_args(Frames))}')
    return given  # type: ignore[return-value]


def counted(frames: Frames, number: int) -> slice:
    """Which frames of a clip count: all; the middle one, number // 2; or those between the first and the last.

    UserError for a clip without a frame between its ends.
    """
    if frames == "between" and number < 3:
        raise UserError(f'frames = "between": a clip of {number} frames has none between its first and its last')
    return {"all": slice(None), "middle": slice(number // 2, number // 2 + 1), "between": slice(1, -1)}[frames]


def summary_of(frames: Frames, found: list[float]) -> dict[str, Any]:
    """The observation of a clip, from the values of the frames that count, at least one."""
    value = sum(found) / len(found)
    if frames == "middle":
        return {"value": value}
    if frames == "between":
        return {"value": value, "per_frame": found}
    later = found[1:] or found
    return {"value": value, "without_first": sum(later) / len(later), "per_frame": found}


class OfReference(ClipMetric):
    """Each frame and the frame of the true clip at the same time.

    The card's option `frames` says which count: see `counted`. With "all", `without_first` in the details is the mean
    without the first frame, which shows the input image in I2V.
    """

    def __init__(self, card: MetricCard, measure: Measure, extractor: HasIdentity) -> None:
        super().__init__(card, extractor)
        self.measure = measure
        self.frames: Frames = known_frames(card)
        _ = self.takes_best  # an unknown value is an error now, and not after the clips are made

    def observe(self, view: View) -> dict[str, Any]:
        clip, reference = self.check(view.clip), self.check(view.need("reference"))
        if clip.shape != reference.shape:
            raise UserError(f"{self.card.name}: the clip has {list(clip.shape)}, the reference {list(reference.shape)}")
        some = counted(self.frames, len(clip))
        return summary_of(self.frames, self.measure(clip[some], reference[some]).tolist())


MEASURES: dict[str, tuple[Measure, str]] = {
    "psnr": (psnr_of, "PSNR in dB, peak 255, at most 100"),
    "ssim": (ssim_of, f"scikit-image SSIM, gaussian window {WINDOW}, inside the frame"),
    "mse": (mse_of, "mean squared difference of pixels in [0, 1]"),
}
OF = {
    "image": (OfImage, "RGB 0..255 at the clip's own size, the image resized to it"),
    "first_frame": (OfFirstFrame, "RGB 0..255 at the clip's own size, the image resized to it"),
    "reference": (OfReference, "RGB 0..255 at the clip's own size"),
}


def build(card: MetricCard, runtime: Any) -> ClipMetric:
    """Entry point of the cards psnr, ssim, ssim_image, first_frame_psnr and so on; options: measure, of, frames."""
    measure, of = card.options.get("measure"), card.options.get("of")
    if measure not in MEASURES or of not in OF:
        raise UserError(
            f'{card.name}: measure is "{measure}" and of is "{of}"; allowed: {", ".join(MEASURES)}, and {", ".join(OF)}'
        )
    (function, name), (metric, how) = MEASURES[measure], OF[of]
    return metric(card, function, NoNetwork(name, how))
