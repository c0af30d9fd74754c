"""Transformers of the U-Net: spatial self-attention, dual cross-attention with a gate, temporal self-attention.

Activations are [(b t), c, h, w] in channels-last memory, so that [(b t), h w, c] tokens are views and not copies.
Attribute names are those of the released checkpoints.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcbench.models.dynamicrafter.config import UNetConfig


class KeysValues(NamedTuple):
    """One layer's keys and values of a context, each [b, heads, tokens, d]; computed once a clip, not once a step."""

    text_k: Tensor
    text_v: Tensor
    image_k: Tensor | None  # [(b t), ...] when every frame has its own tokens; None without image tokens
    image_v: Tensor | None


def split_context(context: Tensor, frames: int, cfg: UNetConfig) -> tuple[Tensor, Tensor | None]:
    """Context [b, l, d] -> text tokens [b, 77, d] and image tokens [(b t), 16, d].

    As released: only a context of exactly text_tokens + image_tokens * t is split by frame; from any other length every
    frame sees all image tokens ([b, l - 77, d]).
    """
    text, image = context[:, : cfg.text_tokens], context[:, cfg.text_tokens :]
    if image.shape[1] == 0:
        return text, None
    if image.shape[1] == cfg.image_tokens * frames:
        image = image.reshape(-1, cfg.image_tokens, image.shape[-1])
    return text, image


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over [..., heads, tokens, d]."""
    return F.scaled_dot_product_attention(q, k, v)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[n, s, (heads d)] -> [n, heads, s, d], a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[n, heads, s, d] -> [n, s, (heads d)]."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens [n, s, c] among themselves."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_k = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_v = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split_heads(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        return self.to_out(merge_heads(attend(q, k, v)))


class TemporalAttention(SelfAttention):
    """Tokens [(b t), s, c]: each position attends along the frames, without moving anything in memory."""

    def forward(self, x: Tensor, frames: int) -> Tensor:  # type: ignore[override]
        q, k, v = (self._by_time(project(x), frames) for project in (self.to_q, self.to_k, self.to_v))
        out = attend(q, k, v).transpose(1, 2)  # b t (s heads) d
        return self.to_out(out.reshape(x.shape[0], x.shape[1], -1))

    def _by_time(self, x: Tensor, frames: int) -> Tensor:
        """[(b t), s, (heads d)] -> [b, (s heads), t, d], a view: each position and head is a sequence of frames."""
        return x.reshape(-1, frames, x.shape[1] * self.heads, x.shape[2] // self.heads).transpose(1, 2)


class DualCrossAttention(nn.Module):
    """out = to_out(attend(q, text) + λ attend(q, image)), one query for both; λ = tanh(alpha) + 1 where it is learned.

    λ lies in (0, 2) and starts at 1. `image_scale` set to a number takes its place; None restores it.
    """

    def __init__(self, cfg: UNetConfig, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.cfg, self.heads = cfg, heads
        inner = heads * head_dim
        if cfg.learnable_image_scale:
            self.alpha = nn.Parameter(torch.tensor(0.0))
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(cfg.context_dim, inner, bias=False)
        self.to_v = nn.Linear(cfg.context_dim, inner, bias=False)
        self.to_out = nn.Sequential(nn.Linear(inner, dim))
        self.to_k_ip = nn.Linear(cfg.context_dim, inner, bias=False)
        self.to_v_ip = nn.Linear(cfg.context_dim, inner, bias=False)
        self.image_scale: float | None = None

    @property
    def gate(self) -> Tensor | float:
        if self.image_scale is not None:
            return self.image_scale
        return torch.tanh(self.alpha) + 1 if self.cfg.learnable_image_scale else 1.0

    def project(self, context: Tensor, frames: int) -> KeysValues:
        text, image = split_context(context, frames, self.cfg)
        return KeysValues(
            split_heads(self.to_k(text), self.heads),
            split_heads(self.to_v(text), self.heads),
            None if image is None else split_heads(self.to_k_ip(image), self.heads),
            None if image is None else split_heads(self.to_v_ip(image), self.heads),
        )

    def forward(self, x: Tensor, context: KeysValues) -> Tensor:
        """x [(b t), s, c]. Frames that share their tokens are one long sequence: nothing is repeated."""
        q = self.to_q(x)
        out = self._read(q, context.text_k, context.text_v)
        if context.image_k is not None and context.image_v is not None:
            out = out + self.gate * self._read(q, context.image_k, context.image_v)
        return self.to_out(out)

    def _read(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        by_token_set = q.reshape(k.shape[0], -1, q.shape[-1])
        return merge_heads(attend(split_heads(by_token_set, self.heads), k, v)).view_as(q)


class GatedGelu(nn.Module):
    """Linear to (value, gate), then value * gelu(gate)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Gated feed-forward of four times the width."""

    rows = 512  # tokens at once: the eight times wider activations then stay in the processor's cache

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GatedGelu(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or torch.compiler.is_compiling():
            return self.net(x)
        return torch.cat([self.net(part) for part in x.flatten(0, 1).split(self.rows)]).view_as(x)


class SpatialBlock(nn.Module):
    """x += self-attention; x += dual cross-attention; x += feed-forward; each on layer-normed tokens."""

    def __init__(self, cfg: UNetConfig, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.attn1 = SelfAttention(dim, heads, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = DualCrossAttention(cfg, dim, heads, head_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, context: KeysValues, branches: int) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = repeat_batch(x, branches)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class TemporalBlock(nn.Module):
    """As the spatial block, over time; both attentions are self-attentions."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.attn1 = TemporalAttention(dim, heads, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = TemporalAttention(dim, heads, head_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = x + self.attn1(self.norm1(x), frames)
        x = x + self.attn2(self.norm2(x), frames)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer over the positions of each frame. `layer` is its number, 1-16 as in the paper's Fig. 2."""

    def __init__(self, cfg: UNetConfig, channels: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        heads = channels // cfg.head_channels
        inner = heads * cfg.head_channels
        self.norm = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            SpatialBlock(cfg, inner, heads, cfg.head_channels) for _ in range(cfg.transformer_depth)
        )
        self.proj_out = zero(nn.Linear(inner, channels))

    def project(self, context: Tensor, frames: int) -> list[KeysValues]:
        return [block.attn2.project(context, frames) for block in self.transformer_blocks]  # type: ignore[union-attr]

    def forward(self, x: Tensor, context: Sequence[KeysValues], branches: int = 1) -> Tensor:
        """x [(b t), c, h, w] -> [(n b t), c, h, w]: the n branches of the context part at the first cross-attention."""
        tokens = self.proj_in(to_tokens(self.norm(x)))
        for index, (block, keys_values) in enumerate(zip(self.transformer_blocks, context, strict=True)):
            tokens = block(tokens, keys_values, branches if index == 0 else 1)
        return repeat_batch(x, branches) + from_tokens(self.proj_out(tokens), x.shape[2])


class TemporalTransformer(nn.Module):
    """Transformer over the frames at each position. It has no position code: temporal convolutions give the order."""

    def __init__(self, cfg: UNetConfig, channels: int, heads: int, conv_projection: bool = False) -> None:
        super().__init__()
        inner = heads * cfg.head_channels
        self.norm = nn.GroupNorm(cfg.norm_groups, channels, eps=1e-6)
        # The released first layer stores its projections as convolutions of width 1; they compute the same.
        self.proj_in = PointwiseConv(channels, inner) if conv_projection else nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            TemporalBlock(inner, heads, cfg.head_channels) for _ in range(cfg.transformer_depth)
        )
        self.proj_out = zero(PointwiseConv(inner, channels) if conv_projection else nn.Linear(inner, channels))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """x [(b t), c, h, w] -> the same; the group statistics are those of the whole clip."""
        tokens = self.proj_in(to_tokens(norm_clip(self.norm, x, frames)))
        for block in self.transformer_blocks:
            tokens = block(tokens, frames)
        return x + from_tokens(self.proj_out(tokens), x.shape[2])


class PointwiseConv(nn.Conv1d):
    """A convolution of width 1, computed as a matrix product of tokens [..., c]."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.squeeze(-1), self.bias)


def to_tokens(x: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, (h w), c]: a view in channels-last memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def from_tokens(tokens: Tensor, height: int) -> Tensor:
    """[n, (h w), c] -> [n, c, h, w] in channels-last memory, a view."""
    return tokens.unflatten(1, (height, -1)).permute(0, 3, 1, 2)


def norm_clip(norm: nn.Module, x: Tensor, frames: int) -> Tensor:
    """Apply a group norm to [(b t), c, h, w] with the statistics of each whole clip."""
    n, c, h, w = x.shape
    stacked = x.permute(0, 2, 3, 1).reshape(n // frames, frames * h, w, c).permute(0, 3, 1, 2)
    return norm(stacked).permute(0, 2, 3, 1).reshape(n, h, w, c).permute(0, 3, 1, 2)


def repeat_batch(x: Tensor, times: int) -> Tensor:
    """Repeat the batch axis as a whole: [n, ...] -> [(times n), ...], the memory layout kept."""
    return x if times == 1 else torch.cat([x] * times)


def zero(module: nn.Module) -> nn.Module:
    """The module with all parameters 0: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
