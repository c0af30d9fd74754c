"""A clip a core: worker processes that make the clips of a small model on a CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import world

from dcbench.catalogue import find_dataset, find_model
from dcbench.errors import UserError
from dcbench.models.base import is_clip_a_core
from dcbench.protocol import find_protocol
from dcbench.runs import planning, workers
from dcbench.runs.making import one_thread
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import sample

QUIET = Options(device="cpu", quiet=True)

MODEL = """
import os, signal, time
from pathlib import Path
import torch
from dcbench.errors import UserError

class Small:
    conditions_on = frozenset({"image"})
    clip_a_core = staticmethod(lambda card: True)

    def __init__(self, card, runtime):
        print("a model may print")
        self.card = card

    def generate(self, requests):
        assert torch.get_num_threads() == 1
        fault = os.environ.get("FAULT", "")
        if fault == "UserError":
            raise UserError("this is the cause")
        if fault == "RuntimeError":
            raise RuntimeError("this is the cause")
        if fault == "own":
            class Own(Exception):
                pass
            raise Own("this is the cause")
        if fault == "always" or (fault == "once" and not Path(os.environ["MARK"]).exists()):
            Path(os.environ["MARK"]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "slow":
            Path(os.environ["MARK"]).write_text(str(os.getpid()))
            time.sleep(60)
        return [request.image[None].repeat(request.num_frames, 1, 1, 1) for request in requests]
"""


@pytest.fixture(autouse=True)
def two_cores():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path) -> Run:
    (tmp_path / "model.py").write_text(MODEL)
    small = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}})
    card = find_model(f"{tmp_path / 'model.py'}:Small")
    return planning.plan(card, find_dataset("shapes"), small, out=tmp_path / "run", limit=4, quiet=True)


def clips(path: Path) -> dict[str, bytes]:
    return {clip.name: clip.read_bytes() for clip in sorted((path / "clips").iterdir())}


def test_the_tiny_models_are_small_and_the_released_ones_are_not():
    found = {name: is_clip_a_core(find_model(name)) for name in ("dynamicrafter-tiny", "dynamicrafter", "still")}
    assert found == {"dynamicrafter-tiny": True, "dynamicrafter": False, "still": False}


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path):
    """The tiny model at two steps: two workers, and this process alone, which then has one thread too."""
    small = find_protocol("tiny")
    card = find_model("dynamicrafter-tiny")
    card = card.model_copy(update={"sampling": {**card.sampling, "steps": 2}})
    made = []
    for count in (2, 1):
        torch.set_num_threads(count)
        out = tmp_path / str(count)
        sample(planning.plan(card, find_dataset("shapes"), small, out=out, limit=2, quiet=True), QUIET)
        made.append(clips(out))
    torch.set_num_threads(2)
    assert made[0] == made[1]
    assert len(made[0]) == 2


@pytest.mark.parametrize("fault", ["UserError", "RuntimeError", "own"])
def test_an_error_of_the_model_is_raised_here(fault, run, monkeypatch):
    monkeypatch.setenv("FAULT", fault)
    with pytest.raises(UserError if fault == "UserError" else RuntimeError, match="this is the cause"):
        sample(run, QUIET)
    monkeypatch.setenv("FAULT", "")
    sample(run, QUIET)
    assert not run.missing()


def test_the_batch_of_a_killed_worker_is_made_by_another(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("FAULT", "once")
    sample(run, QUIET)
    assert not run.missing()
    assert len(run.directory.samples.read_text().splitlines()) == 4


def test_a_batch_that_kills_its_workers_ends_the_run(run, tmp_path, monkeypatch):
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("FAULT", "always")
    with pytest.raises(UserError, match=r"ended by signal 9, 2 times; perhaps memory ran out"):
        sample(run, QUIET)


def ended(pid: int) -> bool:
    return (
        not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for a process in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_run(how, tmp_path, monkeypatch):
    world(tmp_path)
    (tmp_path / "model.py").write_text(MODEL)
    command = ["sample", "--model", "model.py:Small", "--dataset", "shapes", "--limit", "2", "--device", "cpu"]
    command += ["--protocol", "small.toml"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dcbench", *command, "--out", "run"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "2", "FAULT": "slow", "MARK": str(tmp_path / "mark")},
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 200
    while not (tmp_path / "mark").exists() and time.monotonic() < until:
        time.sleep(0.1)
    pid = int((tmp_path / "mark").read_text())
    process.send_signal(how)
    _, said = process.communicate()
    assert "Traceback" not in said
    until = time.monotonic() + 20
    while not ended(pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert ended(pid)


def test_one_thread_is_only_for_the_block():
    with pytest.raises(KeyError), one_thread():
        assert torch.get_num_threads() == 1
        raise KeyError
    assert torch.get_num_threads() == 2


def test_an_error_that_cannot_be_sent_has_its_name_and_message():
    class Own(Exception):
        pass

    assert str(workers.picklable(Own("why\nmore"))) == "Own: why"
    sent = workers.picklable(UserError("why"))
    assert isinstance(sent, UserError)
