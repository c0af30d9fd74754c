"""Reports: tables, figures and a page of clips, made from the records and clips of runs and from nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dcbench.record import write_text
from dcbench.reports.figures import Curve, cost_plot, curves, frame_grid
from dcbench.reports.page import ClipSource, group_runs, spread, write_page
from dcbench.reports.tables import (
    Run,
    costs,
    costs_to_markdown,
    layout,
    load_runs,
    name_runs,
    numbers,
    to_csv,
    to_latex,
    to_markdown,
)

GRIDS = 2  # clips shown as frames, for each fingerprint


def write_report(runs: Sequence[Path], to: Path) -> str:
    """Write table.md, table.tex, table.csv, figures and index.html to a folder; returns the table for the screen."""
    loaded = load_runs(runs)
    found = numbers(loaded)
    table = layout(loaded, found)
    text = to_markdown(table)
    taken = costs(loaded)
    write_text(to / "table.md", text + (f"\n{costs_to_markdown(taken)}" if taken else ""))
    write_text(to / "table.tex", to_latex(table))
    write_text(to / "table.csv", to_csv(found))
    figures = [*write_frames(loaded, name_runs(loaded), to, "frames"), *_cost_plots(loaded, to)]
    write_page(loaded, table, taken, [*figures, *_extrapolations(loaded, to)], to)
    return text


def write_frames(runs: Sequence[Run], labels: Mapping[Path, str], to: Path, stem: str) -> list[tuple[str, str]]:
    """Frames of a few clips, reference above and a row for each run; returns each picture's file and what it shows."""
    figures = []
    for group in group_runs(runs):
        source = ClipSource(group)
        for item in spread(source.items, GRIDS):
            clips = source.read(item)
            rows = [("reference", clips.reference)] if clips.reference is not None else []
            rows += [(labels[run.path], clips.generated[run.path]) for run in group if run.path in clips.generated]
            if rows:
                file = f"{stem}-{len(figures) + 1}.png"
                frame_grid(to / file, rows, clips.image, f"{item.id}: {item.prompt}" if item.prompt else item.id)
                figures.append((file, f"{item.id}: {item.prompt}"))
    return figures


def _cost_plots(runs: Sequence[Run], to: Path) -> list[tuple[str, str]]:
    """FVD against seconds a clip, for each fingerprint with several runs that tell both."""
    figures = []
    labels = name_runs(runs)
    groups: dict[tuple[str, str], list[Run]] = {}
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


def _extrapolations(runs: Sequence[Run], to: Path) -> list[tuple[str, str]]:
    """FVD against 1 / N with the fitted curve, whose left end is FVD-infinity; a figure a run that has it."""
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
