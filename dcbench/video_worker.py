"""Decodes video files in a process of its own, so that a decoder that hangs or crashes can be killed.

`dcbench.video_processes` starts this file by its path; nothing imports it, and it imports nothing of dcbench and no
torch. One JSON object a line comes in on stdin. Each answer is one JSON line on stdout, then `bytes` raw bytes; before
it come lines without `bytes`, at most one a second, as signs of life.
"""

import contextlib
import errno
import hashlib
import json
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

CLIP_BYTES = 4e9  # what a file that is read as one clip may hold, decoded
ORPHAN_SECONDS = 3600  # if the parent is gone, a hanging decoder still ends


class Pipe:
    """What goes to dcbench. Whatever a decoder prints goes elsewhere."""

    every = 1.0  # seconds between signs of life

    def __init__(self) -> None:
        self.file: Any = None
        self.told = 0.0

    def open(self) -> None:
        self.file = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)

    def answer(self, header: dict[str, Any], payload: memoryview | bytes) -> None:
        self.file.write(json.dumps({**header, "bytes": len(payload)}).encode() + b"\n")
        self.file.write(payload)
        self.file.flush()

    def alive(self) -> None:
        """Tell dcbench that decoding goes on."""
        now = time.monotonic()
        if now - self.told >= self.every:
            self.told = now
            set_alarm(ORPHAN_SECONDS)
            self.file.write(b"{}\n")
            self.file.flush()


pipe = Pipe()


def set_alarm(seconds: int) -> None:
    if hasattr(signal, "alarm"):
        signal.alarm(seconds)


def read_through(path: str) -> None:
    """Raises OSError if the disk, and not the file, is why it does not decode."""
    with open(path, "rb") as file:
        while file.read(1 << 22):
            pipe.alive()


# --- what holds frames ------------------------------------------------------------------------------------------------


class Container:
    """A file that PyAV opens. Of several video tracks, FFmpeg's choice is read: never a cover picture."""

    def __init__(self, path: str) -> None:
        import av

        self.path = path
        self.container: Any = av.open(path, metadata_errors="ignore")  # a real file raised UnicodeDecodeError
        if not self.container.streams.video:
            self.container.close()
            raise ValueError("the file holds no video stream")
        self.stream: Any = self.container.streams.best("video") or self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # one process a core; frame threads would also delay errors
        self.declared, self.codec = self.stream.frames, self.stream.codec_context.name
        self.rate = self.stream.average_rate or self.stream.guessed_rate or self.stream.base_rate

    def frames(self, damage: list[str]) -> Iterator[Any]:
        """Frames in display order. What does not decode before the first whole frame is passed over."""
        from av.error import FFmpegError

        count, packets = 0, self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
                frames = decode_checked(packet) if self.codec == "ffv1" else packet.decode()
            except StopIteration:
                return
            except (FFmpegError, WrongChecksum) as error:
                read_through(self.path)
                damage.append(f"after {count} frames: {getattr(error, 'strerror', None) or error}")
                if count or isinstance(error, EOFError) or len(damage) > 100:
                    return
                continue
            for frame in frames:
                if not frame.is_corrupt:
                    yield frame
                    count += 1
                    continue
                damage.append(f"after {count} frames: a damaged frame")
                if count:
                    return

    def close(self) -> None:
        self.container.close()


class Animation:
    """A WebP file, which Pillow opens: FFmpeg decodes its still pictures alone. Transparency goes over white."""

    codec, rate = "webp", None  # the rate is known from the times of the frames

    def __init__(self, path: str) -> None:
        from PIL import Image

        self.path, self.image = path, Image.open(path)
        self.declared: int = getattr(self.image, "n_frames", 1)
        if self.declared == 1:
            self.close()
            raise ValueError("the file holds one still picture, no video")

    def frames(self, damage: list[str]) -> Iterator[Any]:
        import av
        from PIL import Image

        milliseconds = 0
        for number in range(self.declared):
            try:
                self.image.seek(number)
                picture = self.image.convert("RGBA")
            except (OSError, EOFError, ValueError) as error:
                read_through(self.path)
                damage.append(f"after {number} frames: {error}")
                return
            white = Image.new("RGBA", picture.size, "white")
            pixels = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
            milliseconds += self.image.info.get("duration", 0)
            self.rate = 1000 * (number + 1) / milliseconds if milliseconds else None
            yield av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")

    def close(self) -> None:
        self.image.close()


def open_video(path: str) -> Container | Animation:
    with open(path, "rb") as file:
        header = file.read(12)
    return (Animation if header[:4] + header[8:] == b"RIFFWEBP" else Container)(path)


class WrongChecksum(Exception):
    """A slice of an FFV1 frame is not what was written."""


def decode_checked(packet: Any) -> Any:
    """Frames of an FFV1 packet. FFmpeg conceals a slice whose checksum is wrong, and tells its log alone."""
    import av.logging

    av.logging.set_level(av.logging.ERROR)
    with av.logging.Capture() as lines:
        frames = packet.decode()
    if any("CRC mismatch" in text for _, _, text in lines):
        raise WrongChecksum("a wrong checksum")
    return frames


def decoded(source: Container | Animation, damage: list[str]) -> Iterator[Any]:
    """Frames in display order, up to the first damage or change of size.

    Beyond damage, an index no longer tells which frame it is. `damage` collects the reasons.
    """
    first = None
    for count, frame in enumerate(source.frames(damage)):
        pipe.alive()
        height, width = now = size(frame)
        first = first or now
        if now != first:
            change = f"the size of the frames changes from {first[1]}x{first[0]} to {width}x{height}"
            damage.append(f"after {count} frames: {change}")
            return
        yield frame


# --- pixels -----------------------------------------------------------------------------------------------------------


def orientation(frame: Any) -> tuple[bool, bool, bool]:
    """How a frame is to be shown: (rows become columns, then left becomes right, then top becomes bottom).

    The display matrix maps a pixel (p, q) to (a p + c q, b p + d q). All eight orientations, as `ffmpeg` has them; an
    angle between two quarters counts as the nearest one.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
            return (True, c < 0, b < 0) if abs(b) + abs(c) > abs(a) + abs(d) else (False, a < 0, d < 0)
    return False, False, False


def size(frame: Any) -> tuple[int, int]:
    """(height, width) of a frame as it is shown."""
    return (frame.width, frame.height) if orientation(frame)[0] else (frame.height, frame.width)


def pixels_of(frame: Any) -> np.ndarray:
    """uint8 [h w 3] of a frame as it is shown, in one piece."""
    pixels = frame.to_ndarray(format="rgb24")
    turned, mirrored, upside_down = orientation(frame)
    pixels = pixels.transpose(1, 0, 2) if turned else pixels
    return np.ascontiguousarray(pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1])


# --- requests ---------------------------------------------------------------------------------------------------------


def examine(path: str, with_decord: bool, with_hash: bool) -> tuple[dict[str, Any], bytes]:
    """Facts of a file by decoding all of it; and whether decord gives the same frames wherever it must seek."""
    damage: list[str] = []
    count, shape, plain, digest = 0, (0, 0), True, hashlib.blake2b(digest_size=16)
    samples = Samples()
    with contextlib.closing(open_video(path)) as source:
        start, end = None, None
        for frame in decoded(source, damage):
            if count == 0:
                shape, start = size(frame), frame.time
            # decord turns no frame, and takes the colours of both half pictures for one
            plain = plain and not any(orientation(frame)) and not frame.interlaced_frame
            end = frame.time
            if with_decord:
                samples.add(count, frame)
            count += 1
            if with_hash:
                digest.update(pixels_of(frame).data)
        samples.finish(count)
        rate, declared, codec = source.rate, source.declared, source.codec
    if count == 0:
        raise ValueError(f"no frame decodes ({damage[0] if damage else 'the stream is empty'})")
    if not rate and count > 1 and start is not None and end is not None and end > start:
        rate = (count - 1) / (end - start)
    decord_frames, decord_exact = None, False
    if with_decord:
        with contextlib.suppress(Exception):  # decord raises a type of its own; a file that it cannot open is PyAV's
            reader = open_decord(path)
            decord_frames = len(reader)
            whole = decord_frames == count and not damage and plain
            decord_exact = whole and samples.agree(reader, count)
    return {
        "frames": count,
        "declared": declared,
        "fps": float(rate) if rate else 0.0,
        "height": shape[0],
        "width": shape[1],
        "codec": codec,
        "damage": damage[:5],
        "hash": digest.hexdigest() if with_hash else "",
        "decord_frames": decord_frames,
        "decord_exact": decord_exact,
    }, b""


class Samples:
    """Some pixels of the frames around every key frame, where decord's seeking may go wrong.

    decord counts from the key frame before the wanted one. In MPEG-4 with B-frames, and in H.264 with open GOPs or in
    AVI, what it decodes there are other frames than it thinks, so that most indices are wrong.
    """

    AFTER_KEY = 4
    TOLERANCE = 4  # levels; FFmpeg's versions round MPEG-4 differently by up to 2

    def __init__(self) -> None:
        self.pixels: dict[int, np.ndarray] = {}
        self.key = 0
        self.last: Any = None

    def add(self, index: int, frame: Any) -> None:
        if frame.key_frame:
            self.finish(index)
            self.key = index
        if index < self.key + self.AFTER_KEY:
            self.pixels[index] = thin(frame.to_ndarray(format="rgb24"))
        self.last = frame

    def finish(self, index: int) -> None:
        """Before the key frame `index` (or the end): keep the frame before it as well."""
        if self.last is not None:
            self.pixels[index - 1] = thin(self.last.to_ndarray(format="rgb24"))

    def agree(self, reader: Any, count: int) -> bool:
        """Whether decord, made to seek to every key frame (backwards), finds the same frames there."""
        keys = [int(key) for key in reader.get_key_indices()]
        for key, after in reversed(list(zip(keys, [*keys[1:], count], strict=True))):
            pipe.alive()
            wanted = sorted({*range(key, min(key + self.AFTER_KEY, after)), after - 1})
            if any(index not in self.pixels for index in wanted):
                return False
            for index, frame in zip(wanted, reader.get_batch(wanted).asnumpy(), strict=True):
                own = self.pixels[index].astype(np.int16)
                if own.shape != thin(frame).shape or np.abs(own - thin(frame)).max() > self.TOLERANCE:
                    return False
        return bool(keys) and keys[0] == 0


def thin(pixels: np.ndarray) -> np.ndarray:
    """At most 64 x 64 of a frame's pixels."""
    height, width = pixels.shape[:2]
    return pixels[:: height // 64 + 1, :: width // 64 + 1].copy()


def open_decord(path: str) -> Any:
    import decord

    return decord.VideoReader(path, ctx=decord.cpu(0), num_threads=1)


def read_decord(path: str, indices: list[int]) -> np.ndarray:
    return open_decord(path).get_batch(indices).asnumpy()


def read_pyav(path: str, indices: list[int]) -> np.ndarray:
    """Decodes from the start to the last wanted frame: exact for every file, without trust in an index."""
    wanted, last = set(indices), max(indices)
    frames: dict[int, np.ndarray] = {}
    damage: list[str] = []
    with contextlib.closing(open_video(path)) as source:
        for index, frame in enumerate(decoded(source, damage)):
            if index in wanted:
                frames[index] = pixels_of(frame)
            if index == last:
                break
    missing = sorted(wanted - frames.keys())
    if missing:
        raise ValueError(f"frame {missing[0]} does not decode ({damage[0] if damage else 'the video ends before'})")
    return np.stack([frames[index] for index in indices])


def read_clip(path: str) -> tuple[dict[str, Any], memoryview]:
    """Every frame of a short file in one pass; a file that is not whole is an error."""
    damage: list[str] = []
    frames: list[np.ndarray] = []
    with contextlib.closing(open_video(path)) as source:
        for frame in decoded(source, damage):
            frames.append(pixels_of(frame))
            if len(frames) * frames[0].nbytes > CLIP_BYTES:
                raise ValueError(f"its frames take more than {CLIP_BYTES / 1e9:.0f} GB; a clip is a few seconds long")
        rate = source.rate
    if damage or not frames:
        raise ValueError(f"the clip is damaged ({damage[0] if damage else 'it holds no frame'})")
    if not rate:
        raise ValueError("the file states no frame rate")
    clip = np.stack(frames)
    return {"shape": list(clip.shape), "fps": float(rate)}, clip.data.cast("B")


READERS = {"decord": read_decord, "pyav": read_pyav}


def first_line(error: BaseException) -> str:
    """The message without its stack; decord puts a C++ traceback below and a file position before it."""
    if getattr(error, "strerror", None):  # PyAV's and the system's errors, without number and path
        return error.strerror  # type: ignore[attr-defined]
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "") or type(error).__name__
    return text.split("Check failed: ", 1)[-1] if "Check failed: " in text else text


def answer(request: dict[str, Any]) -> tuple[dict[str, Any], memoryview | bytes]:
    if request["op"] == "start":
        import av  # noqa: F401

        with contextlib.suppress(ImportError):  # not there on every machine
            import decord  # noqa: F401
        return {}, b""
    if request["op"] == "examine":
        return examine(request["path"], request["with_decord"], request["with_hash"])
    if request["op"] == "clip":
        return read_clip(request["path"])
    frames = np.ascontiguousarray(READERS[request["decoder"]](request["path"], request["indices"]))
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[0] != len(request["indices"]):
        raise ValueError(f"{request['decoder']} returned {frames.dtype} {list(frames.shape)}")
    return {"shape": list(frames.shape)}, frames.data.cast("B")


def failure(path: str, error: BaseException) -> dict[str, Any]:
    """Why a request failed. `errno`, where the system says no, tells a failing disk or full memory from a bad file."""
    try:
        read_through(path)
    except OSError as found:
        error = found
    of_decoder = type(error).__module__.startswith("av")  # FFmpeg uses the system's numbers for damage too
    number = errno.ENOMEM if isinstance(error, MemoryError) else None if of_decoder else getattr(error, "errno", None)
    return {"error": first_line(error), "errno": number}


def main() -> None:
    pipe.open()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    for line in sys.stdin:
        request = json.loads(line)
        set_alarm(ORPHAN_SECONDS)
        try:
            header, payload = answer(request)
        except Exception as error:  # any failure of a decoder is an answer
            header, payload = failure(request["path"], error), b""
        pipe.answer(header, payload)
        set_alarm(0)


if __name__ == "__main__":
    main()
