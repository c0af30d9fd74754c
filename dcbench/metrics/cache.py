"""The feature cache: an extractor's output for a clip. The key hashes the clip's pixels and the extractor.

Each entry is a small file, written under a temporary name and renamed. So processes share the cache without a lock.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dcbench.errors import UserError
from dcbench.files import cache_dir, write_text
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
        self.root = root or cache_dir() / "features"

    def _path(self, key: str, suffix: str) -> Path:
        if not all(part.isalnum() for part in key.split("-")):
            raise UserError(f"feature cache key {key!r}: expected letters and digits joined by '-'")
        kind, _, rest = key.rpartition("-")
        return self.root / kind / rest[:2] / f"{rest}{suffix}"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key, or None. A damaged file is removed and gives None."""
        path = self._path(key, ".safetensors")
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except (SafetensorError, OSError):
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        save_tensors(tensors, self._path(key, ".safetensors"))

    def get_json(self, key: str) -> dict[str, Any] | None:
        path = self._path(key, ".json")
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            path.unlink(missing_ok=True)
            return None
        return value if isinstance(value, dict) else None

    def put_json(self, key: str, value: dict[str, Any]) -> None:
        write_text(self._path(key, ".json"), json.dumps(value, sort_keys=True))

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
