"""What a run will cost, before it starts: time, disk, memory, downloads. Measured on clips of the run itself."""

import os
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dcbench import machine, weights
from dcbench.catalogue import Card
from dcbench.progress import duration
from dcbench.ranks import world_size
from dcbench.runs.metrics import build_metrics, choose_metrics
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import count_workers, sample
from dcbench.runs.scoring import observe


@dataclass(frozen=True)
class Estimate:
    """What is left to do in one run. Times in seconds; None: not measured yet."""

    clips: int
    missing: int
    seconds_each: float | None  # to make a clip, in one process
    processes: int
    start: float | None  # until the first clip
    score_each: float | None  # to score a pair of clips, by all cores
    bytes_each: float  # of a clip's file
    is_measured: bool  # the clips' files; False: half of their raw size
    free: int  # bytes, on the disk of the run
    memory: float | None  # bytes, at most
    downloads: dict[str, int] = field(default_factory=dict)  # weights that are missing: bytes, 0 where not known

    @property
    def sampling(self) -> float | None:
        return None if self.seconds_each is None else self.missing * self.seconds_each / self.processes

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None: not known."""
        parts = (self.start, self.sampling, None if self.score_each is None else self.clips * self.score_each)
        return None if None in parts else sum(part for part in parts if part is not None)


def estimate(run: Run, options: Options, metrics: Sequence[str] | None = None, calibrate: int = 0) -> Estimate:
    """Estimate a run from the clips that it has, on this machine's hardware.

    `calibrate`: first make so many of the missing clips, which the run keeps, and score them without the cache.
    """
    start = score_each = None
    chosen = choose_metrics(metrics or run.protocol.metrics)
    if calibrate and run.model is not None:
        few = Run(run.directory, run.plan, run.cases[:calibrate], run.protocol, run.items, run.model)
        start = _make(few, options)
        built = build_metrics(chosen, options.runtime(), explicit=False)
        begun = time.perf_counter()
        seen = list(observe(few, list(built.built.values()), None, few.cases))
        score_each = (time.perf_counter() - begun) / len(seen)
    runtime, missing = options.runtime(), len(run.missing())
    finished = run.directory.finished_samples()
    here = [row for row in finished.values() if row.get("hardware") == machine.hardware(runtime.device)]
    sizes = [run.directory.clip(clip_id).stat().st_size for clip_id in finished]
    raw = run.protocol.num_frames * run.protocol.height * run.protocol.width * 3
    cards: list[Card] = [*chosen, *([run.model] if run.model else [])]
    return Estimate(
        clips=len(run.cases),
        missing=missing,
        seconds_each=statistics.median(row["seconds"] for row in here) if here else None,
        processes=_processes(run, options, missing),
        start=start,
        score_each=score_each,
        bytes_each=statistics.mean(sizes) if sizes else raw / 2,
        is_measured=bool(sizes),
        free=_free_disk(run),
        memory=max((row["peak_memory_mb"] * 1e6 for row in here), default=None),
        downloads={
            source.name: source.size for card in cards for source in card.weights if weights.find(source) is None
        },
    )


def _make(run: Run, options: Options) -> float | None:
    """Make the missing clips of a few cases. Returns the seconds until the first clip; None if none was missing."""
    missing = run.missing()
    if not missing:
        return None
    begun = time.perf_counter()
    sample(run, options)
    passed = time.perf_counter() - begun
    rows = run.directory.finished_samples()
    spent = sum(rows[case.id]["seconds"] for case in missing if case.id in rows)
    return max(0.0, passed - spent / _processes(run, options, len(missing)))


def _processes(run: Run, options: Options, clips: int) -> int:
    """How many processes make so many clips at once."""
    if options.ray:
        return options.ray.workers or 1
    return world_size() if world_size() > 1 else count_workers(run, options, clips)


def lines(found: Estimate, device: str) -> list[str]:
    """The estimate in words, for a terminal."""
    how = f"{found.seconds_each:.2f} s a clip" if found.seconds_each is not None else "not known: --calibrate 2"
    if found.seconds_each is not None and found.processes > 1:
        how += f" in each of {found.processes} processes"
    said = [f"to make      {found.missing} of {found.clips} clips, {how}"]
    if found.seconds is not None:
        parts = f"start {duration(found.start or 0)}, clips {duration(found.sampling or 0)}"
        scoring = duration(found.clips * (found.score_each or 0))
        said.append(f"time         {duration(found.seconds)} on {device}: {parts}, scoring {scoring}")
    elif found.sampling is not None:
        said.append(f"time         {duration(found.sampling)} on {device} for the clips")
    size = weights.human_size(round(found.missing * found.bytes_each))
    about = "" if found.is_measured else ", about"
    said.append(f"disk         {size} for the clips{about}; {weights.human_size(found.free)} are free")
    if found.memory is not None:
        said.append(f"memory       {found.memory / 1e9:.1f} GB at most, of {_memory() / 1e9:.1f} GB")
    for name, number in found.downloads.items():
        said.append(f"missing      {name}, {weights.human_size(number)}")
    return said


def _memory() -> int:
    """Bytes of the GPU, or of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_disk(run: Run) -> int:
    """Bytes that are free where a run's clips go."""
    path = run.directory.path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
