"""Lists and captions that come with a dataset: read as UTF-8, errors for the user."""

import contextlib
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from dcbench.errors import UserError


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file; what goes wrong while it is read names it. A byte-order mark is skipped, line ends are kept."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.object[error.start]:#x}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} is no CSV file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_lines(path: Path) -> list[str]:
    """Lines without their ends, whether LF or CR LF."""
    with open_text(path) as file:
        return file.read().splitlines()
