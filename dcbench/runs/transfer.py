"""A run at a URL: `push` copies its files there, `pull` brings them back. Does not import torch.

A URL is what fsspec opens: s3://, gs://, memory://, file:// or a folder. There, `index.json` has the size and the hash
of each file. It says `whole` only after the last file. What is pulled is data of a stranger: only the files that a run
has are accepted, each is checked, and none is executed. The report is not copied, because its page is a program.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from fsspec.core import url_to_fs
from pydantic import Field, NonNegativeInt

from dcbench.errors import UserError, first_line
from dcbench.facts import Facts, validate
from dcbench.files import atomic_write, canonical, parse_json, sha256_file
from dcbench.progress import track
from dcbench.record import check_clip_id
from dcbench.runs.directory import RunDirectory

INDEX = "index.json"
LARGEST_INDEX = 2**28  # bytes; a million clips need half of it
WORKERS = 8  # files at a time
OFTEN = 2**28  # bytes between two index files of a push that goes on
CHUNK = 2**20
NAME = re.compile(
    r"(?:plan|request|record|cost)\.json|(?:manifest|generated|per_clip|samples|samples-[A-Za-z0-9-]+)\.jsonl|log\.txt"
    r"|clips/(?P<clip>[^/\\]+)\.mkv"
)


class Entry(Facts):
    size: NonNegativeInt
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Index(Facts):
    schema_version: Literal[1] = 1
    whole: bool  # False: a push has begun, and these are the files that are there
    files: dict[str, Entry] = {}


@dataclass(frozen=True)
class Moved:
    """What was copied."""

    files: int
    size: int  # bytes
    equal: int  # files that were there already


def is_name(name: str) -> bool:
    """Whether a run may have a file of this name, relative to its directory."""
    found = NAME.fullmatch(name)
    if not found:
        return False
    with contextlib.suppress(UserError):
        return found["clip"] is None or bool(check_clip_id(found["clip"]))
    return False


def push(path: Path, url: str, quiet: bool = False) -> Moved:
    """Copy a run to a URL: only the files that are missing there or differ. The same command continues.

    Clips that are at the URL and were removed here (`dcbench clean`) stay in the index. Nothing is removed at the URL.
    UserError if the URL holds something else, or if it cannot be reached.
    """
    directory, place = RunDirectory.of_run(path), _Place(url)
    with directory.locked("pushing"):
        mine = {name: _entry(file) for name, file in _files(directory).items()}
        before, sizes = place.index(torn=True), place.sizes()
        if before is None and sizes:
            raise UserError(f"{url} holds other files ({min(sizes)} ...) and no {INDEX} of a push. Give a new folder")
        there = {} if before is None else {n: e for n, e in before.files.items() if sizes.get(n) == e.size}
        if "plan.json" in there and there["plan.json"] != mine["plan.json"]:
            raise UserError(f"{url} holds another run than {path}. Give another folder")
        kept = _kept_clips(directory, there, mine, url)
        right = {name: entry for name, entry in mine.items() if there.get(name) == entry}
        wanted = [name for name in mine if name not in right]
        if wanted or before != Index(whole=True, files=mine | kept):
            _upload(directory, place, wanted, mine, right, kept, quiet)
        return Moved(len(wanted), sum(mine[name].size for name in wanted), len(mine) - len(wanted))


def _upload(
    directory: RunDirectory,
    place: "_Place",
    wanted: list[str],
    mine: dict[str, Entry],
    right: dict[str, Entry],
    kept: dict[str, Entry],
    quiet: bool,
) -> None:
    """Copy the files `wanted`. `right` and `kept` are there. The index says at each moment only what is true."""
    place.make_folders()
    place.write_index(Index(whole=False, files=right | kept))
    new, told = 0, 0
    try:
        for name in track(_each(lambda n: place.put(directory.path / n, n), wanted), len(wanted), "pushing", 0, quiet):
            right[name] = mine[name]
            new += mine[name].size
            if new - told > OFTEN:
                place.write_index(Index(whole=False, files=right | kept))
                told = new
    except BaseException:
        with contextlib.suppress(UserError):
            place.write_index(Index(whole=False, files=right | kept))
        raise
    place.write_index(Index(whole=True, files=mine | kept))


def _kept_clips(directory: RunDirectory, there: dict[str, Entry], mine: dict[str, Entry], url: str) -> dict[str, Entry]:
    """The clips at the URL whose file was removed here. UserError if one of them is not a clip of this directory."""
    made = directory.made_samples()
    gone = {name: entry for name, entry in there.items() if name.startswith("clips/") and name not in mine}
    for name, entry in gone.items():
        if made.get(Path(name).stem, {}).get("file_sha256") != entry.sha256:
            raise UserError(
                f"{url} has {name}, which {directory.path} has not made. Pull into another directory to see it, or "
                "push to a new folder"
            )
    return gone


def _files(directory: RunDirectory) -> dict[str, Path]:
    """The files of a run, by name. UserError for a link: it may lead to a file that is not of the run."""
    found = {}
    for file in sorted([*directory.path.iterdir(), *(directory.path / "clips").glob("*.mkv")]):
        name = file.relative_to(directory.path).as_posix()
        if file.is_symlink() and (is_name(name) or name == "clips"):
            raise UserError(f"{file} is a link; only files of the run itself are pushed. Put the file there")
        if is_name(name) and file.is_file():
            found[name] = file
    return found


def pull(url: str, path: Path, quiet: bool = False) -> Moved:
    """Bring a run from a URL into a directory: the files that are missing there. The same command continues.

    The directory is a run only when all is there, because plan.json comes last. UserError if the push was not finished,
    if a file is not what the index says, or if the directory holds something else.
    """
    place = _Place(url)
    index = place.index()
    if index is None:
        raise UserError(f"{url} holds no run: it has no {INDEX}. `dcbench push RUN URL` writes it")
    if not index.whole or "plan.json" not in index.files:
        raise UserError(f"{url} is not whole, because a push to it was not finished. Give that `dcbench push` again")
    directory = RunDirectory(path)
    _check_target(path, index)
    with directory.locked("pulling"):
        wanted = [name for name, entry in index.files.items() if not _is_there(path / name, entry, url)]
        size = sum(index.files[name].size for name in wanted)
        if (free := shutil.disk_usage(path).free) < size:
            raise UserError(f"{path}: {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB needed. Free some room")
        first, last = (sorted(name for name in wanted if (name == "plan.json") == is_plan) for is_plan in (False, True))
        for names in (first, last):
            done = _each(lambda name: place.get(name, index.files[name], path / name), names)
            for _ in track(done, len(names), "pulling", 0, quiet or names == last):
                pass
    return Moved(len(wanted), size, len(index.files) - len(wanted))


def _check_target(path: Path, index: Index) -> None:
    """Raise UserError if the directory is not empty and not this run, or if a link in it leads elsewhere."""
    for name in ("", "clips", *index.files):
        if (path / name).is_symlink():
            raise UserError(f"{path / name} is a link. Nothing is written through it; give another directory")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is no folder. Give a new one")
    known = {name.split("/")[0] for name in index.files}
    strange = [file.name for file in path.iterdir() if file.name[0] != "."] if path.is_dir() else []
    if not (path / "plan.json").is_file() and (strange := [name for name in strange if name not in known]):
        raise UserError(f"{path} holds other files ({strange[0]} ...) and no plan.json. Give a new folder")


def _is_there(file: Path, entry: Entry, url: str) -> bool:
    """Whether a file is there already. UserError if another one is: it is not replaced, because it may be newer."""
    if not file.exists():
        return False
    if file.name != "log.txt" and _entry(file) != entry:
        raise UserError(f"{file} differs from the one at {url}. Nothing is replaced; pull into a new directory")
    return True


def _entry(file: Path) -> Entry:
    return Entry(size=file.stat().st_size, sha256=sha256_file(file))


class _Place:
    """A folder at a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        with self._reached():
            self.files, self.root = url_to_fs(url)
            self.root = self.root.rstrip("/")

    @contextlib.contextmanager
    def _reached(self) -> Iterator[None]:
        """Whatever a storage system raises becomes a UserError. An ImportError names the package to install."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.url}: {type(error).__name__}: {first_line(error)}. When this is mended, the same command "
                "continues"
            ) from error

    def index(self, torn: bool = False) -> Index | None:
        """What the index says; None if there is none. UserError if it is not one, or names what no run has.

        `torn`: one that was cut off, because a push was killed while it wrote it, says that nothing is there.
        """
        with self._reached():
            try:
                with self.files.open(f"{self.root}/{INDEX}", "rb") as file:
                    data = file.read(LARGEST_INDEX)
            except FileNotFoundError:
                return None
        try:
            value: Any = parse_json(data)
        except ValueError as error:
            if torn:
                return Index(whole=False)
            raise UserError(f"{self.url}/{INDEX} is not the index of a push: {first_line(error)}") from error
        found: Index = validate(value, Index, f"{self.url}/{INDEX}")
        if wrong := [name for name in found.files if not is_name(name)]:
            raise UserError(f"{self.url}/{INDEX} names {wrong[0]!r}, which is no file of a run. Nothing was written")
        return found

    def write_index(self, index: Index) -> None:
        text = json.dumps(json.loads(canonical(index.model_dump(mode="json"))), indent=0) + "\n"
        with self._reached():
            self.files.pipe_file(f"{self.root}/{INDEX}", text.encode())

    def sizes(self) -> dict[str, int]:
        """The size of each file, by its name relative to the folder."""
        with self._reached():
            self.files.invalidate_cache()
            found = self.files.find(self.root, detail=True)
        named = {name.removeprefix(self.root).lstrip("/"): int(about["size"]) for name, about in found.items()}
        return {name: size for name, size in named.items() if name}  # "": an object that stands for the folder itself

    def make_folders(self) -> None:
        with self._reached():
            self.files.makedirs(f"{self.root}/clips", exist_ok=True)

    def put(self, file: Path, name: str) -> None:
        with self._reached():
            self.files.put_file(str(file), f"{self.root}/{name}")

    def get(self, name: str, entry: Entry, to: Path) -> None:
        """Bring one file. UserError if it is not what the index says; then nothing is left."""
        with atomic_write(to) as temporary, temporary.open("wb") as file:
            seen, size = hashlib.sha256(), 0
            with self._reached():
                source: io.BufferedIOBase = self.files.open(f"{self.root}/{name}", "rb")
            with contextlib.closing(source):
                while size <= entry.size:
                    with self._reached():
                        data = source.read(CHUNK)
                    if not data:
                        break
                    size += len(data)
                    seen.update(data)
                    file.write(data)
            if (size, seen.hexdigest()) != (entry.size, entry.sha256):
                raise UserError(f"{self.url}/{name} is not what {INDEX} says: it was changed or damaged. Push it again")


def _each(action: Callable[[str], None], names: Iterable[str]) -> Iterator[str]:
    """Do something for each name, some at a time. Yields a name when it is done. The first error ends it."""
    pool = ThreadPoolExecutor(WORKERS)
    try:
        doing = {pool.submit(action, name): name for name in names}
        for done in as_completed(doing):
            done.result()
            yield doing[done]
    finally:
        pool.shutdown(cancel_futures=True)
