"""All networks of a DynamiCrafter in one module, under the released checkpoints' names."""

import torch
from torch import Tensor, nn

from dcbench.errors import UserError
from dcbench.models.dynamicrafter.attention import DualCrossAttention
from dcbench.models.dynamicrafter.autoencoder import Autoencoder
from dcbench.models.dynamicrafter.conditioning import ImageEncoder, TextEncoder, build_clip
from dcbench.models.dynamicrafter.config import Config
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
        """Networks with random weights that depend on the seed alone, none of them zero: for trying things."""
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
    def image_scale(self) -> "ImageScale":
        return ImageScale(self.unet)


class ImageScale:
    """λ of the U-Net's layers by number, 1-16 as in the paper's Fig. 2 (at a smaller configuration: 1-n).

    `scale[7]` reads it, `scale[7] = 0.5` fixes it, `del scale[7]` gives the learned value back.
    """

    def __init__(self, unet: UNet) -> None:
        self._layers: list[DualCrossAttention] = unet.cross_attentions()

    def _layer(self, number: int) -> DualCrossAttention:
        if not 1 <= number <= len(self._layers):
            raise UserError(f"layer {number}: this network has layers 1 to {len(self._layers)}")
        return self._layers[number - 1]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, number: int) -> float:
        gate = self._layer(number).gate
        return float(gate.detach()) if isinstance(gate, Tensor) else gate

    def __setitem__(self, number: int, value: float) -> None:
        self._layer(number).image_scale = float(value)

    def __delitem__(self, number: int) -> None:
        self._layer(number).image_scale = None

    def values(self) -> list[float]:
        """λ of layers 1, 2, ..."""
        return [self[number] for number in range(1, len(self) + 1)]

    def reset(self) -> None:
        """Every layer as it was learned."""
        for layer in self._layers:
            layer.image_scale = None
