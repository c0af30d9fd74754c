"""Writes a procedural dataset as video files in the official layout of another dataset.

With it, the real loaders, decoders and protocols can be tried at any scale without a download. Half of the videos
belong to the official test split, half to the training split. The same arguments give the same bytes.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dcbench.catalogue import DatasetCard
from dcbench.datasets.base import Dataset, Item
from dcbench.errors import UserError, near_match
from dcbench.files import write_text
from dcbench.progress import track
from dcbench.video import write_avi, write_mp4

Layout = Literal["ucf101", "msrvtt"]
LAYOUTS = ("ucf101", "msrvtt")
MARK = "made.json"
TEST_GROUPS = {"01": range(1, 8), "02": range(8, 15), "03": range(15, 22)}  # of UCF-101's splits; groups are 1-25
FIRST_TEST, NUM_MSRVTT = 7010, 10000


def make(
    dataset: Dataset, card: DatasetCard, layout: str, videos: int, out: Path, quiet: bool = False
) -> dict[str, int]:
    """Write `videos` videos and their lists to `out`. Returns the count of each split. The same call continues."""
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r}, expected one of {', '.join(LAYOUTS)}.{near_match(layout, LAYOUTS)}")
    most = 2 * (NUM_MSRVTT - FIRST_TEST) if layout == "msrvtt" else 10**6
    if not 2 <= videos <= most:
        raise UserError(f"{videos} videos: expected 2 to {most} (half of them for the test split)")
    if card.needs_files:
        raise UserError(f"{card.name} consists of files already; give a procedural dataset, such as shapes")
    claim(out, {"dataset": card.name, "options": card.options, "layout": layout, "videos": videos})
    test = dataset.items("test")[: videos // 2]
    train = dataset.items("train")[: videos - videos // 2]
    if len(test) + len(train) < videos:
        raise UserError(f"{card.name} has {len(test)} test and {len(train)} training videos; {videos} were asked for")
    place = _place_ucf101 if layout == "ucf101" else _place_msrvtt
    placed = list(place(test, train))
    for item, file in track(placed, len(placed), f"writing {layout} videos", quiet=quiet):
        path = out / file
        if path.is_file():  # writing is atomic, so an existing file is complete
            continue
        info = item.video.info()
        clip = widen(item.video.read(range(info.num_frames)))
        (write_avi if path.suffix == ".avi" else write_mp4)(path, clip, info.fps)
    (_list_ucf101 if layout == "ucf101" else _list_msrvtt)(placed, out)
    return {"test": len(test), "train": len(train)}


def widen(clip: Tensor) -> Tensor:
    """Widen frames to 4:3, as in both datasets, by repeating the edge columns. A centre crop removes them again."""
    height, width = clip.shape[-2:]
    side = max(0, round(height * 4 / 3 / 2) * 2 - width) // 2
    edges = [clip[..., :1].expand(-1, -1, -1, side), clip, clip[..., -1:].expand(-1, -1, -1, side)]
    return torch.cat(edges, -1)


def claim(out: Path, request: dict[str, Any]) -> None:
    """Write the request into the folder. UserError if the folder holds other files or another request."""
    mark = out / MARK
    try:
        before = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else None
        if before is None and out.is_dir() and any(out.iterdir()):
            raise UserError(f"{out} holds other files; give an empty or a new folder: --out DIR")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot use {out}: {error}. Give another folder: --out DIR") from error
    if before is not None and before != request:
        differing = ", ".join(key for key in request if before.get(key) != request[key])
        raise UserError(f"{out} holds videos made with another {differing}; give a new folder: --out DIR")
    try:
        write_text(mark, json.dumps(request, indent=1, sort_keys=True) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}. Give another folder: --out DIR") from error


Placed = tuple[Item, str]  # a video and its path relative to the root


def _place_ucf101(test: Sequence[Item], train: Sequence[Item]) -> Iterator[Placed]:
    """The item's label is the class. Test videos get groups 1-7, training videos 8-25, as in split 1."""
    counts: Counter[tuple[str, int]] = Counter()
    for items, groups in ((test, range(1, 8)), (train, range(8, 26))):
        seen: Counter[str] = Counter()
        for item in items:
            label = "".join(word.capitalize() for word in (item.label or "unlabelled").split())
            group = groups[seen[label] % len(groups)]
            seen[label] += 1
            counts[label, group] += 1
            yield item, f"UCF-101/{label}/v_{label}_g{group:02d}_c{counts[label, group]:02d}.avi"


def _list_ucf101(placed: list[Placed], out: Path) -> None:
    names = sorted(path.removeprefix("UCF-101/") for _, path in placed)
    labels = sorted({name.split("/")[0] for name in names})
    folder = out / "ucfTrainTestlist"
    write_text(folder / "classInd.txt", "".join(f"{i} {label}\r\n" for i, label in enumerate(labels, 1)))
    for split, groups in TEST_GROUPS.items():
        is_test = {name: int(name.rsplit("_g", 1)[1].split("_")[0]) in groups for name in names}
        test = [f"{name}\r\n" for name in names if is_test[name]]
        train = [f"{name} {labels.index(name.split('/')[0]) + 1}\r\n" for name in names if not is_test[name]]
        write_text(folder / f"testlist{split}.txt", "".join(test))
        write_text(folder / f"trainlist{split}.txt", "".join(train))


def _place_msrvtt(test: Sequence[Item], train: Sequence[Item]) -> Iterator[Placed]:
    for number, item in enumerate(test, FIRST_TEST):
        yield item, f"TestVideo/video{number}.mp4"
    for number, item in enumerate(train):
        yield item, f"TrainValVideo/video{number}.mp4"


def _list_msrvtt(placed: list[Placed], out: Path) -> None:
    """Write the two official JSON files. All training videos are `train`: validation starts at video6513."""
    for split, folder, name in (
        ("test", "TestVideo", "test_videodatainfo.json"),
        ("train", "TrainValVideo", "train_val_videodatainfo.json"),
    ):
        videos, sentences = [], []
        for item, path in placed:
            if not path.startswith(folder):
                continue
            video_id = Path(path).stem
            info = item.video.info()
            videos.append(
                {
                    "video_id": video_id,
                    "id": int(video_id[5:]),
                    "split": split,
                    "category": 0,
                    "url": f"procedural:{item.id}",
                    "start time": 0.0,
                    "end time": info.num_frames / info.fps,
                }
            )
            for caption in item.captions:
                sentences.append({"video_id": video_id, "caption": caption, "sen_id": len(sentences)})
        content = {"info": {"description": "procedural videos in MSR-VTT's layout"}, "videos": videos}
        write_text(out / name, json.dumps({**content, "sentences": sentences}, indent=0) + "\n")
