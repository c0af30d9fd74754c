"""The feature cache: an extractor's output for a clip. The key hashes the clip's pixels and the extractor.

Each entry is a small file, written under a temporary name and renamed. So processes share the cache without a lock.
An entry is checked when it is read. Without a usable cache folder, everything is computed again.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dcbench.errors import UserError
from dcbench.files import cache_dir, optional_cache, parse_json, write_text
from dcbench.weights import save_tensors


@dataclass(frozen=True)
class Entry:
    """A cached file."""

    path: Path
    kind: str  # the extractor's key, or "value" for the per-clip metrics
    size: int  # bytes
    age_days: float


class FeatureCache:
    """Keys are hexadecimal digests joined by "-"; values are named tensors, or JSON."""

    def __init__(self, root: Path | None = None):
        self._root = root

    @property
    def root(self) -> Path:
        return self._root or cache_dir() / "features"

    def _path(self, key: str, suffix: str) -> Path:
        if not all(part.isalnum() for part in key.split("-")):
            raise UserError(f"feature cache key {key!r}: expected letters and digits joined by '-'")
        kind, _, rest = key.rpartition("-")
        return self.root / kind / rest[:2] / f"{rest}{suffix}"

    def get(self, key: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
        """The tensors of a key. None if there are none, or others: of other shapes, not finite, damaged."""
        with optional_cache():
            path = self._path(key, ".safetensors")
            if not path.is_file():
                return None
            with contextlib.suppress(SafetensorError, ValueError):
                found = load_file(path)
                fits = {name: tuple(tensor.shape) for name, tensor in found.items()} == shapes
                if fits and all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
                    return found
            path.unlink(missing_ok=True)
        return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        with optional_cache():
            path = self._private(self._path(key, ".safetensors"))
            try:
                save_tensors(tensors, path)
            except SafetensorError as error:  # it reports a full disk so
                raise OSError(str(error)) from error

    def get_json(self, key: str) -> dict[str, Any] | None:
        with optional_cache():
            path = self._path(key, ".json")
            if not path.is_file():
                return None
            with contextlib.suppress(ValueError):
                value = parse_json(path.read_bytes())
                if isinstance(value, dict):
                    return value
            path.unlink(missing_ok=True)
        return None

    def put_json(self, key: str, value: dict[str, Any]) -> None:
        with optional_cache():
            write_text(self._private(self._path(key, ".json")), json.dumps(value, sort_keys=True))

    def _private(self, path: Path) -> Path:
        """Create the cache's folder for this user alone: whoever writes there decides scores."""
        if not self.root.is_dir():
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
        return path

    def entries(self) -> Iterator[Entry]:
        now = time.time()
        for path in sorted(self.root.rglob("*")):
            if path.is_file() and path.suffix in (".safetensors", ".json") and not path.name.startswith("."):
                stat = path.stat()
                kind = path.relative_to(self.root).parts[0]
                yield Entry(path, kind, stat.st_size, (now - stat.st_mtime) / 86400)

    def prune(self, older_than_days: float = 0.0) -> tuple[int, int]:
        """Remove entries of at least this age. Returns (entries, bytes)."""
        count = size = 0
        for entry in self.entries():
            if entry.age_days >= older_than_days:
                entry.path.unlink(missing_ok=True)
                count, size = count + 1, size + entry.size
        return count, size
