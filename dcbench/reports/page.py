"""The report as a page: one folder of HTML, CSS, JavaScript and previews that opens from disk, without a network.

Model names, captions and file names come from anywhere: jinja2 escapes all of them, and media files are numbered.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from dcbench import planning
from dcbench import run as runner
from dcbench.errors import UserError
from dcbench.record import ManifestItem, read_jsonl, read_manifest, write_text
from dcbench.reports.tables import COST_HEADINGS, Run, Table, name_runs, show_value
from dcbench.video import read_clip, write_mp4
from dcbench.weights import atomic_write

TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Shown:
    """One video of a row: a model's clip or the reference."""

    label: str
    file: str | None  # relative to the page; None when there is no clip
    missing: str = ""
    values: str = ""  # per-clip metrics


@dataclass(frozen=True)
class Row:
    """One manifest line: its input image and what each model made of it."""

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
    rows: list[Row] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Clips:
    """What a row shows, as pixels: for the page and for the figures."""

    item: ManifestItem
    image: Tensor | None  # uint8 [3 h w]
    reference: Tensor | None  # uint8 [t 3 h w]
    generated: dict[Path, Tensor]  # run path -> uint8 [t 3 h w]
    lost: dict[Path, str]  # run path -> why its clip cannot be shown
    missing: str = ""  # why there is no reference


class ClipSource:
    """Reads the clips of runs that share a fingerprint."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = runs
        self.items = read_manifest(runs[0].path / "manifest.jsonl")
        self.job: planning.Job | None = None
        self.missing = ""
        try:
            self.job = planning.reopen(runs[0].path)
        except UserError as error:  # the dataset may be gone, or the run may be a score of two folders
            self.missing = str(error).split("\n")[0]

    def read(self, item: ManifestItem) -> Clips:
        generated, lost = {}, {}
        for run in self.runs:
            path = run.path / "clips" / f"{item.id}.mkv"
            try:
                generated[run.path] = read_clip(path)[0]
            except UserError as error:
                lost[run.path] = "no clip was made" if not path.exists() else str(error).removeprefix(f"{path}: ")
        image = reference = None
        missing = self.missing
        if self.job is not None:
            try:
                reference, _ = runner.reference_clip(self.job.items[item.id], item, self.job.protocol)
                image = reference[item.condition_frame]
            except (UserError, KeyError) as error:
                missing = str(error).split("\n")[0]
        return Clips(item, image, reference, generated, lost, missing)


def group_runs(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs of one dataset and fingerprint together, in the order given; only runs that made clips."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if (run.path / "clips").is_dir():
            groups.setdefault((run.dataset, run.record.plan.fingerprint), []).append(run)
    return list(groups.values())


def write_page(
    runs: Sequence[Run],
    table: Table,
    costs: Sequence[Sequence[str]],
    figures: Sequence[tuple[str, str]],
    to: Path,
    clips: int = 12,
) -> Path:
    """Write index.html and media/ to the folder; returns the page. `figures`: (file relative to the page, caption)."""
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


def _section(runs: list[Run], number: int, to: Path, clips: int, labels: dict[Path, str]) -> Section:
    source = ClipSource(runs)
    values = {run.path: _per_clip(run.path) for run in runs}
    section = Section(f"{runs[0].dataset}, {runs[0].block}", runs[0].record.plan.fingerprint, len(source.items))
    for index, item in enumerate(spread(source.items, clips)):
        shown = source.read(item)
        stem = f"media/{number}-{index:03d}"
        videos = []
        if shown.reference is not None:
            write_mp4(to / f"{stem}-reference.mp4", shown.reference, item.fps)
            videos.append(Shown("reference", f"{stem}-reference.mp4"))
        else:
            videos.append(Shown("reference", None, shown.missing))
        for column, run in enumerate(runs):
            clip = shown.generated.get(run.path)
            if clip is not None:
                write_mp4(to / f"{stem}-{column}.mp4", clip, item.fps)
            file = f"{stem}-{column}.mp4" if clip is not None else None
            text = _value_text(values[run.path].get(item.id, {}))
            videos.append(Shown(labels[run.path], file, shown.lost.get(run.path, ""), text))
        image = None
        if shown.image is not None:
            image = f"{stem}-input.png"
            _write_png(to / image, shown.image)
        section.rows.append(Row(item.id, item.prompt, image, item.fps, len(item.frames), videos))
    return section


def spread(items: Sequence[ManifestItem], count: int) -> list[ManifestItem]:
    """`count` items evenly over the manifest, so that not all come from its first class."""
    step = max(1, len(items) / count)
    return [items[int(k * step)] for k in range(min(count, len(items)))]


def _per_clip(path: Path) -> dict[str, dict[str, Any]]:
    file = path / "per_clip.jsonl"
    return {str(row.get("id")): row for row in read_jsonl(file)} if file.is_file() else {}


def _value_text(row: dict[str, Any]) -> str:
    """ "motion 1.68, pic 0.71": the per-clip metrics that are one number."""
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
