"""Which weights are which: a pinned sha256, or else the one of the first use, which is written down beside the weights.

`trusted.json` in the folder of the weights has for each file its sha256, and its size and time, so that a file is read
again only when they change; and for each repository of the hub its commit.
"""

import contextlib
from pathlib import Path
from typing import Any

from filelock import FileLock

from dcbench.catalogue import WeightSource
from dcbench.errors import UserError
from dcbench.files import read_json, sha256_file, write_json

RECORD = "trusted.json"


def known(folder: Path, name: str) -> dict[str, Any]:
    """What is written down of a file or repository; {} for none."""
    return _read(folder).get(name, {})


def check(source: WeightSource, path: Path, folder: Path) -> None:
    """Raise UserError if a file is not the pinned one, or not that of its first use. The first use is written down."""
    now = _stamp(path)
    before = known(folder, source.name)
    if before.get("stamp") == now and source.fits(str(before.get("sha256"))):
        return
    found = sha256_file(path)
    if not source.fits(found):
        raise UserError(
            f"{path}: sha256 is {found}, expected {source.sha256}, which its card pins. Remove it and fetch it again"
        )
    if not source.is_pinned and before.get("sha256", found) != found:
        raise UserError(
            f"{path} was changed: its sha256 is {found}, at its first use it was {before['sha256']}. Bring the first "
            "file back; or, if you changed it, accept it: dcbench weights verify NAME --accept"
        )
    write(folder, source.name, {"sha256": found, "stamp": now})


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def write(folder: Path, name: str, value: dict[str, Any] | None) -> None:
    """Write down what is known of a file or repository; None forgets it. A folder that is read-only stays as it is."""
    lock = folder / ".locks" / f"{RECORD}.lock"
    with contextlib.suppress(PermissionError):
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # processes may write down several files at once
            record = _read(folder)
            record.pop(name, None)
            if value is not None:
                record[name] = value
            write_json(folder / RECORD, dict(sorted(record.items())))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        return {}
    record = read_json(path)
    if not isinstance(record, dict) or not all(isinstance(value, dict) for value in record.values()):
        raise UserError(f"{path} is no record of weights; remove it to write it anew")
    return record
