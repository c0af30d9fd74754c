"""The clip convention: uint8 [t, c, h, w] RGB at every interface; float only inside a model or an extractor."""

import hashlib
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dcbench.errors import UserError

ResizeMode = Literal["crop", "squash"]
TemporalPolicy = Literal["first", "nearest_time"]
Interpolation = Literal["bilinear", "bicubic", "nearest", "area_linear_light"]
GAMMA = 2.2  # of "area_linear_light"


def check_clip(clip: Tensor, what: str = "clip") -> Tensor:
    """Return `clip` if it is uint8 [t, 3, h, w]; otherwise raise a UserError that names `what`."""
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != 3 or 0 in clip.shape:
        raise UserError(
            f"{what}: got {str(clip.dtype).removeprefix('torch.')} {list(clip.shape)}, expected uint8 [t, 3, h, w]. "
            "Convert floats with dcbench.clips.to_uint8; move colour to the second axis with permute."
        )
    return clip


def to_float(clip: Tensor, low: float = -1.0) -> Tensor:
    """uint8 [...] -> float32 in [low, 1]: [-1, 1] by default, [0, 1] with low=0."""
    return clip.float().mul_((1 - low) / 255).add_(low)


def to_uint8(clip: Tensor, low: float = -1.0, truncate: bool = False) -> Tensor:
    """float [...] in [low, 1] -> uint8; clamped, then rounded (or truncated, as the released DynamiCrafter does)."""
    scaled = (clip.clamp(low, 1) - low) * (255 / (1 - low))
    return (scaled if truncate else scaled.round()).to(torch.uint8)


def crop_window(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int, int, int]:
    """Scaled size that covers the target, and the offset of the centre crop: (h, w, top, left)."""
    scale = max(to_height / height, to_width / width)
    h, w = max(to_height, round(height * scale)), max(to_width, round(width * scale))
    return h, w, (h - to_height) // 2, (w - to_width) // 2


def resize(
    clip: Tensor,
    height: int,
    width: int,
    mode: ResizeMode = "crop",
    interpolation: Interpolation = "bilinear",
    antialias: bool = True,
) -> Tensor:
    """[t, c, h, w] -> [t, c, height, width], same dtype; uint8 is rounded.

    "crop" scales until the frame covers the target, then crops the centre; "squash" ignores the aspect ratio.
    Published code uses both, and FVD differs by hundreds, so a protocol names its choice. UserError for another mode.
    "area_linear_light" is VIDIM-Bench's way, for uint8: see `_area_linear_light`. It crops first, so that both modes
    scale in one step.
    """
    if mode not in ("crop", "squash"):
        raise UserError(f"resize mode {mode!r}: expected 'crop' or 'squash'")
    if interpolation == "area_linear_light":
        window = centre_window(clip.shape[-2], clip.shape[-1], height, width) if mode == "crop" else None
        return _area_linear_light(clip, height, width, window)
    h, w, top, left = height, width, 0, 0
    if mode == "crop":
        h, w, top, left = crop_window(clip.shape[-2], clip.shape[-1], height, width)
    if (h, w) != clip.shape[-2:]:
        smooth = interpolation != "nearest"
        options = {"align_corners": False, "antialias": antialias} if smooth else {}
        out = F.interpolate(clip.float(), (h, w), mode=interpolation, **options)
        clip = out.round_().clamp_(0, 255).to(torch.uint8) if clip.dtype == torch.uint8 else out.to(clip.dtype)
    return clip[..., top : top + height, left : left + width].contiguous()


def centre_window(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int, int, int]:
    """The largest window of the target's shape around the centre, with even sides: (h, w, top, left).

    The centre is at height // 2 and width // 2, as in VIDIM-Bench. A side of one pixel stays.
    """
    wide = width * to_height >= height * to_width
    h = height if wide else width * to_height // to_width
    w = height * to_width // to_height if wide else width
    h, w = max(1, h // 2 * 2), max(1, w // 2 * 2)
    return h, w, height // 2 - h // 2, width // 2 - w // 2


def _area_linear_light(clip: Tensor, height: int, width: int, window: tuple[int, int, int, int] | None) -> Tensor:
    """uint8 [t 3 h w] -> uint8 [t 3 height width]: the mean over the area of each new pixel, of light.

    Grey levels become light by level ** 2.2 and are turned back after the resize (OpenCV's INTER_AREA; INTER_CUBIC to a
    larger width, as in VIDIM-Bench), rounded half up. `window`: (h, w, top, left) of the scaled part; None: all.
    """
    check_clip(clip, "resize by area_linear_light")
    if window is not None:
        h, w, top, left = window
        clip = clip[..., top : top + h, left : left + w]
    if clip.shape[-2:] == (height, width):
        return clip.contiguous()
    how = cv2.INTER_AREA if width <= clip.shape[-2] else cv2.INTER_CUBIC
    frames = []
    for frame in clip.permute(0, 2, 3, 1).numpy():
        light = np.power(frame.astype(np.float32) / 255, GAMMA)
        light = np.clip(cv2.resize(light, (width, height), interpolation=how), 0, 1)
        frames.append((np.power(light, 1 / GAMMA) * 255 + 0.5).astype(np.uint8))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous()


def choose_in_time(policy: TemporalPolicy, have: int, have_fps: float, want: int, want_fps: float) -> list[int]:
    """Indices of `want` frames at `want_fps`, chosen from `have` frames at `have_fps`.

    "first": the first ones. "nearest_time": those nearest to k / want_fps seconds, so that both clips cover the
    same time. UserError if there are too few frames.
    """
    if policy == "first":
        indices = list(range(want))
    elif policy == "nearest_time":
        indices = [int(k * have_fps / want_fps + 0.5) for k in range(want)]
    else:
        raise UserError(f"temporal policy {policy!r}: expected 'first' or 'nearest_time'")
    if indices[-1] >= have:
        raise UserError(
            f"{have} frames at {have_fps:g} fps do not hold {want} frames at {want_fps:g} fps under the temporal "
            f"policy '{policy}'; {indices[-1] + 1} are needed"
        )
    return indices


def pixels_sha256(clip: Tensor) -> str:
    """Hash of a clip's shape and pixels."""
    header = f"{list(clip.shape)}".encode()
    return hashlib.sha256(header + clip.contiguous().numpy().tobytes()).hexdigest()
