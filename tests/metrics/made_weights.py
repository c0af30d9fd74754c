"""Made-up weights that are the same on every machine, and clips to try them on: for recordings of other programs."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

SHAPES = {"a": (3, 72, 128), "b": (6, 132, 100), "c": (4, 130, 130)}  # of the clips: frames, height, width
LARGER = {"d": (10, 124, 136)}  # of a clip that RAFT can read


def made_weights(like: Mapping[str, Tensor], seed: int, gain: float = 1.0) -> dict[str, Tensor]:
    """Random tensors with these names and shapes. Signals keep their size from layer to layer, and frames differ."""
    random = np.random.default_rng(seed)
    made = {}
    for name in sorted(like):
        shape = tuple(like[name].shape)
        if not like[name].is_floating_point():
            made[name] = torch.ones(shape, dtype=like[name].dtype)
            continue
        drawn = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
        if name.endswith("running_var"):
            drawn = drawn.square() * 0.2 + 0.5
        elif name.endswith("weight") and len(shape) == 1:  # of a norm, or the slopes of a PReLU
            drawn = drawn * 0.1 + (1 if "norm" in name or "bn" in name or "ln" in name else 0.25)
        elif len(shape) < 2:
            drawn = drawn * 0.1
        elif ("emb" in name and "weight" not in name) or "token" in name:
            drawn = drawn * 0.5
        else:
            drawn = drawn * (gain / np.sqrt(np.prod(shape[1:])))
        made[name] = drawn
    return made


def made_clip(name: str) -> Tensor:
    """uint8 [t 3 h w]: coloured blobs on a texture; blobs and texture move, and some noise comes on top."""
    number, height, width = (SHAPES | LARGER)[name]
    random = np.random.default_rng([ord(name), height, width])
    texture = random.integers(0, 256, (3, height // 4 + 12, width // 4 + 12)).repeat(4, 1).repeat(4, 2)
    rows, columns = np.mgrid[:height, :width]
    frames = []
    for t in range(number):
        frame = texture[:, 2 * t : 2 * t + height, 3 * t : 3 * t + width].astype(float) * 0.5
        for k in range(3):
            y, x = height * (0.2 + 0.3 * k) + 5 * t, width * (0.7 - 0.2 * k) - 7 * t
            blob = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * (height / 8) ** 2))
            frame[k] += 160 * blob
        frames.append(frame + random.normal(0, 4, frame.shape))
    return torch.from_numpy(np.stack(frames).clip(0, 255).astype(np.uint8))


def made_picture(name: str) -> Tensor:
    """uint8 [3 2h 2w]: the picture of a clip, at twice its size: its first frame, a little darker."""
    frame = made_clip(name)[0].numpy().repeat(2, 1).repeat(2, 2)
    return torch.from_numpy((frame * 0.9).astype(np.uint8))


def made_tracks(seed: int) -> tuple[np.ndarray, np.ndarray, int]:
    """float64 [10 10 2] twice and a short side: points (x, y) of a first and a last frame, by a made-up camera.

    Of five seeds in a row, one camera pans or tilts, one zooms, one does both, one rests, and one is noise.
    """
    random = np.random.default_rng([11, seed])
    height, width = (256, 256) if seed % 2 else (320, 512)
    y, x = np.meshgrid(np.linspace(10, height - 10, 10), np.linspace(10, width - 10, 10), indexing="ij")
    first = np.stack([x, y], -1)
    kind, middle = seed % 5, np.array([width, height]) / 2
    shift = random.uniform(-12, 12, 2) * random.integers(0, 2, 2) if kind in (0, 2) else np.zeros(2)
    zoom = 1 + random.uniform(-0.1, 0.1) if kind in (1, 2) else 1.0
    noise = random.normal(0, 4 if kind == 4 else 0.3, first.shape)
    return first, middle + (first - middle) * zoom + shift + noise, min(height, width)
