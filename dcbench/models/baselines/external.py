"""Any program as a model: it reads a file of requests, and writes videos; dcbench runs it in its own environment.

The program is started once for all clips that are missing. It finds in the requests file one JSON object a line
(`clip_id image prompt num_frames fps frame_stride seed sampling`: `image` is the path of a PNG, `sampling` the card's
table). For each clip it leaves in the output folder `<clip_id>.mp4` (or another video), `<clip_id>.npy` (uint8
[t, h, w, 3]), or a folder `<clip_id>/` of images in the order of their names. What is finished is kept.
"""

import contextlib
import fcntl
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dcbench import video
from dcbench.catalogue import ModelCard
from dcbench.clips import TemporalPolicy, choose_in_time, resize
from dcbench.errors import UserError, first_line
from dcbench.facts import validate
from dcbench.files import atomic_write
from dcbench.models.base import Request, Runtime, Wanted, checks_with
from dcbench.pictures import read_image
from dcbench.programs import (
    PATIENCE,
    ProgramOptions,
    check_command,
    check_start,
    how_it_ended,
    last_lines,
    plain,
    program_path,
    started,
)
from dcbench.progress import track

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LARGEST = 8e9  # bytes of one clip


class ExternalOptions(ProgramOptions):
    """[options] of a card of this family. {braces} in the command: requests, output, python, cwd, device, adapters.

    `timeout`: seconds in which at least one new file must appear.
    """

    temporal: TemporalPolicy = "first"
    resize: Literal["keep", "squash", "crop"] = "keep"  # how the clip comes back to the size of its input image


class External:
    """Runs the program in `prepare`, and reads what it left in `generate`."""

    def __init__(self, card: ModelCard, options: ExternalOptions, device: str):
        self.card, self.options, self.device = card, options, device
        self.conditions_on: frozenset[str] = frozenset(card.conditions_on)
        self.facts: dict[str, Any] = {"dtype": "of an external program"}
        self.folder = Path()
        self.ended = "was not started"
        self.rank = os.environ.get("RANK", "0")  # under torchrun every process starts the program for its own share

    def prepare(self, requests: Iterable[Request], folder: Path) -> dict[str, float]:
        """Make every clip of `requests` that `folder` does not hold yet. Returns the seconds that each clip took.

        A program that fails is no error here: what it finished is used, and `generate` names the first clip missing.
        """
        self.folder = folder.resolve()
        output, images = self.folder / "output", self.folder / "images"
        for path in (output, images):
            path.mkdir(parents=True, exist_ok=True)
        lines = []
        for request in requests:
            if isinstance(self._clip(request), Tensor):
                continue
            self._remove(request.clip_id)
            image = images / f"{request.clip_id}.png"
            Image.fromarray(request.image.permute(1, 2, 0).contiguous().numpy()).save(image)
            ends = {}
            if request.end_image is not None:
                ends = {"end_image": str(images / f"{request.clip_id}-end.png")}
                Image.fromarray(request.end_image.permute(1, 2, 0).contiguous().numpy()).save(ends["end_image"])
            lines.append(
                {
                    "clip_id": request.clip_id,
                    "image": str(image),
                    **ends,
                    "prompt": request.prompt,
                    "num_frames": request.num_frames,
                    "fps": request.fps,
                    "frame_stride": request.frame_stride,
                    "seed": request.seed,
                    "sampling": self.card.sampling,
                }
            )
        seconds = self._seconds()
        if lines:
            path = self.folder / f"requests-{self.rank}.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            start = time.monotonic()
            self._run(path, output, [line["clip_id"] for line in lines])
            made = [line["clip_id"] for line in lines if self._find(line["clip_id"])]
            seconds |= {clip_id: (time.monotonic() - start) / len(made) for clip_id in made}
            with atomic_write(self.folder / f"seconds-{self.rank}.json") as temporary:
                temporary.write_text(json.dumps(seconds))
            children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            self.facts["peak_memory_mb"] = round(children / (1e6 if sys.platform == "darwin" else 1e3), 1)
        return seconds

    def generate(self, requests: Sequence[Request]) -> list[Tensor]:
        clips = []
        for request in requests:
            clip = self._clip(request)
            if isinstance(clip, str):
                raise UserError(
                    f"{self.card.name}: clip {request.clip_id} {plain(clip)}; the program {self.ended}."
                    f"{last_lines(self._log)}\n"
                    "Clips that are finished are kept: mend the program, and give the same command again."
                )
            clips.append(clip)
        return clips

    # --- what the program left ---

    def _find(self, clip_id: str) -> Path | None:
        names = [clip_id, *(f"{clip_id}{suffix}" for suffix in (".npy", *video.SUFFIXES))]
        found = [path for path in (self.folder / "output" / name for name in names) if os.path.lexists(path)]
        return found[0] if found else None

    def _remove(self, clip_id: str) -> None:
        """What is there of a clip is not usable; the program must not take it for finished."""
        while path := self._find(clip_id):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _clip(self, request: Request) -> Tensor | str:
        """The finished clip, or what is wrong with it."""
        path = self._find(request.clip_id)
        if path is None:
            return "has no output"
        try:
            clip, fps = read_output(path)
            rate = fps or self.card.clip.fps or request.fps
            indices = choose_in_time(self.options.temporal, len(clip), rate, request.num_frames, request.fps)
        except UserError as error:
            return f"is not usable: {error}"
        clip = clip[indices]
        if self.options.resize == "keep":
            return clip
        return resize(clip, request.image.shape[1], request.image.shape[2], self.options.resize)

    def _seconds(self) -> dict[str, float]:
        """What earlier runs of the program took for each clip."""
        known: dict[str, float] = {}
        for path in self.folder.glob("seconds-*.json"):
            known |= json.loads(path.read_text())
        return known

    # --- running it ---

    @property
    def _log(self) -> Path:
        return self.folder / f"program-{self.rank}.log"

    def _run(self, requests: Path, output: Path, clip_ids: list[str]) -> None:
        fields = {
            "requests": str(requests),
            "output": str(output),
            "python": program_path(self.options.python),
            "cwd": self.options.cwd,
            "device": self.device,
            "adapters": str(Path(__file__).with_name("adapters.py")),
        }
        with (
            self._alone() as lock,
            self._log.open("wb") as log,
            started(self.card.name, self.options, fields, lock, log) as process,
        ):
            for _ in track(self._watch(process, output, set(clip_ids)), len(clip_ids), self.card.name):
                pass

    @contextlib.contextmanager
    def _alone(self) -> Iterator[IO[str]]:
        """The locked file of this rank's program, which the program inherits. UserError while an earlier one lives."""
        with (self.folder / f"program-{self.rank}.lock").open("a+") as file:
            until = time.monotonic() + PATIENCE
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > until:
                        file.seek(0)
                        raise UserError(
                            f"{self.card.name}: the program of an earlier run still writes to {self.folder} (process "
                            f"{file.read().strip() or 'unknown'}). Wait for its end, or end it: kill, then kill -9"
                        ) from None
                    time.sleep(0.1)
                except OSError:  # a file system without locks
                    break
            yield file

    def _watch(self, process: subprocess.Popen[bytes], output: Path, waiting: set[str]) -> Iterator[str]:
        """Yield clips as their outputs appear; end when the program does, or when nothing new has come for too long."""
        before, last = -1, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
            running = process.returncode is None
            files = sum(len(names) for _, _, names in os.walk(output))
            if files != before:
                before, last = files, time.monotonic()
                names = {path.name if path.is_dir() else path.stem for path in output.iterdir()}
                yield from sorted(waiting & names)
                waiting -= names
            if not running:
                self.ended = how_it_ended(process.returncode)
                return
            if time.monotonic() - last > self.options.timeout:
                self.ended = f"wrote no new file for {self.options.timeout:g} seconds (options.timeout) and was stopped"
                return


def read_output(path: Path) -> tuple[Tensor, float | None]:
    """(uint8 [t 3 h w], frame rate where the file has one) of a video, a .npy file or a folder of images."""
    if path.is_dir():
        return _read_images(path), None
    if not path.is_file():
        raise UserError(f"{path} is neither a file nor a folder")
    if path.suffix != ".npy":
        return video.read_clip(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # a header may claim terabytes that the file lacks
    except Exception as error:  # depends on the damage
        raise UserError(f"{path} is no whole .npy file: {first_line(error)}") from error
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise UserError(f"{path} holds {array.dtype} {list(array.shape)}; expected uint8 [t, h, w, 3]")
    _check_size(path, array.nbytes)
    return torch.from_numpy(np.array(array)).permute(0, 3, 1, 2).contiguous(), None


def _check_size(path: Path, size: int) -> None:
    if size > LARGEST:
        raise UserError(f"{path} holds {size / 1e9:.1f} GB of pixels; a clip may have {LARGEST / 1e9:g} GB")


def _read_images(folder: Path) -> Tensor:
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
    if not paths:
        raise UserError(f"{folder} holds no image ({', '.join(IMAGES)})")
    frames: list[Tensor] = []
    for path in paths:
        frames.append(read_image(path))
        _check_size(folder, frames[0].numel() * len(paths))
        if frames[-1].shape != frames[0].shape:
            raise UserError(f"{path} is not of the size of {paths[0].name}")
    return torch.stack(frames)


def check_wanted(card: ModelCard, wanted: Sequence[Wanted]) -> None:
    """Raise UserError if the frames that the card names are too few for a clip."""
    options: ExternalOptions = validate(card.options, ExternalOptions, f"{card.name}, options")
    frames = card.clip.frames
    if frames is None:
        return
    for one in wanted:
        try:
            choose_in_time(options.temporal, frames, card.clip.fps or one.fps, one.num_frames or frames, one.fps)
        except UserError as error:
            raise UserError(f"{card.name}: {error}. Choose another protocol, or mend [clip] of its card") from error


@checks_with(check_wanted)
def load(card: ModelCard, runtime: Runtime) -> External:
    """Entry point of every card of this family."""
    options: ExternalOptions = validate(card.options, ExternalOptions, f"{card.name}, options")
    check_command(card.name, options, ("requests", "output"), ("python", "cwd", "device", "adapters"))
    if "cwd" in card.options and not options.cwd:
        raise UserError(
            f"{card.name} runs in its own repository: --set options.cwd=FOLDER, and --set options.python=PATH for the "
            f"Python of its environment. How to set it up: docs/baselines.md{f', {card.url}' if card.url else ''}"
        )
    check_start(card.name, options)
    return External(card, options, runtime.device)
