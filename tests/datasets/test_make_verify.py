"""Procedural videos in official layouts, read back by the real loaders; everything wrong with files is listed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import av
import pytest
import torch
from numbered_clips import numbered

from dcbench.catalogue import find_dataset, load_entry_point
from dcbench.datasets.base import Dataset
from dcbench.datasets.make import make, widen
from dcbench.datasets.verify import verify
from dcbench.errors import UserError
from dcbench.video import write_mp4


def load(name: str, root: Path | None, **options) -> Dataset:
    card = find_dataset(name)
    return load_entry_point(card)(card, root, {**card.options, **options})


def write(layout: str, videos: int, out: Path) -> dict[str, int]:
    options = {"frames": 20, "size": 32, "train_videos": 20, "test_videos": 20}
    card = find_dataset("shapes").model_copy(update={"options": options})
    return make(load("shapes", None, **options), card, layout, videos, out, quiet=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {layout: tmp_path_factory.mktemp(layout) / "data" for layout in ("ucf101", "msrvtt")}
    for layout, folder in folders.items():
        assert write(layout, 12, folder) == {"test": 6, "train": 6}
    return folders


@pytest.mark.parametrize(("layout", "test", "train"), [("ucf101", "test01", "train01"), ("msrvtt", "test", "train")])
def test_the_real_loaders_read_what_was_made(made, layout, test, train):
    dataset = load(layout, made[layout])
    assert len(dataset.items(test)) == len(dataset.items(train)) == 6
    assert len(dataset.items("all")) == 12
    info = dataset.items(test)[0].video.info()
    assert (info.num_frames, info.fps, info.height, info.width) == (20, 25, 32, 42)
    checked = verify(dataset, "all", made[layout], min_frames=16, quiet=True)
    assert checked.ok and not checked.unused, checked.text()
    assert (checked.checked, checked.frames, checked.decoders) == (12, 240, {"decord": 12})


def test_made_msrvtt_shows_what_its_captions_say(made):
    item = load("msrvtt", made["msrvtt"]).items("test")[3]
    original = load("shapes", None, frames=20, size=32).items("test")[3]
    assert item.captions == original.captions
    error = item.video.read([0, 19])[..., 5:37].float() - original.video.read([0, 19]).float()
    assert error.abs().mean() < 6  # H.264, 4:2:0


def test_widened_edges_come_off_by_a_centre_crop():
    clip = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    wide = widen(clip)
    assert wide.shape == (2, 3, 48, 64) and torch.equal(wide[..., 8:56], clip)
    assert torch.equal(wide[..., 0], clip[..., 0])


def test_the_same_call_gives_the_same_bytes_and_continues(made, tmp_path):
    for layout, folder in made.items():
        again = tmp_path / layout
        write(layout, 12, again)
        files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
        for file in files:
            assert (folder / file).read_bytes() == (again / file).read_bytes(), file
        lost = again / files[-1]
        lost.unlink()
        write(layout, 12, again)
        assert lost.read_bytes() == (folder / files[-1]).read_bytes()


def test_make_refuses_what_it_cannot_do(made, tmp_path):
    with pytest.raises(UserError, match='Did you mean "ucf101"'):
        write("ucf", 4, tmp_path / "x")
    with pytest.raises(UserError, match="1 videos: expected 2 to 5980"):
        write("msrvtt", 1, tmp_path / "x")
    with pytest.raises(UserError, match="made with another videos"):
        write("ucf101", 14, made["ucf101"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds other files"):
        write("ucf101", 4, tmp_path / "full")
    card = find_dataset("ucf101")
    with pytest.raises(UserError, match="ucf101 consists of files already"):
        make(load("ucf101", made["ucf101"]), card, "msrvtt", 4, tmp_path / "y")


def test_verify_finds_what_reading_finds(tmp_path):
    """A size that changes, files that are no videos, and names that are not UTF-8."""
    parts = []
    for height, width in ((48, 64), (64, 48)):
        write_mp4(tmp_path / "part.mp4", numbered(20, height, width), 25)
        with av.open(str(tmp_path / "part.mp4")) as source, av.open(str(tmp_path / "part.ts"), "w") as copy:
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    copy.mux(packet)
        parts.append((tmp_path / "part.ts").read_bytes())
    root = tmp_path / "data"
    root.mkdir()
    (root / "joined.ts").write_bytes(b"".join(parts))
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9.mp4")).write_bytes(b"nothing")
    (root / "raw.h264").touch()
    found = verify(load("folder", root), "all", root, min_frames=8, quiet=True)
    assert found.damaged == ["joined.ts: after 20 frames: the size of the frames changes from 64x48 to 48x64"]
    assert [broken.split(": ")[0] for broken in found.broken] == ["caf\\udce9.mp4"] and found.left_out == ["raw.h264"]
    assert "not read as videos: 1\n  raw.h264" in found.text()
    found.text().encode()


def test_verify_lists_everything_that_is_wrong(made, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(made["ucf101"], root)
    videos = sorted((root / "UCF-101").rglob("*.avi"))
    videos[0].unlink()
    videos[1].write_bytes(b"nothing")
    shutil.copy(videos[3], videos[2])
    whole = videos[4].read_bytes()
    frames = whole.index(b"movi")
    videos[4].write_bytes(whole[: frames + (len(whole) - frames) * 2 // 3])
    shutil.copy(videos[5], root / "UCF-101" / "stray.avi")
    dataset = load("ucf101", root)
    found = [verify(dataset, split, root, min_frames=18, quiet=True) for split in ("test01", "train01")]
    names = [path.relative_to(root / "UCF-101").as_posix() for path in videos]
    assert [x for v in found for x in v.missing] == [names[0]]
    assert [x.split(": ")[0] for v in found for x in v.broken] == [names[1]]
    assert [x for v in found for x in v.duplicates] == [[names[2], names[3]]]
    (damaged,) = (x for v in found for x in v.damaged)
    assert damaged.startswith(f"{names[4]}: after ") and damaged.endswith("frames: a damaged frame")
    (short,) = (x for v in found for x in v.short)
    assert short.startswith(f"{names[4]}: ")
    assert found[0].unused == ["UCF-101/stray.avi"]
    unusable = {x for v in found for x in v.unusable}
    assert unusable == {names[0], names[1], names[4]}
    list_of = tmp_path / "lists" / "bad.txt"
    call = ["data", "verify", "ucf101", "--data", str(root), "--min-frames", "18", "--unusable", str(list_of)]
    done = subprocess.run([sys.executable, "-m", "dcbench", *call], capture_output=True, text=True)
    assert done.returncode == 1
    assert set(list_of.read_text().splitlines()) == unusable - {names[0]}  # the split "all" is what lies in the folder
    text = found[0].text() + found[1].text()
    for word in ("missing: 1", "broken: 1", "damaged: 1", "shorter than 18 frames: 1", "duplicated (same pixels): 1"):
        assert word in text
    assert "something is wrong" in text and not all(v.ok for v in found)
