"""DAVIS: sequences of pictures, for interpolation. It has no captions."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item, Video, VideoError, VideoInfo
from dcbench.datasets.images import Pictures
from dcbench.datasets.text import read_lines
from dcbench.errors import UserError, as_text, near_match

SPLITS = ("2016", "train", "val", "all")
PICTURES = "JPEGImages/480p"
FPS = 24.0
# The fifty sequences of DAVIS 2016, training and validation. They have 3455 frames, and 357 complete chunks of nine
# frames: the number that VIDIM-Bench's script expects. The ninety of DAVIS 2017 have more.
SEQUENCES_2016 = (
    "bear", "blackswan", "bmx-bumps", "bmx-trees", "boat", "breakdance", "breakdance-flare", "bus", "camel",
    "car-roundabout", "car-shadow", "car-turn", "cows", "dance-jump", "dance-twirl", "dog", "dog-agility",
    "drift-chicane", "drift-straight", "drift-turn", "elephant", "flamingo", "goat", "hike", "hockey",
    "horsejump-high", "horsejump-low", "kite-surf", "kite-walk", "libby", "lucia", "mallard-fly", "mallard-water",
    "motocross-bumps", "motocross-jump", "motorbike", "paragliding", "paragliding-launch", "parkour", "rhino",
    "rollerblade", "scooter-black", "scooter-gray", "soapbox", "soccerball", "stroller", "surf", "swing", "tennis",
    "train",
)  # fmt: skip


@dataclass(frozen=True)
class Unreadable:
    """A sequence that cannot be read, and why."""

    reason: str

    def info(self) -> VideoInfo:
        raise VideoError(self.reason)

    def read(self, indices: Any) -> Any:
        raise VideoError(self.reason)


class Davis:
    """The sequences of DAVIS 2016, of an official split of DAVIS 2017, or of all folders."""

    def __init__(self, root: Path, layout: str = ""):
        places = (root, root / "DAVIS")
        found = next((place for place in places if (place / PICTURES).is_dir()), None)
        if found is None:
            expected = "\n  ".join(layout.strip().splitlines())
            raise UserError(f"davis: no folder {PICTURES} in {root}. Expected there:\n  {expected}")
        self.root = found

    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def items(self, split: str) -> list[Item]:
        """Every sequence of the split, sorted. A listed sequence without a folder is included and fails when read."""
        if split not in SPLITS:
            raise UserError(f"davis: split {split!r}, expected one of {', '.join(SPLITS)}.{near_match(split, SPLITS)}")
        return [
            Item(name, self._video(name), as_text(f"{PICTURES}/{name}"), (), split, group=name)
            for name in sorted(self._names(split))
        ]

    def _names(self, split: str) -> set[str]:
        if split == "2016":
            return set(SEQUENCES_2016)
        if split == "all":
            folders = (self.root / PICTURES).iterdir()
            return {path.name for path in folders if path.is_dir() and not path.name.startswith(".")}
        file = self.root / "ImageSets" / "2017" / f"{split}.txt"
        if not file.is_file():
            raise UserError(f"davis: split {split} needs {file}, which is not there. The splits 2016 and all need none")
        names = {line.strip() for line in read_lines(file) if line.strip()}
        if unsafe := sorted(name for name in names if "/" in name or "\\" in name or name.startswith(".")):
            raise UserError(f"{file}: {unsafe[0]!r} is no name of a sequence")
        return names

    def _video(self, name: str) -> Video:
        """The pictures 00000.jpg, 00001.jpg ... of a sequence."""
        folder = self.root / PICTURES / name
        files = sorted(path.name for path in folder.glob("*.jpg") if not path.name.startswith("."))
        if not files:
            return Unreadable(f"{folder} holds no picture .jpg")
        expected = [f"{number:05d}.jpg" for number in range(len(files))]
        if wrong := [want for want, file in zip(expected, files, strict=True) if want != file]:
            return Unreadable(f"{folder}: {wrong[0]} is missing, so its frames are not consecutive")
        return Pictures(tuple(folder / file for file in files), FPS)


def load_davis(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> Davis:
    """Entry point of the card `davis`."""
    if root is None:
        raise UserError("davis needs its files: give --data DIR")
    return Davis(root, card.layout)
