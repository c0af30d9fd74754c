"""torchrun with two processes, one of which fails: the run ends soon, with one message; the same command mends it.

And torchrun on two nodes.
"""

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_runs import kept, world

from dcbench import ranks
from dcbench.errors import UserError

MODEL = """
import os, signal, time
from pathlib import Path
from dcbench.errors import UserError

class Fails:
    conditions_on = frozenset({"image"})

    def __init__(self, card, runtime):
        self.card = card

    def generate(self, requests):
        if os.environ.get("RANK") == "1" and Path("fault").exists():
            kind = Path("fault").read_text()
            Path("when").write_text(str(time.time()))
            if kind == "UserError":
                raise UserError("this is the cause")
            if kind == "RuntimeError":
                raise RuntimeError("this is the cause")
            os.kill(os.getpid(), signal.SIGKILL)
        return [request.image[None].repeat(request.num_frames, 1, 1, 1) for request in requests]
"""


def torchrun(folder: Path, *arguments: str) -> tuple[int, list[str], float]:
    """(exit code, dcbench's own lines on standard error, seconds from the fault to the end) of two processes."""
    (folder / "model.py").write_text(MODEL)
    (folder / "program.py").write_text("from dcbench.cli import main\nmain()\n")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py"]
    command = ["run", "--dataset", "shapes", "--limit", "4", "--metrics", "motion", "--device", "cpu", "--out", "out"]
    done = subprocess.run(
        [*launch, *command, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    said = [line for line in done.stderr.splitlines() if line.startswith(("dcbench:", "process "))]
    assert "dcbench/ranks.py" not in done.stderr  # no traceback of ours; torchrun prints its own
    when = folder / "when"
    return done.returncode, said, time.time() - float(when.read_text()) if when.exists() else 0.0


def finished(folder: Path) -> int:
    return len(list(folder.rglob("record.json")))


FAULTS = ["RuntimeError", "UserError", "SIGKILL"]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_ends_when_one_process_fails(fault, tmp_path):
    (tmp_path / "fault").write_text(fault)
    code, said, seconds = torchrun(tmp_path, "--model", "model.py:Fails")
    assert code != 0
    assert seconds < 60
    if fault == "SIGKILL":
        assert all("another process of this run has ended" in line or "stopped" in line for line in said), said
    else:
        assert len([line for line in said if "this is the cause" in line]) == 1, said
    (tmp_path / "fault").unlink()
    assert torchrun(tmp_path, "--model", "model.py:Fails")[0] == 0
    assert finished(tmp_path) == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_grid_goes_on_with_the_other_model(fault, tmp_path):
    (tmp_path / "fault").write_text(fault)
    code, said, seconds = torchrun(tmp_path, "--model", "model.py:Fails", "--model", "still")
    assert code != 0
    assert seconds < 60
    if fault != "SIGKILL":
        assert len([line for line in said if "this is the cause" in line]) == 1, said
        assert finished(tmp_path) == 1  # of the other model
    (tmp_path / "fault").unlink()
    assert torchrun(tmp_path, "--model", "model.py:Fails", "--model", "still")[0] == 0
    assert finished(tmp_path) == 2


def test_what_a_context_gives_is_not_sent_to_the_others(monkeypatch):
    """A lock has threads, which cannot be pickled."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(ranks.dist, "broadcast_object_list", lambda values, src: pickle.dumps(values))
    with ranks.held_by_first_rank(lambda: contextlib.nullcontext(threading.Lock())):
        pass


LEFT_OVER = {
    "no address": ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set"),
    "no number": ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'.*unset WORLD_SIZE"),
    "no process": ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
    "a rank too many": (
        {"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        "WORLD_SIZE is 2, but RANK is 2",
    ),
}


@pytest.mark.parametrize("case", LEFT_OVER)
def test_variables_that_an_earlier_job_left_are_named(case, monkeypatch):
    variables, message = LEFT_OVER[case]
    for name in ranks.ADDRESS:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        ranks.join_ranks()


@pytest.mark.slow
def test_two_nodes_give_the_bytes_of_one_process(tmp_path):
    """Each node has a torchrun of its own. They share the run's directory, and find each other at one address."""
    world(tmp_path)
    command = [
        *("run", "--model", "model.py:Slow", "--dataset", "shapes", "--limit", "6", "--metrics", "motion"),
        *("--protocol", "small.toml", "--device", "cpu"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    one = [sys.executable, "-m", "dcbench", *command, "--out", "one"]
    assert subprocess.run(one, cwd=tmp_path, env=environment, capture_output=True).returncode == 0
    (tmp_path / "made").unlink()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    node = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--rdzv-id=test"),
        *("-m", "dcbench", *command, "--out", "two"),
    ]
    logs = [tmp_path / "node0", tmp_path / "node1"]
    nodes = []
    for log in logs:
        with log.open("wb") as file:
            nodes.append(subprocess.Popen(node, cwd=tmp_path, env=environment, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=300) for process in nodes]
    finally:
        for process in nodes:
            process.terminate()
    assert codes == [0, 0], "\n".join(log.read_text() for log in logs)
    assert kept(tmp_path / "two") == kept(tmp_path / "one")
    made = (tmp_path / "made").read_text().split()
    assert len(made) == len(set(made)) == 6
    rows = [json.loads(line) for line in (tmp_path / "two" / "samples.jsonl").read_text().splitlines()]
    assert [row.get("process") for row in rows].count("rank1") == 3  # the second node made half of them
