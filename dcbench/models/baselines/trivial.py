"""Models without weights: the bounds that every number is read against."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dcbench.catalogue import ModelCard
from dcbench.clips import resize
from dcbench.errors import UserError
from dcbench.models.base import Request, Runtime
from dcbench.seeding import generator


class PerRequest:
    """A model that makes each clip by one function of its request."""

    def __init__(self, card: ModelCard, make: Callable[[Request], Tensor]):
        self.card = card
        self.conditions_on: frozenset[str] = frozenset(card.conditions_on)
        self.make = make

    def generate(self, requests: Sequence[Request]) -> list[Tensor]:
        return [self.make(request) for request in requests]


def still(card: ModelCard, runtime: Runtime) -> PerRequest:
    """Every frame is the input image."""
    return PerRequest(card, lambda request: request.image.expand(request.num_frames, -1, -1, -1).clone())


def zoom(card: ModelCard, runtime: Runtime) -> PerRequest:
    """Frame k magnifies the image by factor ** (k / (t - 1)) about its centre."""
    factor = float(card.options["factor"])
    if not 1 <= factor <= 16:
        raise UserError(f"zoom: options.factor is {factor}; it must lie between 1 and 16")

    def make(request: Request) -> Tensor:
        _, height, width = request.image.shape
        frames = []
        for k in range(request.num_frames):
            scale = factor ** (k / max(1, request.num_frames - 1))
            h, w = max(1, round(height / scale)), max(1, round(width / scale))
            top, left = (height - h) // 2, (width - w) // 2
            window = request.image[None, :, top : top + h, left : left + w]
            frames.append(resize(window, height, width, mode="squash", interpolation="bicubic", antialias=False))
        return torch.cat(frames)

    return PerRequest(card, make)


def hold(card: ModelCard, runtime: Runtime) -> PerRequest:
    """Every frame is the first image; the last one is the end image, where one is given."""

    def make(request: Request) -> Tensor:
        clip = request.image.expand(request.num_frames, -1, -1, -1).clone()
        if request.end_image is not None:
            clip[-1] = request.end_image
        return clip

    return PerRequest(card, make)


def blend(card: ModelCard, runtime: Runtime) -> PerRequest:
    """Frame k of t is (1 - w) * first image + w * end image, w = k / (t - 1), rounded to grey levels."""

    def make(request: Request) -> Tensor:
        if request.end_image is None:
            raise UserError(f"clip {request.clip_id}: blend mixes two images and needs an end image; hold needs none")
        weight = torch.linspace(0, 1, request.num_frames, dtype=torch.float64)[:, None, None, None]
        mixed = torch.lerp(request.image.double(), request.end_image.double(), weight)
        return mixed.round().to(torch.uint8)

    return PerRequest(card, make)


def noise(card: ModelCard, runtime: Runtime) -> PerRequest:
    """Independent uniform noise in every pixel."""

    def make(request: Request) -> Tensor:
        shape = (request.num_frames, *request.image.shape)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(request.seed))

    return PerRequest(card, make)


def real(card: ModelCard, runtime: Runtime) -> PerRequest:
    """The reference clip itself."""

    def make(request: Request) -> Tensor:
        if request.reference is None:
            raise UserError("the model 'real' returns the reference clip; this request has none")
        return request.reference.clone()

    return PerRequest(card, make)
