"""What a clip of the shapes world shows, read from its pixels alone: background, colour, shape and motion.

An analytic judge: no network, no training. On the world's own clips it is right in (practically) every case, which
tests/analysis/test_judge.py measures; a generated clip is judged by the same code.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcbench.clips import check_clip
from dcbench.datasets.shapes import BACKGROUNDS, COLOURS, GROWTH, MOTIONS, SHAPES, TRAVEL, Scene, coverage

ASPECTS = ("background", "colour", "shape", "motion")
VISIBLE = 0.01  # share of the frame that an object covers at least
PRESENT = 0.9  # share of the frames that must show it


@dataclass(frozen=True)
class Verdict:
    """What a clip shows; "none" where there is nothing to name."""

    background: str
    colour: str
    shape: str
    motion: str
    background_error: float  # grey levels between the frame's border and the nearest named background
    colour_error: float
    travel: tuple[float, float, float]  # (x, y, growth) measured, as shares of what the world's motions do

    def agrees(self, scene: Scene) -> dict[str, bool]:
        return {aspect: getattr(self, aspect) == getattr(scene, aspect) for aspect in ASPECTS}


def judge(clip: Tensor, fps: float) -> Verdict:
    """Judge a clip, uint8 [t, 3, h, w] of square frames, that plays at `fps` frames a second."""
    x = check_clip(clip).float()
    back = border(x).median(0).values  # [3]
    background, background_error = nearest(back, BACKGROUNDS)
    distance = (x - back[:, None, None]).square().sum(1).sqrt()  # t h w
    peak = distance.flatten().topk(max(1, distance.numel() // 200)).values.median()
    nothing = Verdict(background, "none", "none", "none", background_error, math.inf, (0.0, 0.0, 0.0))
    if peak < 40:  # the palette's nearest pair is 60 apart
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
    """The motion whose rates of (x, y, log radius), by least squares, are nearest; in shares of the world's rates."""
    seconds = torch.arange(len(place))[present] / fps
    values = torch.cat([place / TRAVEL, (radius.clamp(min=1e-6).log() / GROWTH)[:, None]], 1)[present]
    centred = seconds - seconds.mean()
    rates = (centred[:, None] * (values - values.mean(0))).sum(0) / centred.square().sum().clamp(min=1e-9)
    if float(rates[:2].abs().max()) > 0.5:
        rates[2] = 0  # an object that leaves the frame seems to shrink
    motion = min(MOTIONS, key=lambda name: float((rates - torch.tensor(MOTIONS[name])).square().sum()))
    return motion, (float(rates[0]), float(rates[1]), float(rates[2]))


def name_shape(mask: Tensor, place: Tensor, present: Tensor) -> str:
    """The shape that, drawn with this centroid and area, differs least from the mask over the frames that show it."""
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


def score(clips: Sequence[Tensor], scenes: Sequence[Scene], fps: float) -> dict[str, float]:
    """Share of clips that show what their scene says, for each aspect and for all of them together."""
    found = [judge(clip, fps).agrees(scene) for clip, scene in zip(clips, scenes, strict=True)]
    shares = {aspect: sum(row[aspect] for row in found) / len(found) for aspect in ASPECTS}
    return {**shares, "all": sum(all(row.values()) for row in found) / len(found)}
