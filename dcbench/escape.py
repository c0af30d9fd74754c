"""Text that others wrote (names, titles, captions, reasons, warnings), made safe for where it is shown.

Records, captions and file names may come from a stranger. One function for each notation; all of them give plain text:
no link, no picture, no formula, no control byte of a terminal.
"""

import html
import re
from typing import Any

# Control characters and halves of surrogate pairs. The five and four after them turn the reading direction.
CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
LINES = re.compile(r"\s*[\t\n\r\u2028\u2029]\s*")
MARKDOWN = re.compile(
    r"[\\|*`\[\]~$]"  # columns, emphasis, code, links, pictures, formulas
    r"|(?<![^\W_])_|_(?![^\W_])"  # an underscore inside a word is plain text
    r"|:(?=//)|(?<=\bwww)\.|(?<=\bmailto):|(?<=\bxmpp):|@(?=\w)",  # these become links without any bracket
    re.IGNORECASE,
)
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\n", "＝", "＋", "－", "＠")
TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "↑": r"$\uparrow$", "↓": r"$\downarrow$", "∞": r"$\infty$", "–": "--", "×": r"$\times$", "λ": r"$\lambda$",
    "≥": r"$\geq$",
}  # fmt: skip


def plain(text: str) -> str:
    """One line for a terminal, a page or a figure: control characters become �, line ends become spaces."""
    return LINES.sub(" ", CONTROLS.sub("�", text))


def screen(text: str) -> str:
    """Several lines for a terminal, each as `plain` makes it."""
    return "\n".join(map(plain, text.split("\n")))


def markdown(text: str) -> str:
    """One line of Markdown, also inside a table, that is shown as `text`."""
    escaped = MARKDOWN.sub(lambda found: "\\" + found[0], plain(text))
    return re.sub(r"&(?=#?\w+;)", "&amp;", escaped).replace("<", "&lt;").replace(">", "&gt;")


def shown(text: str) -> str:
    """What `markdown` escaped, as a terminal should show it."""
    return re.sub(r"\\([!-/:-@\[-`{-~])|&(?:lt|gt|amp);", lambda found: found[1] or html.unescape(found[0]), text)


def tex(text: str) -> str:
    """One line of LaTeX that is printed as `text`. Hyphens form no ligature; before a digit they are a minus."""
    escaped = "".join(TEX.get(char, char) for char in plain(text))
    return re.sub(r"(?<![\w-])-(?=\d)", "$-$", re.sub("-(?=-)", "-{}", escaped))


def csv_cell(value: Any) -> Any:
    """A cell of a CSV file. A text that a spreadsheet would take for a formula gets a ' in front; numbers stay."""
    if not isinstance(value, str):
        return value
    text = CONTROLS.sub("�", value).replace("\r\n", "\n").replace("\r", "\n")  # csv may leave \r without quotes
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text
