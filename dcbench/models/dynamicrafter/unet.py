"""The 3-D U-Net: spatial layers work on each frame, temporal ones along the frames.

Activations are [(b t), c, h, w] in channels-last memory. Attribute names (one is misspelt) are those of the released
checkpoints, so that a released state dict loads strictly.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcbench.models.dynamicrafter.attention import (
    DualCrossAttention,
    KeysValues,
    SpatialTransformer,
    TemporalTransformer,
    norm_clip,
    repeat_batch,
    zero,
)
from dcbench.models.dynamicrafter.config import UNetConfig

Context = Sequence[Sequence[KeysValues]]  # by spatial transformer, by block
Role = Literal["context", "temporal", "spatial"]


def parameter_role(name: str) -> Role:
    """What a parameter (a name in the whole model's or the U-Net's state dict) belongs to.

    "context": the query transformer, the image keys and values and the gates; "temporal": the temporal transformers
    and convolutions; "spatial": the rest of the U-Net. ValueError for parameters of other parts.
    """
    if "image_proj_model." in name or name.endswith((".to_k_ip.weight", ".to_v_ip.weight", ".attn2.alpha")):
        return "context"
    path = name.removeprefix("model.diffusion_model.").split(".")
    if path[0] not in {
        "time_embed",
        "fps_embedding",
        "input_blocks",
        "init_attn",
        "middle_block",
        "output_blocks",
        "out",
    }:
        raise ValueError(f"{name}: not a parameter of the U-Net or of the query transformer")
    if path[0] == "init_attn" or "temopral_conv" in path:
        return "temporal"
    # A block is (residual, spatial transformer, temporal transformer, ...): place 2 is temporal wherever it exists.
    place = path[2] if path[0] in {"input_blocks", "output_blocks"} else path[1] if path[0] == "middle_block" else ""
    return "temporal" if place == "2" else "spatial"


def sinusoid(values: Tensor, dim: int) -> Tensor:
    """[b] -> float32 [b, dim]: cosines first, then sines, of frequencies 10000^(-i / (dim / 2))."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values[:, None].float() * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


class TemporalConv(nn.Conv3d):
    """Convolution of kernel (3, 1, 1), zero-padded in time, on [(b t), c, h, w]: a 2-D one over (t, h w)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, (3, 1, 1), padding=(1, 0, 0))

    def forward(self, input: Tensor, frames: int) -> Tensor:
        n, c, h, w = input.shape
        flat = input.permute(0, 2, 3, 1).reshape(n // frames, frames, h * w, c).permute(0, 3, 1, 2)
        out = F.conv2d(flat, self.weight.squeeze(-1), self.bias, padding=(1, 0))
        return out.permute(0, 2, 3, 1).reshape(n, h, w, -1).permute(0, 3, 1, 2)


class TemporalConvs(nn.Module):
    """x + four times (group norm over the clip, SiLU, temporal convolution); the last one starts at zero."""

    def __init__(self, cfg: UNetConfig, channels: int) -> None:
        super().__init__()

        def layer(*before_conv: nn.Module) -> nn.Sequential:
            return nn.Sequential(
                nn.GroupNorm(cfg.norm_groups, channels), nn.SiLU(), *before_conv, TemporalConv(channels)
            )

        self.conv1 = layer()
        self.conv2 = layer(nn.Dropout(cfg.dropout))
        self.conv3 = layer(nn.Dropout(cfg.dropout))
        self.conv4 = layer(nn.Dropout(cfg.dropout))
        zero(self.conv4[-1])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        h = x
        for norm, *middle, conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = norm_clip(norm, h, frames)
            for module in middle:
                h = module(h)
            h = conv(h, frames)
        return x + h


class ResBlock(nn.Module):
    """Two convolutions in each frame with the embedding added between them, a shortcut, then the temporal ones."""

    def __init__(self, cfg: UNetConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(cfg.norm_groups, in_channels),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(4 * cfg.model_channels, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(cfg.norm_groups, out_channels),
            nn.SiLU(),
            nn.Dropout(cfg.dropout),
            zero(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)
        self.temopral_conv = TemporalConvs(cfg, out_channels)

    def forward(self, x: Tensor, emb: Tensor, frames: int) -> Tensor:
        """x [(b t), c, h, w], emb [b, e]."""
        h = self.in_layers(x) + self.emb_layers(emb).repeat_interleave(frames, 0)[:, :, None, None]
        return self.temopral_conv(self.skip_connection(x) + self.out_layers(h), frames)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Block(nn.Sequential):
    """One entry of the U-Net: passes each layer the inputs of its kind."""

    def forward(self, x: Tensor, emb: Tensor, context: Context, frames: int) -> Tensor:  # type: ignore[override]
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb[: x.shape[0] // frames], frames)
            elif isinstance(layer, SpatialTransformer):
                keys_values = context[layer.layer - 1]
                x = layer(x, keys_values, keys_values[0].text_k.shape[0] * frames // x.shape[0])
            elif isinstance(layer, TemporalTransformer):
                x = layer(x, frames)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """Noise or velocity of a noisy clip under a context; see `forward`."""

    def __init__(self, cfg: UNetConfig) -> None:
        super().__init__()
        self.cfg = cfg
        base, width = cfg.model_channels, 4 * cfg.model_channels
        layers = 0

        def block(resample: int, in_channels: int, channels: int, last: nn.Module | None = None) -> Block:
            """A residual block, transformers where this downsampling factor has them, a change of size."""
            nonlocal layers
            parts: list[nn.Module] = [ResBlock(cfg, in_channels, channels)]
            if resample in cfg.attention_resolutions:
                layers += 1
                parts.append(SpatialTransformer(cfg, channels, layers))
                parts.append(TemporalTransformer(cfg, channels, channels // cfg.head_channels))
            return Block(*parts, *([last] if last else []))

        self.time_embed = nn.Sequential(nn.Linear(base, width), nn.SiLU(), nn.Linear(width, width))
        self.fps_embedding = nn.Sequential(nn.Linear(base, width), nn.SiLU(), zero(nn.Linear(width, width)))

        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(cfg.in_channels, base, 3, padding=1))])
        self.init_attn = Block(TemporalTransformer(cfg, base, cfg.init_heads, conv_projection=True))
        channels, factor, skips = base, 1, [base]
        for level, mult in enumerate(cfg.channel_mult):
            for _ in range(cfg.num_res_blocks):
                self.input_blocks.append(block(factor, channels, base * mult))
                channels = base * mult
                skips.append(channels)
            if level + 1 < len(cfg.channel_mult):
                self.input_blocks.append(Block(Downsample(channels)))
                skips.append(channels)
                factor *= 2

        layers += 1
        self.middle_block = Block(
            ResBlock(cfg, channels, channels),
            SpatialTransformer(cfg, channels, layers),
            TemporalTransformer(cfg, channels, channels // cfg.head_channels),
            ResBlock(cfg, channels, channels),
        )

        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(cfg.channel_mult))):
            for index in range(cfg.num_res_blocks + 1):
                up = Upsample(base * mult) if level > 0 and index == cfg.num_res_blocks else None
                self.output_blocks.append(block(factor, channels + skips.pop(), base * mult, up))
                channels = base * mult
            factor //= 2
        self.out = nn.Sequential(
            nn.GroupNorm(cfg.norm_groups, channels),
            nn.SiLU(),
            zero(nn.Conv2d(channels, cfg.out_channels, 3, padding=1)),
        )

    def cross_attentions(self) -> list[DualCrossAttention]:
        """The dual cross-attentions, by layer number."""
        return [module for module in self.modules() if isinstance(module, DualCrossAttention)]

    def project_context(self, context: Tensor, frames: int) -> list[list[KeysValues]]:
        """Every layer's keys and values of a context [b, l, d]: the same at all steps of a sample."""
        layers = [module for module in self.modules() if isinstance(module, SpatialTransformer)]
        return [layer.project(context, frames) for layer in layers]

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | Context, fs: Tensor | None = None) -> Tensor:
        """Predict from a noisy clip.

        x [b, 8, t, h, w]: noisy latents and image latents; timesteps [b]; context [(n b), l, d], or what
        `project_context` made of it; fs [b] (`default_fs` when None). Returns [(n b), 4, t, h, w], for n branches of
        guidance. They share everything before the first cross-attention.
        """
        frames = x.shape[2]
        if isinstance(context, Tensor):
            context = self.project_context(context, frames)
        branches = context[0][0].text_k.shape[0] // x.shape[0]
        if fs is None:
            fs = torch.full_like(timesteps, self.cfg.default_fs)
        emb = self.time_embed(sinusoid(timesteps, self.cfg.model_channels).to(x.dtype))
        emb = emb + self.fps_embedding(sinusoid(fs, self.cfg.model_channels).to(x.dtype))
        emb = repeat_batch(emb, branches)

        h = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (b t) c h w
        skips = []
        for index, block in enumerate(self.input_blocks):
            h = block(h, emb, context, frames)
            if index == 0:
                h = self.init_attn(h, emb, context, frames)
            skips.append(h)
        h = self.middle_block(h, emb, context, frames)
        for block in self.output_blocks:
            skip = skips.pop()
            h = torch.cat([h, repeat_batch(skip, h.shape[0] // skip.shape[0])], dim=1)
            h = block(h, emb, context, frames)
        return self.out(h).unflatten(0, (-1, frames)).transpose(1, 2)
