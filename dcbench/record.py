"""The files of a run: the plan, the manifest, and the record that reports are made from. Does not import torch.

`record.json` is the same for an interrupted and an uninterrupted run. The cost of a run (seconds, memory, hardware,
dates) is in `cost.json`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dcbench.errors import UserError
from dcbench.facts import validate
from dcbench.files import canonical, read_json, read_jsonl, write_text

SCHEMA_VERSION = 1


class Stored(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Case(Stored):
    """One clip to make, a line of the manifest: its reference frames, and its conditions."""

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
    # the clip of another video that metrics of sets compare with (protocol: reference_videos = "disjoint")
    apart: "Case | None" = Field(default=None, exclude_if=lambda apart: apart is None)


class Excluded(Stored):
    """A video that the protocol chose but that could not be used."""

    id: str
    reason: str
    rule: str  # "short": too short for the protocol, replaced; "unreadable": not replaced, so n is smaller


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


class Replicates(Stored):
    """A score without one block of independent clips each: its uncertainty, and that of its difference from another.

    Two runs on the same clips have the same blocks, so they are compared from their records alone.
    """

    design: str  # equal for runs whose clips have the same groups (dcbench.metrics.design)
    strata: list[list[tuple[float, float]]]  # of each block: all clips / its clips, and the value without it
    biased: bool = False  # the value falls with the number of clips, as FVD does


class Score(Stored):
    """One number with its interval and origin. `score_all` adds metric, extractor and fingerprint."""

    value: float | None
    ci95: tuple[float, float] | None = None
    ci_method: str = ""
    n_reference: int = 0
    n_generated: int = 0
    n_groups: int | None = None  # independent source videos or inputs; None in older records
    replicates: Replicates | None = None
    higher_is_better: bool | None = None
    metric: dict[str, Any] = {}  # its name, version and options; {} in older records
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
    scores: dict[str, Score]  # by metric; the name includes options that differ from the card's
    n_planned: int
    n_scored: int
    failures: list[Failure] = []
    clips_sha256: str  # of all clip hashes in the manifest's order
    decoders: dict[str, int] = {}  # reference clips read by each decoder


class Cost(Stored):
    """The cost of a run. It differs from one execution to the next."""

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


def write_manifest(path: Path, items: Iterable[Case]) -> None:
    write_text(path, "".join(canonical(item.model_dump(mode="json")) + "\n" for item in items))


def read_manifest(path: Path) -> list[Case]:
    """Read a manifest. UserError if ids are not unique or not safe as file names."""
    items = [validate(row, Case, f"{path}, line {number}") for number, row in enumerate(read_jsonl(path), start=1)]
    if not items:
        raise UserError(f"{path} lists no clips; expected one JSON object per line, as in the manifest.jsonl of a run")
    seen: set[str] = set()
    for item in with_apart(items):
        check_clip_id(item.id)
        if item.id in seen:
            raise UserError(f'{path}: the clip id "{item.id}" appears twice')
        seen.add(item.id)
    return items


def with_apart(cases: Sequence[Case]) -> list[Case]:
    """The cases, and then the clips of other videos that they are compared with."""
    return [*cases, *(case.apart for case in cases if case.apart)]


def check_clip_id(clip_id: str) -> str:
    """Return the id if it is safe as a file name. Otherwise raise UserError."""
    if (
        not clip_id
        or clip_id.startswith(".")
        or any(char in clip_id for char in '/\\\0:*?"<>|\n\r')
        or len(clip_id) > 180
    ):
        raise UserError(f"clip id {clip_id!r} cannot be a file name: use letters, digits, '_', '-', '.' (180 at most)")
    return clip_id


def _read(path: Path, kind: type[BaseModel]) -> Any:
    data = read_json(path)
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
