"""The report as a web page: one folder of HTML, CSS, JavaScript and videos. It opens from disk, without a network.

Model names, captions and file names are untrusted: jinja2 escapes all of them, and media files are numbered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from dcbench.errors import UserError
from dcbench.files import atomic_write, read_jsonl, write_text
from dcbench.record import Case
from dcbench.reports.tables import COST_HEADINGS, Result, Table, name_runs, show_value
from dcbench.runs import planning
from dcbench.video import write_mp4

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Shown:
    """One video of a row: a model's clip or the reference."""

    label: str
    file: str | None  # relative to the page; None when there is no clip
    missing: str = ""
    values: str = ""  # per-clip metrics


@dataclass(frozen=True)
class ClipRow:
    """One manifest line: its input image and each model's video."""

    id: str
    prompt: str
    image: str | None
    fps: float
    frames: int
    videos: list[Shown]


@dataclass
class Section:
    """Clips of runs with one fingerprint."""

    title: str
    fingerprint: str
    total: int
    rows: list[ClipRow] = field(default_factory=list)
    note: str = ""


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
                lost[path] = str(error).removeprefix(f"{file}: ") if there else "no clip was made"
        image, reference, missing = None, None, self.missing
        if not missing:
            try:
                reference, _ = self.first.reference(case)
                image = reference[case.condition_frame]
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
) -> Path:
    """Write index.html and media/ to the folder. Returns the page. `figures`: (file relative to the page, caption)."""
    sections = [_section(group, number, to, clips, name_runs(runs)) for number, group in enumerate(group_runs(runs))]
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html").render(
        title="dcbench report",
        table=table,
        costs=costs,
        cost_headings=COST_HEADINGS,
        figures=figures,
        sections=sections,
    )
    write_text(to / "index.html", page)
    for name in ("report.css", "report.js"):
        write_text(to / name, (TEMPLATES / name).read_text(encoding="utf-8"))
    return to / "index.html"


def _section(runs: list[Result], number: int, to: Path, clips: int, labels: dict[Path, str]) -> Section:
    source = ClipSource(runs)
    values = {run.path: _per_clip(run.path) for run in runs}
    section = Section(f"{runs[0].dataset}, {runs[0].block}", runs[0].record.plan.fingerprint, len(source.cases))
    for index, case in enumerate(spread(source.cases, clips)):
        shown = source.read(case)
        stem = f"media/{number}-{index:03d}"
        videos = []
        if shown.reference is not None:
            write_mp4(to / f"{stem}-reference.mp4", shown.reference, case.fps)
            videos.append(Shown("reference", f"{stem}-reference.mp4"))
        else:
            videos.append(Shown("reference", None, shown.missing))
        for column, run in enumerate(runs):
            clip = shown.generated.get(run.path)
            if clip is not None:
                write_mp4(to / f"{stem}-{column}.mp4", clip, case.fps)
            file = f"{stem}-{column}.mp4" if clip is not None else None
            text = _value_text(values[run.path].get(case.id, {}))
            videos.append(Shown(labels[run.path], file, shown.lost.get(run.path, ""), text))
        image = None
        if shown.image is not None:
            image = f"{stem}-input.png"
            _write_png(to / image, shown.image)
        section.rows.append(ClipRow(case.id, case.prompt, image, case.fps, len(case.frames), videos))
    return section


def spread(cases: Sequence[Case], count: int) -> list[Case]:
    """`count` cases, evenly spaced over the manifest, so that not all come from its first class."""
    step = max(1, len(cases) / count)
    return [cases[int(k * step)] for k in range(min(count, len(cases)))]


def _per_clip(path: Path) -> dict[str, dict[str, Any]]:
    file = path / "per_clip.jsonl"
    return {str(row.get("id")): row for row in read_jsonl(file)} if file.is_file() else {}


def _value_text(row: dict[str, Any]) -> str:
    """The per-clip metrics with a single value, as "motion 1.68, pic 0.71"."""
    found = {
        name: value["value"]
        for name, value in row.items()
        if name != "reference" and isinstance(value, dict) and isinstance(value.get("value"), int | float)
    }
    return ", ".join(f"{name.replace('_', ' ')} {show_value(value)}" for name, value in sorted(found.items()))


def _write_png(path: Path, image: Tensor) -> None:
    from PIL import Image

    with atomic_write(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary, "PNG")
