"""The directory of a run: its files, the processes that use it, and its finished clips. Does not import torch."""

import contextlib
import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcbench.errors import UserError
from dcbench.escape import screen
from dcbench.files import canonical, parse_jsonl, read_jsonl, sha256_file, write_text
from dcbench.members import InUse, Member, Mode
from dcbench.progress import duration

Line = dict[str, Any]  # of samples.jsonl: what is known of a finished clip
CLEANED = "its clips were removed (`dcbench clean`); `dcbench run` with the options of this run makes them again"


@dataclass
class _Log:
    """A log as it was last read."""

    at: tuple[int, int, int] = (0, 0, 0)  # inode, time of change, size
    parsed: int = 0  # bytes
    rows: dict[str, Line] = field(default_factory=dict)


class RunDirectory:
    """`plan.json request.json manifest.jsonl clips/ samples.jsonl per_clip.jsonl record.json cost.json report/ log.txt`

    While several processes make clips, each writes its own `samples-<process>.jsonl`. `mend` puts them together.
    """

    def __init__(self, path: Path):
        self.path = path
        self.plan = path / "plan.json"
        self.request = path / "request.json"
        self.manifest = path / "manifest.jsonl"
        self.folder = path / "generated.jsonl"  # only for two folders: the frames of the generated videos
        self.samples = path / "samples.jsonl"
        self.per_clip = path / "per_clip.jsonl"
        self.record = path / "record.json"
        self.cost = path / "cost.json"
        self.report = path / "report"
        self.log = path / "log.txt"  # what happened when, for people: no program reads it
        self.members = path / ".members"
        self._known: dict[str, _Log] = {}  # by file name

    @classmethod
    def of_run(cls, path: Path) -> "RunDirectory":
        """The directory of a run. UserError if there is none."""
        directory = cls(path)
        if not directory.plan.is_file():
            raise UserError(f"{path} is not a run directory: it has no plan.json. Give one that `dcbench run` made")
        return directory

    def clip(self, clip_id: str) -> Path:
        return self.path / "clips" / f"{clip_id}.mkv"

    def note(self, text: str) -> None:
        """Add a line to the log. Nothing depends on it, so a full disk is no error here."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        who = f"{platform.node()} {os.getpid()}"
        with contextlib.suppress(OSError), self.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
            for line in text.splitlines() or [""]:
                file.write(f"{now} {who}: {line}\n")
        if os.environ.get("DCBENCH_VERBOSE"):
            print(screen(text), file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def noted(self, what: str) -> Iterator[None]:
        """Log the beginning and the end of the block, or the error that ended it."""
        self.note(f"{what}: begins")
        start = time.monotonic()
        try:
            yield
        except BaseException as error:
            self.note(f"{what}: ended by {type(error).__name__} after {duration(time.monotonic() - start)}: {error}")
            raise
        self.note(f"{what}: finished after {duration(time.monotonic() - start)}")

    @contextlib.contextmanager
    def locked(self, doing: str = "", wait: bool = False) -> Iterator[Member]:
        """No other process may use the directory in the block. UserError if one does (unless `wait`)."""
        with self._entered("alone", doing, wait) as member:
            yield member

    @contextlib.contextmanager
    def shared(self, doing: str = "") -> Iterator[Member]:
        """Other processes may make clips of this run too. UserError if one must be alone, for example to score."""
        with self._entered("shared", doing, wait=False) as member:
            yield member

    @contextlib.contextmanager
    def _entered(self, mode: Mode, doing: str, wait: bool) -> Iterator[Member]:
        member = Member(self.members, doing)
        try:
            member.enter(mode, wait)
        except InUse as error:
            raise UserError(
                f"{self.path} is in use by {error}. Wait for it, stop it, or choose another directory: --out DIR"
            ) from error
        except OSError as error:
            what = "write to" if self.path.is_dir() else "create the run directory"
            raise UserError(f"cannot {what} {self.path}: {error.strerror}. Choose another: --out DIR") from error
        try:
            if mode == "alone":
                member.clear()
            yield member
        finally:
            member.leave()

    def remembered(self) -> dict[str, Any]:
        """The request that the run was started with; {} if there is none."""
        rows = read_jsonl(self.request) if self.request.is_file() else []
        return rows[0] if rows else {}

    def finished_samples(self) -> dict[str, Line]:
        """The line of each clip whose file exists, by clip id. The last line of a clip counts."""
        return {clip_id: row for clip_id, row in self._rows().items() if self.clip(clip_id).is_file()}

    def finished_sample(self, clip_id: str) -> Line | None:
        """The line of one clip. None if it has no line or no file."""
        if not self.clip(clip_id).is_file():
            return None
        return next((rows[clip_id] for rows in map(self._log, reversed(self.logs())) if clip_id in rows), None)

    def logs(self) -> list[Path]:
        """The files that have a line for each finished clip."""
        return [path for path in (self.samples, *sorted(self.path.glob("samples-*.jsonl"))) if path.is_file()]

    def _rows(self) -> dict[str, Line]:
        return {clip_id: row for path in self.logs() for clip_id, row in self._log(path).items()}

    def _log(self, path: Path) -> dict[str, Line]:
        """Whole lines of a log by clip id. If it has grown since it was last read, only the new part is parsed."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            known, now = self._known.get(path.name), (status.st_ino, status.st_mtime_ns, status.st_size)
            if known and known.at == now:
                return known.rows
            grown = known is not None and known.at[0] == status.st_ino and status.st_size > known.at[2]
            log = known if known and grown else _Log()
            file.seek(log.parsed)
            data = file.read()
        log.at = now
        log.rows |= {row["id"]: row for row in parse_jsonl(data, path, torn=True) if _is_sample(row)}
        log.parsed += data.rfind(b"\n") + 1  # a torn line may be finished later
        self._known[path.name] = log
        return log.rows

    def made_samples(self) -> dict[str, Line]:
        """The line of each clip that was made, by clip id, also of those whose file is gone."""
        return self._rows()

    def is_cleaned(self) -> bool:
        """Whether none of the clips that were made is there any more: `dcbench clean` removes them."""
        made = self._rows()
        return bool(made) and not any(self.clip(clip_id).is_file() for clip_id in made)

    def leftovers(self) -> list[Path]:
        """The incomplete files of processes that were killed."""
        return [*(self.path / "clips").glob(".*"), *self.path.glob(".*.json*-*")]

    def damaged(self) -> dict[str, str]:
        """Finished clips whose file is not the one that was written, and why, by clip id."""
        found = {}
        for clip_id, row in self._rows().items():
            file = self.clip(clip_id)
            if not file.is_file():
                found[clip_id] = "its file was removed"
            elif "file_sha256" in row and sha256_file(file) != row["file_sha256"]:
                found[clip_id] = "its file was changed"
        return found

    def mend(self) -> None:
        """After a crash or a disk error: remove incomplete files, damaged clips and damaged lines of samples.jsonl.

        Puts the logs of several processes together. Only for a process that is alone in the directory.
        """
        for leftover in self.leftovers():
            leftover.unlink(missing_ok=True)
        logs = self.logs()
        for clip_id in (lost := self.damaged()):
            self.clip(clip_id).unlink(missing_ok=True)
        kept = [row for clip_id, row in self._rows().items() if clip_id not in lost]
        lines = [line for path in logs for line in path.read_bytes().split(b"\n")]
        whole = not lost and lines[-1:] == [b""] and len(kept) == len(lines) - 1
        if logs and (logs != [self.samples] or not whole):
            write_text(self.samples, "".join(canonical(row) + "\n" for row in kept))
            for path in logs:
                if path != self.samples:
                    path.unlink()

    def append_sample(self, row: Line, process: str = "") -> None:
        """Append one line to samples.jsonl, or to the log of one of several processes, which has its name."""
        path = self.path / f"samples-{process}.jsonl" if process else self.samples
        with path.open("a", encoding="utf-8") as file:
            file.write(canonical(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_per_clip(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.per_clip, "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows))


def _is_sample(row: Line) -> bool:
    """Whether a line of samples.jsonl has what scoring needs. A disk error may leave part of a line."""
    numbers = row.get("seconds"), row.get("peak_memory_mb")
    return (
        isinstance(row.get("id"), str)
        and isinstance(row.get("sha256"), str)
        and all(isinstance(number, int | float) for number in numbers)
    )
