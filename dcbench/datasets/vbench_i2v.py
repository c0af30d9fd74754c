"""VBench-I2V (Huang et al., arXiv 2411.13503): 355 pictures with 1118 prompts. Each prompt names its dimensions.

A picture lies there in four shapes, and the one nearest to the shape of the model's clips is its input. Other shapes
are cut from the original picture, between two boxes that people drew around its content.
"""

import io
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from dcbench.camera import PHRASES, asked_class
from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item
from dcbench.datasets.images import Picture
from dcbench.errors import UserError, first_line, near_match
from dcbench.files import read_bytes, read_json
from dcbench.pictures import without_bombs
from dcbench.record import check_clip_id

LIST = "vbench2_i2v_full_info.json"
BOXES = "data/i2v-bench-info.json"
CROPS, ORIGINS = "data/crop", "data/origin"
RATIOS = ("1-1", "8-5", "7-4", "16-9")  # width and height of the pictures that are published
ANY_RATIO = re.compile(r"([1-9]\d{0,3})-([1-9]\d{0,3})")
DIMENSIONS = (
    "i2v_subject",
    "i2v_background",
    "camera_motion",
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
SHOWN = 3  # entries of an error
LARGEST = 1e6  # pixels of a side
DICE = 123  # seed of the place of a cut, in VBench's own tool
Box = tuple[int, int, int, int]  # left, top, width, height


@dataclass(frozen=True)
class Entry:
    """An entry of the list."""

    prompt: str
    dimensions: tuple[str, ...]
    kind: str  # of the picture: animal, food, scenery ...
    picture: str  # its file name


@dataclass(frozen=True)
class Cut(Picture):
    """A part of a picture, stored once more as VBench's tool stores it: its JPEG files have Pillow's usual quality."""

    box: Box

    def data(self) -> bytes:
        left, top, width, height = self.box
        made, kind = io.BytesIO(), Image.registered_extensions().get(self.path.suffix.lower())
        try:
            with without_bombs(), Image.open(io.BytesIO(read_bytes(self.path))) as file:
                if left + width > file.width or top + height > file.height:
                    raise UserError(
                        f"{self.path} has {file.width}x{file.height} pixels, and its box {self.box} (left, top, width, "
                        "height) is not inside. Is it the picture that the boxes were drawn on?"
                    )
                file.crop((left, top, left + width, top + height)).save(made, kind)
        except UserError:
            raise
        except (OSError, ValueError, KeyError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise UserError(f"{self.path} is no picture that can be cut: {first_line(error)}") from error
        return made.getvalue()


class VBenchI2V:
    """The suite in its official layout. An item is a prompt, and its id is the prompt: so VBench names the clips."""

    def __init__(self, root: Path, ratio: str, entries: Sequence[Entry], pictures: Mapping[str, Picture] | None = None):
        """`ratio`: "nearest", "own" or "W-H", see `choose_ratio`. `pictures`: by name, see `for_shape`."""
        self.root, self.ratio, self.entries = root, ratio, entries
        self.names = sorted({entry.picture for entry in self.entries})
        self.pictures = pictures

    def splits(self) -> tuple[str, ...]:
        return ("all",)

    def items(self, split: str) -> list[Item]:
        """Sorted by prompt. Without `for_shape`, the pictures are those of the first shape that is there."""
        if split != "all":
            raise UserError(f"vbench-i2v: split {split!r}; it has the split all alone")
        pictures = self.pictures or self._pictures(next(iter(self._shapes()), RATIOS[0]))
        return [self._item(entry, pictures[entry.picture]) for entry in sorted(self.entries, key=lambda e: e.prompt)]

    def for_shape(self, height: int, width: int) -> "VBenchI2V":
        """The suite with the pictures for clips of this size. UserError if one is missing."""
        ratio = choose_ratio(self.ratio, height, width)
        pictures = self._pictures(ratio)
        if missing := [picture.path for picture in pictures.values() if not picture.path.is_file()]:
            raise UserError(
                f"{self.root}: {len(missing)} of {len(self.names)} pictures for clips of {width}x{height} (ratio "
                f"{ratio}) are missing, for example {missing[0].relative_to(self.root)}. Get the rest of the suite. To "
                f"score a part of it, give a folder with a {LIST} of that part"
            )
        return VBenchI2V(self.root, ratio, self.entries, pictures)

    def every_picture(self) -> list[Item]:
        """An item for each picture of each shape in data/crop, and for each original picture, if any is there."""
        folders = [f"{CROPS}/{ratio}" for ratio in self._shapes()]
        if (self.root / ORIGINS).is_dir():
            folders.append(ORIGINS)
            self._boxes  # noqa: B018 (read, so that errors in it are found)
        if not folders:
            raise UserError(f"{self.root} has neither {CROPS}/{RATIOS[0]} nor {ORIGINS}. Unpack crop.zip in data/")
        paths = [f"{folder}/{name}" for folder in folders for name in self.names]
        return [Item(f"{place:05d}", Picture(self.root / path), path, (), "all") for place, path in enumerate(paths)]

    def _shapes(self) -> list[str]:
        return [ratio for ratio in RATIOS if (self.root / CROPS / ratio).is_dir()]

    def _item(self, entry: Entry, picture: Picture) -> Item:
        truth = {"dimensions": list(entry.dimensions), "image_type": entry.kind}
        truth |= {"camera_motion": motion} if (motion := asked_class(entry.prompt)) else {}
        return Item(
            entry.prompt,
            picture,
            entry.picture,  # not the file of one shape: models of other shapes are in one table
            (entry.prompt,),
            "all",
            label=entry.kind,
            group=PurePosixPath(entry.picture).stem,
            truth=truth,
        )

    def _pictures(self, ratio: str) -> dict[str, Picture]:
        """By name: the files of data/crop, or parts of the original pictures if that shape is not there."""
        folder, origins = self.root / CROPS / ratio, self.root / ORIGINS
        if folder.is_dir():
            return {name: Picture(folder / name) for name in self.names}
        if not origins.is_dir():
            raise UserError(
                f"{self.root} has no pictures of the ratio {ratio}: neither {CROPS}/{ratio} is there, nor {ORIGINS}, "
                f"from which they can be cut. Unpack crop.zip (or origin.zip, with {BOXES}) in data/"
            )
        return {name: Cut(origins / name, self._box(name, ratio)) for name in self.names}

    def _box(self, name: str, ratio: str) -> Box:
        if name not in self._boxes:
            raise UserError(f"{self.root / BOXES} does not name {name!r}, so it cannot be cut to the ratio {ratio}")
        try:
            return find_box(self._boxes[name], ratio)
        except UserError as error:
            raise UserError(f"{self.root / BOXES}, {name}: {error}") from error

    @cached_property
    def _boxes(self) -> dict[str, Mapping[str, Any]]:
        """The entries of the list of boxes, by the name of the picture."""
        path = self.root / BOXES
        if not path.is_file():
            raise UserError(f"{path} is missing: it has the boxes by which pictures are cut from {ORIGINS}")
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(r, dict) and "file_name" in r for r in rows):
            raise UserError(f'{path}: expected a list of {{"file_name": ..., "first_crop": ..., "second_crop": ...}}')
        return {str(row["file_name"]): row for row in rows}


def choose_ratio(ratio: str, height: int, width: int) -> str:
    """The "W-H" of the pictures for clips of a size.

    "nearest": of the four published ones, the nearest in the logarithm of width / height. "own": the clips' own ratio.
    """
    if ratio == "nearest":
        wanted = math.log(width / height)
        return min(RATIOS, key=lambda name: abs(math.log(_quotient(name)) - wanted))
    if ratio == "own":
        common = math.gcd(height, width)
        return f"{width // common}-{height // common}"
    if ANY_RATIO.fullmatch(ratio) is None:
        raise UserError(f'vbench-i2v: ratio "{ratio}"; expected nearest, own, or WIDTH-HEIGHT such as 8-5')
    return ratio


def _quotient(ratio: str) -> float:
    width, height = map(int, ratio.split("-"))
    return width / height


def find_box(facts: Mapping[str, Any], ratio: str) -> Box:
    """Where a picture of a ratio lies in its original: the published box, or else one between two others.

    UserError for a ratio below 1 or above 16/9, and for boxes that leave no room.
    """
    known, first, second = (_table(facts, name) for name in ("diff_ratio_crop", "first_crop", "second_crop"))
    if ratio in known:
        return _as_box(known[ratio], f"diff_ratio_crop of {ratio}")
    left, top, *_ = _as_box(first.get("first_bbox"), "first_bbox")
    x, y, width, height = cut_between(second, ratio)
    return left + x, top + y, width, height


def cut_between(second: Mapping[str, Any], ratio: str) -> Box:
    """The largest box of a ratio in a picture that was cut once, with the box of its content inside, where it fits.

    `second`: width and height of that picture, and `second_bbox`. Where it may lie is drawn, as VBench's tool draws it.
    """
    across, down = map(int, ratio.split("-"))
    if not 1 <= across / down < 1.7778:
        raise UserError(f"the ratio {ratio} is not between 1-1 and 16-9")
    *_, whole_width, whole_height = _as_box([0, 0, second.get("width"), second.get("height")], "width and height")
    x, y, inner_width, inner_height = _as_box(second.get("second_bbox"), "second_bbox")
    unit = whole_width // across if whole_width == whole_height else whole_height // down
    width, height = unit * across, unit * down
    if whole_width == whole_height:
        return 0, _draw(y, height, inner_height, whole_height, ratio), width, height
    return _draw(x, width, inner_width, whole_width, ratio), 0, width, height


def _draw(start: int, length: int, inner: int, whole: int, ratio: str) -> int:
    """Where a length begins that holds an inner one that begins at `start`, inside the whole."""
    low, high = max(start - (length - inner), 0), min(start + length, whole) - length
    if length < inner or high < low:
        raise UserError(f"its boxes leave no room for the ratio {ratio}")
    return random.Random(DICE).randint(low, high)


def _table(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object inside an entry; {} if it is not there."""
    found = facts.get(name) or {}
    if not isinstance(found, Mapping):
        raise UserError(f"{name} is {found!r}; expected an object")
    return found


def _as_box(value: Any, what: str) -> Box:
    """Four numbers, cut off to whole pixels as in VBench's tool."""
    given = value if isinstance(value, list) else []
    numbers = [int(n) for n in given if isinstance(n, int | float) and 0 <= n < LARGEST]
    if len(numbers) != 4 or len(given) != 4 or min(numbers[2:]) < 1:
        raise UserError(f"{what} is {value!r}; expected four numbers: left, top, width, height")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def read_list(path: Path) -> list[Entry]:
    """The entries of the list. UserError that names what is wrong: unknown dimensions, doubled prompts ..."""
    if not path.is_file():
        raise UserError(f"{path} is missing. It lies in `vbench2_beta_i2v/` of Vchitect/VBench")
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path}: expected a list of {{"prompt_en", "dimension", "image_type", "image_name"}}')
    found = [_entry(row, f"{path}, entry {number}") for number, row in enumerate(rows, 1)]
    problems = [text for check in CHECKS if (text := check(found))]
    if problems:
        raise UserError(f"{path}: " + "\n  ".join(problems))
    return found


def _entry(row: Any, where: str) -> Entry:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, got {row!r}")
    texts = [row.get(name) for name in ("prompt_en", "image_type", "image_name")]
    names = row.get("dimension")
    if not all(isinstance(text, str) and text for text in texts) or not isinstance(names, list) or not names:
        raise UserError(f'{where}: expected "prompt_en", "image_type", "image_name" and a list "dimension"; got {row}')
    prompt, kind, picture = map(str, texts)
    return Entry(prompt, tuple(map(str, names)), kind, picture)


def _unknown(entries: Sequence[Entry]) -> str:
    wrong = Counter(name for entry in entries for name in entry.dimensions if name not in DIMENSIONS)
    name = next(iter(wrong), "")
    hint = near_match(name, DIMENSIONS) if wrong else ""
    return _counted("entries have an unknown dimension", [f"{name!r} ({n} times)" for name, n in wrong.items()], hint)


def _doubled(entries: Sequence[Entry]) -> str:
    count = Counter(entry.prompt for entry in entries)
    twice = [repr(prompt) for prompt, number in count.items() if number > 1]
    return _counted("prompts are there more than once, and VBench names clips by prompts", twice)


def _unsafe(entries: Sequence[Entry]) -> str:
    def wrong() -> Iterator[str]:
        for entry in entries:
            try:
                check_clip_id(f"{entry.prompt}-0")
            except UserError:
                yield repr(entry.prompt)

    return _counted('prompts cannot be a file name (180 letters, no / \\ : * ? " < > |)', list(wrong()))


def _outside(entries: Sequence[Entry]) -> str:
    names = {entry.picture for entry in entries}
    wrong = [name for name in sorted(names) if name.startswith(".") or re.search(r"[/\\\x00]", name)]
    return _counted("picture names are paths; expected names of files in data/crop/<ratio>", list(map(repr, wrong)))


def _without_camera(entries: Sequence[Entry]) -> str:
    wrong = [e.prompt for e in entries if "camera_motion" in e.dimensions and asked_class(e.prompt) is None]
    known = f" A prompt says one of: {', '.join(PHRASES)}."
    return _counted("prompts of camera_motion name no motion of the camera", list(map(repr, wrong)), known)


CHECKS: tuple[Callable[[Sequence[Entry]], str], ...] = (_unknown, _doubled, _unsafe, _outside, _without_camera)


def _counted(what: str, wrong: Sequence[str], hint: str = "") -> str:
    """ "3 <what>: the first ones", or "" if there are none."""
    more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return f"{len(wrong)} {what}: {', '.join(wrong[:SHOWN])}{more}.{hint}" if wrong else ""


def load_vbench_i2v(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> VBenchI2V:
    """Entry point of the card `vbench-i2v`; option: ratio."""
    if root is None:
        raise UserError("vbench-i2v needs its files: give --data DIR")
    choose_ratio(options["ratio"], 1, 1)  # a wrong one fails before the files are read
    return VBenchI2V(root, options["ratio"], read_list(root / LIST))
