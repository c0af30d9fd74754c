"""Sampling, the first half of a run: make every missing clip. After an interruption, the same call continues."""

import contextlib
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from dcbench import video
from dcbench.errors import SharedError, UserError
from dcbench.escape import screen
from dcbench.models.base import Request, Runtime, Wanted, check_wanted, conditions_on, is_clip_a_core
from dcbench.progress import track
from dcbench.ranks import gather, held_by_first_rank, join_ranks, on_first_rank, rank, together, world_size
from dcbench.record import Case
from dcbench.runs.actors import make_on_ray
from dcbench.runs.directory import Line
from dcbench.runs.making import Maker, one_thread
from dcbench.runs.run import Options, Run
from dcbench.runs.workers import make_in_workers

WAIT = 1.0  # seconds between two looks at what other processes have finished


@dataclass
class Share:
    """The clips that one of several processes makes."""

    cases: Sequence[Case]  # missing ones, in the order in which they are made
    process: str = ""  # in the name of its log. "": the log of the run
    work: str = "work"  # folder for a model that is a program
    may_make: Callable[[Case], bool] = lambda case: True  # asked right before a clip is made; False: it is left out
    ahead: int | None = None  # batches that are read, and claimed, before they are made. None: the usual number
    done: int = 0  # clips that are finished already, for the progress
    lost: list[str] = field(default_factory=list)  # why videos could not be read, where that may pass
    unreadable: set[str] = field(default_factory=set)  # ids of the cases whose video could not be read
    tried: set[str] = field(default_factory=set)  # ids of the cases that were made, or could not be read


def sample(run: Run, options: Options) -> bool:
    """Make every missing clip. Each rank makes its share, and so does each process with `shard` or `join`.

    Returns whether this process is the one to score the run: every clip that can be made is finished, and no other
    process is going to score it. UserError if the disk is too full, a clip is wrong, or, in the end, if a video could
    not be read for a reason that may pass.
    """
    if run.model is None:
        return True
    if options.shard or options.join:
        return _with_others(run, options)
    if options.ray and world_size() > 1:
        raise UserError("--engine ray starts workers itself: start one process, without torchrun")
    join_ranks()
    with held_by_first_rank(lambda: run.directory.locked("making clips")):
        on_first_rank(run.directory.mend)
        missing = run.missing()
        lost: list[str] = []
        if missing:
            process = f"rank{rank()}" if rank() else ""
            share = Share(missing[rank() :: world_size()], process, done=len(run.cases) - len(missing))
            together(lambda: _make(run, options, share, missing))
            lost = share.lost
        raise_lost([reason for part in gather(lost) for reason in part], "generated")
    return True


def _with_others(run: Run, options: Options) -> bool:
    """Make this process's share of the clips, beside other processes that may start and end at any time."""
    if world_size() > 1:
        raise UserError("--shard and --join are for processes that torchrun does not connect; leave one of the two out")
    number, count = options.shard or (1, 1)
    mine = run.cases[number - 1 :: count]
    with run.directory.shared("making clips") as member:

        def may_make(case: Case) -> bool:
            return member.claim(case.id) and run.directory.finished_sample(case.id) is None

        work = f"work/{number}-of-{count}" if options.shard else f"work/{member.name}"
        share = Share((), member.name, work, may_make, ahead=1)
        while missing := [case for case in run.missing(mine) if case.id not in share.tried]:
            if not any(may_make(case) for case in missing):
                if options.shard:
                    break
                time.sleep(WAIT)  # the rest is being made by others; if one of them is killed, take over
                continue
            share.cases, share.done = missing, len(mine) - len(missing)
            _make(run, options, share, missing)
            if options.shard:
                break
        raise_lost(share.lost, "generated")
        return all(case.id in share.unreadable for case in run.missing()) and member.claim("scoring")


def raise_lost(reasons: Sequence[str], what: str) -> None:
    """UserError if there are clips that the same command may still get."""
    if reasons:
        raise SharedError(
            f"{len(reasons)} clips were not {what}, for a reason that may pass: {reasons[0]}. Give the same command "
            "again; what is finished is kept. If this stays so, remove or replace the file"
        )


def _make(run: Run, options: Options, share: Share, missing: Sequence[Case]) -> None:
    """Make the clips of a share. `missing`: of all processes, to check them all before the model is loaded."""
    assert run.model is not None
    _check_room(run, missing)
    number = run.protocol.num_frames
    check_wanted(run.model, [Wanted(case.id, number, case.fps, case.frame_stride) for case in missing])
    made = _made(run, options, share, missing)
    quiet = options.quiet or rank() > 0
    total = len(share.cases) + share.done
    with run.directory.noted(f"making up to {len(share.cases)} clips on {options.runtime().device}"):
        for _ in track(made, total, "generating", share.done, quiet, whole=len(missing) + share.done):
            pass


def _check_room(run: Run, missing: Sequence[Case]) -> None:
    """Raise UserError if the disk is too full. This check is cheap, so it comes before the model loads."""
    free = shutil.disk_usage(run.directory.path).free
    needed = len(missing) * run.protocol.num_frames * run.protocol.height * run.protocol.width  # about raw bytes / 3
    if free < needed:
        raise UserError(
            f"{run.directory.path}: {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB needed for "
            f"{len(missing)} clips. Free some room, or choose another disk: --out DIR"
        )


def _made(run: Run, options: Options, share: Share, missing: Sequence[Case]) -> Iterator[str]:
    """Make and store the clips of a share. Yields the id of each case, in the end also of the unreadable ones."""
    assert run.model is not None
    runtime = options.runtime()
    if options.ray:
        requests = _requests(run, share, options.batch_size, "reference" in conditions_on(run.model))
        ids, batches = [case.id for case in missing], -(-len(share.cases) // options.batch_size)
        finished = make_on_ray(run.model, options, run.directory.path, requests, batches, ids)
    elif (workers := count_workers(run, options, len(share.cases))) > 1:
        requests = _requests(run, share, options.batch_size, with_reference=False)
        finished = make_in_workers(run.model, runtime, run.directory.path, requests, workers)
    else:
        finished = _in_this_process(run, share, missing, runtime, options.batch_size)
    for lines in finished:
        for line in lines:
            run.directory.append_sample(line | ({"process": share.process} if share.process else {}), share.process)
            share.tried.add(line["id"])
            yield line["id"]
    unreadable = [case.id for case in share.cases if case.id in share.unreadable]
    share.tried.update(unreadable)
    yield from unreadable


def count_workers(run: Run, options: Options, clips: int) -> int:
    """How many processes of this machine make so many clips: a core each for small models on a CPU, or 1."""
    if world_size() > 1 or os.name != "posix" or not _is_clip_a_core(run, options.runtime()):
        return 1
    return max(1, min(torch.get_num_threads(), -(-clips // options.batch_size)))


def _is_clip_a_core(run: Run, runtime: Runtime) -> bool:
    return run.model is not None and runtime.device == "cpu" and is_clip_a_core(run.model)


def _in_this_process(
    run: Run, share: Share, missing: Sequence[Case], runtime: Runtime, batch_size: int
) -> Iterator[list[Line]]:
    assert run.model is not None
    with one_thread() if _is_clip_a_core(run, runtime) else contextlib.nullcontext():
        maker = Maker(run.model, runtime)
        maker.check([case.id for case in missing])
        with_reference = "reference" in maker.model.conditions_on
        if maker.prepares:
            share.cases = [case for case in share.cases if share.may_make(case)]
            everything = itertools.chain.from_iterable(_requests(run, share, 1, with_reference))
            maker.prepare(everything, run.directory.path / share.work)
        for requests in _requests(run, share, batch_size, with_reference):
            yield maker.make(requests, run.directory)


def _requests(run: Run, share: Share, size: int, with_reference: bool) -> Iterator[list[Request]]:
    """The requests of a share in batches. The next ones are read ahead. An unreadable video is told and left out."""

    def read(batch: Sequence[Case]) -> list[Request | UserError]:
        requests: list[Request | UserError] = []
        for case in batch:
            try:
                requests.append(run.request(case, with_reference))
            except UserError as error:
                requests.append(error)
        return requests

    batches = [share.cases[i : i + size] for i in range(0, len(share.cases), size)]
    allowed = ([case for case in batch if share.may_make(case)] for batch in batches)
    taken, ahead = itertools.tee(allowed)
    for batch, got in zip(taken, video.in_order(read, ahead, ahead=share.ahead), strict=True):
        if isinstance(got, UserError):
            raise got
        for case, request in zip(batch, got, strict=True):
            if isinstance(request, UserError) and case.id not in share.unreadable:
                text = f"cannot read {case.video} for clip {case.id}: {request}"
                print(screen(text), file=sys.stderr, flush=True)
                run.directory.note(text)
                share.unreadable.add(case.id)
                if isinstance(request, video.PassingError):
                    share.lost.append(f"clip {case.id}, {request}")
        if requests := [request for request in got if isinstance(request, Request)]:
            yield requests
