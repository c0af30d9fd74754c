"""Clips that other programs made: signs that they are not what the protocol asks for. The record states them."""

from collections.abc import Mapping, Sequence
from statistics import median

from torch import Tensor

from dcbench.clips import resize
from dcbench.metrics.pixels import ssim_of
from dcbench.record import Case
from dcbench.runs.run import Run

# Seven real clips: the next frame, and a copy at a third of the size, compressed, have 0.9 and more; another clip's
# frame, and another crop of the same frame, have 0.5 and less.
SIDE, LOWEST_SSIM = 64, 0.7


def is_made_elsewhere(run: Run) -> bool:
    """Whether dcbench read finished clips, and so cannot know what they were made from."""
    return run.model is None or "folder" in run.model.options


def likeness(case: Case, clip: Tensor, image: Tensor) -> float | None:
    """SSIM of the input image [3 h w] and the frame that should show it, at SIDE x SIDE. None: no such frame.

    The frames are small, so that compression and blur count little.
    """
    if case.condition_frame >= len(clip):
        return None
    frame, other = (resize(side[None], SIDE, SIDE, "squash") for side in (clip[case.condition_frame], image))
    return float(ssim_of(frame, other)[0])


def warnings(run: Run, likenesses: Mapping[str, float]) -> list[str]:
    """Warnings about clips that were made elsewhere: `likenesses` is `likeness` by clip id."""
    found = []
    if run.model is None:
        found += _other_rates([case for _, case in run.folder.values()], [case for case in run.cases if case.frames])
    if odd := {clip_id: value for clip_id, value in likenesses.items() if value < LOWEST_SSIM}:
        worst = min(odd, key=lambda clip_id: (odd[clip_id], clip_id))
        found.append(
            f"{len(odd)} of {len(likenesses)} clips do not begin with the input image (SSIM below {LOWEST_SSIM:g}), "
            f"the worst is {worst} ({odd[worst]:.2f}). Perhaps they were made from other images: "
            "`dcbench data inputs` writes those of the protocol"
        )
    return found


def _other_rates(made: Sequence[Case], real: Sequence[Case]) -> list[str]:
    """A warning if two folders have different frame rates: then equal frame numbers are different times."""
    if not made or not real:
        return []
    ours, theirs = (median(case.fps for case in side) for side in (made, real))
    if max(ours, theirs) / min(ours, theirs) < 1.02:  # 23.976 and 24 are one rate
        return []
    return [
        f"The generated videos have {ours:g} frames per second, the reference videos {theirs:g}, and both are read "
        "frame by frame: FVD and other metrics compare different speeds. Read both by time: "
        f"dcbench score ... --fps {min(ours, theirs):g}"
    ]
