"""Reading video files: exact frames, decoders that hang or crash, damaged files."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numbered_clips import noise, numbered, numbers

from dcbench import video, video_processes
from dcbench.errors import UserError
from dcbench.video import VideoError, VideoFile, in_order, probe, read, read_frames

CLIPS = Path(__file__).parents[2] / "shared" / "clips"
real_clips = pytest.mark.skipif(
    not CLIPS.is_dir(), reason="the real clips are not committed; they lie beside a checkout"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    made = {suffix: folder / f"numbered.{suffix}" for suffix in ("mp4", "avi", "webm", "mkv")}
    for path in made.values():
        video.write_preview(path, numbered(), 25)
    return made


HANG = "ctypes.PyDLL(None).sleep(600)"  # PyDLL keeps the interpreter lock, as decord's hang does


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in found.read_text().split()] if found.exists() else []


# --- exact frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["mp4", "avi", "webm", "mkv"])
@pytest.mark.parametrize("decoder", ["auto", "decord", "pyav"])
def test_every_index_gives_its_own_frame(files, suffix, decoder):
    for indices in ([0], [39], list(range(40)), [7, 3, 3, 38, 0], list(range(2, 40, 3))):
        frames, used = read_frames(files[suffix], indices, decoder)
        assert frames.dtype == torch.uint8 and frames.shape == (len(indices), 3, 48, 64)
        assert numbers(frames) == indices
        assert used in ("decord", "pyav") and (decoder == "auto" or used == decoder)


def test_probe_counts_frames_and_reads_the_rate(files):
    info = probe(files["mp4"])
    assert (info.num_frames, info.height, info.width, info.decoder) == (40, 48, 64, "decord")
    assert probe(files["mkv"]).decoder == "pyav"  # decord passes over FFV1's checksums
    assert info.fps == pytest.approx(25)
    assert probe(files["mp4"], "pyav").decoder == "pyav"


def test_trap_02_strided_indices_give_strided_frames(files):
    assert numbers(VideoFile(files["avi"]).read(range(1, 31, 3))) == list(range(1, 31, 3))


@pytest.mark.parametrize("suffix", ["mp4", "avi", "webm", "mkv"])
def test_trap_06_both_decoders_give_the_same_pixels(files, suffix):
    both = [read_frames(files[suffix], range(40), name)[0].int() for name in ("decord", "pyav")]
    assert int((both[0] - both[1]).abs().max()) <= 2


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("avi", "mpeg4", {"bf": "2", "g": "12"}),
        ("mp4", "mpeg4", {"bf": "2", "g": "12"}),
        ("mp4", "libx264", {"bf": "3", "g": "10", "x264-params": "open-gop=1"}),
        ("avi", "libx264", {"bf": "0", "g": "12"}),
        ("mp4", "libx264", {"bf": "3", "g": "12"}),
    ],
)
def test_frames_are_exact_where_decord_loses_count(tmp_path, container, codec, options):
    """Reading a part in the middle makes decord seek; in most of these files it then gives other frames."""
    import av

    path = tmp_path / f"file.{container}"
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=25, options={"b": "4M", **options})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for pixels in numbered(40).permute(0, 2, 3, 1).contiguous().numpy():
            output.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")))
        output.mux(stream.encode(None))
    assert probe(path).num_frames == 40
    for start in (0, 3, 11, 12, 13, 17, 20, 25, 30, 37):
        assert numbers(VideoFile(path).read([start, start + 2])) == [start, start + 2]
    closed = codec == "libx264" and options["bf"] == "3" and "x264-params" not in options
    assert probe(path).decoder == ("decord" if closed else "pyav")
    if not closed:
        with pytest.raises(VideoError, match="decord does not give this file's frames under their numbers"):
            read_frames(path, [20], "decord")


def test_trap_06_no_duplicate_last_frame(files, tmp_path):
    """A file whose index lists one packet more than decodes: decord invents a frame for it, dcbench does not."""
    import av

    path = tmp_path / "divx.avi"
    with av.open(str(files["avi"])) as source, av.open(str(path), "w", format="avi") as copy:
        stream = copy.add_stream_from_template(source.streams.video[0])
        last = 0
        for packet in source.demux(video=0):
            if packet.size:
                last = packet.dts or last
                packet.stream = stream
                copy.mux(packet)
        empty = av.Packet(b"\x7f")  # the placeholder that DivX encoders leave at the end
        empty.dts = empty.pts = last + 1
        assert stream.time_base is not None
        empty.time_base, empty.stream = stream.time_base, stream
        copy.mux(empty)
    facts = video.examine(path)
    assert (facts.frames, facts.declared, facts.decord_frames) == (40, 41, 41)
    info = probe(path)
    assert (info.num_frames, info.decoder) == (40, "pyav")
    assert numbers(VideoFile(path).read(range(40))) == list(range(40))
    with pytest.raises(VideoError, match="frame 40 was asked for, but only frames 0-39 decode"):
        VideoFile(path).read([40])


@real_clips
def test_trap_06_no_duplicate_last_frame_in_a_real_divx_file():
    (path,) = (CLIPS / "other").glob("hmdb51*.avi")
    facts = video.examine(path)
    assert (facts.frames, facts.decord_frames) == (83, 84)
    frames, used = read_frames(path, [80, 81, 82])
    assert used == "pyav" and not torch.equal(frames[1], frames[2])


@real_clips
def test_real_clips_read_alike_by_both_decoders():
    for path in sorted((CLIPS / "UCF-101").glob("*/*.avi"))[:3]:
        assert probe(path).decoder == "decord" and probe(path).num_frames == 250
        both = [read_frames(path, [0, 100, 249, 46], name)[0].int() for name in ("decord", "pyav")]
        assert int((both[0] - both[1]).abs().max()) <= 2


def test_variable_frame_rate_is_read_by_index(tmp_path):
    import av

    path = tmp_path / "vfr.mkv"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "bgr0"
        times = np.cumsum([40, 40, 200, 40, 500, 40, 40, 40, 300, 40])
        for at, pixels in zip(times, numbered(10).permute(0, 2, 3, 1).numpy(), strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(format="bgr0")
            frame.pts = int(at) // 40
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    assert numbers(VideoFile(path).read(range(10))) == list(range(10))


def test_rotated_video_is_turned_upright(files, tmp_path):
    """Telephones store a quarter turn in the track header; decord and plain PyAV ignore it or not."""
    data = bytearray(files["mp4"].read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30)  # 90 degrees clockwise
    path = tmp_path / "rotated.mp4"
    path.write_bytes(data)
    info = probe(path)
    assert (info.height, info.width, info.decoder) == (64, 48, "pyav")
    upright = torch.rot90(read_frames(files["mp4"], [5], "pyav")[0], -1, (2, 3))
    assert torch.equal(VideoFile(path).read([5]), upright)


# --- damaged files ----------------------------------------------------------------------------------------------------


def test_truncated_avi_holds_the_frames_before_the_cut(files, tmp_path):
    """decord pads such a file in silence."""
    path = tmp_path / "cut.avi"
    path.write_bytes(files["avi"].read_bytes()[: int(files["avi"].stat().st_size * 0.6)])
    facts = video.examine(path)
    assert 2 < facts.frames < 40 == facts.declared
    info = probe(path)
    assert (info.num_frames, info.decoder) == (facts.frames, "pyav")
    assert numbers(VideoFile(path).read(range(info.num_frames))) == list(range(info.num_frames))
    with pytest.raises(VideoError, match=r"cut\.avi: frame 39 was asked for"):
        VideoFile(path).read([39])


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "avi", "webm"])
def test_a_video_ends_where_damage_begins(files, tmp_path, suffix):
    """No frame after damage is given out under a wrong number, and nothing crashes."""
    data = bytearray(files[suffix].read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 300):
        data[at] ^= 0x5A
    path = tmp_path / f"damaged.{suffix}"
    path.write_bytes(data)
    facts = video.examine(path)
    assert 0 < facts.frames <= 40
    read = VideoFile(path).read(range(facts.frames))
    if suffix == "avi":  # the container skips to its next whole chunk; the header tells what is missing
        assert facts.frames < facts.declared
    if suffix == "mkv":  # FFV1 has checksums
        assert facts.frames < 40 and facts.damage[0].startswith(f"after {facts.frames} frames: ")
        assert torch.equal(read, numbered()[: facts.frames])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.mp4", b"", "the file is empty"),
        ("text.mp4", b"not a video at all\n" * 50, "Invalid data"),
        ("cut.mp4", None, "Invalid data"),
        ("missing.mp4", "missing", "No such file"),
        ("folder.mp4", "folder", "Is a directory"),
    ],
)
def test_unreadable_files_are_named_with_the_reason(files, tmp_path, name, content, reason):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is None:  # without its index, which faststart puts first, an MP4 holds nothing
        data = files["mp4"].read_bytes()
        path.write_bytes(data[: data.index(b"moov")])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    with pytest.raises(VideoError, match=reason) as caught:
        VideoFile(path).read([0])
    assert str(caught.value).startswith(f"{path}: ") and "Errno" not in str(caught.value)


def test_sound_only_file_is_no_video(tmp_path):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        output.mux(stream.encode(frame))  # type: ignore[arg-type]
        output.mux(stream.encode(None))  # type: ignore[arg-type]
    with pytest.raises(VideoError, match="no video stream"):
        probe(path)


def test_a_damaged_clip_file_is_an_error_not_a_shorter_clip(tmp_path):
    path = tmp_path / "clip.mkv"
    video.write_lossless(path, noise(8, 64, 64), 8)
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 1  # one bit
    path.write_bytes(data)
    with pytest.raises(VideoError, match=r"clip\.mkv: the clip is damaged \(after 5 frames: a wrong checksum\)"):
        video.read_clip(path)
    assert probe(path).num_frames == 5


def test_an_unchanged_file_is_examined_once_a_changed_one_again(files, tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(files["mp4"].read_bytes())
    assert probe(path).num_frames == 40
    asked = []
    real = video.ask
    monkeypatch.setattr(video, "ask", lambda *given: asked.append(given) or real(*given))
    assert probe(path).num_frames == 40 and not asked
    monkeypatch.setattr(video, "_facts", video._FactsStore())  # as another process finds it
    assert probe(path).num_frames == 40 and not asked
    video.write_mp4(path, numbered(12), 25)
    assert probe(path).num_frames == 12 and len(asked) == 1


# --- decoders that hang or crash --------------------------------------------------------------------------------------


def test_hanging_decord_is_killed_and_pyav_reads(files, worker):
    worker(f"worker.READERS['decord'] = lambda path, indices: {HANG}")
    begin = time.monotonic()
    frames, used = read_frames(files["mp4"], [3, 9])
    assert used == "pyav" and numbers(frames) == [3, 9]
    assert time.monotonic() - begin < 20
    assert read_frames(files["mp4"], [4])[1] == "pyav"


def test_decord_that_hangs_while_opening_is_left_out(files, worker, tmp_path):
    path = tmp_path / "fresh.mp4"
    path.write_bytes(files["mp4"].read_bytes())
    worker(f"worker.open_decord = lambda path: {HANG}")
    assert probe(path).decoder == "pyav"


def test_both_decoders_hang_names_file_and_reason(files, worker):
    probe(files["mp4"])
    worker(f"worker.READERS.update(decord=lambda path, indices: {HANG}, pyav=lambda path, indices: {HANG})")
    with pytest.raises(
        VideoError, match=r"numbered\.mp4: cannot be read \(decord: no frame for 1 s; pyav: no frame for 1 s"
    ):
        read_frames(files["mp4"], [3])


def test_a_decoder_asked_for_by_name_never_falls_back(files, worker):
    worker(f"worker.READERS['decord'] = lambda path, indices: {HANG}")
    with pytest.raises(VideoError, match="decord: no frame for 1 s"):
        read_frames(files["mp4"], [3], "decord")


def test_crashing_decoder(files, worker):
    worker("worker.READERS['decord'] = lambda path, indices: ctypes.string_at(0)")
    assert read_frames(files["mp4"], [3])[1] == "pyav"
    with pytest.raises(VideoError, match="the decoder crashed \\(SIGSEGV\\)"):
        read_frames(files["mp4"], [3], "decord")


def test_a_process_that_cannot_start_says_so(files, worker):
    worker("raise SystemExit(3)")
    with pytest.raises(UserError, match=r"does not start \(the decoding process ended with exit code 3\).*import av"):
        read_frames(files["mp4"], [3])


def test_decoder_that_prints_does_not_spoil_its_answer(files, worker):
    worker(
        "real = worker.READERS['decord']\n"
        "def talk(path, indices):\n"
        "    os.write(1, b'hello from C\\n'); print('hello')\n"
        "    return real(path, indices)\n"
        "worker.READERS['decord'] = talk"
    )
    frames, used = read_frames(files["mp4"], [3])
    assert used == "decord" and numbers(frames) == [3]


def test_worker_killed_between_requests_is_replaced(files):
    read_frames(files["mp4"], [0])
    idle = video_processes.pool.idle[-1].process
    idle.kill()
    time.sleep(0.1)
    assert numbers(read_frames(files["mp4"], [6])[0]) == [6]


def test_worker_imports_no_torch(files):
    request = json.dumps({"op": "read", "decoder": "decord", "path": str(files["mp4"]), "indices": [0], "timeout": 9})
    command = [sys.executable, "-X", "importtime", "-P", str(video_processes.WORKER)]
    done = subprocess.run(command, input=request.encode() + b"\n", capture_output=True, timeout=60)
    names = {line.split("|")[-1].strip() for line in done.stderr.decode().splitlines() if "|" in line}
    assert "decord" in names and not any(name.split(".")[0] in ("torch", "dcbench") for name in names)


# --- many videos ------------------------------------------------------------------------------------------------------


def read_in_order(jobs, workers=1, ahead=None):
    return in_order(lambda job: read(*job), jobs, workers, ahead)


@pytest.mark.parametrize("workers", [1, 2])
def test_in_order_keeps_order_and_passes_over_bad_files(files, tmp_path, workers):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing")
    jobs = [(VideoFile(files["mp4"]), [i]) if i % 5 else (VideoFile(bad), [0]) for i in range(20)]
    results = list(read_in_order(jobs, workers))
    assert len(results) == 20
    for i, result in enumerate(results):
        if i % 5:
            assert not isinstance(result, UserError) and numbers(result.frames) == [i] and result.decoder == "decord"
        else:
            assert isinstance(result, VideoError) and "bad.mp4" in str(result)


def test_trap_11_no_other_video_takes_a_broken_ones_place(files, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing")
    first, second = read_in_order([(VideoFile(bad), [0]), (VideoFile(files["mp4"]), [11])])
    assert isinstance(first, VideoError)
    assert not isinstance(second, UserError) and numbers(second.frames) == [11]


def test_trap_12_only_a_few_clips_are_read_ahead(files):
    asked = []

    def jobs():
        for i in range(30):
            asked.append(i)
            yield VideoFile(files["mp4"]), [i]

    results = read_in_order(jobs(), workers=1, ahead=3)
    next(results)
    time.sleep(0.3)
    assert asked == [0, 1, 2]
    results.close()  # type: ignore[attr-defined]


def test_workers_take_one_thread_each_and_leave_the_callers_alone():
    """A second OpenMP pool makes the caller's network two and a half times slower (benchmarks/waiting.py)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = in_order(lambda _: torch.get_num_threads(), range(4), workers=2)
        assert next(results) == 1 and torch.get_num_threads() == 2
        assert list(results) == [1, 1, 1] and torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(threads)


def test_in_order_decodes_while_the_caller_computes(files):
    jobs = [(VideoFile(files["avi"]), None) for _ in range(3)]
    results = read_in_order(jobs, ahead=3)
    next(results)
    time.sleep(1)
    begin = time.monotonic()
    assert len(list(results)) == 2
    assert time.monotonic() - begin < 0.5


def test_forked_process_starts_its_own_workers(files):
    read_frames(files["mp4"], [0])
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom dcbench.video import read_frames\n"
        "path = Path(sys.argv[1])\nread_frames(path, [0])\npid = os.fork()\n"
        "frames = [read_frames(path, [i])[0] for i in range(5)]\n"
        "if pid == 0:\n    from dcbench import video_processes\n    video_processes.pool.close(); os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), len(frames))"
    )
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", code, str(files["mp4"])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "5"] and done.stderr == "", done.stderr


@pytest.mark.parametrize("ending", ["interrupt", "kill"])
def test_no_process_outlives_its_parent(files, ending):
    code = (  # a shell's background jobs inherit that SIGINT is ignored; a hang ends with the stacks of all threads
        "import faulthandler, signal, sys\nfrom pathlib import Path\n"
        "from dcbench.video import VideoFile, in_order, read\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "faulthandler.dump_traceback_later(60, exit=True)\n"
        "for result in in_order(read, (VideoFile(Path(sys.argv[1])) for _ in range(10**6)), workers=2):\n"
        "    print('one', flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "always::ResourceWarning", "-c", code, str(files["avi"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "one\n"
    workers = children(process.pid)
    if ending == "interrupt":
        os.killpg(process.pid, signal.SIGINT)
    elif ending == "kill":
        process.kill()
    _, errors = process.communicate(timeout=90)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    if ending == "interrupt":
        assert errors.rstrip().endswith("KeyboardInterrupt") and "Warning" not in errors
