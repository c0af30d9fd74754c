"""WebVid: captioned web videos listed in CSV files, for training; also the release with motion annotations."""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item
from dcbench.datasets.text import open_text
from dcbench.errors import UserError, near_match
from dcbench.video import VideoFile

SPLITS = ("train", "val")
COLUMNS = ("videoid", "page_dir", "name")
MOTION_COLUMNS = ("dynamic_confidence", "dynamic_wording", "dynamic_source_category")
SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class WebVid:
    """Videos `videos/<page_dir>/<videoid>.mp4` of the CSV files in the root; `train` and `val` by the file's name.

    With motion annotations: `min_dynamic_confidence` keeps the captions that speak of motion, and prompt =
    "dynamic_wording" takes the words of motion in place of the caption (DynamiCrafter, arXiv 2310.12190).
    """

    def __init__(self, root: Path, annotations: str = "", min_dynamic_confidence: float = 0, prompt: str = "name"):
        self.root = root
        self.annotations = annotations
        self.min_dynamic_confidence = min_dynamic_confidence
        self.prompt = prompt
        if prompt not in ("name", "dynamic_wording"):
            raise UserError(f"webvid: prompt = {prompt!r}, expected 'name' or 'dynamic_wording'")

    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def items(self, split: str) -> list[Item]:
        if split not in SPLITS:
            raise UserError(f"webvid: split {split!r}, expected one of {', '.join(SPLITS)}.{near_match(split, SPLITS)}")
        items: dict[str, Item] = {}
        for file in self._lists(split):
            self._read(file, split, items)
        if not items:
            raise UserError(
                f"webvid: no video of split {split} has a dynamic confidence of {self.min_dynamic_confidence}"
            )
        return [items[name] for name in sorted(items)]

    def _lists(self, split: str) -> list[Path]:
        if self.annotations:
            for path in (Path(self.annotations).expanduser(), self.root / self.annotations):
                if path.is_file():
                    return [path]
            raise UserError(
                f"webvid: annotations = {self.annotations!r} is no file, neither by itself nor in {self.root}"
            )
        files = sorted(file for file in self.root.glob("*.csv") if (split == "val") == ("val" in file.stem))
        if not files:
            raise UserError(
                f"webvid: no CSV file for split {split} in {self.root}; expected for example results_2M_{split}.csv "
                f"with the columns {', '.join(COLUMNS)}, and videos/<page_dir>/<videoid>.mp4"
            )
        return files

    def _read(self, file: Path, split: str, items: dict[str, Item]) -> None:
        with open_text(file) as lines:
            rows = csv.DictReader(lines)
            columns = rows.fieldnames or ()
            needs_motion = self.min_dynamic_confidence > 0 or self.prompt == "dynamic_wording"
            wanted = (*COLUMNS, *(MOTION_COLUMNS if needs_motion else ()))
            missing = [name for name in wanted if name not in columns]
            if missing:
                raise UserError(f"{file} has no column {missing[0]}; it has {', '.join(columns) or 'none'}")
            for number, row in enumerate(rows, 2):
                name, page = (row["videoid"] or "").strip(), (row["page_dir"] or "").strip()
                if not SAFE.fullmatch(name) or not all(SAFE.fullmatch(part) for part in page.split("/")):
                    raise UserError(f"{file}, line {number}: videoid {name!r} or page_dir {page!r} is no plain name")
                if needs_motion and self._confidence(row, file, number) < self.min_dynamic_confidence:
                    continue
                caption = " ".join((row[self.prompt] or row["name"] or "").split())
                path = f"videos/{page}/{name}.mp4"
                label = row.get("dynamic_source_category") or None
                items[name] = Item(name, VideoFile(self.root / path), path, (caption,) if caption else (), split, label)

    @staticmethod
    def _confidence(row: Mapping[str, str | None], file: Path, number: int) -> float:
        try:
            return float(row["dynamic_confidence"] or 0)
        except ValueError as error:
            value = row["dynamic_confidence"]
            raise UserError(f"{file}, line {number}: dynamic_confidence {value!r} is no number") from error


def load(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> WebVid:
    """Entry point of the card `webvid`."""
    if root is None:
        raise UserError("webvid needs its files: give --data DIR")
    given = {**card.options, **options}
    return WebVid(root, given["annotations"], float(given["min_dynamic_confidence"]), given["prompt"])
