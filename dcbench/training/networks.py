"""What training needs of a model's networks beside sampling: parts by name, their weights, CLIP's pooled features."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dcbench import clips
from dcbench.models.dynamicrafter.conditioning import encode_text, preprocess, tokenize
from dcbench.models.dynamicrafter.config import Config
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.training.data import Batch
from dcbench.weights import atomic_write

PREFIXES = {  # part -> its place in the released checkpoints
    "unet": "model.diffusion_model.",
    "query_transformer": "image_proj_model.",
    "autoencoder": "first_stage_model.",
    "text": "cond_stage_model.model.",
    "image": "embedder.model.",
}
NARROW = -20.0  # log-variance of a posterior that is a point to four digits
WORD_STD = 0.4  # of the word embeddings of a small text tower; open_clip begins with 0.02


def build(config: Config, seed: int) -> Networks:
    """New networks, frozen; the same initial values for the same seed.

    The words of a small vocabulary begin further apart than open_clip's, whose layers drown them at this size: two
    captions that differ by one word must differ for the U-Net, though no picture told CLIP the two apart.
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
    """Give each channel mean 0 and variance 1 over samples of the posterior [n, c, h, w]; frames stay as they are.

    The posterior becomes as narrow as a point: the U-Net learns from its mean, and shall be given that when it samples.
    The shift and scale go into the 1x1 convolutions on both sides of the latents, so that the scale factor is 1. One
    factor for all channels, as Stable Diffusion has it, left channels of a tiny autoencoder at a fifth of the noise.
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
    """The number that latents are multiplied by."""
    autoencoder = replace(networks.cfg.autoencoder, scale_factor=scale_factor)
    networks.cfg = replace(networks.cfg, autoencoder=autoencoder)
    networks.autoencoder.cfg = autoencoder


def save(networks: Networks, path: Path, dtype: torch.dtype | None = None, parts: Iterable[str] = PREFIXES) -> None:
    """One safetensors file of these parts under the released names."""
    prefixes = tuple(PREFIXES[part] for part in parts)
    state = {name: value for name, value in networks.state_dict().items() if name.startswith(prefixes)}
    state = {name: value.detach().to("cpu", dtype or value.dtype).contiguous() for name, value in state.items()}
    with atomic_write(path) as temporary:
        save_file(state, temporary)


@torch.no_grad()
def scaled_latents(networks: Networks, batch: Batch, device: torch.device) -> Tensor:
    """[b, c, t, h, w]: means of the posterior, encoded here unless the batch brings them."""
    if batch.latents is None:
        frames = clips.to_float(batch.frames).to(device)
        return torch.stack([networks.autoencoder.to_latents(clip) for clip in frames]).transpose(1, 2)
    return batch.latents.to(device).transpose(1, 2) * networks.cfg.autoencoder.scale_factor


@torch.no_grad()
def text_tokens(networks: Networks, captions: Sequence[str], device: torch.device) -> Tensor:
    """Context tokens of captions [b, 77, d]."""
    return networks.cond_stage_model(tokenize(captions, networks.cfg.clip).to(device))


@torch.no_grad()
def visual_tokens(networks: Networks, frames: Tensor, grey: Tensor) -> Tensor:
    """uint8 [b, 3, h, w] -> [b, 1 + patches, d]; where `grey` [b], the image is dropped: mid grey, 0 in [-1, 1]."""
    return networks.embedder(clips.to_float(frames) * (~grey)[:, None, None, None])


class PooledClip(nn.Module):
    """CLIP's two pooled features, which its own training compares, over the towers that `networks` keeps."""

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
        last = every[torch.arange(len(every)), tokens.argmax(-1)]  # the end mark has the highest number
        return images, last @ self.text.text_projection, self.text.logit_scale.exp().clamp(max=100)
