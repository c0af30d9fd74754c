"""Clips whose frames can be told apart, for the tests of video files."""

import torch


def numbered(frames: int = 40, height: int = 48, width: int = 64) -> torch.Tensor:
    """A clip whose frame i can be told by its grey level, 5 i + 20, in the upper half; the lower half moves."""
    clip = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    for i in range(frames):
        clip[i, :, : height // 2] = 5 * i + 20
        clip[i, 0, height // 2 :] = torch.arange(width, dtype=torch.uint8).roll(i) * 3
    return clip


def numbers(frames: torch.Tensor) -> list[int]:
    """Which frames of `numbered` these are."""
    return [
        round((value - 20) / 5) for value in frames[:, :, : frames.shape[2] // 2 - 4].float().mean((1, 2, 3)).tolist()
    ]


def noise(frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)
