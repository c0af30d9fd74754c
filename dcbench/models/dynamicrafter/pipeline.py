"""DynamiCrafter behind the one interface of every model: requests in, clips out.

`sample` is the pure core, which takes every random draw as an argument; `generate` prepares requests for it, with one
noise generator a clip, so that a clip does not depend on its batch.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dcbench import clips
from dcbench.catalogue import ModelCard
from dcbench.errors import UserError, near_match
from dcbench.models import diffusion
from dcbench.models.base import CutPrompts, Request, Runtime
from dcbench.models.diffusion import Guidance, Schedule
from dcbench.models.dynamicrafter import conditioning
from dcbench.models.dynamicrafter.config import Config
from dcbench.models.dynamicrafter.image_scale import ImageScale
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.seeding import generator

Progress = Callable[[int, int], None]  # steps done, all steps


@dataclass(frozen=True)
class Sampling:
    """How a clip is sampled; a card's [sampling] table."""

    steps: int = 50
    eta: float = 1.0
    guidance_scale: float = 7.5
    image_guidance_scale: float | None = None  # None: one scale for text and image
    guidance_rescale: float = 0.0
    spacing: str = "uniform"

    @property
    def guidance(self) -> Guidance:
        return Guidance(self.guidance_scale, self.image_guidance_scale, self.guidance_rescale)


@dataclass(frozen=True)
class ModelOptions:
    """Conditions that can be switched off, and how the model is run; part of a card's [options] table.

    context: "full", "class_token" (the query transformer reads only CLIP's class token), "none" (text alone).
    vdg: the image latents beside the noise. image_scale: λ of every layer, None = as learned.
    image_scale_factors: a layer group of image_scale.py -> the factor on its λ; none = no change.
    """

    context: Literal["full", "class_token", "none"] = "full"
    vdg: bool = True
    image_scale: float | None = None
    image_scale_factors: Mapping[str, float] = field(default_factory=dict)
    any_motion: bool = False  # clips may ask for a motion that the model was not trained with
    ema: bool = False  # sample with the moving average that the file holds beside its weights
    decode_chunk: int = 4  # frames decoded at once; 0 = all
    offload: bool = False  # networks stay on the CPU and visit the device when they are needed
    batch_guidance: bool = True  # the branches of guidance in one batch: faster, more memory
    compile: bool = False  # torch.compile, with CUDA graphs on a GPU


def settings(kind: type, given: dict[str, Any], what: str) -> Any:
    """A dataclass from a card's table; every field has a default, whose type is the one allowed (None: a float).

    Unknown names and wrong types are errors with the allowed ones.
    """
    fields = dataclasses.asdict(kind())
    for name, value in given.items():
        if name not in fields:
            allowed = ", ".join(fields)
            raise UserError(f"{what}.{name}: unknown.{near_match(name, fields)} Allowed: {allowed}")
        wanted = float if fields[name] is None else type(fields[name])
        same = isinstance(value, bool) == (wanted is bool)
        if not (same and isinstance(value, (int, float) if wanted is float else wanted)):
            raise UserError(f"{what}.{name} = {value!r}: expected {wanted.__name__}")
    return kind(**given)


def motion_of(cfg: Config, fps: float, frame_stride: int | None) -> int:
    """The U-Net's motion condition: the frame stride for the 256 model, frames per second for the others."""
    if cfg.fs_meaning == "fps":
        return max(1, math.floor(fps + 1e-6))
    return cfg.fs if frame_stride is None else frame_stride


def check_motion(cfg: Config, name: str, motion: int, what: str) -> None:
    """Raise UserError for a motion condition that the model was not trained with; `what` asks for it."""
    low, high = cfg.fs_range
    if low <= motion <= high:
        return
    raise UserError(
        f"{what} asks for a {cfg.fs_meaning} of {motion}: {name} was trained with a {cfg.fs_meaning} of {low} to "
        f"{high}. Ask for one of these (a protocol's frame_stride decides it), or try it: --set options.any_motion=true"
    )


def check_frames(cfg: Config, name: str, clip_id: str, num_frames: int) -> None:
    """Raise UserError for more frames than the model makes at once."""
    if not 1 <= num_frames <= cfg.num_frames:
        raise UserError(f"clip {clip_id}: {num_frames} frames were asked for; {name} makes up to {cfg.num_frames}")


def spread(number: int, of: int) -> list[int]:
    """`number` indices of `of` frames, the first and the last one and those nearest to equal distances between."""
    return [math.floor(k * (of - 1) / max(1, number - 1) + 0.5) for k in range(number)]


@dataclass(frozen=True)
class Draws:
    """Every random draw of a batch: posterior [b, k, c, h, w], k = 1 or (with an end image) 2; latents
    [b, c, t, h, w]; step(i) of the same shape, asked for in order."""

    posterior: Tensor
    latents: Tensor
    step: Callable[[int], Tensor]


class DynamiCrafter:
    """An `ImageToVideo`. `image_scale` reads and sets λ by layer number."""

    def __init__(
        self,
        card: ModelCard,
        networks: Networks,
        schedule: Schedule,
        sampling: Sampling | None = None,
        options: ModelOptions | None = None,
        runtime: Runtime | None = None,
    ) -> None:
        self.card, self.networks, self.schedule = card, networks, schedule
        self.conditions_on = frozenset(card.conditions_on)
        self.cfg = networks.cfg
        self.sampling, self.options = sampling or Sampling(), options or ModelOptions()
        self.runtime = runtime or Runtime()
        self.device = torch.device(self.runtime.device)
        if self.options.context not in ("full", "class_token", "none"):
            raise UserError(f"options.context = {self.options.context!r}: allowed are full, class_token, none")
        if self.runtime.dtype not in (None, "float16", "bfloat16", "float32"):
            raise UserError(f"dtype {self.runtime.dtype!r}: allowed are float16, bfloat16, float32")
        self.steps = diffusion.ddim_steps(schedule, self.sampling.steps, self.sampling.spacing, self.sampling.eta)
        if self.options.image_scale is not None:
            for layer in range(1, len(self.image_scale) + 1):
                self.image_scale[layer] = self.options.image_scale
        self.image_scale.multiply(self.options.image_scale_factors)
        networks.eval().requires_grad_(False)
        if not self.options.offload:
            networks.to(self.device)
        self._predict: Callable[..., Tensor] = networks.unet
        if self.options.compile:
            self._predict = torch.compile(networks.unet, mode="reduce-overhead" if self.device.type == "cuda" else None)
        self.empty_tokens = conditioning.tokenize([""], self.cfg.clip)
        self.on_step: Progress | None = None
        self._unconditional: dict[str, Tensor] = {}
        self._cut = CutPrompts()
        self.clip_facts = self._cut.clip_facts

    @property
    def image_scale(self) -> ImageScale:
        return self.networks.image_scale

    # ---- the pure core

    @torch.inference_mode()
    def sample(
        self,
        images: Tensor,
        tokens: Tensor,
        fs: Tensor,
        draws: Draws,
        end_images: Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        """Images [b, 3, H, W] in [-1, 1] at the model's size, tokens [b, 77], fs [b] -> video [b, 3, t, H, W].

        The video is about in [-1, 1], not clamped. `end_images` (the last frame) is for a model trained with both ends.
        """
        with self._autocast():
            concat = self.concat_latents(images, draws.posterior, end_images)
            full, image = self.context(images, tokens)
            contexts = {"full": full, "none": self._none(len(images)), "image": image}
            branches = [contexts[name] for name in self.sampling.guidance.branches]
            video = self._denoise(branches, concat, fs.to(self.device), draws, progress)
            with self._on_device(self.networks.autoencoder) as autoencoder:
                frames = video.transpose(1, 2).flatten(0, 1)
                pixels = autoencoder.from_latents(frames, self.options.decode_chunk)
        return pixels.float().unflatten(0, (len(images), -1)).transpose(1, 2)

    def concat_latents(self, images: Tensor, noise: Tensor, end_images: Tensor | None) -> Tensor:
        """Visual detail guidance [b, c, t, h, w]: the image's latents at every frame, or at both ends and 0 between."""
        frames = self.cfg.num_frames
        with self._on_device(self.networks.autoencoder) as autoencoder:
            first = autoencoder.to_latents(images.to(self.device), noise[:, 0].to(self.device)).float()
            if not self.options.vdg:
                concat = torch.zeros_like(first)[:, :, None].repeat(1, 1, frames, 1, 1)
            elif end_images is None:
                concat = first[:, :, None].repeat(1, 1, frames, 1, 1)
            else:
                concat = torch.zeros_like(first)[:, :, None].repeat(1, 1, frames, 1, 1)
                concat[:, :, 0] = first
                concat[:, :, -1] = autoencoder.to_latents(end_images.to(self.device), noise[:, 1].to(self.device))
        return concat

    def context(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The contexts [b, l, d] of image with text, and of the image with an empty prompt."""
        empty = self._empty_text()
        with self._on_device(self.networks.cond_stage_model) as encoder:
            text = encoder(tokens.to(self.device)).float()
        visual = self._visual(images)
        return torch.cat([text, visual], dim=1), torch.cat([empty.expand_as(text), visual], dim=1)

    def _visual(self, images: Tensor) -> Tensor:
        if self.options.context == "none":
            return torch.zeros(len(images), 0, self.cfg.unet.context_dim, device=self.device)
        with self._on_device(self.networks.embedder) as encoder:
            tokens = encoder(images.to(self.device))
        if self.options.context == "class_token":
            tokens = tokens[:, :1]
        with self._on_device(self.networks.query_transformer) as query_transformer:
            return query_transformer(tokens).float()

    def _empty_text(self) -> Tensor:
        """Text tokens of the empty prompt [1, 77, d]; computed once a model."""
        if "text" not in self._unconditional:
            with self._on_device(self.networks.cond_stage_model) as encoder:
                self._unconditional["text"] = encoder(self.empty_tokens.to(self.device)).float()
        return self._unconditional["text"]

    def _none(self, batch: int) -> Tensor:
        """The context of no text and no image (mid grey), [b, l, d]; computed once a model."""
        if "context" not in self._unconditional:
            grey = torch.zeros(1, 3, self.cfg.height, self.cfg.width)
            self._unconditional["context"] = torch.cat([self._empty_text(), self._visual(grey)], dim=1)
        return self._unconditional["context"].expand(batch, -1, -1)

    def _denoise(
        self, contexts: list[Tensor], concat: Tensor, fs: Tensor, draws: Draws, progress: Progress | None
    ) -> Tensor:
        """Latents of the clips by guided DDIM; each context's keys and values are computed once for all steps."""
        with self._on_device(self.networks.unet) as unet:
            groups = [torch.cat(contexts)] if self.options.batch_guidance else contexts
            projected = [unet.project_context(group, self.cfg.num_frames) for group in groups]

            def predict(x: Tensor, t: Tensor) -> Tensor:
                x = torch.cat([x, concat], dim=1)
                outputs = torch.cat([self._predict(x, t, group, fs).float() for group in projected])
                return diffusion.guide(list(outputs.chunk(len(contexts))), self.sampling.guidance)

            noise = draws.latents.to(self.device)
            return diffusion.ddim(
                predict, self.schedule, noise, self.steps, lambda i: draws.step(i).to(self.device), progress
            )[0]

    # ---- requests

    def generate(self, requests: Sequence[Request]) -> list[Tensor]:
        """Clips uint8 [t, 3, H, W] at the model's size.

        A request for fewer frames than the model makes gets the first ones; from a model with both ends, it gets frames
        that are spread from the first to the last one (see `spread`).
        """
        if not requests:
            return []
        size = (self.cfg.height, self.cfg.width)
        for request in requests:
            check_frames(self.cfg, self.card.name, request.clip_id, request.num_frames)
            if self.cfg.interpolates and request.end_image is None:
                raise UserError(
                    f"clip {request.clip_id}: {self.card.name} fills in between two images and needs an end image. "
                    "For one image take dynamicrafter, dynamicrafter-512 or dynamicrafter-1024."
                )
            count = conditioning.count_tokens(request.prompt)
            self._cut.note(self.card.name, request.clip_id, count, self.cfg.clip.context_length, "CLIP")
        images = torch.cat([clips.to_float(clips.resize(request.image[None], *size)) for request in requests])
        ends = None
        if self.cfg.interpolates:
            given = [request.end_image[None] for request in requests if request.end_image is not None]
            ends = torch.cat([clips.to_float(clips.resize(image, *size)) for image in given])
        tokens = conditioning.tokenize([request.prompt for request in requests], self.cfg.clip)
        fs = torch.tensor([self.fs(request) for request in requests])
        draws = self.draws([request.seed for request in requests])
        video = self.sample(images, tokens, fs, draws, ends, self.on_step)
        made = clips.to_uint8(video.transpose(1, 2).cpu(), truncate=True)
        if not bool(torch.isfinite(video).all()):
            raise UserError(
                f"{self.card.name} made NaN or infinity; try dtype float32 in place of {self.runtime.dtype}"
            )
        shown = spread if self.cfg.interpolates else lambda number, _: list(range(number))
        return [clip[shown(request.num_frames, len(clip))] for clip, request in zip(made, requests, strict=True)]

    def with_motion(self, request: Request, motion: int | None) -> Request:
        """The request with this frame stride or fps, whichever the model takes; see `TakesMotion`."""
        given = self.cfg.fs if motion is None else motion
        if not self.options.any_motion:
            check_motion(self.cfg, self.card.name, given, "--motion")
        return dataclasses.replace(request, num_frames=self.cfg.num_frames, fps=float(given), frame_stride=given)

    def fs(self, request: Request) -> int:
        return motion_of(self.cfg, request.fps, request.frame_stride)

    def draws(self, seeds: Sequence[int]) -> Draws:
        """Noise of the clips, from one CPU generator for each clip and use: the same in any batch, on any device."""
        factor, channels = self.cfg.autoencoder.factor, self.cfg.autoencoder.latent_channels
        shape = (channels, self.cfg.height // factor, self.cfg.width // factor)

        def normal(stream: str) -> Callable[..., Tensor]:
            made = [generator(seed, stream) for seed in seeds]
            return lambda *size: torch.stack([torch.randn(size, generator=g) for g in made])

        step = normal("steps")
        clip_shape = (shape[0], self.cfg.num_frames, *shape[1:])
        return Draws(normal("posterior")(2, *shape), normal("latents")(*clip_shape), lambda _: step(*clip_shape))

    # ---- where things run

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.runtime.dtype in (None, "float32"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.runtime.dtype))

    @contextlib.contextmanager
    def _on_device(self, module: nn.Module) -> Iterator[Any]:
        """The module on the device; with offloading it is there for the length of the block only."""
        if not self.options.offload:
            yield module
            return
        try:
            yield module.to(self.device)
        finally:
            module.to("cpu")
