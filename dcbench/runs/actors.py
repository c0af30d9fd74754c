"""Workers on a Ray cluster: each is an actor that has the model loaded and makes one batch at a time.

Ray places the workers on machines and starts those that wait when a machine joins. The file of a clip comes back
through Ray as bytes. This process alone writes into the run directory, so the machines need no shared file system.
"""

import contextlib
import importlib
import logging
import os
import platform
import re
import signal
import socket
import sys
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from dcbench.catalogue import ModelCard
from dcbench.errors import UserError, first_line
from dcbench.files import atomic_write
from dcbench.models.base import Runtime, conditions_on, is_clip_a_core
from dcbench.runs.directory import Line, RunDirectory
from dcbench.runs.making import Maker
from dcbench.runs.run import Options
from dcbench.runs.workers import TRIES, Batch, picklable
from dcbench.version import __version__

ANSWERS = 10.0  # seconds in which the machine of an address answers
PATIENCE = 30.0  # seconds without a worker, after which the user is told what is waited for

Made = tuple[Line, bytes]  # a clip's line and its file
W = TypeVar("W")


# --- the queue --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Died:
    """A worker has ended with its batch, or while it loaded the model."""

    why: str


class Pool(Protocol[W]):
    """Workers that start, take a batch, and answer."""

    def start(self) -> W:
        """A further worker. Its first answer says that its model is loaded; this may take as long as it likes."""
        ...

    def give(self, worker: W, batch: Batch) -> None: ...

    def wait(self) -> tuple[W, Any]:
        """The next worker that answers, and its answer: what it made, an error of the model, or `Died`."""
        ...

    def end(self, worker: W) -> None: ...


def share_out(pool: Pool[W], batches: Iterator[Batch], count: int) -> Iterator[Any]:
    """Give each of `count` workers one batch at a time until all are made. Yields the answer to each batch.

    A worker that dies is replaced, and its batch is made by another one, TRIES times in all. UserError after that. A
    worker for which no batch is left is ended at once, so that its machine is free for others.
    """
    workers: dict[W, Batch | None] = {}  # None: it loads the model
    again: deque[Batch] = deque()  # batches of workers that died
    tried: Counter[str] = Counter()
    unborn = 0  # workers that died while they loaded the model, since the last one that did not
    is_more = True
    while True:
        busy = sum(batch is not None for batch in workers.values())
        while len(workers) < (count if is_more else busy + len(again)):
            workers[pool.start()] = None
        if not workers:
            return
        worker, answer = pool.wait()
        batch = workers.pop(worker)
        if isinstance(answer, BaseException):
            raise answer
        if isinstance(answer, Died):
            pool.end(worker)
            if batch is None:
                unborn += 1
                _check_starts(unborn, TRIES * count, answer)
            else:
                tried[batch[0].clip_id] += 1
                _check_tries(tried[batch[0].clip_id], batch[0].clip_id, answer)
                again.append(batch)
            continue
        unborn = 0
        following = again.popleft() if again else next(batches, None)
        if following is not None:
            workers[worker] = following
            pool.give(worker, following)
        else:
            is_more = False
            for useless in [worker, *(other for other, its in workers.items() if its is None)]:
                workers.pop(useless, None)
                pool.end(useless)
        if batch is not None:
            yield answer


def _check_starts(deaths: int, allowed: int, last: Died) -> None:
    if deaths >= allowed:
        raise UserError(
            f"{deaths} workers on Ray ended while they loaded the model, and none in between has loaded it: "
            f"{last.why}. Perhaps memory ran out. Give fewer workers for each machine, or larger machines"
        )


def _check_tries(deaths: int, clip: str, last: Died) -> None:
    if deaths >= TRIES:
        raise UserError(
            f"the worker that made clip {clip} ended {TRIES} times: {last.why}. Perhaps memory ran out. What is "
            "finished is kept, and the same command continues"
        )


# --- a worker's side --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a worker needs before its first batch."""

    card: ModelCard
    runtime: Runtime
    threads: int
    clip_ids: Sequence[str]  # of all clips to make, for a model that checks them first
    with_reference: bool  # whether requests have the reference clip
    version: str = __version__


class Actor:
    """A loaded model in a process of a Ray cluster. Errors are answers: Ray would add its own tracebacks."""

    def load(self, setting: Setting) -> Any:
        """None, or the error."""
        try:
            self._load(setting)
        except UserError as error:
            return UserError(f"on {platform.node()}: {error}")
        except BaseException as error:
            return picklable(error)

    def _load(self, setting: Setting) -> None:
        if setting.version != __version__:
            raise UserError(f"dcbench {__version__} is installed, but the run is made with {setting.version}")
        if setting.runtime.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"  # set before huggingface_hub is imported, which reads it once
        if setting.runtime.device == "cuda" and not torch.cuda.is_available():
            raise UserError("PyTorch finds no GPU. Install it with CUDA there, or use --device cpu")
        torch.set_num_threads(setting.threads)
        self.maker = Maker(setting.card, setting.runtime)
        name = setting.card.name
        if self.maker.prepares:
            raise UserError(
                f"{name} is a program that wants all requests before the first clip, but Ray gives one batch at a "
                "time. Use --shard 1/4 ... instead of --engine ray"
            )
        if "reference" in self.maker.model.conditions_on and not setting.with_reference:
            raise UserError(f'{name} conditions on "reference": write it in conditions_on of its card, or of its class')
        self.maker.check(setting.clip_ids)

    def make(self, batch: Batch) -> Any:
        """A line and a file of each clip, or the error."""
        try:
            with tempfile.TemporaryDirectory(prefix="dcbench-") as folder:
                directory = RunDirectory(Path(folder))
                lines = self.maker.make(batch, directory)
                return [(line, directory.clip(line["id"]).read_bytes()) for line in lines]
        except BaseException as error:
            return picklable(error)


# --- this process's side ----------------------------------------------------------------------------------------------


def make_on_ray(
    card: ModelCard, options: Options, path: Path, batches: Iterator[Batch], count: int, ids: Sequence[str]
) -> Iterator[list[Line]]:
    """Make the clips of all batches with workers on Ray. Yields the lines of each batch when its clips are stored.

    `count`: of batches. `ids`: of all clips, for models that check them first. UserError if there is no such cluster,
    or if a batch has lost its last worker. An error of the model is raised as it is.
    """
    assert options.ray is not None
    directory = RunDirectory(path)
    with connected(options.ray.address) as (ray, is_ours):
        needs = choose_needs(card, options, ray.cluster_resources(), is_ours)
        if not options.quiet:
            print(f"Ray: {needs.workers} workers, each with {needs}", file=sys.stderr, flush=True)
        runtime = Runtime("cuda" if needs.gpus else "cpu", options.dtype, options.offline)
        pool = _RayPool(ray, needs, Setting(card, runtime, needs.cpus, ids, "reference" in conditions_on(card)))
        try:
            for made in share_out(pool, batches, min(needs.workers, count)):
                yield [_store(directory, line, file) for line, file in made]
        finally:
            pool.close()


def _store(directory: RunDirectory, line: Line, file: bytes) -> Line:
    with atomic_write(directory.clip(line["id"])) as temporary:
        temporary.write_bytes(file)
    return line


@dataclass(frozen=True)
class Needs:
    """How many workers, and what each of them takes."""

    workers: int
    cpus: int
    gpus: float

    def __str__(self) -> str:
        return f"{self.cpus} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


def choose_needs(card: ModelCard, options: Options, cluster: Mapping[str, float], is_ours: bool) -> Needs:
    """The workers for a model on a cluster of this size. UserError if a Ray of our own has no room for them."""
    assert options.ray is not None
    gpus, has_cpus, has_gpus = options.ray.gpus, int(cluster.get("CPU", 0)), int(cluster.get("GPU", 0))
    if gpus is None:
        gpus = 1 if options.device == "cuda" or (options.device == "auto" and has_gpus) else 0
    # a large model on a CPU takes as many threads as in one process, because their number may change a clip by rounding
    cpus = 1 if gpus or is_clip_a_core(card) else torch.get_num_threads()
    on_gpus = has_gpus * int(1 / gpus) if 0 < gpus < 1 else int(has_gpus / (gpus or 1))  # two of 0.7 need two GPUs
    room = min(has_cpus // cpus, on_gpus if gpus else has_cpus)
    needs = Needs(options.ray.workers or max(1, room), cpus, gpus)
    if is_ours and needs.workers > room:
        raise UserError(
            f"{needs.workers} workers with {needs} each are too many for this machine, which has {has_cpus} CPU and "
            f"{has_gpus} GPU. Give fewer --workers or --gpus-per-worker, or the address of a cluster: --address auto"
        )
    return needs


class _RayPool:
    """Actors of Ray. Each is requested once and starts when a machine has room for it."""

    def __init__(self, ray: Any, needs: Needs, setting: Setting) -> None:
        self._ray, self._needs = ray, needs
        self._setting = ray.put(setting)
        self._class = ray.remote(num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0)(Actor)
        self._answers: dict[futures.Future[Any], Any] = {}  # and the actor that will give it
        self._is_told = False

    def start(self) -> Any:
        actor = self._class.remote()
        self._answers[actor.load.remote(self._setting).future()] = actor
        return actor

    def give(self, worker: Any, batch: Batch) -> None:
        self._answers[worker.make.remote(batch).future()] = worker

    def wait(self) -> tuple[Any, Any]:
        """As in `Pool`. It waits for futures of Python, because `ray.wait` does not let a signal through."""
        while not (done := futures.wait(self._answers, PATIENCE, futures.FIRST_COMPLETED).done):
            self._tell_once()
        self._is_told = True
        answer = next(iter(done))
        worker = self._answers.pop(answer)
        try:
            return worker, answer.result()
        except self._ray.exceptions.RayError as error:
            return worker, Died(_reason(error))

    def _tell_once(self) -> None:
        """Say what is waited for, if no worker has answered yet."""
        if not self._is_told:
            cpus, gpus = (self._ray.cluster_resources().get(what, 0) for what in ("CPU", "GPU"))
            print(
                f"no worker on Ray has loaded the model in {PATIENCE:g} s. If this goes on, there is no room: each "
                f"wants {self._needs}, and the whole cluster has {cpus:g} CPU and {gpus:g} GPU",
                file=sys.stderr,
                flush=True,
            )
        self._is_told = True

    def end(self, worker: Any) -> None:
        self._answers = {answer: actor for answer, actor in self._answers.items() if actor is not worker}
        self._ray.kill(worker)

    def close(self) -> None:
        for worker in list(self._answers.values()):
            self.end(worker)


def _reason(error: Exception) -> str:
    """What an error of Ray says of the cause. Its texts have many lines, with the cause in the middle or at the end."""
    text = str(error)
    if died := re.search(r"because (its [\w ]+ has died)(?:\. Worker exit type: (\w+))?", text):
        return died[1] + (f" ({died[2]})" if died[2] else "")
    return next((line for line in reversed(text.splitlines()) if re.match(r"\w+Error: ", line)), first_line(error))


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[tuple[Any, bool]]:
    """The module ray, connected to a cluster, and whether the cluster is our own: started and ended by this block.

    Without an address, it is that of RAY_ADDRESS, or else a Ray of our own on this machine. If the program is connected
    already, it stays so.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield ray, False
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise UserError(
            f"--address {address}: Ray Client is not supported. Start dcbench on a machine of the cluster with "
            "--address auto, or give it to the cluster: ray job submit -- dcbench run ..."
        )
    if address not in ("local", "auto") and not address.rpartition(":")[2].isdecimal():
        raise UserError(f"--address {address}: expected auto, or a machine and its port, such as head:6379")
    try:
        with _signals_kept():
            _init(ray, address)
        yield ray, address == "local"
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # a Ray of our own sends nothing home
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError("ray is not installed: uv sync --extra ray, or pip install ray") from error


def _init(ray: Any, address: str) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)  # before it starts, it has things to say
    try:
        if address not in ("local", "auto"):
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=ANSWERS).close()  # Ray would try for minutes
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        why = first_line(error).rstrip(".")
        if address == "local":
            raise UserError(f"Ray does not start on this machine: {why}") from error
        raise UserError(
            f"--address {address}: cannot connect to Ray: {why}. Start it there (ray start --head), or "
            "leave out --address to have a Ray of this machine alone"
        ) from error


@contextlib.contextmanager
def _signals_kept() -> Iterator[None]:
    """Handlers of signals are the same after the block: Ray sets one of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
