"""Training clips: drawn from any dataset by number, so that clip k is the same on every machine and in every run."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcbench import clips
from dcbench.datasets.base import Item, VideoError
from dcbench.errors import UserError
from dcbench.seeding import clip_seed
from dcbench.weights import atomic_write


@dataclass(frozen=True)
class Batch:
    """Clips to learn from."""

    frames: Tensor  # uint8 [b, t, 3, h, w]
    captions: tuple[str, ...]
    strides: Tensor  # int64 [b]; source frames between two frames of the clip
    fps: Tensor  # int64 [b]; source frames per second // stride, as the released loader has it
    latents: Tensor | None = None  # [b, t, c, h/f, w/f], unscaled, where they were computed before

    def __len__(self) -> int:
        return len(self.captions)


@dataclass(frozen=True)
class ClipPool:
    """`clips` numbered training clips; each is a random stretch of a random video at a random stride."""

    items: Sequence[Item]
    num_frames: int
    strides: tuple[int, ...]
    height: int
    width: int
    clips: int
    seed: int

    def draw(self, number: int) -> tuple[Tensor, tuple[str, ...], int, float]:
        """Clip `number` -> uint8 [t, 3, h, w], its captions, stride and source fps.

        A video that is too short for the drawn stride takes the largest that fits, as the released loader does. A video
        that cannot be read is an error that names it: leave it out of the dataset, nothing is replaced in silence.
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
        """The clips of these numbers, each with one of its captions chosen by `rng`."""
        with ThreadPoolExecutor(min(8, len(numbers))) as pool:
            return _collate(list(pool.map(self.draw, numbers)), rng)

    def random_batch(self, size: int, rng: torch.Generator) -> Batch:
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
    """A pool that is read once and kept in memory, with latents where an `encode` function is given."""

    def __init__(self, pool: ClipPool, cache: Path, encode=None) -> None:
        """`encode`: uint8 [n, 3, h, w] -> float [n, c, h/f, w/f]. The latents lie in `cache`, float16."""
        self.drawn = [pool.draw(number) for number in range(pool.clips)]
        self.latents: Tensor | None = None
        if encode is None:
            return
        if not cache.is_file():
            latents = torch.stack([encode(frames).half() for frames, *_ in self.drawn]).contiguous()
            with atomic_write(cache) as temporary:
                save_file({"latents": latents}, temporary)
        self.latents = load_file(cache)["latents"]
        if self.latents.shape[:2] != (pool.clips, pool.num_frames):
            raise UserError(
                f"{cache} holds {list(self.latents.shape)}, not {pool.clips} clips of {pool.num_frames} frames; "
                "remove it"
            )

    def random_batch(self, size: int, rng: torch.Generator) -> Batch:
        numbers = torch.randint(len(self.drawn), (size,), generator=rng)
        batch = _collate([self.drawn[i] for i in numbers.tolist()], rng)
        latents = None if self.latents is None else self.latents[numbers].float()
        return Batch(batch.frames, batch.captions, batch.strides, batch.fps, latents)
