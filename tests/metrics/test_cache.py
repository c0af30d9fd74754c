"""The feature cache: found again by content, safe for several processes, a damaged entry is made anew."""

import multiprocessing
from pathlib import Path

import pytest
import torch

from dcbench import files
from dcbench.errors import UserError
from dcbench.metrics import cache as cache_module
from dcbench.metrics.cache import FeatureCache
from dcbench.weights import save_tensors

SHAPE = {"features": (3,)}


def test_values_come_back_as_they_were(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    features = torch.randn(400)
    assert cache.get("abc-123", SHAPE) is None and cache.get_json("value-123") is None
    cache.put("abc-123", {"features": features})
    cache.put_json("value-123", {"value": 0.1, "per_frame": [1.0, 0.3]})
    again = FeatureCache(tmp_path)
    found = again.get("abc-123", {"features": (400,)})
    assert found is not None and torch.equal(found["features"], features)
    assert again.get_json("value-123") == {"value": 0.1, "per_frame": [1.0, 0.3]}
    assert again.get("abd-123", SHAPE) is None and again.get("abc-124", SHAPE) is None


def test_a_damaged_entry_counts_as_none_and_goes(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("abc-123", {"features": torch.ones(3)})
    cache.put_json("value-1", {"value": 1.0})
    for entry in list(cache.entries()):
        entry.path.write_bytes(entry.path.read_bytes()[:5])
    assert cache.get("abc-123", SHAPE) is None and cache.get_json("value-1") is None
    assert list(cache.entries()) == []


BAD = {
    "not finite": {"features": torch.tensor([1, float("nan"), 1])},
    "another shape": {"features": torch.ones(4)},
    "another name": {"feature": torch.ones(3)},
    "one more": {"features": torch.ones(3), "more": torch.ones(3)},
}


@pytest.mark.parametrize("kind", BAD)
def test_an_entry_that_cannot_be_features_is_not_believed(kind: str, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    save_tensors(BAD[kind], tmp_path / "abc" / "12" / "123.safetensors")
    assert cache.get("abc-123", SHAPE) is None
    assert list(cache.entries()) == []
    (tmp_path / "value" / "12").mkdir(parents=True)
    for text in ('{"value": NaN}', "[1]", "\udcff".encode("utf-8", "surrogatepass"), b"[" * 9999):
        (tmp_path / "value" / "12" / "123.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert cache.get_json("value-123") is None


def test_nobody_else_reads_or_writes_it(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "features")
    cache.put("abc-1", {"features": torch.ones(3)})
    assert (tmp_path / "features").stat().st_mode & 0o777 == 0o700


def test_without_a_usable_folder_the_work_goes_on_with_one_warning(tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(files, "_warned", set())
    cache = FeatureCache(tmp_path / "file" / "features")
    for index in range(3):
        cache.put(f"abc-{index}", {"features": torch.ones(3)})
        assert cache.get(f"abc-{index}", SHAPE) is None
        cache.put_json(f"abc-{index}", {"value": 1})
        assert cache.get_json(f"abc-{index}") is None
    said = capsys.readouterr().err
    assert said.count("nothing is kept in the cache") == 1 and "DCBENCH_CACHE" in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_no_end_of_scoring(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(files, "_warned", set())

    def full(*_: object) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(cache_module, "save_tensors", full)
    FeatureCache(tmp_path).put("abc-1", {"features": torch.ones(3)})
    assert "No space left" in capsys.readouterr().err


def test_keys_lead_nowhere_else(tmp_path: Path) -> None:
    for key in ("../x-1", "a/b-1", "", "a--b", "-"):
        with pytest.raises(UserError, match="feature cache key"):
            FeatureCache(tmp_path).get(key, SHAPE)


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
        found = cache.get("abc-1", {"features": (2000,)})
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
