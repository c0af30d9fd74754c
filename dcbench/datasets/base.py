"""The dataset interface: items with a video and captions. The protocol chooses among them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, runtime_checkable
from typing import Protocol as Interface

from dcbench.catalogue import DatasetCard, load_entry_point
from dcbench.errors import UserError, near_match
from dcbench.takes import Takes
from dcbench.video import Video, VideoError, VideoInfo

__all__ = ["Dataset", "Item", "Shaped", "Video", "VideoError", "VideoInfo", "find_root", "load_dataset"]


@dataclass(frozen=True)
class Item:
    """One video of a dataset, or one picture."""

    id: str  # unique within the dataset, free of path separators
    video: Video
    path: str  # relative to the dataset's root, "/" as separator; the manifest shows it
    captions: tuple[str, ...]  # candidates; the protocol chooses one
    split: str
    label: str | None = None  # class name, if the dataset has classes
    group: str | None = None  # source video or recording that several items share (UCF-101: Class_gXX)
    place: int | None = None  # in an order that others published; for protocols with selection = "published"
    film: bool = False  # only for metrics of sets to compare with; never animated
    truth: Mapping[str, Any] | None = None  # JSON values: what the video shows, for metrics that need it
    takes: Takes | None = None  # of a picture: two recordings of what happened next
    clip_name: str = ""  # the name that a benchmark wants for its clip, without ending; "": the clip's id


class Dataset(Interface):
    """`items` gives the videos of a split, sorted by id."""

    def items(self, split: str) -> Sequence[Item]: ...

    def splits(self) -> tuple[str, ...]: ...


@runtime_checkable
class Shaped(Interface):
    """A data set whose pictures lie there in several shapes."""

    def for_shape(self, height: int, width: int) -> Dataset:
        """The data set with the pictures for clips of this size. UserError if one is missing."""
        ...

    def every_picture(self) -> Sequence[Item]:
        """An item for each picture in each shape that is there, to check the files."""
        ...


def find_root(card: DatasetCard, data: Path | None) -> Path | None:
    """The folder (or list) of a dataset: `data`, or else $DCBENCH_DATA/<name>. None if the dataset needs no files."""
    if not card.needs_files:
        return None
    base = os.environ.get("DCBENCH_DATA")
    root = data.expanduser() if data else Path(base).expanduser() / card.name if base else None
    if root is not None and (root.is_dir() or (card.takes_list and root.is_file())):
        return root
    looked = f"{root} does not exist" if root else "neither --data nor DCBENCH_DATA is given"
    raise UserError(
        f"{card.title} is not here: {looked}.\n"
        f"  Get it from {card.url or 'your own disk'} ({card.size or 'size unknown'}, {card.licence or 'your licence'})"
        f" and give --data DIR, or put it at $DCBENCH_DATA/{card.name}.\n"
        f"  Expected below that folder:\n    " + "\n    ".join(card.layout.strip().splitlines())
    )


def load_dataset(card: DatasetCard, root: Path | None = None, options: Mapping[str, Any] | None = None) -> Dataset:
    """Load a card's dataset from the files in `root` (see `find_root`). `options` override the card's own.

    UserError for an option that the card does not have.
    """
    chosen = dict(options or {})
    allowed = [*card.options, *(key.removeprefix("options.") for key in card.settable)]
    if unknown := sorted(set(chosen) - set(allowed)):
        hint = near_match(unknown[0], allowed)
        raise UserError(f"{card.name}: unknown option {unknown[0]!r}.{hint} It has: {', '.join(allowed) or 'none'}")
    return load_entry_point(card)(card, root, {**card.options, **chosen})
