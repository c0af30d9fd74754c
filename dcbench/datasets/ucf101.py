"""UCF-101: official folders and split lists. It has no captions: prompts come from the class."""

import hashlib
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Item
from dcbench.datasets.text import read_lines
from dcbench.errors import UserError, as_text, near_match
from dcbench.video import VideoFile
from dcbench.video_files import SUFFIXES, find_videos

SPLITS = ("all", "train01", "test01", "train02", "test02", "train03", "test03")
NAME = re.compile(r"v_(?P<label>\w+)_g(?P<group>\d+)_c(?P<clip>\d+)", re.IGNORECASE)
# Class/v_Class_gXX_cYY; some copies have folders train and test above it
PLACE = re.compile(r"((train|test|val|validation)/)?[^/]+/v_[^/]+", re.IGNORECASE)
# In this class only, folder and files are spelt differently. Copies of the dataset mix both spellings.
FILE_SPELLING = {"HandstandPushups": "HandStandPushups"}
SENTENCES = Path(__file__).with_name("ucf101_prompts_pyoco.tsv")  # PYoCo (arXiv 2305.10474), its appendix


def _stem(name: str) -> str:
    """A listed name without the ending of a video."""
    stem, _, ending = name.rpartition(".")
    return stem if f".{ending.lower()}" in SUFFIXES else name


def class_prompt(label: str) -> str:
    """PlayingGuitar -> "playing guitar"."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", label)).lower()


def tfds_order(ids: Sequence[str], split: str, files: int = 16) -> list[str]:
    """The videos of a split in the order in which TensorFlow Datasets (4.9, `ucf101`) reads them.

    The package sorts its examples by the MD5 of the split's name and the name of the video, and cuts them into `files`
    files. It reads 16 files in turn, 16 examples of each; after its last example, the next file takes a file's turn.
    `files` follows from the size of the encoded split, which is not published: 16 below 2 GiB, 32 above (docs/data.md).
    """

    def key(item_id: str) -> bytes:
        name = item_id.replace(FILE_SPELLING["HandstandPushups"], "HandstandPushups")
        return hashlib.md5(f"{split}{name}.avi".encode(), usedforsecurity=False).digest()

    by_hash = sorted(ids, key=key)
    ends = [round(len(by_hash) * number / files) for number in range(files + 1)]
    waiting = deque(by_hash[start:end] for start, end in pairwise(ends))
    turns: list[list[str]] = [waiting.popleft() for _ in range(min(16, files))]
    order: list[str] = []
    while any(turns) or waiting:
        for turn, left in enumerate(turns):
            order += left[:16]
            ended = len(left) < 16  # a file that ends with its block of 16 is found out in its next turn
            turns[turn] = (waiting.popleft() if waiting else []) if ended else left[16:]
    return order


class UCF101:
    """Videos of an official split, or all videos in the folder."""

    def __init__(self, root: Path, prompts: str = "class-name", layout: str = ""):
        self.root = root
        self.layout = layout
        self.videos, self.files = self._find_videos()  # lower-case "class/file" without suffix -> path
        self.lists = self._find_lists()
        self.labels = self._read_labels()
        self.prompts = self._read_prompts(prompts)

    def splits(self) -> tuple[str, ...]:
        return SPLITS

    def items(self, split: str) -> list[Item]:
        """Every video of the split, sorted by id. A listed video without a file is included and fails when read."""
        if split not in SPLITS:
            raise UserError(f"ucf101: split {split!r}, expected one of {', '.join(SPLITS)}.{near_match(split, SPLITS)}")
        names = self._listed(split) if split != "all" else [f"{p.parent.name}/{p.name}" for p in self.files.values()]
        items = [item for name in names if (item := self._item(name, split)) is not None]
        order = tfds_order([item.id for item in items], "test") if split == "test01" else []
        places = {item_id: place for place, item_id in enumerate(order)}
        return sorted((replace(item, place=places.get(item.id)) for item in items), key=lambda item: item.id)

    def _item(self, name: str, split: str) -> Item | None:
        folder, _, file = name.partition("/")
        match = NAME.fullmatch(_stem(file))
        if match is None:
            if split == "all":  # not a file of UCF-101; `dcbench data verify` lists it
                return None
            raise UserError(f"{self.lists}/{split}: {name!r} is no UCF-101 video; expected Class/v_Class_gXX_cYY.avi")
        label = self.labels.get(folder.lower(), folder)
        group = f"{label}_g{match['group']}"
        path = self.files.get(_stem(name).lower(), self.videos / folder / file)
        return Item(
            id=f"v_{FILE_SPELLING.get(label, label)}_g{match['group']}_c{match['clip']}",
            video=VideoFile(path),
            path=as_text(path.relative_to(self.videos).as_posix()),
            captions=(self.prompts[label] if self.prompts else class_prompt(label),),
            split=split,
            label=label,
            group=group,
        )

    def _listed(self, split: str) -> list[str]:
        """Entries `Class/file.avi` of an official list. The class numbers of training lists are dropped."""
        file = f"{split[:-2]}list{split[-2:]}.txt"
        if self.lists is None or not (self.lists / file).is_file():
            raise UserError(
                f"ucf101: split {split} needs {file}, which is not in {self.lists or self.root / 'ucfTrainTestlist'}. "
                "Get the lists (UCF101TrainTestSplits-RecognitionTask.zip) from https://www.crcv.ucf.edu/data/UCF101.php"
            )
        lines = read_lines(self.lists / file)
        names = [line.split()[0].replace("\\", "/") for line in lines if line.strip()]
        if not names:
            raise UserError(f"ucf101: {self.lists / file} is empty, so split {split} holds no video")
        escapes = [name for name in names if name.count("/") != 1 or ".." in name]
        if escapes:
            raise UserError(f"{self.lists / file}: {escapes[0]!r} is no path of the form Class/v_Class_gXX_cYY.avi")
        return sorted(set(names))

    def _find_videos(self) -> tuple[Path, dict[str, Path]]:
        """The folder of the videos, and their paths. Spelling and format differ between copies; .avi comes first."""
        for folder in (self.root / "UCF-101", self.root / "UCF101", self.root / "videos", self.root):
            paths = [Path(path) for path in find_videos(folder) if PLACE.fullmatch(path)] if folder.is_dir() else []
            if paths:
                paths.sort(key=lambda path: (path.suffix.lower() != ".avi", path.as_posix()))
                files: dict[str, Path] = {}
                for path in paths:
                    files.setdefault(f"{path.parent.name}/{path.stem}".lower(), folder / path)
                return folder, files
        raise UserError(
            f"ucf101: no video v_<Class>_gXX_cYY.avi below {self.root}. Expected there:\n  "
            + "\n  ".join(self.layout.strip().splitlines())
        )

    def _find_lists(self) -> Path | None:
        around = (self.root, self.videos, self.root.parent)
        for folder in [base / name for base in around for name in ("ucfTrainTestlist", "")]:
            if any(folder.glob("t*list0?.txt")):
                return folder
        return None

    def _read_labels(self) -> dict[str, str]:
        """Lower-case class -> official class name, from classInd.txt, or else from the folder names."""
        index = self.lists / "classInd.txt" if self.lists else None
        if index is None or not index.is_file():
            return {path.parent.name.lower(): path.parent.name for path in self.files.values()}
        rows = [line.split() for line in read_lines(index) if line.strip()]
        wrong = next((row for row in rows if len(row) != 2 or not row[0].isdigit()), None)
        if wrong:
            raise UserError(f"{index}: {' '.join(wrong)!r} is no line of the form '1 ApplyEyeMakeup'")
        return {name.lower(): name for _, name in rows}

    def _read_prompts(self, prompts: str) -> dict[str, str] | None:
        """Class -> sentence. None if prompts are made from class names."""
        if prompts == "class-name":
            return None
        path = SENTENCES if prompts == "sentence" else Path(prompts).expanduser()
        if not path.is_file():
            hint = near_match(prompts, ("class-name", "sentence"))
            raise UserError(
                f"ucf101: prompts = {prompts!r}, expected 'class-name', 'sentence', or a file of lines "
                f"'Class<tab>sentence'.{hint}"
            )
        sentences: dict[str, str] = {}
        for number, line in enumerate(read_lines(path), 1):
            label, tab, sentence = line.partition("\t")
            if not line.strip() or (number == 1 and label.strip().lower() == "class"):
                continue
            if not tab or not sentence.strip():
                raise UserError(f"{path}, line {number}: {line!r} is not 'Class<tab>sentence'")
            sentences[self.labels.get(label.strip().lower(), label.strip())] = sentence.strip()
        present = {self.labels.get(path.parent.name.lower(), path.parent.name) for path in self.files.values()}
        missing = sorted((present | set(self.labels.values())) - sentences.keys())
        if missing:
            raise UserError(
                f"{path} has no sentence for {len(missing)} classes, for example {missing[0]}."
                f"{near_match(missing[0], sentences)}"
            )
        return sentences


def load_ucf101(card: DatasetCard, root: Path | None, options: Mapping[str, Any]) -> UCF101:
    """Entry point of the card `ucf101`."""
    if root is None:
        raise UserError("ucf101 needs its files: give --data DIR")
    return UCF101(root, options["prompts"], card.layout)
