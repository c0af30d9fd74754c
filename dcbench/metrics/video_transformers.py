"""Other feature spaces for set metrics: VideoMAE-v2 (CD-FVD) and V-JEPA (JEDi), transformers over space-time tokens.

CD-FVD (Ge et al., arXiv 2404.12391): Fréchet distance of features of VideoMAE-v2 ViT-g/14, fine-tuned on Something-
Something v2. Features: fc_norm(mean of the tokens), 1408-d. Pixels: [0, 1], without ImageNet's mean and std.
JEDi (Luo et al., arXiv 2410.05203): 100 x biased MMD with kernel (x·y / d)² of features of V-JEPA ViT-H/16. Features:
tokens after the attentive pooler of its Something-Something v2 probe, 1280-d. Pixels: ImageNet's mean and std.
Both use 16 frames, resized ("squash") to 224x224 by half-pixel bilinear interpolation without antialias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcbench.catalogue import MetricCard
from dcbench.clips import check_clip
from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.base import FeatureExtractor, SetDistance, score_statistic
from dcbench.metrics.design import Groups
from dcbench.metrics.distances import score_frechet
from dcbench.metrics.extractors import to_square
from dcbench.record import Score
from dcbench.weights import fetch, fill, read_file, tensors_sha256


@dataclass(frozen=True)
class Shape:
    """Sizes of a video transformer."""

    width: int
    depth: int
    heads: int
    hidden: int
    patch: int
    frames: int = 16
    size: int = 224
    split_bias: bool = False  # separate biases of queries and values, none of keys (VideoMAE)

    @property
    def tokens(self) -> int:
        return (self.frames // 2) * (self.size // self.patch) ** 2


VIDEOMAE_G = Shape(width=1408, depth=40, heads=16, hidden=6144, patch=14, split_bias=True)
VJEPA_H = Shape(width=1280, depth=32, heads=16, hidden=5120, patch=16)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=not shape.split_bias)
        if shape.split_bias:
            self.q_bias = nn.Parameter(torch.zeros(shape.width))
            self.v_bias = nn.Parameter(torch.zeros(shape.width))
        self.proj = nn.Linear(shape.width, shape.width)
        self.split_bias = shape.split_bias

    def forward(self, x: Tensor) -> Tensor:
        bias = self.qkv.bias
        if self.split_bias:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1))  # b n 3 h d
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.width, eps=1e-6), nn.LayerNorm(shape.width, eps=1e-6)
        self.attn, self.mlp = Attention(shape), Mlp(shape.width, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        kernel = (2, shape.patch, shape.patch)
        self.proj = nn.Conv3d(3, shape.width, kernel, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # b n c


class VideoMAE(nn.Module):
    """float [b 3 16 224 224] in [0, 1] -> [b width]"""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(shape)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.fc_norm = nn.LayerNorm(shape.width, eps=1e-6)
        # Positions are computed, not stored: sines and cosines interleaved, over the tokens as one sequence
        position = torch.arange(shape.tokens, dtype=torch.float64)[:, None]
        angle = position / 10000 ** (2 * (torch.arange(shape.width) // 2) / shape.width)
        table = torch.where(torch.arange(shape.width) % 2 == 0, angle.sin(), angle.cos())
        self.register_buffer("positions", table.float()[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + cast(Tensor, self.positions)
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x.mean(1))


class CrossAttention(nn.Module):
    """`proj` is in the released weights, but the released network does not apply it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q, self.kv = nn.Linear(shape.width, shape.width), nn.Linear(shape.width, 2 * shape.width)
        self.proj = nn.Linear(shape.width, shape.width)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        q = self.q(query).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class CrossAttentionBlock(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.xattn, self.mlp = CrossAttention(shape), Mlp(shape.width, 4 * shape.width)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:
        query = query + self.xattn(query, self.norm1(x))
        return query + self.mlp(self.norm2(query))


class Pooler(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.cross_attention_block = CrossAttentionBlock(shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.cross_attention_block(self.query_tokens.expand(len(x), -1, -1), x)[:, 0]


class VJEPA(nn.Module):
    """float [b 3 16 224 224], ImageNet-normalised -> [b width]"""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(shape)
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.tokens, shape.width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width, eps=1e-6)
        self.pooler = Pooler(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.pooler(self.norm(x))


# Weights ---------------------------------------------------------------------------------------------------------


def load_section(path: Path, sections: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a PyTorch file under the first of `sections` that it has. No code in the file is executed."""
    loaded = read_file(path)
    for name in sections:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
            break
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} holds none of {', '.join(sections)}: it is not the needed checkpoint")
    cut = ("module.", "backbone.")
    state: dict[str, Tensor] = {}
    for name, value in loaded.items():
        for prefix in cut:
            name = name.removeprefix(prefix)
        state[name] = value.float()
    return state


class VideoTransformerExtractor(FeatureExtractor):
    """One of the two networks with its pixel normalisation."""

    min_frames = 16

    def __init__(self, name: str, network: nn.Module, shape: Shape, normalise: bool, device: str = "cpu") -> None:
        super().__init__()
        self.name, self.num_features, self.shape = name, shape.width, shape
        self.network = network.to(device).eval().requires_grad_(False)
        self.weights_sha256 = tensors_sha256(network.state_dict())
        self.preprocessing = f"squash to {shape.size}, " + ("ImageNet mean and std" if normalise else "[0, 1]")
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if normalise else ((0.0,) * 3, (1.0,) * 3)
        self.mean, self.std = (torch.tensor(part).view(3, 1, 1, 1) for part in (mean, std))
        self.batch_size = 1 if device == "cpu" else 4

    @torch.inference_mode()
    def forward(self, clips: Tensor) -> Tensor:
        check_clip(clips.flatten(0, 1), "clips")
        b, t = clips.shape[:2]
        if t != self.shape.frames:
            raise UserError(f"{self.name} reads clips of {self.shape.frames} frames, got {t}; use another protocol")
        device = next(self.network.parameters()).device
        frames = to_square(clips.to(device).flatten(0, 1).float() / 255, "squash", self.shape.size)
        x = frames.unflatten(0, (b, t)).transpose(1, 2)
        return self.network((x - self.mean.to(device)) / self.std.to(device)).float()


def load_videomae(path: Path, device: str = "cpu", shape: Shape = VIDEOMAE_G) -> VideoTransformerExtractor:
    """From vit_g_hybrid_pt_1200e_ssv2_ft.pth."""
    network = VideoMAE(shape)
    fill(network, load_section(path, ("model", "module")), path, ignored=("head.",))
    return VideoTransformerExtractor("videomae-v2-g-ssv2", network, shape, normalise=False, device=device)


def load_vjepa(encoder: Path, probe: Path, device: str = "cpu", shape: Shape = VJEPA_H) -> VideoTransformerExtractor:
    """From vith16.pth.tar and ssv2-probe.pth.tar."""
    network = VJEPA(shape)
    state = load_section(encoder, ("target_encoder", "encoder"))
    state |= {name: value for name, value in load_section(probe, ("classifier",)).items() if name.startswith("pooler.")}
    fill(network, state, encoder)
    return VideoTransformerExtractor("v-jepa-h-ssv2", network, shape, normalise=True, device=device)


@cache
def _shared_videomae(path: Path, device: str) -> VideoTransformerExtractor:
    return load_videomae(path, device)


@cache
def _shared_vjepa(encoder: Path, probe: Path, device: str) -> VideoTransformerExtractor:
    return load_vjepa(encoder, probe, device)


def build_cd_fvd(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `cd_fvd` card."""
    path = fetch(card.weights[0], runtime.offline)
    return SetDistance(card, _shared_videomae(path, runtime.device), score_frechet, fn.frechet_distance, biased=True)


def build_jedi(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `jedi` card."""
    encoder, probe = (fetch(source, runtime.offline) for source in card.weights[:2])
    return SetDistance(card, _shared_vjepa(encoder, probe, runtime.device), score_jedi, jedi_distance, biased=True)


JEDI_KERNEL = fn.PolynomialKernel(degree=2, gamma=None, coef0=0.0)


def jedi_distance(real: Tensor, generated: Tensor) -> float:
    """100 x biased MMD². It is at least 0 and falls with N."""
    return 100 * fn.kernel_distance(real, generated, JEDI_KERNEL, unbiased=False)


def score_jedi(real: Tensor, generated: Tensor, groups: Groups = None) -> Score:
    """JEDi with its delete-a-block jackknife interval."""
    score = score_statistic(lambda a, b, design: jedi_distance(a, b), real, generated, groups, lowest=0.0, biased=True)
    score.details |= {"kernel": str(JEDI_KERNEL), "estimator": "biased, full sets, x100"}
    return score
