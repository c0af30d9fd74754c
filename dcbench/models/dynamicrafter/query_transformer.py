"""The query transformer P: learned queries read CLIP's visual tokens and become context tokens for each frame."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcbench.models.dynamicrafter.attention import merge_heads, split_heads
from dcbench.models.dynamicrafter.config import QueryTransformerConfig


class QueryAttention(nn.Module):
    """The queries attend to the image tokens and to themselves."""

    def __init__(self, cfg: QueryTransformerConfig) -> None:
        super().__init__()
        inner = cfg.heads * cfg.head_dim
        self.heads = cfg.heads
        self.norm1, self.norm2 = nn.LayerNorm(cfg.dim), nn.LayerNorm(cfg.dim)
        self.to_q = nn.Linear(cfg.dim, inner, bias=False)
        self.to_kv = nn.Linear(cfg.dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, cfg.dim, bias=False)

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        tokens, queries = self.norm1(tokens), self.norm2(queries)
        keys, values = self.to_kv(torch.cat([tokens, queries], dim=1)).chunk(2, dim=-1)
        q, k, v = (split_heads(x, self.heads) for x in (self.to_q(queries), keys, values))
        return self.to_out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class QueryTransformer(nn.Module):
    """Visual tokens [b, n, in_dim] -> context [b, num_frames * num_queries, out_dim], frame after frame."""

    def __init__(self, cfg: QueryTransformerConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.latents = nn.Parameter(torch.randn(1, cfg.num_frames * cfg.num_queries, cfg.dim) / cfg.dim**0.5)
        self.proj_in = nn.Linear(cfg.in_dim, cfg.dim)
        self.proj_out = nn.Linear(cfg.dim, cfg.out_dim)
        self.norm_out = nn.LayerNorm(cfg.out_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    QueryAttention(cfg),
                    nn.Sequential(
                        nn.LayerNorm(cfg.dim),
                        nn.Linear(cfg.dim, cfg.dim * cfg.ff_mult, bias=False),
                        nn.GELU(),
                        nn.Linear(cfg.dim * cfg.ff_mult, cfg.dim, bias=False),
                    ),
                ]
            )
            for _ in range(cfg.depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.proj_in(tokens)
        queries = self.latents.expand(tokens.shape[0], -1, -1)
        for attention, feed_forward in self.layers:  # type: ignore[misc]
            queries = queries + attention(tokens, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))
