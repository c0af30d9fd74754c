"""Which files of a folder are videos, and what is named because it is none."""

import os
from pathlib import Path

import pytest
from PIL import Image

from dcbench.catalogue import find_model
from dcbench.datasets.folder import Folder
from dcbench.errors import UserError
from dcbench.models.base import Runtime
from dcbench.models.baselines import videos
from dcbench.video_files import SUFFIXES, find_videos, list_videos


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def as_model(root: Path) -> videos.Videos:
    card = find_model("videos")
    return videos.load(card.model_copy(update={"options": {**card.options, "folder": str(root)}}), Runtime())


def test_every_kind_of_video_is_found(tmp_path):
    touch(tmp_path, *(f"{k}{suffix}" for k, suffix in enumerate(SUFFIXES)), "upper.MPG")
    assert {".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".webp", ".apng", ".gif"} < set(SUFFIXES)
    assert len(Folder(tmp_path).items("all")) == len(SUFFIXES) + 1
    assert sorted(as_model(tmp_path).by_stem) == sorted([*map(str, range(len(SUFFIXES))), "upper"])


def test_what_is_no_video_is_counted_and_named_wherever_videos_are_listed(tmp_path, capsys):
    touch(tmp_path, "a.mp4", "a.png", "frames/0.png", "frames/1.png", "raw/x.h264", "x.npy", "notes.txt", "one/0.jpg")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.webp")
    left_out = ("frames/ (a folder of 2 pictures)", "raw/x.h264", "x.npy")
    assert list_videos(tmp_path).left_out == left_out and find_videos(tmp_path) == ["a.mp4"]
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}: 3 entries are left out, because dcbench does not read them as videos: frames/")
    for listed in (lambda: Folder(tmp_path), lambda: as_model(tmp_path)):
        listed()
        assert capsys.readouterr().err == ""  # it is said once
    touch(tmp_path, "y.npy")  # and again when there is more
    for root, listed in ((tmp_path, Folder), (tmp_path / "frames", as_model)):
        if root.name == "frames":
            touch(root, "0/a.png", "0/b.png")
        listed(root)
        assert "left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"frames holds no video.*left out.*\./ \(a folder of 2 pictures\)"):
        Folder(tmp_path / "frames")


def test_linked_folders_of_clips_are_a_model_as_they_are_a_data_set(tmp_path):
    touch(tmp_path, "elsewhere/b.mp4", "root/a.mp4", "root/.hidden.mp4")
    (tmp_path / "root" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    model = as_model(tmp_path / "root")
    assert model.find("b") == tmp_path / "root" / "more" / "b.mp4" and sorted(model.by_stem) == ["a", "b"]
    assert [item.path for item in Folder(tmp_path / "root").items("all")] == ["a.mp4", "gone.mp4", "more/b.mp4"]


def test_names_that_are_not_utf_8_have_ids_and_paths_that_are(tmp_path):
    for name in (b"caf\xe9.mp4", b"caf\xe8.mp4"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b"")
    items = Folder(tmp_path).items("all")
    assert len({item.id for item in items}) == 2 and all(item.id.startswith("caf_-") for item in items)
    assert {item.path for item in items} == {"caf\\udce9.mp4", "caf\\udce8.mp4"}
    assert all(item.video.path.exists() for item in items)  # type: ignore[attr-defined]
    "".join(item.id + item.path for item in items).encode()
    model = as_model(tmp_path)
    assert [model.find(item.id) for item in items] == [item.video.path for item in items]  # type: ignore[attr-defined]


def test_a_model_folder_whose_name_is_not_utf_8_has_a_title_that_is(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    card = find_model(str(folder))
    assert card.title == "caf\\udce9" and Path(card.options["folder"]).is_dir()
