"""What a finished run takes on the disk, and what of it may go. Does not import torch."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dcbench.errors import UserError
from dcbench.files import digest
from dcbench.record import read_manifest, read_record
from dcbench.runs.directory import RunDirectory

Keep = Literal["record", "clips"]


@dataclass(frozen=True)
class Part:
    """Files of a run that belong together."""

    name: str
    files: tuple[Path, ...]
    size: int  # bytes


def clean(path: Path, keep: Keep, force: bool = False, dry_run: bool = False) -> list[Part]:
    """Remove what a finished run does not need any more. Returns what was removed, or with `dry_run` would be.

    "record" keeps all but the clips and what "clips" removes too: the work folder of a program, and incomplete files.
    UserError if this is no run, if it is in use, or if its clips are not all scored (unless `force`).
    """
    directory = RunDirectory.of_run(path)
    if dry_run:
        return _removable(directory, keep, force)
    with directory.locked("cleaning"):
        parts = _removable(directory, keep, force)
        for part in parts:
            for file in part.files:
                file.unlink(missing_ok=True)
        if (path / "work").is_dir():
            shutil.rmtree(path / "work")  # its empty folders
        if keep == "record" and (path / "clips").is_dir() and not any((path / "clips").iterdir()):
            (path / "clips").rmdir()
        if parts:
            count = sum(len(part.files) for part in parts)
            directory.note(f"cleaned to its {keep}: {count} files, {sum(part.size for part in parts)} bytes removed")
    return parts


def _removable(directory: RunDirectory, keep: Keep, force: bool) -> list[Part]:
    if not force and (reason := _unscored(directory)):
        raise UserError(
            f"{directory.path}: {reason}. Finish it first (`dcbench run` with its options, or `dcbench score`), or "
            "give --force"
        )
    for folder in (directory.path / "clips", directory.path / "work"):
        if folder.is_symlink():
            raise UserError(f"{folder} is a link; remove what it points to yourself")
    clips = [file for file in (directory.path / "clips").glob("*.mkv") if file.name[0] != "."]
    found = {
        "clips": clips if keep == "record" else [],
        "work folder": [path for path in (directory.path / "work").rglob("*") if path.is_symlink() or path.is_file()],
        "incomplete files": directory.leftovers(),
    }
    return [_part(name, files) for name, files in found.items() if files]


def _part(name: str, files: list[Path]) -> Part:
    return Part(name, tuple(sorted(files)), sum(file.lstat().st_size for file in files))


def _unscored(directory: RunDirectory) -> str:
    """Why the clips of a run are still needed; "" if all are scored. Clips that were removed count as they were."""
    if not directory.record.is_file():
        return "it is not scored yet"
    record, cases = read_record(directory.path), read_manifest(directory.manifest)
    if directory.folder.is_file():  # two folders: it has no clips of its own
        return ""
    made, failed = directory.made_samples(), {failure.id for failure in record.failures}
    if missing := [case.id for case in cases if case.id not in made]:
        return f"{len(missing)} of its {len(cases)} clips are not made, for example {missing[0]}"
    if without := [case.id for case in cases if case.id in failed]:
        return f"{len(without)} of its {len(cases)} clips are not scored, for example {without[0]}"
    hashes = digest([[case.id, made[case.id]["sha256"]] for case in cases], 64)
    if hashes != record.clips_sha256 and not any(case.apart for case in cases):  # with clips apart, theirs are in it
        return "its record is of other clips than those that are there"
    return ""
