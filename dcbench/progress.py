"""Progress on standard error: a bar on a terminal, else a plain line every 15 seconds."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from dcbench.escape import plain

T = TypeVar("T")
PLAIN_SECONDS = 15.0
NOTHING_SECONDS = 1e-4  # for each item: a loop that is quicker had nothing to do, and prints no line


def track(
    items: Iterable[T], total: int, what: str, done: int = 0, quiet: bool = False, whole: int | None = None
) -> Iterator[T]:
    """Yield `items` and show how many of `total` are finished; `done` were finished before.

    Under torchrun, `total` is what this process does, and `whole` what all do. The others are taken to be as far as
    this one, so their sum is shown as "about".
    """
    whole = total if whole is None else whole
    if quiet or total <= done:
        yield from items
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(_title(what, whole > total), total=whole, completed=done)
            for count, item in enumerate(items, start=done + 1):
                yield item
                bar.update(task, completed=_of_all(count, total, done, whole))
    else:
        start = last = time.monotonic()
        for count, item in enumerate(items, start=done + 1):
            yield item
            now = time.monotonic()
            seconds = (now - start) / (count - done)
            is_last = count == total
            if (is_last and seconds > NOTHING_SECONDS) or now - last >= PLAIN_SECONDS:
                shown = f"{_of_all(count, total, done, whole)}/{whole}"
                line = f"{_title(what, whole > total)}: {shown} ({_speed(seconds, (whole - done) / (total - done))}"
                left = "" if is_last else f", {duration(seconds * max(total - count, 0))} left"
                print(f"{line}{left})", file=sys.stderr, flush=True)
                last = now


def _title(what: str, is_share: bool) -> str:
    return f"{plain(what)}, all processes, about" if is_share else plain(what)


def _of_all(count: int, total: int, done: int, whole: int) -> int:
    """How many are finished in all processes, if each is as far as this one."""
    return done + round((count - done) * (whole - done) / (total - done))


def _speed(seconds: float, processes: float) -> str:
    """Of all processes; a slow one in seconds for each."""
    rate = processes / max(seconds, 1e-9)
    return f"{rate:.1f}/s" if rate >= 1 else f"{duration(1 / rate)} each"


def duration(seconds: float) -> str:
    """Such as "8 s", "12 min", "3 h 05 min"."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
