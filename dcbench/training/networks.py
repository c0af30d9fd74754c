"""What training needs of the networks, and sampling does not: parts by name, their weights, CLIP's pooled features."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcbench import clips
from dcbench.models.dynamicrafter.conditioning import encode_text, preprocess, tokenize
from dcbench.models.dynamicrafter.config import Config
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.training.data import Batch
from dcbench.weights import save_tensors

PREFIXES = {  # part -> its place in the released checkpoints
    "unet": "model.diffusion_model.",
    "query_transformer": "image_proj_model.",
    "autoencoder": "first_stage_model.",
    "text": "cond_stage_model.model.",
    "image": "embedder.model.",
}
NARROW = -20.0  # log-variance of a posterior so narrow that its samples equal its mean to four digits
WORD_STD = 0.4  # standard deviation of new word embeddings in a small text tower; open_clip has 0.02


def build(config: Config, seed: int) -> Networks:
    """New networks, frozen; the same initial values for the same seed.

    A small vocabulary gets larger word embeddings than open_clip's. With open_clip's, a small tower makes nearly the
    same tokens of two captions that differ by one word, and the U-Net cannot tell them apart.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        networks = Networks(config)
        if config.clip.token_ids:
            text: Any = networks.cond_stage_model.model
            nn.init.normal_(text.token_embedding.weight, std=WORD_STD)
        return freeze(networks)


def freeze(networks: Networks) -> Networks:
    return networks.eval().requires_grad_(False)


@torch.no_grad()
def normalise_latents(networks: Networks, latents: Tensor) -> None:
    """Give each channel mean 0 and variance 1 over samples of the posterior [n, c, h, w]; rebuilt frames do not change.

    The variance of the posterior becomes nearly 0, because the U-Net learns from the mean: so a sample equals the mean.
    Shift and scale are put into the 1x1 convolutions before and after the latents, and the scale factor is 1. With one
    factor for all channels, as in Stable Diffusion, some channels of a tiny autoencoder have a fifth of the noise.
    """
    autoencoder = networks.autoencoder
    into, out = autoencoder.quant_conv, autoencoder.post_quant_conv
    assert into.bias is not None and out.bias is not None
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3)).clamp(min=1e-6)
    channels = len(mean)
    out.bias += (out.weight[:, :, 0, 0] * mean).sum(1)
    out.weight *= std[:, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.weight[:channels] /= std[:, None, None, None]
    into.weight[channels:], into.bias[channels:] = 0, NARROW
    set_scale_factor(networks, 1.0)


def set_scale_factor(networks: Networks, scale_factor: float) -> None:
    """Set the number by which latents are multiplied."""
    autoencoder = replace(networks.cfg.autoencoder, scale_factor=scale_factor)
    networks.cfg = replace(networks.cfg, autoencoder=autoencoder)
    networks.autoencoder.cfg = autoencoder


def save(networks: Networks, path: Path, dtype: torch.dtype | None = None, parts: Iterable[str] = PREFIXES) -> None:
    """Write one safetensors file of these parts, under the released names."""
    prefixes = tuple(PREFIXES[part] for part in parts)
    state = {name: value for name, value in networks.state_dict().items() if name.startswith(prefixes)}
    save_tensors({name: value.detach().to("cpu", dtype or value.dtype) for name, value in state.items()}, path)


@torch.no_grad()
def scaled_latents(networks: Networks, batch: Batch, device: torch.device) -> Tensor:
    """Means of the posterior [b, c, t, h, w], scaled; encoded here if the batch has none."""
    if batch.latents is None:
        frames = clips.to_float(batch.frames).to(device)
        return torch.stack([networks.autoencoder.to_latents(clip) for clip in frames]).transpose(1, 2)
    return batch.latents.to(device).transpose(1, 2) * networks.cfg.autoencoder.scale_factor


@torch.no_grad()
def with_latents(networks: Networks, batch: Batch) -> Batch:
    """The batch with its latents, for a network that is asked about the same clips many times."""
    frames = clips.to_float(batch.frames).to(next(networks.autoencoder.parameters()).device)
    return replace(batch, latents=torch.stack([networks.autoencoder.encode(clip).mean for clip in frames]))


@torch.no_grad()
def text_tokens(networks: Networks, captions: Sequence[str], device: torch.device) -> Tensor:
    """Context tokens of b captions: [b, context_length, d]."""
    return networks.cond_stage_model(tokenize(captions, networks.cfg.clip).to(device))


@torch.no_grad()
def visual_tokens(networks: Networks, frames: Tensor, grey: Tensor) -> Tensor:
    """uint8 [b, 3, h, w] -> [b, 1 + patches, d]. `grey`: bool [b], where the image becomes grey (0 in [-1, 1])."""
    return networks.embedder(clips.to_float(frames) * (~grey)[:, None, None, None])


class PooledClip(nn.Module):
    """The pooled features of both towers of CLIP, which its training compares. The towers are those of `networks`."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.cfg = networks.cfg.clip
        self.text: Any = networks.cond_stage_model.model
        self.image = networks.embedder.model["visual"]

    def forward(self, frames: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 [b, 3, h, w], b captions -> image features [b, d], text features [b, d], scale of their products."""
        images = self.image(preprocess(clips.to_float(frames), self.cfg.image_size))
        tokens = tokenize(captions, self.cfg).to(frames.device)
        every = encode_text(self.text, tokens, skip=0)
        last = every[torch.arange(len(every)), tokens.argmax(-1)]  # of the end mark, whose number is the highest
        return images, last @ self.text.text_projection, self.text.logit_scale.exp().clamp(max=100)
