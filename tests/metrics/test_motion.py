"""Motion: a still picture scores 0, a known translation its length, and a flickering clip a high warping error."""

import numpy as np
import pytest
import torch
from observing import observed, scored
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric
from dcbench.metrics.motion import OpticalFlow, visible, warp_back
from dcbench.metrics.steps import measure_flicker
from dcbench.models.base import Runtime


@pytest.fixture(scope="module")
def motion() -> ClipMetric:
    return load_entry_point(find_metric("motion"))(find_metric("motion"), Runtime())


@pytest.fixture(scope="module")
def warp_error() -> ClipMetric:
    return load_entry_point(find_metric("warp_error"))(find_metric("warp_error"), Runtime())


def panning(step: int, frames: int = 5, size: int = 256, seed: int = 0) -> Tensor:
    """uint8 [frames 3 size size]: a smooth texture that moves `step` px left a frame."""
    generator = torch.Generator().manual_seed(seed)
    wide = size + step * frames
    coarse = torch.rand(1, 3, 24, wide // 10, generator=generator)
    texture = torch.nn.functional.interpolate(coarse, (size, wide), mode="bicubic", align_corners=False)[0].clamp(0, 1)
    return torch.stack([(texture[:, :, i * step : i * step + size] * 255).to(torch.uint8) for i in range(frames)])


@pytest.mark.parametrize("step", [1, 2, 5])
def test_motion_of_a_translation_is_its_length(motion: ClipMetric, step: int) -> None:
    """Measured: within 3 % for 1 to 5 px."""
    value = observed(motion, [panning(step)])[0]
    assert value["value"] == pytest.approx(step, rel=0.1)
    assert len(value["per_frame"]) == 4


def test_motion_is_measured_at_one_size(motion: ClipMetric) -> None:
    small = panning(1, size=128)
    large = torch.nn.functional.interpolate(small.float(), (512, 512), mode="bilinear").round().to(torch.uint8)
    values = [row["value"] for row in observed(motion, [small, large])]
    assert values[0] == pytest.approx(2, rel=0.1) and values[1] == pytest.approx(values[0], rel=0.1)


def test_a_still_picture_has_no_motion_and_no_flicker(motion: ClipMetric, warp_error: ClipMetric) -> None:
    still = panning(1)[:1].repeat(4, 1, 1, 1)
    assert observed(motion, [still])[0]["value"] == 0
    row = observed(warp_error, [still])[0]
    assert row["value"] == 0 and row["visible"] == 1


def test_constant_frames_have_no_motion(motion: ClipMetric) -> None:
    assert observed(motion, [torch.full((3, 3, 64, 64), 90, dtype=torch.uint8)])[0]["value"] == 0


def test_warping_explains_motion_but_not_flicker(warp_error: ClipMetric) -> None:
    moving = panning(3)
    flickering = moving.clone()
    flickering[1::2] = (flickering[1::2].float() * 0.8).to(torch.uint8)
    calm, nervous = observed(warp_error, [moving, flickering])
    assert calm["value"] < 1e-4
    assert measure_flicker(moving)["value"] < 0.98  # the plain difference takes motion for flicker
    assert nervous["value"] > 20 * calm["value"]


def test_warp_reads_where_the_flow_points() -> None:
    second = np.arange(20, dtype=np.float32).reshape(4, 5)
    flow = np.zeros((4, 5, 2), np.float32)
    flow[..., 0] = 1
    assert np.array_equal(warp_back(second, flow)[:, :4], second[:, 1:])
    shown = visible(flow, -flow)
    assert shown[:, :3].all() and not shown[:, 4].any()  # the last column leaves the picture
    assert not visible(flow, flow)[:, :3].any()  # forward and backward disagree: hidden


def test_flow_is_the_same_again() -> None:
    frames = [frame.numpy().mean(0).astype(np.uint8) for frame in panning(4, frames=2)]
    assert np.array_equal(OpticalFlow()(*frames), OpticalFlow()(*frames))


def test_both_metrics_share_the_flow_along_the_clip(
    motion: ClipMetric, warp_error: ClipMetric, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Per pair of frames one flow forward for both, and one backward; a fresh start gives the same values."""
    clip, calls = panning(3, seed=7), []
    original = OpticalFlow.__call__
    monkeypatch.setattr(OpticalFlow, "__call__", lambda *given: calls.append(1) or original(*given))
    together = [observed(motion, [clip]), observed(warp_error, [clip])]
    assert len(calls) == 2 * (len(clip) - 1)
    observed(motion, [panning(1), panning(2)])  # forgotten by now
    assert observed(warp_error, [clip]) == together[1] and observed(motion, [clip]) == together[0]


def test_order_and_batch_do_not_matter(motion: ClipMetric) -> None:
    clips = [panning(1), panning(4, seed=1), panning(2, seed=2)]
    together = observed(motion, clips)
    assert together == [observed(motion, [clip])[0] for clip in clips]


def test_bad_clips_are_refused(motion: ClipMetric, warp_error: ClipMetric) -> None:
    for metric in (motion, warp_error):
        with pytest.raises(UserError, match="a clip needs at least 2"):
            observed(metric, [panning(1)[:1]])
        with pytest.raises(ValueError, match=r"expected uint8 \[t, 3, h, w\]"):
            observed(metric, [panning(1).float()])


def test_records_of_the_warping_error_with_its_old_detail_are_another_version(
    motion: ClipMetric, warp_error: ClipMetric
) -> None:
    """So a cached observation with the detail `flicker` is never mixed with one without; motion's stay in use."""
    assert warp_error.identity["version"] == "2" and motion.identity["version"] == "1"


def test_score_is_the_mean_with_an_interval(motion: ClipMetric) -> None:
    rows = [{"value": float(v), "top5": 2.0 * v, "per_frame": [float(v)] * 2} for v in range(10)]
    score = scored(motion, rows, [str(i) for i in range(10)])
    assert score.value == 4.5 and score.n_generated == 10 and score.details["top5"] == 9.0
    assert score.ci95 and score.ci95[0] < 4.5 < score.ci95[1] and "BCa" in score.ci_method
    assert scored(motion, rows[:2], None).ci95 is None
    with pytest.raises(UserError, match="the value of clip 1 is nan"):
        scored(motion, [{"value": 1.0}, {"value": float("nan")}], None)
    with pytest.raises(UserError, match="no clips"):
        scored(motion, [], None)


def test_a_number_that_only_some_clips_have_is_not_averaged(motion: ClipMetric) -> None:
    rows = [{"value": 1.0, "top5": 2.0, "mine": 1.0}, {"value": 3.0, "top5": 4.0}, {"value": 2.0, "top5": 3.0}]
    assert scored(motion, rows, None).details == {"top5": 3.0}
