"""AMT-S, a network that predicts the frame between two frames (Li et al., arXiv 2304.09790).

Flows from the middle to both frames are found from coarse to fine. At each of three sizes, correlations of all pairs of
places at an eighth of the size correct them. Three flows a pixel, a mask and a residual give the frame. The modules
have the names of amt-s.pth.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (20, 32, 44, 56)  # of the pyramid of a frame, at a half to a sixteenth of its size
SIDE = 20  # channels that a decoder's residual block treats once more
FLOWS = 3
RADIUS, LEVELS = 3, 4  # of the places around a flow's end whose correlations are read
FEATURES = 84
MULTIPLE = 16  # sides of a frame
TIME = 0.5


def scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def scaled_flow(flow: Tensor, factor: float) -> Tensor:
    """A flow at another size, in pixels of that size."""
    return scaled(flow, factor) * factor


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """float [b c h w] at the ends of the flow [b 2 h w], (x, y) in pixels; outside, the border's values."""
    height, width = flow.shape[-2:]
    columns = torch.linspace(-1, 1, width, device=x.device) + flow[:, 0] / ((width - 1) / 2)
    rows = torch.linspace(-1, 1, height, device=x.device)[:, None] + flow[:, 1] / ((height - 1) / 2)
    ends = torch.stack([columns, rows], -1)
    return F.grid_sample(x, ends, mode="bilinear", padding_mode="border", align_corners=True)


def conv_prelu(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


class Bottleneck(nn.Module):
    """Convolutions of 1, 3 and 1 pixels with instance norms, beside the input or a projection of it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1 = nn.Conv2d(inputs, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1)
        self.conv3 = nn.Conv2d(inner, outputs, 1)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride)) if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in (self.conv1, self.conv2, self.conv3):
            y = F.relu(F.instance_norm(layer(y)))
        return F.relu(y + (F.instance_norm(self.downsample(x)) if self.downsample else x))


class FeatureEncoder(nn.Module):
    """float [b 3 h w] -> [b 84 h/8 w/8]"""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, 2, 3)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(Bottleneck(inputs, outputs, stride), Bottleneck(outputs, outputs, 1))
            for inputs, outputs, stride in ((32, 32, 1), (32, 64, 2), (64, 96, 2))
        )
        self.conv2 = nn.Conv2d(96, FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.instance_norm(self.conv1(x)))
        return self.conv2(self.layer3(self.layer2(self.layer1(x))))


class Pyramid(nn.Module):
    """float [b 3 h w] -> features at 1/2, 1/4, 1/8 and 1/16 of the size."""

    def __init__(self) -> None:
        super().__init__()
        for level, (inputs, outputs) in enumerate(itertools.pairwise((3, *CHANNELS)), start=1):
            layers = conv_prelu(inputs, outputs, 2), conv_prelu(outputs, outputs)
            self.add_module(f"pyramid{level}", nn.Sequential(*layers))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.children():
            x = layer(x)
            found.append(x)
        return found


class ResidualBlock(nn.Module):
    """Five convolutions; the second and the fourth are of the last 20 channels alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv3 = conv_prelu(width, width), conv_prelu(width, width)
        self.conv2, self.conv4 = conv_prelu(SIDE, SIDE), conv_prelu(SIDE, SIDE)
        self.conv5, self.prelu = nn.Conv2d(width, width, 3, 1, 1), nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for whole, part in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            y = whole(y)
            y = torch.cat([y[:, :-SIDE], part(y[:, -SIDE:])], 1)
        return self.prelu(x + self.conv5(y))


class Decoder(nn.Module):
    """Twice the size: features of the middle frame, and what is known of it, to `outputs` channels."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.convblock = nn.Sequential(
            conv_prelu(inputs, width), ResidualBlock(width), nn.ConvTranspose2d(width, outputs, 4, 2, 1)
        )

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        return self.convblock(torch.cat(list(parts), 1))


class Update(nn.Module):
    """Corrections of features and flows at `factor` times an eighth of the size, from correlations at an eighth."""

    def __init__(self, features: int, factor: int) -> None:
        super().__init__()
        self.factor, hidden = factor, 76
        self.convc1 = nn.Conv2d(2 * LEVELS * (2 * RADIUS + 1) ** 2, 64, 1)
        self.convf1, self.convf2 = nn.Conv2d(4, 40, 7, padding=3), nn.Conv2d(40, 20, 3, padding=1)
        self.conv = nn.Conv2d(64 + 20, 68, 3, padding=1)
        self.gru, self.feat_head, self.flow_head = (
            nn.Sequential(
                nn.Conv2d(inputs, hidden, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(hidden, outputs, 3, padding=1)
            )
            for inputs, outputs in ((68 + 4 + features, hidden), (hidden, features), (hidden, 4))
        )

    def forward(self, features: Tensor, flow: Tensor, correlations: Tensor) -> tuple[Tensor, Tensor]:
        read = leaky(self.convc1(correlations))
        moved = leaky(self.convf2(leaky(self.convf1(flow))))
        both = leaky(self.conv(torch.cat([read, moved], 1)))
        state = self.gru(torch.cat([both, flow, scaled(features, 1 / self.factor)], 1))
        return scaled(self.feat_head(state), self.factor), scaled_flow(self.flow_head(state), self.factor)


class Correlations:
    """Of each place of one frame with all places of the other, in both directions, at four sizes."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        """float [b d h w] twice"""
        products = torch.einsum("bdij,bdkl->bijkl", first, second) / first.shape[1] ** 0.5
        self.sides = [self._pyramid(side) for side in (products, products.permute(0, 3, 4, 1, 2))]

    @staticmethod
    def _pyramid(products: Tensor) -> list[Tensor]:
        levels = [products.flatten(0, 2)[:, None]]
        for _ in range(LEVELS - 1):
            levels.append(F.avg_pool2d(levels[-1], 2))
        return levels

    def around(self, places: Sequence[Tensor]) -> Tensor:
        """The correlations around places [b 2 h w] of the second and of the first frame: [b 392 h w].

        The window's offsets are (row, column), added to (column, row): the network was trained so.
        """
        batch, _, height, width = places[0].shape
        steps = torch.linspace(-RADIUS, RADIUS, 2 * RADIUS + 1, device=places[0].device)
        window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1)
        found = []
        for levels, middle in zip(self.sides, places, strict=True):
            centre = middle.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2)
            for level, products in enumerate(levels):
                size = torch.tensor(products.shape[:-3:-1], device=centre.device)  # width, height
                ends = 2 * (centre / 2**level + window) / (size - 1) - 1
                read = F.grid_sample(products, ends, align_corners=True)
                found.append(read.view(batch, height, width, -1))
        return torch.cat(found, -1).permute(0, 3, 1, 2).contiguous()


class AMT(nn.Module):
    """Two frames, float [b 3 h w] in [0, 1] with sides that are multiples of 16 -> the frame between them, the same."""

    def __init__(self) -> None:
        super().__init__()
        c1, c2, c3, c4 = CHANNELS
        self.feat_encoder, self.encoder = FeatureEncoder(), Pyramid()
        self.decoder4 = Decoder(2 * c4 + 1, 2 * c4, c3 + 4)
        self.decoder3 = Decoder(3 * c3 + 4, 3 * c3, c2 + 4)
        self.decoder2 = Decoder(3 * c2 + 4, 3 * c2, c1 + 4)
        self.decoder1 = Decoder(3 * c1 + 4, 3 * c1, 8 * FLOWS)
        self.update4, self.update3, self.update2 = Update(c3, 1), Update(c2, 2), Update(c1, 4)
        self.comb_block = nn.Sequential(
            nn.Conv2d(3 * FLOWS, 6 * FLOWS, 3, 1, 1), nn.PReLU(6 * FLOWS), nn.Conv2d(6 * FLOWS, 3, 3, 1, 1)
        )

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        mean = torch.cat([first, second], 2).mean((1, 2, 3), keepdim=True)
        pair = first - mean, second - mean
        correlations = Correlations(*self.feat_encoder(torch.cat(pair)).chunk(2))
        (a1, a2, a3, a4), (b1, b2, b3, b4) = (self.encoder(frame) for frame in pair)
        time = torch.full_like(a4[:, :1], TIME)
        flow, features = self.decoder4([a4, b4, time]).tensor_split([4], 1)
        flow, features = self._corrected(self.update4, correlations, flow, features)
        for decoder, update, a, b in ((self.decoder3, self.update3, a3, b3), (self.decoder2, self.update2, a2, b2)):
            finer, features = decoder(_known(features, a, b, flow)).tensor_split([4], 1)
            flow, features = self._corrected(update, correlations, finer + scaled_flow(flow, 2), features)
        made = self.decoder1(_known(features, a1, b1, flow))
        return self._combined(pair, mean, scaled_flow(flow, 2), made).clamp(0, 1)

    def _corrected(
        self, update: Update, correlations: Correlations, flow: Tensor, features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Flows [b 4 h w] to both frames, and features, after one update."""
        coarse = scaled_flow(flow, 1 / update.factor)
        height, width = coarse.shape[-2:]
        rows, columns = (torch.arange(side, device=flow.device, dtype=flow.dtype) for side in (height, width))
        here = torch.stack(torch.meshgrid(columns, rows, indexing="xy"))
        # a place of one frame lies in the other at the whole way, from the middle's half of it
        ends = here + coarse[:, 2:] / TIME, here + coarse[:, :2] / (1 - TIME)
        more, change = update(features, coarse, correlations.around(ends))
        return flow + change, features + more

    def _combined(self, pair: tuple[Tensor, Tensor], mean: Tensor, flow: Tensor, made: Tensor) -> Tensor:
        """The mean of three frames, each of both frames moved, masked, and with a residual; and what they give anew."""
        changes, mask, residual = made.tensor_split([4 * FLOWS, 5 * FLOWS], 1)
        frames = []
        for k in range(FLOWS):
            moved = []
            for side, frame in enumerate(pair):
                change = changes[:, 2 * (FLOWS * side + k) :][:, :2]
                moved.append(warp(frame, flow[:, 2 * side :][:, :2] + change))
            share = mask[:, k : k + 1].sigmoid()
            frames.append(share * moved[0] + (1 - share) * moved[1] + mean + residual[:, 3 * k : 3 * k + 3])
        return torch.stack(frames).mean(0) + self.comb_block(torch.cat(frames, 1))


def _known(features: Tensor, first: Tensor, second: Tensor, flow: Tensor) -> tuple[Tensor, ...]:
    """What a decoder sees: features of the middle, of both frames moved to the middle, and the flows."""
    return features, warp(first, flow[:, :2]), warp(second, flow[:, 2:]), flow
