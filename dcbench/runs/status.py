"""How far a run is, from its directory alone: nothing is written, and no process is asked. Does not import torch."""

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from dcbench.files import read_json, read_jsonl
from dcbench.members import Seen, present
from dcbench.progress import duration
from dcbench.runs.directory import CLEANED, RunDirectory

RECENT = 3600.0  # seconds before the last clip that the rate is measured over
ALONE = "one process"


@dataclass(frozen=True)
class Process:
    """What one process has done in a run."""

    name: str
    finished: int
    last: float  # seconds since its last clip; negative: it has none
    seconds: float  # a clip, by its own clock; 0: not known
    now: str  # what it does now; "": it has ended


@dataclass(frozen=True)
class Status:
    path: Path
    planned: int
    finished: int
    missing: tuple[str, ...]  # ids
    unreadable: tuple[str, ...]  # ids of videos that the plan left out
    is_scored: bool
    is_cleaned: bool  # its clips were removed
    processes: tuple[Process, ...]
    rate: float  # clips a second of all processes together; 0: not known

    @property
    def seconds_left(self) -> float | None:
        """Until the last clip, at the present rate; None: not known."""
        return len(self.missing) / self.rate if self.rate else None


def status(path: Path) -> Status:
    """How far a run is. UserError if the directory holds no plan."""
    directory = RunDirectory.of_run(path)
    ids = [str(row.get("id")) for row in read_jsonl(directory.manifest)]
    finished = directory.finished_samples()
    times = {clip_id: directory.clip(clip_id).stat().st_mtime for clip_id in finished}
    excluded = read_json(directory.plan).get("excluded", [])
    return Status(
        path,
        len(ids),
        sum(clip_id in finished for clip_id in ids),
        tuple(clip_id for clip_id in ids if clip_id not in finished),
        tuple(str(entry.get("id")) for entry in excluded if entry.get("rule") == "unreadable"),
        directory.record.is_file(),
        directory.is_cleaned(),
        tuple(_processes(finished, times, present(directory.members))),
        _rate(sorted(times.values())),
    )


def _processes(finished: dict[str, dict[str, object]], times: dict[str, float], here: list[Seen]) -> list[Process]:
    made: dict[str, list[str]] = defaultdict(list)
    for clip_id, row in finished.items():
        made[str(row.get("process", ALONE))].append(clip_id)
    doing = {seen.name: seen.doing or "here" for seen in here}
    now, processes = time.time(), []
    for name in sorted({*made, *doing}):
        seconds = [row["seconds"] for row in (finished[clip_id] for clip_id in made[name])]
        numbers = [number for number in seconds if isinstance(number, int | float)]
        last = now - max(times[clip_id] for clip_id in made[name]) if made[name] else -1.0
        mean = sum(numbers) / len(numbers) if numbers else 0.0
        processes.append(Process(name, len(made[name]), last, mean, doing.get(name, "")))
    return processes


def _rate(times: list[float]) -> float:
    """Clips a second, over the last hour in which clips were made."""
    recent = [moment for moment in times if moment >= times[-1] - RECENT]
    passed = recent[-1] - recent[0] if len(recent) > 1 else 0.0
    return (len(recent) - 1) / passed if passed > 0 else 0.0


def lines(found: Status) -> list[str]:
    """The status in words, for a terminal."""
    said = [f"{found.path}: {found.finished} of {found.planned} clips are finished"]
    if found.is_cleaned:
        said.append(f"{'scored' if found.is_scored else 'not scored'}; {CLEANED}")
    elif found.missing:
        left = found.seconds_left
        soon = f"; at this rate {duration(left)} left" if left is not None else ""
        speed = f", {found.rate * 3600:.0f} clips an hour{soon}" if found.rate else ""
        said.append(f"missing: {len(found.missing)}{speed}")
    elif not found.is_scored:
        said.append("not scored yet: dcbench score RUN, or the command that began it")
    else:
        said.append("scored")
    if found.unreadable:
        said.append(f"unreadable videos, left out when the run was planned: {len(found.unreadable)}")
    for process in found.processes:
        last = f", the last one {duration(process.last)} ago" if process.last >= 0 else ""
        speed = f" ({duration(process.seconds)} each)" if process.seconds else ""
        said.append(f"  {process.name}: {process.finished} clips{speed}{last}; {process.now or 'it has ended'}")
    return said
