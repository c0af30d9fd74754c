"""CLIP's two towers as DynamiCrafter reads them: open_clip's modules, called by loops of our own.

Text: the last layer but one, then the final norm. Image: all visual tokens of the last layer, without norm or
projection. (The released wrappers break under open_clip >= 2.24, which moved the batch axis.)
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn

from dcbench.models.dynamicrafter.config import ClipConfig

FULL_VOCABULARY = 49408
_TOKENIZER: list[SimpleTokenizer] = []


def build_clip(cfg: ClipConfig) -> CLIP:
    """Both towers as one open_clip model, with new weights."""
    vision = CLIPVisionCfg(
        layers=cfg.vision_layers,
        width=cfg.vision_width,
        head_width=cfg.vision_head_width,
        patch_size=cfg.patch_size,
        image_size=cfg.image_size,
    )
    text = CLIPTextCfg(
        context_length=cfg.context_length,
        vocab_size=cfg.vocab_size,
        width=cfg.text_width,
        heads=cfg.text_heads,
        layers=cfg.text_layers,
    )
    return CLIP(cfg.embed_dim, vision, text)


def _tokenizer() -> SimpleTokenizer:
    if not _TOKENIZER:  # reading its vocabulary takes a second
        _TOKENIZER.append(SimpleTokenizer())
    return _TOKENIZER[0]


def count_tokens(prompt: str) -> int:
    """Byte pairs of a prompt, with its start and end marks."""
    return len(_tokenizer().encode(prompt)) + 2


def tokenize(prompts: Sequence[str], cfg: ClipConfig) -> Tensor:
    """int64 [b, context_length]: open_clip's byte pairs, cut to the length with the end mark kept, then zeros.

    A text tower with `token_ids` knows only those, numbered 1, 2, ...; all others are number 0.
    """
    tokens: Tensor = _tokenizer()(list(prompts), context_length=cfg.context_length)
    if not cfg.token_ids:
        return tokens
    numbers = torch.zeros(FULL_VOCABULARY, dtype=torch.int64)
    numbers[torch.tensor(cfg.token_ids)] = torch.arange(1, len(cfg.token_ids) + 1)
    return numbers[tokens]


def encode_text(clip: Any, tokens: Tensor, skip: int = 1) -> Tensor:
    """Tokens [b, n] -> [b, n, width]: every layer but the last `skip`, then the final norm."""
    length = tokens.shape[1]
    x = clip.token_embedding(tokens) + clip.positional_embedding[:length]
    mask = torch.full((length, length), float("-inf"), dtype=x.dtype, device=x.device).triu(1)
    for block in clip.transformer.resblocks[: len(clip.transformer.resblocks) - skip]:
        x = block(x, attn_mask=mask)
    return clip.ln_final(x)


def encode_image(visual: Any, pixels: Tensor) -> Tensor:
    """Preprocessed pixels [b, 3, s, s] -> [b, 1 + patches, width], the class token first."""
    x = visual.conv1(pixels).flatten(2).transpose(1, 2)
    first = visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
    x = torch.cat([first, x], dim=1) + visual.positional_embedding.to(x.dtype)
    x = visual.ln_pre(x)
    for block in visual.transformer.resblocks:
        x = block(x)
    return x


class TextEncoder(nn.Module):
    """Tokens -> context tokens. `model` is open_clip's CLIP without its visual tower."""

    def __init__(self, clip: CLIP) -> None:
        super().__init__()
        self.model = clip

    @classmethod
    def of(cls, clip: CLIP) -> "TextEncoder":
        """The text side of a whole CLIP, which loses its visual tower (and its mask, which `encode_text` makes)."""
        del clip.visual
        del clip.attn_mask
        return cls(clip)

    def forward(self, tokens: Tensor) -> Tensor:
        return encode_text(self.model, tokens)


class ImageEncoder(nn.Module):
    """Frames in [-1, 1] of any size -> visual tokens."""

    def __init__(self, visual: nn.Module, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.model = nn.ModuleDict({"visual": visual})

    def forward(self, frames: Tensor) -> Tensor:
        return encode_image(self.model["visual"], preprocess(frames, self.image_size))


def preprocess(frames: Tensor, size: int) -> Tensor:
    """[b, 3, h, w] in [-1, 1] -> what the visual tower sees, [b, 3, size, size]; the aspect ratio is not kept.

    Bicubic with aligned corners after a Gaussian blur where it shrinks, as kornia does it (PyTorch's own antialiasing
    is another filter).
    """
    frames = resize_blurred(frames, size)
    mean = torch.tensor(OPENAI_DATASET_MEAN, device=frames.device)[:, None, None]
    std = torch.tensor(OPENAI_DATASET_STD, device=frames.device)[:, None, None]
    return ((frames + 1) / 2 - mean) / std


def resize_blurred(frames: Tensor, size: int) -> Tensor:
    """[b, c, h, w] -> [b, c, size, size] in float32."""
    frames = frames.float()
    factors = frames.shape[-2] / size, frames.shape[-1] / size
    if max(factors) > 1:
        for axis, factor in zip((-2, -1), factors, strict=True):
            frames = blur(frames, axis, max((factor - 1) / 2, 0.001))
    if frames.shape[-2:] == (size, size):
        return frames
    return F.interpolate(frames, (size, size), mode="bicubic", align_corners=True)


def blur(x: Tensor, axis: int, sigma: float) -> Tensor:
    """Gaussian blur of [b, c, h, w] along one axis, reflecting at the border; the kernel reaches about 2 sigma."""
    length = int(max(4 * sigma, 3)) | 1
    if length // 2 >= x.shape[axis]:
        raise ValueError(f"cannot reflect {length // 2} pixels beyond a side of {x.shape[axis]}")
    offsets = torch.arange(length, dtype=x.dtype, device=x.device) - length // 2
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1) if axis == -2 else (kernel / kernel.sum()).view(1, 1, 1, -1)
    pad = (0, 0, length // 2, length // 2) if axis == -2 else (length // 2, length // 2, 0, 0)
    channels = x.shape[1]
    return F.conv2d(F.pad(x, pad, mode="reflect"), kernel.expand(channels, 1, -1, -1), groups=channels)
