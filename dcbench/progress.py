"""Progress on standard error: a bar on a terminal, else a plain line every 15 seconds."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
PLAIN_SECONDS = 15.0


def track(items: Iterable[T], total: int, what: str, done: int = 0, quiet: bool = False) -> Iterator[T]:
    """Yield `items` and show how many of `total` are finished; `done` were finished before."""
    if quiet or total <= done:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, completed=done)
            for item in items:
                yield item
                bar.advance(task)
    else:
        start = last = time.monotonic()
        for count, item in enumerate(items, start=done + 1):
            yield item
            now = time.monotonic()
            if count == total or now - last >= PLAIN_SECONDS:
                rate = (count - done) / max(now - start, 1e-9)
                print(f"{what}: {count}/{total} ({rate:.2f}/s)", file=sys.stderr, flush=True)
                last = now
