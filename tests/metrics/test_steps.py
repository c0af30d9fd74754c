"""Flicker and loop seam: against VBench's formula, on planted steps and planted loops, and what they refuse."""

from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from observing import observed, scored
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric
from dcbench.metrics.steps import step
from dcbench.models.base import Runtime


def built(name: str) -> ClipMetric:
    return load_entry_point(find_metric(name))(find_metric(name), Runtime())


@pytest.fixture(scope="module")
def flicker() -> ClipMetric:
    return built("flicker")


@pytest.fixture(scope="module")
def loop_seam() -> ClipMetric:
    return built("loop_seam")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def grey(*levels: int) -> Tensor:
    """uint8 [t 3 8 10]: frames of one grey level each."""
    return torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 3, 8, 10)


def scrolling(frames: int, turns: float = 1.0, size: int = 64) -> Tensor:
    """uint8 [frames 3 size size]: one wave across the picture that moves by its width x `turns` in the clip."""
    angles = 2 * np.pi * (np.arange(size)[None] / size + turns * np.arange(frames)[:, None] / frames)
    levels = np.rint(127.5 + 127.5 * np.cos(angles)).astype(np.uint8)
    return torch.from_numpy(levels)[:, None, None].repeat(1, 3, size, 1)


def by_vbench(clip: Tensor) -> float:
    """VBench's temporal flickering: OpenCV's order of colours, float32, mean over pairs of means over pixels."""
    frames = [np.ascontiguousarray(frame.permute(1, 2, 0).numpy()[..., ::-1], np.float32) for frame in clip]
    pairs = np.array([np.mean(cv2.absdiff(first, second)) for first, second in pairwise(frames)])
    return (255.0 - np.mean(pairs).item()) / 255.0


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (16, 3, 64, 80), (5, 3, 257, 131)])
def test_flicker_is_vbenchs_formula(flicker: ClipMetric, moving_clip: Tensor, shape: tuple[int, ...]) -> None:
    for clip in (noise(*shape), moving_clip):
        assert observed(flicker, [clip])[0]["value"] == pytest.approx(by_vbench(clip), abs=1e-6)  # float32 there


def test_flicker_of_planted_steps(flicker: ClipMetric) -> None:
    still, alternating, one_jump = grey(90, 90, 90), grey(90, 107, 90, 107), grey(90, 90, 90, 141)
    values = observed(flicker, [still, alternating, one_jump, grey(0, 255)])
    assert [row["value"] for row in values] == pytest.approx([1, 1 - 17 / 255, 1 - 51 / 3 / 255, 0], abs=1e-15)
    assert values[2]["per_frame"] == pytest.approx([1, 1, 1 - 51 / 255], abs=1e-15)


def test_a_step_is_a_sum_of_whole_numbers() -> None:
    """A large frame, whose mean in float32 would round, and both signs of a difference that uint8 cannot hold."""
    first, second = torch.zeros(3, 1500, 1500, dtype=torch.uint8), torch.full((3, 1500, 1500), 255, dtype=torch.uint8)
    second[0, 0, 0] = 254
    assert step(first, second) == step(second, first) == 255 - 1 / first.numel()


def test_seam_of_a_loop_is_one_and_of_a_cut_loop_larger(loop_seam: ClipMetric) -> None:
    """Two phases of a wave differ by 2 sin(angle / 2) of its amplitude: the seam of half a loop is known too."""
    whole, half = (row["value"] for row in observed(loop_seam, [scrolling(16), scrolling(16, turns=0.5)]))
    assert whole == pytest.approx(1, abs=1e-3)  # pixels are rounded to whole grey levels
    assert half == pytest.approx(np.sin(15 * np.pi / 32) / np.sin(np.pi / 32), rel=0.01)  # 10.15


@pytest.mark.parametrize(
    ("levels", "ratio"),
    [((10, 14, 18, 22), 3), ((10, 14, 18, 14), 1), ((10, 30, 50, 30, 10), 0), ((10, 14, 18, 22, 98), 22)],
)
def test_seam_of_planted_jumps(loop_seam: ClipMetric, levels: tuple[int, ...], ratio: float) -> None:
    """The last clip has one cut inside, which does not change the median of its steps."""
    row = observed(loop_seam, [grey(*levels)])[0]
    assert row["value"] == ratio and row["seam"] == abs(levels[-1] - levels[0]) and row["step"] == levels[1] - levels[0]


def test_a_clip_without_a_usual_step_has_no_seam(loop_seam: ClipMetric) -> None:
    for levels in ((90, 90, 90), (90, 90, 90, 91)):
        with pytest.raises(UserError, match="has no usual step"):
            observed(loop_seam, [grey(*levels)])


def test_scores_are_means_with_intervals(flicker: ClipMetric, loop_seam: ClipMetric) -> None:
    clips = [scrolling(8, turns=1 - k / 16) for k in range(4)]
    for metric in (flicker, loop_seam):
        rows = observed(metric, clips)
        score = scored(metric, rows, [str(k) for k in range(4)])
        assert score.value == pytest.approx(np.mean([row["value"] for row in rows])) and score.ci95
    assert flicker.observes_reference and not loop_seam.observes_reference


def test_what_they_refuse(flicker: ClipMetric, loop_seam: ClipMetric) -> None:
    for metric, least in ((flicker, 2), (loop_seam, 3)):
        with pytest.raises(UserError, match=f"a clip needs at least {least} frames"):
            observed(metric, [noise(least - 1, 3, 8, 8)])
        with pytest.raises(UserError, match=r"expected uint8 \[t, 3, h, w\]"):
            observed(metric, [noise(4, 3, 8, 8).float()])
        card = metric.card.model_copy(update={"options": {"kind": "seam"}})
        with pytest.raises(UserError, match="allowed: flicker, loop_seam"):
            load_entry_point(card)(card, Runtime())


def test_flicker_is_no_other_name_of_the_warping_error() -> None:
    assert find_metric("flicker").name == "flicker"
    assert "flicker" not in find_metric("warp_error").aliases


def test_vbenchs_dimension_is_flicker(flicker: ClipMetric) -> None:
    """One implementation, two names: the second counts only the clips that VBench scores for it."""
    dimension = load_entry_point(find_metric("temporal_flickering"))(find_metric("temporal_flickering"), Runtime())
    clip = noise(5, 3, 12, 16)
    assert observed(dimension, [clip]) == observed(flicker, [clip])
    listed = {"dimensions": ["i2v_subject"]}
    assert flicker.counts(listed) and dimension.counts(None) and dimension.counts({"scene": 1})
    assert not dimension.counts(listed) and dimension.counts({"dimensions": ["temporal_flickering"]})
