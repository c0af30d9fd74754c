"""Training clips of any dataset. They have numbers, and clip k is the same on every machine and in every run."""

import copy
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dcbench import clips
from dcbench.datasets.base import Item, VideoError
from dcbench.errors import UserError
from dcbench.seeding import clip_seed
from dcbench.weights import load_tensors, save_tensors


@dataclass(frozen=True)
class Batch:
    """Training clips."""

    frames: Tensor  # uint8 [b, t, 3, h, w]
    captions: tuple[str, ...]
    strides: Tensor  # int64 [b]; distance of two frames of the clip, in source frames
    fps: Tensor  # int64 [b]; source frames per second // stride, as in the released loader
    latents: Tensor | None = None  # [b, t, c, h/f, w/f], unscaled, if they were computed before

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class ClipPool:
    """`clips` numbered training clips; each is a random part of a random video at a random stride."""

    items: Sequence[Item]
    num_frames: int
    strides: tuple[int, ...]
    height: int
    width: int
    clips: int
    seed: int

    def draw(self, number: int) -> tuple[Tensor, tuple[str, ...], int, float]:
        """Clip `number` -> uint8 [t, 3, h, w], its captions, stride and source fps.

        A video that is too short for the drawn stride takes the largest that fits, as in the released loader. Raises
        VideoError, with the video's name, if it has too few frames or cannot be read: no other video takes its place.
        """
        rng = random.Random(clip_seed(self.seed, f"clip/{number}"))
        item, stride = rng.choice(self.items), rng.choice(self.strides)
        info = item.video.info()
        if info.num_frames < self.num_frames:
            raise VideoError(f"{item.path}: {info.num_frames} frames, training needs at least {self.num_frames}")
        stride = min(stride, (info.num_frames - 1) // max(1, self.num_frames - 1))
        start = rng.randrange(info.num_frames - stride * (self.num_frames - 1))
        frames = item.video.read([start + i * stride for i in range(self.num_frames)])
        return clips.resize(frames, self.height, self.width), item.captions, stride, info.fps

    def batch(self, numbers: Sequence[int], rng: torch.Generator) -> Batch:
        """The clips of these numbers, each with one of its captions, which `rng` chooses."""
        with ThreadPoolExecutor(min(8, len(numbers))) as pool:
            return _collate(list(pool.map(self.draw, numbers)), rng)

    def random_batch(self, size: int, rng: torch.Generator) -> Batch:
        """`size` clips that `rng` chooses; one may come twice."""
        return self.batch(torch.randint(self.clips, (size,), generator=rng).tolist(), rng)


def _collate(drawn: list[tuple[Tensor, tuple[str, ...], int, float]], rng: torch.Generator) -> Batch:
    strides = torch.tensor([stride for _, _, stride, _ in drawn])
    return Batch(
        torch.stack([frames for frames, *_ in drawn]),
        tuple(_choose(captions, rng) for _, captions, *_ in drawn),
        strides,
        torch.tensor([int(fps // stride) for *_, stride, fps in drawn]),
    )


def _choose(captions: tuple[str, ...], rng: torch.Generator) -> str:
    return captions[int(torch.randint(len(captions), (), generator=rng))] if captions else ""


class CachedPool:
    """A pool whose clips are read once and stay in memory, with their latents where `with_latents` added them."""

    def __init__(self, pool: ClipPool) -> None:
        self.drawn = [pool.draw(number) for number in range(pool.clips)]
        self.latents: Tensor | None = None  # float16 [clips, t, c, h/f, w/f], unscaled

    def with_latents(self, file: Path, encode: Callable[[Tensor], Tensor]) -> "CachedPool":
        """The same clips, with the latents in `file`; if it is missing, it is written first.

        `encode`: uint8 [t, 3, h, w] -> float [t, c, h/f, w/f]. Raises UserError when the file is of other clips.
        """
        if not file.is_file():
            save_tensors({"latents": torch.stack([encode(frames).half() for frames, *_ in self.drawn])}, file)
        latents = load_tensors(file)["latents"]
        size, num_frames = len(self.drawn), len(self.drawn[0][0])
        if latents.shape[:2] != (size, num_frames):
            raise UserError(
                f"{file} holds {list(latents.shape)}, not {size} clips of {num_frames} frames; remove the file"
            )
        pool = copy.copy(self)
        pool.latents = latents
        return pool

    def random_batch(self, size: int, rng: torch.Generator) -> Batch:
        numbers = torch.randint(len(self.drawn), (size,), generator=rng)
        batch = _collate([self.drawn[i] for i in numbers.tolist()], rng)
        return batch if self.latents is None else replace(batch, latents=self.latents[numbers].float())
