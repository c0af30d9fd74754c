"""Reads the lists and captions of a dataset as UTF-8. A UserError names the file."""

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TextIO

from dcbench.errors import UserError

Row = tuple[int, dict[str, str]]


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


def csv_rows(path: Path, delimiter: str, fitting: Callable[[Sequence[str]], bool], expected: str) -> list[Row]:
    """(line, fields by column) of each record below the header. UserError unless the header is `fitting`."""
    with open_text(path) as lines:
        reader = csv.reader(lines, delimiter=delimiter)
        columns = [name.strip() for name in next(reader, [])]
        if not fitting(columns):
            raise UserError(f"{path} has the columns {', '.join(columns) or 'none'}; expected {expected}")
        rows = [(reader.line_num, fields) for fields in reader if fields]
        return [(number, as_row(columns, fields, f"{path}, line {number}")) for number, fields in rows]


def as_row(columns: Sequence[str], fields: Sequence[str], where: str) -> dict[str, str]:
    """The fields of a CSV record by column; fields that lack are "". UserError if there are more than columns."""
    if any(fields[len(columns) :]):  # separators at the end of a line do no harm
        raise UserError(
            f"{where}: {len(fields)} fields, but the table has the {len(columns)} columns {', '.join(columns)}. Put a "
            f'text that holds the separator in quotes, for example "{fields[len(columns) - 1]}, ..."'
        )
    return dict(zip_longest(columns, fields[: len(columns)], fillvalue=""))


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
    """Lines without their ends, LF or CR LF. Other characters that Unicode calls line ends (U+2028) are text."""
    with open_text(path) as file:
        return [line.rstrip("\r\n") for line in file]
