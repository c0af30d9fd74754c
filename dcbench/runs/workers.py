"""Worker processes on this machine: each has the model loaded and makes one batch at a time, with one thread.

A worker is a fresh Python process, so it shares nothing with this one but a pipe. It ends when this process ends, in
whatever way: its standard input closes then. Unix only.
"""

import json
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from dcbench.catalogue import ModelCard
from dcbench.errors import UserError, first_line
from dcbench.models.base import Request, Runtime
from dcbench.runs.directory import Line, RunDirectory
from dcbench.runs.making import Maker, one_thread

TRIES = 2  # for a batch whose worker was killed
START = "import sys; sys.path[:] = {path}; from dcbench.runs.workers import work; work({channel})"

Batch = Sequence[Request]


class _Worker:
    """One process and the batch that it makes."""

    def __init__(self, setting: tuple[ModelCard, Runtime, Path]) -> None:
        self.channel, other = Pipe()
        program = START.format(path=json.dumps(sys.path), channel=other.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            pass_fds=[other.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for this process alone, which then ends the worker
        )
        other.close()
        self.batch: Batch | None = None
        _send(self.channel, setting)

    def give(self, batch: Batch) -> None:
        self.batch = batch
        _send(self.channel, batch)

    def end(self) -> None:
        self.process.kill()  # nothing is lost: a clip's file is written whole or not at all
        self.channel.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def make_in_workers(
    card: ModelCard, runtime: Runtime, path: Path, batches: Iterator[Batch], count: int
) -> Iterator[list[Line]]:
    """Make the clips of all batches in at most `count` workers. Yields the lines of each batch when it is finished.

    A batch is taken from `batches` when a worker is free for it. If a worker is killed, another one makes its batch,
    TRIES times in all. UserError after that; an error of the model is raised as it is.
    """
    workers: list[_Worker] = []
    again: deque[Batch] = deque()  # of workers that were killed
    tried: dict[str, int] = {}

    def hand_out() -> None:
        """A batch for each idle worker; a further worker while there are more batches."""
        idle = deque(worker for worker in workers if worker.batch is None)
        while idle or len(workers) < count:
            batch = again.popleft() if again else next(batches, None)
            if batch is None:
                return
            if not idle:
                workers.append(_Worker((card, runtime, path)))
                idle.append(workers[-1])
            idle.popleft().give(batch)

    try:
        hand_out()
        while busy := {worker.channel: worker for worker in workers if worker.batch is not None}:
            for channel in wait(list(busy)):
                assert isinstance(channel, Connection)
                worker = busy[channel]
                batch, worker.batch = worker.batch, None
                assert batch is not None
                try:
                    answer = _receive(channel)
                except (EOFError, ConnectionError):
                    worker.end()
                    workers.remove(worker)
                    _count_death(tried, batch, worker.process.returncode)
                    again.append(batch)
                    continue
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
            hand_out()
    finally:
        for worker in workers:
            worker.end()


def _count_death(tried: dict[str, int], batch: Batch, code: int) -> None:
    """UserError if a batch has lost its last worker."""
    clip = batch[0].clip_id if batch else "none"
    tried[clip] = tried.get(clip, 0) + 1
    if tried[clip] >= TRIES:
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        raise UserError(
            f"the process that made clip {clip} ended {how}, {TRIES} times; perhaps memory ran out. What is finished "
            "is kept, and the same command continues. OMP_NUM_THREADS=1 before it uses one process"
        )


def work(descriptor: int) -> None:
    """The worker's side: a card, a runtime and a directory, then batches until the pipe closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    channel: Connection = Connection(descriptor)
    try:
        card, runtime, path = _receive(channel)
        with one_thread():
            maker = Maker(card, runtime)
            while True:
                _send(channel, maker.make(_receive(channel), RunDirectory(path)))
    except (EOFError, ConnectionError):
        return
    except BaseException as error:
        _send(channel, picklable(error))


def _send(channel: Connection, value: Any) -> None:
    """Plain pickles: those of `Connection.send` would move tensors through shared memory, by a server of its own."""
    channel.send_bytes(pickle.dumps(value))


def _receive(channel: Connection) -> Any:
    return pickle.loads(channel.recv_bytes())


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def picklable(error: BaseException) -> BaseException:
    """The error, if a pipe can carry it; otherwise one with its name and the first line of its message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is copied: the copy below is told to the user in its place
        if isinstance(error, UserError):
            return UserError(str(error))
        message = first_line(error) if isinstance(error, Exception) else ""
        return RuntimeError(f"{type(error).__name__}: {message}".removesuffix(": "))
    return error
