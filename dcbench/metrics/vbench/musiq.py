"""VBench's imaging_quality: MUSIQ (Ke et al., arXiv 2108.05997) trained on SPAQ, mean over all frames, over 100.

MUSIQ sees a picture at its own size and at long sides of 224 and 384 pixels, each cut into patches of 32x32. A patch
becomes a token by a small ResNet; its place is one of 10x10, its size one of three. A transformer rates the picture.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import functional as transforms

from dcbench.catalogue import MetricCard
from dcbench.metrics.base import ClipMetric, View
from dcbench.weights import fetch, fill, load_tensors, tensors_sha256

PATCH = 32
SIDES = (224, 384)  # long sides of the smaller copies
GRID = 10  # places of patches, in each direction
WIDTH, HIDDEN, HEADS, LAYERS = 384, 1152, 6, 14
CHANNELS = 64  # of the ResNet's first layer
LONGEST = 512  # of a frame's sides; larger frames are made smaller


def padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's "same" padding: as many zeros as the last window needs, one more after than before."""
    along = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
    (down, right) = along
    return F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))


class StandardConv(nn.Conv2d):
    """A convolution without bias whose filters have mean 0 and deviation 1."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        centred = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = centred / (centred.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(padded(x, self.kernel_size[0], self.stride[0]), weight, stride=self.stride)


class Bottleneck(nn.Module):
    """Three convolutions beside a projection, of [b 64 ...] to [b 256 ...]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = StandardConv(inputs, inputs, 1), StandardConv(inputs, inputs, 3)
        self.conv3, self.conv_proj = StandardConv(inputs, outputs, 1), StandardConv(inputs, outputs, 1)
        self.gn1, self.gn2 = nn.GroupNorm(32, inputs, eps=1e-4), nn.GroupNorm(32, inputs, eps=1e-4)
        self.gn3, self.gn_proj = nn.GroupNorm(32, outputs, eps=1e-4), nn.GroupNorm(32, outputs, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )  # b h n d
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """float [1 n 384], place and size of each token [n] -> the rating's token [1 384]"""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.posembed_input = nn.ParameterDict({"position_emb": torch.zeros(1, GRID * GRID, WIDTH)})
        self.scaleembed_input = nn.ParameterDict({"scale_emb": torch.zeros(len(SIDES) + 1, WIDTH)})
        self.transformer = nn.ModuleDict({f"encoderblock_{layer}": Block() for layer in range(LAYERS)})
        self.encoder_norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor, places: Tensor, sizes: Tensor) -> Tensor:
        x = x + self.posembed_input["position_emb"][0, places] + self.scaleembed_input["scale_emb"][sizes]
        x = torch.cat([self.cls, x], 1)
        for block in self.transformer.values():
            x = block(x)
        return self.encoder_norm(x)[:, 0]


class Musiq(nn.Module):
    """float [3 h w] in [0, 1] -> float [], the rating. The names are those of musiq_spaq_ckpt-358bb6af.pth."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_root = StandardConv(3, CHANNELS, 7, 2)
        self.gn_root = nn.GroupNorm(32, CHANNELS, eps=1e-6)
        self.block1 = Bottleneck(CHANNELS, 4 * CHANNELS)
        self.embedding = nn.Linear(4 * CHANNELS * (PATCH // 4) ** 2, WIDTH)
        self.transformer_encoder = Encoder()
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, picture: Tensor) -> Tensor:
        patches, places, sizes = tokens(picture[None] * 2 - 1)
        x = F.relu(self.gn_root(self.conv_root(patches)))
        x = F.max_pool2d(padded(x, 3, 2), 3, 2)
        x = self.block1(x).permute(0, 2, 3, 1).flatten(1)  # channels last, as in TensorFlow
        return self.head(self.transformer_encoder(self.embedding(x)[None], places, sizes))[0, 0]


def tokens(picture: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float [1 3 h w] -> patches [n 3 32 32] of all sizes; their places, 0..99, and sizes, 0..2, int64 [n]."""
    height, width = picture.shape[-2:]
    scales = [side / max(height, width) for side in SIDES]
    shapes = [(round(height * scale), round(width * scale)) for scale in scales]
    copies = [F.interpolate(picture, shape, mode="bicubic", align_corners=False) for shape in shapes]
    patches, places, sizes = [], [], []
    for size, copy in enumerate([*copies, picture]):
        found = F.unfold(padded(copy, PATCH, PATCH), PATCH, stride=PATCH)[0].T.unflatten(1, (3, PATCH, PATCH))
        rows, columns = (_places(math.ceil(side / PATCH), picture.device) for side in copy.shape[-2:])
        patches.append(found)
        places.append((rows[:, None] * GRID + columns).flatten())
        sizes.append(torch.full((len(found),), size, device=picture.device))
    return torch.cat(patches), torch.cat(places), torch.cat(sizes)


def _places(number: int, device: torch.device) -> Tensor:
    """For each of so many patches in a direction, its place in the grid: int64 [number]."""
    grid = torch.arange(GRID, dtype=torch.float32)[None, None]
    return F.interpolate(grid, number, mode="nearest")[0, 0].long().to(device)


class Rater:
    """MUSIQ of frames, whose long side is at most 512."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        state = load_tensors(path)
        network = Musiq()
        fill(network, state, path, problem="is not MUSIQ trained on SPAQ: {} tensors differ")
        self.network, self.device = network.to(device).eval().requires_grad_(False), device
        self.weights_sha256 = tensors_sha256(state)

    @property
    def identity(self) -> dict[str, str]:
        how = f"RGB at the clip's own size, or bilinear without antialias to a long side of {LONGEST}; then MUSIQ's"
        return {
            "name": "MUSIQ SPAQ",
            "weights_sha256": self.weights_sha256,
            "preprocessing": f"{how} copies with long sides of {' and '.join(map(str, SIDES))}",
        }

    @torch.inference_mode()
    def __call__(self, frames: Sequence[Tensor]) -> list[float]:
        """uint8 [3 h w] each -> the ratings, 0 to 100 on SPAQ's scale. Each frame goes through alone."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return [float(self.network(prepared(frame).to(self.device))) for frame in frames]


def prepared(frame: Tensor) -> Tensor:
    """uint8 [3 h w] -> float32 [3 h' w'] in [0, 1], a long side of at most 512. Sizes are cut, not rounded."""
    height, width = frame.shape[-2:]
    pixels = frame.float()
    if max(height, width) > LONGEST:
        scale = float(LONGEST) / max(height, width)
        pixels = transforms.resize(pixels, [int(scale * height), int(scale * width)], antialias=False)
    return pixels / 255


class ImagingQuality(ClipMetric):
    """Mean over frames of the rating / 100."""

    extractor: Rater
    in_workers = True

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value", "per_frame"}"""
        per_frame = [found / 100 for found in self.extractor(list(self.check(view.clip)))]
        return {"value": math.fsum(per_frame) / len(per_frame), "per_frame": per_frame}


@cache
def _shared(path: Path, device: str) -> Rater:
    return Rater(path, device)


def build(card: MetricCard, runtime: Any) -> ImagingQuality:
    """Entry point of `imaging_quality`."""
    return ImagingQuality(card, _shared(fetch(card.weights[0], runtime.offline), runtime.device))
