"""Runs a program and ends it, with all that it has started, when dcbench ends: `supervisor.py LOCK COMMAND...`.

dcbench may be killed so that it cannot end its program itself (SIGKILL, SIGHUP, a second Ctrl-C). A program that
outlives it goes on writing, and the same command starts a second one on the same outputs. So dcbench starts this
process, which starts the program. Its standard input is a socket that dcbench never writes to: when dcbench ends in any
way, it closes. The program inherits the locked file LOCK, so the lock is held as long as any process of it lives.

Standard library alone, and no dcbench: it starts in a twentieth of a second.
"""

import contextlib
import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import time

LINUX = sys.platform.startswith("linux")
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None) if LINUX else None
GRACE = 5.0  # seconds between asking a program to end and ending it
CHANNEL = 0  # standard input


def prctl(option: int, value: int) -> None:
    if LIBC is not None:
        LIBC.prctl(option, value, 0, 0, 0)


def descendants() -> list[int]:
    """All living processes below this one (Linux). Orphans count too, because this process adopts them."""
    if not LINUX:
        return []
    parents: dict[int, int] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat") as file:
            state, parent = file.read().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(name)] = int(parent)
    found: list[int] = []
    level = {os.getpid()}
    while level:
        level = {child for child, parent in parents.items() if parent in level}
        found += level
    return found


def end(program: "subprocess.Popen[bytes]") -> None:
    """End the program and all that it started: first by asking."""
    for kind, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        with contextlib.suppress(OSError):
            os.killpg(program.pid, kind)
        for child in descendants():  # those with a session of their own
            with contextlib.suppress(OSError):
                os.kill(child, kind)
        until = time.monotonic() + seconds
        while time.monotonic() < until and (program.poll() is None or descendants()):
            time.sleep(0.05)


def main(lock: int, command: list[str]) -> int:
    parent, stopping = os.getppid(), []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stopping.append(number))
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        program = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(lock,),
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
    except (OSError, ValueError) as error:
        os.write(CHANNEL, f"failed {getattr(error, 'strerror', None) or error}\n".encode())
        return 127
    os.write(CHANNEL, f"started {program.pid}\n".encode())
    while program.poll() is None and not stopping and os.getppid() == parent:
        if select.select([CHANNEL], [], [], 0.1)[0]:
            break
    end(program)
    code = program.returncode if program.returncode is not None else 1
    if code < 0:  # dcbench shall see the signal that ended the program
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
