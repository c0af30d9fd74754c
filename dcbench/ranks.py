"""Processes of one run under torchrun. Without torchrun there is one process, and nothing is sent."""

import datetime
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dcbench.errors import UserError


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def join_ranks() -> None:
    """Under torchrun, connect the processes (gloo, because only small objects are sent)."""
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The values of all ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first_rank(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0; every rank gets its result, or raises its UserError."""
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
