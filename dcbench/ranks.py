"""Processes of one run under torchrun. Without torchrun there is one process, and nothing is sent.

An error on one rank is raised on all of them, at the same place, so that no rank waits for another for ever.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from dcbench.errors import LostRank, SharedError, UserError, first_line

START_MINUTES = 10  # in which all processes must have started
ADDRESS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # torchrun sets these


_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In the block this process works for itself, whatever process group it belongs to."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world_size() -> int:
    return 1 if _alone else _number("WORLD_SIZE", 1, lowest=1)


def rank() -> int:
    return 0 if _alone else _number("RANK", 0, lowest=0)


def _number(name: str, default: int, lowest: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < lowest:
        raise UserError(
            f"the environment variable {name} is {text!r}; expected what torchrun sets. Remove it: unset {name}"
        )
    return int(text)


def join_ranks() -> None:
    """Under torchrun, connect the processes (gloo, because only small objects are sent)."""
    if world_size() == 1 or dist.is_initialized():
        return
    missing = [name for name in ADDRESS if not os.environ.get(name)]
    if missing or rank() >= world_size():
        what = f"{missing[0]} is not set" if missing else f"RANK is {rank()}"
        raise UserError(
            f"WORLD_SIZE is {world_size()}, but {what}. Start several processes with torchrun; for one process, remove "
            "what an earlier job left: unset WORLD_SIZE RANK"
        )
    try:
        waiting = rendezvous("env://", timeout=datetime.timedelta(minutes=START_MINUTES))
        store, number, count = next(iter(waiting))
        # long, because a rank waits here while another one makes clips; a rank that dies ends the wait at once
        dist.init_process_group("gloo", store=store, rank=number, world_size=count, timeout=datetime.timedelta(days=7))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {world_size()} processes of this run did not find each other in {START_MINUTES} minutes: "
            f"{first_line(error)}. Start all of them with torchrun"
        ) from error


def gather(value: Any) -> list[Any]:
    """The values of all ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    _exchange(lambda: dist.all_gather_object(values, value))
    return values


def together(action: Callable[[], Any]) -> Any:
    """Run `action`, which must exchange nothing, on every rank. If it fails on one, all raise SharedError."""
    if world_size() == 1:
        return action()
    result, failed = None, ""
    try:
        result = action()
    except Exception as error:  # a model may raise anything
        failed = _message(error)
    messages = gather(failed)
    if any(messages):
        raise SharedError("\n".join(f"process {n}: {text}" for n, text in enumerate(messages) if text))
    return result


def on_first_rank(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0; every rank gets its result, or raises its error."""
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, ""]
    if rank() == 0:
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = _message(error)
    _exchange(lambda: dist.broadcast_object_list(outcome, src=0))
    if outcome[1]:
        raise SharedError(outcome[1])
    return outcome[0]


@contextlib.contextmanager
def held_by_first_rank(context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Rank 0 enters the context, for example a lock; every rank raises its error."""
    with contextlib.ExitStack() as stack:

        def enter() -> None:  # without a result, because the context's may not be sendable
            stack.enter_context(context())

        on_first_rank(enter)
        yield


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {first_line(error)}"


def _exchange(call: Callable[[], None]) -> None:
    try:
        call()
    except RuntimeError as error:  # "connection closed by peer"
        raise LostRank(
            "another process of this run has ended; its own message says why. The same command continues the run"
        ) from error
