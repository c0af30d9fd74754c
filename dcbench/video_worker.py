"""Decodes video files in a process of its own, so that a decoder that hangs or crashes can be killed.

`dcbench.video` starts this file by its path; nothing imports it, and it imports nothing of dcbench and no torch.
One JSON object a line comes in on stdin; each answer is one JSON line on stdout, then `bytes` raw bytes.
"""

import contextlib
import hashlib
import json
import os
import signal
import sys
from typing import Any

import numpy as np

CLIP_BYTES = 4e9  # what a file that is read as one clip may hold, decoded


def open_pyav(path: str) -> Any:
    """A container; undecodable bytes in its metadata are ignored (a real file raised UnicodeDecodeError)."""
    import av

    container = av.open(path, metadata_errors="ignore")
    if not container.streams.video:
        raise ValueError("the file holds no video stream")
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1  # one process a core; frame threads would also delay errors
    return container


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


def decoded(container: Any, damage: list[str]) -> Any:
    """Frames in display order, up to the first damage: beyond it, an index no longer tells which frame it is.

    What does not decode before the first whole frame is passed over. `damage` collects the reasons.
    """
    from av.error import FFmpegError

    stream, count = container.streams.video[0], 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
            frames = decode_checked(packet) if stream.codec_context.name == "ffv1" else packet.decode()
        except StopIteration:
            return
        except (FFmpegError, WrongChecksum) as error:
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


def examine(path: str, with_decord: bool, with_hash: bool) -> tuple[dict[str, Any], bytes]:
    """Facts of a file by decoding all of it; and whether decord gives the same frames wherever it must seek."""
    damage: list[str] = []
    count, shape, rotated, digest = 0, (0, 0), False, hashlib.blake2b(digest_size=16)
    samples = Samples()
    with contextlib.closing(open_pyav(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        declared, codec = stream.frames, stream.codec_context.name
        start, end = None, None
        for frame in decoded(container, damage):
            if count == 0:
                rotated = frame.rotation % 360 != 0
                shape = (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
                start = frame.time
            end = frame.time
            if with_decord:
                samples.add(count, frame)
            count += 1
            if with_hash:
                digest.update(np.ascontiguousarray(frame.to_ndarray(format="rgb24")).data)
        samples.finish(count)
    if count == 0:
        raise ValueError(f"no frame decodes ({damage[0] if damage else 'the stream is empty'})")
    if not rate and count > 1 and start is not None and end is not None and end > start:
        rate = (count - 1) / (end - start)
    decord_frames, decord_exact = None, False
    if with_decord:
        with contextlib.suppress(Exception):  # decord raises a type of its own; a file that it cannot open is PyAV's
            reader = open_decord(path)
            decord_frames = len(reader)
            whole = decord_frames == count and not damage and not rotated
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
    with contextlib.closing(open_pyav(path)) as container:
        damage: list[str] = []
        for index, frame in enumerate(decoded(container, damage)):
            if index in wanted:
                pixels = frame.to_ndarray(format="rgb24")
                frames[index] = np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels
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
    with contextlib.closing(open_pyav(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        for frame in decoded(container, damage):
            pixels = frame.to_ndarray(format="rgb24")
            frames.append(np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels)
            if len(frames) * pixels.nbytes > CLIP_BYTES:
                raise ValueError(f"its frames take more than {CLIP_BYTES / 1e9:.0f} GB; a clip is a few seconds long")
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


def main() -> None:
    # Whatever a decoder prints must not mix with the answers.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "alarm"):  # if the parent dies first, a hanging decoder still ends
            signal.alarm(int(request["timeout"]) + 10)
        try:
            header, payload = answer(request)
        except Exception as error:  # any failure of a decoder is an answer
            header, payload = {"error": first_line(error)}, b""
        out.write(json.dumps({**header, "bytes": len(payload)}).encode() + b"\n")
        out.write(payload)
        out.flush()
        if hasattr(signal, "alarm"):
            signal.alarm(0)


if __name__ == "__main__":
    main()
