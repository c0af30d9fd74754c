"""A made-up suite in Physics-IQ's official layout: 3 events, each seen from 3 places and filmed twice.

With it, the loader, the protocol and the metrics of Physics-IQ can be tried without a download. Discs fall, roll and
hit each other; the second take begins a little differently. The same arguments give the same bytes.
"""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dcbench.datasets.make import claim
from dcbench.errors import UserError
from dcbench.files import atomic_write, write_text
from dcbench.progress import track
from dcbench.video import write_mp4

HEIGHT = 144  # of the frames; the width is 16/9 of it
SECONDS, FPS, STEPS = 5, 30, 20  # steps of the simulation for one frame
GRAVITY, BOUNCE = 1.5, 0.7  # heights of the picture / s^2; share of the speed that a bounce keeps
FLOOR = 0.9  # lengths are in heights of the picture, y points down
VIEWS = {"perspective-left": (0.15, 0.9), "perspective-center": (0.0, 1.0), "perspective-right": (-0.15, 0.9)}
Array = np.ndarray


@dataclass(frozen=True)
class Disc:
    x: float
    y: float
    vx: float = 0.0
    vy: float = 0.0
    radius: float = 0.1
    colour: tuple[int, int, int] = (230, 120, 40)

    def moved(self, seconds: float) -> "Disc":
        """After a short time: it falls, bounces on the floor and at the walls (x = 0 and 16/9)."""
        vy = self.vy + GRAVITY * seconds
        x, y, vx = self.x + self.vx * seconds, self.y + vy * seconds, self.vx
        lowest = FLOOR - self.radius
        if y > lowest:
            y, vy = lowest, -BOUNCE * vy if vy > 0.05 else 0.0
        if not self.radius < x < 16 / 9 - self.radius:
            x, vx = min(max(x, self.radius), 16 / 9 - self.radius), -BOUNCE * vx
        return replace(self, x=x, y=y, vx=vx, vy=vy)


@dataclass(frozen=True)
class Event:
    name: str
    caption: str
    category: str
    discs: Callable[[float], list[Disc]]  # `off`: how much this take begins differently


EVENTS = (
    Event(
        "trimmed-disc-falls",
        "A disc falls to the floor and bounces.",
        "Solid Mechanics",
        lambda off: [Disc(0.8 + off, 0.2, vx=0.1 + off)],
    ),
    Event(
        "trimmed-disc-rolls-into-disc",
        "A disc rolls along the floor into another one.",
        "Solid Mechanics",
        lambda off: [Disc(0.2, FLOOR - 0.1, vx=0.5 + off), Disc(1.0 + off, FLOOR - 0.1, colour=(60, 160, 230))],
    ),
    Event(
        "trimmed-spot-of-light",
        "A spot of light runs over the wall.",
        "Optics",
        lambda off: [Disc(0.3 + off, 0.3, vx=0.7, radius=0.15, colour=(250, 250, 200))],
    ),
)


def make_suite(out: Path, height: int = HEIGHT, quiet: bool = False) -> int:
    """Write the suite to a folder: descriptions.csv, switch frames, videos at 30 fps. Returns the number of videos.

    The same call continues. UserError if the folder holds something else.
    """
    if height < 32 or height % 2:
        raise UserError(f"--size {height}: expected an even number, 32 or more")
    claim(out, {"dataset": "physics-iq", "height": height})
    rows = list(recordings())
    for name, event, view, take in track(rows, len(rows), "writing physics-iq videos", quiet=quiet):
        number, rest = name.split("_", 1)
        path = out / "split-videos" / "testing-videos" / f"{FPS}FPS" / f"{number}_testing-videos_{FPS}FPS_{rest}"
        if path.is_file():  # writing is atomic, so an existing file is complete
            continue
        frames = film(event, view, take, height)
        if take == "take-1":
            _write_picture(out / "switch-frames" / f"{number}_switch-frames_anyFPS_{view}_{event.name}.jpg", frames[0])
        write_mp4(path, torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous(), FPS)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("scenario", "description", "category", "generated_video_name"))
    for name, event, view, _ in rows:
        writer.writerow((name, event.caption, event.category, f"{name.split('_')[0]}_{view}_{event.name}.mp4"))
    write_text(out / "descriptions.csv", table.getvalue())
    return len(rows)


def recordings() -> Iterator[tuple[str, Event, str, str]]:
    """(name in the list, event, view, take): first takes have the numbers 1 to 9, second takes those after them."""
    number = 0
    for take in ("take-1", "take-2"):
        for event in EVENTS:
            for view in VIEWS:
                number += 1
                yield f"{number:04d}_{view}_{take}_{event.name}.mp4", event, view, take


def film(event: Event, view: str, take: str, height: int) -> Array:
    """One recording, uint8 [150 height width 3]."""
    discs = event.discs(0.0 if take == "take-1" else 0.02)
    move = _drift if event.category == "Optics" else _collide
    frames = []
    for _ in range(SECONDS * FPS):
        frames.append(paint(discs, view, height))
        for _ in range(STEPS):
            discs = move(discs, 1 / (FPS * STEPS))
    return np.stack(frames)


def paint(discs: list[Disc], view: str, height: int) -> Array:
    """A picture of the discs before a wall with stripes, uint8 [height width 3]. Edges are smooth over one pixel."""
    shift, scale = VIEWS[view]
    width = round(height * 16 / 9 / 2) * 2
    y, x = np.mgrid[0:height, 0:width].astype(np.float64) / height
    x, y = (x - 8 / 9 - shift) / scale + 8 / 9, (y - 0.5) / scale + 0.5
    wall = 110 + 25 * np.sin(9 * x) * np.cos(7 * y)
    picture = np.where(y > FLOOR, 70.0, wall)[..., None].repeat(3, -1)
    for disc in discs:
        inside = np.clip((disc.radius - np.hypot(x - disc.x, y - disc.y)) * height * scale + 0.5, 0, 1)[..., None]
        picture = picture + inside * (np.array(disc.colour) - picture)
    return np.round(picture).astype(np.uint8)


def _drift(discs: list[Disc], seconds: float) -> list[Disc]:
    """Light has no weight: it goes on, and turns at the walls."""
    moved = []
    for disc in discs:
        x, vx = disc.x + disc.vx * seconds, disc.vx
        if not disc.radius < x < 16 / 9 - disc.radius:
            vx = -vx
        moved.append(replace(disc, x=x, vx=vx))
    return moved


def _collide(discs: list[Disc], seconds: float) -> list[Disc]:
    """Discs of equal weight that touch and come nearer exchange their speeds along the line between them."""
    moved = [disc.moved(seconds) for disc in discs]
    if len(moved) == 2:
        one, other = moved
        dx, dy = other.x - one.x, other.y - one.y
        distance = max(float(np.hypot(dx, dy)), 1e-9)
        nearer = ((one.vx - other.vx) * dx + (one.vy - other.vy) * dy) / distance
        if distance < one.radius + other.radius and nearer > 0:
            push = nearer * dx / distance, nearer * dy / distance
            one = replace(one, vx=one.vx - push[0], vy=one.vy - push[1])
            moved = [one, replace(other, vx=other.vx + push[0], vy=other.vy + push[1])]
    return moved


def _write_picture(path: Path, frame: Array) -> None:
    with atomic_write(path) as temporary:
        Image.fromarray(frame).save(temporary, "JPEG", quality=95)
