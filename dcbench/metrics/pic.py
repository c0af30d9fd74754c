"""PIC, perceptual input conformity (DynamiCrafter, arXiv 2310.12190, §4): does the clip keep the input image?

PIC = mean over frames of 1 - D(input image, frame), D = DreamSim (arXiv 2306.09344), a cosine distance in [0, 2].
"""

import contextlib
import io
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dcbench import trust
from dcbench.catalogue import MetricCard, WeightSource
from dcbench.errors import UserError, near_match
from dcbench.metrics.base import ClipMetric, FeatureExtractor, View
from dcbench.metrics.per_clip import RememberedFrames, cosine, to_pil
from dcbench.weights import check_finite, fetch, load_tensors, locked, tensors_sha256, unpack, unsafe, weights_dir

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
    """The folder of a DreamSim type's weights in `weights_dir()`. Missing weights are fetched and unpacked."""
    folder = weights_dir() / f"dreamsim-{kind}"
    if all((folder / name).exists() for name in REQUIRED[kind]):
        return folder
    archive = fetch(_source(f"dreamsim-{kind}.zip", sources), offline)
    with locked(weights_dir(), f"dreamsim-{kind}"):
        if not all((folder / name).exists() for name in REQUIRED[kind]):  # another process may have unpacked it
            _unpack_whole(archive, folder, kind)
    return folder


def _unpack_whole(archive: Path, folder: Path, kind: str) -> None:
    """Unpack beside `folder`, then put it in its place: it is there whole, or not at all."""
    for left in weights_dir().glob(f".dreamsim-{kind}-*"):  # by a killed process: this one holds the lock
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".dreamsim-{kind}-", dir=weights_dir()))
    try:
        unpack(archive, partial)
        missing = [name for name in REQUIRED[kind] if not (partial / name).exists()]
        if missing:
            raise UserError(f"{archive} holds no {missing[0]}: it is not DreamSim's archive for {kind}")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except UserError:
        trust.write(weights_dir(), archive.name, None)  # what is put in its place is another first one
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _source(name: str, sources: Sequence[WeightSource]) -> WeightSource:
    for source in sources:
        if source.name == name:
            return source
    from dreamsim.config import dreamsim_weights  # the archives depend on the installed release

    kind = name.removeprefix("dreamsim-").removesuffix(".zip")
    return WeightSource(name=name, url=dreamsim_weights[kind], licence="MIT")


@contextlib.contextmanager
def _kept_local(dino: Path | None) -> Iterator[None]:
    """While DreamSim loads: use no code from torch.hub, load tensors to the CPU, print nothing.

    DreamSim loads DINO's code from torch.hub at an unpinned commit. The dreamsim package contains the same code, so the
    network is built from the package, and only its weights are read.
    """

    def hub_load(repository: str, model: str, *_: Any, **__: Any) -> torch.nn.Module:
        if model != "dino_vitb16" or dino is None:
            raise UserError(f"DreamSim needs {repository} {model} from torch.hub, which dcbench does not run")
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
    """Image embeddings by the dreamsim package. DreamSim's distance is one minus the cosine of two embeddings."""

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
                    f"DreamSim {kind} cannot be loaded from {folder}: {type(error).__name__}: {unsafe(error)}. "
                    "Remove the folder and fetch it again."
                ) from None
        state = {name: value for name, value in self.network.state_dict().items() if isinstance(value, Tensor)}
        for index, extractor in enumerate(self.network.base_model.model.extractor_list):
            if isinstance(getattr(extractor, "proj", None), Tensor):  # a plain attribute, not in the state dict
                state[f"proj.{index}"] = extractor.proj
        check_finite(state, folder)
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


class ConformityMetric(ClipMetric):
    """PIC of each clip and of each frame.

    Frame 0 counts, as in the paper; "without_first" is the mean without it. 1 = every frame looks like the input image.
    A still picture scores 1 too, so read PIC together with `motion`.
    """

    extractor: DreamSimEmbedder
    extractor_options = ("dreamsim_type",)

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value", "without_first", "per_frame": 1 - D(image, frame) for each frame}."""
        clip, image = self.check(view.clip), view.need("image")
        embedded = self.extractor.remembered([image, *clip])  # t + 1 embeddings, not 2 t
        per_frame = cosine(embedded[:1], embedded[1:]).tolist()
        later = per_frame[1:] or per_frame
        return {
            "value": sum(per_frame) / len(per_frame),
            "without_first": sum(later) / len(later),
            "per_frame": per_frame,
        }


@cache
def _shared(kind: str, folder: Path, dino: Path | None, device: str) -> DreamSimEmbedder:
    return DreamSimEmbedder(kind, folder, dino, device)


def dreamsim_embedder(kind: str, sources: Sequence[WeightSource], runtime: Any) -> DreamSimEmbedder:
    """The network of a type of REQUIRED, shared by all metrics of this process. MissingWeights says how to get it."""
    dino = fetch(DINO, runtime.offline) if kind in ("ensemble", "dino_vitb16") else None
    return _shared(kind, dreamsim_folder(kind, sources, runtime.offline), dino, runtime.device)


def build(card: MetricCard, runtime: Any) -> ConformityMetric:
    """Entry point of the `pic` card; options: dreamsim_type."""
    kind = card.options.get("dreamsim_type", "ensemble")
    if kind not in REQUIRED:
        unpinned = " It runs unpinned code from torch.hub, which dcbench does not." if "dinov2" in kind else ""
        raise UserError(
            f'DreamSim type "{kind}" is not known.{near_match(kind, REQUIRED)}{unpinned} Known: {", ".join(REQUIRED)}.'
        )
    return ConformityMetric(card, dreamsim_embedder(kind, card.weights, runtime))
