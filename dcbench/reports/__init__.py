"""Reports: tables, figures and a page of clips, made only from the records and clips of runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcbench.errors import UserError
from dcbench.files import remove_leftovers, write_text
from dcbench.reports.figures import Curve, cost_plot, curves, frame_grid
from dcbench.reports.notations import costs_to_markdown, to_csv, to_latex, to_markdown
from dcbench.reports.page import ClipSource, check_metric, group_runs, spread, write_page
from dcbench.reports.results import Result, load_results, name_runs, with_partial
from dcbench.reports.tables import choose, costs, layout, numbers

GRIDS = 2  # clips drawn as frames, per fingerprint


@dataclass(frozen=True)
class Choices:
    """What a report shows. Where a choice is None, table.md and the page show all, and table.tex what a paper needs.

    table.csv always has every number.
    """

    metrics: Sequence[str] = ()  # names or patterns; none: all
    published: str | None = None  # "none", "same-protocol" or "all"
    notes: str | None = None  # "short" or "full"
    clips: int = 12  # of each fingerprint
    clips_by: str | None = None  # a metric: its worst and best clips; None: evenly over the manifest
    partial: bool = False  # also totals of which some parts have no value

    def __post_init__(self) -> None:
        if self.notes not in (None, "short", "full"):
            raise UserError(f'--notes "{self.notes}": expected short or full')


def write_report(runs: Sequence[Path], to: Path, choices: Choices | None = None) -> str:
    """Write table.md, table.tex, table.csv, figures and index.html to a folder. Returns the table as Markdown."""
    choices = choices or Choices()
    for folder in (to, *filter(Path.is_dir, to.glob("*"))):  # of a report that was killed
        remove_leftovers(folder)
    loaded = [with_partial(run) if choices.partial else run for run in load_results(runs)]
    found = numbers(loaded)
    shown = choose(loaded, found, choices.metrics, choices.published or "all")
    if choices.clips_by:
        check_metric(choices.clips_by, loaded)
    in_paper = choose(loaded, found, choices.metrics, choices.published or "same-protocol")
    table = layout(loaded, shown, choices.notes != "short")
    text = to_markdown(table)
    taken = costs(loaded)
    write_text(to / "table.md", text + (f"\n{costs_to_markdown(taken)}" if taken else ""))
    write_text(to / "table.tex", to_latex(layout(loaded, in_paper, choices.notes == "full")))
    write_text(to / "table.csv", to_csv(found))
    figures = [*write_frames(loaded, name_runs(loaded), to, "frames"), *_cost_plots(loaded, to)]
    write_page(loaded, table, taken, [*figures, *_extrapolations(loaded, to)], to, choices.clips, choices.clips_by)
    return text


def write_frames(runs: Sequence[Result], labels: Mapping[Path, str], to: Path, stem: str) -> list[tuple[str, str]]:
    """Draw frames of a few clips: the reference in the first row, then a row per run. Returns (file, caption) pairs."""
    figures = []
    for group in group_runs(runs):
        source = ClipSource(group)
        for case in spread(source.cases, GRIDS):
            clips = source.read(case)
            rows = [("reference", clips.reference)] if clips.reference is not None else []
            rows += [(labels[run.path], clips.generated[run.path]) for run in group if run.path in clips.generated]
            if rows:
                file = f"{stem}-{len(figures) + 1}.png"
                frame_grid(to / file, rows, clips.image, f"{case.id}: {case.prompt}" if case.prompt else case.id)
                figures.append((file, f"{case.id}: {case.prompt}"))
    return figures


def _cost_plots(runs: Sequence[Result], to: Path) -> list[tuple[str, str]]:
    """Plot FVD against seconds per clip, for each fingerprint with several runs that have both numbers."""
    figures = []
    labels = name_runs(runs)
    groups: dict[tuple[str, str], list[Result]] = {}
    for run in runs:
        score = run.record.scores.get("fvd")
        if score and score.value is not None and run.cost and run.cost.seconds_per_clip and not run.is_bound:
            groups.setdefault((run.dataset, score.fingerprint), []).append(run)
    for (dataset, fingerprint), group in groups.items():
        points = []
        for run in group:
            score, cost = run.record.scores["fvd"], run.cost
            if score.value is not None and cost is not None and cost.seconds_per_clip:
                points.append((labels[run.path], cost.seconds_per_clip, score.value, score.ci95))
        if len(points) > 1:
            file = f"cost-{len(figures) + 1}.png"
            cost_plot(to / file, points, "FVD (lower is better)")
            figures.append((file, f"Quality against cost on {dataset}, fingerprint {fingerprint}, 95 % intervals"))
    return figures


def _extrapolations(runs: Sequence[Result], to: Path) -> list[tuple[str, str]]:
    """Plot FVD against 1 / N with the fitted curve, for each run with FVD-infinity (the left end of the curve)."""
    figures = []
    labels = name_runs(runs)
    for run in runs:
        score = run.record.scores.get("fvd_infinity")
        if score is None or score.value is None or "coefficients" not in score.details:
            continue
        inverse = [1 / size for size in score.details["sizes"]]
        fitted = [max(inverse) * step / 40 for step in range(41)]
        values = [sum(c * x**power for power, c in enumerate(score.details["coefficients"])) for x in fitted]
        lines = {"subsets": Curve(inverse, score.details["values"]), "fit": Curve(fitted, values)}
        file = f"fvd-infinity-{len(figures) + 1}.png"
        curves(to / file, lines, "1 / N", "FVD", title=labels[run.path])
        around = f" [{score.ci95[0]:.1f}, {score.ci95[1]:.1f}]" if score.ci95 else ""
        figures.append((file, f"{labels[run.path]}: FVD of N clips, extrapolated to {score.value:.1f}{around}"))
    return figures
