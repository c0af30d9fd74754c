"""Reads background, colour, shape and motion of a shapes-world clip from its pixels.

The judge is analytic: no network, no training. It is right on practically every clip of the world itself
(tests/metrics/test_judge.py measures this). Generated clips are judged by the same code.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.clips import check_clip, resize
from dcbench.errors import UserError
from dcbench.metrics.base import ShareMetric, View
from dcbench.shapes import BACKGROUNDS, COLOURS, GROWTH, MOTIONS, SHAPES, TRAVEL, coverage

SIZE = 64  # pixels per side; clips are resized to it
ASPECTS = ("background", "colour", "shape", "motion")
VISIBLE = 0.01  # an object must cover at least this share of a frame
PRESENT = 0.9  # in at least this share of the frames


@dataclass(frozen=True)
class Verdict:
    """What a clip shows. "none" if no object is found."""

    background: str
    colour: str
    shape: str
    motion: str
    background_error: float  # grey levels between the frame's border and the nearest named background
    colour_error: float
    travel: tuple[float, float, float]  # measured (x, y, growth), in units of TRAVEL and GROWTH


def judge(clip: Tensor, fps: float) -> Verdict:
    """Judge a clip, uint8 [t, 3, h, w] of square frames, that plays at `fps` frames a second."""
    x = check_clip(clip).float()
    back = border(x).median(0).values  # [3]
    background, background_error = nearest(back, BACKGROUNDS)
    distance = (x - back[:, None, None]).square().sum(1).sqrt()  # t h w
    peak = distance.flatten().topk(max(1, distance.numel() // 200)).values.median()
    nothing = Verdict(background, "none", "none", "none", background_error, math.inf, (0.0, 0.0, 0.0))
    if peak < 40:  # object and background colours are at least 60 apart
        return nothing
    core = distance > 0.8 * peak
    front = x.permute(1, 0, 2, 3)[:, core].median(1).values
    colour, colour_error = nearest(front, COLOURS)
    axis = front - back
    mask = ((x - back[:, None, None]) * axis[:, None, None]).sum(1) / axis.square().sum()
    mask = torch.where(mask > 0.15, mask, 0).clamp(0, 1)  # t h w
    present = mask.mean((1, 2)) > VISIBLE
    if float(present.float().mean()) < PRESENT:
        return nothing
    place, radius = moments(mask)
    motion, travel = name_motion(place, radius, present, fps)
    return Verdict(background, colour, name_shape(mask, place, present), motion, background_error, colour_error, travel)


def border(x: Tensor, width: int = 2) -> Tensor:
    """The pixels of each frame's border: [t, 3, h, w] -> [n, 3]."""
    parts = (x[:, :, :width], x[:, :, -width:], x[:, :, :, :width], x[:, :, :, -width:])
    return torch.cat([part.permute(0, 2, 3, 1).reshape(-1, 3) for part in parts])


def nearest(colour: Tensor, palette: dict[str, tuple[int, int, int]]) -> tuple[str, float]:
    """The nearest named colour and its distance in grey levels."""
    distances = {name: float((colour - torch.tensor(rgb)).square().sum().sqrt()) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name, distances[name]


def moments(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centroid [t, 2] (x, y) and root of the area [t], in half-widths."""
    size = mask.shape[-1]
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    total = mask.sum((1, 2)).clamp(min=1e-6)
    place = torch.stack([(mask.sum(1) * axis).sum(1), (mask.sum(2) * axis).sum(1)], 1) / total[:, None]
    return place, (total * (2 / size) ** 2).sqrt()


def name_motion(place: Tensor, radius: Tensor, present: Tensor, fps: float) -> tuple[str, tuple[float, float, float]]:
    """The nearest motion, and the least-squares rates of (x, y, log radius) in units of TRAVEL and GROWTH."""
    seconds = torch.arange(len(place))[present] / fps
    values = torch.cat([place / TRAVEL, (radius.clamp(min=1e-6).log() / GROWTH)[:, None]], 1)[present]
    centred = seconds - seconds.mean()
    rates = (centred[:, None] * (values - values.mean(0))).sum(0) / centred.square().sum().clamp(min=1e-9)
    if float(rates[:2].abs().max()) > 0.5:
        rates[2] = 0  # an object that leaves the frame seems to shrink
    motion = min(MOTIONS, key=lambda name: float((rates - torch.tensor(MOTIONS[name])).square().sum()))
    return motion, (float(rates[0]), float(rates[1]), float(rates[2]))


def name_shape(mask: Tensor, place: Tensor, present: Tensor) -> str:
    """Draw each shape with the mask's centroid and area; return the shape that differs least from the mask."""
    size = mask.shape[-1]
    edge = torch.stack([mask[:, 0], mask[:, -1], mask[:, :, 0], mask[:, :, -1]]).amax((0, 2)) > 0.3
    use = present & ~edge if bool((present & ~edge).any()) else present
    chosen, area = mask[use], mask[use].mean((1, 2)) * 4
    errors = {}
    for shape in SHAPES:
        middle = torch.zeros(1)
        unit = float(coverage(shape, middle, middle, middle + 0.4, 256).mean()) * 4 / 0.4**2  # area at radius 1
        drawn = coverage(shape, place[use, 0], place[use, 1], (area / unit).sqrt(), size)
        errors[shape] = float((drawn - chosen).abs().mean())
    return min(errors, key=errors.__getitem__)


class Judge:
    """The judge as an extractor. The last verdict is cached, because several metrics use one clip."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, float, Verdict] | None = None

    @property
    def identity(self) -> dict[str, str]:
        how = f"resize to {SIZE}x{SIZE}"
        return {"name": "analytic judge of the shapes world", "weights_sha256": "", "preprocessing": how}

    def __call__(self, clip: Tensor, fps: float) -> Verdict:
        if self._last is None or self._last[0] is not clip or self._last[1] != fps:
            self._last = (clip, fps, judge(resize(clip, SIZE, SIZE), fps))
        return self._last[2]


class JudgeMetric(ShareMetric):
    """1 if a clip shows what its scene describes, else 0. The score is the share of right clips."""

    extractor: Judge

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value": 1.0 or 0.0, "shown": what the clip shows}."""
        verdict, truth = self.extractor(self.check(view.clip), view.need("fps")), view.need("truth")
        aspects = ASPECTS if self.card.options["aspect"] == "all" else (self.card.options["aspect"],)
        shown = [getattr(verdict, aspect) for aspect in aspects]
        right = all(word == truth.get(aspect) for word, aspect in zip(shown, aspects, strict=True))
        return {"value": float(right), "shown": " ".join(shown)}


@cache
def _shared() -> Judge:
    return Judge()


def build(card: MetricCard, runtime: Any) -> JudgeMetric:
    """Entry point of the cards `judge_*`; options: aspect."""
    aspect = card.options.get("aspect")
    if aspect not in (*ASPECTS, "all"):
        raise UserError(f'{card.name}: options.aspect is "{aspect}"; allowed: {", ".join(ASPECTS)}, all')
    return JudgeMetric(card, _shared())
