"""The feature cache: found again by content, safe for several processes, a damaged entry is made anew."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from dcbench.errors import UserError
from dcbench.metrics.cache import FeatureCache


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    features = torch.randn(400)
    assert cache.get("abc-123") is None and cache.get_json("value-123") is None
    cache.put("abc-123", {"features": features})
    cache.put_json("value-123", {"value": 0.1, "per_frame": [1.0, 0.3]})
    again = FeatureCache(tmp_path)
    found = again.get("abc-123")
    assert found is not None and torch.equal(found["features"], features)
    assert again.get_json("value-123") == {"value": 0.1, "per_frame": [1.0, 0.3]}
    assert again.get("abd-123") is None and again.get("abc-124") is None


def test_a_damaged_entry_counts_as_none_and_goes(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("abc-123", {"features": torch.ones(3)})
    cache.put_json("value-1", {"value": 1.0})
    for entry in list(cache.entries()):
        entry.path.write_bytes(entry.path.read_bytes()[:5])
    assert cache.get("abc-123") is None and cache.get_json("value-1") is None
    assert list(cache.entries()) == []


def test_keys_lead_nowhere_else(tmp_path: Path) -> None:
    for key in ("../x-1", "a/b-1", "", "a--b", "-"):
        with pytest.raises(UserError, match="feature cache key"):
            FeatureCache(tmp_path).get(key)


def test_listing_and_pruning(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    for index in range(5):
        cache.put(f"abc-{index}{index}", {"features": torch.zeros(10)})
    kinds = {entry.kind for entry in cache.entries()}
    assert kinds == {"abc"} and all(entry.size > 40 for entry in cache.entries())
    assert cache.prune(older_than_days=1) == (0, 0)
    count, size = cache.prune()
    assert count == 5 and size > 200 and list(cache.entries()) == []


def write_many(folder: Path, value: float) -> None:
    cache = FeatureCache(folder)
    for round_ in range(40):
        cache.put("abc-1", {"features": torch.full((2000,), value)})
        found = cache.get("abc-1")
        assert found is not None and len(set(found["features"].tolist())) == 1, round_


def test_processes_share_it_without_torn_entries(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(tmp_path, float(value))) for value in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(list(FeatureCache(tmp_path).entries())) == 1
