"""The three networks that embed single frames for VBench, each with the preprocessing that VBench gives it.

VBench resizes frames as float tensors, which are neither rounded nor clamped, and the input picture with Pillow.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from dcbench.catalogue import MetricCard
from dcbench.metrics.base import FeatureExtractor
from dcbench.metrics.clip_similarity import CLIPEncoder
from dcbench.metrics.per_clip import RememberedFrames, to_pil
from dcbench.metrics.pic import DreamSimEmbedder
from dcbench.weights import fetch, fill, load_tensors, tensors_sha256

SIDE = 224
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
BICUBIC, BILINEAR = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
AT_ONCE = {"cpu": 8, "cuda": 64}  # frames in one call of a network


def normalised(pixels: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """float [n 3 h w] in 0..255 -> in [0, 1], less the mean, over the standard deviation."""
    mean, std = statistics
    return transforms.normalize(pixels / 255, list(mean), list(std))


class FrameEmbedder(FeatureExtractor):
    """A network of single frames: `frames` embeds frames of clips, `picture` an input picture."""

    def __init__(self, name: str, embed: Callable[[Tensor], Tensor], sha256: str, how: str, device: str) -> None:
        super().__init__()
        self.name, self.weights_sha256, self.preprocessing = name, sha256, how
        self._network, self._device = embed, device
        self.frames = RememberedFrames(lambda frames: self._through(map(self.prepared, frames)))
        self.pictures = RememberedFrames(lambda frames: self._through(map(self.prepared_picture, frames)))

    def prepared(self, frame: Tensor) -> Tensor:
        """uint8 [3 h w] -> float32 [3 h' w'], the network's input."""
        raise NotImplementedError

    def prepared_picture(self, picture: Tensor) -> Tensor:
        return self.prepared(picture)

    def picture(self, picture: Tensor) -> Tensor:
        """uint8 [3 h w] -> float64 [d]"""
        return self.pictures([picture])[0]

    @torch.inference_mode()
    def _through(self, prepared: Any) -> Tensor:
        rows = torch.stack(list(prepared)).split(AT_ONCE[torch.device(self._device).type])
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return torch.cat([self._network(part.to(self._device)).float().cpu() for part in rows])


class DinoCrop(FrameEmbedder):
    """DINO as `i2v_subject` has it: short side to 256, bicubic, centre crop of 224."""

    def __init__(self, dino: "Dino", antialias: bool, device: str) -> None:
        how = f"bicubic{' with antialias' if antialias else ''} short side to 256, centre crop of {SIDE}, ImageNet "
        how += "mean and std; frames as floats, not rounded, the picture by Pillow"
        super().__init__("dino vit-b/16", dino.network, dino.weights_sha256, how, device)
        self.antialias = antialias

    def prepared(self, frame: Tensor) -> Tensor:
        small = transforms.resize(frame[None].float(), [256], BICUBIC, antialias=self.antialias)
        return normalised(transforms.center_crop(small, [SIDE]), IMAGENET)[0]

    def prepared_picture(self, picture: Tensor) -> Tensor:
        whole: Any = to_pil(picture)
        small: Any = transforms.resize(whole, [256], BICUBIC)
        return normalised(transforms.pil_to_tensor(transforms.center_crop(small, [SIDE])).float()[None], IMAGENET)[0]


class DinoWhole(FrameEmbedder):
    """DINO as `subject_consistency` has it: short side to 224, bilinear, the whole frame."""

    def __init__(self, dino: "Dino", device: str) -> None:
        how = f"bilinear without antialias, short side to {SIDE}, ImageNet mean and std, not rounded"
        super().__init__("dino vit-b/16", dino.network, dino.weights_sha256, how, device)

    def prepared(self, frame: Tensor) -> Tensor:
        return normalised(transforms.resize(frame[None].float(), [SIDE], BILINEAR, antialias=False), IMAGENET)[0]


class DreamSimSquash(FrameEmbedder):
    """DreamSim as `i2v_background` has it: squashed to 224x224, bicubic."""

    def __init__(self, dreamsim: DreamSimEmbedder, antialias: bool, device: str) -> None:
        how = f"bicubic{' with antialias' if antialias else ''} to {SIDE}x{SIDE}, [0, 1]; frames as floats, not "
        how += "rounded, the picture by Pillow"
        super().__init__(dreamsim.name, dreamsim.network.embed, dreamsim.weights_sha256, how, device)
        self.antialias = antialias

    def prepared(self, frame: Tensor) -> Tensor:
        return transforms.resize(frame[None].float(), [SIDE, SIDE], BICUBIC, antialias=self.antialias)[0] / 255

    def prepared_picture(self, picture: Tensor) -> Tensor:
        return transforms.to_tensor(to_pil(picture).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


class ClipCrop(FrameEmbedder):
    """CLIP as `background_consistency` and `aesthetic_quality` have it: short side to 224, bicubic, centre crop."""

    def __init__(self, clip: CLIPEncoder, device: str) -> None:
        how = f"bicubic without antialias, short side to {SIDE}, centre crop, OpenAI mean and std, not rounded"
        super().__init__(clip.name, clip.network.encode_image, clip.weights_sha256, how, device)

    def prepared(self, frame: Tensor) -> Tensor:
        small = transforms.resize(frame[None].float(), [SIDE], BICUBIC, antialias=False)
        return normalised(transforms.center_crop(small, [SIDE]), CLIP)[0]


# Weights -------------------------------------------------------------------------------------------------------------


class Dino(nn.Module):
    """DINO ViT-B/16 (arXiv 2104.14294) from dino_vitbase16_pretrain.pth: float [b 3 h w] -> [b 768].

    The network is the one in the dreamsim package, an unchanged copy of the authors' file; nothing runs from torch.hub.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        super().__init__()
        from dreamsim.feature_extraction.vision_transformer import vit_base

        network = vit_base(patch_size=16, num_classes=0)
        state = load_tensors(path)
        fill(network, state, path, problem="is not DINO's ViT-B/16: {} tensors differ")
        self.network = network.to(device).eval().requires_grad_(False)
        self.weights_sha256 = tensors_sha256(state)


@cache
def _shared_dino(path: Path, device: str) -> Dino:
    return Dino(path, device)


@cache
def _shared_clip(model: str, path: Path, device: str) -> ClipCrop:
    return ClipCrop(CLIPEncoder(model, path, device), device)


def dino(card: MetricCard, runtime: Any) -> Dino:
    """The network, shared by all metrics of this process. MissingWeights says how to get it."""
    return _shared_dino(fetch(card.weights[0], runtime.offline), runtime.device)


def clip(card: MetricCard, runtime: Any) -> ClipCrop:
    """CLIP's picture tower from the card's first file, shared in the same way; options: model, an open_clip name."""
    return _shared_clip(card.options["model"], fetch(card.weights[0], runtime.offline), runtime.device)
