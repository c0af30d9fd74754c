"""A run's directory: its files, its lock, and what of it is already done. No torch here."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dcbench.errors import UserError
from dcbench.record import canonical, read_jsonl, write_text


class RunDirectory:
    """`plan.json manifest.jsonl clips/ samples.jsonl per_clip.jsonl record.json cost.json report/`"""

    def __init__(self, path: Path):
        self.path = path
        self.plan = path / "plan.json"
        self.manifest = path / "manifest.jsonl"
        self.samples = path / "samples.jsonl"
        self.per_clip = path / "per_clip.jsonl"
        self.record = path / "record.json"
        self.cost = path / "cost.json"
        self.report = path / "report"

    def clip(self, clip_id: str) -> Path:
        return self.path / "clips" / f"{clip_id}.mkv"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory; a second process is told who holds it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"cannot make the run directory {self.path}: {error.strerror}. Choose another: --out DIR"
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

    def finished_samples(self) -> dict[str, dict[str, Any]]:
        """The sample line of each clip whose file is here. The last line of a clip counts."""
        if not self.samples.is_file():
            return {}
        rows = {row["id"]: row for row in read_jsonl(self.samples, tolerate_torn_end=True) if "id" in row}
        return {clip_id: row for clip_id, row in rows.items() if self.clip(clip_id).is_file()}

    def mend(self) -> None:
        """After a crash: remove half-written files and a torn last line, which the next would continue."""
        for leftover in [*(self.path / "clips").glob(".*"), *self.path.glob(".*.json*-*")]:
            leftover.unlink(missing_ok=True)
        if self.samples.is_file():
            text = self.samples.read_text(encoding="utf-8")
            if text and not text.endswith("\n"):
                write_text(self.samples, text[: text.rfind("\n") + 1])

    def append_sample(self, row: dict[str, Any]) -> None:
        """Add one line; safe when several ranks of one run write."""
        with FileLock(self.path / ".samples.lock"), self.samples.open("a", encoding="utf-8") as file:
            file.write(canonical(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_per_clip(self, rows: list[dict[str, Any]]) -> None:
        write_text(self.per_clip, "".join(json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in rows))
