"""Video files: exact frames in, by decoders that can be killed; lossless clips and previews out.

Reading happens in worker processes (`video_worker.py`): decord 0.6 can hang for ever holding the interpreter lock, and
a damaged file can crash a decoder. "auto" reads a file by decord where decord agrees with a full decode about the
number of frames and about the frames around every key frame, and by PyAV elsewhere: decord repeats the last frame of
some DivX files, and gives wrong frames where it seeks in MPEG-4 with B-frames or H.264 with open GOPs. Both give the
same pixels, but for a rounding of one or two levels in few of them.
A file of variable frame rate is read frame by frame: `fps` is its average rate, and indices count frames, not time.
"""

import atexit
import contextlib
import errno
import importlib.metadata
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from dcbench.clips import check_clip
from dcbench.errors import UserError
from dcbench.files import atomic_write, cache_dir

Decoder = Literal["auto", "decord", "pyav"]
SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".gif")
WORKER = Path(__file__).with_name("video_worker.py")
SECONDS = 30.0  # a request may take this long, and SECONDS_PER_MB more for each megabyte of the file
SECONDS_PER_MB = 2.0
START_SECONDS = 120.0


class VideoError(UserError):
    """A video that cannot be read, is too short, or hangs its decoder."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video holds. `num_frames` counts frames that really decode, up to any damage; not the header's claim."""

    num_frames: int
    fps: float
    height: int
    width: int
    decoder: str  # "decord", "pyav" or "procedural"


class Video(Protocol):
    """A video to read exact frames from: a file, or a procedural world. Must be picklable."""

    def info(self) -> VideoInfo: ...

    def read(self, indices: Sequence[int]) -> Tensor:
        """uint8 [len(indices), 3, h, w]; raises VideoError, which names the video and the reason."""
        ...


class FileFacts(NamedTuple):
    """What decoding a whole file found."""

    frames: int  # that decode before the first damage
    declared: int  # by the header; 0: it says nothing
    fps: float
    height: int
    width: int
    codec: str
    damage: list[str]  # what did not decode; the first few
    hash: str  # of all pixels, where asked for
    decord_frames: int | None  # that decord claims; None: it cannot open the file, or is not installed
    decord_exact: bool  # its frames are those of a full decode, wherever it seeks

    @property
    def decoder(self) -> str:
        """Which decoder "auto" reads this file with."""
        if self.codec == "procedural":
            return self.codec
        return "decord" if self.decord_exact and self.codec != "ffv1" else "pyav"


# --- worker processes -------------------------------------------------------------------------------------------------


class _WorkerDied(Exception):
    """The decoding process crashed, or was killed after its time ran out."""


class _Worker:
    """One decoding process."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        try:  # apart from the first request's time: a busy machine may need many seconds for imports
            reason = self.ask({"op": "start"}, START_SECONDS)[0].get("error")
        except _WorkerDied as died:
            reason = str(died)
        if reason:
            self.close()
            raise UserError(
                f"the decoding process does not start ({reason}). Does `{sys.executable} -c 'import av'` work?"
            )

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], Tensor]:
        """The answer's header and its bytes; after _WorkerDied the process is gone."""
        assert self.process.stdin is not None and self.process.stdout is not None
        late = threading.Event()

        def kill() -> None:
            late.set()
            self.process.kill()

        watchdog = threading.Timer(seconds, kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps({**request, "timeout": seconds}).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
            if not line.endswith(b"\n"):
                raise EOFError
            header = json.loads(line)
            payload = torch.empty(header["bytes"], dtype=torch.uint8)
            view, filled = payload.numpy().data, 0
            while filled < len(view):
                got = self.process.stdout.readinto(view[filled:])  # type: ignore[attr-defined]
                if not got:
                    raise EOFError
                filled += got
            return header, payload
        except (EOFError, BrokenPipeError) as error:
            self.close()
            reason = f"no answer within {seconds:.0f} s" if late.is_set() else _exit_reason(self.process.returncode)
            raise _WorkerDied(reason) from error
        except BaseException:  # Ctrl-C: the rest of the answer would stay in the pipe
            self.close()
            raise
        finally:
            watchdog.cancel()

    def close(self) -> None:
        self.process.kill()  # nothing is lost: the process keeps no state between requests
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process.wait()


def _exit_reason(code: int) -> str:
    if code < 0:
        return f"the decoder crashed ({signal.Signals(-code).name})"
    return f"the decoding process ended with exit code {code}"


class _Pool:
    """Idle workers, kept for the next request; as many exist as threads ask at once."""

    def __init__(self) -> None:
        self.idle: list[_Worker] = []
        self.lock = threading.Lock()

    def ask(self, request: dict[str, Any], seconds: float) -> tuple[dict[str, Any], Tensor]:
        with self.lock:
            worker = self.idle.pop() if self.idle else None
        if worker is not None and worker.process.poll() is not None:
            worker.close()
            worker = None
        worker = worker or _Worker()
        answer = worker.ask(request, seconds)
        with self.lock:
            self.idle.append(worker)
        return answer

    def close(self) -> None:
        with self.lock:
            workers, self.idle = self.idle, []
        for worker in workers:
            worker.close()


_pool = _Pool()
_of_the_parent: list[_Pool] = []
atexit.register(lambda: _pool.close())


def _after_fork() -> None:
    """A forked process (a data loader's) must not talk through its parent's pipes, nor end its parent's workers."""
    global _pool
    _of_the_parent.append(_pool)
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _ask(path: Path, request: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    try:
        megabytes = path.stat().st_size / 1e6
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error
    if megabytes == 0:
        raise VideoError(f"{path}: the file is empty")
    request = {**request, "path": str(path.absolute())}
    header, payload = _pool.ask(request, SECONDS + SECONDS_PER_MB * megabytes)
    if "error" in header:
        raise VideoError(f"{path}: {header['error']}")
    return header, payload


# --- reading ----------------------------------------------------------------------------------------------------------


@lru_cache(1)
def has_decord() -> bool:
    return importlib.util.find_spec("decord") is not None


class _FactsStore:
    """Facts of files, by path, size and time: in memory, and one line each in the cache folder for the next process."""

    def __init__(self) -> None:
        self.known: dict[Path, dict[str, FileFacts]] = {}  # cache file -> key -> facts
        self.lock = threading.Lock()

    def _table(self) -> tuple[Path, dict[str, FileFacts]]:
        file = cache_dir() / "video_facts.jsonl"
        if file not in self.known:
            self.known[file] = {}
            with contextlib.suppress(FileNotFoundError):
                for line in file.read_text(encoding="utf-8").splitlines():
                    with contextlib.suppress(ValueError, TypeError):  # cut off by a crash, or of another version
                        key, *values = json.loads(line)
                        self.known[file][key] = FileFacts(*values)
        return file, self.known[file]

    def get(self, key: str) -> FileFacts | None:
        with self.lock:
            return self._table()[1].get(key)

    def put(self, key: str, facts: FileFacts) -> None:
        with self.lock:
            file, table = self._table()
            table[key] = facts
            with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as lines:  # on a full disk: not kept
                lines.write(json.dumps([key, *facts]) + "\n")


_facts = _FactsStore()


@lru_cache(1)
def _versions() -> str:
    names = ["av", "decord"] if has_decord() else ["av"]
    return " ".join(["3", *map(importlib.metadata.version, names)])  # 3: raise it when FileFacts change


def examine(path: Path, with_hash: bool = False) -> FileFacts:
    """Facts of a file, by decoding all of it; without the hash, a file that has not changed is decoded once only.

    Raises VideoError when no frame decodes.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise VideoError(f"{path}: {error.strerror or error}") from error
    key = f"{path.absolute()} {status.st_size} {status.st_mtime_ns} {_versions()}"
    known = None if with_hash else _facts.get(key)
    if known is not None:
        return known
    request = {"op": "examine", "with_hash": with_hash, "with_decord": has_decord()}
    try:
        header, _ = _ask(path, request)
    except _WorkerDied as died:
        if not request["with_decord"]:
            raise VideoError(f"{path}: {died}") from died
        try:  # decord may be the one that hangs
            header, _ = _ask(path, {**request, "with_decord": False})
        except _WorkerDied as again:
            raise VideoError(f"{path}: {again}") from again
    header.pop("bytes")
    facts = FileFacts(**header)
    _facts.put(key, facts)
    return facts


def probe(path: Path, decoder: Decoder = "auto") -> VideoInfo:
    """Size, rate and exact number of frames, and the decoder that will read them."""
    facts = examine(path)
    if facts.fps <= 0:
        raise VideoError(f"{path}: the file states no frame rate")
    chosen = facts.decoder if decoder == "auto" else decoder
    if chosen == "decord" and not facts.decord_exact:
        raise VideoError(f"{path}: decord does not give this file's frames under their numbers; use auto or pyav")
    return VideoInfo(facts.frames, facts.fps, facts.height, facts.width, chosen)


def read_frames(path: Path, indices: Sequence[int], decoder: Decoder = "auto") -> tuple[Tensor, str]:
    """Exactly these frames, uint8 [t, 3, h, w], and the name of the decoder that read them.

    "auto" falls back to PyAV when decord fails, hangs or crashes; a decoder asked for by name never falls back.
    """
    if decoder == "decord" and not has_decord():
        raise UserError("decord is not installed here; choose the decoder pyav, or auto")
    info = probe(path, decoder)
    if not indices:
        raise VideoError(f"{path}: no frames were asked for")
    wrong = [index for index in indices if not 0 <= index < info.num_frames]
    if wrong:
        raise VideoError(f"{path}: frame {wrong[0]} was asked for, but only frames 0-{info.num_frames - 1} decode")
    attempts = ["decord", "pyav"] if decoder == "auto" and info.decoder == "decord" else [info.decoder]
    reasons: list[str] = []
    for name in attempts:
        request = {"op": "read", "decoder": name, "indices": [int(index) for index in indices]}
        try:
            header, payload = _ask(path, request)
            shape = header["shape"]
            if shape[1:] != [info.height, info.width, 3]:
                raise VideoError(f"{path}: got frames {shape[2]}x{shape[1]}, expected {info.width}x{info.height}")
            return payload.view(shape).permute(0, 3, 1, 2).contiguous(), name
        except (_WorkerDied, VideoError) as error:
            reasons.append(f"{name}: {str(error).removeprefix(f'{path}: ')}")
    raise VideoError(f"{path}: cannot be read ({'; '.join(reasons)})")


@dataclass(frozen=True)
class VideoFile:
    """A video file as a `Video`."""

    path: Path
    decoder: Decoder = "auto"

    def info(self) -> VideoInfo:
        return probe(self.path, self.decoder)

    def read(self, indices: Sequence[int]) -> Tensor:
        return read_frames(self.path, indices, self.decoder)[0]


class Read(NamedTuple):
    """Frames, and what decoded them."""

    frames: Tensor  # uint8 [t, 3, h, w]
    decoder: str


def read(video: Video, indices: Sequence[int] | None = None) -> Read:
    """Frames of any video (None: all), with the decoder that really read them."""
    indices = range(video.info().num_frames) if indices is None else indices
    if isinstance(video, VideoFile):
        return Read(*read_frames(video.path, indices, video.decoder))
    return Read(video.read(indices), video.info().decoder)


Job = TypeVar("Job")
Answer = TypeVar("Answer")


def in_order(
    function: Callable[[Job], Answer], jobs: Iterable[Job], workers: int = 1, ahead: int | None = None
) -> Iterator[Answer | UserError]:
    """function(job) for each job in its order, or its UserError, so that one bad video does not end the rest.

    Up to `ahead` answers (2 a worker by default) are prepared while the caller computes; no more are held in memory.
    torch takes one thread in a worker: a second pool of OpenMP threads would slow the caller's own to half its speed.
    """
    ahead = ahead or 2 * workers
    threads = torch.get_num_threads()
    executor = ThreadPoolExecutor(workers, "video", torch.set_num_threads, (1,))
    waiting: deque[Future[Answer]] = deque()
    todo = iter(jobs)
    try:
        while True:
            for job in itertools.islice(todo, ahead - len(waiting)):
                waiting.append(executor.submit(function, job))
            if not waiting:
                return
            try:
                answer: Answer | UserError = waiting.popleft().result()
            except UserError as error:
                answer = error
            yield answer
            del answer  # else this clip would stay in memory until the next one is asked for
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # a worker's setting is the default of threads that begin later


def read_clip(path: Path) -> tuple[Tensor, float]:
    """All frames of a clip file, uint8 [t, 3, h, w], and its fps, in one pass of PyAV; a damaged file is an error."""
    try:
        header, payload = _ask(path, {"op": "clip"})
    except _WorkerDied as died:
        raise VideoError(f"{path}: {died}") from died
    return payload.view(header["shape"]).permute(0, 3, 1, 2).contiguous(), header["fps"]


# --- writing ----------------------------------------------------------------------------------------------------------


def _encode(
    path: Path,
    clip: Tensor,
    fps: float,
    container: str,
    codec: str,
    pixels: str,
    options: Mapping[str, str],
    container_options: Mapping[str, str] | None = None,
    tag: str = "",
) -> None:
    """Encode uint8 [t, 3, h, w] and put the whole file in place at once. The same clip gives the same bytes."""
    import av

    check_clip(clip, str(path))
    if not 0.1 <= fps <= 1000:
        raise UserError(f"{path}: fps is {fps}; expected a number of frames per second from 0.1 to 1000")
    frames = clip.permute(0, 2, 3, 1).cpu().contiguous().numpy()
    try:
        with atomic_write(path) as temporary:
            settings = {"fflags": "+bitexact", **(container_options or {})}
            with av.open(str(temporary), "w", format=container, options=settings) as output:
                rate = Fraction(fps).limit_denominator(1001)
                stream = output.add_stream(codec, rate=rate, options={"flags": "+bitexact", **options})
                context: Any = stream.codec_context
                stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels  # type: ignore
                context.thread_count = 1
                if tag:
                    context.codec_tag = tag
                if pixels == "yuv420p":  # what the conversion below computes; players guess otherwise by height
                    context.colorspace, context.color_primaries, context.color_trc, context.color_range = 6, 6, 6, 1
                for pixel in frames:
                    frame = av.VideoFrame.from_ndarray(pixel, format="rgb24").reformat(format=pixels)
                    output.mux(stream.encode(frame))  # type: ignore[arg-type]
                output.mux(stream.encode(None))  # type: ignore[arg-type]
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = " Free some room there; nothing unfinished was left behind." if full else ""
    return UserError(f"cannot write {path}: {error.strerror or error}.{advice}")


def write_lossless(path: Path, clip: Tensor, fps: float) -> None:
    """A clip file, FFV1 in Matroska: the pixels come back bit for bit, with a checksum on every slice."""
    options = {"level": "3", "slices": "4", "slicecrc": "1", "coder": "1", "context": "0"}
    _encode(path, clip, fps, "matroska", "ffv1", "bgr0", options)


def _even(clip: Tensor) -> Tensor:
    """Repeat the last row or column where a side is odd: 4:2:0 video has even sides only."""
    if clip.shape[2] % 2:
        clip = torch.cat([clip, clip[:, :, -1:]], 2)
    if clip.shape[3] % 2:
        clip = torch.cat([clip, clip[..., -1:]], 3)
    return clip


def write_mp4(path: Path, clip: Tensor, fps: float, crf: int = 18) -> None:
    """H.264 that every browser plays."""
    clip = _even(check_clip(clip, str(path)))
    options = {"crf": str(crf), "x264-params": "mbtree=0"}  # mbtree reads uninitialised memory: other bytes each time
    _encode(path, clip, fps, "mp4", "libx264", "yuv420p", options, {"movflags": "+faststart"})


def write_webm(path: Path, clip: Tensor, fps: float) -> None:
    """VP9; `b=0` makes the encoder obey crf."""
    clip = _even(check_clip(clip, str(path)))
    options = {"crf": "24", "b": "0", "deadline": "good", "cpu-used": "4"}
    _encode(path, clip, fps, "webm", "libvpx-vp9", "yuv420p", options)


def write_avi(path: Path, clip: Tensor, fps: float) -> None:
    """MPEG-4 part 2 tagged XVID in AVI, as UCF-101 has it."""
    clip = _even(check_clip(clip, str(path)))
    _encode(path, clip, fps, "avi", "mpeg4", "yuv420p", {"b": "8M", "g": "12", "qmin": "2", "qmax": "3"}, tag="XVID")


def write_gif(path: Path, clip: Tensor, fps: float) -> None:
    """A looping GIF with 256 colours a frame; its clock counts hundredths of a second."""
    from PIL import Image

    frames = [
        Image.fromarray(np.ascontiguousarray(pixels)).quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        for pixels in check_clip(clip, str(path)).permute(0, 2, 3, 1).cpu().numpy()
    ]
    try:
        with atomic_write(path) as temporary:
            frames[0].save(
                temporary,
                "GIF",
                save_all=True,
                append_images=frames[1:],
                duration=round(1000 / fps),
                loop=0,
                disposal=1,
            )
    except OSError as error:
        raise _cannot_write(path, error) from error


WRITERS = {".mp4": write_mp4, ".webm": write_webm, ".gif": write_gif, ".mkv": write_lossless, ".avi": write_avi}


def write_preview(path: Path, clip: Tensor, fps: float) -> None:
    """Write a clip in the format that the file name's ending asks for."""
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UserError(f"{path}: cannot write {path.suffix or 'a file without an ending'}; use {', '.join(WRITERS)}")
    writer(path, clip, fps)
