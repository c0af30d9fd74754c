"""`dcbench clean`: what goes, what stays, what a cleaned run can still do, and that the same command mends it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from small_runs import kept, plan

from dcbench import cli
from dcbench.errors import UserError
from dcbench.files import read_jsonl
from dcbench.runs import planning, storage
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import sample
from dcbench.runs.scoring import score

QUIET = Options(device="cpu", quiet=True)


def make(out: Path, model: str = "zoom", metrics: tuple[str, ...] = ("motion",)) -> Run:
    run = plan(out, model)
    sample(run, QUIET)
    score(run, QUIET, metrics)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "run").directory.path


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of a scored run, with a work folder and two incomplete files."""
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "work" / "output").mkdir(parents=True)
    (out / "work" / "output" / "a.png").write_bytes(b"12345")
    (out / "clips" / ".a.mkv-abcdef-1-xxxxxxxx.mkv").write_bytes(b"123")
    (out / ".plan.json-abcdef-1-xxxxxxxx.json").write_bytes(b"12")
    return out


def command(monkeypatch, capsys, *arguments: object) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["dcbench", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out + said.err


def names(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if ".members" not in file.parts}


def test_a_dry_run_counts_and_removes_nothing(run, monkeypatch, capsys):
    before = names(run)
    clips = sum(file.stat().st_size for file in run.glob("clips/[!.]*.mkv"))
    code, said = command(monkeypatch, capsys, "clean", run, "--keep", "record", "--dry-run")
    assert code == 0
    assert "clips: 4 files" in said and "work folder: 1 files" in said and "incomplete files: 2 files" in said
    assert f"would free {(clips + 10) / 1e6:.2f} MB ({clips + 10} bytes)" in said
    assert names(run) == before


def test_the_record_stays_and_the_same_command_makes_the_clips_again(run, whole, monkeypatch, capsys):
    code, said = command(monkeypatch, capsys, "clean", run, "--keep", "record")
    assert code == 0 and "freed" in said
    gone = names(whole) - names(run)
    assert gone == {"clips", *(f"clips/{file.name}" for file in whole.glob("clips/*"))}
    assert names(run) <= names(whole)
    assert "4 clips" not in command(monkeypatch, capsys, "clean", run, "--keep", "record")[1]  # again: nothing to do
    assert "cleaned to its record: 7 files" in (run / "log.txt").read_text()
    again = plan(run)
    sample(again, QUIET)
    score(again, QUIET, ["motion"])
    assert kept(run) == kept(whole)


def test_the_clips_stay_with_keep_clips(run, whole):
    parts = storage.clean(run, "clips")
    assert [(part.name, part.size) for part in parts] == [("work folder", 5), ("incomplete files", 5)]
    assert names(run) == names(whole)


def test_what_a_cleaned_run_says(run, whole, tmp_path, monkeypatch, capsys, cheap_metric):
    other = make(tmp_path / "other", "still").directory.path
    storage.clean(run, "record")
    code, said = command(monkeypatch, capsys, "report", run, other, "--out", tmp_path / "report")
    assert code == 0 and "| Slow zoom" in said
    page = (tmp_path / "report" / "index.html").read_text()
    assert "No clips to show of Slow zoom: its clips were removed (`dcbench clean`)" in page
    assert page.count("<video") == 8  # reference and clip of the four of the other run
    code, said = command(monkeypatch, capsys, "report", "--compare", run, other, "--out", tmp_path / "compared")
    assert code == 0 and "| motion" in said, said
    code, said = command(monkeypatch, capsys, "score", run, "--metrics", "motion")
    assert code == 2 and "cannot be scored: its clips were removed" in said and "dcbench run" in said
    assert kept(run) == {name: data for name, data in kept(whole).items() if not name.startswith("clips")}
    code, said = command(monkeypatch, capsys, "doctor", "protocol", run)
    assert code == 2 and "its clips were removed" in said
    code, said = command(monkeypatch, capsys, "status", run)
    assert code == 0 and "scored; its clips were removed" in said


def test_set_metrics_are_compared_from_records_or_not_at_all(tmp_path, monkeypatch, capsys, cheap_metric):
    """With clips, a record without replicates is scored again. Without them, the reason is told."""
    paths = [make(tmp_path / model, model, (cheap_metric,)).directory.path for model in ("zoom", "still")]
    arguments = ["report", "--compare", *paths, "--metrics", cheap_metric, "--out", tmp_path / "compared"]
    storage.clean(paths[0], "record")
    code, said = command(monkeypatch, capsys, *arguments)
    assert code == 0 and "| corners |" in said, said
    for path in paths:
        record = json.loads((path / "record.json").read_text())
        assert record["scores"]["corners"].pop("replicates")
        (path / "record.json").write_text(json.dumps(record))
    code, said = command(monkeypatch, capsys, *arguments)
    assert "this needs the clips of both runs" in said and "its clips were removed" in said


def test_clips_that_are_not_scored_stay_unless_forced(whole, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "record.json").unlink()
    with pytest.raises(UserError, match=r"not scored yet. Finish it first .*--force"):
        storage.clean(run, "record")
    code, said = command(monkeypatch, capsys, "clean", whole, run, "--keep", "record")
    assert code == 2 and "not scored yet" in said
    assert len(list(whole.glob("clips/*.mkv"))) == 4  # the first one was not cleaned either
    assert storage.clean(run, "record", force=True)[0].name == "clips"
    assert not (run / "clips").exists()


def test_a_run_that_is_not_finished(tmp_path):
    run = plan(tmp_path / "run")
    sample(run, QUIET)
    score(run, QUIET, ["motion"])
    rows = run.directory.samples.read_text().splitlines(keepends=True)
    run.directory.samples.write_text("".join(rows[1:]))
    with pytest.raises(UserError, match="1 of its 4 clips are not made"):
        storage.clean(run.directory.path, "record")
    changed = rows[0].replace(read_jsonl(run.directory.samples)[0]["id"], "x")
    sha = changed.split('"sha256":"')[-1][:64]
    run.directory.samples.write_text(
        "".join([changed.replace(f'"sha256":"{sha}"', f'"sha256":"{"0" * 64}"'), *rows[1:]])
    )
    with pytest.raises(UserError, match="its record is of other clips"):
        storage.clean(run.directory.path, "record")


def test_what_is_no_run_or_is_in_use_or_leads_elsewhere(run, tmp_path):
    with pytest.raises(UserError, match="not a run directory"):
        storage.clean(tmp_path, "record")
    with planning.RunDirectory(run).shared("making clips"), pytest.raises(UserError, match="in use by process"):
        storage.clean(run, "record")
    (run / "clips").rename(tmp_path / "elsewhere")
    (run / "clips").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        storage.clean(run, "record")
    assert len(list((tmp_path / "elsewhere").glob("[!.]*.mkv"))) == 4


def test_what_to_keep_is_one_of_two_words(run, monkeypatch, capsys):
    for word, reason in (("features", "They are in the cache"), ("nothing", "expected record or clips")):
        code, said = command(monkeypatch, capsys, "clean", run, "--keep", word)
        assert code == 2 and reason in said
