"""CLIP similarity by open_clip: cosines of frames with the prompt, the next frame or the image; not x100, not clamped.

clip_text: mean over frames of cos(prompt, frame). clip_frames: mean of cos(frame i, frame i + 1); a still picture has
the highest value. clip_image: mean of cos(input image, frame). All three share an encoder; it encodes each frame once.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError, near_match
from dcbench.metrics.base import ClipMetric, FeatureExtractor, Observations, View
from dcbench.metrics.i3d import is_torchscript, load_torchscript
from dcbench.metrics.per_clip import RememberedFrames, cosine, to_pil
from dcbench.record import Score
from dcbench.weights import check_finite, fetch, load_tensors, tensors_sha256

Kind = Literal["text", "frames", "image"]
UNREAD = "tokens_not_read"  # of a prompt; in a row only where there are any


def load_clip(path: Path) -> dict[str, Tensor]:
    """A CLIP state dict from safetensors, a PyTorch checkpoint, or OpenAI's TorchScript archives; float32."""
    if is_torchscript(path):
        state = load_torchscript(path).state_dict()
        state = {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}
    else:
        state = load_tensors(path)
    state = {name.removeprefix("module."): value.float() for name, value in state.items()}
    check_finite(state, path)
    return state


class CLIPEncoder(FeatureExtractor):
    """An open_clip model with weights from a file. `model` is an open_clip name, or a JSON file of open_clip's form.

    OpenAI's weights need the activation QuickGELU: `ViT-B-32-quickgelu`, not `ViT-B-32`. The encoder's name
    contains the activation.
    """

    def __init__(self, model: str, path: Path, device: str = "cpu") -> None:
        super().__init__()
        import open_clip

        if model.endswith(".json"):
            config = Path(model).expanduser()
            if not config.is_file():
                raise UserError(f"no such open_clip model description: {config}")
            open_clip.add_model_config(config)
            model = config.stem
        if model not in open_clip.list_models():
            hint = near_match(model, open_clip.list_models())
            raise UserError(f'open_clip has no model "{model}".{hint} The path of a JSON description works too.')
        described = open_clip.get_model_config(model) or {}
        quick = bool(described.get("quick_gelu", False))
        if is_torchscript(path) and not quick:
            raise UserError(
                f'{path} is an OpenAI archive. Its network uses QuickGELU, but "{model}" uses GELU and gives other '
                f"numbers. Set options.model = {model}-quickgelu"
            )
        self.network: Any = open_clip.create_model(model, pretrained=None, pretrained_text=False, device="cpu").eval()
        state = load_clip(path)
        try:
            self.network.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise UserError(f"{path} does not fit {model}: {str(error).splitlines()[1].strip()[:200]}") from error
        self.network.to(device).requires_grad_(False)
        self.tokenizer: Any = open_clip.get_tokenizer(model)
        self.window = int(described.get("text_cfg", {}).get("context_length", 77))
        size = described.get("vision_cfg", {}).get("image_size", 224)
        self.transform: Any = open_clip.image_transform(size, is_train=False)
        self.name = f"open_clip {model} ({'QuickGELU' if quick else 'GELU'})"
        self.preprocessing = f"PIL bicubic short side to {size}, centre crop, OpenAI mean and std"
        self.weights_sha256 = tensors_sha256(state)
        self.num_features = int(described.get("embed_dim", 0))
        self.device = device
        self.remembered = RememberedFrames(self.embed)
        self._texts: dict[str, Tensor] = {}

    @torch.inference_mode()
    def embed(self, frames: Sequence[Tensor]) -> Tensor:
        """uint8 [3 h w] each -> float32 [n d]"""
        pixels = torch.stack([self.transform(to_pil(frame)) for frame in frames])
        return self.network.encode_image(pixels.to(self.device))

    def unread(self, prompt: str) -> int:
        """Tokens of the prompt beyond those that the text tower reads; 0 where the tokenizer does not count them."""
        encode = getattr(self.tokenizer, "encode", None)
        return max(0, len(encode(prompt)) + 2 - self.window) if encode else 0  # with a start and an end mark

    @torch.inference_mode()
    def embed_text(self, prompt: str) -> Tensor:
        """-> float64 [d]"""
        if prompt not in self._texts:
            self._texts[prompt] = self.network.encode_text(self.tokenizer([prompt]).to(self.device))[0].double().cpu()
        return self._texts[prompt]


class SimilarityMetric(ClipMetric):
    """One of the three similarities; values are cosines in [-1, 1]. Papers print 0.2 to 0.3 for text."""

    extractor: CLIPEncoder
    extractor_options = ("model", "checkpoint")

    def __init__(self, card: MetricCard, extractor: CLIPEncoder, kind: Kind) -> None:
        super().__init__(card, extractor)
        self.kind = kind

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value", "per_frame"}; for "frames" the list has t - 1 values, one per pair."""
        clip = self.check(view.clip, min_frames=2 if self.kind == "frames" else 1)
        frames = self.extractor.remembered(list(clip))
        if self.kind == "text":
            per_frame = cosine(self.extractor.embed_text(view.need("prompt"))[None], frames)
        elif self.kind == "image":
            per_frame = cosine(self.extractor.remembered([view.need("image")]), frames)
        else:
            per_frame = cosine(frames[:-1], frames[1:])
        row = {"value": float(per_frame.mean()), "per_frame": per_frame.tolist()}
        if self.kind == "text" and (unread := self.extractor.unread(view.need("prompt"))):
            row[UNREAD] = unread
        return row

    def score(self, seen: Observations) -> Score:
        """The mean; a warning counts the prompts that CLIP does not read to their end."""
        cut = sum(UNREAD in row for row in seen.generated)
        rows = [{key: value for key, value in row.items() if key != UNREAD} for row in seen.generated]
        score = super().score(replace(seen, generated=rows))
        if cut:
            window = self.extractor.window
            said = f"{cut} of {len(rows)} prompts are longer than the {window} tokens that CLIP reads; the rest is cut"
            score.warnings = [*score.warnings, said]
        return score


@cache
def _shared(model: str, path: Path, device: str) -> CLIPEncoder:
    return CLIPEncoder(model, path, device)


def build(card: MetricCard, runtime: Any) -> SimilarityMetric:
    """Entry point of the three cards; options: kind, model, checkpoint (a file; "" = the card's weights)."""
    kind = card.options.get("kind")
    if kind not in ("text", "frames", "image"):
        raise UserError(f'{card.name}: options.kind is "{kind}"; allowed: text, frames, image')
    named = card.options.get("checkpoint", "")
    path = Path(named).expanduser() if named else fetch(card.weights[0], runtime.offline)
    if not path.is_file():
        raise UserError(f"{card.name}: no such checkpoint: {path}")
    return SimilarityMetric(card, _shared(card.options.get("model", "ViT-B-32-quickgelu"), path, runtime.device), kind)
