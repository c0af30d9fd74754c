"""Atomic writes, canonical JSON, hashes, and the cache folder. This module does not import torch."""

import contextlib
import hashlib
import json
import os
import platform
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcbench.errors import UserError, first_line


def _umask() -> int:
    """The process's umask. Reading it sets it for a moment, so it is read once, before threads start."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
MODE = 0o666 & ~_umask()


def cache_dir() -> Path:
    """$DCBENCH_CACHE, or ~/.cache/dcbench. Created on first use, for this user alone. OSError if that is impossible."""
    path = Path(os.environ.get("DCBENCH_CACHE") or Path.home() / ".cache" / "dcbench").expanduser().absolute()
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    return path


_warned: set[str] = set()


@contextlib.contextmanager
def optional_cache() -> Iterator[None]:
    """The block may fail because the cache is full, read-only or impossible: the work goes on, with one warning."""
    try:
        yield
    except OSError as error:
        if not _warned:
            _warned.add(str(error))
            print(f"nothing is kept in the cache: {error}. DCBENCH_CACHE names another folder", file=sys.stderr)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`. It replaces `path` if the block succeeds, and is removed if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name[:150]}-{_HOST}-{os.getpid()}-"  # whose it is: see `remove_leftovers`
    handle, name = tempfile.mkstemp(prefix=prefix, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(MODE)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what `atomic_write` left in a folder when its process was killed; returns the paths.

    What a living process of this machine writes stays, and so does what another machine has written.
    """
    removed = []
    for path in folder.glob(f".*-{_HOST}-*"):
        found = re.fullmatch(rf"\..+-{_HOST}-(\d+)-\w{{8}}(\..*)?", path.name)
        if found and not is_alive(int(found[1])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def is_alive(pid: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old text or the new one, never a part.

    A file name that is not UTF-8 is written with escapes (\\udce9), which JSON reads back as the same name.
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; the same value gives the same bytes. ValueError for NaN."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def not_a_whole_disk(folder: Path) -> Path:
    """The folder. UserError for / and for the home folder or one above: to list them takes hours."""
    home = Path.home().resolve()
    if folder.resolve() in (home, *home.parents):
        raise UserError(f"{folder} holds more than clips; give the folder of the clips itself")
    return folder


def read_bytes(path: Path) -> bytes:
    """The bytes of a regular file. UserError for anything else: a pipe or a device may never end."""
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
        data = path.read_bytes() if is_regular else b""
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error
    if not is_regular:
        raise UserError(f"cannot read {path}: it is no regular file")
    return data


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError for anything else, also for NaN, infinity and endless nesting."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def read_json(path: Path) -> Any:
    """The value in a JSON file; UserError when it cannot be read."""
    data = read_bytes(path)
    try:
        return parse_json(data)
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {first_line(error)}") from error


def read_jsonl(path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """Objects of a JSONL file. `torn`: a crash may have damaged lines, which are skipped. UserError otherwise."""
    return parse_jsonl(read_bytes(path), path, torn)


def parse_jsonl(data: bytes, path: Path, torn: bool = False) -> list[dict[str, Any]]:
    """`read_jsonl` of bytes that were read from `path`."""
    rows = []
    # not splitlines: a JSON string may hold other line separators
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            rows.append(row)
        except ValueError as error:
            if not torn:
                raise UserError(f"{path}, line {number}: not a JSON object ({error})") from error
    return rows


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces. ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the sha256 of a JSON value."""
    return hashlib.sha256(canonical(value).encode(errors="backslashreplace")).hexdigest()[:length]


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
