"""PIC, perceptual input conformity (DynamiCrafter, arXiv 2310.12190, §4): does the clip keep the input image?

PIC = mean over frames of 1 - D(input image, frame), D = DreamSim (arXiv 2306.09344), a cosine distance in [0, 2].
"""

import contextlib
import io
import pickle
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dcbench.catalogue import MetricCard, WeightSource
from dcbench.errors import UserError, near_match
from dcbench.metrics.base import FeatureExtractor
from dcbench.metrics.i3d import tensors_sha256
from dcbench.metrics.per_clip import PerClipMetric, RememberedFrames, check_inputs, cosine, to_pil
from dcbench.weights import fetch, load_tensors, weights_dir

REQUIRED = {
    "ensemble": (
        "dino_vitb16_pretrain.pth",
        "open_clip_vitb16_pretrain.pth.tar",
        "clip_vitb16_pretrain.pth.tar",
        "ensemble_lora",
    ),
    "dino_vitb16": ("dino_vitb16_pretrain.pth", "dino_vitb16_single_lora"),
    "open_clip_vitb32": ("open_clip_vitb32_pretrain.pth.tar", "open_clip_vitb32_single_lora"),
    "clip_vitb32": ("clip_vitb32_pretrain.pth.tar", "clip_vitb32_single_lora"),
    "synclr_vitb16": ("synclr_vit_b_16.pth", "synclr_vitb16_single_lora"),
}
DINO = WeightSource(
    name="dino_vitbase16_pretrain.pth",
    url="https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    licence="Apache-2.0",
)


def dreamsim_folder(kind: str, sources: Sequence[WeightSource], offline: bool) -> Path:
    """The unpacked weights of a DreamSim type, below `weights_dir()`; fetched and unpacked when they are not there."""
    folder = weights_dir() / f"dreamsim-{kind}"
    if all((folder / name).exists() for name in REQUIRED[kind]):
        return folder
    archive = fetch(_source(f"dreamsim-{kind}.zip", sources), offline)
    partial = Path(tempfile.mkdtemp(prefix=f".dreamsim-{kind}-", dir=weights_dir()))
    try:
        with zipfile.ZipFile(archive) as zipped:
            zipped.extractall(partial)  # checks the CRC of every member, and keeps each below the folder
        missing = [name for name in REQUIRED[kind] if not (partial / name).exists()]
        if missing:
            raise UserError(f"{archive} holds no {missing[0]}: it is not DreamSim's archive for {kind}")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it and fetch it again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _source(name: str, sources: Sequence[WeightSource]) -> WeightSource:
    for source in sources:
        if source.name == name:
            return source
    from dreamsim.config import dreamsim_weights  # each release has its own archive for each type

    kind = name.removeprefix("dreamsim-").removesuffix(".zip")
    return WeightSource(name=name, url=dreamsim_weights[kind], licence="MIT")


@contextlib.contextmanager
def _kept_local(dino: Path | None) -> Iterator[None]:
    """While DreamSim loads: no code from torch.hub, tensors to the CPU, no chatter.

    DreamSim asks torch.hub for DINO's network at an unpinned commit. The same file lies inside the dreamsim package, so
    the network is built from there, and only its weights are read.
    """

    def hub_load(repository: str, model: str, *_: Any, **__: Any) -> torch.nn.Module:
        if model != "dino_vitb16" or dino is None:
            raise UserError(f"DreamSim asks torch.hub for {repository} {model}, which dcbench does not run")
        from dreamsim.feature_extraction.vision_transformer import vit_base

        network = vit_base(patch_size=16, num_classes=0)
        network.load_state_dict(load_tensors(dino))
        return network

    def load(*args: Any, **options: Any) -> Any:
        return torch_load(*args, **{"map_location": "cpu", **options})

    hub, torch_load, folder = torch.hub.load, torch.load, torch.hub._hub_dir  # type: ignore[attr-defined]
    torch.hub.load, torch.load = hub_load, load
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # DreamSim wraps its network twice, and uses torch's old weight_norm
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            warnings.filterwarnings("ignore", message=".*weight_norm", category=FutureWarning)
            yield
    finally:
        torch.hub.load, torch.load, torch.hub._hub_dir = hub, torch_load, folder  # type: ignore[attr-defined]


class DreamSimEmbedder(FeatureExtractor):
    """DreamSim's embedding of an image, by the real package: its distance is one minus the cosine of two of these."""

    preprocessing = "PIL bicubic to 224x224, [0, 1]"

    def __init__(self, kind: str, folder: Path, dino: Path | None = None, device: str = "cpu") -> None:
        super().__init__()
        from dreamsim import dreamsim

        self.name = f"dreamsim {kind}"
        with _kept_local(dino):
            try:
                self.network: Any = dreamsim(
                    pretrained=True, device=device, cache_dir=str(folder.absolute()), dreamsim_type=kind
                )[0]
            except (OSError, KeyError, RuntimeError, TypeError, pickle.UnpicklingError, EOFError) as error:
                raise UserError(
                    f"DreamSim {kind} cannot be loaded from {folder}: {type(error).__name__}: {error}. "
                    "Remove the folder and fetch it again."
                ) from error
        state = {name: value for name, value in self.network.state_dict().items() if isinstance(value, Tensor)}
        for index, extractor in enumerate(self.network.base_model.model.extractor_list):
            if isinstance(getattr(extractor, "proj", None), Tensor):  # a plain attribute, in no state dict
                state[f"proj.{index}"] = extractor.proj
        self.weights_sha256 = tensors_sha256(state)
        self.num_features = int(self.network.embed_size)
        self.device = device
        self.remembered = RememberedFrames(self.embed)

    @torch.inference_mode()
    def embed(self, frames: Sequence[Tensor]) -> Tensor:
        """uint8 [3 h w] each -> float32 [n d], mean-centred and of length one."""
        resized = [to_pil(frame).resize((224, 224), Image.Resampling.BICUBIC) for frame in frames]
        pixels = torch.stack([_unit(image) for image in resized])
        return self.network.embed(pixels.to(self.device))


def _unit(image: Image.Image) -> Tensor:
    """RGB image -> float32 [3 h w] in [0, 1]"""
    from torchvision.transforms.functional import to_tensor

    return to_tensor(image)


class ConformityMetric(PerClipMetric):
    """PIC of each clip, with its curve over the frames.

    Frame 0 counts, as in the paper; the mean without it stands beside ("without_first"). 1 = every frame looks like the
    input image, which a still picture reaches: read it beside `motion`.
    """

    def __init__(self, card: MetricCard, extractor: DreamSimEmbedder) -> None:
        super().__init__(card)
        self.extractor = extractor

    def extract(
        self, clips: Sequence[Tensor], images: Sequence[Tensor] | None, prompts: Sequence[str] | None = None
    ) -> list[dict[str, Any]]:
        """-> {"value", "without_first", "per_frame": 1 - D(image, frame) for each frame} a clip."""
        check_inputs("PIC", clips, images, needs=("image",))
        rows = []
        for clip, image in zip(clips, images or (), strict=True):
            embedded = self.extractor.remembered([image, *clip])  # t + 1 embeddings, not 2 t
            per_frame = cosine(embedded[:1], embedded[1:]).tolist()
            later = per_frame[1:] or per_frame
            rows.append(
                {
                    "value": sum(per_frame) / len(per_frame),
                    "without_first": sum(later) / len(later),
                    "per_frame": per_frame,
                }
            )
        return rows


@cache
def _shared(kind: str, folder: Path, dino: Path | None, device: str) -> DreamSimEmbedder:
    return DreamSimEmbedder(kind, folder, dino, device)


def build(card: MetricCard, runtime: Any) -> ConformityMetric:
    """Entry point of the `pic` card; options: dreamsim_type."""
    kind = card.options.get("dreamsim_type", "ensemble")
    if kind not in REQUIRED:
        unpinned = " It runs unpinned code from torch.hub, which dcbench does not." if "dinov2" in kind else ""
        raise UserError(
            f'DreamSim type "{kind}" is not known.{near_match(kind, REQUIRED)}{unpinned} Known: {", ".join(REQUIRED)}.'
        )
    dino = fetch(DINO, runtime.offline) if kind in ("ensemble", "dino_vitb16") else None
    folder = dreamsim_folder(kind, card.weights, runtime.offline)
    return ConformityMetric(card, _shared(kind, folder, dino, runtime.device))
