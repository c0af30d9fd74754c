"""What a dataset yields; the protocol chooses videos, frames and captions from it."""

from dataclasses import dataclass
from typing import Protocol

from dcbench.video import Video, VideoError, VideoInfo

__all__ = ["Dataset", "Item", "Video", "VideoError", "VideoInfo"]


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
