"""A recipe so small that a step takes milliseconds; the same classes as every other one."""

import pytest

from dcbench.training.recipe import Recipe

MODEL = {
    "height": 16,
    "width": 16,
    "unet": {
        "model_channels": 8,
        "channel_mult": (1, 2),
        "head_channels": 8,
        "init_heads": 1,
        "context_dim": 16,
        "text_tokens": 24,
        "image_tokens": 2,
        "norm_groups": 4,
        "dropout": 0.1,
    },
    "autoencoder": {"channels": 8, "channel_mult": (1, 1), "norm_groups": 4},
    "clip": {
        "embed_dim": 16,
        "image_size": 16,
        "patch_size": 8,
        "vision_width": 16,
        "vision_layers": 1,
        "vision_head_width": 8,
        "context_length": 24,
        "text_width": 16,
        "text_heads": 2,
        "text_layers": 2,
    },
    "query_transformer": {
        "in_dim": 16,
        "dim": 16,
        "out_dim": 16,
        "depth": 1,
        "heads": 2,
        "head_dim": 8,
        "num_queries": 2,
        "num_frames": 4,
    },
}
STAGE = {"steps": 4, "batch_size": 4, "lr": 1e-3, "log_every": 1, "save_every": 2}


@pytest.fixture
def make_recipe():
    def make(*stages: dict, **fields) -> Recipe:
        data = {
            "dataset": "shapes",
            "options": {"size": 16, "train_videos": 40},
            "clips": 12,
            "strides": (2, 3),
            "cache": True,
        }
        values = {"name": "micro", "summary": "for tests", "variant": "tiny", "model": MODEL, "data": data}
        return Recipe.model_validate({**values, "stages": [{**STAGE, **stage} for stage in stages], **fields})

    return make
