"""Pictures with prompts, and no films: a folder, or a list of pictures and prompts."""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item, VideoError, VideoInfo
from dcbench.datasets.text import open_text
from dcbench.errors import UserError, as_text, near_match
from dcbench.files import read_bytes
from dcbench.pictures import decode_image
from dcbench.video import VideoFile
from dcbench.video_files import SUFFIXES, find_files, make_ids

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
LISTS = ("prompts.csv", "prompts.tsv", "prompts.jsonl", "prompts.txt")
FILMS = "reference"  # the subfolder of films that metrics of sets may compare with
FILE, PROMPT = ("file", "image"), ("prompt", "caption")  # names of columns


@dataclass(frozen=True)
class Picture:
    """A picture file as a video of one frame."""

    path: Path

    def info(self) -> VideoInfo:
        return self._info

    def read(self, indices: Sequence[int]) -> Tensor:
        return self._pixels().expand(len(indices), -1, -1, -1)

    def data(self) -> bytes:
        """The content of the picture file. UserError if it cannot be read."""
        return read_bytes(self.path)

    @cached_property
    def _info(self) -> VideoInfo:  # items may share a picture, and a large one takes long to decode
        height, width = self._pixels().shape[1:]
        return VideoInfo(1, 1.0, height, width, "pillow")

    def _pixels(self) -> Tensor:
        try:
            return decode_image(self.data(), self.path)
        except UserError as error:
            raise VideoError(str(error)) from error


@dataclass(frozen=True)
class Pictures:
    """Picture files of one size as the frames of a video, in their order."""

    paths: tuple[Path, ...]
    fps: float

    def info(self) -> VideoInfo:
        height, width = self.read([0]).shape[-2:]
        return VideoInfo(len(self.paths), self.fps, height, width, "pillow")

    def read(self, indices: Sequence[int]) -> Tensor:
        if wrong := [index for index in indices if not 0 <= index < len(self.paths)]:
            raise VideoError(f"frame {wrong[0]} was asked for, of {len(self.paths)} pictures")
        files = [self.paths[index] for index in indices]
        frames = [Picture(file).read([0])[0] for file in files]
        for file, frame in zip(files, frames, strict=True):
            if frame.shape != frames[0].shape:
                (h, w), (height, width) = frame.shape[1:], frames[0].shape[1:]
                raise VideoError(f"{file} has {w}x{h} pixels, {files[0]} has {width}x{height}")
        return torch.stack(frames)


class Images:
    """All pictures below a folder, or those of a list. Films in the subfolder `reference` are never animated."""

    def __init__(self, root: Path, prompts: str = ""):
        """`root`: a folder, or a list. `prompts`: a list beside or in the folder; "": prompts.csv, .tsv, ... in it."""
        self.root = root if root.is_dir() else root.parent
        found = find_files(self.root)
        kinds = {path: PurePosixPath(path).suffix.lower() for path in found}
        self.pictures = [path for path in found if kinds[path] in PICTURES and not path.startswith(f"{FILMS}/")]
        self.films = [path for path in found if kinds[path] in SUFFIXES and path.startswith(f"{FILMS}/")]
        if not self.pictures:
            raise UserError(f"{self.root} holds no picture; looked for {', '.join(PICTURES)}, in subfolders too")
        given = root if root.is_file() else self._find_list(prompts)
        self.rows = self._read(given) if given else []
        if given is None or root.is_dir():  # a list inside the folder need not name all pictures
            named = {path for path, _ in self.rows}
            self.rows += [(path, "") for path in self.pictures if path not in named]

    def splits(self) -> tuple[str, ...]:
        return ("all",)

    def items(self, split: str) -> list[Item]:
        if split != "all":
            raise UserError(f"images: split {split!r}; a folder of pictures has the split all alone")
        ids, films, count = make_ids(self.pictures), make_ids(self.films), Counter[str]()
        items = []
        for path, prompt in self.rows:
            count[path] += 1
            item_id = ids[path] if count[path] == 1 else f"{ids[path]}-prompt{count[path]}"
            captions = (prompt,) if prompt else ()
            items.append(Item(item_id, Picture(self.root / path), as_text(path), captions, split, group=ids[path]))
        for path, film_id in films.items():
            items.append(Item(film_id, VideoFile(self.root / path), as_text(path), (), split, film=True))
        return sorted(items, key=lambda item: item.id)

    def _find_list(self, given: str) -> Path | None:
        names = [given] if given else LISTS
        for path in (self.root / name for name in names):
            if path.is_file():
                return path
        if given:
            raise UserError(f"images: prompts = {given!r} is no file in {self.root}")
        return None

    def _read(self, file: Path) -> list[tuple[str, str]]:
        """(path of the picture, prompt) of each row. UserError for a row whose picture is not there."""
        names = {name: path for path in self.pictures for name in (path.rsplit(".", 1)[0], path)}
        rows = []
        for number, name, prompt in read_rows(file):
            path = names.get(name.replace("\\", "/").removeprefix("./"))
            if path is None:
                raise UserError(
                    f"{file}, line {number}: there is no picture {name!r} in {self.root}.{near_match(name, names)}"
                )
            rows.append((path, " ".join(prompt.split())))
        if not rows:
            raise UserError(f"{file} lists no picture")
        return rows


def read_rows(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, picture, prompt) of each row of a list: JSONL, CSV with a header, or lines `picture<TAB>prompt`."""
    kind = file.suffix.lower()
    with open_text(file) as lines:
        if kind == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, *_of_json(line, f"{file}, line {number}")
            return
        rows = (
            csv.reader(lines, delimiter=",")
            if kind == ".csv"
            else csv.reader(lines, "excel-tab", quoting=csv.QUOTE_NONE)
        )
        places: tuple[int, int] | None = None if kind == ".csv" else (0, 1)
        for fields in rows:
            header = [field.strip().lower() for field in fields]
            if rows.line_num == 1 and {*FILE} & {*header} and {*PROMPT} & {*header}:
                places = (
                    next(header.index(n) for n in FILE if n in header),
                    next(header.index(n) for n in PROMPT if n in header),
                )
            elif places is None:
                raise UserError(f"{file} has the columns {', '.join(header)}; expected file, prompt")
            elif any(field.strip() for field in fields):
                if len(fields) <= max(places):
                    raise UserError(f"{file}, line {rows.line_num}: expected a picture and its prompt, got {fields}")
                yield rows.line_num, fields[places[0]].strip(), fields[places[1]].strip()


def _of_json(line: str, where: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    found = [row[key] for key in (*FILE, *PROMPT) if key in row] if isinstance(row, dict) else []
    if len(found) != 2 or not all(isinstance(text, str) for text in found):
        raise UserError(f'{where}: expected {{"file": "...", "prompt": "..."}}')
    return found[0], found[1]


def load_images(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> Images:
    """Entry point of the card `images`."""
    if root is None:
        raise UserError("images needs its files: give --data DIR, or --data LIST")
    return Images(root, options["prompts"])
