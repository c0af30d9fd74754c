"""The directory of a run: its files, its lock, and its finished clips. Does not import torch."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dcbench.errors import UserError
from dcbench.files import canonical, read_jsonl, sha256_file, write_text


class RunDirectory:
    """`plan.json request.json manifest.jsonl clips/ samples.jsonl per_clip.jsonl record.json cost.json report/`"""

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
        self._read: tuple[Any, dict[str, dict[str, Any]]] = (None, {})  # of samples.jsonl: time and size, rows

    def clip(self, clip_id: str) -> Path:
        return self.path / "clips" / f"{clip_id}.mkv"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory. UserError if it cannot be written, or if another process has locked it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot create the run directory {self.path}: {error.strerror}. Choose another: --out DIR"
            ) from error
        lock = FileLock(self.path / ".lock")
        owner = self.path / ".owner"
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            who = owner.read_text() if owner.is_file() else "another process"
            raise UserError(
                f"{self.path} is in use by {who}. Wait for it, stop it, or choose another directory: --out DIR"
            ) from error
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror}. Choose another: --out DIR") from error
        try:
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def remembered(self) -> dict[str, Any]:
        """The request that the run was started with; {} if there is none."""
        rows = read_jsonl(self.request) if self.request.is_file() else []
        return rows[0] if rows else {}

    def finished_samples(self) -> dict[str, dict[str, Any]]:
        """The line in samples.jsonl of each clip whose file exists, by clip id. The last line of a clip counts."""
        return {clip_id: row for clip_id, row in self._rows().items() if self.clip(clip_id).is_file()}

    def finished_sample(self, clip_id: str) -> dict[str, Any] | None:
        """The line in samples.jsonl of one clip. None if it has no line or no file."""
        return self._rows().get(clip_id) if self.clip(clip_id).is_file() else None

    def _rows(self) -> dict[str, dict[str, Any]]:
        """Whole lines of samples.jsonl by clip id. The file is parsed again only if it has changed."""
        if not self.samples.is_file():
            return {}
        status = self.samples.stat()
        now = status.st_mtime_ns, status.st_size
        if self._read[0] != now:
            rows = read_jsonl(self.samples, torn=True)
            self._read = now, {row["id"]: row for row in rows if _is_sample(row)}
        return self._read[1]

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
        """After a crash or a disk error: remove incomplete files, damaged clips and damaged lines of samples.jsonl."""
        for leftover in [*(self.path / "clips").glob(".*"), *self.path.glob(".*.json*-*")]:
            leftover.unlink(missing_ok=True)
        if not self.samples.is_file():
            return
        for clip_id in (lost := self.damaged()):
            self.clip(clip_id).unlink(missing_ok=True)
        kept = [row for clip_id, row in self._rows().items() if clip_id not in lost]
        lines = self.samples.read_bytes().split(b"\n")
        if lost or lines[-1] or len(kept) < len(lines) - 1:
            write_text(self.samples, "".join(canonical(row) + "\n" for row in kept))

    def append_sample(self, row: dict[str, Any]) -> None:
        """Append one line to samples.jsonl. Several ranks of a run may do this at the same time."""
        with FileLock(self.path / ".samples.lock"), self.samples.open("a", encoding="utf-8") as file:
            file.write(canonical(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_per_clip(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.per_clip, "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows))


def _is_sample(row: dict[str, Any]) -> bool:
    """Whether a line of samples.jsonl has what scoring needs. A disk error may leave part of a line."""
    numbers = row.get("seconds"), row.get("peak_memory_mb")
    return (
        isinstance(row.get("id"), str)
        and isinstance(row.get("sha256"), str)
        and all(isinstance(number, int | float) for number in numbers)
    )
