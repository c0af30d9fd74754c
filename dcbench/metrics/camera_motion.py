"""Camera motion without weights: pan, tilt and zoom of a clip from its optical flow, in VBench's seven classes.

For each step from frame to frame, a similarity transform (shift, scale, rotation) is fitted by least median of squares
to the flow at corners of the picture, so that moving objects of less than half of them do not count. The steps
together give the motion of the picture from the first frame to the last one. The classes and the threshold are those
of VBench-I2V's camera_motion (arXiv 2411.13503), which follows points with CoTracker2 instead.
"""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from dcbench.camera import CLASSES, asked_class
from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics.base import Observations, ShareMetric, View
from dcbench.metrics.motion import SHORT_SIDE, Array, OpticalFlow, prepare, shared
from dcbench.record import Score

CORNERS = 400  # at most so many, at least 6 px apart
FEWEST = 12  # corners for a fit of 4 numbers
NO_REQUEST = (
    'no prompt asks for a camera motion in VBench\'s words, such as "camera pans left"; the details have the share of '
    "each class in all clips, and {}(asked=CLASS) makes it a score"
)


def corners(grey: Array) -> Array:
    """Grey uint8 [h w] -> float32 [n 2]: (x, y) of corners, where a flow is well defined."""
    found = cv2.goodFeaturesToTrack(grey, CORNERS, qualityLevel=0.01, minDistance=6)
    return np.zeros((0, 2), np.float32) if found is None else found[:, 0]


def fit(grey: Array, flow: Array) -> tuple[Array, float]:
    """The step of the whole picture: (float64 [3 3], (x, y, 1) of a frame -> of the next one; share that agrees).

    x and y are measured from the middle of the picture. UserError if the frame has too few corners.
    """
    height, width = grey.shape
    start = corners(grey)
    column, row = start.round().astype(int).T
    end = start + flow[row, column]
    inside = ((end >= 0) & (end <= (width - 1, height - 1))).all(-1)
    if inside.sum() < FEWEST:
        raise UserError(f"too little structure in a frame: {inside.sum()} corners to follow, {FEWEST} are needed")
    middle = np.array([(width - 1) / 2, (height - 1) / 2], np.float32)
    step, agree = cv2.estimateAffinePartial2D(start[inside] - middle, end[inside] - middle, method=cv2.LMEDS)
    if step is None or not np.isfinite(step).all():
        raise UserError("no shift and scale of the picture fits the flow of a step")
    return np.vstack([step, (0.0, 0.0, 1.0)]), float(agree.mean())


def picture_motion(clip: Tensor, flow: OpticalFlow) -> dict[str, float]:
    """uint8 [t 3 h w] -> the camera's motion from the first frame to the last one.

    "pan" and "tilt" are how far the middle of the picture moves, as a share of the short side: pan > 0 is the camera
    turning right (the picture moves left), tilt > 0 turning up (the picture moves down). "zoom" is the magnification,
    "roll" the picture's rotation in degrees, clockwise. "agree" is the mean share of corners that the fit explains.
    UserError if a step cannot be fitted.
    """
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in prepare(clip)]
    steps = [fit(frame, step) for frame, step in zip(grey, flow.along(grey), strict=False)]
    whole = np.eye(3)
    for step, _ in steps:
        whole = step @ whole
    return {
        "pan": float(-whole[0, 2] / SHORT_SIDE),
        "tilt": float(whole[1, 2] / SHORT_SIDE),
        "zoom": float(math.sqrt(np.linalg.det(whole[:2, :2]))),
        "roll": math.degrees(math.atan2(whole[1, 0], whole[0, 0])),
        "agree": float(np.mean([agree for _, agree in steps])),
    }


def classify(pan: float, tilt: float, zoom: float, threshold: float) -> dict[str, float]:
    """The size of each motion that is there, by class, as a share of the short side: the largest first.

    A zoom counts by how far it moves the middle of the picture's nearer edges. Without any motion: {"static": 0.0}.
    """
    sizes = {
        "pan_right" if pan > 0 else "pan_left": abs(pan),
        "tilt_up" if tilt > 0 else "tilt_down": abs(tilt),
        "zoom_in" if zoom > 1 else "zoom_out": abs(zoom - 1) / 2,
    }
    there = {name: size for name, size in sizes.items() if size > threshold}
    return dict(sorted(there.items(), key=lambda pair: -pair[1])) or {"static": 0.0}


class CameraMotionMetric(ShareMetric):
    """1 if the asked motion is among those that a clip has, else 0. A clip that is asked for none has no value."""

    version = 1
    extractor: OpticalFlow

    def __init__(self, card: MetricCard, threshold: float, asked: str) -> None:
        super().__init__(card, shared())
        self.threshold, self.asked = threshold, asked

    def lacks(self, view: View) -> str | None:
        """Nothing: a clip without a caption is measured too."""
        return None

    def observe(self, view: View) -> dict[str, Any]:
        """-> "pan", "tilt", "zoom", "roll", "agree" (see `picture_motion`), 1.0 or 0.0 for each of the seven classes,
        "main", the class of the largest motion; and "asked" and "value", if a motion was asked for."""
        with torch.inference_mode():
            measured = picture_motion(self.check(view.clip, min_frames=2), self.extractor)
        found = classify(measured["pan"], measured["tilt"], measured["zoom"], self.threshold)
        seen = {**measured, **{name: float(name in found) for name in CLASSES}, "main": next(iter(found))}
        asked = asked_class(view.prompt) if self.asked == "prompt" else self.asked
        return seen | ({"asked": asked, "value": seen[asked]} if asked else {})

    def score(self, seen: Observations) -> Score:
        """The share of the clips that were asked for a motion. Its details have the share of each class in all clips,
        and the share that is right by the asked class."""
        details = _details(seen.generated)
        kept = _with_request(seen)
        if not kept.generated:
            reason = NO_REQUEST.format(self.card.name)
            return Score(value=None, reason=reason, n_generated=len(seen.generated), details=details)
        score = super().score(kept)
        return score.model_copy(update={"details": details})

    def difference(self, first: Observations, second: Observations) -> Any:
        return super().difference(_with_request(first), _with_request(second))


def _with_request(seen: Observations) -> Observations:
    """The clips that were asked for a motion."""
    asked = [place for place, row in enumerate(seen.generated) if "value" in row]
    groups, items = ([column[i] for i in asked] if column else None for column in (seen.groups, seen.items))
    return Observations([seen.generated[i] for i in asked], groups=groups, items=items)


def _details(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    shares = {name: sum(row[name] for row in rows) / len(rows) for name in CLASSES}
    values = {name: [row["value"] for row in rows if row.get("asked") == name] for name in CLASSES}
    right = {name: sum(column) / len(column) for name, column in values.items() if column}
    fitted = {"agree": sum(row["agree"] for row in rows) / len(rows)} if "agree" in rows[0] else {}
    return {"share": shares, "right_where_asked": right, **fitted}


def known_asked(card: MetricCard) -> str:
    """A card's option `asked`. UserError for another value."""
    asked = card.options.get("asked")
    if asked not in ("prompt", *CLASSES):
        raise UserError(f'{card.name}: options.asked is "{asked}"; allowed: prompt, {", ".join(CLASSES)}')
    return str(asked)


def build(card: MetricCard, runtime: Any) -> CameraMotionMetric:
    """Entry point of the card `camera_motion_flow`; options: threshold, asked."""
    threshold = card.options.get("threshold")
    if not isinstance(threshold, float) or not 0 < threshold < 0.5:
        raise UserError(f"{card.name}: options.threshold is {threshold!r}; expected a number between 0 and 0.5")
    return CameraMotionMetric(card, threshold, known_asked(card))
