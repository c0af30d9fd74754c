"""Kinds of video files: formats, orientations, several tracks, changing sizes, half pictures, odd names."""

import os
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numbered_clips import numbered, numbers
from PIL import Image
from torch import Tensor

from dcbench import video
from dcbench.video import VideoError, VideoFile, probe, read_clip, read_frames

UNIT = 1 << 16


def add_stream(output: Any, codec: str, clip: Tensor, pixels: str = "yuv420p", **options: str) -> tuple[Any, Tensor]:
    stream = output.add_stream(codec, rate=25, options=options)
    stream.height, stream.width, stream.pix_fmt = clip.shape[2], clip.shape[3], pixels
    return stream, clip


def write(path: Path, container: str, *tracks: tuple[str, Tensor, str, dict[str, str]]) -> Path:
    """A file of several video tracks, in their order: (codec, clip, pixel format, options)."""
    with av.open(str(path), "w", format=container) as output:
        streams = [add_stream(output, codec, clip, pixels, **options) for codec, clip, pixels, options in tracks]
        for stream, clip in streams:
            for k, frame in enumerate(clip.permute(0, 2, 3, 1).contiguous().numpy()):
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=stream.pix_fmt)
                picture.pts = k
                output.mux(stream.encode(picture))
            output.mux(stream.encode(None))
    return path


FORMATS = {
    "a.mpg": ("mpeg", "mpeg1video", "yuv420p"),
    "a.mpeg": ("mpeg", "mpeg2video", "yuv420p"),
    "a.ts": ("mpegts", "mpeg2video", "yuv420p"),
    "a.m2ts": ("mpegts", "libx264", "yuv420p"),
    "a.wmv": ("asf", "wmv2", "yuv420p"),
    "a.flv": ("flv", "flv", "yuv420p"),
    "a.ogv": ("ogg", "libvpx", "yuv420p"),
    "a.3gp": ("3gp", "mpeg4", "yuv420p"),
    "a.apng": ("apng", "apng", "rgb24"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_all_its_frames_under_their_numbers(tmp_path, name):
    container, codec, pixels = FORMATS[name]
    options = {} if codec in ("apng", "libx264") else {"b": "4M"}
    path = write(tmp_path / name, container, (codec, numbered(30), pixels, options))
    info = probe(path)
    assert (info.num_frames, info.fps, info.height, info.width) == (30, pytest.approx(25, rel=0.01), 48, 64)
    assert numbers(read_frames(path, [0, 17, 29])[0]) == [0, 17, 29]
    assert numbers(read_clip(path)[0]) == list(range(30))


def save_webp(path: Path, clip: Tensor, alpha: int = 255) -> Path:
    pictures = [Image.fromarray(frame) for frame in clip.permute(0, 2, 3, 1).contiguous().numpy()]
    for picture in pictures:
        picture.putalpha(alpha)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=40, lossless=True, exact=True)
    return path


def test_an_animated_webp_is_read_and_a_still_one_is_named(tmp_path):
    path = save_webp(tmp_path / "a.webp", numbered(12))
    info = probe(path)
    assert (info.num_frames, info.fps, info.height, info.width) == (12, 25, 48, 64)
    assert torch.equal(read_frames(path, [0, 5, 11])[0], numbered(12)[[0, 5, 11]])
    clip, fps = read_clip(path)
    assert torch.equal(clip, numbered(12)) and fps == 25
    assert read_clip(save_webp(tmp_path / "clear.webp", numbered(3), alpha=0))[0].unique().tolist() == [255]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(VideoError, match=r"a\.webp: "):
        read_clip(path)
    Image.new("RGB", (8, 8)).save(tmp_path / "still.webp")
    with pytest.raises(VideoError, match=r"still\.webp: the file holds one still picture, no video"):
        probe(tmp_path / "still.webp")


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda frames: frames),
        ((-1, 0, 0, 1), lambda frames: frames.flip(3)),  # ffmpeg: hflip
        ((1, 0, 0, -1), lambda frames: frames.flip(2)),  # vflip
        ((-1, 0, 0, -1), lambda frames: frames.flip(2, 3)),  # hflip,vflip
        ((0, 1, -1, 0), lambda frames: frames.rot90(-1, (2, 3))),  # transpose=clock
        ((0, -1, 1, 0), lambda frames: frames.rot90(1, (2, 3))),  # transpose=cclock
        ((0, 1, 1, 0), lambda frames: frames.transpose(2, 3)),  # transpose=cclock_flip
        ((0, -1, -1, 0), lambda frames: frames.transpose(2, 3).flip(2, 3)),  # transpose=clock_flip
    ],
)
def test_a_video_is_read_as_ffmpeg_shows_it(tmp_path, matrix, shown):
    """As source and as generated clip, for all eight orientations of a display matrix."""
    plain, path = tmp_path / "plain.mp4", tmp_path / "turned.mp4"
    video.write_mp4(plain, numbered(8), 25)
    data = bytearray(plain.read_bytes())
    a, b, c, d = (UNIT * value for value in matrix)
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    expected = shown(read_frames(plain, range(8), "pyav")[0])
    assert (probe(path).height, probe(path).width) == expected.shape[2:]
    assert torch.equal(read_frames(path, range(8), "pyav")[0], expected)
    assert torch.equal(read_clip(path)[0], expected)
    assert probe(path).decoder == ("decord" if matrix == (1, 0, 0, 1) else "pyav")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_cover_picture_is_not_the_video(tmp_path, order):
    cover = ("mjpeg", torch.zeros(1, 3, 96, 96, dtype=torch.uint8), "yuvj420p", {})
    tracks = [cover, ("libx264", numbered(20), "yuv420p", {})]
    path = write(tmp_path / "covered.mkv", "matroska", *(tracks[k] for k in order))
    assert probe(path).num_frames == 20
    assert numbers(VideoFile(path).read([0, 19])) == [0, 19] == numbers(read_clip(path)[0][[0, 19]])


def test_a_video_ends_where_its_size_changes(tmp_path):
    """Two parts of a broadcast, one after the other in one file."""
    tall = numbered(10, 64, 48)
    path = tmp_path / "joined.ts"
    with path.open("wb") as joined:
        for clip in (numbered(10), tall):
            joined.write(write(tmp_path / "part.ts", "mpegts", ("libx264", clip, "yuv420p", {})).read_bytes())
    change = "after 10 frames: the size of the frames changes from 64x48 to 48x64"
    assert video.examine(path).damage == [change]
    assert numbers(VideoFile(path).read([0, 9])) == [0, 9]
    with pytest.raises(VideoError, match=rf"frame 12 was asked for, but only frames 0-9 decode \({change}\)"):
        VideoFile(path).read([12])
    with pytest.raises(VideoError, match=change):
        read_clip(path)


def test_half_pictures_keep_their_own_colours(tmp_path):
    """Interlaced 4:2:0: colours belong to every second line. decord mixes them, here where no sample looks."""
    path = tmp_path / "interlaced.mkv"
    with av.open(str(path), "w", format="matroska") as output:
        stream: Any = output.add_stream("mpeg2video", rate=25, options={"flags": "+ilme+ildct", "b": "20M", "g": "12"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(12):
            y, u, v = (np.full((rows, 64), 128, np.uint8) for rows in (64, 16, 16))
            if 5 <= k < 9:
                lines = v.reshape(32, 32)
                lines[0::2], lines[1::2] = 200, 60
            frame = av.VideoFrame.from_ndarray(np.concatenate([y, u, v]), format="yuv420p")
            frame.pts = k
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert probe(path).decoder == "pyav"
    red = VideoFile(path).read([6])[0, 0, 24:40, 32].int()
    assert (red[0::2] > 200).all() and (red[1::2] < 60).all()


def test_a_name_that_is_not_utf_8_is_read_and_named(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    video.write_mp4(path, numbered(8), 25)
    assert numbers(VideoFile(path).read([0, 7])) == [0, 7] and len(read_clip(path)[0]) == 8
    with pytest.raises(VideoError, match=r"caf\\udce9\.mp4: frame 8 was asked for") as caught:
        VideoFile(path).read([8])
    str(caught.value).encode()
