"""camera_motion: its rule is VBench's, and CoTracker's answers come from a program in the user's copy of its code.

Run by hand on CoTracker2's own code with random weights: see docs/metrics.md. Here, a small package named cotracker
stands for it and follows a planted motion.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from made_weights import made_clip, made_tracks

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics import Observations
from dcbench.metrics.base import MetricFailed, View
from dcbench.metrics.vbench.camera_motion import TrackedCameraMotion, classes
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights, weights_dir

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "vbench.json").read_text())["camera_motion"]
STANDIN = '''
import torch

class CoTrackerPredictor(torch.nn.Module):
    """Points move by the numbers that the file of weights holds, (x, y) a frame, from a grid over the picture."""

    def __init__(self, checkpoint, window_len, v2):
        super().__init__()
        assert checkpoint is None and window_len == 8 and v2
        self.model = torch.nn.Module()
        self.model.register_buffer("step", torch.zeros(2))

    def forward(self, video, grid_size):
        assert video.shape[0] == 1 and video.shape[2] == 3 and video.max() > 1
        height, width = video.shape[-2:]
        y, x = torch.meshgrid(torch.linspace(0, height, grid_size), torch.linspace(0, width, grid_size), indexing="ij")
        start = torch.stack([x, y], -1).reshape(-1, 2)
        times = torch.arange(video.shape[1])[:, None, None]
        tracks = start + times * self.model.step
        return tracks[None], torch.ones(tracks.shape[:2])[None]
'''


def test_the_rule_is_vbenchs() -> None:
    """Recorded from VBench's camera_classify on the same 100 planted tracks, which have each of its classes."""
    found = [",".join(classes(*made_tracks(seed))) for seed in range(100)]
    assert found == RECORDED
    named = {name for row in RECORDED for name in row.split(",")}
    assert named == {"pan_left", "pan_right", "tilt_up", "tilt_down", "zoom_in", "zoom_out", "static", ""}


def grid() -> np.ndarray:
    y, x = np.mgrid[:10, :10] * 25.0
    return np.stack([x, y], -1)


def test_planted_motions() -> None:
    """The picture moves left when the camera pans right, and down when it tilts up."""
    start = grid()
    for shift, expected in (
        ((-3, 0), ["pan_right"]), ((3, 0), ["pan_left"]), ((0, 3), ["tilt_up"]), ((0, -3), ["tilt_down"]),
        ((-3, 3), ["pan_right", "tilt_up"]), ((1, 1), ["static"]),
    ):  # fmt: skip
        assert classes(start, start + shift, 256) == expected
    # index 5 is right of and below the middle, so a zoom moves these points sideways too
    assert "zoom_in" in classes(start, (start - 112.5) * 1.1 + 112.5, 256)
    assert "zoom_out" in classes(start, (start - 112.5) * 0.9 + 112.5, 256)
    end = start.copy()
    end[0] += (9, 0)  # the top goes right, all else stays: left and right agree on static, top and bottom on nothing
    assert classes(start, end, 256) == []
    end[-1] += (9, 0)
    assert classes(start, end, 256) == ["pan_left"]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of CoTracker's code, and weights: the picture moves by (2, -1) pixels a frame."""
    (tmp_path / "cotracker").mkdir()
    (tmp_path / "cotracker" / "__init__.py").write_text("")
    (tmp_path / "cotracker" / "predictor.py").write_text(STANDIN)
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path / "weights"))
    torch.save({"model": {"step": torch.tensor([2.0, -1.0])}}, weights_dir() / "cotracker2.pth")
    return tmp_path


def build(folder: Path, asked: str = "prompt") -> TrackedCameraMotion:
    card = find_metric("camera_motion")
    options = card.options | {"cwd": str(folder), "python": sys.executable, "asked": asked}
    return load_entry_point(card)(card.model_copy(update={"options": options}), Runtime(offline=True))


@pytest.fixture
def metric(copy: Path) -> Iterator[TrackedCameraMotion]:
    metric = build(copy)
    yield metric
    metric.close()


def test_the_program_follows_and_the_rule_votes(metric: TrackedCameraMotion) -> None:
    """Three frames: 4 pixels to the right and 2 up, at a threshold of 0.36."""
    clip = made_clip("a")
    rows = [
        metric.observe(View(clip, prompt=prompt))
        for prompt in ("A lake, camera pans left", "A lake, camera tilts up", "A lake")
    ]
    assert [row.get("value") for row in rows] == [1, 0, None]
    assert {name for name, value in rows[0].items() if value == 1.0} == {"pan_left", "tilt_down", "value"}
    score = metric.score(Observations(rows, groups=["a", "b", "c"]))
    assert score.value == 0.5 and score.n_generated == 2
    assert score.details["share"]["pan_left"] == 1 and score.details["right_where_asked"]["tilt_up"] == 0
    assert metric.facts["clips"] == 3
    assert "camera_motion(asked=CLASS)" in str(metric.score(Observations(rows[2:])).reason)


def test_its_identity_is_of_weights_and_code_and_of_no_folder(metric: TrackedCameraMotion, copy: Path) -> None:
    assert metric.identity["options"] == {"asked": "prompt"}
    assert str(copy) not in str(metric.identity) + str(metric.extractor.identity)
    (copy / "cotracker" / "predictor.py").write_text(STANDIN + "\n# another line\n")
    assert build(copy).extractor.identity != metric.extractor.identity


def test_a_wrong_answer_ends_the_scoring(copy: Path) -> None:
    fewer = STANDIN.replace("grid_size), torch.linspace", "9), torch.linspace")
    (copy / "cotracker" / "predictor.py").write_text(fewer)
    metric = build(copy)
    with pytest.raises(MetricFailed, match=r'answered no 100 points \(x, y\) for "first"'):
        metric.observe(View(made_clip("a"), prompt="camera static"))
    metric.close()


def test_what_is_missing_is_said(tmp_path: Path, copy: Path) -> None:
    with pytest.raises(UserError, match=r"holds no cotracker/predictor\.py(.|\n)*git clone"):
        build(tmp_path / "weights")
    with pytest.raises(UserError, match='asked is "pan"; allowed: prompt, pan_left'):
        build(copy, asked="pan")
    (weights_dir() / "cotracker2.pth").unlink()
    with pytest.raises(MissingWeights, match=r"cotracker2\.pth is missing"):
        build(copy)
