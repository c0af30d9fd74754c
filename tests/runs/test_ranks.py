"""torchrun with two processes, one of which fails: the run ends soon, with one message; the same command mends it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
