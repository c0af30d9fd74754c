"""Video files: exact frames in, by decoders that can be killed (`video_processes.py`); clips and previews out.

"auto" reads a file by decord where decord agrees with a full decode about the
number of frames and about the frames around every key frame, and by PyAV elsewhere: decord repeats the last frame of
some DivX files, and gives wrong frames where it seeks in MPEG-4 with B-frames or H.264 with open GOPs. Both give the
same pixels, but for a rounding of one or two levels in few of them.
A file of variable frame rate is read frame by frame: `fps` is its average rate, and indices count frames, not time.
"""

import contextlib
import errno
import importlib.metadata
import importlib.util
import itertools
import json
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
from dcbench.errors import UserError, as_text
from dcbench.files import atomic_write, cache_dir
from dcbench.video_files import SUFFIXES as SUFFIXES
from dcbench.video_processes import PassingError, VideoError, WorkerDied, ask, file_error

Decoder = Literal["auto", "decord", "pyav"]


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
        if self.codec in ("procedural", "pillow"):  # no video file
            return self.codec
        return "decord" if self.decord_exact and self.codec != "ffv1" else "pyav"


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
                for line in file.read_text(encoding="utf-8").split("\n"):
                    with contextlib.suppress(ValueError, TypeError):  # cut off by a crash, or of another version
                        key, *values = json.loads(line)
                        self.known[file][key] = FileFacts(*values)
        return file, self.known[file]

    def get(self, key: str) -> FileFacts | None:
        with self.lock:
            return self._table()[1].get(key)

    def put(self, key: str, facts: FileFacts, lasting: bool) -> None:
        """Facts that are not `lasting` are kept by this process alone."""
        with self.lock:
            file, table = self._table()
            table[key] = facts
            if not lasting:
                return
            with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as lines:  # on a full disk: not kept
                lines.write(json.dumps([key, *facts]) + "\n")


_facts = _FactsStore()


@lru_cache(1)
def _versions() -> str:
    names = ["av", "decord"] if has_decord() else ["av"]
    return " ".join(["4", *map(importlib.metadata.version, names)])  # 4: raise it when FileFacts change


def examine(path: Path, with_hash: bool = False) -> FileFacts:
    """Facts of a file, by decoding all of it; without the hash, a file that has not changed is decoded once only.

    Raises VideoError when no frame decodes.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise file_error(path, error.strerror or str(error), error.errno) from error
    key = f"{path.absolute()} {status.st_size} {status.st_mtime_ns} {_versions()}"
    known = None if with_hash else _facts.get(key)
    if known is not None:
        return known
    request = {"op": "examine", "with_hash": with_hash, "with_decord": has_decord()}
    lasting = True
    try:
        header, _ = ask(path, request)
    except WorkerDied as died:
        if not request["with_decord"]:
            raise died.error(path) from died
        lasting = not died.passing  # decord may do better next time
        try:  # decord may be the one that hangs
            header, _ = ask(path, {**request, "with_decord": False})
        except WorkerDied as again:
            raise again.error(path) from again
    header.pop("bytes")
    facts = FileFacts(**header)
    _facts.put(key, facts, lasting)
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
        why = "".join(f" ({reason})" for reason in examine(path).damage[:1])
        raise VideoError(f"{path}: frame {wrong[0]} was asked for, but only frames 0-{info.num_frames - 1} decode{why}")
    attempts = ["decord", "pyav"] if decoder == "auto" and info.decoder == "decord" else [info.decoder]
    reasons: list[str] = []
    passing = False
    for name in attempts:
        request = {"op": "read", "decoder": name, "indices": [int(index) for index in indices]}
        try:
            header, payload = ask(path, request)
            shape = header["shape"]
            if shape[1:] != [info.height, info.width, 3]:
                raise VideoError(f"{path}: got frames {shape[2]}x{shape[1]}, expected {info.width}x{info.height}")
            return payload.view(shape).permute(0, 3, 1, 2).contiguous(), name
        except (WorkerDied, VideoError) as error:
            passing = isinstance(error, PassingError) or (isinstance(error, WorkerDied) and error.passing)
            reasons.append(f"{name}: {str(error).removeprefix(as_text(f'{path}: '))}")
    raise (PassingError if passing else VideoError)(f"{path}: cannot be read ({'; '.join(reasons)})")


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
        header, payload = ask(path, {"op": "clip"})
    except WorkerDied as died:
        raise died.error(path) from died
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
