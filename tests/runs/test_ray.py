"""`--engine ray` on a real Ray: three nodes on this machine, each with one CPU."""

import importlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import kept, world

pytest.importorskip("ray", reason="ray is not installed: uv sync --extra ray")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # Ray itself uses what is deprecated

MODEL = """
import os, signal, time
from pathlib import Path

class Waits:
    conditions_on = frozenset({"image"})
    def __init__(self, card, runtime):
        self.card, self.here = card, Path(os.environ["HERE"])
    def generate(self, requests):
        for request in requests:
            with (self.here / "begun").open("a") as file:
                file.write(f"{request.clip_id} {os.getpid()}\\n")
            if (self.here / "kills").exists() and request.clip_id in (self.here / "kills").read_text():
                os.kill(os.getpid(), signal.SIGKILL)
            if (self.here / "fails").exists():
                raise ValueError("this is the cause")
        while (self.here / "closed").exists():
            time.sleep(0.1)
        return [request.image[None].repeat(request.num_frames, 1, 1, 1) for request in requests]
"""
RUN = ["run", "--model", "model.py:Waits", "--dataset", "shapes", "--protocol", "small.toml", "--metrics", "motion"]
RUN += ["--limit", "8", "--device", "cpu"]
SMALL = 80 * 1024 * 1024  # bytes of a node for objects; Ray does not take less


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = world(tmp_path_factory.mktemp("ray") / "w")
    (folder / "model.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HERE", str(folder))  # of the nodes too, which start with this environment
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("DCBENCH_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        yield folder


@pytest.fixture(autouse=True)
def nothing_begun(here: Path, one: dict[str, bytes]) -> None:
    for name in ("begun", "kills", "fails", "closed"):
        (here / name).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def one(here: Path) -> dict[str, bytes]:
    """The files of the run that one process makes."""
    code, said = finished(start(here, "--out", "one"))
    assert code == 0, said
    return kept(here / "one")


@pytest.fixture(scope="module")
def cluster(here: Path) -> Iterator[Any]:
    node = {"num_cpus": 1, "object_store_memory": SMALL, "include_dashboard": False}
    several = importlib.import_module("ray.cluster_utils").Cluster(initialize_head=True, head_node_args=node)
    for _ in range(2):
        several.add_node(wait=False, num_cpus=1, object_store_memory=SMALL)
    several.wait_for_nodes(timeout=200)
    yield several
    several.shutdown()


def start(here: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dcbench", *RUN, *arguments]
    return subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, said = process.communicate(timeout=400)
    assert "Traceback" not in said
    return process.returncode, said


def begun(here: Path) -> list[tuple[str, int]]:
    """Each clip that a worker has begun, and the worker's process."""
    file = here / "begun"
    rows = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    return [(clip, int(pid)) for clip, pid in rows]


def until(holds: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    last = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < last
        if process and process.poll() is not None:
            pytest.fail(f"it ended: {process.communicate()[1]}")
        time.sleep(0.2)


def lives(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] not in "ZX"


def test_a_node_that_is_killed_and_one_that_joins(here, one, cluster):
    """The record, the lines of the clips and the clips are those of one process to the byte."""
    (here / "closed").touch()
    process = start(here, "--out", "several", "--engine", "ray", "--address", cluster.address, "--workers", "3")
    until(lambda: len(begun(here)) == 3, process)
    before = dict(begun(here))
    leaves = next(iter(cluster.worker_nodes))
    cluster.remove_node(leaves, allow_graceful=False)
    cluster.add_node(wait=False, num_cpus=1, object_store_memory=SMALL)
    until(lambda: len(begun(here)) == 4, process)
    again, fourth = begun(here)[3]
    assert again in before
    assert fourth not in before.values()
    assert not lives(before[again])
    (here / "closed").unlink()
    code, said = finished(process)
    assert code == 0, said
    assert "Ray: 3 workers, each with 1 CPU" in said
    assert kept(here / "several") == one
    assert len(one) == 4 + 8
    assert [clip for clip, _ in begun(here)].count(again) == 2
    assert len(begun(here)) == 9


def test_a_clip_that_kills_its_workers_ends_the_run_and_what_is_finished_stays(here, one, cluster):
    clip = next(path.stem for path in sorted((here / "one" / "clips").iterdir()))
    (here / "kills").write_text(clip)
    on = ("--out", "kills-run", "--engine", "ray", "--address", cluster.address, "--workers", "2")
    code, said = finished(start(here, *on))
    assert code == 2
    assert f"the worker that made clip {clip} ended 2 times: " in said
    assert [other for other, _ in begun(here)].count(clip) == 2
    (here / "kills").unlink()
    code, said = finished(start(here, *on))
    assert code == 0, said
    assert kept(here / "kills-run") == one


def test_an_error_of_the_model_is_told_once(here, cluster):
    (here / "fails").touch()
    code, said = finished(start(here, "--out", "fails-run", "--engine", "ray", "--address", cluster.address))
    assert code == 1
    assert said.count("ValueError: this is the cause") == 1
    assert said.count("this is the cause") == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_run(how, here, cluster):
    (here / "closed").touch()
    process = start(here, "--out", f"ends-{how}", "--engine", "ray", "--address", cluster.address, "--workers", "1")
    until(lambda: len(begun(here)) == 1, process)
    process.send_signal(how)
    code, said = finished(process)
    assert code == (130 if how == signal.SIGINT else -how)
    assert ("dcbench: stopped. The same command continues" in said) == (how == signal.SIGINT)
    until(lambda: not lives(begun(here)[0][1]))


@pytest.fixture
def short() -> Iterator[str]:
    """A folder with a short name: Ray's sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        yield folder


def test_a_ray_of_our_own_is_ended(here, one, short, monkeypatch):
    """With a temporary folder of its own, processes of this Ray have it in their command line."""
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    process = start(here, "--out", "own", "--engine", "ray", "--workers", "1")

    def of_ray() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes().decode(errors="replace")
            except OSError:
                continue
            found += [text] if short in text else []
        return found

    until(lambda: any("raylet" in text for text in of_ray()), process)
    code, said = finished(process)
    assert code == 0, said
    assert "Token" not in said
    until(lambda: not of_ray())
    assert kept(here / "own") == one


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:9"])
def test_no_cluster_at_the_address(address, here, short, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", short)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, said = finished(start(here, "--out", "none", "--engine", "ray", "--address", address))
    assert code == 2
    assert f"dcbench: --address {address}: cannot connect to Ray: " in said
    assert len(said.splitlines()) == 1, said


def test_a_ray_that_cannot_start(here, short, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", f"{short}/{'long' * 25}")
    code, said = finished(start(here, "--out", "none", "--engine", "ray"))
    assert code == 2
    assert "dcbench: Ray does not start on this machine: " in said
