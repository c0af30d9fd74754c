"""Errors for the user: what was given, what is allowed, what to do. No traceback is shown for them."""

import difflib
from collections.abc import Iterable


def as_text(text: str) -> str:
    """Text that UTF-8 can hold: a byte of a file name that is not UTF-8 becomes an escape such as \\udce9."""
    return text.encode("utf-8", "backslashreplace").decode()


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
