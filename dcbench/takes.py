"""Recordings of one real event: what the metrics of Physics-IQ compare a clip with. Frames are read in small parts.

A real event is filmed twice. The difference of the two takes is the physical variance: no model can be asked for less.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcbench import video
from dcbench.files import digest, sha256_file

CHUNK = 16  # frames in memory at once; one of 3840x2160 has 25 MB
Array = np.ndarray


@dataclass(frozen=True)
class Take:
    """One recording, as files of several frame rates."""

    files: Mapping[int, Path]  # by frames per second

    def frames(self, fps: float, seconds: float) -> Iterator[Array]:
        """The first seconds at a frame rate: round(fps * seconds) frames, RGB uint8 [h w 3].

        They come from the file of this rate. If there is none, they are made from the file of the highest rate (see
        `blended`). VideoError if the file is too short.
        """
        count = round(fps * seconds)
        path = self.files.get(int(fps)) if fps == int(fps) else None
        if path is not None:
            _check_length(path, video.probe(path), seconds, needed=count)
            for start in range(0, count, CHUNK):
                yield from _read(path, range(start, min(start + CHUNK, count)))
            return
        path = self.files[max(self.files)]
        info = video.probe(path)
        have = int(min(seconds, info.num_frames / info.fps) * info.fps)
        _check_length(path, info, seconds, needed=int(seconds * info.fps))
        yield from blended(path, have, count)

    def clip(self, fps: float, seconds: float) -> Tensor:
        """`frames` as a clip, uint8 [t 3 h w]."""
        frames = np.stack(list(self.frames(fps, seconds)))
        return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()

    @property
    def sha256(self) -> str:
        """Equal for takes with the same rates and files."""
        return digest({str(fps): _file_hash(path) for fps, path in sorted(self.files.items())}, 64)


@dataclass(frozen=True)
class Takes:
    """Two recordings of the same event from the same place."""

    first: Take
    second: Take

    @property
    def sha256(self) -> str:
        return digest([self.first.sha256, self.second.sha256], 64)


def blended(path: Path, have: int, want: int) -> Iterator[Array]:
    """`want` frames, spread evenly from the first to the last of the first `have` frames of a video.

    A frame between two frames is their weighted mean, cut off to whole levels, as in Physics-IQ's own fps_changer.py.
    """
    places = [k * (have - 1) / max(1, want - 1) for k in range(want)]
    for start in range(0, want, CHUNK):
        part = places[start : start + CHUNK]
        needed = sorted({min(int(place) + step, have - 1) for place in part for step in (0, 1)})
        frames = {index: frame.astype(np.float32) for index, frame in zip(needed, _read(path, needed), strict=True)}
        for place in part:
            index = int(place)
            weight = place - index
            mean = (1 - weight) * frames[index] + weight * frames[min(index + 1, have - 1)]
            yield mean.astype(np.uint8)


def _read(path: Path, indices: Sequence[int]) -> Iterator[Array]:
    clip = video.read_frames(path, indices)[0]
    return (np.ascontiguousarray(frame) for frame in clip.permute(0, 2, 3, 1).numpy())


def _check_length(path: Path, info: video.VideoInfo, seconds: float, needed: int) -> None:
    if info.num_frames < needed:
        raise video.VideoError(
            f"{path}: {info.num_frames} frames at {info.fps:g} fps; {needed} are needed for {seconds:g} seconds"
        )


def _file_hash(path: Path) -> str:
    status = path.stat()
    return _hash_of(path, status.st_size, status.st_mtime_ns)


@lru_cache(4096)
def _hash_of(path: Path, size: int, changed: int) -> str:
    return sha256_file(path)
