"""An external program ends with dcbench, whatever ends dcbench, and two programs never write to the same outputs."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcbench import supervisor
from dcbench.catalogue import find_model
from dcbench.errors import UserError
from dcbench.models.base import Request, Runtime
from dcbench.models.baselines import external

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up in /proc")

# Writes the numbers of itself and of a child in a session of its own, which would survive the end of its group.
STAYS = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
with open(sys.argv[1] + ".part", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""
# What dcbench does, without torch: a supervisor with a socket as its standard input
PARENT = """
import os, signal, socket, subprocess, sys, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run below nohup
here, there = socket.socketpair()
lock = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
subprocess.Popen([sys.executable, "-I", *sys.argv[2:3], str(lock), *sys.argv[3:]], stdin=there, pass_fds=(lock,),
    start_new_session=True)
there.close()
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(reached, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while not reached() and time.monotonic() < until:
        time.sleep(0.05)
    return reached()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_the_program_and_its_children_end_when_dcbench_is_killed(number: int, tmp_path: Path):
    command = [sys.executable, "-c", STAYS, str(tmp_path / "pids")]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "lock"), supervisor.__file__, *command])
    assert wait_for((tmp_path / "pids").is_file)
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(alive, pids))
    parent.send_signal(number)
    parent.wait()
    assert wait_for(lambda: not any(map(alive, pids)))


def test_the_program_ends_when_its_supervisor_is_killed(tmp_path: Path):
    command = [sys.executable, "-c", STAYS, str(tmp_path / "pids")]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "lock"), supervisor.__file__, *command])
    assert wait_for((tmp_path / "pids").is_file)
    program, child = (int(pid) for pid in (tmp_path / "pids").read_text().split())
    watcher = int(Path(f"/proc/{program}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(watcher, signal.SIGKILL)
    assert wait_for(lambda: not alive(program))
    with (tmp_path / "lock").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this program took no lock
    os.kill(child, signal.SIGKILL)
    parent.kill()
    parent.wait()


def model_of(command: tuple[str, ...]) -> external.External:
    return external.load(find_model("zoom").model_copy(update={"options": {"command": command}}), Runtime())


ASKED = Request("a", torch.zeros(3, 8, 8, dtype=torch.uint8), "", 2, 8.0, 1, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a Popen that nobody waited for
def test_a_second_interruption_does_not_leave_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first one ends the waiting for clips, the second one the waiting for the program's end."""
    (tmp_path / "stays.py").write_text(STAYS)
    model = model_of((sys.executable, str(tmp_path / "stays.py"), str(tmp_path / "pids"), "{requests}", "{output}"))

    def interrupted(*_: object) -> None:
        assert wait_for((tmp_path / "pids").is_file)
        raise KeyboardInterrupt

    monkeypatch.setattr(external.External, "_watch", interrupted)
    monkeypatch.setattr(subprocess.Popen, "wait", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.prepare([ASKED], tmp_path)
    monkeypatch.undo()
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert wait_for(lambda: not any(map(alive, pids)))


def test_a_program_that_is_still_there_is_named_and_no_second_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(external, "PATIENCE", 0.2)
    mark = tmp_path / "ran"
    model = model_of((sys.executable, "-c", f"open({str(mark)!r}, 'w')", "{requests}", "{output}"))
    with (tmp_path / "program-0.lock").open("w") as survivor:
        survivor.write("4242\n")
        survivor.flush()
        fcntl.flock(survivor, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"an earlier run still writes to .*\(process 4242\)"):
            model.prepare([ASKED], tmp_path)
        assert not mark.exists()
    model.prepare([ASKED], tmp_path)
    assert mark.exists()


def test_the_program_holds_the_lock_as_long_as_it_lives(tmp_path: Path):
    look = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    model = model_of((sys.executable, "-c", look, str(tmp_path / "program-0.lock"), "{requests}", "{output}"))
    model.prepare([ASKED], tmp_path)
    assert "BlockingIOError" in (tmp_path / "program-0.log").read_text() and model.ended == "ended with code 1"


def test_the_signal_that_ended_the_program_is_told(tmp_path: Path):
    model = model_of((sys.executable, "-c", "import os; os.kill(os.getpid(), 11)", "{requests}", "{output}"))
    model.prepare([ASKED], tmp_path)
    assert model.ended == "was ended by SIGSEGV"


# --- strange outputs ---


def claims(path: Path, frames: int = 10**6) -> None:
    with path.with_suffix(".npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (frames, 4000, 4000, 3)}
        )


def is_large(path: Path) -> None:
    claims(path, 200)
    with path.with_suffix(".npy").open("r+b") as file:
        file.truncate(200 * 4000 * 4000 * 3 + 128)


def bomb(path: Path) -> None:
    """A picture of 10000 x 10000 pixels in a few kilobytes."""
    path.mkdir()
    Image.new("1", (10000, 10000)).save(path / "0.png")


def odd_names(path: Path) -> None:
    path.mkdir()
    (path / "\x1b[2J\x07.png").write_bytes(b"\x89PNG")


def pipe(path: Path) -> None:
    os.mkfifo(path.with_suffix(".npy"))


def dangling(path: Path) -> None:
    path.with_suffix(".npy").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (claims, "no whole .npy"),
        (is_large, "9.6 GB of pixels"),
        (bomb, "no picture that can be read: Image size"),
        (odd_names, r"\x1b[2J"),
        (pipe, "neither a file nor a folder"),
        (dangling, "neither a file nor a folder"),
    ],
)
def test_a_strange_output_is_one_clear_message_and_is_made_again(leave, said: str, tmp_path: Path):
    right = tmp_path / "right.npy"
    np.save(right, np.full((2, 8, 8, 3), 7, np.uint8))
    copy = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2] + '/a.npy')"
    (tmp_path / "output").mkdir()
    leave(tmp_path / "output" / "a")
    model = model_of((sys.executable, "-c", copy, str(right), "{output}", "{requests}"))
    model.folder = tmp_path
    with pytest.raises(UserError) as error:
        model.generate([ASKED])
    assert said in str(error.value) and "\x1b" not in str(error.value)
    model.prepare([ASKED], tmp_path)
    assert model.generate([ASKED])[0].unique().tolist() == [7]


def test_what_a_program_prints_cannot_steer_the_terminal(tmp_path: Path):
    say = "import sys; sys.stdout.buffer.write(b'x' * 300000 + b'\\n\\x1b]0;title\\x07 \\x00 caf\\xe9 end\\n')"
    model = model_of((sys.executable, "-c", say, "{requests}", "{output}"))
    model.prepare([ASKED], tmp_path)
    with pytest.raises(UserError) as error:
        model.generate([ASKED])
    assert r"| \x1b]0;title\x07 \x00 caf" in str(error.value)
    assert not {"\x1b", "\x07", "\x00"} & set(str(error.value))
