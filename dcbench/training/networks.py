"""What training needs of a model's networks beside sampling: parts by name, their weights, CLIP's pooled features."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dcbench import clips
from dcbench.models.dynamicrafter.conditioning import preprocess, tokenize
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


def build(config: Config, seed: int) -> Networks:
    """New networks, frozen; the same initial values for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return freeze(Networks(config))


def freeze(networks: Networks) -> Networks:
    return networks.eval().requires_grad_(False)


def set_scale_factor(networks: Networks, scale_factor: float) -> None:
    """The number that latents are multiplied by; measured after the autoencoder's training."""
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
        text, length = self.text, tokens.shape[1]
        x = text.token_embedding(tokens) + text.positional_embedding[:length]
        mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
        for block in text.transformer.resblocks:
            x = block(x, attn_mask=mask)
        last = text.ln_final(x)[torch.arange(len(x)), tokens.argmax(-1)]  # the end mark has the highest number
        return images, last @ text.text_projection, text.logit_scale.exp().clamp(max=100)
