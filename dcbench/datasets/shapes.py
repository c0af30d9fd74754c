"""The shapes world as a dataset: a video is computed when it is read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item, VideoError, VideoInfo
from dcbench.errors import UserError, near_match
from dcbench.shapes import Scene, render, scene


@dataclass(frozen=True)
class ShapesVideo:
    """One video of the world; frames are computed when they are read."""

    scene: Scene
    num_frames: int = 48
    fps: float = 25.0
    size: int = 64

    def info(self) -> VideoInfo:
        return VideoInfo(self.num_frames, self.fps, self.size, self.size, "procedural")

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [len(indices), 3, size, size]."""
        wrong = [i for i in indices if not 0 <= i < self.num_frames]
        if wrong:
            raise VideoError(f"shapes video has frames 0..{self.num_frames - 1}; asked for {wrong[:5]}")
        return render(self.scene, torch.tensor([float(i) for i in indices]) / self.fps, self.size)


@dataclass(frozen=True)
class Shapes:
    """The dataset. The first n videos of a split do not depend on the split's size.

    moving: leave out the videos in which nothing moves.
    """

    seed: int = 0
    size: int = 64
    frames: int = 48
    fps: float = 25.0
    train_videos: int = 20000
    test_videos: int = 2048
    moving: bool = False

    def __post_init__(self) -> None:
        for name, lowest in (
            ("seed", 0),
            ("size", 16),
            ("frames", 1),
            ("fps", 1),
            ("train_videos", 0),
            ("test_videos", 0),
        ):
            if getattr(self, name) < lowest:
                raise UserError(f"shapes: {name} = {getattr(self, name)}, expected at least {lowest}")
        if not isinstance(self.moving, bool):
            raise UserError(f"shapes: moving = {self.moving!r}, expected true or false")

    def splits(self) -> tuple[str, ...]:
        return ("train", "test")

    def items(self, split: str) -> list[Item]:
        if split not in self.splits():
            raise UserError(f"shapes: split {split!r}, expected 'train' or 'test'.{near_match(split, self.splits())}")
        return list(_items(self, split))

    def item(self, split: str, index: int) -> Item:
        made = scene(split, index, self.seed)
        video = ShapesVideo(made, self.frames, self.fps, self.size)
        name = f"{index:06d}"
        truth = {name: getattr(made, name) for name in ("background", "colour", "shape", "motion")}
        return Item(f"{split}-{name}", video, f"{split}/{name}", made.captions(), split, made.motion, truth=truth)


@lru_cache(maxsize=4)
def _items(shapes: Shapes, split: str) -> tuple[Item, ...]:
    """Made once a process: thousands of scenes take as long as a small run."""
    count = shapes.train_videos if split == "train" else shapes.test_videos
    items = (shapes.item(split, index) for index in range(count))
    return tuple(item for item in items if not (shapes.moving and item.label == "stays still"))


def load_shapes(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> Shapes:
    """Entry point of the card `shapes`; options are the fields of `Shapes`. `root` is not used."""
    return Shapes(**options)
