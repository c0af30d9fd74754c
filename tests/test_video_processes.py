"""Decoders are bound by progress, not by the clock; a killed decoder costs no clip in silence."""

import json
import os
import time
from pathlib import Path

import pytest
from numbered_clips import numbered, numbers

from dcbench import video, video_processes
from dcbench.catalogue import find_dataset, find_model
from dcbench.datasets.folder import Folder
from dcbench.datasets.verify import verify
from dcbench.errors import UserError
from dcbench.protocol import Protocol, find_protocol
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.folders import score_folders
from dcbench.runs.run import Options
from dcbench.video import VideoError, probe, read_clip, read_frames
from dcbench.video_processes import PassingError

QUIET = Options(device="cpu", quiet=True)
HANG = "ctypes.PyDLL(None).sleep(600)"  # PyDLL keeps the interpreter lock, as decord's hang does
KILLED = "os.kill(os.getpid(), 9)"  # what Linux does when memory runs out
SLOW_FRAMES = """
real = worker.decoded
def slow(source, damage):
    for frame in real(source, damage):
        time.sleep(0.25)
        yield frame
worker.decoded = slow
"""


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    video.write_mp4(path, numbered(12), 25)
    return path


def once(function: str, flag: Path, what: str = KILLED) -> str:
    """A patch of the worker: `what` happens in a function's first call, in whichever process."""
    return (
        f"real = worker.{function}\n"
        "def first(*given):\n"
        f"    if not os.path.exists({str(flag)!r}):\n"
        f"        open({str(flag)!r}, 'w').close(); {what}\n"
        "    return real(*given)\n"
        f"worker.{function} = first"
    )


# --- progress ---------------------------------------------------------------------------------------------------------


def test_a_file_may_take_as_long_as_its_frames_come(clip, worker):
    """Three seconds for twelve frames, where a decoder may be silent for one second."""
    worker(SLOW_FRAMES)
    assert len(read_clip(clip)[0]) == 12


def test_a_decoder_that_hardly_gets_a_processor_is_not_stuck(clip, worker):
    """It says nothing for two seconds, but works, a fifth of the time: as on a busy machine."""
    worker(
        "real = worker.read_clip\n"
        "def starved(path):\n"
        "    begin = time.monotonic()\n"
        "    while time.monotonic() < begin + 2:\n"
        "        until = time.process_time() + 0.02\n"
        "        while time.process_time() < until: pass\n"
        "        time.sleep(0.08)\n"
        "    return real(path)\n"
        "worker.read_clip = starved"
    )
    assert len(read_clip(clip)[0]) == 12


def test_a_decoder_that_works_without_end_is_ended(clip, worker):
    worker("def spin(path):\n    while True: pass\nworker.read_clip = spin")
    with pytest.raises(PassingError, match=r"clip\.mp4: no frame for 1 s"):
        read_clip(clip)


def test_a_verdict_on_decord_that_may_pass_is_not_kept(clip, worker, monkeypatch):
    worker(f"worker.open_decord = lambda path: {HANG}")
    assert probe(clip).decoder == "pyav" and probe(clip).decoder == "pyav"
    worker("")
    assert probe(clip).decoder == "pyav"  # one process does not change its mind
    monkeypatch.setattr(video, "_facts", video._FactsStore())  # the next one looks again
    assert probe(clip).decoder == "decord"


# --- killed from outside ----------------------------------------------------------------------------------------------


def test_a_killed_decoder_is_asked_again(clip, worker, tmp_path):
    worker(once("read_clip", tmp_path / "flag"))
    assert len(read_clip(clip)[0]) == 12
    worker(once("read_decord", tmp_path / "other") + "\nworker.READERS['decord'] = first")
    frames, used = read_frames(clip, [3, 7])
    assert numbers(frames) == [3, 7] and used == "decord"


def test_a_decoder_that_is_killed_again_is_an_error_that_may_pass(clip, worker):
    worker(f"worker.read_clip = lambda path: {KILLED}")
    with pytest.raises(PassingError, match=r"was killed \(SIGKILL\), perhaps because memory ran out"):
        read_clip(clip)


@pytest.mark.parametrize(("what", "passes"), [("OSError(5, 'bad disk')", True), ("ValueError('bad file')", False)])
def test_a_failing_disk_may_pass_and_a_bad_file_does_not(clip, worker, what, passes):
    worker(f"def fail(path):\n    raise {what}\nworker.read_clip = fail")
    with pytest.raises(VideoError, match=r"clip\.mp4: bad") as caught:
        read_clip(clip)
    assert isinstance(caught.value, PassingError) == passes


def test_a_disk_that_fails_in_the_middle_is_no_damage_of_the_file(clip, worker):
    data = bytearray(clip.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    clip.write_bytes(data)
    worker("")
    with pytest.raises(VideoError, match="the clip is damaged"):
        read_clip(clip)
    worker("def read_through(path):\n    raise OSError(5, 'bad disk')\nworker.read_through = read_through")
    with pytest.raises(PassingError, match="bad disk"):
        read_clip(clip)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for side in ("made", "real"):
        for k, name in enumerate("abc"):
            video.write_mp4(tmp_path / side / f"{name}.mp4", numbered(17).roll(k, 0), 8)
    return tmp_path / "made", tmp_path / "real"


Pair = tuple[Path, Path]


def test_two_folders_without_a_killed_decoder_s_clip_are_not_scored(folders: Pair, worker, tmp_path, cheap_metric):
    """The same command mends it, and the record is that of a run in which nothing happened."""
    worker(f"for name in worker.READERS: worker.READERS[name] = lambda *given: {KILLED}")
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"3 clips were not scored, for a reason that may pass: clip a, .*killed"):
        score_folders(*folders, "folders", QUIET, [cheap_metric], out)
    assert not (out / "record.json").exists()
    worker("")
    score_folders(*folders, "folders", QUIET, [cheap_metric], out)
    record = json.loads((out / "record.json").read_text())
    assert (record["n_planned"], record["n_scored"], record["failures"]) == (3, 3, [])


def test_a_plan_is_not_made_without_a_killed_decoder_s_video(folders: Pair, worker, tmp_path, cheap_metric):
    worker(f"worker.examine = lambda *given: {KILLED}")
    with pytest.raises(UserError, match=r"a\.mp4: .*killed.* may pass, so nothing was planned: give the same command"):
        score_folders(*folders, "folders", QUIET, [cheap_metric], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_sampling_makes_the_other_clips_and_says_what_is_lost(folders: Pair, worker, tmp_path, cheap_metric):
    data = find_dataset("folder")
    protocol: Protocol = find_protocol("folders")
    job = planning.plan(find_model("still"), data, protocol, folders[1], tmp_path / "run", quiet=True)
    worker(
        "real = dict(worker.READERS)\n"
        "def of_b_killed(name):\n"
        f"    return lambda path, indices: {KILLED} if path.endswith('b.mp4') else real[name](path, indices)\n"
        "worker.READERS.update({name: of_b_killed(name) for name in real})"
    )
    with pytest.raises(UserError, match=r"1 clips were not generated, for a reason that may pass: clip b, .*b\.mp4"):
        sampling.sample(job, QUIET)
    assert set(job.directory.finished_samples()) == {"a", "c"}
    worker("")
    sampling.sample(job, QUIET)
    result = scoring.score(job, QUIET, [cheap_metric])
    assert (result.n_planned, result.n_scored) == (3, 3)


def test_verify_does_not_call_a_file_broken_whose_decoder_was_killed(folders: Pair, worker):
    worker(f"worker.examine = lambda *given: {KILLED}")
    found = verify(Folder(folders[0]), "all", folders[0], quiet=True)
    assert not found.ok and not found.broken and not found.unusable
    assert [entry.split(": ")[0] for entry in found.unchecked] == ["a.mp4", "b.mp4", "c.mp4"]
    assert "not checked, for a reason that may pass; try again: 3" in found.text()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux has /proc")
def test_the_watch_counts_processor_time():
    """What /proc says of this process grows with its work. Where there is no /proc, it is at rest."""
    before = video_processes._processor_seconds(os.getpid())
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    assert video_processes._processor_seconds(os.getpid()) > before > 0
    assert video_processes._processor_seconds(2**30) == 0
