import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve a busy two-core machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # the processes share the cores: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CHEAP_METRIC = '''
"""A metric of twelve numbers a clip, so that tests of the runner do not pay for I3D."""
import torch
from dcbench.metrics.base import FeatureExtractor, Score
from dcbench.metrics.distances import SetDistance, score_frechet


class Corners(FeatureExtractor):
    name, weights_sha256, preprocessing, num_features = "corners", "none", "mean of quarters", 12

    def forward(self, clips):
        return torch.nn.functional.adaptive_avg_pool2d(clips.float().mean(1), 2).flatten(1)


def build(card, runtime):
    return SetDistance(card, Corners(), score_frechet)
'''


PROCESSES = 4  # at most: each takes up to 2 GB


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process a core. Where files are named, or pytest's output is asked for (-s), this process alone: 0."""
    named = any(".py" in argument for argument in config.args)
    return 0 if named or config.getoption("capture") == "no" else min(PROCESSES, os.cpu_count() or 1)


@pytest.fixture(scope="session")
def cheap_metric(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a metric card whose extractor is twelve pixel means."""
    folder = tmp_path_factory.mktemp("metric")
    (folder / "corners.py").write_text(CHEAP_METRIC)
    card = folder / "corners.toml"
    card.write_text(
        'name = "corners"\ntitle = "Corners"\nsummary = "Twelve pixel means"\nkind = "set"\nhigher_is_better = false\n'
        f'entry_point = "{folder / "corners.py"}:build"\n'
    )
    return str(card)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features are cached per test session, never in the user's cache; converted weights stay shared."""
    base = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("DCBENCH_CACHE", str(base))


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Replace functions of the decoding process by others, and let it be silent for one second only."""
    from dcbench import video_processes

    original = video_processes.WORKER
    script = tmp_path / "patched_worker.py"

    def start(patch: str) -> None:
        script.write_text(
            "import ctypes, importlib.util, os, sys, time\n"
            f"spec = importlib.util.spec_from_file_location('worker', {str(original)!r})\n"
            "worker = importlib.util.module_from_spec(spec)\n"
            "spec.loader.exec_module(worker)\n"
            "worker.pipe.every = 0.1\n"
            f"{patch}\n"
            "worker.main()\n"
        )
        video_processes.pool.close()
        monkeypatch.setattr(video_processes, "WORKER", script)
        monkeypatch.setattr(video_processes, "SECONDS", 1.0)

    yield start
    video_processes.pool.close()
