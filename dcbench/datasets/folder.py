"""A folder of videos, with its subfolders. Captions and groups come from optional CSV, TSV or JSONL files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item
from dcbench.datasets.text import csv_rows, read_lines
from dcbench.errors import UserError, as_text, near_match
from dcbench.video import VideoFile
from dcbench.video_files import SUFFIXES, find_videos, list_videos, make_ids

SPLITS = ("all", "train", "val", "test")
CAPTION_FILES = ("captions.csv", "captions.jsonl")
GROUP_FILES = ("groups.csv", "groups.jsonl")


class Folder:
    """A folder of videos. Subfolders train, val and test are splits; a split without its subfolder is all videos."""

    def __init__(self, root: Path, captions: str = "", groups: str = ""):
        """`captions`, `groups`: files; "": captions.csv and groups.csv (or .jsonl) in the folder, if they exist."""
        self.root = root
        self.ids = make_ids(find_videos(root))
        if not self.ids:
            notice = list_videos(root).notice(root)
            raise UserError(
                f"{root} holds no video; looked for {', '.join(SUFFIXES)}, in subfolders too. {notice}".rstrip()
            )
        self.captions = self._read_table(captions, "caption", CAPTION_FILES)
        self.groups = self._read_table(groups, "group", GROUP_FILES)

    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def items(self, split: str) -> list[Item]:
        if split not in SPLITS:
            raise UserError(f"folder: split {split!r}, expected one of {', '.join(SPLITS)}.{near_match(split, SPLITS)}")
        inside = [path for path in self.ids if path.startswith(f"{split}/")] or list(self.ids)
        items = [
            Item(
                self.ids[path],
                VideoFile(self.root / path),
                as_text(path),
                tuple(self.captions.get(path, ())),
                split,
                group=self.groups.get(path, [None])[0],
            )
            for path in inside
        ]
        return sorted(items, key=lambda item: item.id)

    def _read_table(self, given: str, column: str, usual: Sequence[str]) -> dict[str, list[str]]:
        """The texts of a column by relative path. A row names a file with or without its suffix, or by its id."""
        file = self._find_table(given, column, usual)
        if file is None:
            return {}
        names = {name: path for path in self.ids for name in (path.rsplit(".", 1)[0], self.ids[path], path)}
        found: dict[str, list[str]] = {}
        is_table = file.suffix.lower() in (".csv", ".tsv")
        rows = list(_csv_rows(file, column) if is_table else _jsonl_rows(file, column))
        for name, texts in rows:
            path = names.get(name.replace("\\", "/").removeprefix("./"))
            if path is not None:
                found.setdefault(path, []).extend(text for text in texts if text)
        found = {path: texts for path, texts in found.items() if texts}
        if rows and not found:
            raise UserError(
                f"{file}: none of its {len(rows)} rows names a video of {self.root}. The first row names "
                f"{rows[0][0]!r}; a file there is {next(iter(self.ids))!r}"
            )
        if column == "group" and (double := [path for path, texts in found.items() if len(set(texts)) > 1]):
            raise UserError(f"{file}: {double[0]} is in two groups, {', '.join(sorted(set(found[double[0]])))}")
        return found

    def _find_table(self, given: str, column: str, usual: Sequence[str]) -> Path | None:
        if given:
            for path in (Path(given).expanduser(), self.root / given):
                if path.is_file():
                    return path
            raise UserError(f"folder: {column}s = {given!r} is no file, neither as given nor in {self.root}")
        return next((self.root / name for name in usual if (self.root / name).is_file()), None)


def _csv_rows(file: Path, column: str) -> Iterator[tuple[str, list[str]]]:
    separator = "\t" if file.suffix.lower() == ".tsv" else ","
    for _, row in csv_rows(file, separator, {"file", column}.issubset, f"file, {column}"):
        yield row["file"].strip(), [row[column].strip()]


def _jsonl_rows(file: Path, column: str) -> Iterator[tuple[str, list[str]]]:
    for number, line in enumerate(read_lines(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            texts = row[column]
            yield str(row["file"]), [str(text).strip() for text in ([texts] if isinstance(texts, str) else texts)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{file}, line {number}: expected {{"file": ..., "{column}": ...}} ({error!r})') from error


def load_folder(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> Folder:
    """Entry point of the card `folder`."""
    if root is None:
        raise UserError("folder needs its files: give --data DIR")
    return Folder(root, options["captions"], options.get("groups", ""))
