"""Clips for a made-up Physics-IQ suite, as some model might make them, for the tests."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcbench.datasets.made_events import FPS, film, recordings
from dcbench.video import write_mp4

SECONDS = 5


def write_clips(out: Path, kind: str, fps: int, height: int, seconds: float = SECONDS) -> list[Path]:
    """Write 0001_<kind>.mp4 to 0009_<kind>.mp4. "still": the picture; "late": the event, 0.2 s late; "noise"."""
    written = []
    for name, event, view, take in recordings():
        if take != "take-1":
            continue
        path = out / f"{name[:4]}_{kind}.mp4"
        frames = film(event, view, take, height)
        write_mp4(path, clip_of(kind, frames, round(fps * seconds), fps, int(name[:4])), fps)
        written.append(path)
    return written


def clip_of(kind: str, frames: np.ndarray, count: int, fps: int, seed: int) -> Tensor:
    if kind == "noise":
        generator = np.random.default_rng(seed)
        made = generator.integers(0, 256, (count, *frames.shape[1:]), dtype=np.uint8)
    else:
        delay = {"still": np.inf, "late": 0.2}[kind]
        places = [min(len(frames) - 1, round(max(0.0, k / fps - delay) * FPS)) for k in range(count)]
        made = frames[places]
    return torch.from_numpy(made).permute(0, 3, 1, 2).contiguous()
