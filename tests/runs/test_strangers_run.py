"""A run directory that somebody else made is data: whatever it names, no code of it is executed."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from dcbench import cli
from dcbench.catalogue import Card, find_dataset, find_model, load_entry_point
from dcbench.errors import UserError
from dcbench.protocol import find_protocol
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.run import Options

QUIET = Options(device="cpu", quiet=True)

DATASET = """
from pathlib import Path
from dcbench.catalogue import find_dataset
from dcbench.datasets.base import load_dataset
Path({mark!r}).write_text("code ran")

def load(card, root, options):
    return load_dataset(find_dataset("shapes"))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cheap_metric: str) -> Path:
    """A run of two clips."""
    out = tmp_path_factory.mktemp("stranger") / "run"
    small = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}})
    run = planning.plan(find_model("zoom"), find_dataset("shapes"), small, out=out, limit=2, quiet=True)
    sampling.sample(run, QUIET)
    scoring.score(run, QUIET, ["motion"])
    return out


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["dcbench", *arguments])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, said.out + said.err


def edit(run: Path, change) -> None:
    """Apply `change` to plan.json, and to the copy of it in record.json."""
    for name in ("plan.json", "record.json"):
        data = json.loads((run / name).read_text())
        change(data if name == "plan.json" else data["plan"])
        (run / name).write_text(json.dumps(data))


EVIL_CARDS = {
    "a file beside the plan": {"name": "mine", "entry_point": "{run}/evil.py:load"},
    "a card beside the plan": {"name": "{run}/evil.toml", "entry_point": "{run}/evil.py:load"},
    "a name of this machine": {"name": "shapes", "entry_point": "{run}/evil.py:load"},
    "the standard library": {"name": "mine", "entry_point": "os:system"},
    "a builtin": {"name": "mine", "entry_point": "builtins:eval"},
}


@pytest.mark.parametrize("kind", EVIL_CARDS)
def test_a_strangers_run_executes_nothing(kind, finished, tmp_path, monkeypatch, capsys):
    run, mark = tmp_path / "run", tmp_path / "mark"
    shutil.copytree(finished, run)
    (run / "evil.py").write_text(DATASET.format(mark=str(mark)))
    (run / "evil.toml").write_text('name = "mine"\ntitle = "M"\nsummary = "s"\nentry_point = "evil.py:load"\n')
    evil = {key: value.format(run=run) for key, value in EVIL_CARDS[kind].items()}

    def change(plan: dict) -> None:
        plan["dataset"] |= evil
        plan["model"]["entry_point"] = evil["entry_point"]

    edit(run, change)
    for name in ("record.json", "per_clip.jsonl"):  # and metrics that name files or code
        text = (run / name).read_text()
        (run / name).write_text(text.replace('"motion"', f'"{run}/evil.toml"'))
    monkeypatch.chdir(run)
    for arguments in (
        ["report", str(run), "--out", str(tmp_path / "report")],
        ["report", "--compare", str(run), str(finished), "--out", str(tmp_path / "compared")],
        ["score", str(run), "--metrics", "motion"],
        ["doctor", "protocol", str(run)],
    ):
        command(monkeypatch, capsys, *arguments)
        assert not mark.exists(), arguments
    assert not list(tmp_path.rglob("*.pyc"))


def test_the_message_says_how_to_name_ones_own_data_set(finished, tmp_path, monkeypatch, capsys):
    """A card on the command line is the user's word: it runs, and it is remembered for this run."""
    run, mark, card = tmp_path / "run", tmp_path / "mark", tmp_path / "mine.toml"
    (tmp_path / "own.py").write_text(DATASET.format(mark=str(mark)))
    card.write_text('name = "mine"\ntitle = "M"\nsummary = "s"\nentry_point = "own.py:load"\nneeds_files = false\n')
    small = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}})
    made = planning.plan(find_model("zoom"), find_dataset(str(card)), small, out=run, limit=2, quiet=True)
    sampling.sample(made, QUIET)
    scoring.score(made, QUIET, ["motion"])
    code, said = command(monkeypatch, capsys, "score", str(run), "--metrics", "motion")
    assert code == 0, said  # the planning above was given the path of the card
    monkeypatch.setenv("DCBENCH_CACHE", str(tmp_path / "another_machine"))
    mark.unlink()
    code, said = command(monkeypatch, capsys, "score", str(run), "--metrics", "motion")
    assert (code, mark.exists()) == (2, False)
    assert "which this machine does not know" in said and "--dataset CARD.toml" in said
    code, said = command(monkeypatch, capsys, "score", str(run), "--metrics", "motion", "--dataset", str(card))
    assert (code, mark.exists()) == (0, True), said
    code, said = command(monkeypatch, capsys, "score", str(run), "--metrics", "motion", "--dataset", "shapes")
    assert code == 2
    assert "made on the data set 'mine', but --dataset gives 'shapes'" in said


@pytest.mark.parametrize(
    ("entry_point", "message"),
    [
        ("os:system", "not allowed"),
        ("builtins:eval", "not allowed"),
        ("subprocess:run", "not allowed"),
        ("importlib.util:find_spec", "not allowed"),
        (".x:y", "not allowed"),
        ("a b:c", "not allowed"),
        ("x.py:", "not allowed"),
        ("json", "not allowed"),
        ("dcbench.errors:nothing", "cannot be loaded: AttributeError"),
        ("dcbench.version:__version__", "is a str; expected a function or a class"),
    ],
)
def test_an_entry_point_is_code_of_ones_own(entry_point, message):
    with pytest.raises(UserError, match=message):
        load_entry_point(Card(name="odd", title="Odd", summary="s", entry_point=entry_point))


def test_a_file_of_code_may_have_the_name_of_a_library(tmp_path):
    (tmp_path / "json.py").write_text("import json\ndef load():\n    return json.dumps([1])\n")
    card = Card(name="odd", title="Odd", summary="s", entry_point=f"{tmp_path}/json.py:load")
    assert load_entry_point(card)() == "[1]"
    assert sys.modules["json"] is json
