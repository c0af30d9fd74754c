"""PSNR, SSIM and MSE: against other people's code and the formulas, planted truths, and what they refuse."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, Observations, View
from dcbench.metrics.pixels import HIGHEST, mse_of, psnr_of, ssim_of
from dcbench.models.base import Runtime


def metric(name: str) -> ClipMetric:
    return load_entry_point(find_metric(name))(find_metric(name), Runtime())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def smooth(frames: int = 5, height: int = 40, width: int = 52, seed: int = 0) -> Tensor:
    coarse = noise(frames, 3, 5, 5, seed=seed).float()
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").to(torch.uint8)


def ssim_by_formula(a: Tensor, b: Tensor) -> float:
    """Wang et al. 2004, eq. 13, on one pair of frames [3 h w], where the window lies inside."""
    axis = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-axis.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]

    def local(x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, window)

    x, y = a.double()[:, None], b.double()[:, None]
    mean_x, mean_y = local(x), local(y)
    var_x, var_y = local(x * x) - mean_x**2, local(y * y) - mean_y**2
    cov = local(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(ssim.mean())


def test_ssim_is_the_published_formula() -> None:
    image, clip = noise(3, 24, 31), noise(4, 3, 24, 31, seed=1)
    clip[1] = image
    clip[2] = (0.7 * image.float() + 0.3 * clip[2].float()).to(torch.uint8)
    expected = [ssim_by_formula(frame, image) for frame in clip]
    assert ssim_of(clip, image.expand_as(clip)).tolist() == pytest.approx(expected, abs=1e-12)  # 2e-15 measured
    assert metric("ssim_image").observe(View(clip, image))["per_frame"] == pytest.approx(expected, abs=1e-12)


def test_psnr_is_opencvs_and_its_planted_decibels() -> None:
    clip = smooth()
    other = (clip.float() + 20 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255)
    other = other.to(torch.uint8)
    peers = []
    for pair in zip(clip, other, strict=True):
        one, two = (frame.permute(1, 2, 0).numpy().copy() for frame in pair)
        peers.append(cv2.PSNR(one, two))
    assert psnr_of(clip, other).tolist() == pytest.approx(peers, abs=1e-4)  # 1.1e-6 dB from scikit-image on real clips
    # a constant difference of 8 grey levels: 20 log10(255 / 8) dB
    shifted = (clip // 2 + 8).to(torch.uint8)
    assert psnr_of(clip // 2, shifted).tolist() == pytest.approx([20 * math.log10(255 / 8)] * 5, abs=1e-5)
    assert mse_of(clip // 2, shifted).tolist() == pytest.approx([(8 / 255) ** 2] * 5)
    assert psnr_of(clip, clip).tolist() == [HIGHEST] * 5


def test_more_noise_is_worse() -> None:
    clip, dice = smooth(), torch.Generator().manual_seed(2)
    added = torch.randn(clip.shape, generator=dice)
    noisy = [(clip.float() + sigma * added).clamp(0, 255).to(torch.uint8) for sigma in (1, 4, 16, 64)]
    for name, sign in (("psnr", 1), ("ssim", 1), ("psnr_middle", 1), ("ssim_middle", 1)):
        values = [sign * metric(name).observe(View(other, reference=clip))["value"] for other in noisy]
        assert values == sorted(values, reverse=True) and len(set(values)) == 4


def test_all_frames_the_middle_one_and_the_curve() -> None:
    clip, reference = smooth(), smooth(seed=3)
    clip[0] = reference[0]
    row = metric("psnr").observe(View(clip, reference=reference))
    assert row["per_frame"][0] == HIGHEST
    assert row["value"] == pytest.approx(np.mean(row["per_frame"]))
    assert row["without_first"] == pytest.approx(np.mean(row["per_frame"][1:]))
    assert metric("psnr_middle").observe(View(clip, reference=reference)) == {"value": row["per_frame"][2]}
    one = metric("ssim").observe(View(clip[:1], reference=reference[:1]))
    assert one["without_first"] == one["value"] == 1


def test_the_frames_between_both_ends() -> None:
    clip, reference = smooth(9), smooth(9, seed=3)
    row = metric("psnr").observe(View(clip, reference=reference))
    between = metric("psnr(frames=between)").observe(View(clip, reference=reference))
    assert between["per_frame"] == row["per_frame"][1:-1] and len(between["per_frame"]) == 7
    assert between["value"] == pytest.approx(np.mean(row["per_frame"][1:-1])) and "without_first" not in between
    assert metric("psnr_middle").observe(View(clip, reference=reference))["value"] == row["per_frame"][4]
    clip[[0, -1]] = 0  # the ends do not count
    assert metric("psnr(frames=between)").observe(View(clip, reference=reference)) == between
    with pytest.raises(UserError, match="a clip of 2 frames has none between"):
        metric("ssim(frames=between)").observe(View(clip[:2], reference=reference[:2]))


def test_the_first_frame_alone() -> None:
    clip, image = smooth(), smooth(seed=4)[0]
    clip[0] = image
    assert metric("first_frame_psnr").observe(View(clip, image)) == {"value": HIGHEST}
    assert metric("first_frame_mse").observe(View(clip, image)) == {"value": 0}
    clip[0, :, :20] = 0
    expected = float((clip[0].double() / 255 - image.double() / 255).square().mean())
    assert metric("first_frame_mse").observe(View(clip, image))["value"] == pytest.approx(expected)
    assert metric("first_frame_psnr").observe(View(clip, image))["value"] == pytest.approx(-10 * math.log10(expected))
    assert find_metric("psnr_first").name == "first_frame_psnr"  # its name in earlier versions


def test_a_still_picture_scores_one_and_a_moving_one_less() -> None:
    image = noise(3, 16, 16)
    still, moving = image.expand(5, -1, -1, -1), torch.stack([image.roll(i, -1) for i in range(5)])
    values = [metric("ssim_image").observe(View(clip, image))["value"] for clip in (still, moving)]
    assert values[0] == pytest.approx(1, abs=1e-6) and values[1] < 0.5


def test_an_image_of_another_size_is_fitted_to_the_clip() -> None:
    clip = torch.full((2, 3, 16, 16), 90, dtype=torch.uint8)
    row = metric("ssim_image").observe(View(clip, torch.full((3, 40, 60), 90, dtype=torch.uint8)))
    assert row["value"] == pytest.approx(1, abs=1e-6)


def test_what_it_refuses() -> None:
    with pytest.raises(UserError, match="the input image is needed"):
        metric("ssim_image").observe(View(noise(2, 3, 16, 16)))
    with pytest.raises(UserError, match="a reference clip is needed"):
        metric("psnr").observe(View(noise(2, 3, 16, 16)))
    with pytest.raises(UserError, match="frames of 8x16; the window of SSIM needs 11 pixels"):
        metric("ssim_image").observe(View(noise(2, 3, 8, 16), noise(3, 8, 16)))
    with pytest.raises(UserError, match=r"the clip has \[2, 3, 16, 16\], the reference \[3, 3, 16, 16\]"):
        metric("ssim").observe(View(noise(2, 3, 16, 16), reference=noise(3, 3, 16, 16)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("psnr(frames=last)", 'frames is "last"; allowed: all, middle, between'),
        ("psnr(over_samples=worst)", 'over_samples is "worst"; allowed: mean, best'),
        ("psnr(measure=ssimm)", 'measure is "ssimm"'),
        ("psnr(frame=all)", 'no such key. Did you mean "options.frames"'),
        ("psnr(all)", "all is no option; expected name"),
    ],
)
def test_options_are_checked(given: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        metric(given)


def test_the_best_of_several_clips_of_an_input_or_all() -> None:
    rows = [{"value": float(value)} for value in (20, 30, 25, 11, 12, 10)]
    seen = Observations(rows, groups=list("aaabbb"), items=list("aaabbb"))
    mean, best = metric("psnr").score(seen), metric("psnr(over_samples=best)").score(seen)
    assert (mean.value, mean.n_generated, mean.details["samples"]) == (18, 6, "mean of 3 clips of each input")
    assert (best.value, best.n_generated, best.details["samples"]) == (21, 2, "best of 3 clips of each input")
    lowest = metric("first_frame_mse").score(seen)
    assert lowest.value == 18
    assert metric("psnr").observation_key == metric("psnr(over_samples=best)").observation_key
    assert metric("psnr").identity != metric("psnr(over_samples=best)").identity
    other = Observations([{"value": row["value"] - 1} for row in rows], groups=seen.groups, items=seen.items)
    assert metric("psnr(over_samples=best)").difference(seen, other).n == 2
