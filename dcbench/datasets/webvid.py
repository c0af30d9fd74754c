"""WebVid: web videos with captions, listed in CSV files, for training. Motion annotations are supported."""

import itertools
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item
from dcbench.datasets.text import as_row, csv_record, csv_records, read_lines
from dcbench.errors import UserError, near_match
from dcbench.video import VideoFile

SPLITS = ("train", "val")
COLUMNS = ("videoid", "page_dir", "name")
MOTION_COLUMNS = ("dynamic_confidence", "dynamic_wording", "dynamic_source_category")
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class WebVid:
    """Videos `videos/<page_dir>/<videoid>.mp4`, listed in CSV files in the root. "val" in a file's name makes it `val`.

    Options for motion annotations (DynamiCrafter, arXiv 2310.12190): `min_dynamic_confidence` keeps the captions that
    describe motion; prompt = "dynamic_wording" uses the motion words instead of the caption. `exclude` is a file of
    videos to leave out, one id or path per line: some of ten million web videos cannot be read.
    """

    def __init__(
        self,
        root: Path,
        annotations: str = "",
        min_dynamic_confidence: float = 0,
        prompt: str = "name",
        exclude: str = "",
    ):
        self.root = root
        self.annotations = annotations
        self.min_dynamic_confidence = min_dynamic_confidence
        self.prompt = prompt
        lines = read_lines(self._find(exclude, "exclude")) if exclude else []
        self.excluded = frozenset(line.strip() for line in lines)
        if prompt not in ("name", "dynamic_wording"):
            raise UserError(f"webvid: prompt = {prompt!r}, expected 'name' or 'dynamic_wording'")

    @property
    def needs_motion(self) -> bool:
        return self.min_dynamic_confidence > 0 or self.prompt == "dynamic_wording"

    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def items(self, split: str) -> Sequence[Item]:
        if split not in SPLITS:
            raise UserError(f"webvid: split {split!r}, expected one of {', '.join(SPLITS)}.{near_match(split, SPLITS)}")
        lists = [self._list(file, split) for file in self._files(split)]
        names, place = [], array("q")
        for number, rows in enumerate(lists):
            for start, end, item in rows.records():
                if item.id in self.excluded or item.path in self.excluded:
                    continue
                names.append(item.id.encode())
                place.extend((number, start, end))
        if not names:
            raise UserError(
                f"webvid: no video of split {split} is left"
                + (f"; min_dynamic_confidence is {self.min_dynamic_confidence}" if self.needs_motion else "")
                + ("; exclude leaves videos out" if self.excluded else "")
            )
        # if two rows name one video, the later row is used
        _, last = np.unique(np.array(names[::-1]), return_index=True)
        return Videos(lists, np.array(place).reshape(-1, 3)[::-1][last])

    def _files(self, split: str) -> list[Path]:
        if self.annotations:
            return [self._find(self.annotations, "annotations")]
        files = sorted(file for file in self.root.glob("*.csv") if (split == "val") == ("val" in file.stem))
        if not files:
            raise UserError(
                f"webvid: no CSV file for split {split} in {self.root}; expected for example results_2M_{split}.csv "
                f"with the columns {', '.join(COLUMNS)}, and videos/<page_dir>/<videoid>.mp4"
            )
        return files

    def _find(self, name: str, option: str) -> Path:
        for path in (Path(name).expanduser(), self.root / name):
            if path.is_file():
                return path
        raise UserError(f"webvid: {option} = {name!r} is no file, neither as given nor in {self.root}")

    def _list(self, file: Path, split: str) -> "Listing":
        columns = next((fields for *_, fields in csv_records(file)), [])
        wanted = (*COLUMNS, *(MOTION_COLUMNS if self.needs_motion else ()))
        missing = [name for name in wanted if name not in columns]
        if missing:
            raise UserError(f"{file} has no column {missing[0]}; it has {', '.join(columns) or 'none'}")
        return Listing(self, file, split, tuple(columns))


@dataclass(frozen=True)
class Listing:
    """One CSV file: selects records and makes an item from a record."""

    source: WebVid
    file: Path
    split: str
    columns: tuple[str, ...]

    def records(self) -> Iterator[tuple[int, int, Item]]:
        """(first byte, end byte, item) of each selected record."""
        source = self.source
        for number, (start, end, fields) in enumerate(itertools.islice(csv_records(self.file), 1, None), 2):
            if not source.needs_motion or self._confidence(fields, number) >= source.min_dynamic_confidence:
                yield start, end, self.item(fields, f", line {number}")

    def item(self, fields: Sequence[str], where: str = "") -> Item:
        row = as_row(self.columns, fields, f"{self.file}{where}")
        name, page = row["videoid"].strip(), row["page_dir"].strip()
        if not SAFE.fullmatch(name) or not all(SAFE.fullmatch(part) for part in page.split("/")):
            raise UserError(f"{self.file}{where}: videoid {name!r} or page_dir {page!r} is no plain name")
        caption = " ".join((row[self.source.prompt] or row["name"]).split())
        path = f"videos/{page}/{name}.mp4"
        label = row.get("dynamic_source_category") or None
        return Item(name, VideoFile(self.source.root / path), path, (caption,) if caption else (), self.split, label)

    def _confidence(self, fields: Sequence[str], number: int) -> float:
        value = as_row(self.columns, fields, f"{self.file}, line {number}")["dynamic_confidence"]
        try:
            return float(value or 0)
        except ValueError as error:
            raise UserError(f"{self.file}, line {number}: dynamic_confidence {value!r} is not a number") from error


class Videos(Sequence[Item]):
    """Videos sorted by id. Indexing reads an item from its line of a CSV file.

    Ten million videos take 240 MB this way. As items they would take 10 GB in each training process.
    """

    def __init__(self, lists: Sequence[Listing], places: np.ndarray) -> None:
        self.lists, self.places = lists, places  # [n, 3]: number of the list, first byte, end byte

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Videos": ...
    def __getitem__(self, index: int | slice) -> "Item | Videos":
        if isinstance(index, slice):
            return Videos(self.lists, self.places[index])
        number, start, end = self.places[index].tolist()
        rows = self.lists[number]
        return rows.item(csv_record(rows.file, start, end))


def load_webvid(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> WebVid:
    """Entry point of the card `webvid`."""
    if root is None:
        raise UserError("webvid needs its files: give --data DIR")
    return WebVid(root, **options)
