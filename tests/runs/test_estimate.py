"""What a run will cost: from clips that it has, or that are made first."""

import pytest
from small_runs import plan
from typer.testing import CliRunner

from dcbench.cli.app import app
from dcbench.errors import UserError
from dcbench.runs.estimate import Estimate, estimate, lines
from dcbench.runs.run import Options

QUIET = Options(device="cpu", quiet=True)


def test_before_the_first_clip_nothing_is_measured(tmp_path):
    found = estimate(plan(tmp_path / "run", limit=5), QUIET, ["motion"])
    assert (found.clips, found.missing, found.seconds_each, found.seconds) == (5, 5, None, None)
    assert found.bytes_each == 16 * 32 * 32 * 3 / 2
    assert "not known: --calibrate 2" in "\n".join(lines(found, "a processor"))


def test_clips_that_are_made_to_measure_are_the_first_of_the_run(tmp_path):
    run = plan(tmp_path / "run", limit=5)
    found = estimate(run, QUIET, ["motion"], calibrate=2)
    assert [case.id for case in run.missing()] == [case.id for case in run.cases[2:]]
    rows = run.directory.finished_samples()
    seconds = sorted(row["seconds"] for row in rows.values())
    assert found.seconds_each == pytest.approx(sum(seconds) / 2)
    assert found.bytes_each == sum(run.directory.clip(name).stat().st_size for name in rows) / 2
    assert found.sampling == pytest.approx(3 * sum(seconds) / 2)
    assert found.start is not None
    assert found.score_each is not None
    assert found.seconds == pytest.approx(found.start + 3 * sum(seconds) / 2 + 5 * found.score_each)
    again = estimate(run, QUIET, ["motion"])  # from the clips that are there
    assert (again.missing, again.seconds_each) == (3, found.seconds_each)


def test_clips_of_another_machine_are_no_measure_of_this_one(tmp_path):
    run = plan(tmp_path / "run", limit=5)
    estimate(run, QUIET, ["motion"], calibrate=2)
    run.directory.samples.write_text(run.directory.samples.read_text().replace('"hardware":"', '"hardware":"other '))
    assert estimate(plan(tmp_path / "run", limit=5), QUIET, ["motion"]).seconds_each is None


def test_missing_weights_are_named_with_their_size(tmp_path, monkeypatch):
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path / "none"))
    found = estimate(plan(tmp_path / "run", limit=5), QUIET, ["clip_text"])
    assert found.downloads["ViT-B-32.pt"] > 3e8
    assert "missing      ViT-B-32.pt, 354.0 MB" in lines(found, "a processor")


def test_the_numbers_in_words():
    known = Estimate(2048, 2000, 50.0, 4, 30.0, 0.25, 1e6, True, 500_000_000_000, 6e9)
    assert known.seconds == 30 + 25000 + 512
    said = lines(known, "a card")
    assert said[0] == "to make      2000 of 2048 clips, 50.00 s a clip in each of 4 processes"
    assert said[1] == "time         7 h 06 min on a card: start 30 s, clips 6 h 57 min, scoring 9 min"


def test_a_dry_run_of_a_grid_ends_with_its_sum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["run", "--model", "still", "--model", "zoom", "--dataset", "shapes", "--limit", "3", "--device", "cpu"]
    said = CliRunner().invoke(app, [*command, "--metrics", "motion", "--dry-run"])
    assert "in all       6 clips to make, time not known: --calibrate 2" in said.output
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="--calibrate belongs to --dry-run"):
        CliRunner().invoke(app, [*command, "--calibrate", "2"], catch_exceptions=False)
