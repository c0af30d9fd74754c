"""MSR-VTT: videos with 20 captions each. Reads the official JSON files, merged ones, or the 1k-A list."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item
from dcbench.datasets.text import csv_rows, open_text
from dcbench.errors import UserError, near_match
from dcbench.video import VideoFile
from dcbench.video_files import SUFFIXES, find_files, find_videos

# In merged files the field `split` differs from the official number ranges, so it is not used.
RANGES = {"train": range(0, 6513), "val": range(6513, 7010), "test": range(7010, 10000), "all": range(0, 10000)}
SPLITS = (*RANGES, "1k-A")
JSON_NAMES = (
    ("test_videodatainfo.json", "train_val_videodatainfo.json"),  # the official pair
    ("MSRVTT_data.json",),
    ("videodatainfo_2017.json",),
)
LIST_NAMES = ("MSRVTT_JSFUSION_test.csv",)
VIDEO = re.compile(r"video(\d+)")


class MSRVTT:
    """Videos of an official split, or of the 1k-A test list."""

    def __init__(self, root: Path, annotations: str = "", layout: str = ""):
        self.root = root
        self.layout = layout
        self.json_files, self.list_file = self._find_annotations(annotations)
        self.files = self._find_videos()

    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def items(self, split: str) -> list[Item]:
        """Every video of the split, sorted by id. A listed video without a file is included and fails when read."""
        if split not in SPLITS:
            raise UserError(f"msrvtt: split {split!r}, expected one of {', '.join(SPLITS)}.{near_match(split, SPLITS)}")
        if split == "1k-A":
            captions, sources = self._read_list(), {}
        else:
            captions, sources = self._read_json(split)
        return [self._item(name, captions[name], sources.get(name), split) for name in sorted(captions)]

    def _item(self, name: str, captions: tuple[str, ...], source: str | None, split: str) -> Item:
        nominal = self.root / ("TestVideo" if int(name[5:]) in RANGES["test"] else "TrainValVideo") / f"{name}.mp4"
        path = self.files.get(name, nominal)
        relative = path.relative_to(self.root).as_posix()
        return Item(name, VideoFile(path), relative, captions, split, group=source)

    def _read_json(self, split: str) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
        """Captions in the order of `sen_id`, and the URL of the source web video; both by video id."""
        wanted = RANGES[split]
        sentences: dict[str, list[tuple[int, str]]] = {}
        sources: dict[str, str] = {}
        for file in self.json_files:
            data = _load_json(file)
            for entry in data["videos"]:
                name = str(entry.get("video_id", ""))
                if _number(name, file) in wanted:
                    sentences.setdefault(name, [])
                    if entry.get("url"):
                        sources[name] = str(entry["url"])
            for entry in data["sentences"]:
                caption = " ".join(str(entry.get("caption", "")).split())
                if caption and (name := str(entry.get("video_id"))) in sentences:
                    order = str(entry.get("sen_id"))
                    sentences[name].append((int(order) if order.isdigit() else len(sentences[name]), caption))
        if not sentences:
            have = ", ".join(file.name for file in self.json_files) or "no JSON file"
            raise UserError(
                f"msrvtt: split {split} (video{wanted.start}-video{wanted.stop - 1}) needs "
                f"{'train_val' if split in ('train', 'val') else 'test'}_videodatainfo.json or a merged "
                f"MSRVTT_data.json; {self.root} has {have}"
            )
        return {name: tuple(text for _, text in sorted(rows)) for name, rows in sentences.items()}, sources

    def _read_list(self) -> dict[str, tuple[str, ...]]:
        """Read the 1k-A list: one sentence per video. Copies of it differ in column name and separator."""
        if self.list_file is None:
            raise UserError(f"msrvtt: split 1k-A needs {LIST_NAMES[0]}, which is not in {self.root}")
        with open_text(self.list_file) as file:
            header = file.readline()
        separator = ";" if header.count(";") > header.count(",") else ","
        expected = "video_id and sentence"
        rows = csv_rows(self.list_file, separator, lambda names: _sentence(names) is not None, expected)
        captions: dict[str, tuple[str, ...]] = {}
        for _, row in rows:
            name = row["video_id"].strip()
            _number(name, self.list_file)
            captions[name] = (*captions.get(name, ()), " ".join(row[_sentence(tuple(row)) or ""].split()))
        return captions

    def _find_annotations(self, given: str) -> tuple[list[Path], Path | None]:
        if given:
            path = Path(given).expanduser()
            path = path if path.is_file() else self.root / path
            if not path.is_file():
                raise UserError(f"msrvtt: annotations = {given!r} is no file, neither as given nor in {self.root}")
            return ([], path) if path.suffix == ".csv" else ([path], None)
        by_name: dict[str, Path] = {}
        for path in find_files(self.root):
            by_name.setdefault(Path(path).name, self.root / path)
        found = next(
            ([by_name[n] for n in names if n in by_name] for names in JSON_NAMES if by_name.keys() & set(names)), []
        )
        listed = next((by_name[name] for name in LIST_NAMES if name in by_name), None)
        if not found and listed is None:
            raise UserError(
                f"msrvtt: no annotations in {self.root}. Expected there:\n  "
                + "\n  ".join(self.layout.strip().splitlines())
                + "\n  If a file has another name, set options.annotations in your own card"
            )
        return found, listed

    def _find_videos(self) -> dict[str, Path]:
        """The file of each video<number> below the root. Of several, .mp4 comes first, then the first path."""
        found: dict[str, Path] = {}
        paths = [self.root / path for path in find_videos(self.root)]
        usable = [path for path in paths if VIDEO.fullmatch(path.stem)]
        for path in sorted(usable, key=lambda path: (SUFFIXES.index(path.suffix.lower()), path.as_posix())):
            found.setdefault(path.stem, path)
        if not found:
            raise UserError(
                f"msrvtt: no video0.mp4 ... below {self.root}. Expected there:\n  "
                + "\n  ".join(self.layout.strip().splitlines())
            )
        return found


def _sentence(columns: Sequence[str]) -> str | None:
    """The column of a list's sentences. None if the list has not the columns that it must have."""
    return next((name for name in ("sentence", "sentences") if name in columns and "video_id" in columns), None)


def _number(name: str, file: Path) -> int:
    match = VIDEO.fullmatch(name)
    if match is None:
        raise UserError(f"{file}: video_id {name!r}, expected video0 ... video9999")
    return int(match[1])


def _load_json(file: Path) -> dict[str, list[dict[str, Any]]]:
    with open_text(file) as lines:
        try:
            data = json.load(lines)
        except json.JSONDecodeError as error:
            raise UserError(f"{file} is no JSON file: {error}") from error
    tables = [data.get(key) for key in ("videos", "sentences")] if isinstance(data, dict) else [None]
    if not all(isinstance(table, list) and all(isinstance(entry, dict) for entry in table) for table in tables):
        raise UserError(f"{file}: expected an object with the lists 'videos' and 'sentences', as MSR-VTT has them")
    return data


def load_msrvtt(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> MSRVTT:
    """Entry point of the card `msrvtt`."""
    if root is None:
        raise UserError("msrvtt needs its files: give --data DIR")
    return MSRVTT(root, options["annotations"], card.layout)
