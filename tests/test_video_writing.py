"""Writing video files: lossless, the same bytes every time, previews, atomically."""

import resource

import pytest
import torch
from numbered_clips import noise, numbered, numbers

from dcbench import video
from dcbench.errors import UserError
from dcbench.video import read_frames


@pytest.mark.parametrize("size", [(1, 32, 32), (16, 64, 64), (5, 47, 33), (3, 9, 17)])
def test_lossless_is_lossless_and_the_same_bytes_every_time(tmp_path, size):
    clip = noise(*size)
    paths = [tmp_path / "a.mkv", tmp_path / "other" / "name.mkv"]
    for path in paths:
        video.write_lossless(path, clip, 25 / 3)
    for decoder in ("decord", "pyav"):
        assert torch.equal(read_frames(paths[0], range(size[0]), decoder)[0], clip)
    back, fps = video.read_clip(paths[0])
    assert torch.equal(back, clip) and fps == pytest.approx(25 / 3, rel=1e-3)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["a.mkv", "name.mkv"]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".gif"])
@pytest.mark.parametrize("size", [(64, 64), (47, 63)])
def test_previews_look_like_the_clip(tmp_path, suffix, size):
    clip = numbered(12, *size)
    path = tmp_path / f"preview{suffix}"
    video.write_preview(path, clip, 8)
    first = path.read_bytes()
    video.write_preview(path, clip, 8)
    assert path.read_bytes() == first
    back, fps = video.read_clip(path)
    assert fps == pytest.approx(8, rel=0.05) and back.shape[0] == 12
    assert back.shape[2] - size[0] in (0, 1) and back.shape[3] - size[1] in (0, 1)
    error = (back[..., : size[0], : size[1]].float() - clip.float()).abs().mean()
    assert error < 5
    assert numbers(back) == list(range(12))


def test_preview_of_unknown_kind_says_which_are_known(tmp_path):
    with pytest.raises(UserError, match=r"cannot write \.wmv; use \.mp4, \.webm, \.gif"):
        video.write_preview(tmp_path / "a.wmv", numbered(2), 8)


def test_float_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected uint8"):
        video.write_lossless(tmp_path / "a.mkv", torch.zeros(2, 3, 8, 8), 8)
    with pytest.raises(UserError, match="fps is 0"):
        video.write_lossless(tmp_path / "a.mkv", noise(2, 8, 8), 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".gif"])
def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    video.write_preview(path, noise(2, 32, 32), 8)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*clip.*Free some room"):
            video.write_preview(path, noise(16, 128, 128), 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        video.write_lossless(tmp_path / "file" / "clip.mkv", noise(2, 8, 8), 8)
