"""Any program as a metric: dcbench starts it once, gives it a line a clip, and reads a line a clip.

The program reads its requests from {requests}: one JSON object a line, `{"id": "000001", "clip": "/.../000001"}` with
what the card `needs` beside it. It writes its answers to {output}, one JSON object a line, in the same order, each
before it reads the next request: `{"id": "000001", "value": 0.5}` with further numbers; for a metric of sets
`{"id": "000001", "features": [...]}`, or the path of a .npy file; for a clip without a value
`{"id": "000001", "error": "why"}`. Both are named pipes, so what it prints is free: it is shown if the program fails.
"""

import contextlib
import json
import math
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcbench import video
from dcbench.catalogue import MetricCard
from dcbench.errors import UserError, first_line
from dcbench.facts import validate
from dcbench.files import digest, sha256_file
from dcbench.metrics.base import ClipMetric, MetricFailed, SetDistance, View
from dcbench.metrics.distances import score_frechet, score_kernel
from dcbench.programs import (
    ProgramOptions,
    check_command,
    check_start,
    how_it_ended,
    last_lines,
    plain,
    program_path,
    split,
    started,
)

LONGEST = 16_000_000  # bytes of an answer
FAREWELL = 5.0  # seconds for a program to end by itself, when it has read its last request
DEFAULT_FPS = 8.0  # of a clip file, if the card does not need the rate
# options that say how the program runs. A record or a protocol never gives them
OF_PROGRAM = ("command", "python", "cwd", "environment", "timeout", "version", "clips", "features")


class ExternalOptions(ProgramOptions):
    """[options] of a card of this family. {braces} in the command: requests, output, python, cwd, device.

    `timeout`: seconds in which the program must answer; the first answer includes its start.
    """

    version: str = "1"  # change it when the program gives other numbers, so that cached ones are not used
    clips: Literal["png", "mkv"] = "png"  # a folder 00000.png, 00001.png ... a clip; or a file, FFV1 in Matroska
    features: int = 0  # of a metric of sets: how many numbers describe a clip
    distance: Literal["frechet", "kernel"] = "frechet"  # of a metric of sets
    over_samples: Literal["mean", "best"] = "mean"  # of a metric with a value a clip: see ClipMetric


class Program:
    """A running program, which answers one request after the other. It starts at the first one."""

    def __init__(self, card: MetricCard, options: ExternalOptions, device: str) -> None:
        self.card, self.options, self.device = card, options, device
        self.num_features = options.features
        self.identity = _identity(card, options)
        self.facts: dict[str, Any] = {"clips": 0, "seconds": 0.0}
        self._stack = contextlib.ExitStack()
        self._one_at_a_time = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._received = b""

    def ask(self, view: View) -> dict[str, Any]:
        """The answer to a clip: a JSON object with its id. UserError if it says why the clip has none.

        MetricFailed if the program cannot be started, ends, is silent or answers something else. It is ended then.
        """
        with self._one_at_a_time:
            try:
                begin = time.monotonic()
                if self._process is None:
                    self._start()
                self.facts["clips"] += 1
                request = self._request(f"{self.facts['clips']:06d}", view)
                line = self._exchange(json.dumps(request).encode() + b"\n")
                answer = self._read(line, request["id"])
                shutil.rmtree(self._clips)
                self.facts["seconds"] += time.monotonic() - begin
            except BaseException:  # also Ctrl-C: the answer would be taken for that of another clip
                self._end()
                raise
        if "error" in answer:
            raise UserError(f"{self.card.name}: {plain(str(answer['error']))[:300]}")
        return answer

    def fail(self, what: str) -> MetricFailed:
        """The error of a program that did `what`."""
        return MetricFailed(
            f"{self.card.name}: the program {what}.{last_lines(self._log, kept=False)}\n"
            "Values that are there are kept: mend the program or its card, and give the same command again."
        )

    def close(self) -> None:
        """End the program: its requests end, then it is asked, then it is ended. The next clip starts it again."""
        with self._one_at_a_time:
            if self._process is not None:
                self._close_requests()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(FAREWELL)
            self._end()

    # --- the process ---

    def _start(self) -> None:
        stack = self._stack
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"dcbench-{self.card.name}-")))
        self._log, self._clips = self._folder / "program.log", self._folder / "clips"
        requests, output = self._folder / "requests.jsonl", self._folder / "output.jsonl"
        for pipe in (requests, output):
            os.mkfifo(pipe)
        # opened for both directions, so that neither side waits for the other to open them
        self._to, self._from = (os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC) for pipe in (requests, output))
        stack.callback(os.close, self._from)
        stack.callback(self._close_requests)
        lock = stack.enter_context((self._folder / "lock").open("a+"))
        log = stack.enter_context(self._log.open("wb"))
        fields = {
            "requests": str(requests),
            "output": str(output),
            "python": program_path(self.options.python),
            "cwd": self.options.cwd,
            "device": self.device,
        }
        try:
            self._process = stack.enter_context(started(self.card.name, self.options, fields, lock, log))
        except UserError as error:
            raise MetricFailed(
                f"{error}. Install the program, or correct options.command or options.python of its card"
            ) from error

    def _close_requests(self) -> None:
        if self._to >= 0:
            os.close(self._to)
            self._to = -1

    def _end(self) -> None:
        self._process, self._received = None, b""
        self._stack.close()

    def _exchange(self, line: bytes) -> bytes:
        """Write a request and wait for the next line of the program."""
        assert self._process is not None
        until = time.monotonic() + self.options.timeout
        while b"\n" not in self._received:
            ended = self._process.poll() is not None
            writing = [self._to] if line else []
            readable, writable, _ = select.select([self._from], writing, [], 0 if ended else 0.2)
            if readable:
                self._received += os.read(self._from, 1 << 16)
            elif ended:
                raise self.fail(f"{how_it_ended(self._process.returncode)} before it answered")
            elif time.monotonic() > until:
                raise self.fail(
                    f"gave no answer for {self.options.timeout:g} seconds (options.timeout) and was stopped. It must "
                    "write and flush a line for each line that it reads, before it reads the next"
                )
            if writable:
                with contextlib.suppress(BlockingIOError):
                    line = line[os.write(self._to, line) :]
            if len(self._received) > LONGEST:
                raise self.fail(f"answered more than {LONGEST / 1e6:g} MB without an end of line")
        answer, _, self._received = self._received.partition(b"\n")
        return answer

    # --- what is asked, and what is answered ---

    def _request(self, number: str, view: View) -> dict[str, Any]:
        """A line of the requests: what the card needs of a case. Its files are there until it is answered."""
        self._clips.mkdir()
        request: dict[str, Any] = {"id": number, "clip": self._write(number, view.clip, view.fps)}
        if view.image is not None:
            request["image"] = str(_write_png(self._clips / f"{number}-image.png", view.image))
        if view.reference is not None:
            request["reference"] = self._write(f"{number}-reference", view.reference, view.fps)
        if view.siblings is not None:
            names = [f"{number}-sibling-{k}" for k in range(len(view.siblings))]
            written = zip(names, view.siblings, strict=True)
            request["siblings"] = [self._write(name, clip, view.fps) for name, clip in written]
        others = {"prompt": view.prompt, "fps": view.fps, "truth": view.truth and dict(view.truth)}
        return request | {name: value for name, value in others.items() if value is not None}

    def _write(self, name: str, clip: Tensor, fps: float | None) -> str:
        """The path of a clip, uint8 [t 3 h w], without loss: a folder of PNG files, or a video file."""
        if self.options.clips == "mkv":
            path = self._clips / f"{name}.mkv"
            video.write_lossless(path, clip, fps or DEFAULT_FPS)
            return str(path)
        folder = self._clips / name
        folder.mkdir()
        for k, frame in enumerate(clip):
            _write_png(folder / f"{k:05d}.png", frame)
        return str(folder)

    def _read(self, line: bytes, number: str) -> dict[str, Any]:
        """The answer in a line."""
        shown = plain(line.decode(errors="replace"))[:200]
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self.fail(f"answered {shown!r}, which is no JSON ({first_line(error)})") from error
        if not isinstance(answer, dict) or answer.get("id") != number:
            raise self.fail(f'answered {shown!r}; expected an object with "id": "{number}", that of the request')
        return answer


def _write_png(path: Path, picture: Tensor) -> Path:
    Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy()).save(path, compress_level=1)
    return path


def _identity(card: MetricCard, options: ExternalOptions) -> dict[str, str]:
    """The command, its version, and the sha256 of the files that it names. A change of these is another metric."""
    parts = split(options.command)
    start = Path(options.cwd).expanduser()
    files = [start / Path(part).expanduser() for part in parts if "{" not in part]
    hashes = [sha256_file(path) for path in files if path.is_file()]
    environment = "".join(f"{key}={value} " for key, value in sorted(options.environment.items()))
    return {
        "name": f"program, version {options.version}: {environment}{' '.join(parts)}",
        "weights_sha256": hashes[0] if len(hashes) == 1 else digest(hashes, 64) if hashes else "",
        "preprocessing": f"lossless {options.clips}, RGB, at the size of the protocol",
    }


class ExternalMetric(ClipMetric):
    """A value for each clip, by a program."""

    extractor: Program
    extractor_options = OF_PROGRAM

    def __init__(self, card: MetricCard, program: Program) -> None:
        super().__init__(card, program)
        self.facts = program.facts

    def observe(self, view: View) -> dict[str, Any]:
        """-> {"value"} and the other numbers, or lists of numbers, of the answer."""
        answer = self.extractor.ask(view)
        if "value" not in answer:
            raise self.extractor.fail(f'answered without "value": its keys are {", ".join(map(plain, answer))}')
        return {
            key: [self._number(key, inner) for inner in value]
            if key != "value" and isinstance(value, list)
            else self._number(key, value)
            for key, value in answer.items()
            if key != "id"
        }

    def _number(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.extractor.fail(f'answered {plain(repr(value))[:100]} for "{key}"; expected a finite number')
        return float(value)

    def close(self) -> None:
        self.extractor.close()


class ExternalSetMetric(SetDistance):
    """A distance of two sets of clips in the features of a program."""

    extractor_options = OF_PROGRAM
    in_workers = False

    def __init__(self, card: MetricCard, program: Program) -> None:
        score = score_frechet if program.options.distance == "frechet" else score_kernel
        super().__init__(card, cast(Any, program), score, biased=program.options.distance == "frechet")
        self.program, self.facts = program, program.facts

    def observe(self, view: View) -> Tensor:
        """-> float32 [d], d of options.features."""
        program = self.program
        given = program.ask(view).get("features")
        try:
            row = np.load(given, allow_pickle=False) if isinstance(given, str) else np.array(given, np.float32)
            row = row.astype(np.float32).reshape(-1)
        except Exception as error:  # of a file, it depends on the damage
            raise program.fail(f'answered no list and no .npy file for "features": {first_line(error)}') from error
        if len(row) != program.num_features or not np.isfinite(row).all():
            raise program.fail(
                f'answered {len(row)} numbers for "features"{"" if np.isfinite(row).all() else ", some not finite"}; '
                f"expected {program.num_features} finite ones (options.features)"
            )
        return torch.from_numpy(row)

    def close(self) -> None:
        self.program.close()


def build(card: MetricCard, runtime: Any) -> ExternalMetric | ExternalSetMetric:
    """Entry point of every card of this family. The program starts at the first clip that has no value yet."""
    options: ExternalOptions = validate(card.options, ExternalOptions, f"{card.name}, options")
    check_command(card.name, options, ("requests", "output"), ("python", "cwd", "device"))
    check_start(card.name, options)
    if (card.kind == "set") != (options.features > 0):
        raise UserError(
            f'{card.name}: options.features is {options.features} and kind is "{card.kind}". A metric of sets needs '
            "the number of features of a clip, a metric with a value a clip has none"
        )
    program = Program(card, options, runtime.device)
    return ExternalSetMetric(card, program) if card.kind == "set" else ExternalMetric(card, program)
