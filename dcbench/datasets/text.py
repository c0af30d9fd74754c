"""Reads the lists and captions of a dataset as UTF-8. A UserError names the file."""

import contextlib
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from dcbench.errors import UserError


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors while reading a file into a UserError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.object[error.start]:#x}); save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path} is not a valid CSV file: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file. A byte-order mark is skipped, line ends are kept."""
    with _explained(path), path.open(encoding="utf-8-sig", newline="") as file:
        yield file


def csv_records(path: Path) -> Iterator[tuple[int, int, list[str]]]:
    """(first byte, end byte, fields) of each non-empty record, the header included. See `csv_record`."""
    end = 0

    def lines(file: io.BufferedReader) -> Iterator[str]:
        nonlocal end
        for line in file:
            end += len(line)
            yield line.decode("utf-8-sig" if end == len(line) else "utf-8")

    with _explained(path), path.open("rb") as file:
        start = 0
        for fields in csv.reader(lines(file)):
            if fields:
                yield start, end, fields
            start = end


def csv_record(path: Path, start: int, end: int) -> list[str]:
    """The fields of the CSV record between two byte positions."""
    with _explained(path), path.open("rb") as file:
        file.seek(start)
        text = file.read(end - start).decode("utf-8")
        return next(csv.reader(io.StringIO(text, newline="")), [])


def read_lines(path: Path) -> list[str]:
    """Lines without their ends, whether LF or CR LF."""
    with open_text(path) as file:
        return file.read().splitlines()
