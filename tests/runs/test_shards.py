"""Several processes make the clips of one run: shards, joining, killed processes. The bytes are those of one."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import kept, plan, world

from dcbench.errors import UserError
from dcbench.files import canonical, read_jsonl
from dcbench.members import Member
from dcbench.runs import sampling, status
from dcbench.runs.making import Maker
from dcbench.runs.run import Options
from dcbench.runs.sampling import sample
from dcbench.runs.scoring import score

QUIET = Options(device="cpu", quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "run"
    run = plan(out, limit=8)
    assert sample(run, QUIET)
    score(run, QUIET, ["motion"])
    return kept(out)


def test_shards_one_after_the_other_give_the_bytes_of_one_process(tmp_path, whole):
    out = tmp_path / "run"
    ready = [sample(plan(out, limit=8), replace(QUIET, shard=(number, 3))) for number in (3, 1, 2)]
    assert ready == [False, False, True]  # the last one is to score
    assert len(list(out.glob("samples-*.jsonl"))) == 3
    score(plan(out, limit=8), replace(QUIET, shard=(2, 3)), ["motion"])
    assert kept(out) == whole
    assert [path.name for path in out.glob("samples*")] == ["samples.jsonl"]
    assert not list((out / ".members").glob("*.*"))


def test_other_shards_another_day(tmp_path, whole):
    out = tmp_path / "run"
    assert not sample(plan(out, limit=8), replace(QUIET, shard=(1, 3)))
    assert not sample(plan(out, limit=8), replace(QUIET, shard=(2, 2)))
    assert sample(plan(out, limit=8), replace(QUIET, join=True))
    score(plan(out, limit=8), QUIET, ["motion"])
    assert kept(out) == whole
    assert len(read_jsonl(out / "samples.jsonl")) == 8


def test_a_process_alone_continues_what_shards_began_and_refuses_to_run_beside_them(tmp_path, whole):
    out = tmp_path / "run"
    sample(plan(out, limit=8), replace(QUIET, shard=(2, 3)))
    run = plan(out, limit=8)
    with (
        run.directory.shared("making clips"),
        pytest.raises(UserError, match=r"in use by process \d+ on .*, which is making clips"),
    ):
        sample(run, QUIET)
    with (
        run.directory.locked("scoring"),
        pytest.raises(UserError, match=r"in use by process \d+ on .*, which is scoring"),
    ):
        sample(run, replace(QUIET, join=True))
    sample(run, QUIET)
    score(run, QUIET, ["motion"])
    assert kept(out) == whole


def test_a_clip_that_another_process_is_making_is_left_to_it(tmp_path):
    run = plan(tmp_path / "run", limit=8)
    with run.directory.shared() as other:
        assert other.claim(run.cases[0].id)
        assert not sample(run, replace(QUIET, shard=(1, 1)))
        assert [case.id for case in run.missing()] == [run.cases[0].id]
    assert sample(run, replace(QUIET, shard=(1, 1)))  # it has left: the clip is free again


def test_a_process_that_only_waits_loads_no_model(tmp_path, monkeypatch):
    """The last clip is being made by another process, which ends without it: the model is loaded once, to take over."""
    run, loaded = plan(tmp_path / "run", limit=1), []
    monkeypatch.setattr(sampling, "WAIT", 0.05)
    monkeypatch.setattr(sampling, "Maker", lambda *arguments: loaded.append(1) or Maker(*arguments))
    other = Member(run.directory.members)
    other.enter("shared")
    assert other.claim(run.cases[0].id)
    seen: list[int] = []
    timer = threading.Timer(0.6, lambda: (seen.append(len(loaded)), other.leave()))
    timer.start()
    assert sample(run, replace(QUIET, join=True))
    assert (seen, loaded, run.missing()) == ([0], [1], [])


def test_a_torn_line_of_a_killed_shard_is_made_again(tmp_path, whole):
    out = tmp_path / "run"
    for number in (1, 2):
        sample(plan(out, limit=8), replace(QUIET, shard=(number, 2)))
    log = sorted(out.glob("samples-*.jsonl"))[0]
    log.write_bytes(log.read_bytes()[:-30])
    assert len(plan(out, limit=8).missing()) == 1
    assert sample(plan(out, limit=8), replace(QUIET, join=True))
    score(plan(out, limit=8), QUIET, ["motion"])
    assert kept(out) == whole


def test_a_log_that_grows_is_read_from_where_it_was(tmp_path):
    run = plan(tmp_path / "run", limit=8)
    sample(run, QUIET)
    directory, lines = run.directory, read_jsonl(run.directory.samples)
    before = directory.finished_samples()
    directory.append_sample(lines[0] | {"seconds": 77.0}, "late")
    with directory.samples.open("ab") as file:
        file.write(canonical(lines[1] | {"seconds": 88.0}).encode()[:40])
    assert directory.finished_samples()[lines[0]["id"]]["seconds"] == 77.0
    with directory.samples.open("ab") as file:
        file.write(canonical(lines[1] | {"seconds": 88.0}).encode()[40:] + b"\n")
    assert directory.finished_samples()[lines[1]["id"]]["seconds"] == 88.0
    assert set(directory.finished_samples()) == set(before)


def test_how_far_a_run_is(tmp_path):
    out = tmp_path / "run"
    run = plan(out, limit=8)
    sample(run, replace(QUIET, shard=(1, 2)))
    with run.directory.shared("making clips") as member:
        found = status.status(out)
        assert (found.planned, found.finished, found.is_scored) == (8, 4, False)
        assert list(found.missing) == [case.id for case in run.cases[1::2]]
        made = {process.now: process.finished for process in found.processes}
        assert made == {"": 4, "making clips": 0}
        said = "\n".join(status.lines(found))
        assert "4 of 8 clips are finished" in said
        assert f"{member.name}: 0 clips; making clips" in said
    sample(run, QUIET)
    assert "not scored yet" in "\n".join(status.lines(status.status(out)))
    score(run, QUIET, ["motion"])
    assert status.lines(status.status(out))[1] == "scored"
    with pytest.raises(UserError, match="not a run directory"):
        status.status(tmp_path)


SHARDS = {
    "3/16": (3, 16),
    "1/1": (1, 1),
    "slurm": (3, 4),
    "0/4": None,
    "5/4": None,
    "4": None,
    "-1/4": None,
    "a/b": None,
    "1/4/2": None,
}


@pytest.mark.parametrize("text", SHARDS)
def test_the_option(text, monkeypatch):
    from dcbench.cli.options import run_options

    for name, value in {"ID": "14", "MIN": "10", "COUNT": "4", "STEP": "2"}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)
    if SHARDS[text] is None:
        with pytest.raises(UserError, match="expected a part and the number of parts"):
            run_options("cpu", None, 1, False, text)
    else:
        assert run_options("cpu", None, 1, False, text).shard == SHARDS[text]


def test_slurm_without_an_array_and_both_options(monkeypatch):
    from dcbench.cli.options import run_options

    monkeypatch.delenv("SLURM_ARRAY_TASK_ID", raising=False)
    with pytest.raises(UserError, match="start the job as an array"):
        run_options("cpu", None, 1, False, "slurm")
    with pytest.raises(UserError, match="give one of the two"):
        run_options("cpu", None, 1, False, "1/2", True)


def start(folder: Path, *arguments: str, slow: float = 0.0) -> subprocess.Popen[bytes]:
    command = ["run", "--model", "model.py:Slow", "--dataset", "shapes", "--limit", "12", "--metrics", "motion"]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dcbench", *command, "--protocol", "small.toml", "--device", "cpu", *arguments],
            cwd=folder,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "SLOW": str(slow)},
        )


@pytest.mark.slow
def test_three_shards_one_killed_then_two(tmp_path):
    world(tmp_path)
    assert start(tmp_path, "--out", "one").wait() == 0, (tmp_path / "log").read_text()
    (tmp_path / "made").unlink()
    running = [start(tmp_path, "--out", "several", "--shard", f"{number}/3", slow=1.0) for number in (1, 2, 3)]
    until = time.monotonic() + 200
    while time.monotonic() < until and len(list((tmp_path / "several").glob("clips/*.mkv"))) < 4:
        time.sleep(0.1)
    running[0].send_signal(signal.SIGKILL)
    assert [process.wait() for process in running] == [-9, 0, 0], (tmp_path / "log").read_text()
    assert not (tmp_path / "several" / "record.json").exists()
    again = [start(tmp_path, "--out", "several", "--shard", f"{number}/2") for number in (1, 2)]
    assert [process.wait() for process in again] == [0, 0], (tmp_path / "log").read_text()
    assert kept(tmp_path / "several") == kept(tmp_path / "one")
    made = (tmp_path / "made").read_text().split()
    assert len(made) <= len(set(made)) + 1  # the killed process may have been making one
    assert b"Traceback" not in (tmp_path / "log").read_bytes()


@pytest.mark.slow
def test_sixteen_shards_twenty_times(tmp_path):
    """No line is lost or written twice. Each shard is a process."""
    program = f"""
    import multiprocessing, sys
    from dataclasses import replace
    from pathlib import Path
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import test_shards as t

    def work(out, number):
        t.sample(t.plan(out, limit=40), replace(t.QUIET, shard=(number, 16)))

    for turn in range(20):
        out = Path(str(turn))
        several = [multiprocessing.get_context("fork").Process(target=work, args=(out, n)) for n in range(1, 17)]
        for process in several:
            process.start()
        for process in several:
            process.join()
            assert process.exitcode == 0
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for turn in range(20):
        rows = [row["id"] for path in (tmp_path / str(turn)).glob("samples*.jsonl") for row in read_jsonl(path)]
        clips = sorted(path.stem for path in (tmp_path / str(turn) / "clips").iterdir())
        assert sorted(rows) == clips
        assert len(clips) == 40
