"""Atomic writes, canonical JSON, hashes, and the cache folder. This module does not import torch."""

import contextlib
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dcbench.errors import UserError


def _umask() -> int:
    """The process's umask. Reading it sets it for a moment, so it is read once, before threads start."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:6]
MODE = 0o666 & ~_umask()


def cache_dir() -> Path:
    """$DCBENCH_CACHE, or ~/.cache/dcbench. Created on first use."""
    path = Path(os.environ.get("DCBENCH_CACHE") or Path.home() / ".cache" / "dcbench").expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


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
        if found and not _alive(int(found[1])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old text or the new one, never a part."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; the same value gives the same bytes. ValueError for NaN."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; UserError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_jsonl(path: Path, tolerate_torn_end: bool = False) -> list[dict[str, Any]]:
    """Objects of a JSONL file. `tolerate_torn_end` skips a last line that a crash cut off. UserError otherwise."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            rows.append(row)
        except ValueError as error:
            if tolerate_torn_end and number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not a JSON object ({error})") from error
    return rows


def canonical(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces. ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    """The first `length` hex digits of the sha256 of a JSON value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:length]


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
