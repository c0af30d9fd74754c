"""What a dataset yields; the protocol chooses videos, frames and captions from it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dcbench.catalogue import DatasetCard
from dcbench.errors import UserError
from dcbench.video import Video, VideoError, VideoInfo

__all__ = ["Dataset", "Item", "Video", "VideoError", "VideoInfo", "find_root"]


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

    def items(self, split: str) -> Sequence[Item]: ...

    def splits(self) -> tuple[str, ...]: ...


def find_root(card: DatasetCard, data: Path | None) -> Path | None:
    """Where a dataset's files lie: `data`, or $DCBENCH_DATA/<name>; None for a dataset that needs no files."""
    if not card.needs_files:
        return None
    base = os.environ.get("DCBENCH_DATA")
    root = data.expanduser() if data else Path(base).expanduser() / card.name if base else None
    if root is not None and root.is_dir():
        return root
    looked = f"{root} does not exist" if root else "neither --data nor DCBENCH_DATA is given"
    raise UserError(
        f"{card.title} is not here: {looked}.\n"
        f"  Get it from {card.url or 'your own disk'} ({card.size or 'size unknown'}, {card.licence or 'your licence'})"
        f" and give --data DIR, or put it at $DCBENCH_DATA/{card.name}.\n"
        f"  Expected below that folder:\n    " + "\n    ".join(card.layout.strip().splitlines())
    )
