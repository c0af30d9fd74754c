"""The files of a run: the plan, the manifest, and the record that reports are made from. Does not import torch.

`record.json` is the same for an interrupted and an uninterrupted run. The cost of a run (seconds, memory, hardware,
dates) is in `cost.json`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from dcbench.errors import UserError
from dcbench.facts import validate
from dcbench.files import canonical, read_json, read_jsonl, write_text

SCHEMA_VERSION = 1
UNSAFE = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f-\x9f]')  # in a file name, or on a terminal


class Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def _with_strings(*keys: str) -> AfterValidator:
    """A card that has at least these strings. Reports use them; the rest of a recorded card is shown as it is."""

    def check(card: dict[str, Any]) -> dict[str, Any]:
        if missing := [key for key in keys if not isinstance(card.get(key), str)]:
            raise ValueError(f"it has no {missing[0]}")
        return card

    return AfterValidator(check)


class Case(Stored):
    """One clip to make, a line of the manifest: its reference frames, and its conditions."""

    id: str
    video: str  # path relative to the dataset's root
    frames: list[NonNegativeInt]  # source frames, in order
    condition_frame: NonNegativeInt = 0  # which of `frames` is the input image
    fps: float = Field(gt=0)  # of the clip: the source's frame rate / frame_stride
    frame_stride: PositiveInt
    prompt: str
    caption_index: int
    label: str | None = None
    group: str | None = None
    seed: int
    # a chunk of a video (protocol: chunks = "all"): the video's item in the data set
    source: str | None = Field(default=None, exclude_if=lambda source: source is None)
    # several clips of one input: the item that they belong to, and which of its clips this is. None: the only one
    item: str | None = Field(default=None, exclude_if=lambda item: item is None)
    sample: NonNegativeInt | None = Field(default=None, exclude_if=lambda sample: sample is None)
    # the clip of another video that metrics of sets compare with (protocol: reference_videos = "disjoint")
    apart: "Case | None" = Field(default=None, exclude_if=lambda apart: apart is None)

    @model_validator(mode="after")
    def _item_and_sample_belong_together(self) -> "Case":
        if (self.item is None) != (self.sample is None):
            raise ValueError(f"item is {self.item!r} and sample is {self.sample!r}; give both or none")
        return self

    @property
    def item_id(self) -> str:
        """What it is a clip of: an item of the data set, or a chunk of one."""
        return self.id if self.item is None else self.item

    @property
    def source_id(self) -> str:
        """The id of its item in the data set."""
        return self.source or self.item_id

    @property
    def cluster(self) -> str:
        """Clips of one cluster depend on each other: they have one source video, or one input image."""
        return self.group or self.item_id

    def order(self) -> tuple[str, int]:
        """What a manifest is sorted by: the item, then the number of the clip."""
        return self.item_id, self.sample or 0

    @property
    def is_first(self) -> bool:
        """Whether this is the only clip of its item, or the first one."""
        return not self.sample


class Excluded(Stored):
    """A video that the protocol chose but that could not be used."""

    id: str
    reason: str
    rule: str  # "short", "cut" (another shot in its clip): replaced; "unreadable": not replaced, so n is smaller


class Plan(Stored):
    """Everything that decides a run's clips and numbers."""

    dcbench: str
    model: Annotated[dict[str, Any], _with_strings("name", "title")]  # the resolved card
    dataset: Annotated[dict[str, Any], _with_strings("name")]
    protocol: Annotated[dict[str, Any], _with_strings("name")]
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
    n_reference: NonNegativeInt = 0
    n_generated: NonNegativeInt = 0
    n_groups: NonNegativeInt | None = None  # independent source videos or inputs; None in older records
    replicates: Replicates | None = None
    higher_is_better: bool | None = None
    metric: dict[str, Any] = {}  # its name, version and options; {} in older records
    extractor: dict[str, str] = {}
    fingerprint: str = ""
    warnings: list[str] = []
    details: dict[str, Any] = {}
    reason: str | None = None  # why value is None, and what to do; with a value: what it lacks

    @model_validator(mode="after")
    def _value_is_inside_its_interval(self) -> "Score":
        if self.ci95 is not None and self.value is not None and self.n_groups is not None:  # not in older records
            low, high = self.ci95
            slack = 1e-6 * max(1.0, abs(self.value))
            if not low - slack <= self.value <= high + slack:
                raise ValueError(f"the value {self.value} is not inside its interval [{low}, {high}]")
        return self


class Failure(Stored):
    """A clip that could not be scored, and why."""

    id: str
    reason: str


class Record(Stored):
    schema_version: int = SCHEMA_VERSION
    plan: Plan
    scores: dict[str, Score]  # by metric; the name includes options that differ from the card's
    n_planned: NonNegativeInt
    n_scored: NonNegativeInt
    failures: list[Failure] = []
    clips_sha256: str  # of all clip hashes in the manifest's order
    decoders: dict[str, NonNegativeInt] = {}  # reference clips read by each decoder
    # about the clips as a whole, such as other frame rates than those of the reference
    warnings: list[str] = Field(default=[], exclude_if=lambda warnings: not warnings)

    @model_validator(mode="after")
    def _counts_fit(self) -> "Record":
        if self.n_scored > self.n_planned:
            raise ValueError(f"{self.n_scored} clips are scored, but only {self.n_planned} are planned")
        return self


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
        if item.condition_frame >= len(item.frames):
            raise UserError(f"{path}: condition_frame {item.condition_frame} of {item.id} is not one of its frames")
        if item.id in seen:
            raise UserError(f'{path}: the clip id "{item.id}" appears twice')
        seen.add(item.id)
    return items


def with_apart(cases: Sequence[Case]) -> list[Case]:
    """The cases, and then the clips of other videos that they are compared with."""
    return [*cases, *(case.apart for case in cases if case.apart)]


def check_clip_id(clip_id: str) -> str:
    """Return the id if it is safe as a file name. Otherwise raise UserError."""
    if not clip_id or clip_id.startswith(".") or UNSAFE.search(clip_id) or len(clip_id) > 180:
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
    """The record of a run directory (or of a record.json). UserError if it contradicts the run's other files."""
    path = run / "record.json" if run.is_dir() else run
    if not path.is_file():
        raise UserError(
            f"no record at {path}: the run is not finished. `dcbench run` with the same options continues it"
        )
    found: Record = _read(path, Record)
    if run.is_dir():
        _check_agreement(run, found)
    return found


def _check_agreement(run: Path, found: Record) -> None:
    """Raise UserError if a record does not fit the plan and the values per clip beside it."""
    again = "Score the run again: dcbench score RUN"
    if (run / "plan.json").is_file() and (planned := read_plan(run)).fingerprint != found.plan.fingerprint:
        raise UserError(
            f"{run}: record.json is about the clips {found.plan.fingerprint}, plan.json about {planned.fingerprint}. "
            f"One of them was edited or copied from elsewhere. {again}"
        )
    values: dict[str, list[float]] = {}
    for row in read_per_clip(run).values():
        for name, observed in row.items():
            if name in found.scores and isinstance(observed, dict) and "value" in observed:
                values.setdefault(name, []).append(observed["value"])
    for name, numbers in values.items():
        value = found.scores[name].value
        slack = 1e-6 * max(1.0, *map(abs, numbers))
        if value is not None and not min(numbers) - slack <= value <= max(numbers) + slack:
            raise UserError(
                f"{run}: {name} is {value} in record.json, but between {min(numbers)} and {max(numbers)} in "
                f"per_clip.jsonl. One of them was edited. {again}"
            )


def read_per_clip(run: Path) -> dict[str, dict[str, Any]]:
    """The lines of per_clip.jsonl by clip id; {} without that file. UserError for a damaged file."""
    path = run / "per_clip.jsonl"
    found: dict[str, dict[str, Any]] = {}
    for number, row in enumerate(read_jsonl(path) if path.is_file() else (), start=1):
        clip_id = row.get("id")
        if not isinstance(clip_id, str) or clip_id in found:
            raise UserError(f"{path}, line {number}: expected the id of another clip, got {clip_id!r}")
        values = [observed.get("value") for observed in row.values() if isinstance(observed, dict)]
        if any(value is not None and not _is_number(value) for value in values):
            raise UserError(f"{path}, line {number}: a value of clip {clip_id!r} is not a finite number")
        found[clip_id] = row
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_cost(run: Path) -> Cost | None:
    path = (run if run.is_dir() else run.parent) / "cost.json"
    return _read(path, Cost) if path.is_file() else None
