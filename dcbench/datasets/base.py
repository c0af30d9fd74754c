"""What a dataset yields; the protocol chooses videos, frames and captions from it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dcbench.errors import UserError


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds. `num_frames` counts frames that really decode, not what the header claims."""

    num_frames: int
    fps: float
    height: int
    width: int
    decoder: str  # "decord", "pyav" or "procedural"


class Video(Protocol):
    """A video to read exact frames from: a file, or a procedural world. Must be picklable."""

    def info(self) -> VideoInfo: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [len(indices), 3, h, w]; raises VideoError, which names the video and the reason."""
        ...


class VideoError(UserError):
    """A video that cannot be read, is too short, or hangs its decoder."""


@dataclass(frozen=True)
class Item:
    """One video of a dataset."""

    id: str  # unique within the dataset, free of path separators
    video: Video
    path: str  # relative to the dataset's root, "/" as separator; what a manifest shows
    captions: tuple[str, ...]  # candidates; the protocol chooses one
    split: str
    label: str | None = None  # class name, where the dataset has classes
    group: str | None = None  # source video or recording that several items share (UCF-101: Class_gXX)


class Dataset(Protocol):
    """Items sorted by id, whatever the file system's order."""

    def items(self, split: str) -> list[Item]: ...

    def splits(self) -> tuple[str, ...]: ...
