"""Processes that share a folder, perhaps from several machines: who is there, who is alone, who makes what.

This needs no file locks, which many shared file systems (NFS, Lustre) do not have. A file must be created once, be
renamed, and have a time of change. Each process has a file, which it touches every BEAT seconds. A process that was
killed is noticed: by those of its machine at once, by those of other machines after SILENT seconds.
"""

import contextlib
import itertools
import json
import os
import platform
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dcbench.files import is_alive

BEAT = 10.0  # seconds between two heartbeats
SILENT = 60.0  # without a heartbeat for so long, a process of another machine counts as ended
GONE = "gone"
Mode = Literal["alone", "shared"]


class InUse(Exception):
    """Another process is in the folder and does not allow this one. The message says which."""


def _place() -> str:
    """This machine since its start, with its process numbers: the same for processes that can see each other."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return platform.node()


def _started(pid: int) -> str:
    """When a process began, so that a later one with its number is told apart. GONE if there is none."""
    if not is_alive(pid):
        return GONE
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return GONE if fields[0] in "ZX" else fields[19]
    return ""


class Member:
    """This process in a folder, from `enter` to `leave`. Its file is `<name>.<state>`; claims are in `claims/`.

    Whether a process may be alone is decided as in Lamport's bakery: each takes a number that is greater than all that
    it sees, and the smallest number is first. A process that still chooses its number is waited for.
    """

    def __init__(self, folder: Path, doing: str = "") -> None:
        """`doing`: for the message to a process that must wait, for example "scoring"."""
        self.folder, self.claims, self.doing = folder, folder / "claims", doing
        host = re.sub(r"[^A-Za-z0-9]+", "-", platform.node())[:40]
        self.name = f"{host or 'machine'}-{os.getpid()}-{secrets.token_hex(4)}"
        self._file = folder / f"{self.name}.choosing"
        self._stop = threading.Event()
        self._ended: set[str] = set()  # processes known to have ended
        self._seen: dict[str, float] = {}  # when a process was last found alive

    def enter(self, mode: Mode, wait: bool = False) -> None:
        """Join the folder. "alone": no other process may be there. InUse if one is, unless `wait`."""
        self.claims.mkdir(parents=True, exist_ok=True)
        about = {"pid": os.getpid(), "place": _place(), "started": _started(os.getpid()), "host": socket.gethostname()}
        self._file.write_text(json.dumps(about | {"doing": self.doing}))
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            number = 1 + max((number for number, *_ in self._others()), default=0)
            entered = self.folder / f"{self.name}.{mode}-{number}"
            self._file.rename(entered)
            self._file = entered
            while blocker := self._blocker(mode, number):
                if not wait:
                    raise InUse(blocker)
                time.sleep(0.2)
        except BaseException:
            self.leave()
            raise

    def leave(self) -> None:
        self._stop.set()
        self._file.unlink(missing_ok=True)

    def claim(self, what: str) -> bool:
        """Whether this process is the one that does `what`. Another process can get it only after this one has left.

        A claim is a file that is created once and never changed. Where its process has ended, the next number is free.
        """
        for number in itertools.count():
            path = self.claims / f"{what}@{number}"
            try:
                with path.open("x") as file:
                    file.write(self.name)
                return True
            except FileExistsError:
                holder = path.read_text()
            if holder == self.name:
                return True
            if self._is_there(holder) if holder else self._silence(path) < SILENT:  # "": it is not yet written
                return False
        raise AssertionError

    def clear(self) -> None:
        """Remove all claims, and the files of processes that have ended. Only for a process that is alone."""
        for path in [*self.claims.iterdir(), *self.folder.glob("*.*")]:
            if path.parent == self.claims or not self._is_there(path.name.rpartition(".")[0]):
                path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            with contextlib.suppress(OSError):  # renamed at this moment, or the disk does not answer: next time
                os.utime(self._file)

    def _others(self) -> Iterator[tuple[int, Mode, str, Path]]:
        """(number, mode, name, file) of the other processes that are there and have their number."""
        for path in self.folder.glob("*.*"):
            name, _, state = path.name.rpartition(".")
            mode, _, number = state.partition("-")
            if name != self.name and number.isdecimal() and self._is_there(name):
                yield int(number), "alone" if mode == "alone" else "shared", name, path

    def _blocker(self, mode: Mode, number: int) -> str:
        """The process that came first and does not allow this one, in words; "" if there is none."""
        for path in self.folder.glob("*.choosing"):
            while path.exists() and self._is_there(path.stem):
                time.sleep(0.01)
        for other, its_mode, name, path in self._others():
            if (other, name) < (number, self.name) and "alone" in (mode, its_mode):
                about = _read(path)
                doing = f", which is {about['doing']}" if about.get("doing") else ""
                return f"process {about.get('pid', name)} on {about.get('host', 'another machine')}{doing}"
        return ""

    def _is_there(self, name: str) -> bool:
        """Whether a process is in the folder and has not ended."""
        if name == self.name:
            return True
        if name in self._ended:
            return False
        now = time.monotonic()
        if name not in self._seen or now - self._seen[name] > 1:
            # twice, because a listing may miss a file that is being renamed
            if not any(self._lives(path) for _ in range(2) for path in self.folder.glob(f"{name}.*")):
                self._ended.add(name)
                return False
            self._seen[name] = now
        return True

    def _lives(self, path: Path) -> bool:
        return _lives(_read(path), self._silence(path))

    def _silence(self, path: Path) -> float:
        """Seconds since a file was changed, by the file system's clock: machines may have different times."""
        with contextlib.suppress(OSError):
            os.utime(self._file)
            return self._file.stat().st_mtime - path.stat().st_mtime
        return SILENT


@dataclass(frozen=True)
class Seen:
    """A process in a folder, as others see it."""

    name: str
    host: str
    pid: int
    doing: str


def present(folder: Path) -> list[Seen]:
    """The processes that are in a folder now. Nothing is written, so it may be another machine's folder."""
    found = []
    for path in sorted(folder.glob("*.*")):
        about = _read(path)
        with contextlib.suppress(OSError):
            if _lives(about, time.time() - path.stat().st_mtime):
                name, _, _ = path.name.rpartition(".")
                seen = Seen(name, str(about.get("host", "")), int(about.get("pid", 0)), str(about.get("doing", "")))
                found.append(seen)
    return found


def _lives(about: dict[str, Any], silence: float) -> bool:
    """Whether a process lives, from what it says of itself and the seconds since its last heartbeat."""
    if about.get("place") == _place():
        return _started(int(about.get("pid", 0))) == about.get("started")
    return silence < SILENT


def _read(path: Path) -> dict[str, Any]:
    """What a process says of itself; {} if it cannot be read (now)."""
    try:
        about = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}
