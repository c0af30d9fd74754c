"""VBench-I2V's camera_motion: CoTracker2 follows a grid of 10x10 points; four of them say how the camera moved.

The points lie at the middle of the grid's top, bottom, left and right. From the first frame to the last one, each goes
right, left, down, up or nowhere; top and bottom, and left and right, vote for a class. CoTracker2 runs as a program of
its own (cotracker_program.py) from the user's copy of its code, and answers with the points.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dcbench.camera import CLASSES, asked_class
from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.files import digest, sha256_file
from dcbench.metrics.base import ShareMetric, View
from dcbench.metrics.camera_motion import CameraMotionMetric, known_asked
from dcbench.metrics.external import OF_PROGRAM, ExternalOptions, Program
from dcbench.programs import check_start
from dcbench.weights import fetch, load_tensors, tensors_sha256

GRID, MIDDLE = 10, 5  # of the points; index 5 is a little off the middle
THRESHOLD = 0.005  # of the short side
BOTH = {
    ("left", "left"): "pan_right",
    ("right", "right"): "pan_left",
    ("down", "down"): "tilt_up",
    ("up", "up"): "tilt_down",
    ("static", "static"): "static",
}
TOP_BOTTOM = BOTH | {("up", "down"): "zoom_in", ("down", "up"): "zoom_out"}
LEFT_RIGHT = BOTH | {("left", "right"): "zoom_in", ("right", "left"): "zoom_out"}
Points = npt.NDArray[np.float64]  # [10 10 2]: row, column, (x, y) in pixels
PROGRAM = Path(__file__).with_name("cotracker_program.py")


def directions(shift: Points, threshold: float) -> list[str]:
    """(x, y) in pixels -> where it goes: one of right and left, one of down and up, or "static" alone."""
    x, y = shift
    across = ["right"] if x > threshold else ["left"] if x < -threshold else []
    along = ["down"] if y > threshold else ["up"] if y < -threshold else []
    return across + along or ["static"]


def classes(first: Points, last: Points, short_side: int) -> list[str]:
    """The classes of a camera's motion that moves the points of the first frame to those of the last one.

    Places are cut to whole pixels, as VBench does. Static counts only if both pairs of points agree on it; [] if the
    pairs agree on no class.
    """
    shifts = np.trunc(last) - np.trunc(first)
    ends = (shifts[0, MIDDLE], shifts[-1, MIDDLE], shifts[MIDDLE, 0], shifts[MIDDLE, -1])
    top, bottom, left, right = (directions(end, short_side * THRESHOLD) for end in ends)
    votes = (
        {TOP_BOTTOM[pair] for pair in itertools.product(top, bottom) if pair in TOP_BOTTOM},
        {LEFT_RIGHT[pair] for pair in itertools.product(left, right) if pair in LEFT_RIGHT},
    )
    if votes == ({"static"}, {"static"}):
        return ["static"]
    return sorted((votes[0] | votes[1]) - {"static"})


class TrackedCameraMotion(CameraMotionMetric):
    """1 if the asked motion is among those that a clip has, else 0. A clip that is asked for none has no value."""

    extractor: Program  # type: ignore[assignment]
    extractor_options = OF_PROGRAM

    def __init__(self, card: MetricCard, program: Program, asked: str) -> None:
        ShareMetric.__init__(self, card, program)
        self.asked, self.facts = asked, program.facts

    def observe(self, view: View) -> dict[str, Any]:
        """-> 1.0 or 0.0 for each of the seven classes; and "asked" and "value", if a motion was asked for."""
        clip = self.check(view.clip, min_frames=2)
        answer = self.extractor.ask(View(clip))
        first, last = (self._points(answer, name) for name in ("first", "last"))
        found = classes(first, last, min(clip.shape[-2:]))
        seen = {name: float(name in found) for name in CLASSES}
        asked = asked_class(view.prompt) if self.asked == "prompt" else self.asked
        return seen | ({"asked": asked, "value": seen[asked]} if asked else {})

    def _points(self, answer: dict[str, Any], name: str) -> Points:
        try:
            points = np.array(answer[name], dtype=np.float64).reshape(GRID, GRID, 2)
        except (KeyError, ValueError, TypeError) as error:
            raise self.extractor.fail(f'answered no {GRID * GRID} points (x, y) for "{name}"') from error
        if not np.isfinite(points).all():
            raise self.extractor.fail(f'answered points for "{name}" that are not finite')
        return points

    def close(self) -> None:
        self.extractor.close()


def build(card: MetricCard, runtime: Any) -> TrackedCameraMotion:
    """Entry point of `camera_motion`; options: cwd (a copy of CoTracker's code), python, timeout, asked."""
    asked = known_asked(card)
    weights = fetch(card.weights[0], runtime.offline)
    given = {name: card.options[name] for name in ("cwd", "python", "timeout") if name in card.options}
    command = ("{python}", _plain(PROGRAM), "{requests}", "{output}", "{device}", _plain(weights))
    options = ExternalOptions(command=command, **given)
    code = _code(card.name, options.cwd)
    check_start(card.name, options)
    program = Program(card, options, runtime.device)
    program.identity = {
        "name": f"CoTracker2, grid {GRID}x{GRID}, code {code[:12]}",
        "weights_sha256": tensors_sha256(load_tensors(weights)),
        "preprocessing": "RGB 0..255 at the clip's own size; CoTracker's own resize",
    }
    return TrackedCameraMotion(card, program, asked)


def _plain(path: Path) -> str:
    """A path as a part of a command, where {braces} are names."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _code(name: str, folder: str) -> str:
    """A hash of the Python files of a copy of CoTracker. UserError if the folder holds none."""
    package = Path(folder).expanduser() / "cotracker" if folder else None
    if package is None or not (package / "predictor.py").is_file():
        raise UserError(
            f"{name}: options.cwd is {folder!r}, which holds no cotracker/predictor.py. Get the code: `git clone "
            f"https://github.com/facebookresearch/co-tracker`, and give its folder and a Python that has its packages: "
            f"--metrics '{name}(cwd=~/co-tracker, python=~/envs/cotracker/bin/python)'. It runs as a program"
        )
    files = sorted(package.rglob("*.py"))
    return digest([[file.relative_to(package).as_posix(), sha256_file(file)] for file in files], 64)
