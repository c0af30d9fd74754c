"""Weight files: where they are stored, how they are fetched, and how they are read without running their code."""

import hashlib
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcbench.catalogue import WeightSource
from dcbench.errors import UserError, first_line
from dcbench.files import atomic_write, cache_dir, sha256_file


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


def find(source: WeightSource) -> Path | None:
    """The file if it exists: in `weights_dir()`, or with `source.name` as its path. Else None."""
    for path in (weights_dir() / source.name, Path(source.name).expanduser()):
        if path.is_file():
            return path
    return None


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
    """The file's path. A missing file is downloaded (resumable) and checked; if `offline`, MissingWeights."""
    folder = to or weights_dir()
    path = folder / source.name
    if path.is_file():
        return path
    here = find(source)
    if here is not None and to is None:
        return here
    if offline or not (source.repository or source.url):
        place = "into $DCBENCH_WEIGHTS (~/.cache/dcbench/weights if that is not set)"
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
    """Download into a folder beside the target. huggingface_hub resumes there; pooch checks the file."""
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
    except Exception as error:  # network and hub raise many types; the message shows the cause
        raise MissingWeights(
            f"could not download {source.name}: {type(error).__name__}: {first_line(error)}\n"
            f"  {describe(source)}\n  Or put the file at {folder}/{source.name}"
        ) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors or PyTorch file, on the CPU. No code in the file is executed.

    A PyTorch file may hold the tensors at the top, or under "state_dict" or "module". Names and dtypes are returned as
    stored. UserError for a truncated, foreign or unsafe file.
    """
    if not path.is_file():
        raise UserError(f"no such weight file: {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); fetch it again") from error
    try:
        # files older than PyTorch 1.6 are not zip archives and cannot be memory-mapped
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # depends on the damage: UnpicklingError, RuntimeError, EOFError, KeyError ...
        raise UserError(
            f"{path} cannot be loaded safely: {first_line(error)}. It is truncated, is not a checkpoint, or "
            "holds objects other than tensors, which dcbench does not load."
        ) from error
    if isinstance(loaded, dict):
        for key in ("state_dict", "module"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise UserError(f"{path} is not a plain dictionary of tensors; expected a state dict")
    return loaded


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
