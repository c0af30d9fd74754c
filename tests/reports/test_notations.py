"""Markdown, LaTeX and CSV: names and reasons stay text, whatever they contain; LaTeX fits a column of a paper."""

import csv
import io
import re
import shutil
import subprocess

import pandas as pd
import pytest
from markdown_it import MarkdownIt
from records import published, run, score

from dcbench.analysis.compare import Compared
from dcbench.analysis.compare import to_markdown as compared_to_markdown
from dcbench.analysis.sensitivity import Outcome, Sensitivity
from dcbench.escape import CONTROLS, csv_cell, markdown, shown, tex
from dcbench.metrics.statistics import compare_paired
from dcbench.record import Cost
from dcbench.reports.notations import COLUMN, costs_to_markdown, points, to_csv, to_latex, to_markdown
from dcbench.reports.tables import Cell, Table, choose, costs, layout, numbers

NASTY = "A|B <script>$x_1$ & 50% #1 {y} ~^ \\cmd `c` *\n[x]"


def test_names_cannot_break_out_of_the_table():
    runs = [run(NASTY, {"fvd": score(1)}), run("B", {"fvd": score(2)})]
    table = layout(runs, numbers(runs, {}))
    text = to_markdown(table)
    row = next(line for line in text.splitlines() if "script" in line)
    assert row.replace("\\|", "").count("|") == 4 and "<script>" not in text
    latex = to_latex(table)
    row = next(line for line in latex.splitlines() if "script" in line).replace(r"\allowbreak{}", "")
    assert row.replace(r"\&", "").count("&") == 2
    assert r"\$x\_1\$ \& 50\% \#1 \{y\} \textasciitilde{}\textasciicircum{} \textbackslash{}cmd" in row
    rows = list(csv.DictReader(io.StringIO(to_csv(numbers(runs, {})))))
    assert rows[0]["model"] == NASTY and float(rows[0]["value"]) == 1


def test_latex_is_booktabs_with_balanced_braces():
    runs = [run("A", {"fvd": score(1, ci95=(0.5, 1.5), ci_method="x")}), run("B", {"fvd": score(2)})]
    latex = to_latex(layout(runs, numbers(runs, {"a": published()})))
    for part in (r"\toprule", r"\bottomrule", r"FVD $\downarrow$", r"\textbf{1.0000}", r"{\tiny [0.5000, 1.5000]}"):
        assert part in latex
    assert latex.count(r"\midrule") == 2  # above each block
    assert latex.count("{") == latex.count("}")
    assert tex("λ ≥ 1") == r"$\lambda$ $\geq$ 1"
    assert tex("-6.82 [-7, 5-3] --download") == "$-$6.82 [$-$7, 5-3] -{}-download"


def test_csv_has_every_number_in_full():
    text = to_csv(numbers([run("A", {"fvd": score(234.66123456789)})], {"a": published()}))
    measured, theirs = csv.DictReader(io.StringIO(text))
    assert float(measured["value"]) == 234.66123456789 and "ab" * 32 in measured["extractor"]
    assert (theirs["published"], theirs["source"], theirs["block"]) == (
        "True",
        "arXiv 1 Table 1",
        "published, dynamicrafter-paper",
    )


def test_csv_has_whole_numbers_and_a_pivot_of_it_mixes_no_protocols():
    """24 clips are 24 beside a published number, which has none; every row says of what protocol and clips it is."""
    runs = [run("A", {"fvd": score(3), "pic": score(None, "pic", fingerprint="", reason="no weights")})]
    runs.append(run("A", {"fvd": score(5, fingerprint="beef")}, fingerprint="beef", path="r2", protocol="smoke"))
    text = to_csv(numbers(runs, {"a": published("A")}))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["n_generated"] for row in rows if not row["source"]] == ["2048"] * 3
    where = {(row["protocol"], row["fingerprint"], row["metric"]): row["value"] for row in rows}
    assert where == {
        ("dynamicrafter-paper v1", "f00d", "fvd"): "3.0",
        ("dynamicrafter-paper v1", "f00d", "pic"): "",
        ("smoke v1", "beef", "fvd"): "5.0",
        ("dynamicrafter-paper", "published", "fvd"): "429.23",
    }
    table = pd.read_csv(io.StringIO(text)).pivot_table("value", ["protocol", "fingerprint"], "metric")
    assert sorted(table["fvd"]) == [3.0, 5.0, 429.23]  # no mean of two of them, and none is lost


def test_cost_table():
    cheap = Cost(seconds_per_clip=0.25, peak_memory_mb=512.4, device="cpu", dtype="float32", hardware="a processor")
    text = costs_to_markdown(costs([run("A", {}, cost=cheap), run("B", {})]))
    assert "| A       | ucf101    | 0.2500" in text and "512" in text and "| B" not in text
    assert costs_to_markdown(costs([run("B", {})])) == ""


# --- texts of strangers -----------------------------------------------------------------------------------------------

SNARES = (
    "[x](javascript:alert(1))",
    "![x](http://example.org/x.png)",
    "[x][1]",
    "[1]: http://example.org",
    "<http://example.org>",
    "see http://example.org, www.example.org or a@example.org",
    "<img src=x onerror=alert(1)>",
    "&lt;b&gt; &#91;x&#93;",
    "`code` **bold** __bold__ _x_ ~~gone~~ | column $x$",
    "\x1b[31mred\x1b[0m \x9b2J \u202etxet",
)


@pytest.mark.parametrize("snare", SNARES)
def test_no_text_becomes_a_link_a_picture_or_markup(snare):
    """Names of models and data sets, titles of blocks, warnings, reasons, and the machine in the table of costs."""
    cost = Cost(seconds_per_clip=1, hardware=snare)
    scores = {"fvd": score(1, warnings=[snare]), "pic": score(None, "pic", reason=snare)}
    runs = [run(snare, scores, dataset=snare, protocol=snare, cost=cost)]
    text = to_markdown(layout(runs, numbers(runs, {}))) + "\n" + costs_to_markdown(costs(runs))
    shown = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text)
    tags = set(re.findall(r"<(\w+)", shown))
    assert tags <= {"p", "table", "thead", "tbody", "tr", "th", "td", "em", "br"}, tags
    assert not re.search(r"(?<!\\)://|www\.|\w@", text)  # GitHub makes links of these
    assert not CONTROLS.search(text)
    readable = re.sub(r"<[^>]+>", "", shown).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    if not CONTROLS.search(snare):
        assert readable.count(snare) >= 4  # the reader sees the very text


@pytest.mark.parametrize("start", ["=HYPERLINK(1)", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1"])
def test_a_spreadsheet_takes_no_text_for_a_formula(start):
    runs = [run(start, {"fvd": score(-1.5)}), run("\x1b[2Jx", {"fvd": score(2)})]
    text = to_csv(numbers(runs, {}))
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert rows[0]["model"] == "'" + start.replace("\r", "\n") and rows[0]["value"] == "-1.5"  # numbers stay numbers
    assert rows[1]["model"] == "�[2Jx"
    assert csv_cell(-1) == -1 and csv_cell("a = b") == "a = b" and csv_cell("caf\udce9") == "caf�"
    assert "\r" not in csv_cell("a\r=1")  # an unquoted one begins a row


def test_comparisons_and_choices_of_a_protocol_show_texts_as_text():
    snare = SNARES[0] + SNARES[1] + SNARES[-1] + " | <b>"
    compared = Compared({snare: compare_paired([1.0, 2.0, 4.0], [0.0, 0.0, 0.5])}, {snare: snare}, {snare: None})
    choices = Sensitivity(1, None, 1, None, 3, [Outcome("x", snare, 3, 1.0, 1.0, 1.0, 1.0)], [snare])
    for text in (compared_to_markdown(compared, [snare, "B"]), choices.markdown()):
        shown = MarkdownIt("commonmark").enable("table").render(text)
        assert not re.search("<(a|img|b)[ >]", shown) and not CONTROLS.search(text) and "javascript" in shown


# --- LaTeX fits a column ----------------------------------------------------------------------------------------------


def wide_table() -> Table:
    """Three models with long names, seven metrics with intervals, two data sets, published rows, advice as reasons."""
    metrics = ("fvd", "kvd", "pic", "motion")
    runs = []
    for dataset, chosen in (("ucf101", metrics), ("msrvtt", metrics[:3])):
        for n, title in enumerate(("DynamiCrafter at 256 with a long name", NASTY, "a" * 50)):
            scores = {
                name: score(value, name, ci95=(value * 0.9, value * 1.1), ci_method="jackknife over blocks")
                for name, value in zip(chosen, (234.66 + n, 12.3, 0.61, 1.94), strict=False)
            }
            scores["ssim_image"] = score(None, "pic", reason="missing. Get it: dcbench weights fetch pic")
            runs.append(run(title, scores, dataset=dataset, path=f"{dataset}{n}", fingerprint=f"f00d{dataset}"))
    theirs = {str(n): published(f"Theirs {n}", tag) for n, tag in enumerate(["dynamicrafter-paper", *["other"] * 14])}
    return layout(runs, choose(runs, numbers(runs, theirs), (), "same-protocol"), full_notes=False)


def test_latex_for_a_paper_has_no_commands_and_no_foreign_rows_and_is_split():
    latex = to_latex(wide_table())
    assert latex.count(r"\toprule") == latex.count(r"\bottomrule") > 2
    assert "weights fetch" not in latex and "Theirs 0" in latex and "Theirs 1" not in latex
    assert latex.count("FVD $") == 2 and latex.count("KVD $") == 2  # each column once
    whole = to_latex(wide_table(), width=2000)
    assert whole.count(r"\toprule") == 1 and r"\multicolumn{5}{c}{ucf101} & \multicolumn{4}{c}{msrvtt}" in whole


def test_the_width_of_a_text_is_not_underestimated():
    """Widths of Computer Modern at 8 points, as LaTeX prints them (\\settowidth)."""
    for text, real in (("0123456789", 42.5), ("DynamiCrafter", 56.1), ("[220.50, 250.25]", 57.1), ("mmWW", 31.6)):
        assert real <= points(text) < 1.4 * real, text
    assert points("[220.50, 250.25]", "\\tiny") < points("[220.50, 250.25]")


LATEX = next((path for name in ("pdflatex", "tectonic", "xelatex") if (path := shutil.which(name))), None)


@pytest.mark.skipif(LATEX is None, reason="no LaTeX here: neither pdflatex, tectonic nor xelatex")
def test_latex_compiles_and_fits_the_column(tmp_path):
    assert LATEX
    full = wide_table()
    snares = " ".join(snare for snare in SNARES if snare.isascii())
    full.notes += [snares.replace("\x1b", ""), "/a/very/long/path" * 12]
    (tmp_path / "table.tex").write_text(re.sub("[ü漢字�]", "", to_latex(full)), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n"
        f"\\noindent\\begin{{minipage}}{{{COLUMN}pt}}\\input{{table}}\\end{{minipage}}\n\\end{{document}}\n"
    )
    options = [] if "tectonic" in LATEX else ["-interaction=nonstopmode", "-halt-on-error"]
    options += ["-draftmode"] if "pdflatex" in LATEX else []  # no fonts are needed
    done = subprocess.run([LATEX, *options, "paper.tex"], cwd=tmp_path, capture_output=True, text=True)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-3000:]
    assert "Overfull \\hbox" not in log, log


def test_columns_with_one_heading_are_both_there():
    table = Table([("d", "X"), ("d", "X")], [("block", [(Cell("model"), [Cell("1"), Cell("2")])])])
    assert "Model & X & X \\\\" in to_latex(table)


@pytest.mark.parametrize(
    "text", ["a_b $X ~/c [1] p < 0.05 & q", r"back\slash \# \\", "&#27; &amp;lt; &\\#27;", "x|y*z`w`"]
)
def test_a_terminal_shows_markdown_as_the_text_that_it_was(text):
    assert shown(markdown(text)) == text
