"""Progress lines: the count of the whole run, its speed and what is left; nothing where nothing was done."""

import pytest

from dcbench import progress
from dcbench.progress import duration, track


class Clock:
    """Each item takes `step` seconds."""

    def __init__(self, step: float):
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        return self.now

    def items(self, count: int):
        for n in range(count):
            self.now += self.step
            yield n


def lines(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, step: float, count: int, *args, **more):
    clock = Clock(step)
    monkeypatch.setattr(progress, "time", clock)
    assert list(track(clock.items(count), *args, **more)) == list(range(count))
    return capsys.readouterr().err.splitlines()


def test_lines_tell_what_is_left(capsys, monkeypatch):
    shown = lines(capsys, monkeypatch, 10, 6, 6, "generating")
    assert shown == [
        "generating: 2/6 (10 s each, 40 s left)",
        "generating: 4/6 (10 s each, 20 s left)",
        "generating: 6/6 (10 s each)",
    ]
    assert lines(capsys, monkeypatch, 0.25, 61, 4000, "x", 3000)[0] == "x: 3060/4000 (4.0/s, 4 min left)"


def test_a_loop_that_had_nothing_to_do_prints_nothing(capsys, monkeypatch):
    assert lines(capsys, monkeypatch, 1e-5, 9, 9, "scoring") == []
    assert lines(capsys, monkeypatch, 60, 0, 0, "scoring") == []
    assert lines(capsys, monkeypatch, 0.2, 2, 2, "scoring") == ["scoring: 2/2 (5.0/s)"]


def test_one_of_several_processes_shows_the_whole_run(capsys, monkeypatch):
    """Process 0 of 2 makes 8 of the 15 clips that are missing of 20."""
    shown = lines(capsys, monkeypatch, 10, 8, 8 + 5, "generating", 5, whole=20)
    assert shown[0] == "generating, all processes, about: 9/20 (5.3 s each, 60 s left)"
    assert shown[-1] == "generating, all processes, about: 20/20 (5.3 s each)"


def test_a_name_moves_no_cursor(capsys, monkeypatch):
    assert lines(capsys, monkeypatch, 2, 1, 1, "a\x1b[2J\nb") == ["a�[2J b: 1/1 (2.0 s each)"]


def test_on_a_terminal_a_name_is_no_markup(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(track(range(3), 3, "[red]a[/red]", whole=6)) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "[red]a[/red], all processes, about" in shown and "6/6" in shown


def test_durations():
    assert [duration(s) for s in (0.31, 9.96, 99, 100, 5999, 11000)] == [
        "0.3 s", "10 s", "99 s", "2 min", "1 h 40 min", "3 h 03 min"
    ]  # fmt: skip
