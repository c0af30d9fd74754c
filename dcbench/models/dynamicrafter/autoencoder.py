"""The KL autoencoder of the latents (Stable Diffusion's layout), frame by frame; also trainable at a tiny size."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcbench.models.dynamicrafter.attention import from_tokens, to_tokens
from dcbench.models.dynamicrafter.config import AutoencoderConfig


@dataclass(frozen=True)
class Posterior:
    """A diagonal Gaussian over latents; mean and logvar [n, c, h, w]."""

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; the noise is the caller's."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Divergence from the standard normal, in nats, of each element of the batch: [n]."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


class ResnetBlock(nn.Module):
    def __init__(self, cfg: AutoencoderConfig, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(cfg.norm_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(cfg.norm_groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(cfg.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class FrameAttention(nn.Module):
    """One head over all positions of a frame."""

    def __init__(self, cfg: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (to_tokens(project(h)) for project in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        return x + self.proj_out(from_tokens(h, x.shape[2]))


class Middle(nn.Module):
    def __init__(self, cfg: AutoencoderConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(cfg, channels, channels)
        self.attn_1 = FrameAttention(cfg, channels)
        self.block_2 = ResnetBlock(cfg, channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one size, then perhaps a change of size."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None, upsample: nn.Module | None) -> None:
        super().__init__()
        self.block = nn.Sequential(*blocks)
        if downsample:
            self.downsample = downsample
        if upsample:
            self.upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        channels, last = cfg.channels, len(cfg.channel_mult) - 1
        self.conv_in = nn.Conv2d(cfg.in_channels * cfg.patch_size**2, channels, 3, padding=1)
        self.down = nn.ModuleList()
        for level, mult in enumerate(cfg.channel_mult):
            width = cfg.channels * mult
            blocks = [ResnetBlock(cfg, channels if i == 0 else width, width) for i in range(cfg.num_res_blocks)]
            self.down.append(Level(list(blocks), Downsample(width) if level < last else None, None))
            channels = width
        self.mid = Middle(cfg, channels)
        self.norm_out = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, 2 * cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        mults = cfg.decoder_channel_mult or cfg.channel_mult
        channels = int(cfg.channels * mults[-1])
        self.conv_in = nn.Conv2d(cfg.z_channels, channels, 3, padding=1)
        self.mid = Middle(cfg, channels)
        levels = []
        for level, mult in reversed(list(enumerate(mults))):
            width = int(cfg.channels * mult)
            blocks = [ResnetBlock(cfg, channels if i == 0 else width, width) for i in range(cfg.num_res_blocks + 1)]
            levels.append(Level(list(blocks), None, Upsample(width) if level > 0 else None))
            channels = width
        self.up = nn.ModuleList(reversed(levels))  # stored from the largest size, run from the smallest
        self.norm_out = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        self.conv_out = nn.Conv2d(channels, cfg.out_channels * cfg.decoder_patch_size**2, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Frames [n, 3, h, w] in [-1, 1] <-> latents [n, c, h / factor, w / factor]."""

    def __init__(self, cfg: AutoencoderConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.latent_channels, cfg.z_channels, 1)

    def encode(self, frames: Tensor) -> Posterior:
        frames = F.pixel_unshuffle(frames, self.cfg.patch_size).contiguous(memory_format=torch.channels_last)
        mean, logvar = self.quant_conv(self.encoder(frames)).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30.0, 20.0))

    def decode(self, z: Tensor) -> Tensor:
        z = z.contiguous(memory_format=torch.channels_last)
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.cfg.decoder_patch_size)

    def to_latents(self, frames: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents: a sample of the posterior with this noise, or its mean without."""
        posterior = self.encode(frames)
        return self.cfg.scale_factor * (posterior.mean if noise is None else posterior.sample(noise))

    def from_latents(self, latents: Tensor, chunk: int = 0) -> Tensor:
        """Scaled latents [n, c, h, w] -> frames, about in [-1, 1]; `chunk` frames at a time (0 = all)."""
        return torch.cat([self.decode(part) for part in (latents / self.cfg.scale_factor).split(chunk or len(latents))])
