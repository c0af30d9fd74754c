"""Speed and memory of one scoring pass over the chosen metrics.

    uv run python benchmarks/scoring.py [--clips 64] [--frames 16] [--metrics fvd,kvd,motion,warp_error] [--naive]

Makes a run of `zoom` on the procedural shapes, then scores it in one streaming pass without the feature cache. Prints
clips per second, the share of decoding and of each metric, and the resident memory after each quarter, which must not
grow. With `--naive`, a simple loop scores the same clips (decode all, stack, PyTorch's default memory layout).
"""

import argparse
import ctypes
import resource
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dcbench.catalogue import find_dataset, find_model
from dcbench.metrics import SetMetric, View, i3d
from dcbench.metrics.extractors import I3DExtractor
from dcbench.protocol import find_protocol
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.run import Options, Run

QUIET = Options(device="cpu", quiet=True)


def resident_mb() -> float:
    """Resident memory of this process. Freed memory that glibc keeps is not counted."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def timed(clock: dict[str, float], name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **options)
        finally:
            clock[name] += time.perf_counter() - start

    return wrapped


def build(names: Sequence[str]) -> scoring.Metrics:
    return scoring.build_metrics(scoring.choose_metrics(list(names)), QUIET.runtime(), explicit=True)


def streaming(run: Run, names: Sequence[str]) -> float:
    clock: dict[str, float] = defaultdict(float)
    metrics = list(build(names).built.values())
    for metric in metrics:  # metrics of one extractor share its features
        name = metric.extractor.identity["name"] if isinstance(metric, SetMetric) else metric.card.name
        metric.observe = timed(clock, name, metric.observe)  # type: ignore[method-assign]
    run.reference = timed(clock, "decode", run.reference)  # type: ignore[method-assign]
    run.generated = timed(clock, "decode", run.generated)  # type: ignore[method-assign]
    start = time.perf_counter()
    marks = {max(1, len(run.cases) * quarter // 4): quarter for quarter in (1, 2, 3, 4)}
    memory, seen = [resident_mb()], scoring.Seen()
    for index, part in enumerate(scoring.observe(run, metrics, None, run.cases), 1):
        seen.merge(part)
        if index in marks:
            memory.append(resident_mb())
    seconds = time.perf_counter() - start
    print(f"streaming: {len(run.cases) / seconds:.3f} pairs/s, {seconds:.1f} s in all")
    print("  resident MB before, and after each quarter: " + ", ".join(f"{value:.0f}" for value in memory))
    total = sum(clock.values())
    print(f"  {total:.1f} s of all threads together:")
    for name, value in sorted(clock.items(), key=lambda entry: -entry[1]):
        print(f"  {name:24} {value:8.1f} s  {100 * value / total:5.1f} %")
    return seconds


def naive(run: Run, names: Sequence[str]) -> float:
    """A simple script: everything in memory, one step after the other."""
    start = time.perf_counter()
    real = [run.reference(case)[0] for case in run.cases]
    made = [run.generated(case) for case in run.cases]
    metrics = build(names).built.values()
    if any(isinstance(metric, SetMetric) for metric in metrics):
        i3d.Unit3D.forward = plain_unit  # type: ignore[method-assign]
        network = I3DExtractor().network.to(memory_format=torch.contiguous_format)
        shell = I3DExtractor()
        with torch.inference_mode():
            for clips in (real, made):
                for batch in torch.stack(clips).split(8):
                    network(_contiguous(shell.prepare(batch)))
    for metric in (metric for metric in metrics if not isinstance(metric, SetMetric)):
        for clip in (*made, *(real if metric.observes_reference else ())):
            metric.observe(View(clip, clip[0], ""))
    seconds = time.perf_counter() - start
    count = len(run.cases)
    print(f"naive:     {count / seconds:.3f} pairs/s, {seconds:.1f} s in all, {resident_mb():.0f} MB resident")
    return seconds


def plain_unit(unit: i3d.Unit3D, x: Tensor) -> Tensor:
    """Pad, convolve, batch norm, ReLU: four steps, as in common ports."""
    totals = [
        max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(x.shape[2:], unit.kernel, unit.stride, strict=True)
    ]
    x = F.pad(x, [side for total in reversed(totals) for side in (total // 2, total - total // 2)])
    x = unit.conv3d(x)
    return x if unit.bn is None else F.relu(unit.bn(x))


def _contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--metrics", default="fvd,kvd,motion,warp_error")
    parser.add_argument("--naive", action="store_true")
    given = parser.parse_args()
    names = given.metrics.split(",")
    update = {"num_frames": given.frames, "height": given.size, "width": given.size, "num_clips": given.clips}
    update |= {"datasets": {}, "frame_stride": 1}
    protocol = find_protocol("smoke").model_copy(update=update)
    with tempfile.TemporaryDirectory() as folder:
        run = planning.plan(find_model("zoom"), find_dataset("shapes"), protocol, out=Path(folder) / "run", quiet=True)
        if len(run.cases) < given.clips:
            sys.exit(f"the shapes have {len(run.cases)} videos at most; ask for fewer clips")
        sampling.sample(run, QUIET)
        print(
            f"{given.clips} pairs of {given.frames} frames, {given.size}x{given.size} pixels; "
            f"{torch.get_num_threads()} threads"
        )
        seconds = streaming(run, names)
        if given.naive:
            print(f"ratio: {naive(run, names) / seconds:.2f}")


if __name__ == "__main__":
    main()
