from collections.abc import Callable

import pytest
import torch

from dcbench.catalogue import ModelCard
from dcbench.models.base import Request
from dcbench.models.dynamicrafter.config import (
    AutoencoderConfig,
    ClipConfig,
    Config,
    DiffusionConfig,
    QueryTransformerConfig,
    UNetConfig,
)
from dcbench.models.dynamicrafter.networks import Networks


@pytest.fixture
def cfg() -> Config:
    """Every kind of layer at a size that samples in a second: 4 frames of 16x16, 8x8 latents of 3 channels."""
    unet = UNetConfig(
        in_channels=6,
        out_channels=3,
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2, 1),
        head_channels=8,
        init_heads=2,
        context_dim=24,
        learnable_image_scale=True,
        norm_groups=4,
        dropout=0.0,
    )
    autoencoder = AutoencoderConfig(
        channels=8, channel_mult=(1, 2), num_res_blocks=1, z_channels=5, latent_channels=3, norm_groups=4
    )
    queries = QueryTransformerConfig(in_dim=16, dim=24, out_dim=24, depth=1, heads=2, head_dim=8, num_frames=4)
    clip = ClipConfig(
        embed_dim=8,
        image_size=16,
        patch_size=8,
        vision_width=16,
        vision_layers=2,
        vision_head_width=8,
        text_width=24,
        text_heads=2,
        text_layers=2,
    )
    diffusion, meaning = DiffusionConfig(), "frame_stride"
    return Config(unet, autoencoder, queries, clip, diffusion, height=16, width=16, fs_meaning=meaning, fs=3)


@pytest.fixture
def networks(cfg: Config) -> Networks:
    return Networks.random(cfg)


@pytest.fixture
def card() -> ModelCard:
    return ModelCard(name="small", title="Small", summary="", conditions_on=("image", "prompt", "frame_stride"))


@pytest.fixture
def request_of() -> Callable[..., Request]:
    """A request by number: another picture, prompt and seed for each."""

    def make(number: int = 0, **changes) -> Request:
        image = torch.randint(0, 256, (3, 20, 31), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        values = {
            "image": image,
            "prompt": f"boat {number}",
            "num_frames": 4,
            "fps": 8.0,
            "frame_stride": 3,
            "seed": 100 + number,
        }
        return Request(clip_id=f"clip{number}", **(values | changes))

    return make
