"""Reports: tables, figures and a gallery, made from the records of runs and from nothing else."""

from collections.abc import Sequence
from pathlib import Path

from dcbench.record import write_text
from dcbench.reports.tables import cost_table, layout, load_runs, numbers, to_csv, to_latex, to_markdown


def write_report(runs: Sequence[Path], to: Path) -> str:
    """Write table.md, table.tex and table.csv of the runs to a folder; returns the table for the screen."""
    loaded = load_runs(runs)
    found = numbers(loaded)
    table = layout(loaded, found)
    text = to_markdown(table)
    costs = cost_table(loaded)
    write_text(to / "table.md", text + (f"\n{costs}" if costs else ""))
    write_text(to / "table.tex", to_latex(table))
    write_text(to / "table.csv", to_csv(found))
    return text
