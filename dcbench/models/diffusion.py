"""Diffusion as functions: noise schedules, eps and v prediction, the training pair, guidance, DDIM.

A predictor is any `f(x, t) -> prediction`; randomness is an argument everywhere. Equal to the released DynamiCrafter
wherever that is finite; docs/dynamicrafter.md lists the repaired cases.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dcbench.errors import UserError, near_match

Prediction = Literal["eps", "v"]
Predictor = Callable[[Tensor, Tensor], Tensor]  # x [b, ...], t int64 [b] -> the prediction for x
SPACINGS = ("uniform", "uniform_trailing")


@dataclass(frozen=True)
class Schedule:
    """alphas_cumprod float32 [T]: the share of signal at each step; scale: the dynamic rescale, float32 [>= T]."""

    alphas_cumprod: Tensor
    prediction: Prediction
    scale: Tensor | None = None

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), shaped to multiply `like`."""
        alpha = self.alphas_cumprod.to(like.device)[t]
        return _expand(alpha.sqrt(), like), _expand((1 - alpha).sqrt(), like)


def _expand(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))


def linear_betas(num_timesteps: int, start: float, end: float) -> Tensor:
    """float64 betas, linear in their square root (Stable Diffusion's 'linear')."""
    return torch.linspace(start**0.5, end**0.5, num_timesteps, dtype=torch.float64) ** 2


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Betas shifted and scaled so that no signal is left at the last step (Lin et al. 2023, Algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def make_betas(num_timesteps: int, start: float, end: float, zero_snr: bool) -> Tensor:
    betas = linear_betas(num_timesteps, start, end)
    return zero_terminal_snr(betas) if zero_snr else betas


def dynamic_scale(final: float, num_timesteps: int, ramp: int = 400) -> Tensor:
    """float32 [ramp + T]: from 1 to `final` over `ramp` steps, then constant (DynamiCrafter's 512 and 1024)."""
    ramped = torch.linspace(1.0, final, ramp, dtype=torch.float64)
    return torch.cat([ramped, torch.full((num_timesteps,), final, dtype=torch.float64)]).float()


def make_schedule(
    prediction: Prediction = "eps",
    num_timesteps: int = 1000,
    linear_start: float = 0.00085,
    linear_end: float = 0.012,
    zero_terminal_snr: bool = False,
    dynamic_rescale: float | None = None,
) -> Schedule:
    """The schedule of a `DiffusionConfig`, whose fields are the arguments."""
    if prediction not in ("eps", "v"):
        raise UserError(f"prediction {prediction!r}: allowed are 'eps' and 'v'")
    betas = make_betas(num_timesteps, linear_start, linear_end, zero_terminal_snr)
    scale = None if dynamic_rescale is None else dynamic_scale(dynamic_rescale, num_timesteps)
    return Schedule((1 - betas).cumprod(0).float(), prediction, scale)


def to_eps_and_x0(
    prediction: Prediction, output: Tensor, x: Tensor, signal: Tensor, noise: Tensor
) -> tuple[Tensor, ...]:
    """The predicted noise and clean sample from a network's output; x = signal * x0 + noise * eps."""
    if prediction == "v":
        return signal * output + noise * x, signal * x - noise * output
    return output, (x - noise * output) / signal


# ---- training


def training_pair(schedule: Schedule, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(noisy x_t, target) for clean latents [b, ...] and t [b]; with a dynamic rescale the latents shrink first."""
    if schedule.scale is not None:
        clean = clean * _expand(schedule.scale.to(clean.device)[t], clean)
    signal, sigma = schedule.at(t, clean)
    target = noise if schedule.prediction == "eps" else signal * noise - sigma * clean
    return signal * clean + sigma * noise, target


def denoising_loss(predict: Predictor, schedule: Schedule, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the prediction: a scalar."""
    noisy, target = training_pair(schedule, clean, noise, t)
    return F.mse_loss(predict(noisy, t), target)


# ---- guidance


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance. `image_guidance_scale` None: `scale` is that of text and image together."""

    scale: float = 7.5
    image_guidance_scale: float | None = None
    rescale: float = 0.0

    @property
    def branches(self) -> tuple[str, ...]:
        """The contexts to predict with: "full", "none" (neither text nor image), "image" (no text)."""
        if self.image_guidance_scale is None:
            return ("full",) if self.scale == 1 else ("full", "none")
        return ("full", "none", "image")


def guide(outputs: list[Tensor], guidance: Guidance) -> Tensor:
    """One prediction from those of `guidance.branches`, in their order.

    full only; none + s (full - none); or none + s_image (image - none) + s (full - image), the paper's Eq. 4.
    """
    full = outputs[0]
    if len(outputs) == 1:
        return full
    none, image = outputs[1], outputs[-1]
    if guidance.image_guidance_scale is None:
        guided = none + guidance.scale * (full - none)
    else:
        guided = none + guidance.image_guidance_scale * (image - none) + guidance.scale * (full - image)
    return rescale_guidance(guided, full, guidance.rescale) if guidance.rescale > 0 else guided


def rescale_guidance(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Mix in, by `share`, the guided output with the conditional one's spread per sample (Lin et al. 2023, Eq. 16)."""
    axes = tuple(range(1, guided.ndim))
    factor = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return share * (guided * factor) + (1 - share) * guided


# ---- sampling


def ddim_timesteps(steps: int, spacing: str, num_timesteps: int = 1000) -> list[int]:
    """Ascending timesteps, every one in [0, num_timesteps).

    "uniform": 1, 1 + c, 1 + 2c, ... with c = T // steps, which may be a few more or fewer than `steps`;
    "uniform_trailing": from T - 1 downwards, exactly `steps`.
    """
    if spacing not in SPACINGS:
        hint = near_match(spacing, SPACINGS)
        raise UserError(f"spacing {spacing!r} is unknown.{hint} Allowed: {', '.join(SPACINGS)}")
    if not 1 <= steps <= num_timesteps:
        raise UserError(f"steps = {steps}: give a number from 1 to {num_timesteps}")
    if spacing == "uniform":
        return [t + 1 for t in range(0, num_timesteps, num_timesteps // steps) if t + 1 < num_timesteps]
    stride = num_timesteps / steps
    return [round(num_timesteps - i * stride) - 1 for i in reversed(range(steps))]


@dataclass(frozen=True)
class DdimStep:
    """The constants of one step from timestep t; alpha_bar values and sigma as float32-exact numbers."""

    t: int
    alpha: float
    alpha_prev: float
    sigma: float
    direction: float  # sqrt(1 - alpha_prev - sigma^2)
    rescale: float  # of the predicted clean sample


def ddim_steps(schedule: Schedule, steps: int, spacing: str, eta: float) -> list[DdimStep]:
    """The steps in sampling order, from the noisiest. The last one ends at alpha_bar_0, as released (not at 1)."""
    if not 0 <= eta <= 1:
        raise UserError(f"eta = {eta}: give a number from 0 (deterministic) to 1")
    times = ddim_timesteps(steps, spacing, schedule.num_timesteps)
    bar = schedule.alphas_cumprod.double().tolist()
    if schedule.prediction == "eps" and bar[times[-1]] == 0:
        raise UserError(
            f"eps prediction cannot start at timestep {times[-1]}, where no signal is left: x0 would be divided by 0. "
            "Use spacing 'uniform', a schedule without zero terminal SNR, or a model that predicts v."
        )
    made = []
    for t, before in zip(times, [None, *times], strict=False):
        alpha, alpha_prev = bar[t], bar[0 if before is None else before]
        sigma = eta * math.sqrt((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev))
        # The remainder is taken in float32 as released; rounding can make it negative when alpha is 0 (20 and 25
        # steps of the 512 model), where the released sampler turns the whole clip into NaN.
        remainder = 1 - torch.tensor(alpha_prev) - torch.tensor(sigma) ** 2
        direction = float(remainder.clamp(min=0).sqrt())
        rescale = 1.0
        if schedule.scale is not None:
            rescale = float(schedule.scale[t if before is None else before] / schedule.scale[t])
        made.append(DdimStep(t, alpha, alpha_prev, float(torch.tensor(sigma)), direction, rescale))
    return made[::-1]


def ddim_step(
    prediction: Prediction, step: DdimStep, x: Tensor, output: Tensor, noise: Tensor | None
) -> tuple[Tensor, ...]:
    """(the next sample, the predicted clean one) from a network's output; noise only where sigma > 0."""
    signal, sigma = math.sqrt(step.alpha), math.sqrt(1 - step.alpha)
    eps, clean = to_eps_and_x0(prediction, output, x, x.new_tensor(signal), x.new_tensor(sigma))
    clean = clean * step.rescale
    out = math.sqrt(step.alpha_prev) * clean + step.direction * eps
    return (out if noise is None else out + step.sigma * noise), clean


def ddim(
    predict: Predictor,
    schedule: Schedule,
    x: Tensor,
    steps: list[DdimStep],
    noise: Callable[[int], Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample from x [b, ...]: (the last sample, the last predicted clean one).

    `noise(i)` gives step i's noise, asked for in order and only where sigma > 0; `progress(done, all)` follows a step.
    """
    clean = x
    for index, step in enumerate(steps):
        t = torch.full((x.shape[0],), step.t, dtype=torch.int64, device=x.device)
        x, clean = ddim_step(schedule.prediction, step, x, predict(x, t), noise(index) if step.sigma > 0 else None)
        if progress:
            progress(index + 1, len(steps))
    return x, clean
