"""Checkpoints: read strictly, every key accounted for; a PyTorch zip file is mapped into memory, not copied.

Accepted layouts: those of `weights.load_tensors`, each under the prefixes that DeepSpeed, data parallelism,
torch.compile and Lightning put before names, and the 256 model's older name of the fps embedding (`RENAMED`).
"""

import dataclasses
import functools
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dcbench.errors import UserError
from dcbench.models.diffusion import Schedule, make_betas, make_schedule
from dcbench.models.dynamicrafter.config import VARIANTS, Config, DiffusionConfig
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.weights import AVERAGE, check_finite, human_size, load_tensors

Shapes = dict[str, tuple[int, ...]]

WRAPPERS = ("_forward_module", "module", "_orig_mod")  # parts of a name: DeepSpeed, data parallelism, torch.compile
ROOTS = ("model.diffusion_model.", "first_stage_model.", "image_proj_model.", "cond_stage_model.", "embedder.")
RENAMED = {"model.diffusion_model.framestride_embed.": "model.diffusion_model.fps_embedding."}
BUFFERS = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
    *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
)
SCALE = "scale_arr"
# What training code stores beside the model, and sampling has no use for
UNUSED = re.compile(r"logvar|lvlb_weights|first_stage_model\.loss\..+|(.+\.)?attn_mask|model_ema\.(decay|num_updates)")
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16)  # each before those with more bits
SLOW = 1e9  # bytes; reading a larger file is told on stderr


@functools.cache
def layout(cfg: Config) -> tuple[Shapes, Shapes]:
    """(needed, optional) keys and shapes of a released checkpoint; together they are all of them.

    Optional: the schedule, which the configuration gives too, and text layers that the image tower holds without use.
    """
    with torch.device("meta"):
        networks = Networks(cfg)
    needed = {key: tuple(value.shape) for key, value in networks.state_dict().items()}
    optional: Shapes = {name: (cfg.diffusion.num_timesteps,) for name in BUFFERS}
    if cfg.diffusion.dynamic_rescale is not None:
        optional[SCALE] = (cfg.diffusion.num_timesteps + 400,)
    clip, image = cfg.clip, "embedder.model."
    optional |= {
        image + "positional_embedding": (clip.context_length, clip.text_width),
        image + "text_projection": (clip.text_width, clip.embed_dim),
        image + "logit_scale": (),
        image + "token_embedding.weight": (clip.vocab_size, clip.text_width),
        image + "ln_final.weight": (clip.text_width,),
        image + "ln_final.bias": (clip.text_width,),
    }
    return needed, optional


def unwrapped(key: str) -> str:
    """A key without what wrappers of modules put into it."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def released_name(key: str) -> str:
    """The current name of a key of any accepted layout."""
    plain = unwrapped(key)
    at = max(plain.find(f".{AVERAGE}") + 1, 0)
    if plain[at:].startswith(AVERAGE):
        return AVERAGE + released_name(plain[at:].removeprefix(AVERAGE))
    inner = plain
    while inner.startswith("model.") and not inner.startswith(ROOTS):
        inner = inner.removeprefix("model.")
    name = inner if inner.startswith(ROOTS) or "." not in inner else plain
    for old, new in RENAMED.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


@dataclasses.dataclass(frozen=True)
class Differences:
    """How a file's keys and shapes differ from a layout."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[str, ...]  # "key: has [..], needs [..]"

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.reshaped)

    def __len__(self) -> int:
        return len(self.missing) + len(self.unexpected) + len(self.reshaped)


def compare(shapes: Mapping[str, tuple[int, ...]], cfg: Config) -> Differences:
    needed, optional = layout(cfg)
    known = needed | optional
    return Differences(
        tuple(key for key in needed if key not in shapes),
        tuple(key for key in shapes if key not in known),
        tuple(
            f"{key}: has {list(shape)}, needs {list(known[key])}"
            for key, shape in shapes.items()
            if key in known and shape != known[key]
        ),
    )


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The variants that a file of these keys and shapes fits (those of 512 x 320 and 1024 x 576 have the same keys)."""
    fitting = [name for name, cfg in VARIANTS.items() if not compare(shapes, cfg)]
    if SCALE in shapes:  # a buffer of the variants that rescale latents, and of them alone
        return [name for name in fitting if VARIANTS[name].diffusion.dynamic_rescale is not None]
    return fitting


def check(tensors: Mapping[str, Tensor], cfg: Config, source: str) -> None:
    """Raise UserError unless the tensors fit; it names the first wrong keys, and the variant that would fit."""
    shapes = {key: tuple(value.shape) for key, value in tensors.items()}
    if differences := compare(shapes, cfg):
        lines = [f"{source} is no checkpoint of this variant."]
        for what in ("missing", "unexpected", "reshaped"):
            keys: tuple[str, ...] = getattr(differences, what)
            if keys:
                lines.append(f"  {what} ({len(keys)}): {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}")
        found = recognise(shapes)
        if found:
            lines.append(f"  It fits the variant {' or '.join(found)}: choose that model, or another file.")
        raise UserError("\n".join(lines))
    final = cfg.diffusion.dynamic_rescale
    if final is not None and SCALE in tensors:
        last = tensors[SCALE][-1]
        others = [n for n, other in VARIANTS.items() if _near(other.diffusion.dynamic_rescale, last)]
        if not _near(final, last) and others:
            raise UserError(f"{source} rescales latents to {last:.2f}, as the variant {' or '.join(others)} does.")


def _near(scale: float | None, given: Tensor) -> bool:
    return scale is not None and abs(scale - float(given)) < max(1e-4, scale * torch.finfo(given.dtype).eps)


def schedule_of(tensors: Mapping[str, Tensor], cfg: DiffusionConfig, source: str) -> Schedule:
    """The schedule in the file, which the model was trained with; without one, that of the configuration.

    A file in half precision holds the schedule rounded, with shares of signal of 1 where nothing can be divided by
    what is left. Where it is the configuration's but for the rounding, the configuration's is taken.
    """
    own = make_schedule(**dataclasses.asdict(cfg))
    if "alphas_cumprod" not in tensors:
        return own
    given, scale = tensors["alphas_cumprod"], tensors.get(SCALE) if own.scale is not None else None
    if _rounded(given, own.alphas_cumprod) and (scale is None or own.scale is None or _rounded(scale, own.scale)):
        return own
    read = Schedule(given.float(), own.prediction, own.scale if scale is None else scale.float())
    check_finite({"alphas_cumprod": read.alphas_cumprod} | ({} if read.scale is None else {SCALE: read.scale}), source)
    bar = read.alphas_cumprod
    if bool((bar < 0).any() or (bar >= 1).any() or (bar.diff() > 0).any()):
        raise UserError(
            f"{source}: its noise schedule cannot be used: alphas_cumprod goes from {float(bar[0]):.6g} to "
            f"{float(bar[-1]):.6g}, and must fall from below 1 to 0 or more. Remove alphas_cumprod from the file to "
            "sample with the variant's own schedule"
        )
    differ = float((bar - own.alphas_cumprod).abs().max())
    if read.scale is not None and own.scale is not None:
        differ = max(differ, float((read.scale - own.scale).abs().max()))
    if differ > 1e-6:
        warnings.warn(
            f"{source}: its noise schedule differs from the variant's by up to {differ:.2g}; the file's is used",
            stacklevel=2,
        )
    return read


def _rounded(given: Tensor, own: Tensor) -> bool:
    """Whether `given` is `own` (float32) rounded to fewer bits, also if it was stored in float32 after the rounding."""
    if given.shape != own.shape:
        return False
    values = given.float()
    narrow = next((d for d in NARROW if given.dtype == d or torch.equal(values.to(d).float(), values)), None)
    if narrow is None:
        return False
    kind = torch.finfo(narrow)
    return bool(((values - own).abs() <= own.abs() * kind.eps + kind.tiny * kind.eps).all())


def released_buffers(cfg: DiffusionConfig) -> dict[str, Tensor]:
    """Every schedule tensor of the released models (float32, computed in float64): to check a checkpoint against."""
    betas = make_betas(cfg.num_timesteps, cfg.linear_start, cfg.linear_end, cfg.zero_terminal_snr)
    alphas, bar = 1 - betas, (1 - betas).cumprod(0)
    before = torch.cat([torch.ones(1, dtype=bar.dtype), bar[:-1]])
    variance = betas * (1 - before) / (1 - bar)
    velocity = cfg.prediction == "v"
    zeros = torch.zeros_like(bar)
    weights = torch.ones_like(bar) if velocity else betas**2 / (2 * variance * alphas * (1 - bar))
    weights[0] = weights[1]
    return {
        name: values.float()
        for name, values in {
            "betas": betas,
            "alphas_cumprod": bar,
            "alphas_cumprod_prev": before,
            "sqrt_alphas_cumprod": bar.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - bar).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - bar).log(),
            "sqrt_recip_alphas_cumprod": zeros if velocity else (1 / bar).sqrt(),
            "sqrt_recipm1_alphas_cumprod": zeros if velocity else (1 / bar - 1).sqrt(),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": betas * before.sqrt() / (1 - bar),
            "posterior_mean_coef2": (1 - before) * alphas.sqrt() / (1 - bar),
            "lvlb_weights": weights,
        }.items()
    }


def read(path: Path, cfg: Config, ema: bool = False, rest: Path | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint under their current names, as stored; UserError unless they fit the configuration.

    `ema`: the moving average in place of the weights that it has; UserError for a file without one. `rest`: a whole
    checkpoint, which gives the tensors that the first one does not have.
    """
    if path.is_file() and path.stat().st_size > SLOW:
        print(f"reading {path.name} ({human_size(path.stat().st_size)})", file=sys.stderr, flush=True)
    tensors: dict[str, Tensor] = {}
    for key, value in load_tensors(path, average=True).items():
        if tensors.setdefault(released_name(key), value) is not value:
            raise UserError(f"{path} holds two tensors for {released_name(key)}, one of them as {key}")
    tensors = {key: value for key, value in tensors.items() if not UNUSED.fullmatch(key)}
    average = {key: tensors.pop(key) for key in list(tensors) if key.startswith(AVERAGE)}
    if ema:
        tensors |= _named_average(average, tensors, path)
    elif average:
        print(f"{path.name} also holds a moving average of its weights: options.ema = true takes it", file=sys.stderr)
    if rest is not None and compare({key: tuple(value.shape) for key, value in tensors.items()}, cfg).missing:
        tensors = read(rest, cfg) | tensors
    check(tensors, cfg, str(path))
    return tensors


def _named_average(average: Mapping[str, Tensor], tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The moving average under the names of the weights: latent-diffusion's code stores it without dots and `model.`"""
    if not average:
        raise UserError(f"{path} holds no moving average of its weights; leave out options.ema")
    names = {AVERAGE + key.removeprefix("model.").replace(".", ""): key for key in tensors}
    names |= {AVERAGE + key: key for key in tensors}
    if odd := [key for key in average if key not in names]:
        raise UserError(f"{path}: {len(odd)} tensors of its moving average are of no weight, first {odd[0]}")
    return {names[key]: value for key, value in average.items()}


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at a multiple of 64 bytes, where PyTorch puts its own: matrix products round by address.

    Zip checkpoints hold their tensors so, and are mapped without a copy. A safetensors file may hold them anywhere.
    """
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def load_networks(path: Path, cfg: Config, ema: bool = False, rest: Path | None = None) -> tuple[Networks, Schedule]:
    """Networks with a checkpoint's weights (float32, on the CPU) and the schedule to sample with. See `read`."""
    tensors = read(path, cfg, ema, rest)
    with torch.device("meta"):
        networks = Networks(cfg)
    needed = networks.state_dict()
    check_finite({key: tensors[key] for key in needed}, path)
    networks.load_state_dict({key: _aligned(tensors.pop(key).float()) for key in needed}, strict=True, assign=True)
    return networks.eval().requires_grad_(False), schedule_of(tensors, cfg.diffusion, path.name)
