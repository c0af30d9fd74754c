"""The processes that decode video files (`video_worker.py`): asked over a pipe, watched, and ended when they are stuck.

decord 0.6 can hang for ever holding the interpreter lock, and a damaged file can crash a decoder. A process is stuck
when it gives no sign of life for `SECONDS`, counted so that a busy machine does not matter: while the process works,
only the processor time that it got counts. So whether a file can be read does not depend on what else the machine does.
"""

import atexit
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcbench.errors import UserError

WORKER = Path(__file__).with_name("video_worker.py")
SECONDS = 30.0  # without a sign of life, which comes after every frame; SECONDS_PER_MB more for a megabyte of the file
SECONDS_PER_MB = 2.0
START_SECONDS = 120.0
FROM_OUTSIDE = (-signal.SIGTERM, -9)  # exit codes of a process that something else ended; 9 is what Linux sends
# errors of a disk or of a machine, not of a file
PASSING = (errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENETDOWN)


class VideoError(UserError):
    """A video that cannot be read, is too short, or hangs its decoder."""


class PassingError(VideoError):
    """A video that could not be read for a reason that may pass: its decoder was killed or stuck, or a disk failed."""


class WorkerDied(Exception):
    """The decoding process crashed, was killed by something else, or was stuck and ended for it."""

    def __init__(self, reason: str, killed: bool = False, stuck: bool = False) -> None:
        super().__init__(reason)
        self.killed = killed
        self.passing = killed or stuck  # not a property of the file, as far as one can tell

    def error(self, path: Path) -> VideoError:
        """The error of the file that it was asked for."""
        return (PassingError if self.passing else VideoError)(f"{path}: {self}")


class _Watch(threading.Thread):
    """Ends a process that gives no sign of life for `seconds`.

    A second in which the process works counts for the processor time that it got, a second at rest for a second.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", seconds: float) -> None:
        super().__init__(daemon=True)
        self.process, self.seconds = process, seconds
        self.silent = 0.0
        self.late = False
        self.done = threading.Event()

    def alive(self) -> None:
        self.silent = 0.0

    def run(self) -> None:
        step = min(5.0, self.seconds / 6)
        before, used = time.monotonic(), _processor_seconds(self.process.pid)
        while not self.done.wait(step):
            now, total = time.monotonic(), _processor_seconds(self.process.pid)
            passed, worked = now - before, total - used
            self.silent += worked if worked > passed / 100 else passed
            before, used = now, total
            if self.silent > self.seconds:
                self.late = True
                self.process.kill()
                return


def _processor_seconds(pid: int) -> float:
    """What a process has used with all its threads. 0 where the system does not tell: it then counts as at rest."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class _Worker:
    """One decoding process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:  # apart from the first request's time: imports may take many seconds
            reason = self.ask({"op": "start"}, START_SECONDS)[0].get("error")
        except WorkerDied as died:
            if died.killed:
                raise
            reason = str(died)
        if reason:
            self.close()
            raise UserError(
                f"the decoding process does not start ({reason}). Does `{sys.executable} -c 'import av'` work?"
            )

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], Tensor]:
        """The answer's header and its bytes; after WorkerDied the process is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        watch = _Watch(self.process, seconds)
        watch.start()
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            while "bytes" not in (header := self._line()):  # a sign of life
                watch.alive()
            payload = torch.empty(header["bytes"], dtype=torch.uint8)
            view, filled = payload.numpy().data, 0
            while filled < len(view):
                watch.alive()
                got = self.process.stdout.readinto(view[filled:])  # type: ignore[attr-defined]
                if not got:
                    raise EOFError
                filled += got
            return header, payload
        except (EOFError, BrokenPipeError) as error:
            self.close()
            if watch.late:
                raise WorkerDied(f"no frame for {seconds:.0f} s", stuck=True) from error
            code = self.process.returncode
            raise WorkerDied(_exit_reason(code), killed=code in FROM_OUTSIDE) from error
        except BaseException:  # Ctrl-C: the rest of the answer would stay in the pipe
            self.close()
            raise
        finally:
            watch.done.set()

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()  # nothing is lost: the process keeps no state between requests
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.wait()


def _exit_reason(code: int) -> str:
    if code in FROM_OUTSIDE:
        return f"the decoding process was killed ({signal.Signals(-code).name}), perhaps because memory ran out"
    if code < 0:
        return f"the decoder crashed ({signal.Signals(-code).name})"
    return f"the decoding process ended with exit code {code}"


class _Pool:
    """Idle workers, kept for the next request; as many exist as threads ask at once."""

    def __init__(self) -> None:
        self.idle: list[_Worker] = []
        self.lock = threading.Lock()

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], Tensor]:
        with self.lock:
            worker = self.idle.pop() if self.idle else None
        if worker is not None and worker.process.poll() is not None:
            worker.close()
            worker = None
        worker = worker or _Worker()
        answer = worker.ask(request, seconds)
        with self.lock:
            self.idle.append(worker)
        return answer

    def close(self) -> None:
        with self.lock:
            workers, self.idle = self.idle, []
        for worker in workers:
            worker.close()


pool = _Pool()
_of_the_parent: list[_Pool] = []
atexit.register(lambda: pool.close())


def _after_fork() -> None:
    """A forked process (a data loader's) must not talk through its parent's pipes, nor end its parent's workers."""
    global pool
    _of_the_parent.append(pool)
    pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def ask(path: Path, request: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """The answer to a request about a file: its header, and its bytes as uint8.

    A process that something else killed is asked a second time. VideoError where the file cannot be read, WorkerDied
    where its decoder is gone.
    """
    try:
        megabytes = path.stat().st_size / 1e6
    except OSError as error:
        raise file_error(path, error.strerror or str(error), error.errno) from error
    if megabytes == 0:
        raise VideoError(f"{path}: the file is empty")
    request = {**request, "path": str(path.absolute())}
    seconds = SECONDS + SECONDS_PER_MB * megabytes
    try:
        header, payload = pool.ask(request, seconds)
    except WorkerDied as died:
        if not died.killed:
            raise
        header, payload = pool.ask(request, seconds)
    if "error" in header:
        raise file_error(path, header["error"], header.get("errno"))
    return header, payload


def file_error(path: Path, reason: str, number: int | None) -> VideoError:
    """The error of a file, by the system's number of its reason, if it has one."""
    return (PassingError if number in PASSING else VideoError)(f"{path}: {reason}")
