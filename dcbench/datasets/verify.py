"""Decodes every video of a dataset. Lists broken, damaged, short, duplicated, missing and unused files."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcbench.datasets.base import Dataset, Item, Shaped
from dcbench.datasets.images import Picture
from dcbench.errors import UserError, as_text
from dcbench.progress import track
from dcbench.video import FileFacts, PassingError, VideoFile, examine, in_order
from dcbench.video_files import list_videos

SHOWN = 20  # entries of each kind in the text; the lists are complete


@dataclass
class Verification:
    """Result of decoding a split. The lists hold paths relative to the root."""

    split: str
    checked: int = 0
    frames: int = 0
    min_frames: int = 0
    unusable: list[str] = field(default_factory=list)  # the next four together; training can leave them out
    missing: list[str] = field(default_factory=list)  # listed, but the file does not exist
    broken: list[str] = field(default_factory=list)  # "path: reason"; no frame can be read
    damaged: list[str] = field(default_factory=list)  # "path: reason"; the frames before the damage can be read
    short: list[str] = field(default_factory=list)  # "path: n frames"; fewer than min_frames
    unchecked: list[str] = field(default_factory=list)  # "path: reason"; the reason may pass (a killed decoder, a disk)
    duplicates: list[list[str]] = field(default_factory=list)  # groups of videos with the same pixels
    unused: list[str] = field(default_factory=list)  # video files in the root that no split names
    left_out: list[str] = field(default_factory=list)  # in the root, but not read as videos
    decoders: dict[str, int] = field(default_factory=dict)  # how many files "auto" reads by which decoder

    @property
    def ok(self) -> bool:
        return not (self.missing or self.broken or self.damaged or self.short or self.unchecked or self.duplicates)

    def text(self) -> str:
        """Text for the screen: one line per kind, then its videos."""
        by = ", ".join(f"{count} by {name}" for name, count in sorted(self.decoders.items())) or "none"
        lines = [f"split {self.split}: {self.checked} videos, {self.frames} frames decoded; read {by}"]
        kinds = {
            "missing": self.missing,
            "broken": self.broken,
            "damaged": self.damaged,
            f"shorter than {self.min_frames} frames": self.short,
            "not checked, for a reason that may pass; try again": self.unchecked,
            "duplicated (same pixels)": [" = ".join(group) for group in self.duplicates],
            "in the folder, but in no split": self.unused,
            "in the folder, but not read as videos": self.left_out,
        }
        for kind, entries in kinds.items():
            if entries:
                lines.append(f"{kind}: {len(entries)}")
                lines += [f"  {entry}" for entry in entries[:SHOWN]]
                if len(entries) > SHOWN:
                    lines.append(f"  ... and {len(entries) - SHOWN} more")
        return "\n".join([*lines, "all is well" if self.ok else "something is wrong"])


def verify(
    dataset: Dataset, split: str, root: Path | None = None, min_frames: int = 16, workers: int = 2, quiet: bool = False
) -> Verification:
    """Decode every video of a split in `workers` processes. With `root`, also list files that are in no split.

    Of a data set with pictures in several shapes, every picture is decoded.
    """
    items = dataset.every_picture() if isinstance(dataset, Shaped) else dataset.items(split)
    result = Verification(split, min_frames=min_frames)
    same: dict[str, list[str]] = defaultdict(list)
    found = in_order(_examine, items, workers)
    for item, facts in track(zip(items, found, strict=True), len(items), f"verifying {split}", quiet=quiet):
        result.checked += 1
        path = item.video.path if isinstance(item.video, VideoFile | Picture) else None
        if isinstance(facts, PassingError):
            result.unchecked.append(f"{item.path}: {str(facts).removeprefix(as_text(f'{path}: '))}")
            continue
        if isinstance(facts, UserError):
            result.unusable.append(item.path)
            if path is not None and not path.exists():
                result.missing.append(item.path)
            else:
                result.broken.append(f"{item.path}: {str(facts).removeprefix(as_text(f'{path}: '))}")
            continue
        result.frames += facts.frames
        result.decoders[facts.decoder] = result.decoders.get(facts.decoder, 0) + 1
        if facts.hash:
            same[facts.hash].append(item.path)
        damage = _damage(facts)
        short = facts.frames < min_frames and not isinstance(item.video, Picture)
        if damage or short:
            result.unusable.append(item.path)
        if damage:
            result.damaged.append(f"{item.path}: {damage}")
        if short:
            result.short.append(f"{item.path}: {facts.frames} frames")
    result.duplicates = sorted(group for group in same.values() if len(group) > 1)
    if root is not None and not isinstance(dataset, Shaped):
        listing = list_videos(root)
        result.unused = _unused(dataset, root, listing.videos)
        result.left_out = list(map(as_text, listing.left_out))
    return result


def _examine(item: Item) -> FileFacts:
    if isinstance(item.video, VideoFile):
        return examine(item.video.path, with_hash=True)
    info = item.video.info()
    item.video.read(range(info.num_frames))
    return FileFacts(
        info.num_frames, info.num_frames, info.fps, info.height, info.width, info.decoder, [], "", None, False
    )


def _damage(facts: FileFacts) -> str:
    """Why a file is damaged, or "". DivX files declare one frame too many (a placeholder); that is no damage."""
    if facts.damage:
        return facts.damage[0]
    if facts.fps <= 0:
        return "no frame rate"
    if facts.declared > facts.frames + 1:
        return f"the header declares {facts.declared} frames, only {facts.frames} can be decoded"
    return ""


def _unused(dataset: Dataset, root: Path, videos: Sequence[str]) -> list[str]:
    """Those videos below the root that belong to no split."""
    used: set[Path] = set()
    for split in dataset.splits():
        try:
            items = dataset.items(split)
        except UserError:  # the list of this split is missing
            continue
        used |= {item.video.path.resolve() for item in items if isinstance(item.video, VideoFile)}
    return [as_text(path) for path in videos if (root / path).resolve() not in used]
