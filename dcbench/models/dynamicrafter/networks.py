"""All networks of a DynamiCrafter in one module, under the released checkpoints' names."""

import torch
from torch import nn

from dcbench.models.dynamicrafter.autoencoder import Autoencoder
from dcbench.models.dynamicrafter.conditioning import ImageEncoder, TextEncoder, build_clip
from dcbench.models.dynamicrafter.config import Config
from dcbench.models.dynamicrafter.image_scale import ImageScale
from dcbench.models.dynamicrafter.query_transformer import QueryTransformer
from dcbench.models.dynamicrafter.unet import UNet


class Networks(nn.Module):
    """The U-Net, the autoencoder, the query transformer and CLIP's towers, with new weights."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        clip = build_clip(cfg.clip)
        self.model = nn.ModuleDict({"diffusion_model": UNet(cfg.unet)})
        self.first_stage_model = Autoencoder(cfg.autoencoder)
        self.embedder = ImageEncoder(clip.visual, cfg.clip.image_size)
        self.cond_stage_model = TextEncoder.of(clip)
        self.image_proj_model = QueryTransformer(cfg.query_transformer)

    @classmethod
    def random(cls, cfg: Config, seed: int = 0) -> "Networks":
        """Networks with random weights that depend on the seed alone, none of them zero: for tests and trials."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            networks = cls(cfg)
            for module in networks.modules():
                weight = getattr(module, "weight", None)
                if isinstance(weight, nn.Parameter) and not weight.detach().any():
                    nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        return networks.eval().requires_grad_(False)

    @property
    def unet(self) -> UNet:
        return self.model["diffusion_model"]  # type: ignore[return-value]

    @property
    def autoencoder(self) -> Autoencoder:
        return self.first_stage_model

    @property
    def query_transformer(self) -> QueryTransformer:
        return self.image_proj_model

    @property
    def image_scale(self) -> ImageScale:
        return ImageScale(self.unet)
