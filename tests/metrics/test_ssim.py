"""SSIM of input image and frames: against the formula, its exact ends, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from observing import observed
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric
from dcbench.models.base import Runtime


@pytest.fixture
def metric() -> ClipMetric:
    return load_entry_point(find_metric("ssim_image"))(find_metric("ssim_image"), Runtime())


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def by_formula(a: Tensor, b: Tensor) -> float:
    """Wang et al. 2004, eq. 13, on one pair of frames [3 h w], mirrored at the border."""
    axis = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-axis.square() / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    x, y = (F.pad(frame.double()[:, None], (5, 5, 5, 5), mode="reflect") for frame in (a, b))
    mean_x, mean_y = F.conv2d(x, window), F.conv2d(y, window)
    var_x, var_y = F.conv2d(x * x, window) - mean_x**2, F.conv2d(y * y, window) - mean_y**2
    cov = F.conv2d(x * y, window) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    ssim = (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(ssim.mean())


def test_it_is_the_published_formula(metric: ClipMetric) -> None:
    image, clip = noise(3, 24, 31), noise(4, 3, 24, 31, seed=1)
    clip[1] = image
    clip[2] = (0.7 * image.float() + 0.3 * clip[2].float()).to(torch.uint8)
    row = observed(metric, [clip], [image], None)[0]
    assert row["per_frame"] == pytest.approx([by_formula(frame, image) for frame in clip], abs=1e-12)  # 2e-16 measured
    assert row["value"] == pytest.approx(sum(row["per_frame"]) / 4)


def test_a_still_picture_scores_one_and_a_moving_one_less(metric: ClipMetric) -> None:
    image = noise(3, 16, 16)
    still = image.expand(5, -1, -1, -1)
    moving = torch.stack([image.roll(i, -1) for i in range(5)])
    values = [row["value"] for row in observed(metric, [still, moving], [image, image], None)]
    assert values[0] == pytest.approx(1, abs=1e-6) and values[1] < 0.5


def test_an_image_of_another_size_is_fitted_to_the_clip(metric: ClipMetric) -> None:
    clip = torch.full((2, 3, 16, 16), 90, dtype=torch.uint8)
    row = observed(metric, [clip], [torch.full((3, 40, 60), 90, dtype=torch.uint8)], None)[0]
    assert row["value"] == pytest.approx(1, abs=1e-6)


def test_what_it_refuses(metric: ClipMetric) -> None:
    with pytest.raises(UserError, match="the input image is needed"):
        observed(metric, [noise(2, 3, 16, 16)], None, None)
    with pytest.raises(UserError, match="frames of 8x16; its window needs 11 pixels"):
        observed(metric, [noise(2, 3, 8, 16)], [noise(3, 8, 16)], None)
