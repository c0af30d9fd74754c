"""The plain form of the U-Net: the same weights and mathematics, computed as the released code does it.

Contiguous activations, attention by einsum with all scores in memory, three-dimensional temporal convolutions, the
context repeated for every frame, one forward for each branch of guidance. It is the baseline for the speed of `UNet`,
and an independent implementation to check its output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcbench.models.dynamicrafter.attention import SpatialTransformer, TemporalTransformer
from dcbench.models.dynamicrafter.unet import ResBlock, UNet, sinusoid


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    def split(x: Tensor) -> Tensor:
        n, s, _ = x.shape
        return x.reshape(n, s, heads, -1).permute(0, 2, 1, 3).reshape(n * heads, s, -1)

    n = q.shape[0]
    q, k, v = split(q), split(k), split(v)
    scores = torch.einsum("bid,bjd->bij", q, k) * q.shape[-1] ** -0.5
    out = torch.einsum("bij,bjd->bid", scores.softmax(dim=-1), v)
    return out.reshape(n, heads, out.shape[1], -1).permute(0, 2, 1, 3).reshape(n, out.shape[1], -1)


def self_attention(layer: nn.Module, x: Tensor) -> Tensor:
    return layer.to_out(attention(layer.to_q(x), layer.to_k(x), layer.to_v(x), layer.heads))  # type: ignore[operator]


def cross_attention(layer: nn.Module, x: Tensor, context: Tensor) -> Tensor:
    """`context` [(b t), 77 + l, d]: repeated for each frame."""
    text, image = context[:, :77], context[:, 77:]
    q = layer.to_q(x)  # type: ignore[operator]
    out = attention(q, layer.to_k(text), layer.to_v(text), layer.heads)  # type: ignore[operator, arg-type]
    seen = attention(q, layer.to_k_ip(image), layer.to_v_ip(image), layer.heads)  # type: ignore[operator, arg-type]
    return layer.to_out(out + layer.gate * seen)  # type: ignore[operator]


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    value, gate = layer.net[0].proj(x).chunk(2, dim=-1)  # type: ignore[index]
    return layer.net[2](value * F.gelu(gate))  # type: ignore[index]


def spatial(layer: SpatialTransformer, x: Tensor, context: Tensor) -> Tensor:
    n, c, h, w = x.shape
    y = layer.proj_in(layer.norm(x).permute(0, 2, 3, 1).reshape(n, h * w, c).contiguous())
    for block in layer.transformer_blocks:
        y = y + self_attention(block.attn1, block.norm1(y))  # type: ignore[arg-type, operator]
        y = y + cross_attention(block.attn2, block.norm2(y), context)  # type: ignore[arg-type, operator]
        y = y + feed_forward(block.ff, block.norm3(y))  # type: ignore[arg-type, operator]
    return x + layer.proj_out(y).reshape(n, h, w, c).permute(0, 3, 1, 2).contiguous()


def temporal(layer: TemporalTransformer, x: Tensor, frames: int) -> Tensor:
    n, c, h, w = x.shape
    clip = x.reshape(n // frames, frames, c, h, w).permute(0, 2, 1, 3, 4).contiguous()
    y = layer.norm(clip).permute(0, 3, 4, 2, 1).reshape(-1, frames, c).contiguous()
    y = layer.proj_in(y)
    for block in layer.transformer_blocks:
        y = y + self_attention(block.attn1, block.norm1(y))  # type: ignore[arg-type, operator]
        y = y + self_attention(block.attn2, block.norm2(y))  # type: ignore[arg-type, operator]
        y = y + feed_forward(block.ff, block.norm3(y))  # type: ignore[arg-type, operator]
    y = layer.proj_out(y).reshape(n // frames, h, w, frames, c).permute(0, 3, 4, 1, 2)
    return x + y.reshape(n, c, h, w).contiguous()


def residual(layer: ResBlock, x: Tensor, emb: Tensor, frames: int) -> Tensor:
    h = layer.in_layers(x) + layer.emb_layers(emb)[:, :, None, None]
    h = layer.skip_connection(x) + layer.out_layers(h)
    n, c, height, width = h.shape
    clip = h.reshape(n // frames, frames, c, height, width).permute(0, 2, 1, 3, 4).contiguous()
    y = clip
    for convs in (
        layer.temopral_conv.conv1,
        layer.temopral_conv.conv2,
        layer.temopral_conv.conv3,
        layer.temopral_conv.conv4,
    ):
        y = F.silu(convs[0](y))
        y = F.conv3d(y, convs[-1].weight, convs[-1].bias, padding=(1, 0, 0))  # type: ignore[arg-type]
    return (clip + y).permute(0, 2, 1, 3, 4).reshape(n, c, height, width).contiguous()


def forward(unet: UNet, x: Tensor, timesteps: Tensor, context: Tensor, fs: Tensor) -> Tensor:
    """As `UNet.forward` with one branch and a context of 77 + 16 t tokens."""
    frames, width = x.shape[2], unet.cfg.model_channels
    text = context[:, :77].repeat_interleave(frames, dim=0)
    image = context[:, 77:].reshape(-1, 16, context.shape[-1])
    per_frame = torch.cat([text, image], dim=1)
    emb = unet.time_embed(sinusoid(timesteps, width)) + unet.fps_embedding(sinusoid(fs, width))
    emb = emb.repeat_interleave(frames, dim=0)

    def run(block: nn.Module, h: Tensor) -> Tensor:
        for layer in block.children():
            if isinstance(layer, ResBlock):
                h = residual(layer, h, emb, frames)
            elif isinstance(layer, SpatialTransformer):
                h = spatial(layer, h, per_frame)
            elif isinstance(layer, TemporalTransformer):
                h = temporal(layer, h, frames)
            else:
                h = layer(h)
        return h

    h = x.permute(0, 2, 1, 3, 4).reshape(-1, x.shape[1], *x.shape[3:]).contiguous()
    skips = []
    for index, block in enumerate(unet.input_blocks):
        h = run(block, h)
        if index == 0:
            h = run(unet.init_attn, h)
        skips.append(h)
    h = run(unet.middle_block, h)
    for block in unet.output_blocks:
        h = run(block, torch.cat([h, skips.pop()], dim=1))
    return unet.out(h).reshape(x.shape[0], frames, -1, *x.shape[3:]).permute(0, 2, 1, 3, 4)
