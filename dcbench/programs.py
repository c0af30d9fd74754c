"""Programs that dcbench starts for models and metrics, in an environment of their own, and ends with itself.

A card gives the command, so it is code that runs on this machine: such a card is installed, or given on a command line.
"""

import contextlib
import os
import shlex
import signal
import socket
import string
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from dcbench.errors import UserError
from dcbench.facts import Facts

LAST_LINES = 15
LAST_BYTES = 100_000  # of the log, in which these lines are looked for
PATIENCE = 15.0  # seconds for a program to end, which the supervisor asks first


class ProgramOptions(Facts):
    """The part of [options] that says how a program is started."""

    command: str | tuple[str, ...]
    python: str = "python3"  # of the program's own environment
    cwd: str = ""  # where it is started
    environment: dict[str, str] = {}  # on top of dcbench's own
    timeout: float = 1800  # seconds of silence after which it counts as hung


def check_command(name: str, options: ProgramOptions, needed: Sequence[str], others: Sequence[str]) -> None:
    """Raise UserError if a command does not name its {files}, or names unknown ones. `name`: of its card."""
    parts = split(options.command)
    if not parts:
        raise UserError(
            f"{name}: options.command is empty; for example '{{python}} my.py {' '.join(map(braces, needed))}'"
        )
    named = set[str]()
    for part in parts:
        try:
            named |= {field for _, field, _, _ in string.Formatter().parse(part) if field is not None}
        except ValueError as error:
            raise UserError(f"{name}: options.command, {part!r}: {error}. Double a brace that is meant") from error
    if named - {*needed, *others} or not {*needed} <= named:
        raise UserError(
            f"{name}: options.command must name {' and '.join(map(braces, needed))}, and may name "
            f"{', '.join(map(braces, others[:-1]))} and {braces(others[-1])}; it names "
            f"{', '.join(sorted(named)) or 'none'}. Double a brace that is meant"
        )


def braces(name: str) -> str:
    return f"{{{name}}}"


def check_start(name: str, options: ProgramOptions) -> None:
    """Raise UserError if the program cannot be started so. `name`: of its card."""
    if options.cwd and not Path(options.cwd).expanduser().is_dir():
        raise UserError(f"{name}: options.cwd {options.cwd!r} is no folder")
    if options.timeout <= 0:
        raise UserError(f"{name}: options.timeout is {options.timeout:g}; it must be above 0")


def last_lines(log: Path, kept: bool = True) -> str:
    """The end of what a program printed, for an error. `kept`: the file is there afterwards, so it is named."""
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - LAST_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line for line in map(plain, text.splitlines()) if line.strip()][-LAST_LINES:]
    said = "".join(f"\n  | {line[:300]}" for line in lines) or "\n  | (nothing)"
    return f" The end of its output{f' ({log})' if kept else ''}:{said}"


def how_it_ended(code: int) -> str:
    return f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"


@contextlib.contextmanager
def started(
    name: str, options: ProgramOptions, fields: Mapping[str, str], lock: IO[str], log: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """The supervisor of a started program. At the end of the block, or of this process, all of it is ended.

    `fields`: the values of the command's {braces}. `lock`: its text is the program's process number, and the program
    inherits it. UserError if the program cannot be started.
    """
    command = [part.format(**fields) for part in split(options.command)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | options.environment
    for variable in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):  # of dcbench's environment, not of the program's
        if variable not in options.environment:
            environment.pop(variable, None)
    here, there = socket.socketpair()
    with here:
        with there:
            process = subprocess.Popen(
                [sys.executable, "-I", str(Path(__file__).with_name("supervisor.py")), str(lock.fileno()), *command],
                cwd=Path(options.cwd).expanduser() if options.cwd else None,
                env=environment,
                stdin=there.fileno(),
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # a Ctrl-C of the terminal is for dcbench, which closes the socket
            )
        with here.makefile("r", encoding="utf-8", errors="replace") as answers:
            state, _, said = answers.readline().strip().partition(" ")
        if state != "started":
            process.wait()
            raise UserError(
                f"{name}: cannot start {command[0]!r}: {said or 'no answer'}. The whole command: {shlex.join(command)}"
            )
        lock.truncate(0)
        lock.write(f"{said}\n")
        lock.flush()
        try:
            yield process
        finally:
            here.shutdown(socket.SHUT_RDWR)  # the supervisor ends all, also if a second Ctrl-C ends this wait
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)


def plain(text: str) -> str:
    """Text of a program for the terminal: what is no visible character, such as an escape sequence, as its code."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def split(command: str | tuple[str, ...]) -> tuple[str, ...]:
    """A command line as its parts: split first, filled in later, so that a path may hold spaces."""
    if isinstance(command, tuple):
        return command
    try:
        return tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"options.command {command!r} is no command line: {error}") from error


def program_path(path: str) -> str:
    """A path with a slash is made absolute, so that it does not depend on `cwd`; a bare name is looked up in PATH."""
    return str(Path(path).expanduser().absolute()) if os.sep in path else path
