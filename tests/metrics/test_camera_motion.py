"""Camera motion by flow: planted pans, tilts and zooms of real pictures, VBench's directions, and what is asked."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import skimage.data
import torch
from observing import scored
from torch import Tensor

from dcbench.camera import CLASSES, asked_class
from dcbench.catalogue import find_metric, find_model, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import Observations, View
from dcbench.metrics.camera_motion import CameraMotionMetric, classify, corners, fit
from dcbench.models.base import Request, Runtime

PICTURES = ("astronaut.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "brick.png", "coins.png")
SIZE = 128


def metric_of(**options: object) -> CameraMotionMetric:
    card = find_metric("camera_motion_flow")
    return load_entry_point(card)(card.model_copy(update={"options": card.options | options}), Runtime())


@pytest.fixture(scope="module")
def metric() -> CameraMotionMetric:
    return metric_of()


def picture(name: str) -> np.ndarray:
    """A picture that comes with scikit-image, RGB uint8 [h w 3]."""
    found = cv2.imread(str(Path(skimage.data.__file__).parent / name), cv2.IMREAD_COLOR)
    assert found is not None
    return found[..., ::-1].copy()


def moved(name: str, motion: str, amount: float, frames: int = 8) -> Tensor:
    """uint8 [t 3 SIZE SIZE]: a window of a picture that moves by `amount` of its side, or is magnified by 1 + amount.

    The window is the camera: it goes right for pan_right and up for tilt_up, and grows smaller for zoom_in.
    """
    image = picture(name)
    height, width = image.shape[:2]
    side = 0.7 * min(height, width)
    way = {"pan_right": (1, 0), "pan_left": (-1, 0), "tilt_up": (0, -1), "tilt_down": (0, 1)}.get(motion, (0, 0))
    grows = {"zoom_in": -1, "zoom_out": 1}.get(motion, 0)
    image = cv2.GaussianBlur(image, (0, 0), 0.4 * side / SIZE)
    made = []
    for part in np.linspace(-0.5, 0.5, frames):
        scale = side / SIZE * (1 + amount) ** (grows * part)
        x, y = width / 2 + way[0] * part * amount * side, height / 2 + way[1] * part * amount * side
        half = scale * (SIZE - 1) / 2
        window = np.array([[scale, 0, x - half], [0, scale, y - half]])
        how = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        made.append(cv2.warpAffine(image, window, (SIZE, SIZE), flags=how, borderMode=cv2.BORDER_REFLECT))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).contiguous()


def planted(count: int) -> list[tuple[str, str, float]]:
    dice = np.random.default_rng(0)
    return [
        (PICTURES[k % len(PICTURES)], CLASSES[(k + k // 7) % len(CLASSES)], dice.uniform(0.03, 0.3))
        for k in range(count)
    ]


def test_planted_motions_of_real_pictures(metric: CameraMotionMetric):
    """Of 40, all but one at most; only the planted class is found, and its size is right."""
    wrong = []
    for name, motion, amount in planted(40):
        row = metric.observe(View(moved(name, motion, amount)))
        found = [cls for cls in CLASSES if row[cls]]
        size = {"pan": abs(row["pan"]), "til": abs(row["tilt"]), "zoo": abs(np.log(row["zoom"]) / np.log1p(amount))}
        size |= {key: value / amount for key, value in size.items() if key != "zoo"}
        if found != [motion] or row["main"] != motion or not 0.9 < size.get(motion[:3], 1) < 1.1:
            wrong.append((name, motion, amount, row))
    assert len(wrong) <= 1, wrong


def test_the_directions_are_those_of_vbench(metric: CameraMotionMetric):
    """VBench: a picture that moves left is pan_right, one that moves down is tilt_up."""
    image = torch.from_numpy(picture("astronaut.png")).permute(2, 0, 1)
    left = torch.stack([image[:, 100:228, 100 + 3 * k : 228 + 3 * k] for k in range(5)])
    row = metric.observe(View(left, prompt="A portrait, camera pans right"))
    assert row["main"] == "pan_right" and row["pan"] == pytest.approx(12 / 128, rel=0.05) and row["value"] == 1
    down = torch.stack([image[:, 100 - 3 * k : 228 - 3 * k, 100:228] for k in range(5)])
    row = metric.observe(View(down, prompt="A portrait, camera tilts down"))
    assert row["main"] == "tilt_up" and row["tilt"] == pytest.approx(12 / 128, rel=0.05) and row["value"] == 0


def test_the_models_zoom_and_still(metric: CameraMotionMetric):
    image = torch.from_numpy(cv2.resize(picture("coffee.png"), (SIZE, SIZE))).permute(2, 0, 1).contiguous()
    rows = {}
    for name in ("zoom", "still"):
        request = Request(clip_id="a", image=image, prompt="", num_frames=8, fps=8, frame_stride=1, seed=0)
        card = find_model(name)
        rows[name] = metric.observe(View(load_entry_point(card)(card, Runtime()).generate([request])[0]))
    assert rows["zoom"]["main"] == "zoom_in" and rows["zoom"]["zoom"] == pytest.approx(1.25, rel=0.02)
    assert rows["still"]["main"] == "static" and rows["still"]["pan"] == pytest.approx(0, abs=1e-6)


def test_a_moving_object_is_not_the_camera(metric: CameraMotionMetric):
    """A third of the picture moves by itself, over a still background."""
    back = torch.from_numpy(cv2.resize(picture("brick.png"), (SIZE, SIZE))).permute(2, 0, 1)
    front = torch.from_numpy(cv2.resize(picture("coins.png"), (72, 72))).permute(2, 0, 1)
    clip = back.repeat(6, 1, 1, 1)
    for k in range(6):
        clip[k, :, 28:100, 10 + 5 * k : 82 + 5 * k] = front
    assert metric.observe(View(clip))["main"] == "static"


@pytest.mark.parametrize(
    "prompt, asked",
    [
        ("a room, camera pans left", "pan_left"),
        ("A Room, Camera Static", "static"),
        ("a room, camera  zooms\nout", "zoom_out"),
        ("camera tilts up, then camera tilts down", "tilt_down"),
        ("a camera on a table", None),
        ("", None),
        (None, None),
    ],
)
def test_what_a_prompt_asks_for(prompt: str | None, asked: str | None):
    assert asked_class(prompt) == asked


def test_classes_are_sorted_by_size_and_static_is_alone():
    assert list(classify(0.02, -0.1, 1.1, 0.005)) == ["tilt_down", "zoom_in", "pan_right"]
    assert list(classify(-0.006, 0.004, 0.995, 0.005)) == ["pan_left"]
    assert list(classify(0.005, -0.005, 1.009, 0.005)) == ["static"]


def row(main: str, asked: str | None) -> dict:
    seen = {"pan": 0.0, "tilt": 0.0, "zoom": 1.0, "roll": 0.0, "agree": 0.5, "main": main}
    seen |= {name: float(name == main) for name in CLASSES}
    return seen | ({"asked": asked, "value": float(asked == main)} if asked else {})


def test_the_score_is_of_the_clips_that_were_asked_and_the_shares_are_of_all(metric: CameraMotionMetric):
    rows = [row("static", None), row("pan_left", "pan_left"), row("static", "pan_left"), row("zoom_in", "zoom_in")]
    score = scored(metric, rows, list("abcd"))
    assert score.value == pytest.approx(2 / 3) and score.n_generated == 3 and score.ci_method == "Wilson interval"
    assert score.details["share"]["static"] == 0.5 and sum(score.details["share"].values()) == 1
    assert score.details["right_where_asked"] == {"pan_left": 0.5, "zoom_in": 1.0}
    alone = scored(metric, rows[:1], ["a"])
    assert alone.value is None and "no prompt asks for a camera motion" in str(alone.reason)
    assert alone.details["share"]["static"] == 1
    better = [*rows[:2], row("pan_left", "pan_left"), rows[3]]
    sides = (Observations(side, groups=list("abcd")) for side in (better, rows))
    assert metric.difference(*sides).difference == pytest.approx(1 / 3)


def test_a_class_may_be_asked_of_all_clips():
    asked = metric_of(asked="static")
    still = torch.from_numpy(picture("coffee.png")[:96, :96].copy()).permute(2, 0, 1).repeat(3, 1, 1, 1)
    assert asked.observe(View(still))["value"] == 1 and asked.lacks(View(still)) is None
    assert metric_of(asked="zoom_in").observe(View(still, prompt="camera static"))["value"] == 0
    assert asked.identity != metric_of().identity
    for options, message in (({"asked": "left"}, "allowed: prompt, pan_left"), ({"threshold": 0}, "between 0 and 0.5")):
        with pytest.raises(UserError, match=message):
            metric_of(**options)


def test_what_it_refuses(metric: CameraMotionMetric):
    with pytest.raises(UserError, match="at least 2 frames"):
        metric.observe(View(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)))
    with pytest.raises(UserError, match="too little structure in a frame: 0 corners to follow, 12 are needed"):
        metric.observe(View(torch.full((3, 3, 64, 64), 90, dtype=torch.uint8)))


def test_the_fit_of_a_known_flow_is_exact():
    """A shift, a scale and a rotation about the middle; a fifth of the picture moves otherwise."""
    grey = cv2.cvtColor(cv2.resize(picture("brick.png"), (200, 160)), cv2.COLOR_RGB2GRAY)
    x, y = np.meshgrid(np.arange(200) - 99.5, np.arange(160) - 79.5)
    turn = np.deg2rad(1.0)
    ahead = 1.02 * np.array([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y])
    flow = np.stack([ahead[0] + 1.5 - x, ahead[1] - 0.75 - y], -1).astype(np.float32)
    flow[:, :40] += 9
    step, agree = fit(grey, flow)
    expected = 1.02 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    assert step[:2, :2] == pytest.approx(expected, abs=2e-3) and step[:2, 2] == pytest.approx([1.5, -0.75], abs=0.1)
    assert 0.6 < agree < 0.95 and len(corners(grey)) > 100
