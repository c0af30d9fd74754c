"""motion_smoothness: our AMT-S is the authors', beside numbers of VBench's own class with the same random weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_weights import made_clip, made_weights
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import View
from dcbench.metrics.vbench.amt import AMT, warp
from dcbench.metrics.vbench.motion_smoothness import Interpolator, MotionSmoothness
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "vbench.json").read_text())["motion_smoothness"]


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> MotionSmoothness:
    """The whole network, random, from a file of the form of amt-s.pth: with an epoch and an optimizer."""
    path = tmp_path_factory.mktemp("amt") / "amt-s.pth"
    saved = {"epoch": 300, "state_dict": made_weights(AMT().state_dict(), 7), "optim": {"param_groups": [{"lr": 1}]}}
    torch.save(saved, path)
    return MotionSmoothness(find_metric("motion_smoothness"), Interpolator(path))


def test_equals_vbenchs_own_class(metric: MotionSmoothness) -> None:
    """130x130, so with a border. Measured: 2e-16 here, and 2e-8 of four frames of 124x136, where fractions are cut.

    The networks' outputs differ by at most 2.8e-5 in a pixel of [0, 1], in float32.
    """
    seen = metric.observe(View(made_clip("c")))
    assert seen["value"] == pytest.approx(RECORDED["clips"][0], abs=1e-6)
    assert len(seen["per_frame"]) == 1 and 0.5 < seen["value"] < 0.8


def test_frames_with_both_neighbours_count() -> None:
    """Frames 1 and 3 of 5 or 6. A prediction that is the mean of both neighbours gives the formula's value."""

    class Mean:
        identity = {"name": "mean", "weights_sha256": "", "preprocessing": ""}

        def __call__(self, first: Tensor, second: Tensor) -> Tensor:
            return ((first.float() + second.float()) / 2).to(torch.uint8)

    mean: Any = Mean()
    metric = MotionSmoothness(find_metric("motion_smoothness"), mean)
    levels = torch.tensor([10, 20, 30, 50, 50, 0], dtype=torch.uint8)
    clip = levels.view(-1, 1, 1, 1).expand(-1, 3, 120, 120).contiguous()
    for frames in (5, 6):
        seen = metric.observe(View(clip[:frames]))
        assert seen["per_frame"] == pytest.approx([1, 1 - 10 / 255])
    assert metric.observe(View(clip[:4]))["per_frame"] == [1.0]


def test_warp_is_a_shift() -> None:
    x = torch.rand(1, 2, 6, 9, generator=torch.Generator().manual_seed(1))
    flow = torch.zeros(1, 2, 6, 9)
    flow[:, 0], flow[:, 1] = 2, 1  # x, y
    assert torch.allclose(warp(x, flow)[..., :-1, :-2], x[..., 1:, 2:], atol=1e-6)
    assert torch.allclose(warp(x, flow)[..., -1, -1], x[..., -1, -1], atol=1e-6)  # the border goes on


def test_what_it_refuses(metric: MotionSmoothness, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a clip of 2 frames of 130x130; it needs 3 frames, and 113 pixels"):
        metric.observe(View(made_clip("c")[:2]))
    with pytest.raises(UserError, match="a clip of 3 frames of 72x128"):
        metric.observe(View(made_clip("a")))
    torch.save({"state_dict": {"comb_block.1.weight": torch.zeros(3)}}, tmp_path / "amt-l.pth")
    with pytest.raises(UserError, match="is not AMT-S"):
        Interpolator(tmp_path / "amt-l.pth")
    card = find_metric("motion_smoothness")
    with pytest.raises(MissingWeights, match=r"amt-s\.pth is missing(.|\n)*CC-BY-NC-4.0"):
        load_entry_point(card)(card, Runtime(offline=True))
