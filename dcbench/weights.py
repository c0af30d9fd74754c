"""Weight files: where they lie, how they are fetched, and how they are read without running what they hold."""

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcbench.catalogue import WeightSource
from dcbench.errors import UserError


class MissingWeights(UserError):
    """A weight file is not here; the message says its size, its licence and how to get it."""


def cache_dir() -> Path:
    """$DCBENCH_CACHE, or ~/.cache/dcbench. Created on first use."""
    path = Path(os.environ.get("DCBENCH_CACHE") or Path.home() / ".cache" / "dcbench").expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def weights_dir() -> Path:
    """$DCBENCH_WEIGHTS, or `weights` in the cache: put a file here under its card's name and it is found."""
    path = Path(os.environ.get("DCBENCH_WEIGHTS") or cache_dir() / "weights").expanduser().absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; renamed over it when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def human_size(size: int) -> str:
    if not size:
        return "unknown size"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def find(source: WeightSource) -> Path | None:
    """The file, if it is here already: in `weights_dir()`, or as a path of its own."""
    for path in (weights_dir() / source.name, Path(source.name).expanduser()):
        if path.is_file():
            return path
    return None


def describe(source: WeightSource) -> str:
    """What a user must know before a download."""
    where = f"{source.repository}/{source.file}".rstrip("/") if source.repository else source.url or "no public address"
    lines = [f"{source.name}: {human_size(source.size)}, licence: {source.licence or 'not stated'}, from {where}"]
    if source.gated:
        lines.append(f"  gated: accept its terms on {source.repository}, then `hf auth login`")
    if source.how:
        lines.append(f"  {source.how}")
    return "\n".join(lines)


def check_free(source: WeightSource, folder: Path) -> None:
    """Raise UserError when the disk of `folder` (made where needed) has no room for the file."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if source.size and free < source.size * 1.05:
        raise UserError(
            f"{source.name} needs {human_size(source.size)} but only {human_size(free)} are free in {folder}. "
            "Free some room, or set DCBENCH_CACHE (repositories of the hub: HF_HOME) to another disk."
        )


def fetch(source: WeightSource, offline: bool = False, to: Path | None = None) -> Path:
    """The file's path; downloaded (resumable) and checked first where that is needed and allowed."""
    folder = to or weights_dir()
    path = folder / source.name
    if path.is_file():
        return path
    here = find(source)
    if here is not None and to is None:
        return here
    if offline or not (source.repository or source.url):
        place = "into $DCBENCH_WEIGHTS (~/.cache/dcbench/weights where that is not set)"
        how = "dcbench weights fetch NAME, or --download, or put it " if source.repository or source.url else "put it "
        brief = f"{human_size(source.size)}, licence: {source.licence or 'not stated'}"
        raise MissingWeights(f"{source.name} is missing ({brief}). Get it: {how}{place}\n  {describe(source)}")
    if Path(source.name).is_absolute() or ".." in Path(source.name).parts:
        raise UserError(f"{source.name}: a download must stay below {folder}; give the file a plain name in its card")
    check_free(source, folder)
    got = _download(source, folder)
    if source.sha256 and (actual := sha256_file(got)) != source.sha256:
        got.unlink()
        raise UserError(
            f"{source.name}: sha256 is {actual}, expected {source.sha256}; the download was removed. Try again."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(got, path)
    return path


def _download(source: WeightSource, folder: Path) -> Path:
    """Download into a folder beside the target: huggingface_hub resumes there, pooch checks what it gets."""
    partial = folder / ".partial" / source.name
    try:
        if source.repository:
            from huggingface_hub import hf_hub_download

            return Path(
                hf_hub_download(source.repository, source.file, revision=source.revision or None, local_dir=partial)
            )
        import pooch

        known = f"sha256:{source.sha256}" if source.sha256 else None
        return Path(pooch.retrieve(source.url, known, fname=Path(source.name).name, path=partial, progressbar=True))
    except Exception as error:  # the network and the hub raise dozens of types; the cause is kept and shown
        raise MissingWeights(
            f"could not download {source.name}: {type(error).__name__}: {first_line(error)}\n"
            f"  {describe(source)}\n  Or put the file at {folder}/{source.name}"
        ) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors or PyTorch file, on the CPU; nothing that the file holds is executed.

    A PyTorch file may hold the tensors themselves, or below "state_dict" or "module": they are returned as stored
    otherwise. Raises UserError for a truncated, foreign or unsafe file.
    """
    if not path.is_file():
        raise UserError(f"no such weight file: {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    try:
        # files older than PyTorch 1.6 are no zip archives and cannot be mapped into memory
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # by the kind of damage: UnpicklingError, RuntimeError, EOFError, KeyError ...
        raise UserError(
            f"{path} cannot be loaded safely: {first_line(error)}. It is truncated, is no checkpoint, or holds "
            "objects other than tensors, which dcbench does not execute."
        ) from error
    if isinstance(loaded, dict):
        for key in ("state_dict", "module"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} holds no plain dictionary of tensors; expected a state dict")
    return loaded


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file atomically."""
    with atomic_write(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)
