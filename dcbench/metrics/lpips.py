"""LPIPS of a clip and its true clip (Zhang et al., arXiv 1801.03924): heads of version 0.1, by torchmetrics.

The heads come with torchmetrics. The trunk is torchvision's AlexNet or VGG-16, a file that the user has or fetches.
Input: RGB in [-1, 1] at the clip's own size.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS  # the public function would download the trunk

from dcbench.catalogue import MetricCard
from dcbench.clips import to_float
from dcbench.errors import UserError
from dcbench.metrics.pixels import OfReference
from dcbench.weights import fetch, fill, load_tensors, tensors_sha256

NETS = ("alex", "vgg")
SMALLEST = 32  # pixels: below, AlexNet's last maps are empty
BATCH = 8  # frames


class Lpips:
    """LPIPS of frames, by a network with the trunk of a file."""

    def __init__(self, net: str, trunk: Path, device: str = "cpu") -> None:
        with torch.random.fork_rng(devices=[]):  # its random weights are replaced below
            network = _LPIPS(net=net, pnet_rand=True)  # type: ignore[arg-type]
        given = load_tensors(trunk)
        wanted = network.net.state_dict()
        # torchvision's features.3.weight is slice2.3.weight here
        names = {name: re.sub(r"slice\d+", "features", name) for name in wanted}
        if missing := [name for name in names.values() if name not in given]:
            raise UserError(f"{trunk} is no {net} trunk of torchvision: it has no {missing[0]}")
        fill(network.net, {name: given[source] for name, source in names.items()}, trunk)
        self.network = network.to(device).eval()
        self.net, self.device, self.weights_sha256 = net, device, tensors_sha256(network.state_dict())

    @property
    def identity(self) -> dict[str, str]:
        return {
            "name": f"torchmetrics LPIPS v0.1, {self.net}",
            "weights_sha256": self.weights_sha256,
            "preprocessing": "RGB -1..1 at the clip's own size",
        }

    @torch.inference_mode()
    def __call__(self, frames: Tensor, others: Tensor) -> Tensor:
        """uint8 [t 3 h w] twice -> float64 [t], 0 for equal frames."""
        height, width = frames.shape[-2:]
        if min(height, width) < SMALLEST:
            raise UserError(f"LPIPS needs frames of at least {SMALLEST} pixels, got {height}x{width}")
        found = []
        for start in range(0, len(frames), BATCH):
            sides = (to_float(side[start : start + BATCH].to(self.device)) for side in (frames, others))
            found.append(self.network(*sides).flatten().double().cpu())
        return torch.cat(found)


@cache
def _shared(net: str, trunk: Path, device: str) -> Lpips:
    return Lpips(net, trunk, device)


def build(card: MetricCard, runtime: Any) -> OfReference:
    """Entry point of the cards lpips and lpips_middle; options: net, frames, over_samples."""
    net = card.options.get("net")
    if net not in NETS:
        raise UserError(f'{card.name}: net is "{net}"; allowed: {", ".join(NETS)}')
    source = next(source for source in card.weights if source.name.startswith(net))
    measure = _shared(net, fetch(source, runtime.offline), runtime.device)
    return OfReference(card, measure, measure)
