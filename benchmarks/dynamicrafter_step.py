"""One guided DDIM step of the mid-size U-Net: the plain form, all savings, and all savings but one.

    OMP_NUM_THREADS=1 python benchmarks/dynamicrafter_step.py [--rounds 5] [--full]

Mid size: 128 channels x [1, 2, 4], context 512, 16 frames of 16x16 latents, guidance with two branches. The variants
take turns in one process. The least CPU time of all rounds counts, because other load on the machine only adds time.
`--full` runs one forward of the 256 model's U-Net instead (random weights, 8 GB).
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import dynamicrafter_plain as plain
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dcbench.models.dynamicrafter import attention
from dcbench.models.dynamicrafter.attention import FeedForward
from dcbench.models.dynamicrafter.autoencoder import Autoencoder
from dcbench.models.dynamicrafter.config import VARIANTS, AutoencoderConfig, UNetConfig
from dcbench.models.dynamicrafter.unet import TemporalConv, UNet

STEPS = 50  # sampling steps that share the keys and values of a context


def build(cfg: UNetConfig) -> UNet:
    """Random weights, none of them zero."""
    torch.manual_seed(0)
    unet = UNet(cfg).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any() and parameter.ndim:
            torch.nn.init.normal_(parameter, std=0.03)
    return unet


@contextmanager
def changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def all_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("...id,...jd->...ij", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("...ij,...jd->...id", scores.softmax(dim=-1), v)


def three_dimensional(self: TemporalConv, x: Tensor, frames: int) -> Tensor:
    clip = x.unflatten(0, (-1, frames)).transpose(1, 2).contiguous()
    out = F.conv3d(clip, self.weight, self.bias, padding=(1, 0, 0))
    return out.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def least(runs: dict[str, Callable[[], Tensor]], rounds: int) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The least CPU seconds of each run over all rounds, and its output."""
    seconds, outputs = dict.fromkeys(runs, float("inf")), {}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            outputs[name] = run()
            seconds[name] = min(seconds[name], time.process_time() - start)
    return seconds, outputs


def peak() -> float:
    """GFLOP/s per CPU second of a square matrix product."""
    a = torch.randn(1536, 1536)
    seconds, _ = least({"product": lambda: a @ a}, 8)
    return 2 * 1536**3 / seconds["product"] / 1e9


def flops(run: Callable[[], Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def step(rounds: int) -> int:
    cfg = UNetConfig(
        model_channels=128, channel_mult=(1, 2, 4), context_dim=512, learnable_image_scale=True, dropout=0.0
    )
    unet = build(cfg)
    x, contexts = torch.randn(1, 8, 16, 16, 16), torch.randn(2, 77 + 16 * 16, 512)
    t, fs = torch.tensor([500]), torch.tensor([3])
    projected = unet.project_context(contexts, 16)
    singly = [unet.project_context(context[None], 16) for context in contexts]

    def plain_step() -> Tensor:
        return torch.cat([plain.forward(unet, x, t, context[None], fs) for context in contexts])

    def fast_step() -> Tensor:
        return unet(x, t, projected, fs)

    def without(owner: Any, name: str, value: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with changed(owner, name, value):
                return fast_step()

        return run

    runs: dict[str, Callable[[], Tensor]] = {
        "plain form": plain_step,
        "all savings": fast_step,
        "without fused attention": without(attention, "attend", all_scores),
        "without the shared prefix": lambda: torch.cat([unet(x, t, one, fs) for one in singly]),
        "without cached keys and values": lambda: unet(x, t, contexts, fs),
        "without 2-D temporal convolutions": without(TemporalConv, "forward", three_dimensional),
        "without feed-forward in cached blocks": without(FeedForward, "rows", 1 << 40),
    }
    seconds, outputs = least(runs, rounds)
    once, _ = least({"project": lambda: unet.project_context(contexts, 16)[0][0].text_k}, rounds)
    seconds["all savings"] += once["project"] / STEPS
    work, best = flops(plain_step), peak()
    reference = outputs["plain form"]
    bound = 1e-5 * max(1.0, float(reference.abs().max()))
    print("| form | CPU s | of the plain form | max abs difference |\n|---|---|---|---|")
    for name in runs:
        error = float((outputs[name] - reference).abs().max())
        print(f"| {name} | {seconds[name]:.3f} | {seconds[name] / seconds['plain form']:.3f} | {error:.1e} |")
    ratio = seconds["plain form"] / seconds["all savings"]
    print(f"\nplain / all savings = {ratio:.2f}; differences must be below {bound:.1e}")
    print(f"{work / 2e9:.1f} GFLOP a forward in the plain form; {best:.0f} GFLOP/s matrix-product peak of one thread:")
    for name in ("plain form", "all savings"):
        rate = work / seconds[name] / 1e9
        print(f"  {name}: {rate:.0f} GFLOP/s of the plain form's work = {rate / best:.0%} of the peak")
    encoder()
    worst = max(float((output - reference).abs().max()) for output in outputs.values())
    return 0 if ratio >= 1.3 and worst <= bound else 1


def encoder() -> None:
    """The released code encodes sixteen copies of the picture and uses one."""
    network = Autoencoder(AutoencoderConfig(channels=64)).eval().requires_grad_(False)
    frames = torch.randn(16, 3, 64, 64)
    seconds, _ = least({"16": lambda: network.to_latents(frames), "1": lambda: network.to_latents(frames[:1])}, 3)
    print(f"encoding one frame (64 channels, 64x64): {seconds['1']:.3f} CPU s a clip; sixteen: {seconds['16']:.3f}")


def full() -> int:
    unet = build(VARIANTS["256"].unet)
    x, context = torch.randn(1, 8, 16, 32, 32), torch.randn(1, 77 + 256, 1024)
    cpu, wall = time.process_time(), time.perf_counter()
    out = unet(x, torch.tensor([500]), context, torch.tensor([3]))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"256, one forward: {cpu:.1f} CPU s, {wall:.1f} s, {4903 / cpu:.0f} GFLOP/s; "
        f"peak {memory:.1f} GiB; output finite: {bool(out.isfinite().all())}, std {float(out.std()):.3f}"
    )
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true")
    given = parser.parse_args()
    with torch.no_grad():
        sys.exit(full() if given.full else step(given.rounds))
