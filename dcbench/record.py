"""What a run leaves behind: the plan, the manifest, and the record that reports are made from. No torch here.

`record.json` holds nothing that differs between an undisturbed and an interrupted run; what a run cost (seconds,
memory, hardware, dates) stands beside it in `cost.json`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from dcbench.catalogue import validate
from dcbench.errors import UserError

SCHEMA_VERSION = 1


class Stored(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ManifestItem(Stored):
    """One clip: which frames of which video, conditioned on what."""

    id: str
    video: str  # path relative to the dataset's root
    frames: list[int]  # source frames, in order
    condition_frame: int = 0  # which of `frames` is the input image
    fps: float  # of the clip: the source's frame rate / frame_stride
    frame_stride: int
    prompt: str
    caption_index: int
    label: str | None = None
    group: str | None = None
    seed: int


class Excluded(Stored):
    """A video that the protocol wanted and that could not be used; counted, never replaced silently."""

    id: str
    reason: str
    rule: str  # "short": dropped by the protocol's rule and replaced; "unreadable": lost, counts against n


class Plan(Stored):
    """Everything that decides a run's clips and numbers."""

    dcbench: str
    model: dict[str, Any]  # the resolved card
    dataset: dict[str, Any]
    protocol: dict[str, Any]
    seed: int
    limit: int | None
    fingerprint: str
    excluded: list[Excluded]
    versions: dict[str, str]


class Score(Stored):
    """One number with what is needed to trust it."""

    value: float | None
    ci95: tuple[float, float] | None = None
    ci_method: str = ""
    n_reference: int = 0
    n_generated: int = 0
    higher_is_better: bool | None = None
    extractor: dict[str, str] = {}
    fingerprint: str = ""
    warnings: list[str] = []
    details: dict[str, Any] = {}
    reason: str | None = None  # why value is None, and what to do


class Failure(Stored):
    """A clip that could not be scored, and why."""

    id: str
    reason: str


class Record(Stored):
    schema_version: int = SCHEMA_VERSION
    plan: Plan
    scores: dict[str, Score]
    n_planned: int
    n_scored: int
    failures: list[Failure] = []
    clips_sha256: str  # of all clip hashes in the manifest's order
    decoders: dict[str, int] = {}  # which decoder read how many reference clips


class Cost(Stored):
    """What a run took; differs from one execution to the next."""

    seconds_per_clip: float | None = None
    peak_memory_mb: float | None = None
    sample_seconds: float = 0
    score_seconds: float = 0
    device: str = ""
    dtype: str = ""
    hardware: str = ""
    git_commit: str = ""
    finished: str = ""
    details: dict[str, Any] = {}


def canonical(value: Any) -> str:
    """JSON with one spelling: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def write_json(path: Path, value: BaseModel) -> None:
    write_text(path, json.dumps(value.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_manifest(path: Path, items: Iterable[ManifestItem]) -> None:
    write_text(path, "".join(canonical(item.model_dump(mode="json")) + "\n" for item in items))


def read_jsonl(path: Path, tolerate_torn_end: bool = False) -> list[dict[str, Any]]:
    """Lines of a JSONL file. With `tolerate_torn_end`, a last line cut off by a crash is left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            rows.append(row)
        except ValueError as error:
            if tolerate_torn_end and number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a JSON object ({error})") from error
    return rows


def read_manifest(path: Path) -> list[ManifestItem]:
    """A manifest; ids must be unique and safe as file names."""
    items = [
        validate(row, ManifestItem, f"{path}, line {number}") for number, row in enumerate(read_jsonl(path), start=1)
    ]
    if not items:
        raise UserError(f"{path} lists no clips; expected one JSON object a line, as dcbench writes manifest.jsonl")
    seen: set[str] = set()
    for item in items:
        check_clip_id(item.id)
        if item.id in seen:
            raise UserError(f'{path}: the clip id "{item.id}" stands there twice')
        seen.add(item.id)
    return items


def check_clip_id(clip_id: str) -> str:
    """A clip id becomes a file name: nothing in it may lead elsewhere."""
    if (
        not clip_id
        or clip_id.startswith(".")
        or any(char in clip_id for char in '/\\\0:*?"<>|\n\r')
        or len(clip_id) > 180
    ):
        raise UserError(f"clip id {clip_id!r} cannot be a file name: use letters, digits, '_', '-', '.' (180 at most)")
    return clip_id


def _read(path: Path, kind: type[BaseModel]) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    version = data.get("schema_version", SCHEMA_VERSION) if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path} has schema version {version}; this dcbench reads version {SCHEMA_VERSION}")
    return validate(data, kind, str(path))


def read_plan(run: Path) -> Plan:
    return _read(run / "plan.json", Plan)


def read_record(run: Path) -> Record:
    """The record of a run directory (or of a record.json)."""
    path = run / "record.json" if run.is_dir() else run
    if not path.is_file():
        raise UserError(
            f"no record at {path}: the run is not finished. `dcbench run` with the same options continues it"
        )
    return _read(path, Record)


def read_cost(run: Path) -> Cost | None:
    path = (run if run.is_dir() else run.parent) / "cost.json"
    return _read(path, Cost) if path.is_file() else None
