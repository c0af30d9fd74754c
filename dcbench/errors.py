"""Errors for the user: what was given, what is allowed, what to do. No traceback is shown for them."""

import difflib
import re
from collections.abc import Iterable

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # without tab and line feed; terminals obey them


def as_text(text: str) -> str:
    """Text for a terminal or a file: bytes that are not UTF-8, and control characters, become escapes such as \\udce9."""
    known = text.encode("utf-8", "backslashreplace").decode()
    return CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), known)


class UserError(ValueError):
    """An error that the user can fix. The message says how."""

    def __init__(self, message: str = "") -> None:
        super().__init__(as_text(message))


class SharedError(UserError):
    """An error that all processes of a run raise together. Only the first one shows it."""


class LostRank(UserError):
    """Another process of a run has ended, so nothing can be exchanged any more."""


def near_match(given: str, allowed: Iterable[str]) -> str:
    """' Did you mean "x"?' for the nearest allowed name, or ''."""
    by_lower = {name.lower(): name for name in allowed}
    found = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.5)
    return f' Did you mean "{by_lower[found[0]]}"?' if found else ""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type's name if the message is empty."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
