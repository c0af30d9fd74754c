"""Physics-IQ (Motamed et al., arXiv 2501.09038): pictures of 66 real events from three places, each filmed twice.

A model continues the picture (the switch frame). Its clip is compared with both takes of the event (dcbench.takes).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item
from dcbench.datasets.images import Picture
from dcbench.datasets.text import csv_rows
from dcbench.errors import UserError
from dcbench.takes import Take, Takes

LIST = "descriptions.csv"
NAME = re.compile(r"(?P<number>\d{4})_(?P<view>perspective-[a-z]+)_(?P<take>take-[12])_(?P<scenario>[^_/\\]+)\.mp4")
PLACES = ("split-videos/testing-videos", "split-videos/testing")  # in the README, in the code
RATES = re.compile(r"(\d+)FPS")
SOURCE = 30  # frames per second of the files from which those of other rates are made


@dataclass(frozen=True)
class Recording:
    """A row of the list."""

    number: str  # "0001" to "0396"
    view: str
    take: str
    scenario: str
    caption: str
    category: str

    def video(self, fps: int) -> str:
        return f"{self.number}_testing-videos_{fps}FPS_{self.view}_{self.take}_{self.scenario}.mp4"

    @property
    def picture(self) -> str:
        return f"switch-frames/{self.number}_switch-frames_anyFPS_{self.view}_{self.scenario}.jpg"


class PhysicsIQ:
    """The suite in its official layout. An item is a view of a scenario; its id is the number of its first take."""

    def __init__(self, root: Path):
        self.root = root
        self.videos = next((root / place for place in PLACES if (root / place).is_dir()), root / PLACES[0])
        found = self.videos.iterdir() if self.videos.is_dir() else ()
        rates = (RATES.fullmatch(path.name) for path in found)
        self.rates = sorted(int(rate[1]) for rate in rates if rate)
        self.pairs = _pairs(_read(root / LIST), root / LIST)
        self._check()

    def splits(self) -> tuple[str, ...]:
        return ("all",)

    def items(self, split: str) -> list[Item]:
        if split != "all":
            raise UserError(f"physics-iq: split {split!r}; it has the split all alone")
        return [self._item(*pair) for pair in self.pairs]

    def _item(self, first: Recording, second: Recording) -> Item:
        truth = {"view": first.view, "category": first.category, "scenario": first.scenario}
        return Item(
            first.number,
            Picture(self.root / first.picture),
            first.picture,
            (first.caption,) if first.caption else (),
            "all",
            label=first.category,
            group=first.scenario,
            truth=truth,
            takes=Takes(self._take(first), self._take(second)),
            clip_name=f"{first.number}_{first.view}_{first.scenario}",
        )

    def _take(self, of: Recording) -> Take:
        paths = {fps: self._path(of, fps) for fps in self.rates}
        return Take({fps: path for fps, path in paths.items() if path.is_file()})

    def _path(self, of: Recording, fps: int) -> Path:
        return self.videos / f"{fps}FPS" / of.video(fps)

    def _check(self) -> None:
        """Raise UserError if a picture or a take is not there: a score of half a suite is not the suite's score."""
        needed = [self.root / first.picture for first, _ in self.pairs]
        needed += [self._path(take, SOURCE) for pair in self.pairs for take in pair]
        if missing := [path for path in needed if not path.is_file()]:
            raise UserError(
                f"{self.root}: {len(missing)} of {len(needed)} files that {LIST} names are missing, for example "
                f"{missing[0].relative_to(self.root)}. Get the rest of the suite. To score a part of it, give a folder "
                f"with a {LIST} of that part"
            )


def _read(path: Path) -> list[Recording]:
    """The rows of the list. UserError for a name that is not one of a recording."""
    if not path.is_file():
        raise UserError(f"{path} is missing. It lies in `descriptions/` of google-deepmind/physics-IQ-benchmark")
    expected = ("scenario", "description", "category")
    found = []
    for number, row in csv_rows(path, ",", set(expected).issubset, ", ".join(expected)):
        name = NAME.fullmatch(row["scenario"].strip())
        if name is None:
            raise UserError(
                f"{path}, line {number}: {row['scenario']!r} is no recording; expected a name such as "
                "0001_perspective-left_take-1_trimmed-ball-and-block-fall.mp4"
            )
        found.append(
            Recording(**name.groupdict(), caption=row["description"].strip(), category=row["category"].strip())
        )
    return found


def _pairs(rows: Sequence[Recording], path: Path) -> list[tuple[Recording, Recording]]:
    """(take 1, take 2) of each view of a scenario, by the number of take 1. UserError if one is missing or double."""
    by_place: dict[tuple[str, str], dict[str, Recording]] = {}
    for row in rows:
        takes = by_place.setdefault((row.scenario, row.view), {})
        if row.take in takes:
            raise UserError(f"{path}: {row.scenario}, {row.view} has {row.take} twice")
        takes[row.take] = row
    for (scenario, view), takes in by_place.items():
        if missing := {"take-1", "take-2"} - {*takes}:
            raise UserError(f"{path}: {scenario}, {view} has no {min(missing)}; both takes are needed")
    if not by_place:
        raise UserError(f"{path} names no recording")
    pairs = [(takes["take-1"], takes["take-2"]) for takes in by_place.values()]
    return sorted(pairs, key=lambda pair: pair[0].number)


def load_physics_iq(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> PhysicsIQ:
    """Entry point of the card `physics-iq`."""
    if root is None:
        raise UserError("physics-iq needs its files: give --data DIR")
    return PhysicsIQ(root)
