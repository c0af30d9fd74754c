"""The report as a web page: one folder of HTML, CSS, JavaScript and videos. It opens from disk, without a network.

Model names, captions and file names are untrusted: jinja2 escapes all of them, and media files are numbered.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from dcbench.errors import UserError, near_match
from dcbench.escape import plain
from dcbench.files import atomic_write, write_text
from dcbench.record import Case, read_per_clip
from dcbench.reports.results import Result, name_runs
from dcbench.reports.tables import COST_HEADINGS, Table, show_value
from dcbench.runs import planning
from dcbench.runs.directory import CLEANED, RunDirectory
from dcbench.video import write_mp4

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Shown:
    """One video of a row: a model's clip or the reference."""

    label: str
    file: str | None  # relative to the page; None when there is no clip
    missing: str = ""
    values: str = ""  # per-clip metrics
    width: int = 1  # of the clip, so that the page keeps its shape while clips are loaded
    height: int = 1


@dataclass(frozen=True)
class ClipRow:
    """One manifest line: its input image and each model's video."""

    id: str
    prompt: str
    image: str | None
    fps: float
    frames: int
    videos: list[Shown]
    means: dict[str, float]  # per-clip metric -> mean over the models: what the page sorts by


@dataclass
class Section:
    """Clips of runs with one fingerprint."""

    title: str
    fingerprint: str
    total: int
    chosen: str  # which clips these are
    rows: list[ClipRow] = field(default_factory=list)

    @property
    def metrics(self) -> list[str]:
        return sorted({name for row in self.rows for name in row.means})


@dataclass(frozen=True)
class Clips:
    """The pixels of a row, for the page and the figures."""

    case: Case
    image: Tensor | None  # uint8 [3 h w]
    reference: Tensor | None  # uint8 [t 3 h w]
    generated: dict[Path, Tensor]  # run path -> uint8 [t 3 h w]
    lost: dict[Path, str]  # run path -> why its clip cannot be shown
    missing: str = ""  # why there is no reference


class ClipSource:
    """Reads the clips of runs that share a fingerprint. If the dataset is missing, there is no reference."""

    def __init__(self, results: Sequence[Result]):
        self.runs = {result.path: planning.open_run(result.path, result.record.plan) for result in results}
        self.first, self.missing = self.runs[results[0].path], ""
        try:
            self.first = planning.reopen(results[0].path)
        except UserError as error:
            self.missing = str(error).split("\n")[0]
        self.cases = [case for case in self.first.cases if any(run.has_generated(case) for run in self.runs.values())]

    def read(self, case: Case) -> Clips:
        generated, lost = {}, {}
        for path, run in self.runs.items():
            try:
                generated[path] = run.clip(case)
            except UserError as error:
                file = run.directory.clip(case.id)
                there = case.id in run.folder or file.exists()
                made = case.id in run.directory.made_samples()
                absent = "its clip was removed" if made else "no clip was made"
                lost[path] = str(error).removeprefix(f"{file}: ") if there else absent
        image, reference, missing = None, None, self.missing
        if not missing:
            try:
                if self.first.has_reference(case) or not case.frames:
                    reference, _ = self.first.reference(case)
                    image = reference[case.condition_frame]
                else:
                    image, missing = self.first.image(case), "the input is a picture"
            except UserError as error:
                missing = str(error).split("\n")[0]
        return Clips(case, image, reference, generated, lost, missing)


def group_runs(runs: Sequence[Result]) -> list[list[Result]]:
    """Group runs by dataset and fingerprint, in the order given. Runs without clips are left out."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in runs:
        if (run.path / "clips").is_dir() or (run.path / "generated.jsonl").is_file():
            groups.setdefault((run.dataset, run.record.plan.fingerprint), []).append(run)
    return list(groups.values())


def write_page(
    runs: Sequence[Result],
    table: Table,
    costs: Sequence[Sequence[str]],
    figures: Sequence[tuple[str, str]],
    to: Path,
    clips: int = 12,
    clips_by: str | None = None,
) -> Path:
    """Write index.html and media/ to the folder. Returns the page. `figures`: (file relative to the page, caption).

    `clips` of each fingerprint are shown: evenly over the manifest, or the worst and the best by the metric `clips_by`.
    """
    labels = name_runs(runs)
    sections = [_section(group, n, to, clips, clips_by, labels) for n, group in enumerate(group_runs(runs))]
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    page = environment.get_template("report.html").render(
        title="dcbench report",
        table=table,
        costs=costs,
        cost_headings=COST_HEADINGS,
        figures=figures,
        sections=sections,
        without=[f"{labels[run.path]}: {CLEANED}" for run in runs if RunDirectory(run.path).is_cleaned()],
        metrics=sorted({name for section in sections for name in section.metrics}),
    )
    write_text(to / "index.html", page)
    for name in ("report.css", "report.js"):
        write_text(to / name, (TEMPLATES / name).read_text(encoding="utf-8"))
    return to / "index.html"


def check_metric(name: str, runs: Sequence[Result]) -> None:
    """Raise UserError if no clip has a value of this metric."""
    known = {metric for run in runs for row in _per_clip(run.path).values() for metric in row}
    if name not in known:
        has = f"The runs have: {', '.join(sorted(known))}" if known else "The runs have none"
        raise UserError(f'no clip of these runs has a value of "{name}".{near_match(name, known)} {has}')


def _section(
    runs: list[Result], number: int, to: Path, clips: int, clips_by: str | None, labels: Mapping[Path, str]
) -> Section:
    source = ClipSource(runs)
    values = {run.path: _per_clip(run.path) for run in runs}
    means = {case.id: _means([values[run.path].get(case.id, {}) for run in runs]) for case in source.cases}
    cases, chosen = _choose(source.cases, clips, clips_by, means, runs)
    section = Section(f"{runs[0].dataset}, {runs[0].block}", runs[0].record.plan.fingerprint, len(source.cases), chosen)
    for index, case in enumerate(cases):
        shown = source.read(case)
        stem = f"media/{number}-{index:03d}"
        videos = [_write_clip(to, f"{stem}-reference.mp4", "reference", shown.reference, case.fps, shown.missing)]
        for column, run in enumerate(runs):
            clip, lost = shown.generated.get(run.path), shown.lost.get(run.path, "")
            text = ", ".join(
                f"{name.replace('_', ' ')} {show_value(value)}"
                for name, value in sorted(values[run.path].get(case.id, {}).items())
            )
            videos.append(_write_clip(to, f"{stem}-{column}.mp4", labels[run.path], clip, case.fps, lost, text))
        image = None
        if shown.image is not None:
            image = f"{stem}-input.png"
            _write_png(to / image, shown.image)
        row = ClipRow(case.id, case.prompt, image, case.fps, source.first.protocol.num_frames, videos, means[case.id])
        section.rows.append(row)
    return section


def _write_clip(
    to: Path, file: str, label: str, clip: Tensor | None, fps: float, missing: str, values: str = ""
) -> Shown:
    if clip is None:
        return Shown(label, None, missing, values)
    write_mp4(to / file, clip, fps)
    return Shown(label, file, "", values, clip.shape[3], clip.shape[2])


def _choose(
    cases: list[Case], count: int, by: str | None, means: Mapping[str, Mapping[str, float]], runs: Sequence[Result]
) -> tuple[list[Case], str]:
    """The cases to show, and in words which these are. By a metric: from the worst (or lowest) to the best."""
    scored = [case for case in cases if by is not None and by in means[case.id]]
    if not by or not scored:
        return spread(cases, count), "evenly over the manifest"
    directions = [run.record.scores[by].higher_is_better for run in runs if by in run.record.scores]
    direction = next((found for found in directions if found is not None), None)
    scored.sort(key=lambda case: means[case.id][by], reverse=direction is False)
    if len(scored) > count:
        scored = [*scored[: count - count // 2], *scored[len(scored) - count // 2 :]]
    ends = "the lowest and the highest" if direction is None else "the worst and the best"
    return scored, f"{ends} by {by}, as a mean over the models"


def spread(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` cases, evenly spaced over the manifest, so that not all come from its first class."""
    step = max(1, len(cases) / count)
    return [cases[int(k * step)] for k in range(min(count, len(cases)))]


def _per_clip(path: Path) -> dict[str, dict[str, float]]:
    """Clip id -> the per-clip metrics with a single value."""
    return {clip: dict(_single_values(row)) for clip, row in read_per_clip(path).items()}


def _single_values(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        single = value.get("value") if isinstance(value, dict) and name != "reference" else None
        if isinstance(single, int | float) and math.isfinite(single):
            yield name, float(single)


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found = {name: [row[name] for row in rows if name in row] for name in sorted({n for row in rows for n in row})}
    return {name: sum(values) / len(values) for name, values in found.items()}


def _write_png(path: Path, image: Tensor) -> None:
    from PIL import Image

    with atomic_write(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary, "PNG")
