"""Tables as Markdown, LaTeX and CSV. Names and reasons are shown as text, whatever they contain (dcbench.escape)."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import pandas as pd

from dcbench.escape import csv_cell, markdown, tex
from dcbench.reports.tables import COST_HEADINGS, Cell, Number, Table


def to_csv(found: Sequence[Number]) -> str:
    """Every number in full, one in each line."""
    columns = [column.name for column in fields(Number)]
    return csv_text(columns, [list(asdict(number).values()) for number in found])


def csv_text(columns: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """CSV with a heading. No text is a formula in a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([csv_cell(value) for value in line] for line in lines)
    return text.getvalue()


def markdown_table(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are as wide as their texts. The texts are Markdown."""
    frame = pd.DataFrame([list(line) for line in lines], columns=pd.Index(headings))
    return frame.to_markdown(index=False, disable_numparse=True)


def to_markdown(table: Table) -> str:
    """One table per dataset, so that each fits a screen, and the footnotes below."""

    def show(cell: Cell) -> str:
        text = markdown(cell.text)
        parts = [f"**{text}**" if cell.bold else text, cell.interval, "".join(f"[{n}]" for n in cell.notes)]
        return " ".join(part for part in parts if part)

    parts = []
    for dataset in dict.fromkeys(dataset for dataset, _ in table.columns):
        own = [n for n, column in enumerate(table.columns) if column[0] == dataset]
        lines: list[list[str]] = []
        for block, rows in table.blocks:
            inside = [
                [show(label), *(show(cells[n]) for n in own)]
                for label, cells in rows
                if any(cells[n].text for n in own)
            ]
            lines += [[f"*{markdown(block)}*", *[""] * len(own)], *inside] if inside else []
        headings = ["Model", *(markdown(table.columns[n][1]) for n in own)]
        parts.append(f"Dataset: {markdown(dataset)}\n\n{markdown_table(headings, lines)}\n\n")
    notes = "\n".join(f"[{n}] {markdown(note)}  " for n, note in enumerate(table.notes, 1))
    return "".join(parts) + notes.rstrip() + "\n"


def costs_to_markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table; '' for no lines."""
    return markdown_table(COST_HEADINGS, [list(map(markdown, line)) for line in lines]) + "\n" if lines else ""


# --- LaTeX ------------------------------------------------------------------------------------------------------------

COLUMN = 219.0  # points: the narrowest column of a two-column paper (ACL); ICML has 235, IEEE 252
GAP = 3.0  # points at each side of a column
LABEL = 0.38  # of the width, at most, for the names of models
SIZES = {"\\footnotesize": 8.0, "\\tiny": 5.0}


def points(text: str, size: str = "\\footnotesize") -> float:
    """About how wide a text is in Computer Modern, rather too wide than too narrow."""
    ems = sum(
        0.31 if char in "iljI.,:;|!'[] " else 0.41 if char in "frst()-/" else 0.53 if char in "0123456789aceovxyz"
        else 1.05 if char in "mMWw%@+=∞×≥λ–" or ord(char) > 255 else 0.82 if char.isupper() else 0.62
        for char in text
    )  # fmt: skip
    return ems * SIZES[size] * (1.3 if size == "\\tiny" else 1.07)


def _marks(cell: Cell) -> str:
    return ",".join(map(str, cell.notes))


def _needs(cell: Cell) -> float:
    value = points(cell.text) * (1.15 if cell.bold else 1) + points(_marks(cell))
    return max(value, points(cell.interval, "\\tiny"))


def _breakable(text: str) -> str:
    """LaTeX that may be broken inside long words, such as paths and addresses: after a sign, or after 15 letters."""
    words = re.split(r"(\s+)", text)
    pieces = [re.findall(r"[^/_.:=-]{0,15}[/_.:=-]|[^/_.:=-]{1,15}", w) if len(w) > 15 else [w] for w in words]
    return "".join("\\allowbreak{}".join(map(tex, found)) for found in pieces)


@dataclass
class _Part:
    """Some columns of a table that fit the page, for one tabular."""

    columns: list[int] = field(default_factory=list)
    widths: list[float] = field(default_factory=list)


def to_latex(table: Table, width: float = COLUMN) -> str:
    """Booktabs tables, each at most `width` points wide, and the footnotes below. \\usepackage{booktabs} is enough.

    What does not fit beside the models goes into a further tabular with the same rows. Intervals stand below values.
    """
    labels = [label for _, rows in table.blocks for label, _ in rows]
    label_width = min(max(map(_needs, labels), default=0.0), LABEL * width)
    parts = [_Part()]
    for index, (_, heading) in enumerate(table.columns):
        cells = [cells[index] for _, rows in table.blocks for _, cells in rows]
        words = max((points(word) for word in heading.split()), default=0.0)
        needed = min(max([words, *map(_needs, cells)]), width - label_width - 2 * GAP)
        if label_width + sum(w + 2 * GAP for w in [*parts[-1].widths, needed]) > width and parts[-1].columns:
            parts.append(_Part())
        parts[-1].columns.append(index)
        parts[-1].widths.append(needed)
    tabulars = [_tabular(table, part, label_width) for part in parts if part.columns]
    notes = "".join(f"$^{{{n}}}$ {_breakable(note)}\\par\n" for n, note in enumerate(table.notes, 1))
    body = "\\par\\medskip\n".join(tabulars)
    return (
        "% needs \\usepackage{booktabs}\n"
        f"{{\\footnotesize\\setlength{{\\tabcolsep}}{{{GAP:g}pt}}\\setlength{{\\parindent}}{{0pt}}%\n{body}\\par}}\n"
        f"{{\\scriptsize\\raggedright\\setlength{{\\parindent}}{{0pt}}\\smallskip\n{notes}}}\n"
    )


def _tabular(table: Table, part: _Part, label_width: float) -> str:
    count, whole = len(part.columns) + 1, label_width + sum(w + 2 * GAP for w in part.widths)

    def show(cell: Cell) -> str:
        value = f"\\textbf{{{tex(cell.text)}}}" if cell.bold else tex(cell.text)
        value += f"$^{{{_marks(cell)}}}$" if cell.notes else ""
        if not cell.interval:
            return value
        return f"\\begin{{tabular}}[t]{{@{{}}c@{{}}}}{value}\\\\[-2pt]{{\\tiny {tex(cell.interval)}}}\\end{{tabular}}"

    def heading(text: str, width: float) -> str:
        fits = points(text) <= width
        return tex(text) if fits else f"\\parbox[b]{{{width:.1f}pt}}{{\\centering {_breakable(text)}}}"

    lines = ["\\toprule"]
    names = [table.columns[n][0] for n in part.columns]
    if len({dataset for dataset, _ in table.columns}) > 1:
        spans = []
        for name in dict.fromkeys(names):
            widths = [w for w, other in zip(part.widths, names, strict=True) if other == name]
            wide = sum(widths) + 2 * GAP * (len(widths) - 1)
            spans.append(f"\\multicolumn{{{len(widths)}}}{{c}}{{{heading(name, wide)}}}")
        lines.append(" & ".join(["", *spans]) + " \\\\")
    heads = [heading(table.columns[n][1], w) for n, w in zip(part.columns, part.widths, strict=True)]
    lines.append(" & ".join(["Model", *heads]) + " \\\\")
    for block, rows in table.blocks:
        inside = [(label, [cells[n] for n in part.columns]) for label, cells in rows]
        inside = [(label, cells) for label, cells in inside if any(cell.text for cell in cells)]
        if inside:
            title = f"\\raggedright\\emph{{{_breakable(block)}}}"
            lines += ["\\midrule", f"\\multicolumn{{{count}}}{{@{{}}p{{{whole:.1f}pt}}@{{}}}}{{{title}}} \\\\"]
        for label, cells in inside:
            name = f"\\raggedright {_breakable(label.text)}" + (f"$^{{{_marks(label)}}}$" if label.notes else "")
            lines.append(" & ".join([name, *map(show, cells)]) + " \\\\")
    lines.append("\\bottomrule")
    shape = f"@{{}}p{{{label_width:.1f}pt}}{'c' * len(part.columns)}@{{}}"
    return f"\\begin{{tabular}}{{{shape}}}\n" + "\n".join(lines) + "\n\\end{tabular}"
