"""A procedural world: one flat shape moves, grows or stays on a flat background. A caption describes it.

Each condition of an image-to-video model gives information that the others do not. Only the caption gives the motion:
the start position does not depend on it. Only the image gives the position and the exact shades. Only the frame stride
gives the speed. A video is a function of (version, seed, split, index); nothing is stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dcbench.errors import UserError, near_match

VERSION = 1  # part of every seed; raise it if the world changes

SHAPES = ("circle", "cross", "square", "triangle")
COLOURS = {
    "blue": (50, 80, 225),
    "green": (35, 175, 60),
    "orange": (245, 135, 25),
    "purple": (150, 50, 190),
    "red": (215, 30, 35),
    "yellow": (245, 215, 45),
}
BACKGROUNDS = {
    "black": (20, 20, 20),
    "brown": (105, 70, 45),
    "cyan": (130, 225, 225),
    "gray": (125, 125, 125),
    "pink": (250, 175, 205),
    "white": (235, 235, 235),
}
MOTIONS = {  # (dx, dy, growth) in units of TRAVEL and GROWTH; y points down
    "moves down": (0, 1, 0),
    "moves left": (-1, 0, 0),
    "moves right": (1, 0, 0),
    "moves up": (0, -1, 0),
    "grows": (0, 0, 1),
    "stays still": (0, 0, 0),
}
SIZES = {"large": 0.40, "small": 0.30}  # radius, in half-widths of the frame
TRAVEL = 0.27  # half-widths per second
GROWTH = 0.24  # natural logarithm of the radius, per second
JITTER = 0.2  # largest start offset in x and in y, half-widths
SHADE = 12  # largest difference from a named colour, grey levels per channel

TEMPLATES = (
    "a {size} {colour} {shape} {motion} on a {background} background",
    "on a {background} background, a {size} {colour} {shape} {motion}",
    "the {colour} {shape}, {size}, {motion} on {background}",
)


@dataclass(frozen=True)
class Scene:
    """Everything that a video shows. Positions in half-widths from the centre, shades in 0..255."""

    shape: str
    size: str
    colour: str
    background: str
    motion: str
    start: tuple[float, float]  # (x, y) of the centre at time 0
    colour_shade: tuple[float, ...]
    background_shade: tuple[float, ...]

    def captions(self) -> tuple[str, ...]:
        words = {name: getattr(self, name) for name in ("size", "colour", "shape", "motion", "background")}
        return tuple(template.format(**words) for template in TEMPLATES)

    def place(self, seconds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Centre x, centre y and radius [t] at each time, in half-widths."""
        dx, dy, growth = MOTIONS[self.motion]
        x = self.start[0] + dx * TRAVEL * seconds
        y = self.start[1] + dy * TRAVEL * seconds
        return x, y, SIZES[self.size] * torch.exp(growth * GROWTH * seconds)


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """The scene of one video. Train and test use separate random streams."""
    rng = np.random.default_rng([VERSION, seed, ("train", "test").index(split), index])

    def pick(names: Sequence[str]) -> str:
        return names[int(rng.integers(len(names)))]

    def shade(base: tuple[int, int, int]) -> tuple[float, ...]:
        return tuple(float(np.clip(b + rng.uniform(-SHADE, SHADE), 0, 255)) for b in base)

    colour, background = pick(tuple(COLOURS)), pick(tuple(BACKGROUNDS))
    return Scene(
        shape=pick(SHAPES),
        size=pick(tuple(SIZES)),
        colour=colour,
        background=background,
        motion=pick(tuple(MOTIONS)),
        start=(float(rng.uniform(-JITTER, JITTER)), float(rng.uniform(-JITTER, JITTER))),
        colour_shade=shade(COLOURS[colour]),
        background_shade=shade(BACKGROUNDS[background]),
    )


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, size: int) -> Tensor:
    """Share of each pixel that the shape covers: [t] centres and radii -> [t, size, size] in [0, 1].

    The edge is anti-aliased: coverage falls from 1 to 0 within half a pixel on each side of the outline.
    """
    axis = (torch.arange(size, dtype=x.dtype) + 0.5) * (2 / size) - 1
    u, v, r = axis - x[:, None, None], axis[:, None] - y[:, None, None], radius[:, None, None]
    if shape == "circle":
        distance = (u * u + v * v).sqrt() - r
    elif shape == "square":
        distance = torch.maximum(u.abs(), v.abs()) - 0.9 * r
    elif shape == "triangle":  # equilateral, centroid at the centre, point up
        distance = torch.maximum(v.expand_as(u + v), math.sqrt(3) / 2 * u.abs() - v / 2) - 0.7 * r
    elif shape == "cross":
        distance = torch.minimum(
            torch.maximum(u.abs() - 1.1 * r, v.abs() - 0.4 * r), torch.maximum(u.abs() - 0.4 * r, v.abs() - 1.1 * r)
        )
    else:
        raise UserError(f"shape {shape!r}: expected one of {', '.join(SHAPES)}.{near_match(shape, SHAPES)}")
    return (0.5 - distance * (size / 2)).clamp_(0, 1)


def render(scene: Scene, seconds: Tensor, size: int) -> Tensor:
    """Draw the scene at each time -> uint8 [t, 3, size, size]."""
    mask = coverage(scene.shape, *scene.place(seconds), size)[:, None]
    front, back = (torch.tensor(shade)[:, None, None] for shade in (scene.colour_shade, scene.background_shade))
    return (back + mask * (front - back)).round_().to(torch.uint8)
