"""ST-LPIPS, a learned distance of two frames that a small shift barely changes (Ghildyal & Liu, arXiv 2207.13686).

LPIPS (Zhang et al., CVPR 2018) with blurred downsampling: five layers of a network, each scaled to length one at each
pixel, squared differences weighted for each channel, mean over pixels, sum over layers. 0 = equal frames; frames of two
videos are at about 0.46. It is neither LPIPS nor DreamSim: compare its numbers only with those of the same `net`.

st_lpips_image: mean over frames of 1 - d(input image, frame). st_lpips: mean over frames of d(frame, true frame).
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcbench.catalogue import MetricCard
from dcbench.clips import check_clip, resize, to_float
from dcbench.errors import UserError, near_match
from dcbench.metrics.base import ClipMetric, View
from dcbench.metrics.pixels import Frames, counted, known_frames, summary_of
from dcbench.weights import PackagedFile, check_finite, load_tensors, tensors_sha256

Net = Literal["alex", "vgg"]
CHANNELS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}  # of the five layers
MIN_SIDE = {"alex": 21, "vgg": 18}  # pixels: a mirrored border is smaller than the map that it is put around
FILES = {
    net: PackagedFile(
        what="ST-LPIPS",
        distribution="stlpips-pytorch==0.0.2",
        module="stlpips_pytorch",
        file=f"weights/vST0.0/{net}_shift_tolerant.pth",
        sha256=sha256,
        variable="DCBENCH_STLPIPS",
    )
    for net, sha256 in (
        ("alex", "b356b382f96010f77d085ee8343ecd9fd322d0a56e8de2b2d0549fafcad8b9ee"),
        ("vgg", "44597da68f49c1837c100ff52299050f274d102eb102e5837178c79be6f0e250"),
    )
}


class BlurPool(nn.Module):
    """Half the size, after a 3x3 binomial blur [1 2 1] of each channel. The border is mirrored by 2 pixels."""

    filt: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("filt", torch.empty(channels, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (2, 2, 2, 2), mode="reflect"), self.filt, stride=2, groups=x.shape[1])


def _alex() -> list[list[nn.Module]]:
    """AlexNet without a stride in its first convolution: the modules of each of the five layers."""
    return [
        [nn.Conv2d(3, 64, 11, padding=2), BlurPool(64), nn.ReLU(inplace=True)],
        [nn.MaxPool2d(3, 1), BlurPool(64), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True)],
        [nn.MaxPool2d(3, 1), BlurPool(192), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(inplace=True)],
        [nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(inplace=True)],
        [nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(inplace=True)],
    ]


def _vgg() -> list[list[nn.Module]]:
    """VGG-16 whose pools of stride 2 are pools of stride 1 and a blur: the modules of each of the five layers."""
    stages: list[list[nn.Module]] = []
    inputs = 3
    for outputs, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        stage: list[nn.Module] = [nn.MaxPool2d(2, 1), BlurPool(inputs)] if stages else []
        for _ in range(convolutions):
            stage += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]
            inputs = outputs
        stages.append(stage)
    return stages


class StLpips:
    """ST-LPIPS of frames. Equal frames have exactly the distance 0, and d(a, b) is exactly d(b, a).

    One frame at a time goes through the network, so a distance does not depend on the frames beside it.
    """

    def __init__(self, net: Net = "alex", path: Path | None = None, device: str = "cpu") -> None:
        """`path`: a file of the package's form; None: `FILES[net].find()`. UserError for another net or file."""
        self.net, self.device = known(net), device
        path = path or FILES[net].find()
        state = load_tensors(path)
        check_finite(state, path)
        self.layers = _named(_alex() if net == "alex" else _vgg())
        try:
            self.layers.load_state_dict({name[4:]: value for name, value in state.items() if name.startswith("net.")})
            heads = [
                state[f"lin{k}.model.1.weight"].reshape(1, channels, 1, 1) for k, channels in enumerate(CHANNELS[net])
            ]
            shift, scale = (state[f"scaling_layer.{name}"].reshape(1, 3, 1, 1) for name in ("shift", "scale"))
        except (RuntimeError, KeyError) as error:
            said = str(error).splitlines()[-1].strip()[:200]
            raise UserError(
                f"{path} does not hold the {net} network of ST-LPIPS: {said}. {FILES[net].how_to_get}"
            ) from error
        if any(bool((head < 0).any()) for head in heads):
            raise UserError(f"{path} holds negative weights of differences, so its values would be no distances")
        self.layers.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
        self.shift, self.scale = shift.to(device), scale.to(device)
        self.roots = [head.sqrt().to(device) for head in heads]  # w (a - b)² = (√w a - √w b)²
        self.weights_sha256 = tensors_sha256(state)

    @property
    def identity(self) -> dict[str, str]:
        return {
            "name": f"ST-LPIPS {self.net}",
            "weights_sha256": self.weights_sha256,
            "preprocessing": "RGB [-1, 1] at the clip's own size, then the network's shift and scale; "
            "the other picture resized to it",
        }

    @torch.inference_mode()
    def features(self, frame: Tensor) -> Tensor:
        """uint8 [3 h w] -> float32 [d]; the squared distance of two such vectors is ST-LPIPS.

        d grows with the size: 0.16 million at 64x64, 2.7 million (11 MB) at 256x256. UserError for a too small frame.
        """
        check_clip(frame[None], "ST-LPIPS: frame")
        height, width = frame.shape[1:]
        if min(height, width) < MIN_SIDE[self.net]:
            raise UserError(
                f"ST-LPIPS: a frame of {height}x{width} is too small; its network ({self.net}) needs "
                f"{MIN_SIDE[self.net]} pixels"
            )
        x = to_float(frame[None].to(self.device)).contiguous(memory_format=torch.channels_last)
        x = (x - self.shift) / self.scale
        parts = []
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for layer, root in zip(self.layers.values(), self.roots, strict=True):
                x = layer(x)
                unit = x / (x.norm(dim=1, keepdim=True) + 1e-10)
                part = unit.mul_(root / x[0, 0].numel() ** 0.5)
                parts.append(part.permute(0, 2, 3, 1).flatten())  # the order in memory: nothing is moved
        return torch.cat(parts)

    def distances(self, frames: Tensor | Sequence[Tensor], others: Tensor | Sequence[Tensor]) -> Tensor:
        """uint8 [n 3 h w] and [n 3 h w] -> float64 [n]. `others` may be one frame, which is embedded once."""
        if len(others) not in (1, len(frames)):
            raise ValueError(f"{len(frames)} frames and {len(others)} others: expected as many, or one other")
        only = self.features(others[0]) if len(others) == 1 else None
        found = []
        for index, frame in enumerate(frames):
            other = self.features(others[index]) if only is None else only
            found.append(squared(self.features(frame), other))
        return torch.tensor(found, dtype=torch.float64)


def squared(a: Tensor, b: Tensor) -> float:
    """The squared distance of two vectors of `StLpips.features`. Its sum is in float64."""
    return float((a - b).square_().sum(dtype=torch.float64))


def known(net: str) -> Net:
    """Return `net` if it is one of the networks. Otherwise raise UserError."""
    if net not in get_args(Net):
        raise UserError(f'ST-LPIPS net "{net}" is unknown.{near_match(net, get_args(Net))} Known: alex, vgg.')
    return net  # type: ignore[return-value]


def _named(stages: list[list[nn.Module]]) -> nn.ModuleDict:
    """The layers with the names of the package's files: slice1.0, slice1.1, ... The index counts through all layers."""
    layers, first = {}, 0
    for number, stage in enumerate(stages, start=1):
        layers[f"slice{number}"] = nn.Sequential(OrderedDict((str(first + k), m) for k, m in enumerate(stage)))
        first += len(stage)
    return nn.ModuleDict(layers)


class StLpipsMetric(ClipMetric):
    """Closeness to the input image, which is 1 for a still picture, or distance to the true clip, which is 0 for it."""

    extractor: StLpips
    extractor_options = ("net",)
    in_workers = True

    def __init__(self, card: MetricCard, extractor: StLpips) -> None:
        super().__init__(card, extractor)
        self.frames: Frames = "all" if "image" in card.needs else known_frames(card)

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value", "without_first": the mean without the first frame, "per_frame"}; see `pixels.summary_of`."""
        clip = self.check(view.clip)
        height, width = clip.shape[-2:]
        if "image" in self.card.needs:
            image = resize(view.need("image")[None], height, width)
            return summary_of("all", (1 - self.extractor.distances(clip, image)).tolist())
        true = view.need("reference")
        if len(true) != len(clip):
            raise UserError(f"{self.card.name}: {len(clip)} frames, and {len(true)} in the reference clip")
        some = counted(self.frames, len(clip))
        distances = self.extractor.distances(clip[some], resize(true[some], height, width))
        return summary_of(self.frames, distances.tolist())


@cache
def _shared(net: Net, path: Path, device: str) -> StLpips:
    return StLpips(net, path, device)


def st_lpips(net: Net = "alex", device: str = "cpu") -> StLpips:
    """The network, shared by all metrics of this process. MissingWeights says how to get its file."""
    return _shared(net, FILES[known(net)].find(), device)


def build(card: MetricCard, runtime: Any) -> StLpipsMetric:
    """Entry point of the cards `st_lpips_image` and `st_lpips`; options: net, and of the second frames."""
    return StLpipsMetric(card, st_lpips(card.options.get("net", "alex"), runtime.device))
