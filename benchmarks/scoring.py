"""Speed and memory of one scoring pass over all metrics that are at hand.

    uv run python benchmarks/scoring.py [--clips 64] [--frames 16] [--metrics fvd,kvd,motion,warp_error] [--naive]

Makes a run of `zoom` on the procedural shapes, then scores it in one streaming pass without the feature cache: clips a
second, the share of decoding and of each metric, and the resident memory after each quarter, which must not grow. With
`--naive` the same clips go through a straightforward loop (decode all, stack, networks as PyTorch lays them out).
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

from dcbench import planning, run, scoring
from dcbench.catalogue import find_dataset, find_model
from dcbench.metrics import i3d
from dcbench.metrics.extractors import I3DExtractor
from dcbench.protocol import find_protocol

QUIET = run.Options(device="cpu", quiet=True)


def resident_mb() -> float:
    """Of this process, now; what was freed and glibc keeps for later does not count."""
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


def pairs_of(job: planning.Job, clock: dict[str, float]) -> list[scoring.Pair]:
    finished = job.directory.finished_samples()
    found = []
    for entry in job.manifest:
        item, row = job.items[entry.id], finished[entry.id]
        reference = timed(clock, "decode", lambda i=item, e=entry: run.reference_clip(i, e, job.protocol)[0])
        generated = timed(clock, "decode", lambda e=entry, r=row: run.generated_clip(job, e, r))
        found.append(scoring.Pair(entry.id, reference, generated, entry.condition_frame, entry.prompt))
    return found


def streaming(job: planning.Job, names: Sequence[str]) -> tuple[float, scoring.Extracted]:
    clock: dict[str, float] = defaultdict(float)
    metrics = build(names)
    for name, metric in (metrics.sets | metrics.clips).items():  # metrics of one extractor share its features
        name = metric.extractor.identity["name"] if name in metrics.sets else name
        metric.extract = timed(clock, name, metric.extract)  # type: ignore[method-assign]
    pairs = pairs_of(job, clock)
    extracted, start = scoring.Extracted(), time.perf_counter()
    marks = {max(1, len(pairs) * quarter // 4): quarter for quarter in (1, 2, 3, 4)}
    memory = [resident_mb()]
    for index, part in enumerate(scoring.extract(pairs, metrics, None), 1):
        extracted.merge(part)
        if index in marks:
            memory.append(resident_mb())
    seconds = time.perf_counter() - start
    print(f"streaming: {len(pairs) / seconds:.3f} pairs/s, {seconds:.1f} s in all")
    print("  resident MB before, and after each quarter: " + ", ".join(f"{value:.0f}" for value in memory))
    total = sum(clock.values())
    print(f"  {total:.1f} s of all threads together:")
    for name, value in sorted(clock.items(), key=lambda entry: -entry[1]):
        print(f"  {name:24} {value:8.1f} s  {100 * value / total:5.1f} %")
    return seconds, extracted


def naive(job: planning.Job, names: Sequence[str]) -> float:
    """What a script does that was written in an hour: everything in memory, one step after the other."""
    start = time.perf_counter()
    pairs = pairs_of(job, defaultdict(float))
    real = [pair.reference() for pair in pairs if pair.reference]
    made = [pair.generated() for pair in pairs if pair.generated]
    metrics = build(names)
    if metrics.sets:
        i3d.Unit3D.forward = plain_unit  # type: ignore[method-assign]
        network = I3DExtractor().network.to(memory_format=torch.contiguous_format)
        shell = I3DExtractor()
        with torch.inference_mode():
            for clips in (real, made):
                for batch in torch.stack(clips).split(8):
                    network(_contiguous(shell.prepare(batch)))
    for metric in metrics.clips.values():
        sides = (made, real) if "reference" in metric.card.needs else (made,)
        for clips in sides:
            metric.extract(clips, [clip[0] for clip in clips], [""] * len(clips))
    seconds = time.perf_counter() - start
    print(f"naive:     {len(pairs) / seconds:.3f} pairs/s, {seconds:.1f} s in all, {resident_mb():.0f} MB resident")
    return seconds


def plain_unit(unit: i3d.Unit3D, x: Tensor) -> Tensor:
    """Pad, convolve, batch norm, ReLU: four steps, as the usual ports write them."""
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
        job = planning.plan(find_model("zoom"), find_dataset("shapes"), protocol, out=Path(folder) / "run", quiet=True)
        if len(job.manifest) < given.clips:
            sys.exit(f"the shapes have {len(job.manifest)} videos at most; ask for fewer clips")
        run.sample(job, QUIET)
        print(
            f"{given.clips} pairs of {given.frames} frames, {given.size}x{given.size} pixels; "
            f"{torch.get_num_threads()} threads"
        )
        seconds, _ = streaming(job, names)
        if given.naive:
            print(f"ratio: {naive(job, names) / seconds:.2f}")


if __name__ == "__main__":
    main()
